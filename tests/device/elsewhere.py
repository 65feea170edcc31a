"""A host whose worker some other command starts: another environment, another kind of processor."""

from collections.abc import Sequence
from pathlib import Path

from autocompress.core.profile import Profile
from autocompress.device.process import WorkerHost, WorkerProcess

ROOT = Path(__file__).parents[2]
WORKER = ("-P", "-m", "autocompress.device.worker")


class ElsewhereHost(WorkerHost):
    """Runs its worker by a command."""

    def __init__(self, command: Sequence[str], profile: Profile, path: str = str(ROOT)) -> None:
        super().__init__(profile, environment={"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"})
        self._command = command

    def _start(self) -> WorkerProcess:
        return WorkerProcess(self._command, self._profile.measure.timeout_s, environment=self._environment)
