"""What a search begins with."""

import dataclasses
from pathlib import Path

from autocompress.begin import SEEDS, beginning, seeds
from autocompress.core.sensitivity import Effect, Sensitivity
from autocompress.core.space import SpaceRules
from autocompress.run import Run
from tests import scripted

RULES: SpaceRules = dataclasses.replace(scripted.RULES, students=(0.5,))
SPACE = RULES.resolve(scripted.structure(), scripted.PROFILE, has_student=True)
KNOWN = Sensitivity(
    task="t",
    target="p",
    effects={
        name: {str(c): Effect(loss=0.01 * i * (k + 1), cost=-0.02 * i) for i, c in enumerate(choices)}
        for k, (name, choices) in enumerate(SPACE.variables.items())
        if name.startswith("width:")
    },
    unit="kl divergence",
    probes=2,
    seconds=1.0,
    items=8,
)


def test_without_sensitivities_a_search_begins_with_uniform_policies(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", scripted.config(rules=RULES))
    assert beginning(run, SPACE, None) == seeds(SPACE)


def test_with_them_it_begins_with_what_they_add_up_to_and_with_what_no_probe_tells(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", scripted.config(rules=RULES))
    found = beginning(run, SPACE, KNOWN)
    students = [values for values in found if values.get("student") == 0.5]
    assert found[0] == SPACE.uniform("w8a8")
    assert {values["precision:block0"] for values in students} == {"fp32", "w8a8", "w4a8"}
    assert 1 < len(found) - 1 - len(students) <= SEEDS
    widths = [[v for n, v in values.items() if n.startswith("width:")] for values in found[1 : -len(students)]]
    assert any(len(set(own)) > 1 for own in widths)
