"""The layering rule, read off the source: who may import whom, and what stays unloaded until it is used."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import autocompress
from autocompress import pack

ROOT = Path(autocompress.__file__).parent
RUNTIMES = {"onnxruntime", "openvino", "tensorrt", "ai_edge_litert", "tflite_runtime"}
HEAVY = {"torch", "torch_pruning", "safetensors", "onnx", "onnx_ir", "onnxscript", "optuna", *RUNTIMES}

# For each layer, the layers of ours and the libraries it may import, wherever in a file. numpy is everybody's.
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "core": (set(), set()),
    "device": ({"core"}, {"psutil", "cuda", "pynvml", *RUNTIMES}),
    "compress": ({"core"}, {"torch", "torch_pruning", "safetensors"}),
    "export": (
        {"core", "compress"},
        {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "ml_dtypes", "nncf"}
        | {"litert_torch", "litert_quantizer", "ai_edge_litert", "flatbuffers"},
    ),
    "optimize": ({"core"}, {"optuna", "sqlalchemy"}),  # Optuna's own storage layer
}
# What a user's task is made of needs torch at once; predict*.py are copied into packages and run without us.
NEED_TORCH = {"autocompress.task", "autocompress.tasks.digits", "autocompress.tasks.items", "autocompress.tasks.load"}
PREDICTORS = {"autocompress.predict", *(f"autocompress.predict_{name}" for name in pack.PREDICTORS)}
APART = PREDICTORS | {"autocompress.tasks.train_digits"}


@dataclass(frozen=True, kw_only=True)
class Import:
    """`module` as written, and whether loading the file that says so loads it."""

    module: str
    at_once: bool


@cache
def modules() -> dict[str, Path]:
    """Our modules by name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str) -> tuple[Import, ...]:
    """All imports of a module: statements, `require("…")` and `import_module("…")`."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    return tuple(_walk(tree.body, at_once=True))


def _walk(nodes: list[ast.stmt] | list[ast.AST], *, at_once: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(module=alias.name, at_once=at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(module=whole if whole in modules() else node.module, at_once=at_once)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("require", "importlib.import_module"):
            yield from (
                Import(module=str(a.value), at_once=at_once) for a in node.args[:1] if isinstance(a, ast.Constant)
            )
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        yield from _walk(list(ast.iter_child_nodes(node)), at_once=at_once and not later and not typing_only)


def top(module: str) -> str:
    return module.split(".")[0]


def layer_of(module: str) -> str:
    """The folder of ours a module is in; the empty text for root modules."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / parts[1]).is_dir() else ""


def libraries(name: str) -> set[str]:
    """What is neither ours nor Python's nor numpy."""
    tops = {top(i.module) for i in imports(name)}
    return tops - set(sys.stdlib_module_names) - {"autocompress", "numpy"}


@cache
def loaded_with(name: str) -> frozenset[str]:
    """Everything that importing a module of ours loads at once, ours followed."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if module in modules():
            parents = [module.rsplit(".", i)[0] for i in range(1, module.count(".") + 1)]
            waiting += [*parents, *(i.module for i in imports(module) if i.at_once)]
    return frozenset(seen)


IN_LAYERS = [name for name in modules() if layer_of(name) in LAYERS]
LIGHT = [name for name in modules() if layer_of(name) not in LAYERS and name not in NEED_TORCH | APART]


def test_the_walk_sees_every_kind_of_import() -> None:
    """The rules below would hold of an empty list too."""
    assert len(IN_LAYERS) > 20
    assert len(LIGHT) > 20
    assert Import(module="optuna", at_once=True) in imports("autocompress.optimize.study")
    assert Import(module="torch", at_once=False) in imports("autocompress.build")
    assert Import(module="onnxruntime", at_once=False) in imports("autocompress.export.session")
    assert "torch" in loaded_with("autocompress.export.template")


@pytest.mark.parametrize("name", IN_LAYERS)
def test_a_layer_imports_only_what_it_may(name: str) -> None:
    ours, theirs = LAYERS[layer_of(name)]
    own = {layer_of(i.module) for i in imports(name) if top(i.module) == "autocompress"}
    assert own <= ours | {layer_of(name)}
    assert libraries(name) <= theirs


def test_a_file_of_device_knows_one_runtime_at_most() -> None:
    for name in modules():
        if layer_of(name) == "device":
            # tflite_runtime is the former name of ai_edge_litert
            assert len((libraries(name) & RUNTIMES) - {"tflite_runtime"}) <= 1, name
    assert libraries("autocompress.device.onnxruntime") == {"onnxruntime"}
    assert not libraries("autocompress.device.timing")


def test_only_optimize_imports_optuna() -> None:
    assert {layer_of(name) for name in modules() if "optuna" in libraries(name)} == {"optimize"}


@pytest.mark.parametrize("name", LIGHT)
def test_joining_modules_load_heavy_layers_only_when_they_are_used(name: str) -> None:
    heavy = {module for module in loaded_with(name) if top(module) in HEAVY}
    assert not heavy
    assert not NEED_TORCH & loaded_with(name)


@pytest.mark.parametrize("name", [name for name in modules() if layer_of(name) in ("core", "device")])
def test_what_runs_on_a_device_loads_no_library_but_numpy_and_psutil(name: str) -> None:
    tops = {top(module) for module in loaded_with(name)} - set(sys.stdlib_module_names)
    assert tops <= {"autocompress", "numpy", "psutil"}


def test_modules_do_not_import_each_other_in_circles() -> None:
    graph = {name: {i.module for i in imports(name) if i.at_once and i.module in modules()} for name in modules()}
    assert set(TopologicalSorter(graph).static_order()) == modules().keys()


def test_public_names_are_sorted_and_are_what_is_visible() -> None:
    assert autocompress.__all__ == sorted(autocompress.__all__)
    assert [name for name in dir(autocompress) if not name.startswith("_")] == autocompress.__all__
    for name in autocompress.__all__:
        assert getattr(autocompress, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'autocompress' has no attribute 'serach'"):
        autocompress.serach  # noqa: B018


@pytest.mark.parametrize(
    "module", ["autocompress", "autocompress.cli", "autocompress.driver", "autocompress.device.worker"]
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "autocompress" in loaded
    assert not set(loaded) & HEAVY
    assert module != "autocompress" or "numpy" not in loaded


@pytest.mark.parametrize("name", modules())
def test_every_module_says_what_it_is(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(modules()[name].read_text(encoding="utf-8")))
    assert docstring
    assert docstring.strip()
