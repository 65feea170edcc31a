"""`autocompress sensitivity`: the record as a table, as JSON, and as a picture."""

import json
from pathlib import Path

import pytest

from autocompress.cli import main
from autocompress.core.record import load
from autocompress.core.sensitivity import SCHEMA, Sensitivity
from tests.core.test_sensitivity import FOUND

Capture = pytest.CaptureFixture[str]
MLP = Path(__file__).parents[1] / "data" / "tasks" / "mlp.py"


def test_json_on_stdout_is_the_record(capsys: Capture, quick_profile: Path) -> None:
    assert main(["sensitivity", str(MLP), "--target", str(quick_profile), "--space", "quantize-only", "--json"]) == 0
    shown = capsys.readouterr()
    found = load(Sensitivity, json.loads(shown.out), SCHEMA)
    assert (found.task, found.target) == ("mlp", "quick")
    assert found.probes > 0
    assert any(name.startswith("precision:") for name in found.effects)
    assert "probing sensitivities" in shown.err


def test_a_timeout_leaves_out_what_was_not_reached(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, quick_profile: Path
) -> None:
    given = {}
    monkeypatch.setattr("autocompress.sensitivity.sensitivity", lambda *_, **more: given.update(more) or FOUND)
    words = ["sensitivity", "digits", "--target", str(quick_profile), "--timeout", "1m30s", "--on", "local"]
    assert main(words) == 0
    assert (given["seconds"], given["on"], given["space"]) == (90.0, "local", "default")
    assert "layer:b" in capsys.readouterr().out


def test_a_picture_is_written_beside_the_table(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("autocompress.sensitivity.sensitivity", lambda *_, **__: FOUND)
    path = tmp_path / "s.html"
    assert main(["sensitivity", "digits", "--target", "cpu-onnxruntime", "--plot", str(path)]) == 0
    assert path.stat().st_size > 1000
    assert capsys.readouterr().err.endswith(f"wrote {path}\n")


def test_a_path_that_cannot_be_drawn_to_is_refused_before_the_work(capsys: Capture) -> None:
    assert main(["sensitivity", "digits", "--target", "cpu-onnxruntime", "--plot", "s.pdf"]) == 2
    assert "written as .html or .png" in capsys.readouterr().err
