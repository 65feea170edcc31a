"""What a search begins with: policies for the whole model, and what is known of each choice alone."""

import json

from autocompress.core.record import dump, load
from autocompress.core.sensitivity import SCHEMA, Sensitivity
from autocompress.core.space import Choice, Space, Values
from autocompress.run import Run, open_run, write_json
from autocompress.warm import beginnings

WIDTH_RATIOS = (1.0, 0.75, 0.5, 0.25)
SEEDS = 16  # policies that single choices add up to
SENSITIVITY = "sensitivity.json"


def beginning(run: Run, space: Space, sensitivity: Sensitivity | None) -> list[Values]:
    """Values that are tried first: of an earlier run, of the sensitivities, and uniform ones."""
    config = run.config
    taken_over: list[Values] = []
    if config.warm_start is not None:
        taken_over = beginnings(open_run(config.warm_start), space, config.around)
        if config.around:
            return taken_over
    alone: list[Values] = []
    if sensitivity is not None:
        from autocompress.sensitivity import seeds_by

        alone = seeds_by(sensitivity, space, SEEDS)
    uniform = seeds(space)
    return [*taken_over, *uniform[:1], *alone, *uniform[1:]]


def seeds(space: Space) -> list[dict[str, Choice]]:
    """Uniform policies: our own all-INT8 first, then each precision at each width ratio, then the students."""
    precisions = list(dict.fromkeys(p for choices in space.precisions.values() for p in choices))
    found = [space.uniform("w8a8")]
    found += [space.uniform(p, ratio) for ratio in WIDTH_RATIOS for p in precisions]
    found += [space.uniform(p) | {"student": width} for width in space.students for p in precisions]
    unique = {tuple(sorted(values.items())): values for values in found}
    return list(unique.values())


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
