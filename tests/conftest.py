"""One real search on `digits`, shared by every test that needs a run with real files. Copy it before changing it."""

import os
import shutil
from pathlib import Path

import pytest

from autocompress.config import profile_file
from autocompress.run import Run, open_run

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the user's cache holds, probes of searches above all, is nothing to a test."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="module")
def _seeded_module() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded(_seeded_module: None) -> None:
    """Networks made without a seed of their own are the same in every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quick_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped profile, measuring for a shorter time."""
    path = tmp_path_factory.mktemp("profile") / "quick.yaml"
    text = profile_file("cpu-onnxruntime").read_text(encoding="utf-8")
    for old, new in (
        ("name: cpu-onnxruntime", "name: quick"),
        ("min_blocks: 8", "min_blocks: 6"),
        ("max_duration_s: 0.8", "max_duration_s: 0.3"),
        ("processes: 3", "processes: 2"),
    ):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def _digits(tmp_path_factory: pytest.TempPathFactory, quick_profile: Path) -> Path:
    from autocompress.driver import search

    out = tmp_path_factory.mktemp("digits") / "run"
    return search("digits", quick_profile, trials=6, out=out).path


@pytest.fixture
def digits_run(_digits: Path, tmp_path: Path) -> Run:
    """A finished search of six trials, in a copy of its own."""
    return open_run(shutil.copytree(_digits, tmp_path / "run"))
