"""Two loaded models as one session: the large one runs only where the small one is unsure."""

import functools
from collections.abc import Callable, Mapping

from autocompress.core.cascade import LARGE, Rule
from autocompress.core.confidence import cascaded
from autocompress.device.runtime import Array, Session


class CascadeSession:
    """A Session; what `run` returns also says, as LARGE, for which items the large model answered."""

    def __init__(self, small: Session, large: Session, rule: Rule) -> None:
        self._small, self._large = small, large
        self._join = functools.partial(cascaded, output=rule.output, kind=rule.kind, threshold=rule.threshold)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of a batch, each row of the model that answers it."""
        outputs, unsure = self._join(inputs, self._small.run, self._large.run)
        return {**outputs, LARGE: unsure}

    def bind(self, inputs: Mapping[str, Array]) -> Callable[[], Mapping[str, Array]]:
        """`run` of one item, bound in both models."""
        small, large, join = self._small.bind(inputs), self._large.bind(inputs), self._join
        return lambda: join(inputs, lambda _: small(), lambda _: large())[0]

    def executed_precision(self) -> None:
        """None: the files tell it, each for itself."""
        return

    def close(self) -> None:
        """Close both."""
        self._small.close()
        self._large.close()
