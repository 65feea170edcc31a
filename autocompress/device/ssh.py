"""A device that is reached by ssh: the worker runs there, and talks through the connection's own pipes.

No port is opened, and nothing that the user or a model names is part of a command there: the remote command is a
constant, everything else travels as JSON. Keys, known hosts and addresses are those of the user's own ssh.
"""

import base64
import functools
import hashlib
import io
import os
import time
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autocompress.core.artifact import sha256_of
from autocompress.core.errors import StageError, TargetError
from autocompress.core.profile import Profile
from autocompress.device.files import PIECE
from autocompress.device.process import WorkerHost, WorkerProcess

# A Python on the device that has numpy, psutil and the runtime already: nothing is installed then.
PYTHON_VARIABLE = "AUTOCOMPRESS_REMOTE_PYTHON"
BASE = ("numpy>=2", "psutil>=6")
REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime>=1.22",),
    "openvino": ("openvino>=2026.0",),
    "litert": ("ai-edge-litert>=2.1",),
    "tensorrt": ("tensorrt>=10.8", "cuda-bindings>=12.6", "nvidia-ml-py>=12"),
}

# `exit $?`: the shell stays to tell of a signal; ssh alone would say 255, as for a lost connection.
REMOTE = (
    """exec /bin/sh -c 'python3 -c "import sys, json; job = json.loads(sys.stdin.readline()); """
    r"""exec(job[\"bootstrap\"]); main(job)"; exit $?'"""
)
# A dead connection is noticed after 15 s. The user's own configuration decides about everything not said here.
OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3")
# A board is back from a reboot in about a minute; a search does not wait for ever.
RETURN_S = 180.0
RETRY_S = 2.0


class SshHost(WorkerHost):
    """Measures on the device `user@host`; a lost one may come back, which is waited for a limited time."""

    def __init__(
        self,
        user_host: str,
        port: int | None,
        profile: Profile,
        *,
        environment: Mapping[str, str] | None = None,
        return_s: float = RETURN_S,
    ) -> None:
        super().__init__(profile, environment=environment)
        self._where = f"ssh:{user_host}" + (f":{port}" if port else "")
        options = [word for option in OPTIONS for word in ("-o", option)]
        # -T no terminal, -x -a no forwarding of X11 or of the agent
        self._command = [
            "ssh",
            "-T",
            "-x",
            "-a",
            *options,
            *(["-p", str(port)] if port else []),
            "--",
            user_host,
            REMOTE,
        ]
        self._return_s = return_s
        self._reached = False
        self._digests: dict[tuple[Path, int, int], str] = {}

    def _start(self) -> WorkerProcess:
        give_up = time.monotonic() + (self._return_s if self._reached else 0.0)
        while True:
            worker = WorkerProcess(self._command, self._profile.measure.timeout_s, where=self._where)
            try:
                worker.ask(self._terms())
            except (StageError, TargetError) as error:
                worker.close()
                if not worker.cut_off or time.monotonic() >= give_up:
                    raise TargetError(str(error)) from error
                time.sleep(RETRY_S)
            else:
                self._reached = True
                return worker

    def _terms(self) -> Mapping[str, Any]:
        return {
            "bootstrap": Path(__file__).with_name("bootstrap.py").read_text(encoding="utf-8"),
            "code": code(),
            "python": os.environ.get(PYTHON_VARIABLE),
            "requirements": [*BASE, *REQUIREMENTS.get(self._profile.runtime, ())],
            "environment": self._environment,
        }

    def _do(self, worker: WorkerProcess, job: Mapping[str, Any]) -> Any:
        """The files that a job names are taken there by hash first, and its outputs back."""
        there = dict(job)
        if "artifacts" in job:
            there["artifacts"] = [self._taken(worker, artifact) for artifact in job["artifacts"]]
            there["inputs"] = self._inputs(worker, Path(job["inputs"]))
        if "out" not in job:
            return worker.ask(there)
        there["out"] = f"outputs/{uuid.uuid4().hex}"
        found = worker.ask(there)
        for name in found:
            self._fetch(worker, there["out"], name, Path(job["out"]))
        worker.ask({"job": "remove", "path": there["out"]})
        return found

    def _taken(self, worker: WorkerProcess, artifact: Mapping[str, Any]) -> Mapping[str, Any]:
        if "rule" in artifact:
            return {**artifact, **{name: self._taken(worker, artifact[name]) for name in ("small", "large")}}
        path = Path(artifact["path"])
        name = f"models/{artifact['sha256']}{path.suffix}"
        self._push(worker, path, artifact["sha256"], name)
        return {**artifact, "path": name}

    def _inputs(self, worker: WorkerProcess, folder: Path) -> str:
        """The folder of these inputs there; as here, it is the names in it that say which input a file is."""
        digests = {path: self._digest(path) for path in sorted(folder.glob("*.npy"))}
        key = hashlib.sha256(repr([(p.name, d) for p, d in digests.items()]).encode()).hexdigest()
        for path, digest in digests.items():
            self._push(worker, path, digest, f"inputs/{key}/{path.name}")
        return f"inputs/{key}"

    def _digest(self, path: Path) -> str:
        stat = path.stat()
        key = (path, stat.st_size, stat.st_mtime_ns)
        if key not in self._digests:
            self._digests[key] = sha256_of(path)
        return self._digests[key]

    def _push(self, worker: WorkerProcess, path: Path, digest: str, there: str) -> None:
        try:
            if worker.ask({"job": "has", "path": there, "size": path.stat().st_size}):
                return
            with path.open("rb") as file:
                for at in range(0, path.stat().st_size, PIECE):
                    data = base64.b64encode(file.read(PIECE)).decode("ascii")
                    worker.ask({"job": "put", "path": there, "at": at, "data": data})
        except FileNotFoundError as error:
            raise StageError(
                "load", f"there is no file {path}: it was moved or removed since it was written"
            ) from error
        worker.ask({"job": "keep", "path": there, "sha256": digest, "name": str(path)})

    def _fetch(self, worker: WorkerProcess, folder: str, name: str, out: Path) -> None:
        if Path(name).name != name:  # it becomes a file here
            raise StageError("score", f"{self._where}: {name!r} cannot be the name of an output")
        out.mkdir(parents=True, exist_ok=True)
        with (out / f"{name}.npy").open("wb") as file:
            while piece := worker.ask({"job": "get", "path": f"{folder}/{name}.npy", "at": file.tell()}):
                file.write(base64.b64decode(piece))


@functools.cache
def code() -> str:
    """What of this package runs on a device, as a zip file in base64; the same for the same sources."""
    root = Path(__file__).parent.parent
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for path in (root / "__init__.py", *sorted(root.glob("core/*.py")), *sorted(root.glob("device/*.py"))):
            file.writestr(zipfile.ZipInfo(f"{root.name}/{path.relative_to(root)}"), path.read_bytes())
    return base64.b64encode(packed.getvalue()).decode("ascii")
