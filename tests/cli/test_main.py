"""Every fault is one sentence on stderr with its exit code; nothing is slow before it has to be."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autocompress.cli import main
from autocompress.config import profile_names
from autocompress.core.errors import AutocompressError
from autocompress.run import Run
from tests import made

Capture = pytest.CaptureFixture[str]
TASK = """
import torch
from autocompress import Task
data = [(torch.randn(4), {target}) for i in range(64)]
task = Task(name="t", model=lambda: {model}, train=data, validation={validation}{more})
"""


def fails(capsys: Capture, code: int, *words: str) -> str:
    """Run a command that must fail with `code` and one line; returns the line."""
    assert main(words) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in shown.err
    return lines[0].removeprefix("error: ")


def test_help_takes_less_than_a_third_of_a_second() -> None:
    taken = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "autocompress", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: other programs on the machine do not count.
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(taken) <= 0.3


def test_the_parser_imports_nothing_heavy() -> None:
    code = (
        "import sys; from autocompress.cli import build_parser; build_parser(); "
        "print([m for m in ('torch', 'numpy', 'pydantic', 'yaml', 'rich', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("command", ["doctor", "profile", "search", "front", "pick", "verify", "reprofile", "report"])
def test_every_command_has_help(command: str, capsys: Capture) -> None:
    assert main([command, "--help"]) == 0
    assert "usage: autocompress" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["serch"],
        ["search", "digits"],
        ["search", "digits", "--target", "cpu-onnxruntime", "--timeout", "soon"],
        ["search", "digits", "--target", "cpu-onnxruntime", "--trials", "many"],
        ["search", "digits", "--target", "cpu-onnxruntime", "--fidelity", "full"],
        ["pick", "run"],
        ["pick", "run", "--out", "p", "--knee", "--fastest"],
        ["front"],
    ],
)
def test_bad_usage_is_exit_code_2(words: list[str], capsys: Capture) -> None:
    assert main(words) == 2
    assert "error: " in capsys.readouterr().err


def test_an_unknown_target_names_the_known_ones(capsys: Capture) -> None:
    said = fails(capsys, 2, "search", "digits", "--target", "cpux")
    assert said == f"Unknown target 'cpux'. I know: {', '.join(profile_names())}."


def test_a_typo_in_a_profile_names_file_key_and_nearest(capsys: Capture, quick_profile: Path, tmp_path: Path) -> None:
    typo = tmp_path / "typo.yaml"
    typo.write_text(quick_profile.read_text().replace("runtime: onnx", "runtme: onnx"))
    said = fails(capsys, 2, "search", "digits", "--target", str(typo))
    assert said.startswith(f"{typo}: Unknown key 'runtme'. Did you mean 'runtime'?")


def test_a_runtime_that_is_not_known_is_exit_code_3(capsys: Capture, quick_profile: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(quick_profile.read_text().replace("runtime: onnxruntime", "runtime: warp"))
    assert "Unknown runtime 'warp'" in fails(capsys, 3, "search", "digits", "--target", str(other))


def test_an_unknown_space_names_the_known_ones(capsys: Capture) -> None:
    said = fails(capsys, 2, "search", "digits", "--target", "cpu-onnxruntime", "--space", "defalt")
    assert "Did you mean 'default'?" in said


def test_an_unknown_task_is_one_sentence(capsys: Capture) -> None:
    assert "digits" in fails(capsys, 2, "search", "digit", "--target", "cpu-onnxruntime")


def test_a_task_file_that_is_missing_is_named(capsys: Capture, tmp_path: Path) -> None:
    path = str(tmp_path / "task.py")
    assert path in fails(capsys, 2, "search", path, "--target", "cpu-onnxruntime")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"model": "torch.nn.Linear(5, 3)"}, "the model fails on the first item"),
        ({"model": "torch.nn.Linear(4, 3)", "validation": "[]"}, "`validation` has no items"),
        (
            {"model": "torch.nn.Linear(4, 3)", "target": "0.5"},
            "top-1 accuracy, the default metric, needs integer class",
        ),
        ({"model": "torch.nn.Linear(4, 3)", "more": ", metric=lambda o, t: float('nan')"}, "metric"),
        ({"model": "1 / 0"}, "ZeroDivisionError"),
    ],
)
def test_a_bad_task_is_one_sentence(capsys: Capture, tmp_path: Path, parts: dict[str, str], said: str) -> None:
    path = tmp_path / "task.py"
    path.write_text(TASK.format(**{"target": "i % 3", "validation": "data", "more": "", **parts}))
    assert said in fails(capsys, 2, "search", str(path), "--target", "cpu-onnxruntime", "--out", str(tmp_path / "r"))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("words", [["front"], ["report"], ["reprofile"], ["pick", "--knee", "--out", "p"]])
def test_a_directory_that_is_no_run_says_so(capsys: Capture, tmp_path: Path, words: list[str]) -> None:
    command, *rest = words
    assert fails(capsys, 2, command, str(tmp_path), *rest) == f"{tmp_path} is no run: it has no run.json"


def test_a_directory_that_is_no_package_says_so(capsys: Capture, tmp_path: Path) -> None:
    assert fails(capsys, 2, "verify", str(tmp_path)) == f"{tmp_path} is no package: it has no manifest.json"


def test_a_run_in_use_names_the_process(capsys: Capture, digits_run: Run, quick_profile: Path) -> None:
    words = ["search", "digits", "--target", str(quick_profile), "--out", str(digits_run.path), "--resume"]
    with digits_run.lock():
        said = fails(capsys, 2, *words)
    assert said.startswith(f"{digits_run.path} is in use by process {os.getpid()}")


def test_a_run_that_is_there_is_not_overwritten(capsys: Capture, digits_run: Run, quick_profile: Path) -> None:
    words = ["search", "digits", "--target", str(quick_profile), "--out", str(digits_run.path)]
    assert "is a run already: continue it with --resume" in fails(capsys, 2, *words)


@pytest.mark.parametrize("host", ["pi@board", "ssh:board", "adb:", "ssh:-oProxyCommand=x@board"])
def test_what_is_no_host_is_bad_usage(capsys: Capture, host: str) -> None:
    assert main(["verify", "p", "--on", host]) == 2
    assert f"a host is 'local', 'ssh:user@host[:port]' or 'adb:SERIAL', got {host!r}" in capsys.readouterr().err


def test_research_needs_a_run_and_a_number_of_trials(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert "is a package: --research needs the run it was picked from" in fails(
        capsys, 2, "reprofile", str(tmp_path), "--research", "5"
    )
    assert "--research must be at least 0 trials, got -1" in fails(capsys, 2, "reprofile", "run", "--research", "-1")


def test_an_unexpected_error_is_one_line_that_says_how_to_see_more(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = made.run(tmp_path / "run")
    (run.path / "final.json").write_text("{")
    monkeypatch.delenv("AUTOCOMPRESS_DEBUG", raising=False)
    assert "AUTOCOMPRESS_DEBUG=1" in fails(capsys, 2, "front", str(run.path))


def test_with_debug_the_traceback_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOCOMPRESS_DEBUG", "1")
    with pytest.raises(AutocompressError):
        main(["front", str(tmp_path)])


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    run = made.run(tmp_path / "run")
    command = f"{sys.executable} -m autocompress front {run.path} --json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupted_search_ends_with_130_and_keeps_what_is_finished(quick_profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["search", "digits", "--target", str(quick_profile), "--trials", "500", "--out", str(out)]
    command = [sys.executable, "-m", "autocompress", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("uniform-int8"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        last = process.stderr.read().strip().splitlines()[-1]
    assert process.returncode == 130
    assert last == "error: stopped by SIGINT; everything finished is kept"
    done = subprocess.run(
        [sys.executable, "-m", "autocompress", "front", str(out), "--json"], capture_output=True, check=True
    )
    assert set(json.loads(done.stdout)["baselines"]) == {"fp32", "uniform-int8"}
