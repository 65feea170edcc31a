"""A finished run of two models that are worth a cascade: a fast one that errs near its borders, and a slow one.

The task is linear, so that the right answers are known; the slow model is the same map with work between.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, save

from autocompress.core.artifact import Artifact
from autocompress.core.measurement import Measurement, MeasurePlan
from autocompress.core.trial import Score, Trial
from autocompress.device.local import LocalHost
from autocompress.run import Run
from tests import made
from tests.models import artifact_of, write_inputs, write_linear
from tests.scripted import PROFILE, config

FEATURES, CLASSES, WIDE, ITEMS = 16, 5, 256, 400
QUICK = replace(
    PROFILE,
    measure=MeasurePlan(
        warmup_runs=1, warmup_s=0, turn_s=0.001, min_blocks=8, max_duration_s=0.1, target_ci=0.1, processes=2
    ),
)
TASK = """
import numpy as np, torch
from torch.utils.data import TensorDataset
from autocompress import Task
from tests.toy import items, weight
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(*weight().shape, bias=False)
        self.fc.weight = torch.nn.Parameter(torch.from_numpy(weight().T.copy()))
    def forward(self, input):
        return self.fc(input)
def split(seed):
    x, y = items(seed)
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
task = Task(name="toy", model=Net, train=split(1), validation=split(2), test=split(3){more})
"""


def weight() -> np.ndarray:
    """The right map, (FEATURES, CLASSES)."""
    return np.random.default_rng(0).normal(size=(FEATURES, CLASSES)).astype(np.float32)


def items(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and their classes."""
    x = np.random.default_rng(seed).normal(size=(ITEMS, FEATURES)).astype(np.float32)
    return x, np.argmax(x @ weight(), axis=1)


def write_slow(path: Path, layers: int) -> Path:
    """The right map with `layers` wide identities in the middle."""
    spread = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDE, FEATURES)))[0].T.astype(np.float32)
    weights = {"first": spread, "same": np.eye(WIDE, dtype=np.float32), "last": spread.T @ weight()}
    names = ["first", *["same"] * layers, "last"]
    values = ["input", *(f"v{i}" for i in range(len(names) - 1)), "output"]
    nodes = [
        helper.make_node("MatMul", [values[i], name], [values[i + 1]], name=f"m{i}") for i, name in enumerate(names)
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("input", FEATURES), ("output", CLASSES))
    ]
    tensors = [helper.make_tensor(n, TensorProto.FLOAT, w.shape, w.tobytes(), raw=True) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], tensors)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def run(folder: Path, more: str = "") -> Run:
    """fp32 (trial 0), the fast model (2) and the slow one (3), with their real figures; `more` is said of the task."""
    folder.mkdir()
    (folder / "task.py").write_text(TASK.replace("{more}", more))
    found = Run.create(folder / "run", config(task=str(folder / "task.py"), task_name="toy", profile=QUICK))
    x, y = items(2)
    write_inputs(found.data / "validation", input=x)
    noisy = weight() + 0.15 * np.random.default_rng(5).normal(size=(FEATURES, CLASSES)).astype(np.float32)
    files = {
        0: write_slow(found.artifacts / "fp32.onnx", 30),
        2: write_linear(found.artifacts / "fast.onnx", noisy, np.zeros(CLASSES, np.float32)),
        3: write_slow(found.artifacts / "slow.onnx", 20),
    }
    artifacts = {n: artifact_of(p, (None, FEATURES), (None, CLASSES)) for n, p in files.items()}
    with LocalHost(QUICK) as host:
        timed = host.measure([artifacts[0], *artifacts.values()], found.data / "validation")
    accuracies = {0: 1.0, 2: float(np.mean(np.argmax(x @ noisy, axis=1) == y)), 3: 0.9999}
    found.write_final(
        [
            _trial(number, accuracies[number], measured, artifacts[number], found)
            for number, measured in zip(files, timed, strict=True)
        ]
    )
    return found


def _trial(number: int, accuracy: float, measured: Measurement, artifact: Artifact, run: Run) -> Trial:
    score: Score = made.score(
        accuracy, measured.ratio, ratio_ci=measured.ratio_ci, size_bytes=artifact.size_bytes, executed={}
    )
    return replace(
        made.trial(number, score, "fp32" if number == 0 else "candidate"),
        artifact=replace(artifact, path=str(Path(artifact.path).relative_to(run.path))),
        measurement=measured,
    )
