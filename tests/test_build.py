import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from autocompress.build import Builder, Stopwatch
from autocompress.compress.qat import Aware
from autocompress.compress.quantize import Learned
from autocompress.compress.width import cut_widths
from autocompress.config import load_profile
from autocompress.core.artifact import Artifact, sha256_of
from autocompress.core.candidate import Candidate, LayerChoice, Sparsity, parse_precision
from autocompress.core.errors import StageError, TargetError, TaskError
from autocompress.core.recipe import Quantize, Recipe, Stage, Train
from autocompress.export.parity import float_difference, run_onnx, sqnr_db
from autocompress.task import CheckedTask
from tests import nets, tiny

LAYERS = ("conv", "up", "fc")
PROFILE = replace(load_profile("cpu-onnxruntime"), integer_weight_bits=7)


def all_layers(precision: str, **more: Any) -> dict[str, LayerChoice]:
    return {name: replace(parse_precision(precision), **more) for name in LAYERS}


def folder(path: Path) -> Path:
    (path / "artifacts").mkdir()
    return path


def outputs(artifact: Artifact, task: CheckedTask, items: int = 8) -> np.ndarray:
    feeds = {name: tensor.numpy() for name, tensor in task.batch("validation", range(items))[0].items()}
    (got,) = run_onnx(Path(artifact.path).read_bytes(), feeds)
    return got


def torch_outputs(net: nn.Module, task: CheckedTask, items: int = 8) -> np.ndarray:
    with torch.no_grad():
        return task.call(net, task.batch("validation", range(items))[0]).numpy()


@pytest.fixture(scope="module")
def task() -> CheckedTask:
    return tiny.task(student=tiny.student)


@pytest.fixture(scope="module")
def builder(task: CheckedTask, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(task, folder(tmp_path_factory.mktemp("build")), PROFILE)


def build(builder: Builder, candidate: Candidate) -> tuple[Artifact, dict[str, float]]:
    watch = Stopwatch()
    return builder.build(candidate, watch).artifact, dict(watch.seconds)


def test_the_exported_original_is_exact(builder: Builder, task: CheckedTask) -> None:
    assert builder.float_difference < 1e-5
    artifact, _ = build(builder, Candidate())
    assert float_difference([outputs(artifact, task)], [torch_outputs(task.model, task)]) < 1e-5


def test_an_artifact_says_what_the_file_is(builder: Builder) -> None:
    candidate = Candidate(layers=all_layers("w7a8"))
    artifact, _ = build(builder, candidate)
    path = Path(artifact.path)
    assert path.is_absolute()
    assert path.name == f"{candidate.digest}.onnx"
    assert (artifact.sha256, artifact.size_bytes) == (sha256_of(path), path.stat().st_size)
    assert artifact.dynamic_batch
    assert [(s.name, s.shape) for s in artifact.inputs] == [("x", (None, 3, 8, 8))]
    assert [(s.name, s.shape) for s in artifact.outputs] == [("output", (None, 5))]
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".onnx"] == []
    onnx.checker.check_model(onnx.load(path), full_check=True)


@pytest.mark.parametrize("widths", [{"conv": 4}, {"up": 8}, {"conv": 4, "up": 12}])
def test_a_cut_candidate_computes_what_the_cut_model_does(
    builder: Builder, task: CheckedTask, widths: dict[str, int]
) -> None:
    artifact, _ = build(builder, Candidate(widths=widths))
    initialisers = {i.name: list(i.dims) for i in onnx.load(artifact.path).graph.initializer}
    assert initialisers["conv.weight"][0] == widths.get("conv", 8)
    assert initialisers["fc.weight"] == [5, widths.get("up", 24)]
    assert artifact.size_bytes < build(builder, Candidate())[0].size_bytes
    assert np.isfinite(outputs(artifact, task)).all()


def test_quantized_candidates_are_near_their_float_model(builder: Builder, task: CheckedTask) -> None:
    for widths in ({}, {"conv": 4}):
        exact = outputs(build(builder, Candidate(widths=widths))[0], task)
        near = outputs(build(builder, Candidate(widths=widths, layers=all_layers("w7a8")))[0], task)
        assert 25 < sqnr_db(exact, near) < 80


def test_candidates_that_differ_in_bits_share_the_float_model_and_its_calibration(builder: Builder) -> None:
    widths = {"conv": 4, "up": 20}
    _, first = build(builder, Candidate(widths=widths, layers=all_layers("w7a8")))
    assert {"compress", "settle", "calibrate", "export"} <= first.keys()
    _, second = build(builder, Candidate(widths=widths, layers=all_layers("w4a8")))
    assert second.keys() == {"export"}


def test_calibrators_give_different_files(builder: Builder) -> None:
    made = [
        build(builder, Candidate(layers=all_layers("w7a8"), recipe=Recipe(calibrator=c)))[0].sha256
        for c in ("minmax", "percentile", "mse")  # type: ignore[arg-type]
    ]
    assert len(set(made)) == 3


def test_the_same_candidate_gives_the_same_bytes(builder: Builder) -> None:
    candidate = Candidate(widths={"up": 16}, layers=all_layers("w7a8", sparsity=Sparsity(ratio=0.5)))
    first, _ = build(builder, candidate)
    for width in (4, 8, 12, 20):  # push the first out of memory
        build(builder, Candidate(widths={"up": width}))
    second, seconds = build(builder, candidate)
    assert "compress" in seconds
    assert first.sha256 == second.sha256


def test_the_users_model_is_never_changed(builder: Builder, task: CheckedTask) -> None:
    before = copy.deepcopy(task.model.state_dict())
    layers = all_layers("w4a8", sparsity=Sparsity(ratio=0.5))
    build(builder, Candidate(widths={"conv": 4}, layers=layers, recipe=Recipe(recover_steps=1)))
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_recovered_weights_are_found_on_disk_by_who_builds_in_the_same_run(builder: Builder, task: CheckedTask) -> None:
    candidate = Candidate(widths={"conv": 4}, recipe=Recipe(recover_steps=3))
    first, seconds = build(builder, candidate)
    assert "recover" in seconds
    run = Path(first.path).parent.parent
    assert (run / "weights" / f"{candidate.weights_key}.safetensors").exists()
    other = Builder(task, run, PROFILE)
    second, seconds = build(other, candidate)
    assert "recover" not in seconds
    assert second.sha256 == first.sha256
    unrecovered, _ = build(other, replace(candidate, recipe=Recipe()))
    assert unrecovered.sha256 != first.sha256


def test_a_student_has_a_file_of_its_own_topology(builder: Builder, task: CheckedTask) -> None:
    artifact, _ = build(builder, Candidate(student=0.5))
    assert {tuple(i.dims) for i in onnx.load(artifact.path).graph.initializer if i.name == "fc.weight"} == {(5, 12)}
    quantized, _ = build(builder, Candidate(student=0.5, layers=all_layers("w7a8")))
    assert sqnr_db(outputs(artifact, task), outputs(quantized, task)) > 25


@pytest.mark.parametrize(
    ("candidate", "stage", "message"),
    [
        (Candidate(student=0.125), "export", "the exported graph does not compute what the torch model does"),
        (Candidate(widths={"conv": 9}), "compress", "group 'conv' has 8 channels in 1 parts: it cannot keep 9"),
    ],
)
def test_what_cannot_be_built_fails_in_its_stage(
    builder: Builder, candidate: Candidate, stage: str, message: str
) -> None:
    with pytest.raises(StageError, match=message) as caught:
        build(builder, candidate)
    assert caught.value.stage == stage
    build(builder, Candidate())


def test_choices_for_a_layer_that_is_not_there_are_passed_over(builder: Builder) -> None:
    """A student may lack a layer of the original."""
    absent = LayerChoice(weight_bits=4, sparsity=Sparsity(ratio=0.5))
    assert build(builder, Candidate(layers={"no": absent}))[0].sha256 == build(builder, Candidate())[0].sha256


def test_a_topology_whose_sizes_are_baked_into_the_graph_is_exported_again(tmp_path: Path) -> None:
    task = tiny.task(nets.Baked)
    builder = Builder(task, folder(tmp_path), PROFILE)
    (group,) = builder.structure.groups
    artifact, _ = build(builder, Candidate(widths={group.name: 8}))
    cut = cut_widths(task.model, builder._setting.anatomy.groups, {group.name: 8})
    assert float_difference([outputs(artifact, task)], [torch_outputs(cut, task)]) < 1e-5
    layers = {name: parse_precision("w7a8") for name in ("conv", "fc")}
    quantized, seconds = build(builder, Candidate(widths={group.name: 8}, layers=layers))
    assert sqnr_db(torch_outputs(cut, task), outputs(quantized, task)) > 25
    assert seconds.keys() == {"calibrate", "export", "check"}


def test_a_model_of_one_batch_size_is_built_calibrated_and_checked_in_ones(tmp_path: Path) -> None:
    task = tiny.task(nets.OneByOne, nets.rows)
    artifact, _ = build(Builder(task, folder(tmp_path), PROFILE), Candidate(layers={"fc": parse_precision("w7a8")}))
    assert not artifact.dynamic_batch
    assert artifact.inputs[0].shape == (1, 12)
    assert sqnr_db(torch_outputs(task.model, task, 1), outputs(artifact, task, 1)) > 20


class Noisy(nn.Module):
    """Answers otherwise each time it is asked: no graph can be equal to it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.fc(input) * (1 + torch.rand_like(input[:, :1]))


def test_a_model_that_the_exported_graph_does_not_equal_is_a_fault_of_the_task(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"outputs differ by .* of their largest value, at most 0\.001 is accepted"):
        Builder(tiny.task(Noisy, nets.rows), folder(tmp_path), PROFILE)


def test_activations_rounded_at_run_time_are_not_made_for_onnx(builder: Builder) -> None:
    with pytest.raises(StageError, match="layer 'fc': w8d8 is made for LiteRT only") as caught:
        build(builder, Candidate(layers={"fc": parse_precision("w8d8")}))
    assert caught.value.stage == "export"


def test_the_vendors_file_is_that_of_the_original(builder: Builder, task: CheckedTask) -> None:
    watch = Stopwatch()
    artifact = builder.vendor_int8(watch)
    assert Path(artifact.path).name == "uniform-int8.onnx"
    assert sqnr_db(torch_outputs(task.model, task), outputs(artifact, task)) > 15
    assert watch.seconds["export"] > 0


def raising(error: Exception) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("error", "wanted", "message"),
    [
        (ZeroDivisionError("by zero\nand more"), StageError, "^ZeroDivisionError: by zero$"),
        (RuntimeError(), StageError, "^RuntimeError: $"),
        (StageError("load", "said"), StageError, "^said$"),
        (TargetError("not here"), TargetError, "^not here$"),
    ],
)
def test_what_a_stage_raises_becomes_its_failure_unless_it_is_ours(
    error: Exception, wanted: type[Exception], message: str
) -> None:
    watch = Stopwatch()
    with pytest.raises(wanted, match=message) as caught, watch("score"):
        raising(error)()
    if isinstance(caught.value, StageError):
        assert caught.value.stage == ("load" if isinstance(error, StageError) else "score")
    assert watch.seconds["score"] >= 0


def test_seconds_of_a_stage_add_up() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch("a"):
            sum(range(1000))
    with watch("b"):
        pass
    assert list(watch.seconds) == ["a", "b"]
    assert watch.seconds["a"] > watch.seconds["b"] >= 0


def test_a_file_gives_what_was_simulated_in_training(
    builder: Builder, task: CheckedTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated: list[np.ndarray] = []
    finish = Aware.finish

    def looked_at(aware: Aware) -> Learned:
        simulated.append(torch_outputs(aware.model, task, 64))
        return finish(aware)

    monkeypatch.setattr(Aware, "finish", looked_at)
    stages = (Stage(name="aware", quantize=Quantize(aware=True), train=Train(batch_size=16, optimizer="adamw")),)
    candidate = Candidate(layers=all_layers("w4a8"), recipe=Recipe(recover_steps=6, stages=stages))
    trained = outputs(build(builder, candidate)[0], task, 64)
    rounded = outputs(build(builder, replace(candidate, recipe=Recipe()))[0], task, 64)
    assert sqnr_db(simulated[0], trained) > 30
    assert sqnr_db(simulated[0], rounded) < 25
