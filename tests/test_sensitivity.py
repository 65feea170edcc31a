"""Sensitivities of a task on a target, and the values they propose."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autocompress.build import Builder
from autocompress.core.candidate import Candidate
from autocompress.core.errors import InputError
from autocompress.core.probe import Effect, Finding, Probe
from autocompress.core.record import dump, load
from autocompress.core.sensitivity import SCHEMA, Sensitivity
from autocompress.core.space import LayerRule, SpaceRules, WidthRule
from autocompress.device.hosts import LocalHost
from autocompress.optimize.seeds import LOST
from autocompress.place import fitted
from autocompress.probe import cached, place, subject_of, write
from autocompress.sensitivity import int8_ratio_of, probe_sensitivity, seeds_by, sensitivity
from tests import tiny

TASKS = Path(__file__).parent / "data" / "tasks"
RULES = SpaceRules(
    name="both",
    description="",
    layers=(LayerRule(precisions=("fp32", "w8a8")),),
    widths=(WidthRule(ratios=(1.0, 0.75, 0.5)),),
    calibrators=("minmax", "mse"),
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def found() -> Sensitivity:
    return sensitivity(tiny.task().task, tiny.PROFILE, space=tiny.RULES)


def measured(choice: str, ratio: float, layers: tuple[str, ...] = ("a", "b"), beside: str = "fp32") -> Finding:
    effect = Effect(ratio=ratio, ratio_ci=(ratio, ratio), size_ratio=1.0, sqnr_db=None)
    return Finding(choice=choice, layers=layers, beside=beside, effect=effect)


def probe_of(*findings: Finding, **more: Any) -> Probe:
    given = {"task": "t", "target": "p", "subject": "s", "fingerprint": {}, "created": "", "seconds": 1.0}
    return Probe(**{**given, **more}, findings=findings)


def test_a_task_and_a_target_are_all_it_takes(found: Sensitivity) -> None:
    assert (found.task, found.target, found.unit, found.items) == ("tiny", "tiny", "kl divergence", 128)
    assert {"width:conv", "width:up", "precision:conv", "precision:up", "precision:fc"} == set(found.effects)
    assert found.left_out == {}
    assert found.probes > 0
    assert found.seconds > 0
    assert found.int8_ratio is None


def test_a_record_of_real_figures_survives_json(found: Sensitivity) -> None:
    assert load(Sensitivity, json.loads(json.dumps(dump(found, SCHEMA))), SCHEMA) == found


@pytest.mark.parametrize("name", ["depthwise", "conv1d", "transformer", "mlp"])
def test_every_kind_of_task_gets_seeds_that_are_candidates(name: str, tmp_path: Path) -> None:
    """Depthwise convolutions, a tuple of inputs, a dict of them, BatchNorm on rows; a metric that is the user's own."""
    from autocompress.task import check_task, load_task

    task = check_task(load_task(str(TASKS / f"{name}.py")))
    builder = Builder(task, tmp_path, tiny.PROFILE)
    every = replace(tiny.PROFILE, precisions=dict.fromkeys(("conv1d", "conv2d", "linear"), ("w8a8",)))
    space = RULES.resolve(builder.structure, every)
    found = probe_sensitivity(builder, space, task=task, target="tiny", int8_ratio=0.5)
    assert found.unit == ("squared error" if name == "transformer" else "kl divergence")
    assert set(space.variables) - set(found.effects) == {"calibrator"}
    seeds = [space.decode(values) for values in seeds_by(found, space, 6)]
    assert 3 <= len(seeds) <= 6
    assert len({seed.digest for seed in seeds} | {Candidate().digest}) == len(seeds) + 1
    narrowest = {group: widths[-1] for group, widths in space.widths.items()}
    lost = sum(found.effects[f"width:{group}"][str(width)].loss for group, width in narrowest.items())
    assert lost > LOST or seeds[-1].widths == narrowest
    assert sum(seeds[-1].widths.values()) < 0.7 * sum(widths[0] for widths in space.widths.values())


def test_a_target_that_is_not_there_is_refused_before_the_model_is_built() -> None:
    def build() -> Any:
        raise AssertionError("the model was built")

    with pytest.raises(InputError, match="Unknown target 'cpux'"):
        sensitivity(replace(tiny.task().task, model=build), "cpux")


def test_a_probe_of_the_device_says_what_integer_layers_cost() -> None:
    task = tiny.task()
    with LocalHost(tiny.PROFILE) as host:
        facts = host.fingerprint().facts
    made: Callable[[str], Probe] = lambda about: probe_of(  # noqa: E731
        measured("w8a8", 0.25), task="tiny", target="tiny", subject=about, fingerprint=dict(facts)
    )
    write(made("another model"), place(made("")))
    assert sensitivity(task.task, tiny.PROFILE, space=RULES, seconds=0).int8_ratio is None
    profile, _ = fitted(tiny.PROFILE, facts)
    structure = Builder(task, place(made("")).parent, profile).structure
    about = subject_of(task, structure, profile)
    write(made(about), place(made(about)))
    assert cached("tiny", "tiny", facts, about) == made(about)
    found = sensitivity(task.task, tiny.PROFILE, space=RULES)
    assert found.int8_ratio == 0.25
    choice = "w8a8" if profile.integer_weight_bits == 8 else "w7a8"
    whole = sum(found.effects[name][choice].cost for name in found.effects if name.startswith("precision:"))
    assert whole == pytest.approx(-0.75)


def test_the_ratio_is_that_of_most_layers_in_8_bits_beside_fp32() -> None:
    assert int8_ratio_of(probe_of()) is None
    findings = (
        measured("w8a8", 0.5),
        measured("w8a8", 0.9, layers=("a",)),
        measured("w4a8", 0.4, layers=("a", "b", "c")),
        measured("w8a32", 0.3, layers=("a", "b", "c")),
        measured("sparsity 0.5", 0.2, layers=("a", "b", "c")),
        measured("w8a8", 0.1, layers=("a", "b", "c"), beside="w4a8"),
        Finding(choice="w8a8", layers=("a", "b", "c"), beside="fp32", effect="it fails"),
    )
    assert int8_ratio_of(probe_of(*findings)) == 0.5
