"""What a second measurement says of the first one."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.core.artifact import Artifact
from autocompress.core.errors import InputError, RunError, StageError, TargetError
from autocompress.core.front import Limits
from autocompress.core.measurement import Fingerprint, Measurement
from autocompress.core.record import dump, load
from autocompress.device.local import LocalHost
from autocompress.pack import write_package
from autocompress.remeasure import measure_usable
from autocompress.report.changes import print_changes
from autocompress.reprofile import SCHEMA, Reprofile, kendall_tau, reprofile
from autocompress.run import Run
from tests import made
from tests.scripted import measurement


class OtherMachine(LocalHost):
    """This machine under another name: `factor` times the ratio of each file but fp32; `broken` files do not load."""

    factor: float = 1.0
    broken: frozenset[str] = frozenset()
    facts: dict[str, str] = {}  # noqa: RUF012 - set once by a test, never changed in place

    def measure(self, artifacts, inputs, *, fresh=False, rows=(0,)):  # type: ignore[no-untyped-def]
        for artifact in artifacts:
            if artifact.sha256 in self.broken:
                raise StageError("load", "no kernel")
        return [self._renamed(m) for m in super().measure(artifacts, inputs, fresh=fresh, rows=rows)]

    def _renamed(self, found: Measurement) -> Measurement:
        factor = 1.0 if found.artifact_sha256 == found.reference_sha256 else self.factor
        return replace(
            found,
            samples=tuple(tuple(s * factor for s in block) for block in found.samples),
            fingerprint=Fingerprint(facts={**found.fingerprint.facts, **self.facts}),
        )


@pytest.mark.parametrize(
    ("one", "other", "tau"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 4 / 6),
        ([12, 2, 1, 12, 2], [1, 4, 7, 1, 0], -0.4714045207910316),  # scipy.stats.kendalltau, its own example
        ([1, 1, 2, 2], [1, 2, 1, 2], 0.0),
    ],
)
def test_kendall_tau_has_known_values(one: list[float], other: list[float], tau: float) -> None:
    assert kendall_tau(one, other) == pytest.approx(tau)


def test_kendall_tau_is_symmetric_and_bounded() -> None:
    rng = random.Random(0)
    for _ in range(50):
        one, other = ([rng.randrange(5) for _ in range(8)] for _ in range(2))
        tau = kendall_tau(one, other)
        assert tau == kendall_tau(other, one)
        assert tau is None or -1 <= tau <= 1


@pytest.mark.parametrize(("one", "other"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0])])
def test_kendall_tau_of_what_has_no_order_is_none(one: list[float], other: list[float]) -> None:
    assert kendall_tau(one, other) is None


def test_on_the_same_machine_accuracy_is_reused_and_the_order_stays(digits_run: Run, tmp_path: Path) -> None:
    write_package(digits_run, digits_run.front().pick(), tmp_path / "p", limits=Limits(max_latency_ms=1e6))
    found = reprofile(digits_run.path)
    assert found.machine == {}
    assert found.accuracy.startswith("reused")
    assert found.tau is not None
    assert found.tau > 0
    assert {p.trial for p in found.points} >= {t.number for t in digits_run.front().points}
    assert all(p.now is not None and p.now.accuracy == p.recorded.accuracy for p in found.points)
    assert found.pick is not None
    assert found.pick.holds
    assert load(Reprofile, json.loads(json.dumps(dump(found, SCHEMA))), SCHEMA) == found


def test_another_runtime_version_is_told_and_scores_again(digits_run: Run) -> None:
    host = OtherMachine(digits_run.config.profile)
    host.facts = {"runtime": "onnxruntime 0.1"}
    with host:
        found = reprofile(digits_run.path, host=host)
    assert found.machine["runtime"][1] == "onnxruntime 0.1"
    assert found.accuracy.startswith("scored again")
    assert all(p.now is not None and p.now.accuracy == pytest.approx(p.recorded.accuracy) for p in found.points)
    assert found.pick is None


def test_where_everything_but_fp32_is_slower_the_pick_and_the_front_fall(digits_run: Run, tmp_path: Path) -> None:
    front = digits_run.front()
    pick = front.points[0]
    assert pick.score is not None
    write_package(digits_run, pick, tmp_path / "p", limits=Limits(max_latency_ms=pick.score.latency_ms * 2))
    host = OtherMachine(digits_run.config.profile)
    host.factor = 50.0
    with host:
        found = reprofile(digits_run.path, host=host)
    assert next(p for p in found.points if p.role == "fp32").on_front_now
    assert pick.number in found.left
    assert found.pick is not None
    assert not found.pick.holds
    assert found.pick.broken[0].startswith("max_latency_ms = ")


def test_a_file_that_does_not_run_elsewhere_is_a_point_that_fails(digits_run: Run) -> None:
    broken = digits_run.front().points[0]
    assert broken.artifact is not None
    host = OtherMachine(digits_run.config.profile)
    host.broken = frozenset({broken.artifact.sha256})
    with host:
        found = reprofile(digits_run.path, host=host)
    failed = [p for p in found.points if p.now is None]
    assert [(p.trial, p.failure) for p in failed] == [(broken.number, "load: no kernel")]
    assert broken.number in found.left


def test_where_fp32_fails_the_target_is_not_usable(digits_run: Run) -> None:
    fp32 = digits_run.front().baselines["fp32"].artifact
    assert fp32 is not None
    host = OtherMachine(digits_run.config.profile)
    host.broken = frozenset({fp32.sha256})
    with host, pytest.raises(TargetError, match="cannot be measured here: load: no kernel"):
        reprofile(digits_run.path, host=host)


def test_a_package_is_measured_by_itself(digits_run: Run, tmp_path: Path) -> None:
    package = write_package(digits_run, digits_run.front().points[0], tmp_path / "p")
    found = reprofile(package)
    assert [p.role for p in found.points][-1] == "fp32"
    assert len(found.points) == 2
    assert found.pick is not None
    assert found.pick.holds


def test_another_profile_of_the_same_format_is_taken(digits_run: Run, quick_profile: Path, tmp_path: Path) -> None:
    other = tmp_path / "two.yaml"
    text = quick_profile.read_text().replace("name: quick", "name: two").replace("threads: 1", "threads: 2")
    other.write_text(text)
    found = reprofile(digits_run.path, str(other))
    assert (found.target, found.target_now) == ("quick", "two")


def test_a_profile_of_another_format_is_refused(digits_run: Run, quick_profile: Path, tmp_path: Path) -> None:
    other = tmp_path / "lite.yaml"
    other.write_text(quick_profile.read_text().replace("format: onnx", "format: tflite"))
    with pytest.raises(InputError, match="holds onnx files and quick takes tflite"):
        reprofile(digits_run.path, str(other))


def test_a_changed_model_is_named(digits_run: Run) -> None:
    artifact = digits_run.front().points[0].artifact
    assert artifact is not None
    (digits_run.path / artifact.path).write_bytes(b"x")
    with pytest.raises(RunError, match="is not the file that was scored as trial"):
        reprofile(digits_run.path)


def test_a_run_without_fp32_is_refused(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run", [])
    with pytest.raises(RunError, match="has no fp32 baseline yet"):
        reprofile(run.path)


def test_picks_that_are_no_picks_are_refused(digits_run: Run) -> None:
    (digits_run.path / "picks.json").write_text("[]")
    with pytest.raises(RunError, match="is not a list of picks"):
        reprofile(digits_run.path)


def test_one_bad_file_does_not_spoil_the_others(tmp_path: Path) -> None:
    class Host:
        def measure(
            self, artifacts: list[Artifact], inputs: Path, *, fresh: bool = False, rows: tuple[int, ...] = (0,)
        ) -> list[Measurement]:
            if any(a.path == "bad" for a in artifacts):
                raise StageError("measure", "hung")
            return [measurement(0.5) for _ in artifacts[1:]]

    spec = made.trials()[0].artifact
    assert spec is not None
    good, bad = replace(spec, path="good"), replace(spec, path="bad")
    taken, failed = measure_usable(Host(), good, {0: good, 1: bad, 2: good}, tmp_path, 2)  # type: ignore[arg-type]
    assert list(taken) == [0, 2]
    assert failed == {1: "measure: hung"}


def test_the_text_says_it_all(digits_run: Run) -> None:
    out = io.StringIO()
    print_changes(reprofile(digits_run.path), out)
    for said in ("Machine: the same.", "Kendall's tau", "Entered the front:", "Nothing was picked from this run."):
        assert said in out.getvalue()
    assert "\x1b" not in out.getvalue()
