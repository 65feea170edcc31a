"""Latencies that files of equal kernels share, measured as often as the front needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autocompress.core.front import Rival
from autocompress.core.measurement import Interval, Measurement, merge, overlap, separated

MOST_PARTS = 3  # measurements of one file in a search


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """What files of equal kernels share.

    Attributes:
        parts: measurements of the same file, one after the other; together they are one.
        executed, diagnosis: what ran in each layer, and what the runtime noticed.
    """

    parts: tuple[Measurement, ...]
    executed: Mapping[str, str] | None
    diagnosis: Mapping[str, str]

    @property
    def measurement(self) -> Measurement:
        """All parts as one. Each counts as a process of its own: what moves between them is no noise of blocks."""
        return self.parts[0] if len(self.parts) == 1 else merge(self.parts)

    @property
    def artifact(self) -> str:
        """SHA-256 of the file that was measured."""
        return self.parts[0].artifact_sha256

    @property
    def ratio(self) -> float:
        """Latency over fp32's."""
        return self.measurement.ratio

    @property
    def ratio_ci(self) -> Interval:
        """95 % interval of the ratio."""
        return self.measurement.ratio_ci


class Latencies:
    """Latencies by what decides them."""

    def __init__(self) -> None:
        self._known: dict[str, Latency] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Latency:
        return self._known[key]

    def take_up(self, key: str, latency: Latency) -> Latency:
        """Keep it, if it has more blocks than what is known."""
        known = self._known.get(key)
        if known is None or len(latency.measurement.samples) > len(known.measurement.samples):
            self._known[key] = latency
        return self._known[key]

    def race(self, key: str, accuracy: float, rivals: Sequence[Rival], measure: Callable[[], Measurement]) -> bool:
        """Measure again, a few times at most, while its interval leaves open whether the file is on the front.

        That is decided where a rival that is no less accurate is faster by separated intervals, or where no rival's
        interval overlaps. Returns whether it was measured.
        """
        before = self._known[key]
        while len(self._known[key].parts) < MOST_PARTS and undecided(self._known[key], accuracy, rivals):
            known = self._known[key]
            self._known[key] = Latency(
                parts=(*known.parts, measure()), executed=known.executed, diagnosis=known.diagnosis
            )
        return self._known[key] is not before


def undecided(latency: Latency, accuracy: float, rivals: Sequence[Rival]) -> bool:
    """Whether intervals leave open if a file belongs on the front of its rivals."""
    own = latency.ratio_ci
    others = [r for r in rivals if r.ratio_ci != own]  # equal ones are of the same kernels: nothing will part them
    if any(r.accuracy >= accuracy and separated(r.ratio_ci, own) for r in others):
        return False
    return any(overlap(r.ratio_ci, own) for r in others)
