import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from autocompress.bench import ITEMS, Bench, few, sqnr_db
from autocompress.core.candidate import Candidate, Sparsity, parse_precision
from autocompress.core.errors import StageError
from autocompress.core.probe import Effect
from autocompress.device.hosts import LocalHost
from tests import tiny


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with LocalHost(tiny.PROFILE) as host:
        yield Bench(few(tiny.task()), tiny.PROFILE, host, tmp_path_factory.mktemp("bench") / "whole")


def all_layers(precision: str) -> Candidate:
    return Candidate(layers=dict.fromkeys(("conv", "up", "fc"), parse_precision(precision)))


def test_few_items_keep_the_model_and_leave_the_rest_unread() -> None:
    data = tiny.task().split("train").data
    task = tiny.task(calibration=data)
    before = data.reads  # type: ignore[attr-defined]
    small = few(task)
    assert small.model is task.model
    assert {len(split) for split in small.splits.values()} == {ITEMS}
    assert data.reads - before == ITEMS  # type: ignore[attr-defined]


def test_effects_are_against_the_base_and_fp32s_outputs(bench: Bench) -> None:
    found = bench.compare(Candidate(), {name: all_layers(name) for name in ("w7a8", "w4a32")}, right=True)
    fine, coarse = found["w7a8"], found["w4a32"]
    assert isinstance(fine, Effect)
    assert isinstance(coarse, Effect)
    assert fine.ratio_ci[0] <= fine.ratio <= fine.ratio_ci[1]
    assert coarse.size_ratio < 1
    assert fine.sqnr_db is not None
    assert coarse.sqnr_db is not None
    assert fine.sqnr_db > 25 > coarse.sqnr_db > 5


def test_outputs_are_compared_only_where_that_is_asked_for(bench: Bench) -> None:
    (effect,) = bench.compare(Candidate(), {0: all_layers("w7a8")}, right=False).values()
    assert isinstance(effect, Effect)
    assert effect.sqnr_db is None


def test_what_cannot_be_built_is_a_sentence_beside_the_others(bench: Bench) -> None:
    others = {"bad": Candidate(layers={"nowhere": parse_precision("w8a8")}, widths={"none": 4}), "good": Candidate()}
    found = bench.compare(Candidate(), others, right=True)
    assert found["bad"] == "compress: there is no channel group 'none' in the model"
    assert isinstance(found["good"], Effect)
    assert list(found) == ["bad", "good"]


def test_a_file_that_fails_on_the_device_leaves_the_others_their_figures(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = bench.builder.build

    def spoilt(candidate: Candidate, watch: object) -> object:
        made = built(candidate, watch)  # type: ignore[arg-type]
        if any(choice.sparsity for choice in candidate.layers.values()):
            Path(made.artifact.path).write_bytes(b"no model")
        return made

    monkeypatch.setattr(bench.builder, "build", spoilt)
    zeros = parse_precision("fp32")
    zeros = type(zeros)(sparsity=Sparsity(ratio=0.5))
    found = bench.measure(Candidate(), {"bad": Candidate(layers={"up": zeros}), "good": all_layers("w7a8")})
    assert list(found) == ["good"]


def test_a_base_that_fails_is_an_error(bench: Bench) -> None:
    with pytest.raises(StageError, match="no channel group"):
        bench.compare(Candidate(widths={"none": 4}), {}, right=True)


def test_sqnr_is_a_ratio_of_powers_over_all_floating_outputs() -> None:
    one = {"a": np.array([3.0, 4.0], np.float32), "b": np.array([1, 2])}
    assert sqnr_db(one, one) is None
    worse = {"a": np.array([3.0, 4.5], np.float32), "b": np.array([5, 5])}
    assert sqnr_db(one, worse) == pytest.approx(10 * math.log10(25 / 0.25))
    assert sqnr_db({"a": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)}) < -1000  # type: ignore[operator]
