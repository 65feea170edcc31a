"""What a search begins with: policies for the whole model, and what is known of each choice alone."""

import json

from autocompress.core.record import dump, load
from autocompress.core.sensitivity import SCHEMA, Sensitivity
from autocompress.core.space import Choice, Space, Values
from autocompress.run import Run, open_run, write_json
from autocompress.warm import beginnings

WIDTH_RATIOS = (1.0, 0.75, 0.5, 0.25)
SEEDS = 10  # policies that single choices add up to
SENSITIVITY = "sensitivity.json"


def beginning(run: Run, space: Space, sensitivity: Sensitivity | None) -> list[Values]:
    """Values that are tried first: of an earlier run, and of the sensitivities; uniform ones where there are none."""
    config = run.config
    taken_over: list[Values] = []
    if config.warm_start is not None:
        taken_over = beginnings(open_run(config.warm_start), space, config.around)
        if config.around:
            return taken_over
    if sensitivity is None:
        return [*taken_over, *seeds(space)]
    from autocompress.sensitivity import seeds_by

    return [*taken_over, space.uniform("w8a8"), *seeds_by(sensitivity, space, SEEDS), *students(space)]


def seeds(space: Space) -> list[dict[str, Choice]]:
    """Uniform policies: our own all-INT8 first, then each precision at each width ratio, then the students."""
    found = [space.uniform("w8a8")]
    found += [space.uniform(p, ratio) for ratio in WIDTH_RATIOS for p in precisions(space)]
    found += students(space)
    unique = {tuple(sorted(values.items())): values for values in found}
    return list(unique.values())


def students(space: Space) -> list[dict[str, Choice]]:
    """Each student at each precision: no probe tells anything of them."""
    return [space.uniform(p) | {"student": width} for width in space.students for p in precisions(space)]


def precisions(space: Space) -> list[str]:
    """All that some layer may have."""
    return list(dict.fromkeys(p for choices in space.precisions.values() for p in choices))


def read_sensitivity(run: Run) -> Sensitivity | None:
    """What a run found out of each choice alone; None where it did not."""
    path = run.path / SENSITIVITY
    return load(Sensitivity, json.loads(path.read_text(encoding="utf-8")), SCHEMA) if path.exists() else None


def write_sensitivity(run: Run, found: Sensitivity) -> None:
    """Keep it for whoever goes on with the run."""
    write_json(run.path / SENSITIVITY, dump(found, SCHEMA))


def known_elsewhere(run: Run, space: Space) -> Sensitivity | None:
    """What the run that this one begins with found out, where it is of the same weights and the same choices."""
    from autocompress.optimize.record import read_attributes

    if run.config.warm_start is None:
        return None
    earlier = open_run(run.config.warm_start)
    if earlier.config.model != run.config.model:
        return None
    theirs = read_attributes(earlier.storage, earlier.config.study).get("variables", {})
    same = theirs == {name: list(choices) for name, choices in space.variables.items()}
    return read_sensitivity(earlier) if same else None
