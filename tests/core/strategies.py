"""Random values of core, for Hypothesis."""

from dataclasses import replace

from hypothesis import strategies as st

from autocompress.core.artifact import Artifact, TensorSpec
from autocompress.core.candidate import WEIGHT_BITS, Candidate, LayerChoice, Sparsity
from autocompress.core.measurement import Fingerprint, Measurement, MeasurePlan
from autocompress.core.recipe import Distill, Plan, Prune, Quantize, Recipe, Stage, Train
from autocompress.core.trial import Failure, Score, Trial

NAMES = st.text("abc.0", min_size=1, max_size=6)
POSITIVE = st.floats(1e-3, 1e3)
INTERVALS = st.tuples(POSITIVE, POSITIVE).map(lambda ends: (min(ends), max(ends)))

SPARSITIES = (
    st.none()
    | st.floats(0.01, 0.99).map(lambda ratio: Sparsity(ratio=ratio))
    | st.just(Sparsity(ratio=0.5, pattern="2:4"))
    | st.just(Sparsity(ratio=0.25, pattern="block"))
)
PRUNES = st.builds(
    Prune,
    importance=st.sampled_from(["magnitude", "batchnorm", "taylor", "activation"]),
    schedule=st.sampled_from(["at-once", "gradual", "rewind"]),
    reconstruct=st.booleans(),
)
TRAINS = st.builds(
    Train,
    share=st.floats(0.1, 0.3),
    optimizer=st.sampled_from(["auto", "adamw", "sgd"]),
    patience=st.none() | st.integers(1, 9),
    distill=st.builds(
        Distill,
        kind=st.sampled_from(["none", "logits", "features", "attention"]),
        assistants=st.lists(st.floats(0.1, 0.9), max_size=2).map(tuple),
    ),
)
STAGES = st.builds(
    Stage,
    name=st.text("abc", min_size=1),
    prune=PRUNES,
    quantize=st.none() | st.builds(Quantize, aware=st.booleans()),
    train=TRAINS,
    cycles=st.integers(1, 3),
    gate=st.none() | st.floats(0, 9),
)
PLANS = st.builds(
    Plan, name=NAMES, stages=st.lists(STAGES, min_size=1, max_size=3, unique_by=lambda stage: stage.name).map(tuple)
)
LAYER_CHOICES = st.builds(
    LayerChoice, weight_bits=st.sampled_from(WEIGHT_BITS), activation_bits=st.just(32), sparsity=SPARSITIES
) | st.builds(
    LayerChoice,
    weight_bits=st.integers(2, 8),
    activation_bits=st.integers(2, 8),
    levels=st.sampled_from(["uniform", "kmeans", "power", "additive"]),
    sparsity=SPARSITIES,
    rank=st.none() | st.integers(1, 64),
)
CANDIDATES = st.builds(
    Candidate,
    student=st.none() | st.floats(0.1, 1.0),
    widths=st.dictionaries(NAMES, st.integers(1, 512), max_size=4),
    heads=st.dictionaries(NAMES, st.integers(1, 16), max_size=2),
    skipped=st.lists(NAMES, max_size=2).map(tuple),
    layers=st.dictionaries(NAMES, LAYER_CHOICES, max_size=4),
    recipe=st.builds(
        Recipe,
        calibrator=st.sampled_from(["minmax", "percentile", "mse", "entropy"]),
        recover_steps=st.integers(0, 500),
        stages=PLANS.map(lambda plan: plan.stages),
    ),
)
SPECS = st.builds(
    TensorSpec,
    name=NAMES,
    dtype=st.sampled_from(["float32", "int64"]),
    shape=st.lists(st.none() | st.integers(1, 64), max_size=4).map(tuple),
)
ARTIFACTS = st.builds(
    Artifact,
    path=NAMES,
    format=st.just("onnx"),
    inputs=st.lists(SPECS, max_size=2).map(tuple),
    outputs=st.lists(SPECS, max_size=2).map(tuple),
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    size_bytes=st.integers(1, 10**9),
)
MEASURED = ("accuracy_ci", "test_accuracy", "peak_memory_bytes", "energy_mj", "executed")


@st.composite
def scores(draw: st.DrawFn) -> Score:
    """Figures, any of the optional ones missing with its reason."""
    whole = Score(
        accuracy=draw(st.floats(-1, 1)),
        latency_ms=draw(POSITIVE),
        latency_ms_ci=draw(INTERVALS),
        ratio=draw(POSITIVE),
        ratio_ci=draw(INTERVALS),
        size_bytes=draw(st.integers(1, 10**9)),
        accuracy_ci=draw(INTERVALS),
        test_accuracy=draw(st.floats(0, 1)),
        peak_memory_bytes=draw(st.integers(0, 10**9)),
        energy_mj=draw(POSITIVE),
        executed=draw(st.dictionaries(NAMES, st.sampled_from(["int8", "fp32"]), max_size=3)),
    )
    missing = draw(st.sets(st.sampled_from(MEASURED)))
    return replace(whole, **dict.fromkeys(missing), reasons=dict.fromkeys(missing, "not measured"))


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    """Raw blocks of up to three processes."""
    count = draw(st.integers(3, 12))
    blocks = st.lists(st.lists(POSITIVE, min_size=1, max_size=4).map(tuple), min_size=count, max_size=count).map(tuple)
    return Measurement(
        artifact_sha256="a" * 64,
        reference_sha256="b" * 64,
        samples=draw(blocks),
        reference=draw(blocks),
        processes=tuple(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))),
        clock=draw(st.sampled_from(["process_cpu", "wall"])),
        plan=draw(st.builds(MeasurePlan, threads=st.integers(1, 8), turn_s=POSITIVE, min_blocks=st.integers(3, 50))),
        fingerprint=Fingerprint(facts=draw(st.dictionaries(NAMES, NAMES, max_size=3))),
    )


TRIALS = st.builds(
    Trial,
    number=st.integers(-1, 10**6),
    role=st.sampled_from(["candidate", "fp32", "uniform-int8"]),
    candidate=CANDIDATES,
    outcome=scores() | st.builds(Failure, stage=NAMES, error=NAMES, message=st.text()),
    artifact=st.none() | ARTIFACTS,
    measurement=st.none() | measurements(),
    latency_from=st.none() | NAMES,
    seconds=st.dictionaries(NAMES, POSITIVE, max_size=3),
)
