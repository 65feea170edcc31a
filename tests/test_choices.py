"""What follows from effects, which are given by a table here: what is measured differs from machine to machine."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from autocompress.bench import bench_task
from autocompress.choices import Choices, _as_fine, _finest_first
from autocompress.core.candidate import Candidate, parse_precision
from autocompress.core.probe import Effect, Payoff, Probe, sparse
from autocompress.core.profile import Profile
from autocompress.core.space import Layer, Structure
from autocompress.progress import Silent
from tests import nets

LAYERS = {"stem.0": "conv2d", "depthwise.0": "conv2d", "pointwise.0": "conv2d", "grouped.0": "conv2d", "fc": "linear"}
PROFILE = Profile(
    name="p",
    description="",
    runtime="onnxruntime",
    format="onnx",
    precisions={"conv2d": ("w8a8", "w4a8", "w4a32"), "linear": ("w8a8",)},
    width_multiple=4,
    float_precisions=("fp32", "bf16"),
)
Table = Callable[[Candidate], float]


class Bench:
    """Says of each candidate what a table of latencies says; all outputs are right, unless `decibels` knows better."""

    def __init__(self, latency: Table, profile: Profile = PROFILE, **given: Any) -> None:
        model = nets.seeded(nets.Separable)
        layers = tuple(
            Layer(name=n, kind=k, shape=tuple(model.get_submodule(n).weight.shape), block=n)  # type: ignore[arg-type, union-attr]
            for n, k in LAYERS.items()
        )
        self.task = bench_task("separable", model, list(nets.image(2)["x"]))
        self.builder = SimpleNamespace(structure=Structure(layers=layers, groups=()))
        self.profile = profile
        self.compared: list[tuple[Candidate, dict[Any, Candidate]]] = []
        self._latency = latency
        self._decibels: Callable[[Candidate], float] = given.get("decibels", lambda _: 40.0)
        self._fails: Callable[[Candidate], bool] = given.get("fails", lambda _: False)

    def compare(self, base: Candidate, others: Mapping[Any, Candidate], *, right: bool) -> dict[Any, Effect | str]:
        self.compared.append((base, dict(others)))
        return {key: self._effect(base, other) for key, other in others.items()}

    def _effect(self, base: Candidate, other: Candidate) -> Effect | str:
        if self._fails(other):
            return "load: no kernel"
        ratio = self._latency(other) / self._latency(base)
        interval = (ratio * 0.97, ratio * 1.03)
        bits = sum(choice.weight_bits for choice in other.layers.values()) - sum(
            choice.weight_bits for choice in base.layers.values()
        )
        size = 0.5 if other.layers and bits != 0 else 1.0
        return Effect(ratio=ratio, ratio_ci=interval, size_ratio=size, sqnr_db=self._decibels(other))


def integer(candidate: Candidate) -> set[str]:
    return {name for name, choice in candidate.layers.items() if choice.kernel == "int8"}


def additive(**seconds: float) -> Table:
    """Each layer takes 1 in float, and in integers what `seconds` says by the first part of its name."""
    return lambda c: sum(
        seconds.get(n.split(".")[0], seconds.get("rest", 0.4)) if n in integer(c) else 1.0 for n in LAYERS
    )


def judged(bench: Bench, deadline: float = float("inf")) -> Choices:
    choices = Choices(bench.task, bench, Silent())  # type: ignore[arg-type]
    choices.measure(deadline)
    return choices


def against(choices: Choices, choice: str, layer: str = "", *, size_counts: bool = False) -> str | None:
    found = Probe(
        task="t", target="p", subject="", fingerprint={}, created="", seconds=0, verdicts=tuple(choices.verdicts)
    )
    return Payoff(probe=found, size_counts=size_counts).against(choice, layer)


def test_what_is_faster_everywhere_pays_and_its_coarser_twin_only_in_bytes() -> None:
    found = judged(Bench(additive()))
    assert against(found, "w8a8", "stem.0") is None
    assert "not faster than w8a8: 0." in (against(found, "w4a8", "stem.0") or "")
    assert against(found, "w4a8", "stem.0", size_counts=True) is None
    assert against(found, "w4a32", "stem.0") == "not faster than fp32: 1.00 (0.97 to 1.03) of its latency"
    assert list(found.extremes()) == ["fp32", "w8a8"]
    assert set(found.extremes()["w8a8"]) == set(LAYERS)


def test_where_it_is_slower_on_the_whole_the_family_that_it_helps_keeps_it() -> None:
    found = judged(Bench(additive(depthwise=9.0, rest=0.4)))
    assert "not faster than fp32" in (against(found, "w8a8", "depthwise.0") or "")
    assert against(found, "w8a8", "pointwise.0") is None
    assert against(found, "w8a8", "fc") is None
    assert list(found.extremes()) == ["fp32"]  # no precision is faster on all layers


def test_a_shape_without_which_the_model_is_faster_and_which_wins_nothing_alone_is_dropped() -> None:
    found = judged(Bench(additive(grouped=1.5, rest=0.3)))
    assert "not faster than fp32" in (against(found, "w8a8", "grouped.0") or "")
    assert against(found, "w8a8", "stem.0") is None


def test_a_shape_that_is_slow_beside_float_only_is_kept() -> None:
    def latency(candidate: Candidate) -> float:
        """Integers pay where all neighbours are integer: every change of arithmetic on the way costs 0.5."""
        flags = [n in integer(candidate) for n in LAYERS]
        changes = sum(a != b for a, b in zip([False, *flags], [*flags, False], strict=True))
        return sum(0.4 if flag else 1.0 for flag in flags) + 0.5 * changes

    found = judged(Bench(latency))
    assert [against(found, "w8a8", n) for n in LAYERS] == [None] * len(LAYERS)


def test_wrong_results_are_dropped_however_fast_and_small() -> None:
    bench = Bench(additive(), decibels=lambda c: -3.0 if "fc" in integer(c) else 40.0)
    found = judged(bench)
    assert against(found, "w8a8", "fc", size_counts=True) == "wrong results, -3.0 dB to fp32"
    assert against(found, "w8a8", "stem.0") is None


def test_what_does_not_run_is_dropped_with_what_was_said() -> None:
    found = judged(Bench(additive(), fails=lambda c: "depthwise.0" in integer(c)))
    assert against(found, "w8a8", "depthwise.0", size_counts=True) == "load: no kernel"
    assert against(found, "w8a8", "stem.0") is None


@pytest.mark.parametrize("fast", [True, False])
def test_float_arithmetic_pays_where_it_is_faster_beside_fp32_or_integers(fast: bool) -> None:
    plain = additive()
    found = judged(Bench(lambda c: plain(c) * (0.7 if fast and c.float_precision == "bf16" else 1.0)))
    assert (against(found, "bf16") is None) is fast


def test_fewer_zeros_are_tried_only_where_more_of_them_win_something() -> None:
    plain = additive()
    useless, useful = (
        Bench(plain),
        Bench(lambda c: plain(c) * (0.5 if any(x.sparsity for x in c.layers.values()) else 1)),
    )
    names = [v.choice for v in judged(useless).verdicts if v.choice.startswith("sparsity")]
    assert names == [sparse(0.9)]
    assert against(judged(useful), sparse(0.5), "fc") is None


def test_the_pattern_2_4_is_tried_where_the_device_has_its_kernels_on_layers_it_fits() -> None:
    bench = Bench(additive(), replace(PROFILE, sparse_kernels=True))
    (verdict,) = [v for v in judged(bench).verdicts if v.choice == sparse("2:4")]
    assert set(verdict.layers) == {"pointwise.0", "grouped.0", "fc"}  # others have one or three input channels


def test_nothing_is_begun_after_the_deadline() -> None:
    bench = Bench(additive())
    found = judged(bench, deadline=0)
    assert bench.compared == []
    assert found.left_out[0] == "precisions"


def test_the_rivals_of_a_precision_are_those_that_are_as_precise_in_every_respect() -> None:
    assert _finest_first(["w4a8", "w8a8", "w8d8", "w8a32", "w4a32"]) == ["w8a32", "w4a32", "w8d8", "w8a8", "w4a8"]
    fine = {a: [b for b in ("fp32", "w8d8", "w8a8", "w4a32") if _finer(b, a)] for a in ("w8d8", "w8a8", "w4a8", "w4d8")}
    assert fine == {
        "w8d8": ["fp32", "w8d8"],
        "w8a8": ["fp32", "w8d8", "w8a8"],
        "w4a8": ["fp32", "w8d8", "w8a8", "w4a32"],
        "w4d8": ["fp32", "w8d8", "w4a32"],
    }


def _finer(one: str, other: str) -> bool:
    return _as_fine(parse_precision(one), parse_precision(other))
