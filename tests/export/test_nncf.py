import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from autocompress.config import load_profile
from autocompress.core.errors import StageError
from autocompress.device.openvino import OpenVino
from autocompress.export.graph import to_bytes
from autocompress.export.nncf import has_attention, openvino_uniform_int8
from autocompress.export.parity import sqnr_db
from autocompress.export.vendor import uniform_int8
from tests.export.conftest import Exported, kinds

Get = Callable[[str], Exported]
PROFILE = replace(load_profile("cpu-openvino"), integer_weight_bits=7)


@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_nncf_quantizes_the_template_silently(
    exported: Get, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = exported(name)
    batches = [case.feeds(32, 1), case.feeds(32, 2)]
    data = uniform_int8(to_bytes(case.filled()), batches, PROFILE)
    assert kinds(data).count("QuantizeLinear") >= len(case.template.nodes) // 2
    assert capfd.readouterr().out == ""
    (tmp_path / "int8.onnx").write_bytes(data)
    session = OpenVino().load(tmp_path / "int8.onnx", {"threads": 1})
    got = session.run(case.feeds())
    assert [g.shape for g in got.values()] == [w.shape for w in case.torch(case.net)]
    assert sqnr_db(case.torch(case.net)[0], next(iter(got.values()))) > 20
    executed = session.executed_precision()
    assert executed is not None
    assert {executed[name] for name in case.template.nodes if name != "tokens"} == {"int8"}


def test_without_vnni_all_weights_stay_in_half_the_range(exported: Get) -> None:
    case = exported("flat")

    def largest(bits: int) -> int:
        batches = [case.feeds(64, 1)]
        data = openvino_uniform_int8(to_bytes(case.filled()), batches, replace(PROFILE, integer_weight_bits=bits))
        tensors = onnx.load_from_string(data).graph.initializer
        weights = [onnx.numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.INT8 and t.dims]
        return max(int(abs(w.astype(int)).max()) for w in weights)

    assert largest(7) <= 64
    assert largest(8) > 100


def test_attention_is_a_softmax_among_products_of_what_was_computed(exported: Get) -> None:
    for name, expected in (("encoder", True), ("residual", False), ("flat", False)):
        assert has_attention(onnx.load_from_string(to_bytes(exported(name).filled()))) == expected


def test_what_nncf_cannot_do_fails_in_its_stage_and_leaves_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NNCF_CI", raising=False)
    with pytest.raises(StageError, match=r"nncf fails: \w+: ") as caught:
        openvino_uniform_int8(b"no model", [], PROFILE)
    assert caught.value.stage == "export"
    assert "NNCF_CI" not in os.environ
