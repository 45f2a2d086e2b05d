"""What a heap of measurements says: middle, tail and spread.

Rules. Values keep their rounds, so that what changed while the run went on can be seen. Quantiles
are interpolated between neighbours. Spread is told twice: the distance between the quarters (IQR),
and the median distance from the median (MAD), which a few wild values do not move.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of all lie."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Summary:
    """In the unit of what was measured."""

    count: int
    p50: float
    p90: float
    p99: float
    iqr: float
    mad: float
    least: float
    most: float


def summarize(values: Sequence[float]) -> Summary:
    ordered = sorted(values)
    middle = quantile(ordered, 0.5)
    return Summary(
        count=len(ordered),
        p50=middle,
        p90=quantile(ordered, 0.9),
        p99=quantile(ordered, 0.99),
        iqr=quantile(ordered, 0.75) - quantile(ordered, 0.25),
        mad=quantile([abs(value - middle) for value in ordered], 0.5),
        least=ordered[0],
        most=ordered[-1],
    )


@dataclass(slots=True)
class Series:
    """One thing that was measured many times, round by round."""

    name: str
    unit: str
    rounds: list[list[float]] = field(default_factory=list)

    def add_round(self, values: Iterable[float]) -> None:
        self.rounds.append(list(values))

    @property
    def values(self) -> list[float]:
        return [value for values in self.rounds for value in values]

    def summary(self) -> Summary:
        return summarize(self.values)

    def drift(self) -> float:
        """By which share the last round's median differs from the first round's."""
        if len(self.rounds) < 2:
            return 0.0
        first, last = quantile(self.rounds[0], 0.5), quantile(self.rounds[-1], 0.5)
        return last / first - 1 if first else 0.0

    def to_json(self) -> dict[str, Any]:
        medians = [quantile(values, 0.5) for values in self.rounds if values]
        return {
            "name": self.name,
            "unit": self.unit,
            **asdict(self.summary()),
            "drift": self.drift(),
            "round_p50s": medians,
        }
