"""TensorRT against modules written by hand: everything up to the calls that a GPU would answer."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from autocompress.core.errors import InputError, StageError, TargetError
from autocompress.device.runtime import RUNTIMES, Session, get_runtime
from autocompress.device.tensorrt import TensorRt, device_facts, precisions
from autocompress.device.tensorrt_engine import Settings, engine_key, onnx_names
from tests.contracts import case_tensorrt, test_runtime
from tests.contracts.cases import Case
from tests.device.nvidia import Gpu, install
from tests.models import write_convs, write_linear, write_mixed


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return install(monkeypatch)


@pytest.fixture
def case(gpu: Gpu, tmp_path: Path) -> Case:
    return case_tensorrt.case(tmp_path)


@pytest.fixture
def session(case: Case) -> Iterator[Session]:
    made = case.runtime.load(case.path, test_runtime.OPTIONS)
    yield made
    made.close()


class TestWithoutAGpu(test_runtime.TestRuntime):
    """The suite of all runtimes, on the modules by hand."""


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    return write_linear(tmp_path / "linear.onnx", np.eye(4, 3, dtype=np.float32), np.ones(3, np.float32))


def engines(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home/.cache/autocompress/tensorrt").glob("*.engine"))


class TestAvailability:
    def test_it_is_in_the_table(self) -> None:
        assert isinstance(get_runtime("tensorrt"), TensorRt)
        assert RUNTIMES["tensorrt"] == "autocompress.device.tensorrt:TensorRt"

    def test_here_it_says_what_is_missing_and_how_to_install_it(self) -> None:
        if "tensorrt" in sys.modules:
            pytest.skip("tensorrt is installed here")
        found = TensorRt().available()
        assert (found.usable, found.version) == (False, None)
        assert found.reason == "tensorrt is not installed. Install it with: pip install 'autocompress[tensorrt]'"
        assert found.install == "pip install 'autocompress[tensorrt]'"

    @pytest.mark.parametrize(
        "error", [ImportError("libnvinfer.so.10: cannot open"), OSError("libnvinfer.so.10: cannot open")]
    )
    def test_a_package_without_its_library_is_a_reason(
        self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def fail(module: str, extra: str) -> Any:
            raise error

        monkeypatch.setattr("autocompress.device.tensorrt.require", fail)
        assert TensorRt().available().reason == "tensorrt fails: libnvinfer.so.10: cannot open"

    def test_an_old_version_is_refused_with_its_number(self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "8.6.1")
        found = TensorRt().available()
        assert (found.usable, found.version) == (False, "8.6.1")
        assert found.reason == "tensorrt 8.6.1 is too old: version 10 or newer is needed"

    def test_without_a_device_it_is_not_usable(self, gpu: Gpu) -> None:
        gpu.devices = 0
        assert TensorRt().available().reason == "no CUDA device: none is visible"
        gpu.status["cudaGetDeviceCount"] = 35
        found = TensorRt().available()
        assert (found.usable, found.version) == (False, "10.16.1")
        assert found.reason == "no CUDA device: status 35"


class TestFacts:
    def test_of_the_gpu_and_all_software_that_chooses_kernels(self, gpu: Gpu) -> None:
        assert TensorRt().facts({}) == {
            "device": "Fake GPU",
            "compute_capability": "8.9",
            "device_memory": "8.0 GiB",
            "multiprocessors": "4",
            "cuda": "13.5",
            "cuda_driver": "13.1",
            "tensorrt": "10.16.1",
            "float_precisions": "fp32 fp16 bf16",
            "quantized": "int8 fp8",
            "driver": "999.1",
            "power_limit": "72.5 W",
            "top_clock": "2100 MHz",
        }

    @pytest.mark.parametrize(
        ("capability", "floats", "quantized"),
        [((7, 5), "fp32 fp16", "int8"), ((8, 0), "fp32 fp16 bf16", "int8"), ((12, 0), "fp32 fp16 bf16", "int8 fp8")],
    )
    def test_arithmetic_follows_the_compute_capability(
        self, gpu: Gpu, capability: tuple[int, int], floats: str, quantized: str
    ) -> None:
        gpu.capability = capability
        found = device_facts()
        assert (found["float_precisions"], found["quantized"]) == (floats, quantized)

    def test_a_gpu_that_does_not_answer_is_no_target(self, gpu: Gpu) -> None:
        gpu.status["cudaGetDeviceProperties"] = 35
        with pytest.raises(TargetError, match="cuda: cudaGetDeviceProperties fails: status 35"):
            TensorRt().facts({})


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"thread": 1}, r"Unknown option of tensorrt 'thread'. Did you mean 'threads'\?"),
            ({"threads": 0}, "`threads` must be at least 1, got 0"),
            ({"max_batch": 0}, "`max_batch` must be at least 1, got 0"),
            ({"build_timeout_s": 0}, "`build_timeout_s` must be positive, got 0"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options: Mapping[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Settings.of(options)

    def test_values_are_taken(self) -> None:
        found = Settings.of({"max_batch": 4, "sparse_weights": True, "cache_dir": "/x", "threads": 3})
        assert found == Settings(max_batch=4, sparse_weights=True, cache_dir=Path("/x"))

    @pytest.mark.parametrize(
        ("options", "flags"),
        [({}, set()), ({"tf32": True}, {"TF32"}), ({"sparse_weights": True}, {"SPARSE_WEIGHTS"})],
    )
    def test_the_builder_gets_the_flags_asked_for_and_no_others(
        self, gpu: Gpu, linear: Path, options: Mapping[str, Any], flags: set[str]
    ) -> None:
        TensorRt().load(linear, options)
        assert gpu.builds[0]["flags"] == flags


class TestEngineCache:
    def test_a_file_is_built_once(self, gpu: Gpu, linear: Path, tmp_path: Path) -> None:
        for _ in range(3):
            TensorRt().load(linear, {}).close()
        assert len(gpu.builds) == len(engines(tmp_path)) == 1

    def test_another_file_device_or_setting_is_another_engine(self, linear: Path, tmp_path: Path) -> None:
        settings, device = Settings(), {"device": "A", "tensorrt": "10"}
        other = write_linear(tmp_path / "other.onnx", np.ones((4, 3), np.float32), np.ones(3, np.float32))
        keys = [
            engine_key(linear, settings, device),
            engine_key(other, settings, device),
            engine_key(linear, settings, {**device, "tensorrt": "11"}),
            engine_key(linear, replace(settings, sparse_weights=True), device),
            engine_key(linear, replace(settings, tf32=True), device),
            engine_key(linear, replace(settings, max_batch=2), device),
        ]
        assert len(set(keys)) == len(keys)

    def test_where_and_how_long_does_not_matter(self, linear: Path) -> None:
        there = Settings(cache_dir=Path("/elsewhere"), build_timeout_s=1)
        assert engine_key(linear, there, {}) == engine_key(linear, Settings(), {})

    def test_a_damaged_engine_is_built_again(self, gpu: Gpu, linear: Path, tmp_path: Path) -> None:
        TensorRt().load(linear, {})
        (stored,) = engines(tmp_path)
        stored.write_bytes(b'["layers.0.fc"]\nnothing that TensorRT wrote')
        session = TensorRt().load(linear, {})
        assert session.run({"input": np.ones((1, 4), np.float32)})["output"].tolist() == [[2.0, 2.0, 2.0]]
        assert len(gpu.builds) == 2

    def test_what_was_timed_is_kept_for_the_next_build(self, gpu: Gpu, linear: Path, tmp_path: Path) -> None:
        TensorRt().load(linear, {})
        TensorRt().load(write_convs(tmp_path / "convs.onnx", 2), {})
        assert [build["timing"] for build in gpu.builds] == [b"", b"+"]

    def test_of_another_gpu_nothing_that_was_timed_is_used(self, gpu: Gpu, linear: Path) -> None:
        TensorRt().load(linear, {})
        gpu.capability = (9, 0)
        TensorRt().load(linear, {})
        assert [build["timing"] for build in gpu.builds] == [b"", b""]

    def test_precision_is_known_of_an_engine_that_was_kept(self, case: Case) -> None:
        case.runtime.load(case.mixed, {}).close()
        session = case.runtime.load(case.mixed, {})
        session.run(case.mixed_inputs)
        assert session.executed_precision() == case.executed


class TestBuildFailures:
    def test_the_importers_own_words_are_said(self, gpu: Gpu, tmp_path: Path) -> None:
        path = write_mixed(tmp_path / "uint8.onnx")  # the dialect of x86
        with pytest.raises(StageError, match=r"its importer refuses the file: .*only allows FP8, INT8") as caught:
            TensorRt().load(path, {})
        assert caught.value.stage == "load"

    def test_the_builders_error_is_said_and_its_warnings_are_not(self, gpu: Gpu, linear: Path, tmp_path: Path) -> None:
        gpu.builder_says = "Could not find any implementation\nfor node fc"
        with pytest.raises(StageError, match=r"cannot build an engine of the file: Could not .* for node fc") as caught:
            TensorRt().load(linear, {})
        assert caught.value.stage == "load"
        assert not engines(tmp_path)

    def test_a_build_that_takes_too_long_is_given_up(
        self, gpu: Gpu, linear: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [0.0]
        monkeypatch.setattr("autocompress.device.tensorrt_engine.time.monotonic", lambda: now[0])
        gpu.step = lambda: now.__setitem__(0, now[0] + 4)
        with pytest.raises(StageError, match=r"not built in 10 s: raise `build_timeout_s`") as caught:
            TensorRt().load(linear, {"build_timeout_s": 10})
        assert caught.value.stage == "load"
        assert TensorRt().load(linear, {"build_timeout_s": 20})

    def test_a_free_size_that_is_not_the_batch_is_refused(self, gpu: Gpu, linear: Path, tmp_path: Path) -> None:
        model = onnx.load(linear)
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
        onnx.save(model, tmp_path / "free.onnx")
        with pytest.raises(StageError, match=r"only the batch may be free, model input 'input' is \(-1, -1\)"):
            TensorRt().load(tmp_path / "free.onnx", {})

    def test_a_tensor_that_numpy_has_no_type_for_is_refused(self, gpu: Gpu, linear: Path, tmp_path: Path) -> None:
        model = onnx.load(linear)
        model.graph.output.append(onnx.helper.make_tensor_value_info("half", onnx.TensorProto.BFLOAT16, [None, 4]))
        model.graph.node.append(onnx.helper.make_node("Cast", ["input"], ["half"], to=onnx.TensorProto.BFLOAT16))
        onnx.save(model, tmp_path / "bf16.onnx")
        with pytest.raises(StageError, match="model tensor 'half' is a 16, which cannot be fed"):
            TensorRt().load(tmp_path / "bf16.onnx", {})


class TestRunning:
    def test_a_batch_beyond_the_engine_names_the_option(self, gpu: Gpu, linear: Path) -> None:
        session = TensorRt().load(linear, {"max_batch": 2})
        session.run({"input": np.ones((2, 4), np.float32)})
        with pytest.raises(
            InputError, match=r"'input' has 3 items, the engine takes 1 to 2: see the option `max_batch`"
        ):
            session.run({"input": np.ones((3, 4), np.float32)})

    def test_calls_bound_to_other_shapes_take_turns(self, gpu: Gpu, linear: Path) -> None:
        session = TensorRt().load(linear, {})
        one, many = (session.bind({"input": np.full((n, 4), n, np.float32)}) for n in (1, 5))
        for _ in range(2):
            assert one()["output"].tolist() == [[2.0] * 3]
            assert many()["output"].tolist() == [[6.0] * 3] * 5

    def test_inputs_that_lie_scattered_in_memory_arrive_in_order(self, gpu: Gpu, linear: Path) -> None:
        x = np.arange(8, dtype=np.float32).reshape(4, 2).T
        assert not x.flags["C_CONTIGUOUS"]
        got = TensorRt().load(linear, {}).run({"input": x})["output"]
        np.testing.assert_array_equal(got, x[:, :3] + 1)

    def test_an_engine_that_fails_fails_the_measurement(self, gpu: Gpu, linear: Path) -> None:
        session = TensorRt().load(linear, {})
        gpu.executes = False
        with pytest.raises(StageError, match="tensorrt: the engine fails") as caught:
            session.run({"input": np.ones((1, 4), np.float32)})
        assert caught.value.stage == "measure"

    def test_a_full_gpu_fails_the_measurement(self, gpu: Gpu, linear: Path) -> None:
        session = TensorRt().load(linear, {})
        gpu.status["cudaMalloc"] = 2
        with pytest.raises(StageError, match="cuda: cudaMalloc fails: status 2") as caught:
            session.run({"input": np.ones((1, 4), np.float32)})
        assert caught.value.stage == "measure"

    def test_closing_gives_all_memory_and_streams_back(self, gpu: Gpu, linear: Path) -> None:
        session = TensorRt().load(linear, {})
        session.run({"input": np.ones((1, 4), np.float32)})
        session.run({"input": np.ones((9, 4), np.float32)})
        assert gpu.memory
        session.close()
        session.close()
        assert not gpu.memory
        assert not gpu.streams


def layer(kind: str, name: str, *inputs: str, output: str = "Float") -> dict[str, Any]:
    return {
        "LayerType": kind,
        "Metadata": f"[ONNX Layer: {name}]",
        "Inputs": [{"Format/Datatype": words} for words in inputs],
        "Outputs": [{"Format/Datatype": output}],
    }


@pytest.mark.parametrize(
    ("words", "precision"),
    [
        ("Int8", "int8"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Row major linear FP16 format", "fp16"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Half", "fp16"),
        ("BFloat16", "bf16"),
        ("FP8", "fp8"),
        ("Float", "fp32"),
        ("Row major linear FP32", "fp32"),
    ],
)
def test_every_way_of_naming_a_type_is_read(words: str, precision: str) -> None:
    found = precisions({"Layers": [layer("CaskConvolution", "conv", words)]}, frozenset({"conv"}))
    assert found == {"conv": precision}


def test_only_nodes_that_compute_are_told_and_not_by_copies_of_their_inputs() -> None:
    layers = [
        layer("Reformat", "conv", "Float"),
        "a name alone",
        layer("CaskGemmConvolution", "conv", "Int8", "Half"),
        layer("PointWise", "relu", "Half"),
        layer("kgen", "softmax", "Bool", "Half"),
        layer("kgen", "product", "Bool", "Half"),
        layer("Gather", "table", "Int32", output="Half"),
        layer("Shape", "unknown", "Int64"),
    ]
    computing = frozenset({"conv", "product", "table", "unknown"})
    assert precisions({"Layers": layers}, computing) == {"conv": "int8", "product": "fp16", "table": "fp16"}
    assert precisions({"Layers": ["a name alone"]}, computing) is None


def test_names_are_read_out_of_what_the_importer_notes() -> None:
    noted = "[ONNX Layer: layers.0.conv | pkg.torch: x]\x1f[ONNX Layer: layers.0.relu]"
    assert onnx_names(noted) == ["layers.0.conv", "layers.0.relu"]
    assert onnx_names("") == []
