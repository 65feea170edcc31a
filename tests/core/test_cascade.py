"""Confidence, the rule of a cascade, and its record."""

import dataclasses

import numpy as np
import pytest

from autocompress.core.artifact import Artifact, TensorSpec
from autocompress.core.cascade import Cascade, Rule, runnable_from_json
from autocompress.core.confidence import Arrays, cascaded, confidence
from autocompress.core.errors import InputError
from autocompress.core.record import to_json

SCORES = np.array([[0.0, 2.0, 1.0], [5.0, -1.0, 5.0], [-3.0, -9.0, -4.0]])
X = TensorSpec(name="x", dtype="float32", shape=(None, 3))
Y = dataclasses.replace(X, name="y")
RULE = Rule(output="y", kind="margin", threshold=0.5)


def artifact(name: str, **changes: object) -> Artifact:
    made = Artifact(path=f"{name}.onnx", format="onnx", inputs=(X,), outputs=(Y,), sha256=name * 64, size_bytes=10)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_a_margin_is_the_distance_of_the_two_largest() -> None:
    np.testing.assert_allclose(confidence(SCORES, "margin"), [1.0, 0.0, 1.0])


def test_a_probability_is_that_of_the_largest_whatever_is_added_to_the_scores() -> None:
    exact = np.exp(SCORES).max(1) / np.exp(SCORES).sum(1)
    np.testing.assert_allclose(confidence(SCORES, "probability"), exact)
    np.testing.assert_allclose(confidence(SCORES + 1e4, "probability"), exact)


def test_the_large_model_sees_the_unsure_items_only_and_answers_them() -> None:
    seen: list[np.ndarray] = []

    def large(inputs: Arrays) -> dict[str, np.ndarray]:
        seen.append(inputs["x"])
        return {"y": -inputs["x"]}

    given = SCORES.copy()
    outputs, unsure = cascaded({"x": given}, lambda i: {"y": i["x"]}, large, **to_json(RULE))
    assert unsure.tolist() == [False, True, False]
    np.testing.assert_array_equal(seen[0], SCORES[1:2])
    np.testing.assert_array_equal(outputs["y"], [SCORES[0], -SCORES[1], SCORES[2]])
    np.testing.assert_array_equal(given, SCORES)


@pytest.mark.parametrize(("threshold", "calls"), [(-1.0, 0), (9.0, 1)])
def test_where_none_or_all_are_unsure_one_model_answers_all(threshold: float, calls: int) -> None:
    seen: list[int] = []

    def large(inputs: Arrays) -> dict[str, np.ndarray]:
        seen.append(len(inputs["x"]))
        return {"y": -inputs["x"]}

    rule = dataclasses.replace(RULE, threshold=threshold)
    outputs, unsure = cascaded({"x": SCORES}, lambda i: {"y": i["x"]}, large, **to_json(rule))
    assert seen == [3] * calls
    assert unsure.sum() == 3 * calls
    np.testing.assert_array_equal(outputs["y"], -SCORES if calls else SCORES)


def test_a_cascade_stands_where_an_artifact_does() -> None:
    one, other = artifact("a"), artifact("b", size_bytes=30)
    found = Cascade(small=one, large=other, rule=RULE)
    assert (found.size_bytes, found.dynamic_batch, found.path) == (40, True, "a.onnx then b.onnx")
    fixed = artifact("b", inputs=(dataclasses.replace(X, shape=(1, 3)),))
    assert not dataclasses.replace(found, large=fixed).dynamic_batch
    keys = {found.key, dataclasses.replace(found, small=other, large=one).key}
    keys.add(dataclasses.replace(found, rule=dataclasses.replace(RULE, threshold=0.6)).key)
    assert len(keys) == 3
    for what in (one, found):
        assert runnable_from_json(to_json(what)) == what


def test_models_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(InputError, match="must have the same inputs and outputs, got y and x"):
        Cascade(small=artifact("a"), large=artifact("b", outputs=(X,)), rule=RULE)
    with pytest.raises(InputError, match="`threshold` must be a finite number, got inf"):
        dataclasses.replace(RULE, threshold=float("inf"))


def test_in_full_every_item_goes_on() -> None:
    rule = Cascade(small=artifact("a"), large=artifact("b"), rule=RULE).in_full.rule
    assert (confidence(SCORES * 1e30, rule.kind) < rule.threshold).all()
