"""The runtime of the tests."""

from pathlib import Path

from tests.contracts.cases import Case, rows
from tests.fakes import FakeRuntime
from tests.models import write_fake


def case(folder: Path) -> Case:
    """Twice the input and one; it says of itself what ran."""
    executed = {"a": "int8", "b": "fp32"}
    path = write_fake(folder / "fake.json", scale=2.0, shift=1.0, executed=executed)
    x = {"input": rows()}
    outputs = {"output": 2 * rows() + 1}
    return Case(
        runtime=FakeRuntime(), path=path, inputs=x, outputs=outputs, mixed=path, mixed_inputs=x, executed=executed
    )
