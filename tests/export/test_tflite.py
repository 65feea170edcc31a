import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autocompress.compress.absorb import absorb
from autocompress.compress.layers import describe
from autocompress.compress.quantize import Learned
from autocompress.config import load_profile
from autocompress.core.candidate import Candidate, LayerChoice, parse_precision
from autocompress.core.errors import StageError
from autocompress.device.litert import LiteRt
from autocompress.export.exporter import Source
from autocompress.export.flatbuffer import Flatbuffer
from autocompress.export.parity import sqnr_db
from autocompress.export.tflite import TfliteExporter
from autocompress.export.tflite_layers import find_layers
from autocompress.export.tflite_quantize import _weights, check_types, joins
from tests import nets
from tests.export.conftest import OUTPUTS
from tests.nets import seeded

PROFILE = replace(load_profile("cpu-onnxruntime"), runtime="litert", format="tflite")


class Case:
    """A network of tests.nets, converted."""

    def __init__(self, name: str) -> None:
        build, self.inputs, call = nets.CASES[name]
        self.net = seeded(build)
        names = OUTPUTS.get(name, ("output",))

        def run(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = call(model, batch)
            return found if isinstance(found, dict) else {"output": found}

        def calibration(size: int) -> Iterator[Mapping[str, Tensor]]:
            batch = self.inputs(32, seed=1)
            for start in range(0, 32, size):
                yield {name: tensor[start : start + size] for name, tensor in batch.items()}

        by_keyword = call is nets.by_name
        self.source = Source(
            sample=self.inputs(2), outputs=names, by_keyword=by_keyword, run=run, calibration=calibration
        )
        structure, _ = describe(self.net, lambda model: call(model, self.inputs()))
        self.layers = [layer.name for layer in structure.layers]
        self.exporter = TfliteExporter(self.net, self.layers, self.source, PROFILE)
        self.float = self.exporter.convert(self.net, "", lambda _: nullcontext(), Learned())

    def lowered(self, layers: Mapping[str, LayerChoice]) -> bytes:
        return self.float.lower(Candidate(layers=layers), lambda _: nullcontext()).data

    def uniform(self, precision: str) -> dict[str, LayerChoice]:
        return dict.fromkeys(self.layers, parse_precision(precision))

    def torch(self) -> list[np.ndarray]:
        with torch.no_grad():
            return [t.numpy() for t in self.source.run(self.net, self.inputs(1, seed=7)).values()]

    def outputs(self, data: bytes, folder: Path) -> tuple[list[np.ndarray], dict[str, str]]:
        """What LiteRT gives for an item, in the order of the outputs, and what it ran."""
        path = folder / "model.tflite"
        path.write_bytes(data)
        session = LiteRt().load(path, {"threads": 1})
        types = {spec.name: spec.dtype for spec in self.float.inputs}
        got = session.run({n: t.numpy().astype(types[n]) for n, t in self.inputs(1, seed=7).items()})
        return [got[name] for name in self.source.outputs], dict(session.executed_precision())


@pytest.fixture(scope="module")
def case() -> Callable[[str], Case]:
    return cache(Case)


Get = Callable[[str], Case]


@pytest.mark.parametrize("name", ["residual", "separable", "branches", "encoder"])
def test_the_float_file_computes_what_torch_does_and_names_every_layer(case: Get, name: str, tmp_path: Path) -> None:
    made = case(name)
    assert made.exporter.difference < 1e-5
    assert dict(made.exporter.unmapped) == {}
    got, executed = made.outputs(made.lowered({}), tmp_path)
    for g, w in zip(got, made.torch(), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-4)
    assert set(made.layers) <= set(executed)
    assert set(executed.values()) == {"fp32"}


@pytest.mark.parametrize("name", ["residual", "branches", "encoder"])
def test_inputs_and_outputs_have_the_tasks_names_in_its_order(case: Get, name: str) -> None:
    made = case(name)
    assert [spec.name for spec in made.float.inputs] == list(made.inputs())
    assert [spec.name for spec in made.float.outputs] == list(made.source.outputs)
    assert all(spec.shape[0] == 1 for spec in (*made.float.inputs, *made.float.outputs))


@pytest.mark.parametrize(
    ("name", "precision", "least_db"),
    [
        ("residual", "w8a8", 25), ("residual", "w8d8", 25), ("residual", "w8a32", 30), ("residual", "w16a32", 50),
        ("separable", "w8a8", 25), ("branches", "w8a8", 25), ("encoder", "w8a8", 15), ("encoder", "w8d8", 25),
    ],
)  # fmt: skip
def test_each_precision_is_near_and_runs_as_asked(
    case: Get, name: str, precision: str, least_db: float, tmp_path: Path
) -> None:
    made = case(name)
    data = made.lowered(made.uniform(precision))
    assert len(data) < len(made.lowered({}))
    got, executed = made.outputs(data, tmp_path)
    assert min(sqnr_db(w, g) for g, w in zip(got, made.torch(), strict=True)) > least_db
    integer = parse_precision(precision).activation_bits == 8
    tables = {"tokens"}
    assert {executed[n] for n in made.layers if n not in tables} == {"int8" if integer else "fp32"}


def test_a_choice_reaches_its_layer_and_no_other(case: Get, tmp_path: Path) -> None:
    made = case("residual")
    got, executed = made.outputs(made.lowered({"conv2": parse_precision("w8a8")}), tmp_path)
    assert {name for name, ran in executed.items() if ran == "int8"} == {"conv2"}
    assert sqnr_db(made.torch()[0], got[0]) > 30


def test_what_joins_integer_layers_is_integer_too(case: Get) -> None:
    made = case("residual")
    graph = Flatbuffer(made.lowered({}))
    assert [op.kind for op in joins(graph, set(made.layers))].count("ADD") == 2
    assert joins(graph, {"conv"}) == []
    data = Flatbuffer(made.lowered(made.uniform("w8a8")))
    assert [data.dtype(op.outputs[0]) for op in data.ops() if op.kind == "ADD"] == ["INT8", "INT8"]


def test_calibrators_give_different_files(case: Get) -> None:
    made = case("residual")
    files = {
        made.float.lower(
            Candidate(layers=made.uniform("w8a8"), recipe=replace(Candidate().recipe, calibrator=calibrator)),
            lambda _: nullcontext(),
        ).data
        for calibrator in ("minmax", "percentile", "mse")
    }
    assert len(files) == 3


class OnGrid:
    """A network with its weights on integers that do not fill their range: 4 bits in linear layers, 8 in others."""

    INPUTS: Mapping[str, tuple[float, float]] = {"conv1": (0.0, 2.55), "fc": (-0.51, 2.04)}

    def __init__(self, made: Case) -> None:
        self.net = copy.deepcopy(made.net)
        absorb(self.net, lambda model: made.source.run(model, made.inputs(2)))
        self.choices, self.integers, self.scales = {}, {}, {}
        for name in made.layers:
            module = self.net.get_submodule(name)
            bits = 4 if isinstance(module, nn.Linear) else 8
            weight = module.get_parameter("weight")
            scale = weight.detach().abs().flatten(1).amax(1) / (0.6 * (2 ** (bits - 1) - 1))
            each = scale.view(-1, *[1] * (weight.ndim - 1))
            q = (weight.detach() / each).round()
            weight.data = q * each
            self.choices[name] = parse_precision(f"w{bits}a8")
            self.integers[name], self.scales[name] = q.numpy(), scale.numpy()
        learned = Learned(scales=self.scales, inputs=self.INPUTS)
        self.float = made.exporter.convert(self.net, "grid", lambda _: nullcontext(), learned)
        with torch.no_grad():
            self.wanted = self.net(*made.inputs(1, seed=7).values()).numpy()

    def lowered(self, layers: Mapping[str, LayerChoice]) -> bytes:
        return self.float.lower(Candidate(layers=layers), lambda _: nullcontext()).data


@pytest.fixture(scope="module")
def grid(case: Get) -> Callable[[str], OnGrid]:
    return cache(lambda name: OnGrid(case(name)))


@pytest.mark.parametrize("name", ["residual", "separable"])
@pytest.mark.parametrize("activations", [8, 32])
def test_a_learned_grid_reaches_the_file_exactly(
    case: Get, grid: Callable[[str], OnGrid], name: str, activations: int, tmp_path: Path
) -> None:
    made, on = case(name), grid(name)
    choices = {n: replace(choice, activation_bits=activations) for n, choice in on.choices.items()}
    if activations == 32:
        choices = {n: choice for n, choice in choices.items() if choice.weight_bits == 8}
    data = on.lowered(choices)
    graph = Flatbuffer(data)
    for layer, (op, tensor) in _weights(graph).items():
        if layer not in choices:
            continue
        q, (scale, axis) = on.integers[layer], graph.scales(tensor)
        np.testing.assert_array_equal(scale, on.scales[layer])
        if (stored := graph.constant(tensor)) is not None:  # of 8 bits
            rows = np.moveaxis(stored, axis, 0).reshape(len(q), -1)
            flat = (np.moveaxis(q, 1, -1) if op.kind == "CONV_2D" else q).reshape(len(q), -1)
            np.testing.assert_array_equal(rows, flat)
    got, _ = made.outputs(data, tmp_path)  # 4 bits decoded otherwise would not be near
    assert sqnr_db(on.wanted, got[0]) > (20 if activations == 8 else 40)


def test_a_learned_range_reaches_the_file(grid: Callable[[str], OnGrid]) -> None:
    on = grid("residual")
    graph = Flatbuffer(on.lowered(on.choices))
    ops = {name: op for name, (op, _) in _weights(graph).items()}
    for layer in on.INPUTS:
        np.testing.assert_allclose(graph.scales(ops[layer].inputs[0])[0], [0.01], rtol=1e-5)
    assert abs(graph.scales(ops["conv2"].inputs[0])[0][0] - 0.01) > 1e-4


@pytest.mark.parametrize(("precision", "words"), [("k4a32", "no codebooks"), ("w8a4", "activations of 8 bits")])
def test_what_the_format_has_no_form_of_is_refused(case: Get, precision: str, words: str) -> None:
    made = case("residual")
    with pytest.raises(StageError, match=f"LiteRT has no {precision}; it has {words}: choose .* for layer 'conv1'"):
        made.lowered({"conv1": parse_precision(precision)})


def test_the_vendors_file_takes_and_gives_floats(case: Get, tmp_path: Path) -> None:
    made = case("residual")
    got, executed = made.outputs(made.float.vendor_int8(lambda _: nullcontext()).data, tmp_path)
    assert sqnr_db(made.torch()[0], got[0]) > 10
    assert set(executed.values()) == {"int8"}


def test_the_vendors_file_of_a_model_with_attention_rounds_activations_at_run_time(case: Get, tmp_path: Path) -> None:
    made = case("encoder")
    got, executed = made.outputs(made.float.vendor_int8(lambda _: nullcontext()).data, tmp_path)
    assert min(sqnr_db(w, g) for g, w in zip(got, made.torch(), strict=True)) > 20
    assert {ran for name, ran in executed.items() if name in made.layers and name != "tokens"} == {"int8"}


def test_what_the_quantizer_has_not_is_a_failure_with_its_words(case: Get) -> None:
    made = case("separable")
    with pytest.raises(StageError, match=r"litert-quantizer fails: .*DEPTHWISE_CONV_2D") as caught:
        made.lowered({"depthwise.0": parse_precision("w4a8")})
    assert caught.value.stage == "export"


def test_types_that_are_not_those_asked_for_are_found(case: Get) -> None:
    made = case("residual")
    data = made.lowered({"conv2": parse_precision("w8a8")})
    check_types(data, {"conv2": parse_precision("w8a8"), "conv1": LayerChoice()})
    with pytest.raises(StageError, match="layer 'conv1': w8a8 was asked for, the file has FLOAT32 weights, FLOAT32 in"):
        check_types(data, {"conv1": parse_precision("w8a8")})
    with pytest.raises(StageError, match="layer 'no' is not in the quantized file"):
        check_types(data, {"no": parse_precision("w8a8")})


def test_layers_of_equal_weights_are_left_alone(case: Get) -> None:
    made = case("residual")
    twin = seeded(nets.Residual)
    twin.add_module("twin", twin.get_submodule("conv2"))
    found = find_layers(Flatbuffer(made.lowered({})), twin, [*made.layers, "twin"])
    assert set(made.layers) - set(found) == {"conv2"}
    assert "twin" not in found


def test_a_student_may_lack_a_layer(case: Get) -> None:
    made = case("residual")
    student = seeded(nets.Residual)
    student.short = nn.Sequential(student.short)
    choices = made.uniform("w8a8")
    found = made.exporter.convert(student, "student", lambda _: nullcontext(), Learned()).lower(
        Candidate(layers=choices), lambda _: nullcontext()
    )
    check_types(found.data, {name: choice for name, choice in choices.items() if name != "short"})


def test_a_choice_for_a_layer_that_is_no_longer_found_is_a_failure_not_forgotten(case: Get) -> None:
    made = case("residual")
    twin = seeded(nets.Residual)
    with torch.no_grad():
        twin.conv1.weight.zero_()
    converted = made.exporter.convert(twin, "twin", lambda _: nullcontext(), Learned())
    converted.lower(Candidate(layers={"conv2": parse_precision("w8a8")}), lambda _: nullcontext())
    with pytest.raises(StageError, match="layer 'conv1' of the compressed model: its weight is not read by exactly"):
        converted.lower(Candidate(layers={"conv1": parse_precision("w8a8")}), lambda _: nullcontext())


def test_a_model_that_cannot_be_converted_is_a_fault_of_the_task(case: Get) -> None:
    from autocompress.core.errors import TaskError

    class Undecided(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x * 2 if float(x.sum()) > 0 else x

    source = case("residual").source
    with pytest.raises(TaskError, match="litert-torch cannot convert the model: "):
        TfliteExporter(Undecided().eval(), [], source, PROFILE)
