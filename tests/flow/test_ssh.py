"""A search whose devices are reached by ssh, and what is done with its front."""

import json
from pathlib import Path

import pytest

from autocompress.cli import main
from autocompress.run import open_run
from tests import made
from tests.device.sshd import serving


def test_a_search_on_two_devices(tmp_path: Path, quick_profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two names of one machine: their measurements take turns, and the record holds both workers' trials."""
    run, package = tmp_path / "run", tmp_path / "package"
    with serving(tmp_path / "sshd", also_localhost=True) as server:
        one, other = server.name, server.name.replace("127.0.0.1", "localhost")
        search = ["search", "digits", "--target", str(quick_profile), "--out", str(run), "--json"]
        # On a busy machine the first may be through before the second has started: then there is more to do.
        for trials in ("24", "60", "180"):
            assert main([*search, "--trials", trials, "--on", f"{one},{other}"]) == 0
            front = json.loads(capsys.readouterr().out)
            log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            if len(processes := {e["process"] for e in log if e["event"] == "trial"}) > 1:
                break
            search.append("--resume")
        assert {p["trial"] for p in front["baselines"].values()} == {0, 1}
        found = open_run(run)
        assert found.config.profile.host == f"{one},{other}"
        assert len(processes) > 1
        assert not [t for t in found.trials() if t.score is None]
        assert main(["pick", str(run), "--fastest", "--out", str(package)]) == 0
        capsys.readouterr()
        assert main(["verify", str(package), "--json"]) in (0, 1)
        assert made.but_latency(json.loads(capsys.readouterr().out)["faults"]) == []
        assert main(["reprofile", str(run), "--on", "local"]) == 0
        assert main(["reprofile", str(run), "--on", "ssh:nobody@127.0.0.1:1"]) == 3
    assert "ssh:nobody@127.0.0.1:1: " in capsys.readouterr().err
