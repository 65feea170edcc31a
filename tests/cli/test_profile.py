import json
from pathlib import Path

import pytest

from autocompress.cli import main
from autocompress.cli.profile import told
from autocompress.core.probe import Verdict
from autocompress.probe import read
from tests.core.test_probe import STAIR, probe

Capture = pytest.CaptureFixture[str]


def test_what_a_probe_found_is_told_in_a_line_each() -> None:
    pays = Verdict(choice="w8a8", layers=("a", "b"), usable=True, faster=True, smaller=True, why="")
    small = Verdict(choice="w4a8", layers=("a",), usable=True, faster=False, smaller=True, why="as slow")
    wrong = Verdict(choice="w2a8", usable=False, faster=True, smaller=True, why="wrong results")
    assert told(probe(pays, small, wrong, stairs=(STAIR,))) == [
        "w8a8 of a, b: pays",
        "w4a8 of a: pays in bytes only: as slow",
        "w2a8: no: wrong results",
        "widths of a.conv1, other: [64] 56 [48] 40 [32] [16]",
        "not measured, no time or nothing to time alone: bf16",
        "widths in brackets are edges: the widest of those that run equally fast",
    ]


def test_probing_writes_the_file_that_searches_look_for(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.probe.probe", lambda *_, **__: probe())
    assert main(["profile", "probe", "--target", "cpu-onnxruntime", "--task", "digits", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["task"] == "t"
    place = shown.err.split("kept in ")[1].split(": searches of t on p")[0]
    assert read(Path(place)) == probe()


def test_an_unknown_target_is_refused_before_anything_is_loaded(capsys: Capture) -> None:
    assert main(["profile", "probe", "--target", "cpux", "--task", "digits"]) == 2
    assert "Unknown target 'cpux'" in capsys.readouterr().err
