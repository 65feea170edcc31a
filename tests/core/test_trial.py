import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.core.artifact import Artifact, TensorSpec, sha256_of
from autocompress.core.candidate import Candidate, FloatPrecision, parse_precision
from autocompress.core.errors import InputError
from autocompress.core.trial import Failure, Role, Score, Trial
from tests import made
from tests.core.strategies import ARTIFACTS, MEASURED, scores


@given(scores(), st.sampled_from(MEASURED))
def test_a_figure_without_value_needs_a_reason(score: Score, name: str) -> None:
    reasons = {k: v for k, v in score.reasons.items() if k != name}
    with pytest.raises(InputError, match=f"`{name}` is null without a reason"):
        replace(score, **{name: None}, reasons=reasons)


@given(scores())
def test_a_trial_has_a_score_or_a_failure_never_both(score: Score) -> None:
    scored = Trial(number=0, role="fp32", candidate=Candidate(), outcome=score)
    failed = replace(scored, outcome=Failure(stage="load", error="E", message="m"))
    assert scored.score is score
    assert failed.score is None


EXECUTED = {"a": "int8", "b": "fp32", "c": "bf16"}


@pytest.mark.parametrize(
    ("role", "precisions", "rest", "differs"),
    [
        ("candidate", {"a": "w8a8"}, "fp32", {"c": "bf16"}),
        ("candidate", {"a": "w4a8", "b": "w8a8"}, "bf16", {"b": "fp32"}),
        ("candidate", {"a": "w8a32"}, "bf16", {"a": "int8", "b": "fp32"}),
        ("uniform-bf16", {}, "bf16", {"a": "int8", "b": "fp32"}),
        ("uniform-int8", {}, "fp32", {}),
    ],
)
def test_a_layer_that_ran_otherwise_than_asked_is_told(
    role: Role, precisions: dict[str, str], rest: FloatPrecision, differs: dict[str, str]
) -> None:
    layers = {name: parse_precision(text) for name, text in precisions.items()}
    outcome = made.score(0.9, 0.5, executed=EXECUTED)
    candidate = Candidate(layers=layers, float_precision=rest)
    assert Trial(number=0, role=role, candidate=candidate, outcome=outcome).executed_differs == differs


def test_where_nothing_is_read_back_nothing_is_said_of_it() -> None:
    outcome = replace(
        made.score(0.9, 0.5), executed=None, reasons=made.REASONS | {"executed": "the runtime does not tell"}
    )
    assert Trial(number=0, role="candidate", candidate=Candidate(), outcome=outcome).executed_differs is None


@given(ARTIFACTS)
def test_batch_is_dynamic_only_if_every_input_leaves_it_free(artifact: Artifact) -> None:
    fixed = TensorSpec(name="x", dtype="float32", shape=(1, 3))
    free = replace(fixed, shape=(None, 3))
    assert not replace(artifact, inputs=(free, fixed)).dynamic_batch
    assert replace(artifact, inputs=(free, free)).dynamic_batch
    assert not replace(artifact, inputs=(replace(fixed, shape=()),)).dynamic_batch


def test_an_empty_file_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape("`size_bytes` must be positive, got 0")):
        Artifact(path="x", format="onnx", inputs=(), outputs=(), sha256="", size_bytes=0)


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
