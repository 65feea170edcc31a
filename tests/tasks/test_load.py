"""Loading a task by reference: every form, and every fault in one sentence."""

import sys
from pathlib import Path

import pytest

from autocompress.core.errors import TaskError
from autocompress.task import check_task, load_task


def sentence(error: pytest.ExceptionInfo[TaskError]) -> str:
    """The message, which is one line."""
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)
    return str(error.value)


def write(path: Path, text: str) -> str:
    """A file with this text; its path as text."""
    path.write_text(text)
    return str(path)


SOUND = """
import torch
from torch.utils.data import TensorDataset
from autocompress import Task
data = TensorDataset(torch.rand(9, 4), torch.arange(9) % 4)
def build():
    return torch.nn.Linear(4, 4)
"""


def test_a_file_gives_a_task_or_a_function_and_any_name(tmp_path: Path) -> None:
    ending = "mine = Task(name='mine', model=build, train=data, validation=data)\ndef task(): return mine\n"
    path = write(tmp_path / "net.py", SOUND + ending)
    assert load_task(path).name == "mine"
    assert load_task(f"{path}:mine").name == "mine"


def test_a_file_imports_its_neighbours_while_it_loads(tmp_path: Path) -> None:
    write(tmp_path / "neighbour_of_net.py", SOUND)
    ending = "from neighbour_of_net import *\ntask = Task(name='t', model=build, train=data, validation=data)\n"
    before = list(sys.path)
    check_task(load_task(write(tmp_path / "net.py", ending)))
    assert sys.path == before


def test_a_module_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "my_task_module.py", SOUND + "t = Task(name='m', model=build, train=data, validation=data)\n")
    monkeypatch.chdir(tmp_path)
    assert load_task("my_task_module:t").name == "m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = x / 0\n", "fails: ZeroDivisionError: division by zero (net.py, line 2)"),
        ("def task(:\n", "fails: SyntaxError: invalid syntax (net.py, line 1)"),
        ("import sys\nsys.exit('no data')\n", "fails: SystemExit: no data (net.py, line 2)"),
        ("import no_such_module_here\n", "fails: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("x = 1\n", "net.py has no `task`; assign it: task = Task(...)"),
        (
            SOUND + "other = Task(name='o', model=build, train=data, validation=data)\n",
            "net.py has no `task`; it has other",
        ),
        ("task = 3\n", "net.py must be a Task or a function returning one, got int"),
        ("def task():\n    return {}\n", "net.py must be a Task or a function returning one, got dict"),
        ("def task():\n    raise OSError('no\\ndata')\n", "net.py fails: OSError: no data (net.py, line 2)"),
        ("def task(size):\n    return size\n", "net.py fails: TypeError: task() missing 1 required"),
        (
            "from autocompress import Task\ntask = Task(name='', model=1, train=1, validation=1)\n",
            "fails: `name` must be",
        ),
    ],
)
def test_each_fault_of_a_task_file_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError) as error:
        load_task(write(tmp_path / "net.py", text))
    assert message in sentence(error)
    assert "net.py" in sentence(error)


def test_an_unknown_name_tells_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(TaskError) as error:
        load_task("digit")
    assert sentence(error).startswith("Unknown task 'digit'. Did you mean 'digits'? I know: digits.")
    with pytest.raises(TaskError, match=r"task file .*gone\.py does not exist"):
        load_task(str(tmp_path / "gone.py"))
    with pytest.raises(TaskError, match="module 'no_such_module_here' cannot be imported: ModuleNotFoundError"):
        load_task("no_such_module_here:task")
    with pytest.raises(TaskError, match="math has no `task`; assign it"):
        load_task("math:")
