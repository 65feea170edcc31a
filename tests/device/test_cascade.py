"""A cascade on a device: outputs of either model, the time of the share that goes on, and what it takes of memory."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from autocompress.core.cascade import LARGE, Cascade, Rule
from autocompress.core.confidence import confidence
from autocompress.core.errors import StageError, TargetError
from autocompress.device.adb import AdbHost
from autocompress.device.cascade import CascadeSession
from autocompress.device.local import LocalHost
from autocompress.device.runtime import get_runtime
from tests import tflite_files
from tests.device.conftest import MakeArtifact, profile_of
from tests.models import artifact_of, write_fake, write_linear


def median_margin(inputs: Path) -> Rule:
    """A rule that sends one half of the items on."""
    threshold = float(np.median(confidence(np.load(inputs / "input.npy"), "margin")))
    return Rule(output="output", kind="margin", threshold=threshold)


def test_each_item_is_answered_by_its_model(
    fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path, tmp_path: Path
) -> None:
    rule = median_margin(inputs)
    small, large = fake_artifact("small"), fake_artifact("large", scale=-1.0)
    fake_host.outputs(Cascade(small=small, large=large, rule=rule), inputs, tmp_path / "out")
    x, unsure = np.load(inputs / "input.npy"), np.load(tmp_path / "out" / f"{LARGE}.npy")
    np.testing.assert_array_equal(unsure, confidence(x, "margin") < rule.threshold)
    assert unsure.sum() == 75
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "output.npy"), np.where(unsure[:, None], -x, x))


def test_models_of_a_fixed_batch_answer_item_by_item(fake_host: LocalHost, inputs: Path, tmp_path: Path) -> None:
    fixed = {"inputs": {"input": ["float32", [1, 4]]}}
    small, large = (
        artifact_of(write_fake(tmp_path / f"{scale}.json", scale=scale, **fixed), shape=(1, 4)) for scale in (1.0, -1.0)
    )
    fake_host.outputs(Cascade(small=small, large=large, rule=median_margin(inputs)), inputs, tmp_path / "out")
    x, unsure = np.load(inputs / "input.npy"), np.load(tmp_path / "out" / f"{LARGE}.npy")
    assert unsure.sum() == 75
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "output.npy"), np.where(unsure[:, None], -x, x))


@pytest.mark.parametrize("sent_on", [0, 1, 3])
def test_latency_is_the_small_models_and_the_large_ones_for_its_share(
    fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path, sent_on: int
) -> None:
    rule = median_margin(inputs)
    unsure = confidence(np.load(inputs / "input.npy"), "margin") < rule.threshold
    rows = [*np.flatnonzero(unsure)[:sent_on], *np.flatnonzero(~unsure)[: 4 - sent_on]]
    reference, small, large = (fake_artifact(n, work_ms=ms) for n, ms in (("r", 1.0), ("s", 0.2), ("l", 0.8)))
    cascade = Cascade(small=small, large=large, rule=rule)
    found = fake_host.measure([reference, cascade, large], inputs, rows=[int(row) for row in rows])
    # a share of one item in four is 0.2: noise of a busy machine must not pass for one
    assert found[0].ratio == pytest.approx(0.2 + 0.8 * sent_on / 4, abs=0.08)
    assert found[1].ratio == pytest.approx(0.8, abs=0.08)
    assert found[0].reference_ms == pytest.approx(1.0, rel=0.25)
    assert found[0].artifact_sha256 == cascade.key


def test_a_member_that_fails_fails_the_cascade_in_its_stage(
    fake_host: LocalHost, fake_artifact: MakeArtifact, inputs: Path, tmp_path: Path
) -> None:
    good, bad = fake_artifact("good"), fake_artifact("bad", misbehave={"run": "nan"})
    cascade = Cascade(small=good, large=bad, rule=median_margin(inputs))
    with pytest.raises(StageError, match="output 'output' is not finite"):
        fake_host.outputs(cascade, inputs, tmp_path / "out")
    gone = dataclasses.replace(bad, path=str(tmp_path / "gone"))
    with pytest.raises(StageError, match=r"there is no file .*gone"):
        fake_host.measure([good, dataclasses.replace(cascade, large=gone)], inputs)
    assert fake_host.peak_memory(dataclasses.replace(cascade, large=good), inputs) > 0


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "litert"])
def test_every_runtime_holds_two_models_at_once(runtime: str, tmp_path: Path) -> None:
    """What one gives stays as it is while the other runs, item by item and in a batch."""
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    weights = np.eye(3, dtype=np.float32), -np.eye(3, dtype=np.float32)
    write = tflite_files.write_linear if runtime == "litert" else write_linear
    paths = [write(tmp_path / f"{i}.{runtime}", w, np.zeros(3, np.float32)) for i, w in enumerate(weights)]
    sure = confidence(x, "probability")
    rule = Rule(output="output", kind="probability", threshold=float(np.median(sure)))
    small, large = (get_runtime(runtime).load(path, {"threads": 1}) for path in paths)
    with contextlib.closing(CascadeSession(small, large, rule)) as session:
        expected = np.where((sure < rule.threshold)[:, None], -x, x)
        calls = [session.bind({"input": x[i : i + 1]}) for i in range(6)]
        np.testing.assert_allclose(np.concatenate([call()["output"] for call in calls]), expected, rtol=1e-6)
        found = session.run({"input": x})
        np.testing.assert_allclose(found["output"], expected, rtol=1e-6)
        np.testing.assert_array_equal(found[LARGE], sure < rule.threshold)


def test_adb_says_that_it_cannot(fake_artifact: MakeArtifact, inputs: Path) -> None:
    cascade = Cascade(small=fake_artifact("s"), large=fake_artifact("l"), rule=median_margin(inputs))
    with (
        AdbHost("ABC123", profile_of("litert")) as host,
        pytest.raises(TargetError, match="adb:ABC123: a cascade cannot be measured by adb"),
    ):
        host.measure([cascade.small, cascade], inputs)
