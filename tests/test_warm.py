"""Properties of a warm start: what is taken over, and what is not."""

from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.core.errors import RunError
from autocompress.driver import search
from autocompress.run import Run, open_run
from autocompress.warm import beginnings, take_over, translated
from tests import scripted


def test_values_of_another_space_become_the_nearest_ones() -> None:
    space = scripted.space(2)
    name = "width:conv0"
    assert translated({name: 17, "precision:block0": "w2a8"}, space)[name] == 16
    assert translated({name: 32}, space)[name] == 32
    assert translated({"precision:block0": "w2a8"}, space)["precision:block0"] == "fp32"
    assert translated({}, space) == {n: choices[0] for n, choices in space.variables.items()}


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    earlier = Run.create(tmp_path / "earlier", scripted.config(model="a"))
    for model in ("b", ""):
        run = Run.create(tmp_path / f"run{model}", scripted.config(model=model))
        with pytest.raises(RunError, match="has other weights"):
            take_over(run, earlier)


def test_trained_weights_and_answers_are_taken_over_and_nothing_else(tmp_path: Path) -> None:
    earlier = Run.create(tmp_path / "earlier", scripted.config(model="a"))
    for name in ("weights/one.safetensors", "teachers/two.npz", "weights/half.123", "artifacts/three.onnx"):
        (earlier.path / name).parent.mkdir(exist_ok=True)
        (earlier.path / name).write_text(name)
    run = Run.create(tmp_path / "run", scripted.config(model="a"))
    assert take_over(run, earlier) == 2
    assert (run.path / "weights/one.safetensors").read_text() == "weights/one.safetensors"
    assert not (run.path / "weights/half.123").exists()
    assert not list(run.artifacts.iterdir())
    assert take_over(run, earlier) == 0


def test_it_begins_with_the_front_and_with_all_that_was_recovered(tmp_path: Path) -> None:
    terms = {"fidelity": "recover", "recover_steps": scripted.FULL, "trials": 40}
    earlier = Run.create(tmp_path / "run", scripted.config(**terms))
    scripted.drive(earlier, scripted.Scripted(earlier), trials=40)
    space = scripted.space()
    found = [space.decode(values).digest for values in beginnings(earlier, space)]
    assert len(found) == len(set(found))
    plain = replace
    for trial in earlier.trials():
        if trial.rung == "full":
            recipe = plain(trial.candidate.recipe, recover_steps=0)
            assert plain(trial.candidate, recipe=recipe).digest in found
    numbers = [t.number for t in earlier.trials() if t.role == "candidate"][:2]
    assert len(beginnings(earlier, space, numbers)) == 2


def test_a_search_on_another_target_trains_nothing_that_was_trained(quick_profile: Path, tmp_path: Path) -> None:
    """Recovered on ONNX Runtime, then begun with on OpenVINO: files, scores and latencies are new, weights are not."""
    first = search("digits", quick_profile, fidelity="recover", recover_steps=4, trials=12, out=tmp_path / "first")
    trained = {t.candidate.weights_key for t in first.trials() if t.seconds.get("recover")}
    assert trained
    second = search(
        "digits", "cpu-openvino", fidelity="recover", recover_steps=4, trials=12, out=tmp_path / "second",
        warm_start=first,
    )  # fmt: skip
    again = [t for t in second.trials() if t.candidate.weights_key in trained]
    assert again
    assert all("recover" not in t.seconds for t in again)
    assert all(t.score is not None and t.artifact is not None for t in again)
    assert {t.measurement.fingerprint.facts["runtime"] for t in second.trials() if t.measurement} != {
        t.measurement.fingerprint.facts["runtime"] for t in first.trials() if t.measurement
    }
    assert open_run(second.path).config.warm_start == str(first.path)
