"""The project's own files agree with each other, and the wheel has what it needs."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import autocompress

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def tracked() -> list[Path]:
    """Files of the project as it is handed on."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:  # an unpacked source archive
        return [p for name in PROJECT_FOLDERS for p in (ROOT / name).rglob("*") if p.is_file()]
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


PROJECT_FOLDERS = ("autocompress", "benchmarks", "docs", "hardware_profiles", "recipes", "search_spaces", "tests")


def changelog_versions() -> list[tuple[str, str]]:
    """Version and date of each released section, newest first."""
    return re.findall(r"^## \[(\d[^\]]*)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def test_versions_agree() -> None:
    """pyproject, the package and the changelog's newest section name one version."""
    assert autocompress.__version__ == PROJECT["version"] == changelog_versions()[0][0]


def test_changelog_dates_are_iso_and_fall() -> None:
    """Sections have UTC dates, newest first."""
    dates = [date for _, date in changelog_versions()]
    assert all(re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", date) for date in dates)
    assert dates == sorted(dates, reverse=True)


def test_every_pin_satisfies_what_the_project_asks_for() -> None:
    """Each requirement that has a pin is met by it, and what CI installs directly is pinned: TensorRT it cannot."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(r) for r in (*PROJECT["dependencies"], *(r for group in extras.values() for r in group))]
    wanted = [r for r in wanted if r.name != "autocompress" and not r.name.startswith("types-")]
    wanted = [r for r in wanted if r.name != "tensorrt"]
    assert {r.name for r in wanted} <= set(pins)
    assert [r for r in wanted if Version(pins[r.name]) not in r.specifier] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the wheel."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return set(archive.namelist())


def test_wheel_has_profiles_spaces_weights_and_types(wheel: set[str]) -> None:
    """What the installed package reads beside its modules is in the wheel."""
    wanted = {f"autocompress/{p.relative_to(ROOT)}" for p in (ROOT / "hardware_profiles").glob("*.yaml")}
    wanted |= {f"autocompress/{p.relative_to(ROOT)}" for p in (ROOT / "search_spaces").glob("*.yaml")}
    wanted |= {f"autocompress/{p.relative_to(ROOT)}" for p in (ROOT / "recipes").glob("*.yaml")}
    assert len(wanted) > 4
    assert {*wanted, "autocompress/py.typed", "autocompress/tasks/digits.safetensors"} <= wheel


def test_wheel_has_every_module_and_nothing_else(wheel: set[str]) -> None:
    """All of the package's modules, no tests, no caches."""
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "autocompress").rglob("*.py")}
    assert modules <= wheel
    assert {name.split("/")[0] for name in wheel} == {"autocompress", f"autocompress-{PROJECT['version']}.dist-info"}
    assert not [name for name in wheel if "__pycache__" in name]


def test_digits_weights_are_small() -> None:
    """The weights in the package stay well under a megabyte."""
    assert (ROOT / "autocompress" / "tasks" / "digits.safetensors").stat().st_size < 500_000


def test_no_file_tells_where_it_was_made() -> None:
    """No home or work directory, and no host's name, stands in a text of the project."""
    import socket

    host = socket.gethostname()
    own = re.compile(r"(?<![\w.])/(?:work|home|root)/\w" + (rf"|\b{re.escape(host)}\b" if len(host) > 7 else ""))
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in own.finditer(text)]
    assert found == []


def test_ci_runs_the_readmes_test_command() -> None:
    """.ci/run is executable and ends in the command that the README names."""
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make test")
    assert "$ make test" in (ROOT / "README.md").read_text(encoding="utf-8")
