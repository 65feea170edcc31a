"""From a task to an engine, as far as it goes without a GPU: TensorRT and CUDA are the modules by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autocompress.build import Builder, Stopwatch
from autocompress.config import load_profile
from autocompress.core.artifact import Artifact
from autocompress.core.candidate import Candidate, FloatPrecision, LayerChoice, Sparsity, parse_precision
from autocompress.device.tensorrt import TensorRt
from autocompress.export.parity import sqnr_db
from autocompress.task import CheckedTask
from tests import tiny
from tests.device.nvidia import Gpu, install

LAYERS = ("conv", "up", "fc")
NAMES: dict[FloatPrecision, str] = {"fp32": "fp32", "fp16": "fp16"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return install(monkeypatch)


@pytest.fixture(scope="module")
def task() -> CheckedTask:
    return tiny.task()


@pytest.fixture(scope="module")
def builder(task: CheckedTask, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    folder = tmp_path_factory.mktemp("build")
    (folder / "artifacts").mkdir()
    return Builder(task, folder, load_profile("nvidia-tensorrt"))


def run(artifact: Artifact, task: CheckedTask) -> tuple[float, dict[str, str] | None]:
    """Signal-to-noise ratio to torch, and what ran."""
    batch = task.batch("validation", range(8))[0]
    session = TensorRt().load(Path(artifact.path), {**load_profile("nvidia-tensorrt").options, **artifact.options})
    with torch.no_grad():
        wanted = task.call(task.model, batch).numpy()
    (got,) = session.run({name: np.asarray(tensor) for name, tensor in batch.items()}).values()
    executed = session.executed_precision()
    session.close()
    return sqnr_db(wanted, got), executed


@pytest.mark.parametrize("floats", NAMES)
def test_what_is_asked_of_each_layer_is_what_runs(
    gpu: Gpu, builder: Builder, task: CheckedTask, floats: FloatPrecision
) -> None:
    layers = dict.fromkeys(("conv", "fc"), parse_precision("w8a8"))
    artifact = builder.build(Candidate(layers=layers, float_precision=floats), Stopwatch()).artifact
    ratio, executed = run(artifact, task)
    assert ratio > 20
    assert executed == {"conv": "int8", "up": NAMES[floats], "fc": "int8"}
    assert artifact.options == {}


def test_the_builder_is_told_of_the_pattern_and_of_nothing_else(gpu: Gpu, builder: Builder, task: CheckedTask) -> None:
    pattern = Sparsity(ratio=0.5, pattern="2:4")
    sparse = builder.build(Candidate(layers={"up": LayerChoice(sparsity=pattern)}), Stopwatch()).artifact
    assert sparse.options == {"sparse_weights": True}
    spread = builder.build(Candidate(layers={"up": LayerChoice(sparsity=Sparsity(ratio=0.5))}), Stopwatch()).artifact
    assert spread.options == {}
    for artifact in (sparse, spread):
        run(artifact, task)
    assert [build["flags"] for build in gpu.builds] == [{"SPARSE_WEIGHTS"}, set()]


def test_every_baseline_is_an_engine(gpu: Gpu, builder: Builder, task: CheckedTask) -> None:
    floats: list[FloatPrecision] = ["fp32", "fp16"]
    made = [builder.build(Candidate(float_precision=f), Stopwatch()).artifact for f in floats]
    ratios = [run(artifact, task)[0] for artifact in (*made, builder.vendor_int8(Stopwatch()))]
    assert [ratio > least for ratio, least in zip(ratios, (90, 40, 20), strict=True)] == [True] * 3
    assert run(builder.vendor_int8(Stopwatch()), task)[1] == dict.fromkeys(LAYERS, "int8")


def test_eight_bit_floats_are_a_dialect_of_the_profile(gpu: Gpu, task: CheckedTask, tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    builder = Builder(task, tmp_path, replace(load_profile("nvidia-tensorrt"), dialect="fp8"))
    layers = dict.fromkeys(LAYERS, parse_precision("w8a8"))
    ratio, _ = run(builder.build(Candidate(layers=layers, float_precision="fp16"), Stopwatch()).artifact, task)
    assert ratio > 15
