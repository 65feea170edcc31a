"""This machine as a host: in a process of its own that a crash, a hang or a leak cannot take us with."""

import os
import sys

from autocompress.device.process import WorkerHost, WorkerProcess


class LocalHost(WorkerHost):
    """Measures on this machine, with this Python."""

    def _start(self) -> WorkerProcess:
        path = [self._environment.get("PYTHONPATH", ""), *(p or os.getcwd() for p in sys.path)]
        return WorkerProcess(
            [sys.executable, "-P", "-m", "autocompress.device.worker"],
            self._profile.measure.timeout_s,
            environment={**self._environment, "PYTHONPATH": os.pathsep.join(p for p in path if p)},
        )
