"""Every code block of the documentation runs: Python in one namespace a page, commands through the real entry point.

A block's info string says what it is: `python` is run; `python FILE` is written to FILE; `console` holds commands
after `$`, `exit=N` the code they end with; `yaml` is a search space; `text` is a picture or an excerpt.
"""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from autocompress.cli import build_parser, main
from autocompress.config import load_space
from autocompress.core.measurement import MeasurePlan
from autocompress.core.profile import Profile
from autocompress.core.space import LayerRule, SpaceRules, WidthRule
from autocompress.run import Run

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "benchmarks/README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
KINDS = {"python", "console", "yaml", "text"}
TRIALS = "4"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language, what else the info string says, its lines, and where it begins."""

    language: str
    info: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M):
        language, _, info = match[1].partition(" ")
        yield Block(language=language, info=info.strip(), text=match[2], line=text[: match.start()].count("\n") + 2)


class Page:
    """One page's blocks, run in order in one directory."""

    def __init__(self, name: str, digits: Path, profile: Path) -> None:
        self._name, self._digits, self._profile = name, digits, profile
        self._namespace: dict[str, Any] = {"__name__": "__docs__"}

    def run(self, block: Block) -> None:
        if block.language == "python" and block.info:
            Path(block.info).write_text(block.text, encoding="utf-8")
            self._train(Path(block.info))
        elif block.language == "python":
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(ROOT / self._name), "exec"), self._namespace)  # noqa: S102 - the pages are ours
        elif block.language == "console":
            wanted = int(block.info.removeprefix("exit=") or 0)
            for line in block.text.splitlines():
                assert line.startswith("$ "), f"{self._name}, line {block.line}: a command begins with `$ `: {line!r}"
                self._command(shlex.split(line[2:], comments=True), wanted)
        elif block.language == "yaml":
            Path("space.yaml").write_text(block.text, encoding="utf-8")
            assert load_space("space.yaml").name == yaml.safe_load(block.text)["name"]

    def _train(self, file: Path) -> None:
        """The weights a page's task loads; it says `model.pt`, which a reader has."""
        import torch

        namespace: dict[str, Any] = {"__name__": "__docs__", "__file__": str(file)}
        exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), namespace)  # noqa: S102 - the pages are ours
        torch.manual_seed(0)
        torch.save(namespace["Net"]().state_dict(), file.with_name("model.pt"))

    def _command(self, words: list[str], wanted: int) -> None:
        said = f"{self._name}: {' '.join(words)}"
        if words[0] == "autocompress":
            assert self._autocompress(words[1:]) in self._codes(words, wanted), said
        elif words[0] == "python":
            subprocess.run([sys.executable, *words[1:]], check=True, stdout=subprocess.DEVNULL)
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), said
        else:
            assert words[:2] == ["pip", "install"], said
            assert extras_of(words[2]) <= known_extras(), said

    def _codes(self, words: list[str], wanted: int) -> set[int]:
        # A package that was measured for a fraction of a second may fall outside its interval on a busy machine.
        return {0, 1} if words[1] == "verify" else {wanted}

    def _autocompress(self, words: list[str]) -> int:
        if words[0] != "search":
            return main(words)
        args = build_parser().parse_args(words)
        if args.task == "digits" and not args.resume:
            shutil.copytree(self._digits, args.out)
            return 0
        return main([*words, "--target", str(self._profile), "--trials", TRIALS])


def extras_of(requirement: str) -> set[str]:
    found = re.fullmatch(r"autocompress\[(.*)\]", requirement)
    return set(found[1].split(",")) if found else set()


def known_extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(
    page: str, digits_run: Run, quick_profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python, commands and YAML of a page do what the page says, in order."""
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    runner = Page(page, digits_run.path, quick_profile)
    for block in blocks(page):
        assert block.language in KINDS, f"{page}, line {block.line}: a block is one of {sorted(KINDS)}"
        runner.run(block)


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    """Every relative link names a file that is there, and its heading where it has one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        path = (ROOT / page).parent / file
        assert path.is_file(), f"{page}: {target}"
        if heading:
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in heads}, target


def keys(page: str, heading: str) -> dict[str, str]:
    """First column of the table under a heading, without backticks, to the column called `default`."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition(f"## {heading}\n")[2], flags=re.M)[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    column = rows[0].index("default")
    return {row[0].strip("`"): row[column].strip("`") for row in rows[2:]}


def defaults(cls: Any) -> dict[str, str]:
    """A dataclass's keys and defaults as they are written in YAML; a default that is a record of its own is `below`."""
    found = {}
    for field in dataclasses.fields(cls):
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if value is dataclasses.MISSING:
            text = "required"
        elif value is None:
            text = "none"
        elif dataclasses.is_dataclass(value):
            text = "below"
        else:
            plain = list(value) if isinstance(value, tuple) else value
            text = yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()
        found[field.name] = text.replace("'", '"')
    return found


@pytest.mark.parametrize(
    ("page", "heading", "cls"),
    [
        ("profiles.md", "Keys of the file", Profile),
        ("profiles.md", "Keys of `measure`", MeasurePlan),
        ("search-spaces.md", "Keys of the file", SpaceRules),
        ("search-spaces.md", "Keys of a rule in `layers`", LayerRule),
        ("search-spaces.md", "Keys of a rule in `widths`", WidthRule),
    ],
)
def test_every_key_is_documented_with_its_default(page: str, heading: str, cls: Any) -> None:
    """The tables of keys say what the dataclasses say, no key more and none less."""
    assert keys(page, heading) == defaults(cls)


def test_every_field_of_a_task_is_documented() -> None:
    """The table of fields is Task's."""
    from autocompress import Task

    assert {k: v.replace("()", "[]") for k, v in keys("tasks.md", "Fields").items()} == defaults(Task)


def test_options_of_the_runtime_are_documented() -> None:
    """Every option but `threads`, which is said in `measure`."""
    from autocompress.device import litert, onnxruntime, openvino, tensorrt_engine

    known = {
        "onnxruntime": onnxruntime._OPTIONS,
        "openvino": openvino._OPTIONS,
        "litert": litert._OPTIONS,
        "tensorrt": ("threads", *tensorrt_engine._TYPES),
    }
    for runtime, options in known.items():
        assert {*keys("profiles.md", f"Options of `{runtime}`"), "threads"} == set(options)


def test_the_architecture_page_names_every_module() -> None:
    """The tree in the picture is the tree on the disk."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"^autocompress/\n((?:  .*\n)+)", text, re.M)
    assert tree is not None
    named = dict(re.findall(r"^  (\S+) +(.*)$", tree[1], re.M))
    package = ROOT / "autocompress"
    root = {p.name for p in package.glob("*.py") if not p.name.startswith("predict")} - {"__main__.py"}
    folders = {f"{p.name}/" for p in package.iterdir() if (p / "__init__.py").is_file()}
    assert set(named) == root | folders
    for folder in ("core", "device", "compress", "export", "optimize"):
        modules = {p.stem for p in (package / folder).glob("*.py")} - {"__init__"}
        assert {re.sub(r" \(.*?\)", "", n) for n in re.split(r", (?![^(]*\))", named[f"{folder}/"])} == modules


def test_the_readme_lists_every_extra() -> None:
    """The README's table and pyproject have the same extras."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == known_extras()
