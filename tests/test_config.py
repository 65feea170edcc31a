"""YAML files become core values, or one sentence that names file, key and value."""

from pathlib import Path

import pytest

from autocompress.config import (
    load_profile,
    load_recipe,
    load_space,
    profile_file,
    profile_names,
    recipe_names,
    space_names,
)
from autocompress.core.errors import ConfigError
from autocompress.core.recipe import DEFAULT_STAGES
from autocompress.core.space import Group, Layer, Structure

PROFILE = profile_file("cpu-onnxruntime").read_text(encoding="utf-8")
SPACE = """
name: mine
description: a space
layers:
  - name: "block*"
    kind: [conv2d]
    precisions: [fp32, w8a8]
    sparsities: [0.0, 0.5]
widths:
  - ratios: [1.0, 0.5]
"""


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_loads_under_its_own_name(name: str) -> None:
    assert load_profile(name).name == name


@pytest.mark.parametrize("name", space_names())
def test_every_shipped_space_loads_and_resolves_on_every_shipped_profile(name: str) -> None:
    structure = Structure(
        layers=(
            Layer(name="embed", kind="embedding", shape=(100, 64), block="embed"),
            Layer(name="conv", kind="conv2d", shape=(64, 3, 3, 3), block="stem"),
            Layer(name="conv1", kind="conv1d", shape=(64, 64, 3), block="stem"),
            Layer(name="fc", kind="linear", shape=(64, 64), block="head"),
        ),
        groups=(Group(name="conv", width=64, step=1, layers=("conv",)),),
    )
    rules = load_space(name)
    assert rules.name == name
    for profile in map(load_profile, profile_names()):
        space = rules.resolve(structure, profile)
        why = f"profile {profile.name} does not list it as paying there"
        assert {choice for choice, said in space.dropped.items() if said != why} <= {"2:4", "2:4 for conv"}
        if profile.allows("conv2d", "w8a8"):
            assert space.uniform("w8a8")["precision:stem"] == "w8a8"
        assert all(width % profile.width_multiple == 0 for width in space.widths.get("conv", ()))


def test_the_four_spaces_differ_in_what_they_vary() -> None:
    assert space_names() == ("default", "everything", "prune-and-quantize", "quantize-only", "transformer")
    assert not load_space("quantize-only").widths
    assert [name for name in space_names() if any(r.sparsities for r in load_space(name).layers)] == [
        "everything",
        "prune-and-quantize",
    ]


def test_an_unknown_target_names_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError) as fault:
        load_profile("cpu-onnxruntim")
    assert str(fault.value) == (
        f"Unknown target 'cpu-onnxruntim'. Did you mean 'cpu-onnxruntime'? I know: {', '.join(profile_names())}."
    )
    with pytest.raises(ConfigError, match=r"^Unknown target 'cpux'\. .*I know: .*cpu-onnxruntime, .*\.$"):
        load_profile("cpux")


def test_an_unknown_space_names_all() -> None:
    with pytest.raises(ConfigError, match="I know: default, everything, prune-and-quantize"):
        load_space("x")


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^target file 'nowhere/x\.yaml' does not exist; shipped names: .*cpu-onnx"):
        load_profile("nowhere/x.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "width_multiple: 8",
            "width_multipl: 8",
            "Unknown key 'width_multipl'. Did you mean 'width_multiple'? I know: ",
        ),
        ("width_multiple: 8", "width_multiple: '8'", "`width_multiple`: should be a valid integer, got '8'"),
        ("width_multiple: 8", "width_multiple: true", "`width_multiple`: should be a valid integer, got True"),
        ("width_multiple: 8", "width_multiple: 0", "`width_multiple` must be at least 1, got 0"),
        ("  threads: 1", "  thread: 1", "`measure`: Unknown key 'thread'. Did you mean 'threads'?"),
        ("  threads: 1", "  threads: 0", "`measure`: `threads` must be at least 1, got 0"),
        ("  target_ci: 0.025", "  target_ci: .nan", "`measure`: `target_ci` must be positive, got nan"),
        (
            "conv2d: [w8a8, w4a8",
            "conv2: [w8a8, w4a8",
            "`precisions`: Unknown layer kind 'conv2'. Did you mean 'conv2d'?",
        ),
        (
            "conv2d: [w8a8, w4a8",
            "conv2d: [w8a8, w4a9",
            "`activation_bits` must be one of (2, 3, 4, 5, 6, 7, 8, 32), got 9",
        ),
        ("conv2d: [w8a8, w4a8", "conv2d: [int8, w4a8", "a precision is 'fp32' or like 'w8a8'"),
        ("format: onnx", "format: onx", "`format`: should be 'onnx', 'openvino', 'tflite' or 'tensorrt', got 'onx'"),
        ("format: onnx\n", "", "the key 'format' is missing"),
        ("options: {}", "options: [1]", "`options`: should be"),
        ("format: onnx", "format: onnx\nformat: onnx", "not valid YAML in line"),
        ("options: {}", "options: {", "not valid YAML in line"),
        ("options: {}", "options: !!python/object:os.system {}", "not valid YAML in line"),
    ],
)
def test_a_fault_in_a_profile_is_one_sentence_with_file_key_and_value(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in PROFILE
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as fault:
        load_profile(str(path))
    assert str(fault.value).startswith(f"{path}: ")
    assert said in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("precisions:", "precision:", "`layers[0]`: Unknown key 'precision'. Did you mean 'precisions'?"),
        ("ratios:", "ratio:", "`widths[0]`: Unknown key 'ratio'. Did you mean 'ratios'?"),
        ("widths:", "width:", "Unknown key 'width'. Did you mean 'widths'?"),
        ("[conv2d]", "[conv3d]", "`layers[0].kind[0]`: should be 'conv1d', 'conv2d', 'linear' or 'embedding'"),
        ("[1.0, 0.5]", "[1.5]", "`widths[0]`: `ratios` must be in (0, 1], got 1.5"),
        (
            "[0.0, 0.5]",
            "[1.0]",
            "`layers[0]`: `sparsities` must be 2:4, 1:4, 4:8, like 'block 0.5', or in [0, 1), got 1.0",
        ),
        ("[fp32, w8a8]", "w8a8", "`layers[0].precisions`: should be a valid array, got 'w8a8'"),
        ("name: mine", "name: mine\nprecision_by: blocks", "`precision_by`: should be 'block', 'layer' or 'model'"),
        ("name: mine", "name: mine\nstudents: [0]", "`students` must be positive widths, got 0"),
        (SPACE, "- a list", "a mapping of keys to values is expected, got ['a list']"),
        (SPACE, "", "a mapping of keys to values is expected, got None"),
    ],
)
def test_a_fault_in_a_space_is_one_sentence_with_file_key_and_value(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SPACE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as fault:
        load_space(str(path))
    assert str(fault.value).startswith(f"{path}: ")
    assert said in str(fault.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load_space(str(path))


def test_what_is_not_said_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SPACE, encoding="utf-8")
    rules = load_space(str(path))
    assert (rules.precision_by, rules.calibrators, rules.students) == ("block", ("minmax",), ())
    assert rules.layers[0].sparsities == (0.0, 0.5)


def test_every_shipped_recipe_can_be_read() -> None:
    assert "default" in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).name == name
    assert load_recipe("default").stages == DEFAULT_STAGES


def test_a_space_lists_recipes_by_name_by_file_and_in_its_own_words(tmp_path: Path) -> None:
    own = "name: mine\nstages: [{name: learn, train: {optimizer: sgd}}]\n"
    (tmp_path / "mine.yaml").write_text(own)
    space = tmp_path / "space.yaml"
    space.write_text(
        f"name: s\ndescription: d\nrecipes: [rewind, mine.yaml, {{{own.replace(chr(10), ', ', 1).strip()}}}]"
    )
    with pytest.raises(ConfigError, match="a name of its own each"):
        load_space(str(space))
    space.write_text("name: s\ndescription: d\nrecipes: [rewind, mine.yaml]")
    assert [plan.name for plan in load_space(str(space)).recipes] == ["rewind", "mine"]
    space.write_text("name: s\ndescription: d\nrecipes: [rewnd]")
    with pytest.raises(ConfigError, match="rewind"):
        load_space(str(space))


def test_a_fault_in_a_recipe_names_its_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nstages: [{name: learn, train: {optimizer: adam}}]")
    with pytest.raises(ConfigError, match=r"stages\[0\].train.optimizer.*'adam'"):
        load_recipe(str(path))
