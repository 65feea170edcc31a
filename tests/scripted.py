"""A search whose candidates are scored by a formula: real studies, runs and processes, no models.

Run as a program it is one process of a search that tests can kill.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from autocompress.core.candidate import Candidate
from autocompress.core.front import Limits, Rival
from autocompress.core.measurement import Measurement, MeasurePlan
from autocompress.core.profile import Profile
from autocompress.core.sensitivity import Effect, Sensitivity
from autocompress.core.space import Group, Layer, LayerRule, Space, SpaceRules, Structure, WidthRule
from autocompress.core.trial import Failure, Role, Score, Trial
from autocompress.driver import conduct, contribute
from autocompress.loop import Budget
from autocompress.progress import Progress, Silent
from autocompress.run import Run, RunConfig, open_run
from autocompress.signals import Interrupted, Signals

# Spelt out: the golden run holds these values, whatever the defaults become.
PLAN = MeasurePlan(max_duration_s=1.5, target_ci=0.02)
PROFILE = Profile(
    name="scripted",
    description="a formula",
    runtime="onnxruntime",
    format="onnx",
    precisions={"conv2d": ("w8a8", "w4a8")},
    width_multiple=4,
    measure=PLAN,
)
RULES = SpaceRules(
    name="scripted",
    description="per block",
    layers=(LayerRule(precisions=("fp32", "w8a8", "w4a8")),),
    widths=(WidthRule(ratios=(1.0, 0.75, 0.5, 0.25)),),
)


def structure(layers: int = 6) -> Structure:
    """Convolutions of 32 channels, two to a block, each a group of its own."""
    names = [f"conv{i}" for i in range(layers)]
    return Structure(
        layers=tuple(
            Layer(name=n, kind="conv2d", shape=(32, 32, 3, 3), block=f"block{i // 2}") for i, n in enumerate(names)
        ),
        groups=tuple(Group(name=n, width=32, step=1, layers=(n,)) for n in names),
    )


def space(layers: int = 6, rules: SpaceRules = RULES) -> Space:
    """The variables of `layers` layers."""
    return rules.resolve(structure(layers), PROFILE)


def config(**changes: object) -> RunConfig:
    """Terms of a scripted search."""
    plain = RunConfig(
        task="scripted",
        task_name="scripted",
        profile=PROFILE,
        rules=RULES,
        objectives=("accuracy", "latency"),
        limits=Limits(),
        fidelity="oneshot",
        recover_steps=0,
        seed=0,
        trials=30,
        timeout_s=None,
        storage=None,
        study="scripted",
        versions={"autocompress": "0.1.0"},
        created="2026-11-22T00:00:00.000+00:00",
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


FULL = 320  # steps of a full recovery


def score(candidate: Candidate, layers: int = 6) -> Score:
    """Accuracy falls with bits and width, the earlier the layer the more; latency and size with width and bits.

    Recovery leaves, after FULL steps, 0.3 of what narrow layers cost.
    """
    left = 1 - 0.7 * min(1.0, candidate.recipe.recover_steps / FULL)
    loss = latency = size = 0.0
    for i in range(layers):
        choice = candidate.layers.get(f"conv{i}")
        ratio = candidate.widths.get(f"conv{i}", 32) / 32
        bits = choice.weight_bits if choice else 32
        loss += left * (1 - ratio) ** 2 * (layers - i) * 0.02
        loss += (0 if bits == 32 else 0.16 / bits**2) * (1 + (i == 0) * 20)
        latency += ratio * (1.0 if choice is None else 0.4)
        size += 1000 * ratio * bits
    latency /= layers
    reasons = dict.fromkeys(("accuracy_ci", "test_accuracy", "peak_memory_bytes", "energy_mj", "executed"), "scripted")
    return Score(
        accuracy=0.95 - loss,
        latency_ms=2 * latency,
        latency_ms_ci=(1.98 * latency, 2.02 * latency),
        ratio=latency,
        ratio_ci=(0.99 * latency, 1.01 * latency),
        size_bytes=max(1, round(size)),
        reasons=reasons,
    )


def measurement(ratio: float, samples: int = 3) -> Measurement:
    """Raw blocks with this ratio."""
    return Measurement(
        artifact_sha256="a" * 64,
        reference_sha256="b" * 64,
        samples=tuple(tuple(ratio + math.ulp(1.0) * k for k in range(samples)) for _ in range(8)),
        reference=tuple((1.0,) * samples for _ in range(8)),
        processes=(0,) * 8,
        clock="process_cpu",
        plan=PLAN,
    )


@dataclass
class Scripted:
    """An evaluator that needs `sleep` seconds and fails where `fails` says so."""

    run: Run
    space: Space = field(default_factory=space)
    sleep: float = 0.0
    fails: Callable[[Candidate], bool] = lambda _: False
    evaluated: list[Candidate] = field(default_factory=list)
    finalised: list[list[int]] = field(default_factory=list)

    @property
    def lessons(self) -> tuple[int, int]:
        """Items, and how many a step takes."""
        return 1000, 10

    def step_seconds(self) -> float:
        """As `sleep` is for a trial."""
        return self.sleep / 100 or 1e-4

    def sensitivity(self, seconds: float, int8_ratio: float | None) -> Sensitivity:
        """By the formula: what each choice alone costs."""
        layers = len(self.space.structure.layers)
        plain = score(Candidate(), layers)
        effects = {}
        for name, choices in self.space.variables.items():
            alone = {choice: score(self.space.decode({name: choice}), layers) for choice in choices}
            effects[name] = {
                str(choice): Effect(loss=max(0.0, plain.accuracy - s.accuracy), cost=s.ratio - plain.ratio)
                for choice, s in alone.items()
            }
        probes = sum(len(choices) for choices in self.space.variables.values())
        return Sensitivity(
            task="scripted",
            target="scripted",
            effects=effects,
            unit="squared error",
            probes=probes,
            seconds=0.0,
            items=1,
        )

    def evaluate(self, candidate: Candidate, role: Role, *, rivals: Sequence[Rival] = ()) -> Trial:
        """Scored by the formula; what was evaluated is also written to a file that all processes share."""
        time.sleep(self.sleep)
        self.evaluated.append(candidate)
        with (self.run.path / "evaluated.txt").open("a") as file:
            file.write(f"{role} {candidate.digest}\n")
        layers = len(self.space.structure.layers)
        found = score(candidate, layers)
        failed = role == "candidate" and self.fails(candidate)
        return Trial(
            number=-1,
            role=role,
            candidate=candidate,
            outcome=Failure(stage="load", error="RuntimeError", message="no kernel") if failed else found,
            measurement=None if failed else measurement(found.ratio),
            seconds={"score": self.sleep * 0.5, "measure": self.sleep * 0.4},
        )

    def finalise(self, trials: Sequence[Trial]) -> list[Trial]:
        """The same trials, half a point better, so that they can be told from those of the search."""
        self.finalised.append([t.number for t in trials])
        return [replace(t, outcome=replace(t.score, accuracy=t.score.accuracy + 0.005)) for t in trials if t.score]


def drive(
    run: Run,
    evaluator: Scripted,
    *,
    trials: int | None = 30,
    timeout: float = math.inf,
    progress: Progress | None = None,
) -> None:
    """A whole search in this process."""
    budget = Budget(trials=trials, deadline=time.monotonic() + timeout)
    conduct(evaluator, run, budget=budget, progress=progress or Silent(), signals=Signals())


def main() -> int:
    """`scripted.py RUN --trials N --sleep S [--index K --of N]`: exit 130 when stopped by a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--index", type=int)
    parser.add_argument("--of", type=int, default=1)
    options = parser.parse_args()
    run = open_run(options.run)
    evaluator = Scripted(run, sleep=options.sleep)
    budget = Budget(trials=options.trials)
    try:
        with Signals().installed() as signals:
            if options.index is None:
                with run.lock():
                    conduct(evaluator, run, budget=budget, progress=Silent(), signals=signals)
            else:
                contribute(evaluator, run, budget=budget, signals=signals, index=options.index, of=options.of)
    except Interrupted:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
