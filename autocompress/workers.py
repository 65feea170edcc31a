"""Further processes of one search on this machine."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from autocompress.loop import Budget
from autocompress.run import Run

PARENT_VARIABLE = "AUTOCOMPRESS_PARENT"
STOP_TIMEOUT_S = 10


class Workers:
    """`count` processes of `autocompress worker`, which end when the budget is spent or this process is gone.

    This process measures on the first of `hosts`, they on the next, in turn.
    """

    def __init__(self, run: Run, count: int, budget: Budget, hosts: Sequence[str]) -> None:
        self._run = run
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        command = [sys.executable, "-m", "autocompress", "worker", "--storage", run.storage]
        command += ["--study", run.config.study, "--of", str(count + 1)]
        if budget.trials is not None:
            command += ["--trials", str(budget.trials)]
        if budget.deadline < math.inf:
            command += ["--timeout", f"{max(0.0, budget.deadline - time.monotonic()):.1f}"]
        for index in range(1, count + 1):
            with (run.path / f"worker-{index}.log").open("ab") as log:
                # A session of its own: Ctrl-C reaches this process only, which then stops the workers.
                self._processes[index] = subprocess.Popen(
                    [*command, "--index", str(index), "--on", hosts[index % len(hosts)]],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=os.environ | {PARENT_VARIABLE: str(os.getpid())},
                )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def check(self) -> None:
        """Log the workers that have ended since."""
        for index, process in list(self._processes.items()):
            if process.poll() is not None:
                self._note(index)

    def join(self) -> None:
        """Wait until all have ended."""
        for index, process in list(self._processes.items()):
            process.wait()
            self._note(index)

    def _note(self, index: int) -> None:
        process = self._processes.pop(index)
        self._run.log("worker_ended", index=index, exit_code=process.returncode, log=f"worker-{index}.log")
