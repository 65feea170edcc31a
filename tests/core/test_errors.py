import pytest

from autocompress.core import errors
from autocompress.core.errors import (
    AutocompressError,
    NoPointError,
    StageError,
    TargetError,
    TaskError,
    VerifyError,
    unknown,
)
from autocompress.core.extras import require


def _tree(cls: type) -> set[type]:
    return {cls}.union(*(_tree(sub) for sub in cls.__subclasses__()))


def test_the_docstring_is_the_exception_tree() -> None:
    ours = {cls.__name__ for cls in _tree(AutocompressError) if cls.__module__ == errors.__name__}
    assert errors.__doc__ is not None
    assert ours == {word for word in errors.__doc__.replace("(", " ").split() if word.endswith("Error")} - {
        "ValueError",
        "RuntimeError",
        "LookupError",
    }


@pytest.mark.parametrize(
    ("error", "code"), [(TaskError("x"), 2), (TargetError("x"), 3), (NoPointError("x"), 1), (VerifyError("x"), 1)]
)
def test_exit_codes(error: AutocompressError, code: int) -> None:
    assert error.exit_code == code


def test_errors_are_also_the_builtin_they_specialise() -> None:
    assert issubclass(TaskError, ValueError)
    assert issubclass(TargetError, RuntimeError)
    assert issubclass(NoPointError, LookupError)
    assert StageError("load", "m").stage == "load"


def test_unknown_names_the_nearest_and_all() -> None:
    assert unknown("target", "cpux", ["gpu", "cpu"]) == "Unknown target 'cpux'. Did you mean 'cpu'? I know: cpu, gpu."
    assert unknown("target", "zzz", []) == "Unknown target 'zzz'. I know: none."


def test_a_missing_package_names_the_line_that_installs_it() -> None:
    with pytest.raises(TargetError, match=r"nosuch is not installed. Install it with: pip install 'autocompress\[x\]'"):
        require("nosuch", "x")
    assert require("json", "x").dumps([]) == "[]"
