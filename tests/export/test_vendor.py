from collections.abc import Callable
from dataclasses import replace

import pytest

from autocompress.config import load_profile
from autocompress.core.errors import StageError
from autocompress.export.graph import to_bytes
from autocompress.export.parity import sqnr_db
from autocompress.export.vendor import onnxruntime_uniform_int8
from tests.export.conftest import Exported, kinds, run

Get = Callable[[str], Exported]
PROFILE = replace(load_profile("cpu-onnxruntime"), integer_weight_bits=7)


@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_the_vendors_tool_quantizes_the_template(exported: Get, name: str) -> None:
    case = exported(name)
    data = onnxruntime_uniform_int8(to_bytes(case.filled()), [case.feeds(32, 1), case.feeds(32, 2)], PROFILE)
    assert kinds(data).count("QuantizeLinear") >= len(case.template.nodes)
    got = run(data, case.feeds())
    assert [g.shape for g in got] == [w.shape for w in case.torch(case.net)]
    assert sqnr_db(case.torch(case.net)[0], got[0]) > 10


def test_what_the_tool_cannot_do_fails_in_its_stage() -> None:
    with pytest.raises(StageError, match=r"onnxruntime.quantization fails: \w+: ") as caught:
        onnxruntime_uniform_int8(b"no model", [], PROFILE)
    assert caught.value.stage == "export"
