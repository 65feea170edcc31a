"""A cascade is chosen, measured, packed and verified; everything that speaks against one is said."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from autocompress import cascade as cascades
from autocompress.cascade import best, find_cascade
from autocompress.cli import main
from autocompress.core.artifact import sha256_of
from autocompress.core.cascade import CascadeRecord
from autocompress.core.confidence import confidence
from autocompress.core.errors import InputError, NoPointError, PackageError, VerifyError
from autocompress.core.front import Limits
from autocompress.core.measurement import separated
from autocompress.pack import write_package
from autocompress.package import INPUTS, MANIFEST, OUTPUTS, read_package
from autocompress.picks import read_picks
from autocompress.recorded import open_recorded
from autocompress.remeasure import open_task
from autocompress.run import Run
from autocompress.task import CheckedTask
from autocompress.thresholds import Member, mixture, options
from autocompress.verify import verify_package
from tests import made, toy
from tests.test_package import ISOLATED

LIMITS = Limits(max_accuracy_drop=0.5)


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """A sample of few items, so that there are more of them in little time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascades, "MOST_ROWS", 20)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return toy.run(tmp_path_factory.mktemp("cascade") / "toy")


@pytest.fixture(scope="module")
def found(run: Run) -> CascadeRecord:
    return find_cascade(run, LIMITS)


@pytest.fixture(scope="module")
def _package(run: Run, found: CascadeRecord) -> Path:
    return write_package(run, found, run.path.parent / "package", limits=LIMITS)


@pytest.fixture
def package(_package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_package, tmp_path / "package"))


@pytest.fixture(scope="module")
def task(run: Run) -> CheckedTask:
    return open_task(run.config.task, "toy")


def member(number: int, ratio: float, outputs: np.ndarray, task: CheckedTask, *, hits: bool = True) -> Member:
    """A front member that gives these outputs."""
    by_item = (outputs.argmax(1) == task.targets("validation")).astype(float)
    score = made.score(float(by_item.mean()), ratio)
    trial = made.trial(number, score)
    return Member(trial=trial, score=score, outputs={"output": outputs}, hits=by_item if hits else None)


def pair(task: CheckedTask, *, hits: bool = True) -> list[Member]:
    """A fast one that errs, and a slow one that never does."""
    right = toy.items(2)[0] @ toy.weight()
    noise = np.random.default_rng(3).normal(size=right.shape).astype(np.float32)
    return [member(1, 0.1, right + 1.5 * noise, task, hits=hits), member(2, 0.5, right, task, hits=hits)]


@pytest.mark.parametrize("hits", [True, False])
def test_an_option_is_what_its_rule_gives_on_validation(task: CheckedTask, hits: bool) -> None:
    """Whether the metric is a mean over items, or is asked for each threshold."""
    small, large = pair(task, hits=hits)
    found = list(options([small, large], task))
    assert len(found) > 300
    for option in found[::37]:
        unsure = confidence(small.outputs["output"], option.rule.kind) < option.rule.threshold
        joined = np.where(unsure[:, None], large.outputs["output"], small.outputs["output"])
        assert option.share == unsure.mean()
        assert option.score.accuracy == pytest.approx(np.mean(joined.argmax(1) == task.targets("validation")))
        assert option.score.latency_ms == pytest.approx(0.1 + option.share * 0.5)


def test_equally_sure_items_are_not_told_apart(task: CheckedTask) -> None:
    _, large = pair(task)
    equal = np.tile(np.eye(toy.CLASSES, dtype=np.float32)[0], (toy.ITEMS, 1))
    equal[:100] *= 2
    found = list(options([member(1, 0.1, equal, task), large], task))
    assert {option.share for option in found} == {0.75}


def test_the_fastest_within_the_limit_is_chosen_and_without_one_the_most_accurate(task: CheckedTask) -> None:
    found = list(options(pair(task), task))
    fp32 = made.score(1.0, 1.0)
    chosen = best(found, Limits(max_accuracy_drop=4.9), fp32, None)
    assert chosen.score.accuracy > 0.95
    assert not [o for o in found if o.score.accuracy > 0.95 and o.score.latency_ms < chosen.score.latency_ms]
    chosen = best(found, Limits(max_latency_ms=0.3), fp32, None)
    assert chosen.score.latency_ms <= 0.3
    assert not [o for o in found if o.score.latency_ms <= 0.3 and o.score.accuracy > chosen.score.accuracy]


def test_what_no_cascade_reaches_is_said_with_the_point_that_does(task: CheckedTask) -> None:
    found, fp32 = list(options(pair(task), task)), made.score(1.0, 1.0)
    with pytest.raises(
        NoPointError, match=r"`max_latency_ms` = 0.05 binds. The nearest is trial 1, then trial 2 where"
    ):
        best(found, Limits(max_latency_ms=0.05), fp32, None)
    single = made.trial(7, made.score(0.99, 0.12))
    with pytest.raises(
        NoPointError, match=r"expected to beat trial 7 alone, which has accuracy 0.9900 and 0.12 ms: take"
    ):
        best(found, Limits(max_accuracy_drop=5), fp32, single)
    with pytest.raises(NoPointError, match=r"binds. .* Trial 7 alone does: --trial 7"):
        best(found, Limits(max_size_mb=0.1), fp32, single)
    with pytest.raises(NoPointError, match="needs two front members"):
        best([], LIMITS, fp32, single)


@pytest.mark.parametrize(("share", "most"), [(0.2034, 100), (1 / 3, 20), (0.0, 50), (1.0, 50), (0.004, 100)])
def test_a_mixture_has_the_share_and_is_mixed(share: float, most: int) -> None:
    large = np.random.default_rng(0).random(5000) < share
    rows = mixture(large, share, most)
    marked = large[rows]
    assert most / 2 < len(rows) <= most
    assert marked.mean() == pytest.approx(share, abs=1 / most)
    half = len(rows) // 2
    assert abs(int(marked[:half].sum()) - int(marked[half:].sum())) <= 1


def test_what_was_expected_is_what_runs(found: CascadeRecord) -> None:
    assert (found.small.number, found.large.number) == (2, 3)
    assert found.share == found.expected_share
    assert 0 < found.share < 1
    assert found.score.accuracy == found.expected_accuracy >= 0.995
    small, large = found.small.score, found.large.score
    assert small is not None
    assert large is not None
    assert found.expected_latency_ms == pytest.approx(small.latency_ms + found.share * large.latency_ms)
    assert found.score.ratio > 0.7 * found.expected_latency_ms  # fp32 takes 1 ms; deciding comes on top
    assert found.single is not None
    assert found.single.trial == 3
    assert separated(found.score.ratio_ci, found.single.ratio_ci)
    assert found.score.test_accuracy is not None
    assert 0.9 < found.score.test_accuracy < 1
    assert found.score.accuracy_ci is not None
    assert found.score.size_bytes == sum(t.artifact.size_bytes for t in (found.small, found.large) if t.artifact)
    assert small.accuracy < 0.98


def test_a_package_holds_both_models_and_runs_with_numpy_and_the_runtime_only(package: Path, tmp_path: Path) -> None:
    assert {p.name for p in package.iterdir()} == {
        *("small.onnx", "large.onnx", "fp32.onnx", "predict.py", "predict_onnxruntime.py", "predict_cascade.py"),
        *("README.md", INPUTS, OUTPUTS, MANIFEST),
    }
    assert "\nTrial 2, then trial 3 where the " in (package / "README.md").read_text()
    command = [
        sys.executable,
        "-c",
        ISOLATED,
        str(package / "predict.py"),
        str(package / INPUTS),
        str(tmp_path / "o.npz"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "o.npz") as got, np.load(package / OUTPUTS) as expected, np.load(package / INPUTS) as given:
        np.testing.assert_allclose(got["output"], expected["output"], rtol=1e-4, atol=1e-4)
        right = np.abs(got["output"] - given["input"] @ toy.weight()).max(axis=1) < 1e-3
    assert 0 < right.sum() < len(right)  # the slow model's answers, and the fast one's


def test_a_package_verifies_where_it_was_made(package: Path) -> None:
    found = verify_package(package)
    assert made.but_latency(found.faults) == []
    assert found.accuracy_now == found.accuracy
    assert found.output_difference == 0
    assert found.cascade is not None
    assert f"every file is as it was written ({found.cascade})" in found.lines()[0]


def replace_file(package: Path, name: str, source: Path, member: str) -> None:
    """Put another file in the place of one, as somebody who also corrects the manifest would."""
    shutil.copyfile(source, package / name)
    manifest = json.loads((package / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": sha256_of(source), "size_bytes": source.stat().st_size}
    manifest["cascade"][member]["artifact"] |= manifest["files"][name]
    (package / MANIFEST).write_text(json.dumps(manifest))


def test_another_model_in_the_place_of_a_member_does_not_verify(package: Path) -> None:
    with (package / "small.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(PackageError, match=r"small\.onnx was changed"):
        read_package(package)
    replace_file(package, "small.onnx", package / "fp32.onnx", "small")
    with pytest.raises(VerifyError, match="outputs on the sample differ"):
        verify_package(package).require()


def test_reprofiling_points_to_what_checks_a_cascade(package: Path) -> None:
    with (
        pytest.raises(PackageError, match="holds a cascade of two models: `autocompress verify`"),
        open_recorded(package),
    ):
        pass


@pytest.fixture
def picked(run: Run, found: CascadeRecord, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The command that picks, without measuring it once more."""
    monkeypatch.setattr(cascades, "find_cascade", lambda *_, **__: found)
    return ["pick", str(run.path), "--cascade", "--max-accuracy-drop", "0.5", "--out", str(tmp_path / "p")]


def test_the_command_picks_and_tells(
    run: Run, picked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*picked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["package"]) == (1, str(tmp_path / "p"))
    assert (told["cascade"]["small"]["trial"], told["cascade"]["large"]["trial"]) == (2, 3)
    assert told["cascade"]["single"]["trial"] == 3
    assert told["cascade"]["score"]["accuracy"] >= 0.995
    assert set(told["cascade"]) == {
        *("small", "large", "rule", "share", "score", "single"),
        *("expected_share", "expected_accuracy", "expected_latency_ms"),
    }
    assert (read_picks(run)[-1].trial, read_picks(run)[-1].small) == (3, 2)
    assert main(picked) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_command_says_it_to_people(
    found: CascadeRecord, picked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(picked) == 0
    said = capsys.readouterr().out
    for line in (f"picked a cascade: {found.name}\n", f"trial 3 answers {found.share:.1%} of validation", "on test 0."):
        assert line in said
    assert "x faster against trial 3 alone, measured in turn\n" in said


@pytest.mark.parametrize("words", [["--knee"], ["--trial", "2"]])
def test_a_cascade_is_chosen_by_limits_only(picked: list[str], words: list[str]) -> None:
    assert main([*picked, *words]) == 2


def test_what_the_measurement_does_not_show_is_refused(run: Run, found: CascadeRecord) -> None:
    """Expected figures are not enough."""
    fp32, single = made.score(1.0, 1.0), run.front().points[-1]
    cascades.require(found, LIMITS, fp32, single)
    assert found.single is not None
    even = dataclasses.replace(found, single=dataclasses.replace(found.single, ratio_ci=found.score.ratio_ci))
    with pytest.raises(NoPointError, match=rf"it is not faster. Take --trial {single.number} instead"):
        cascades.require(even, LIMITS, fp32, single)
    lower = dataclasses.replace(found, score=dataclasses.replace(found.score, accuracy=0.99))
    with pytest.raises(NoPointError, match=r"accuracy 0.9900 and .* does not meet `max_accuracy_drop` = 0.5"):
        cascades.require(lower, LIMITS, fp32, single)
    with pytest.raises(NoPointError, match="it is not more accurate than trial"):
        cascades.require(lower, Limits(max_latency_ms=9), fp32, single)


def test_a_task_that_does_not_classify_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a cascade is chosen by limits"):
        find_cascade(run, Limits())
    task = open_task(run.config.task, "toy")
    x = task.task.validation
    regression = [(x[i][0], x[i][0][:5]) for i in range(len(x))]
    changed = dataclasses.replace(
        task.task, train=regression, validation=regression, test=None, metric=lambda o, t: -float(np.abs(o - t).mean()),
        loss=lambda o, t: (o - t).abs().mean(),
    )  # fmt: skip
    from autocompress.task import check_task

    with pytest.raises(InputError, match=r"task 'toy' does not classify: .* targets of float32 \[400, 5\]"):
        find_cascade(run, LIMITS, task=check_task(changed))
