"""Values as arrays: the number of each variable's choice, and the column of each choice that has a say."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autocompress.core.candidate import parse_precision
from autocompress.core.space import INHERIT, Choice, Values

Array = NDArray[np.float64]
Rows = NDArray[np.intp]


class Encoding:
    """Two forms of values: numbers of choices, `[variables]`, to change them, and columns, `[own]`, to learn from them.

    What a layer takes over from its block is resolved in the columns: two forms of one policy have equal ones. A block
    whose every layer has a variable of its own says nothing that its layers do not, and has no column.

    Attributes:
        variables: choices by name.
        sizes: how many choices each variable has.
        ordered: which variables are numbers.
        starts: first column of each variable that has columns, and their number at the end.
    """

    def __init__(self, variables: Mapping[str, tuple[Choice, ...]], blocks: Mapping[str, str]) -> None:
        """`blocks` tells each layer's block; a layer whose variable says "block" has the choice of that."""
        self.variables = dict(variables)
        self.sizes = np.array([len(choices) for choices in variables.values()], np.intp)
        self.ordered = np.array([is_number(own) for own in variables.values()], bool)
        self._index = {n: {choice: i for i, choice in enumerate(own)} for n, own in self.variables.items()}
        self._of_block = {
            f"layer:{layer}": f"precision:{block}"
            for layer, block in blocks.items()
            if f"layer:{layer}" in variables and f"precision:{block}" in variables
        }
        covered = self._covered(blocks)
        self.known: dict[str, list[Choice]] = {}
        for name, choices in self.variables.items():
            if name not in covered:
                taken = self.variables.get(self._of_block.get(name, ""), ())
                own = [c for c in choices if not (name in self._of_block and c == INHERIT)]
                self.known[name] = own + [c for c in taken if c not in own]
        self._in_row = [j for j, name in enumerate(self.known) if name.partition(":")[0] in ("precision", "layer")]
        self.starts = np.concatenate([[0], np.cumsum([len(own) for own in self.known.values()])]).astype(np.intp)
        self._tabulate()
        self._kernels = self._by_kernel()

    def _covered(self, blocks: Mapping[str, str]) -> set[str]:
        layers: dict[str, list[str]] = {}
        for layer, block in blocks.items():
            layers.setdefault(f"precision:{block}", []).append(f"layer:{layer}")
        return {block for block, own in layers.items() if all(name in self._of_block for name in own)}

    def _tabulate(self) -> None:
        """Tables from numbers to columns, a layer's own and its block's, and back from columns to numbers."""
        place = {name: i for i, name in enumerate(self.variables)}
        widest = int(self.sizes.max(initial=1))
        self._own = np.array([place[name] for name in self.known], np.intp)
        self._from = np.array([place[self._of_block.get(name, name)] for name in self.known], np.intp)
        self._direct = np.full((len(self.known), widest), -1, np.intp)
        self._taken = np.zeros((len(self.known), widest), np.intp)
        self._members = np.zeros((len(self.known), max((len(k) for k in self.known.values()), default=1)), np.intp)
        self._back = np.zeros(self.size, np.intp)
        for j, (name, own) in enumerate(self.known.items()):
            columns = {choice: int(self.starts[j]) + i for i, choice in enumerate(own)}
            for choice, i in self._index[name].items():
                self._direct[j, i] = columns.get(choice, -1)
            for choice, i in self._index[self._of_block.get(name, name)].items():
                self._taken[j, i] = columns.get(choice, self.starts[j])
            for choice, column in columns.items():
                self._back[column] = self._index[name].get(choice, self._index[name].get(INHERIT, 0))
            self._members[j] = [*columns.values(), *[self.starts[j]] * (self._members.shape[1] - len(columns))]

    def _by_kernel(self) -> Rows:
        """For each column of a precision a number of the kernels that run it, −1 for the others."""
        found, numbers = np.full(self.size, -1, np.intp), dict[str, int]()
        choices = list(self.known.values())
        for j in self._in_row:
            for i, choice in enumerate(choices[j]):
                kernel = INHERIT if choice == INHERIT else parse_precision(str(choice)).kernel
                found[self.starts[j] + i] = numbers.setdefault(kernel, len(numbers))
        return found

    @property
    def size(self) -> int:
        """How many columns there are."""
        return int(self.starts[-1])

    def numbers(self, many: Sequence[Values]) -> Rows:
        """For each of `many`, the numbers of its choices, `[many, variables]`; the first for one not given."""
        found = [[known.get(v.get(n, ""), 0) for n, known in self._index.items()] for v in many]
        return np.array(found, np.intp).reshape(len(many), len(self.variables))

    def values(self, numbers: Rows) -> dict[str, Choice]:
        """The values that `numbers`, `[variables]`, stand for."""
        return {name: own[i] for (name, own), i in zip(self.variables.items(), numbers.tolist(), strict=True)}

    def columns(self, numbers: Rows) -> Rows:
        """The column of each choice that has a say, `[many, own]`, from `[many, variables]`."""
        each = np.arange(len(self.known))
        direct = self._direct[each, numbers[:, self._own]]
        return np.where(direct < 0, self._taken[each, numbers[:, self._from]], direct)

    def rows(self, many: Sequence[Values]) -> Rows:
        """The columns of values."""
        return self.columns(self.numbers(many))

    def best(self, scores: Array, around: Rows) -> Rows:
        """For each variable the choice with the lowest of `scores`, `[many, columns]`; what has none as in `around`."""
        picked = self._members[np.arange(len(self.known)), scores[:, self._members].argmin(2)]
        found = around.copy()
        found[:, self._own] = self._back[picked]
        return found

    def shared(self) -> Array:
        """For each column, which choice it is among those of all variables of its kind, 0 or 1, `[columns, choices]`.

        Of variables that are numbers, what counts is the place among the choices: the widest is the widest.
        """
        keys: dict[tuple[str, str], int] = {}
        of = np.zeros(self.size, np.intp)
        for j, (name, own) in enumerate(self.known.items()):
            kind = "precision" if name in self._of_block else name.partition(":")[0]
            numbers = is_number(own)
            for i, choice in enumerate(own):
                key = (kind, str(i) if numbers else str(choice))
                of[self.starts[j] + i] = keys.setdefault(key, len(keys))
        return np.eye(len(keys))[of]

    def borders(self, rows: Rows) -> Array:
        """How often one layer runs in other kernels than the one before it, `[many]`; values are converted there."""
        run = self._kernels[rows[:, self._in_row]]
        found: Array = (run[:, 1:] != run[:, :-1]).sum(1).astype(np.float64)
        return found

    def bordering(self, around: Rows) -> Array:
        """How many borders each choice alone has with its neighbours in `around`, `[around, columns]`."""
        found = np.zeros((len(around), self.size))
        for before, after in itertools.pairwise(self._in_row):
            for one, other in ((before, after), (after, before)):
                own = slice(self.starts[one], self.starts[one + 1])
                found[:, own] += self._kernels[None, own] != self._kernels[around[:, other]][:, None]
        return found

    def places(self) -> Array:
        """A place for each column among its variable's, `[columns, axes]`.

        Squared distances of two names are 1; a number lies all the steps away that lead to it, extremes 1.
        """
        table = np.zeros((self.size, self._members.shape[1]))
        for start, own in zip(self.starts, self.known.values(), strict=False):
            count = len(own)
            if is_number(own):
                table[start : start + count, : count - 1] = np.tri(count, count - 1, -1) / max(1, count - 1) ** 0.5
            else:
                table[start : start + count, :count] = np.eye(count) / 2**0.5
        return table

    def summed(self, effects: Mapping[str, Mapping[str, tuple[float, float]]], least: float) -> Array:
        """For each column what its choice alone does, `[columns, 3]`.

        That is what it does to accuracy, to latency where it is a precision, and to latency's logarithm elsewhere; a
        cut leaves at least the share `least`.
        """
        found = np.zeros((self.size, 3))
        for j, (name, own) in enumerate(self.known.items()):
            told = {**effects.get(self._of_block.get(name, ""), {}), **effects.get(name, {})}
            for i, choice in enumerate(own):
                loss, cost = told.get(str(choice), (0.0, 0.0))
                apart = (cost, 0.0) if j in self._in_row else (0.0, float(np.log(max(1 + cost, least))))
                found[self.starts[j] + i] = (loss, *apart)
        return found


def is_number(choices: Sequence[Choice]) -> bool:
    """Whether the choices of a variable are numbers, which are in order."""
    return all(isinstance(choice, int | float) for choice in choices)
