from dataclasses import replace
from pathlib import Path

import pytest

from autocompress.core.candidate import Candidate
from autocompress.core.errors import InputError
from autocompress.core.front import Limits
from autocompress.core.probe import Probe, Verdict
from autocompress.device.hosts import LocalHost
from autocompress.evaluate import Evaluator
from autocompress.probe import payoff_of, place, probe, read, subject_of, write
from autocompress.run import Run
from tests import tiny
from tests.scripted import config

FACTS = {"cpu_model": "Test CPU"}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def found() -> Probe:
    return probe(tiny.task().task, tiny.PROFILE)


def made(**changes: object) -> Probe:
    plain = Probe(
        task="scripted",
        target="tiny",
        subject="this model",
        fingerprint=FACTS,
        created="2026-11-23T00:00:00.000+00:00",
        seconds=1.0,
        verdicts=(Verdict(choice="w4a32", usable=True, faster=False, smaller=True, why="no faster"),),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def new_run(folder: Path, **terms: object) -> Run:
    return Run.create(folder, config(profile=tiny.PROFILE, rules=tiny.RULES, **terms))


def test_a_probe_tries_every_choice_of_the_profile_and_every_group(found: Probe) -> None:
    assert {v.choice for v in found.verdicts} >= {"w4a8", "w8a32", "w4a32", "w16a32", "sparsity 0.9"}
    assert {name for stair in found.stairs for name in stair.groups} <= {"conv", "up"}
    assert found.left_out == () or all(name.startswith("widths") for name in found.left_out)
    assert (found.task, found.target) == ("tiny", "tiny")
    assert found.fingerprint["runtime"].startswith("onnxruntime")
    assert found.seconds > 0


def test_a_probe_ends_soon_after_its_time() -> None:
    found = probe(tiny.task().task, tiny.PROFILE, seconds=0)
    assert found.verdicts == found.stairs == ()
    assert set(found.left_out) >= {"precisions", "shapes of layers", "sparsity 0.9", "widths of conv", "widths of up"}


def test_a_probe_survives_its_file(found: Probe, tmp_path: Path) -> None:
    write(found, place(found))
    assert place(found).is_relative_to(tmp_path / "cache" / "autocompress" / "probes")
    assert place(found).read_text().startswith("# Which choices pay for tiny on tiny, measured 20")
    assert read(place(found)) == found


@pytest.mark.parametrize("text", ["schema: 99\n", "schema: 1\nspeed: 3\n", "a: [", "just words"])
def test_a_file_that_is_no_probe_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "probe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"probe\.yaml"):
        read(path)


def test_probes_of_another_task_target_or_device_lie_elsewhere() -> None:
    places = [place(made(**c)) for c in ({}, {"task": "t"}, {"target": "t"}, {"fingerprint": {"cpu_model": "Other"}})]
    assert len(set(places)) == 4
    assert place(made(created="later", subject="another model")) == places[0]


def test_a_run_takes_a_copy_before_its_first_trial_and_keeps_to_it(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    assert payoff_of(run, "this model", FACTS) is None
    write(made(), place(made()))
    taken = payoff_of(run, "this model", FACTS)
    assert taken is not None
    assert taken.probe == made()
    write(made(verdicts=()), place(made()))
    assert payoff_of(run, "this model", FACTS) == taken
    assert payoff_of(run, "whatever it is now", {}) == taken


@pytest.mark.parametrize(
    "other", [{"subject": "another model"}, {"fingerprint": {"cpu_model": "Other"}}, {"task": "t"}]
)
def test_a_probe_of_something_else_is_passed_over(tmp_path: Path, other: dict[str, object]) -> None:
    write(made(**other), place(made(**other)))
    assert payoff_of(new_run(tmp_path / "run"), "this model", FACTS) is None


@pytest.mark.parametrize(
    ("terms", "counts"),
    [
        ({}, False),
        ({"objectives": ("accuracy", "latency", "size")}, True),
        ({"objectives": ("accuracy", "latency", "memory")}, True),
        ({"limits": Limits(max_size_mb=1.0)}, True),
        ({"limits": Limits(max_memory_mb=1.0)}, True),
        ({"limits": Limits(max_latency_ms=1.0)}, False),
    ],
)
def test_bytes_count_where_an_objective_or_a_limit_asks_for_them(
    tmp_path: Path, terms: dict[str, object], counts: bool
) -> None:
    write(made(), place(made()))
    taken = payoff_of(new_run(tmp_path / "run", **terms), "this model", FACTS)
    assert taken is not None
    assert taken.size_counts is counts
    assert (taken.against("w4a32", "up") is None) is counts


def test_a_search_leaves_out_what_its_probe_found_not_to_pay(tmp_path: Path) -> None:
    task = tiny.task()
    with LocalHost(tiny.PROFILE) as host:
        run = new_run(tmp_path / "first")
        plain = Evaluator(task, run, tiny.PROFILE, tiny.RULES, host)
        about = subject_of(task, plain.structure, plain._profile)
        known = made(subject=about, fingerprint=dict(host.fingerprint().facts), task=run.config.task_name)
        write(known, place(known))
        probed = Evaluator(task, new_run(tmp_path / "second"), tiny.PROFILE, tiny.RULES, host)
        resumed = Evaluator(task, run, tiny.PROFILE, tiny.RULES, host)
        trial = probed.evaluate(Candidate(), "fp32")
    assert trial.score is not None
    for layer, choices in plain.space.precisions.items():
        assert probed.space.precisions[layer] == tuple(p for p in choices if p != "w4a32")
    assert probed.space.dropped["w4a32 of conv, up, fc"] == "no faster"
    assert "w4a32 of conv, up, fc" not in plain.space.dropped
    assert resumed.space == probed.space  # the first run had no trial yet: nothing stands against it
