"""The journey by commands: search, front, pick, verify, re-profile, report."""

import json
from pathlib import Path
from typing import Any

import pytest

from autocompress.cli import doctor, main
from autocompress.cli.doctor import examine
from autocompress.config import load_profile
from autocompress.device.runtime import RUNTIMES
from autocompress.run import Run
from tests import made

Capture = pytest.CaptureFixture[str]


def result(capsys: Capture, *words: object, code: int = 0) -> Any:
    """The JSON document that a command prints."""
    # A package that was measured for a fraction of a second may miss its latency on a busy machine.
    assert main([str(w) for w in (*words, "--json")]) in ((0, 1) if words[0] == "verify" else (code,))
    return json.loads(capsys.readouterr().out)


def test_a_search_prints_the_front_and_where_the_run_is(capsys: Capture, quick_profile: Path, tmp_path: Path) -> None:
    words = [
        "search",
        "digits",
        "--target",
        str(quick_profile),
        "--trials",
        "2",
        "--out",
        str(tmp_path / "r"),
        "--json",
    ]
    assert main(words) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["schema"], found["task"], found["target"]) == (1, "digits", "quick")
    assert f"run: {tmp_path / 'r'}" in shown.err


def test_the_journey(capsys: Capture, digits_run: Run, tmp_path: Path) -> None:
    front = result(capsys, "front", digits_run.path)
    assert front["points"]
    picked = result(capsys, "pick", digits_run.path, "--max-accuracy-drop", "5", "--fastest", "--out", tmp_path / "p")
    assert picked["package"] == str(tmp_path / "p")
    assert picked["point"]["accuracy"] >= front["baselines"]["fp32"]["accuracy"] - 0.05
    verified = result(capsys, "verify", tmp_path / "p")
    assert made.but_latency(verified["faults"]) == []
    assert verified["accuracy_now"] == picked["point"]["accuracy"]
    again = result(capsys, "reprofile", digits_run.path)
    assert again["pick"]["trial"] == picked["point"]["trial"]
    assert result(capsys, "report", digits_run.path)["report"] == str(digits_run.path / "report.html")


def test_the_front_as_a_table_ends_with_the_verdict(capsys: Capture, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run")
    assert main(["front", str(run.path), "--plot", str(tmp_path / "f.html")]) == 0
    shown = capsys.readouterr()
    assert "Trial 2 is the fastest within 1 point of fp32's accuracy" in shown.out
    assert shown.err == f"wrote {tmp_path / 'f.html'}\n"


def test_limits_that_nothing_meets_are_exit_code_1(capsys: Capture, tmp_path: Path) -> None:
    run = made.run(tmp_path / "run")
    assert main(["pick", str(run.path), "--max-latency-ms", "0.1", "--out", str(tmp_path / "p")]) == 1
    said = capsys.readouterr().err
    assert "`max_latency_ms` = 0.1 binds. The nearest is trial 3" in said
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to pick"),
        (["--trial", "2", "--max-size-mb", "1"], "--trial names the point itself"),
        (["--trial", "99"], "trial 99 is neither on the front nor a baseline; those are: 0, 1, 2, 3"),
        (["--max-latency-ms", "nan"], "`max_latency_ms` must be a finite number"),
    ],
)
def test_a_pick_that_says_too_little_or_too_much_is_refused(
    capsys: Capture, tmp_path: Path, words: list[str], said: str
) -> None:
    run = made.run(tmp_path / "run")
    assert main(["pick", str(run.path), *words, "--out", str(tmp_path / "p")]) == 2
    assert said in capsys.readouterr().err


def test_a_trial_is_picked_by_number(capsys: Capture, digits_run: Run, tmp_path: Path) -> None:
    assert main(["pick", str(digits_run.path), "--trial", "0", "--out", str(tmp_path / "p")]) == 0
    assert capsys.readouterr().out.startswith("picked trial 0: fp32\n")


def test_verify_of_a_changed_package_is_exit_code_2(capsys: Capture, digits_run: Run, tmp_path: Path) -> None:
    assert main(["pick", str(digits_run.path), "--knee", "--out", str(tmp_path / "p")]) == 0
    (tmp_path / "p" / "README.md").write_text("changed")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "p")]) == 2
    assert "README.md was changed" in capsys.readouterr().err


def test_doctor_says_what_is_usable_and_what_disturbs(capsys: Capture) -> None:
    found = result(capsys, "doctor")
    assert found["runtimes"]["onnxruntime"]["usable"] is True
    assert found["machine"]["cores"]
    assert isinstance(found["disturbances"], list)
    assert found["extras"]["search"] == []
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for said in ("Runtimes", "onnxruntime", "Other devices", "load:", "frequency:", "energy:", "What disturbs"):
        assert said in shown


def test_doctor_names_every_runtime_and_way_to_a_device(capsys: Capture) -> None:
    found = result(capsys, "doctor")
    assert set(found["runtimes"]) == set(RUNTIMES)
    for one in (*found["runtimes"].values(), *found["hosts"].values()):
        assert one["usable"] == bool(one["version"]) == (not one["reason"])
        assert one["install"]
    assert "fp32" in found["runtimes"]["openvino"]["device"]["float_precisions"].split()


def test_a_program_that_is_missing_or_fails_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = {"gone": (("no-such-program-here",), "gone"), "broken": (("false",), "broken")}
    monkeypatch.setattr(doctor, "TOOLS", tools)
    found = doctor.examine()["hosts"]
    assert found["gone"]["reason"] == "no-such-program-here is not installed"
    assert found["broken"]["reason"].startswith("false fails: ")
    assert found["broken"]["install"] == "apt-get install broken"


def test_doctor_without_a_usable_runtime_is_exit_code_3(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from autocompress.device import runtime

    monkeypatch.setattr(runtime, "RUNTIMES", {"absent": "tests.cli.test_commands:Absent"})
    assert main(["doctor"]) == 3
    assert "absent: not usable: it is not installed\n    pip install absent" in capsys.readouterr().out
    assert examine()["machine"]["runtime"] == "no runtime "


class Absent:
    """A runtime that is not installed."""

    def available(self) -> object:
        from autocompress.device.runtime import Availability

        return Availability(usable=False, version=None, reason="it is not installed", install="pip install absent")


def test_profiles_are_listed_and_shown(capsys: Capture) -> None:
    assert "cpu-onnxruntime" in result(capsys, "profile", "list")["profiles"]
    assert result(capsys, "profile", "show", "cpu-onnxruntime")["runtime"] == "onnxruntime"
    assert main(["profile", "show", "cpu-onnxruntime"]) == 0
    assert "# Kernels step at multiples of 16 channels" in capsys.readouterr().out


def test_a_detected_profile_loads_and_says_what_the_machine_has(capsys: Capture, tmp_path: Path) -> None:
    assert main(["profile", "detect", "--base", "cpu-onnxruntime"]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_profile(str(path)).precisions == load_profile("cpu-onnxruntime").precisions
    assert "# cpu_model: " in path.read_text()


def test_every_profile_that_is_detected_is_in_the_json(capsys: Capture) -> None:
    found = result(capsys, "profile", "detect")
    assert {p["base"] for p in found["profiles"].values()} >= {"cpu-onnxruntime"}
    assert found["fingerprint"]["facts"]["cpu_model"]
    assert found["profile"] in [p["profile"] for p in found["profiles"].values()]


def test_a_base_that_does_not_fit_this_machine_is_refused(capsys: Capture) -> None:
    assert main(["profile", "detect", "--base", "cpu-onnxruntim"]) == 2
    assert "profile that fits this machine" in capsys.readouterr().err
