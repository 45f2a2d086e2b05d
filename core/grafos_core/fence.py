"""A number that only rises, and a guard that turns away whoever comes with an older one.

Like the date stamp on a ticket: the guard need not know who you are, only that nobody with a newer
stamp has been let in. For what programs build on their leases; the fence of the leases themselves
is the gate's (gate.py).

Rules: a guard never goes back. A message carries the epoch under which it was made; the check is
at the resource, at the time of use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from grafos_core.failure import Fenced, invariant
from grafos_core.lease import EPOCH_MAX

T = TypeVar("T")


class StaleEpochError(Fenced):
    """The epoch is older than the one in force: nothing under it takes effect any more."""

    default_code = "EPOCH_STALE"


@dataclass(frozen=True, slots=True, order=True)
class FenceEpoch:
    """One value of a counter that only rises."""

    value: int = 0

    def __post_init__(self) -> None:
        invariant(0 <= self.value <= EPOCH_MAX, "an epoch is a number of 64 bits")

    @classmethod
    def zero(cls) -> FenceEpoch:
        return cls(0)

    def next(self) -> FenceEpoch:
        return FenceEpoch(self.value + 1)

    bump = next

    def __int__(self) -> int:
        return self.value


class FenceGuard:
    """Stands in front of a resource and lets in the epoch in force and newer ones."""

    __slots__ = ("_epoch",)

    def __init__(self, epoch: FenceEpoch | None = None) -> None:
        self._epoch = epoch if epoch is not None else FenceEpoch.zero()

    @property
    def epoch(self) -> FenceEpoch:
        """The epoch in force."""
        return self._epoch

    def check(self, epoch: FenceEpoch) -> None:
        """Raise `StaleEpochError` if `epoch` is older than the one in force."""
        if epoch < self._epoch:
            detail = f"{epoch.value}, in force is {self._epoch.value}"
            raise StaleEpochError(detail=detail, epoch=epoch.value)

    def advance(self) -> FenceEpoch:
        """Fence off everything up to now; the new epoch in force."""
        self._epoch = self._epoch.next()
        return self._epoch

    def observe(self, epoch: FenceEpoch) -> None:
        """Check, and from now on let in nothing older than `epoch`."""
        self.check(epoch)
        self._epoch = epoch

    def __repr__(self) -> str:
        return f"FenceGuard({self._epoch.value})"


class FencedMessage(Generic[T]):
    """A value with the epoch under which it was made. Users know it as `grafos.fence.Fenced`."""

    __slots__ = ("_epoch", "_value")

    def __init__(self, value: T, epoch: FenceEpoch) -> None:
        self._value = value
        self._epoch = epoch

    @property
    def value(self) -> T:
        return self._value

    def epoch(self) -> FenceEpoch:
        return self._epoch

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FencedMessage):
            return NotImplemented
        return bool((self._value, self._epoch) == (other._value, other._epoch))

    def __hash__(self) -> int:
        return hash((self._value, self._epoch))

    def __repr__(self) -> str:
        return f"Fenced({self._value!r}, {self._epoch!r})"
