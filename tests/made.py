"""Runs and trials with figures written by hand."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from autocompress.core.artifact import Artifact, TensorSpec
from autocompress.core.candidate import Candidate, parse_precision
from autocompress.core.measurement import Fingerprint, Interval
from autocompress.core.trial import Failure, Role, Score, Trial
from autocompress.run import Run
from tests.scripted import config, measurement

MACHINE = Fingerprint(facts={"cpu_model": "Test CPU", "cores": "2", "os": "Test OS", "runtime": "onnxruntime 1"})
REASONS = dict.fromkeys(("peak_memory_bytes", "energy_mj"), "not measured in this test")


def but_latency(faults: Iterable[str]) -> list[str]:
    """What `verify` found wrong but for latency, which a busy machine cannot repeat for a model of microseconds."""
    return [fault for fault in faults if not fault.startswith("latency over fp32's is ")]


def score(
    accuracy: float,
    ratio: float,
    *,
    half: float = 0.02,
    size_bytes: int = 100_000,
    executed: dict[str, str] | None = None,
    ratio_ci: Interval | None = None,
) -> Score:
    """Figures against an fp32 of 1 ms; `half` is the relative half-width of the latency's interval."""
    low, high = ratio_ci or (ratio * (1 - half), ratio * (1 + half))
    return Score(
        accuracy=accuracy,
        accuracy_ci=(accuracy - 0.01, accuracy + 0.01),
        latency_ms=ratio,
        latency_ms_ci=(low, high),
        ratio=ratio,
        ratio_ci=(low, high),
        size_bytes=size_bytes,
        test_accuracy=accuracy - 0.001,
        executed={} if executed is None else executed,
        reasons=REASONS,
    )


def trial(number: int, outcome: Score | Failure, role: Role = "candidate", precision: str = "w8a8") -> Trial:
    """A trial with one quantized layer `conv`, and an artifact that is only named."""
    spec = TensorSpec(name="x", dtype="float32", shape=(None, 4))
    artifact = Artifact(
        path=f"artifacts/{number}.onnx",
        format="onnx",
        inputs=(spec,),
        outputs=(replace(spec, name="output"),),
        sha256=f"{number:064d}",
        size_bytes=1,
    )
    made = None
    if isinstance(outcome, Score):
        made = replace(measurement(outcome.ratio), fingerprint=MACHINE)
    return Trial(
        number=number,
        role=role,
        candidate=Candidate() if role == "fp32" else Candidate(layers={"conv": parse_precision(precision)}),
        outcome=outcome,
        artifact=artifact,
        measurement=made,
        seconds={"measure": 1.5, "score": 0.5},
    )


def trials() -> list[Trial]:
    """fp32, uniform-int8, a point that wins within a point of accuracy, a faster one that loses 5, and a failure."""
    return [
        trial(0, score(0.95, 1.0), "fp32"),
        trial(1, score(0.948, 0.5), "uniform-int8"),
        trial(2, score(0.945, 0.4, executed={"conv": "int8"})),
        trial(3, score(0.90, 0.2, executed={"conv": "fp32"})),
        trial(4, Failure(stage="load", error="RuntimeError", message="no kernel for <Conv>")),
    ]


def run(folder: Path, found: list[Trial] | None = None, **terms: object) -> Run:
    """A finished run with these trials as its final front."""
    made = Run.create(folder, config(**terms))
    made.log("model", left_alone={"head": "its weight is tied to <embed>"}, dropped={"w2a8": "not listed"})
    made.write_final(trials() if found is None else found)
    return made
