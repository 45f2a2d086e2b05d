"""The gate in front of a node's resources: who may come in, and that nobody comes in twice.

A door-keeper with two lists. One says what is taken at this moment, and by whom; the other says
which numbers have been shown before. A newcomer needs a number that was never shown and room that
is truly free; the door-keeper counts the room himself and believes no letter about it.

    (none) ──bind──► OPEN ──close──► CLOSED ──free──► (none)
       ▲                │               │
       │         raise, attach       restore (after a restart: closed from the start)
       └── burn: the epoch is used up and nothing comes in

Rules: what is closed never opens again. A slice is charged from bind to `free`, which only the end
of a proven teardown, or a clear, may call. Verified tokens only: signature, audience and times were
judged before. Refusals come in one fixed order, so that one cause gives one code.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from grafos_core import failure
from grafos_core.epochs import EpochWindow, ExtentEpochs
from grafos_core.failure import invariant
from grafos_core.lease import BLOCK_BYTES, EPOCH_MAX, Kind, LeaseId
from grafos_core.token import LeaseToken

SLICES_MAX: Final = 4096
"""Slices that may be charged at once, fenced ones among them; protects the node's memory."""

Epochs = EpochWindow | ExtentEpochs


@dataclass(frozen=True, slots=True)
class Slice:
    """What one lease takes up at this node. For extents `amount` is the length in blocks."""

    lease_id: LeaseId
    kind: Kind
    epoch: int
    generation: int
    amount: int
    extent_offset: int
    holder_key: str
    is_open: bool = True

    @property
    def extent_end(self) -> int:
        return self.extent_offset + self.amount


def fresh_epochs(kind: Kind) -> Epochs:
    """The shape that remembers used epochs of this kind, with none used."""
    return ExtentEpochs() if kind.has_extents else EpochWindow()


def _copied(epochs: Epochs) -> Epochs:
    """Whoever keeps the other one counts an epoch as used when its record is written, not now."""
    if isinstance(epochs, EpochWindow):
        return EpochWindow.of(epochs.value())
    return ExtentEpochs.of(epochs.value())


def refused(code: str, token: LeaseToken, detail: str = "") -> failure.FabricError:
    return failure.of(code, detail, lease_id=token.lease_id, epoch=token.epoch)


class Gate:
    """Which slices are charged, which of them are open, and which epochs have been used."""

    def __init__(
        self,
        node_id: str,
        incarnation: str,
        capacities: Mapping[Kind, int],
        epochs: Mapping[Kind, Epochs] | None = None,
        *,
        slices_max: int = SLICES_MAX,
    ) -> None:
        self._node_id = node_id
        self._incarnation = incarnation
        self._capacities = dict(capacities)
        self._epochs = {kind: fresh_epochs(kind) for kind in capacities}
        self._epochs |= {kind: _copied(used) for kind, used in (epochs or {}).items()}
        self._slices_max = slices_max
        self._slices: dict[LeaseId, Slice] = {}
        self._sums = dict.fromkeys(self._epochs, 0)
        self._extents: dict[Kind, list[tuple[int, int]]] = {
            kind: [] for kind in self._epochs if kind.has_extents
        }

    # What stands

    def slice(self, lease_id: str) -> Slice | None:
        return self._slices.get(LeaseId(lease_id))

    def slices(self) -> tuple[Slice, ...]:
        return tuple(self._slices.values())

    def is_open(self, lease_id: str, epoch: int) -> bool:
        """Whether an operation under this epoch may take effect now."""
        found = self.slice(lease_id)
        return found is not None and found.is_open and found.epoch == epoch

    def charged(self, kind: Kind) -> int:
        return self._sums.get(kind, 0)

    def epochs(self, kind: Kind) -> Epochs:
        return self._epochs[kind]

    def high_waters(self) -> dict[Kind, int]:
        """The highest epoch ever used per kind, so that no ledger grants below it again."""
        return {kind: epochs.high_water for kind, epochs in self._epochs.items()}

    def was_used(self, kind: Kind, epoch: int, extent_offset: int, amount: int) -> bool:
        return bool(self._epoch_refusal(kind, epoch, extent_offset, amount))

    # Coming in

    def check_bind(self, token: LeaseToken, holder_key: str) -> None:
        """Raise what stands against binding this token; None means that `bind` may follow."""
        self._check_scope(token, holder_key)
        standing = self._slices.get(LeaseId(token.lease_id))
        if standing is not None and standing.is_open and standing.epoch == token.epoch:
            raise refused("LEASE_BOUND", token)
        code = self._epoch_refusal(token.kind, token.epoch, token.extent_offset, token.amount)
        if code:
            raise refused(code, token)
        if standing is not None:
            raise refused("SLOT_BUSY", token, "an earlier epoch of this lease is not torn down")
        self._check_room(token)

    def holds(self, token: LeaseToken, holder_key: str) -> bool:
        """Whether exactly this is bound: to ask for it once more then changes nothing."""
        standing = self._slices.get(LeaseId(token.lease_id))
        if standing is None or not standing.is_open:
            return False
        self._check_scope(token, holder_key)
        return standing == Slice(
            LeaseId(token.lease_id), token.kind, token.epoch, token.generation, token.amount,
            token.extent_offset, holder_key,
        )  # fmt: skip

    def _check_scope(self, token: LeaseToken, holder_key: str) -> None:
        if (token.node_id, token.incarnation) != (self._node_id, self._incarnation):
            raise refused("TOKEN_AUDIENCE", token)
        if token.holder_thumbprint != holder_key:
            raise refused("HOLDER_MISMATCH", token)
        if token.kind not in self._capacities:
            raise refused("SCOPE", token, "this node does not offer the kind")
        if not token.ops:
            raise refused("SCOPE", token, "the token allows no operation")
        if not 1 <= token.epoch <= EPOCH_MAX:
            raise refused("EPOCH_RANGE", token)

    def _epoch_refusal(self, kind: Kind, epoch: int, offset: int, amount: int) -> str:
        epochs = self._epochs[kind]
        if isinstance(epochs, EpochWindow):
            return epochs.refusal(epoch)
        return epochs.refusal(offset, offset + amount, epoch)

    def _check_room(self, token: LeaseToken) -> None:
        """Asking for more than the node has at all can never help, so it is refused before busy."""
        capacity = self._capacities[token.kind]
        if not 0 < token.amount <= capacity or token.extent_offset < 0:
            raise refused("RANGE", token, "beyond what this node offers")
        if token.kind is Kind.MEM and token.amount % BLOCK_BYTES:
            raise refused("RANGE", token, f"not a multiple of {BLOCK_BYTES}")
        if token.kind.has_extents:
            if token.extent_offset + token.amount > capacity:
                raise refused("RANGE", token, "beyond the end of the device")
            if self._overlaps(token.kind, token.extent_offset, token.amount):
                raise refused("SLOT_BUSY", token)
        if self._sums[token.kind] + token.amount > capacity:
            raise refused("SLOT_BUSY", token)
        if len(self._slices) >= self._slices_max:
            raise refused("LEASE_COUNT", token)

    def _overlaps(self, kind: Kind, offset: int, amount: int) -> bool:
        taken = self._extents[kind]
        at = bisect_left(taken, (offset, 0))
        before = at > 0 and taken[at - 1][1] > offset
        return before or (at < len(taken) and taken[at][0] < offset + amount)

    def bind(self, token: LeaseToken) -> Slice:
        """Charge the slice and use up its epoch. `check_bind` was asked just before."""
        new = Slice(
            LeaseId(token.lease_id), token.kind, token.epoch, token.generation, token.amount,
            token.extent_offset, token.holder_thumbprint,
        )  # fmt: skip
        invariant(self._use(new), "a bound epoch was never used before")
        self._charge(new)
        return new

    def _use(self, used: Slice) -> bool:
        epochs = self._epochs[used.kind]
        if isinstance(epochs, EpochWindow):
            return epochs.use(used.epoch)
        return epochs.use(used.extent_offset, used.extent_end, used.epoch)

    def _charge(self, new: Slice) -> None:
        invariant(new.lease_id not in self._slices, "one slice per lease")
        self._slices[new.lease_id] = new
        self._sums[new.kind] += new.amount
        if new.kind.has_extents:
            insort(self._extents[new.kind], (new.extent_offset, new.extent_end))

    def restore(self, was: Slice) -> None:
        """After a restart: what was bound or fenced stays charged, closed, its epoch used."""
        self._use(was)
        self._charge(replace(was, is_open=False))

    def burn(self, kind: Kind, epoch: int, extent_offset: int, amount: int) -> bool:
        """Give up an epoch that was granted and never bound. Whether it was still acceptable."""
        if kind not in self._epochs:
            return False
        nobody = Slice(LeaseId(""), kind, epoch, 0, amount, extent_offset, "", is_open=False)
        return self._use(nobody)

    # Staying, and leaving

    def check_raise(self, token: LeaseToken, holder_key: str) -> Slice:
        """The slice that this token of a higher generation is for; raise what stands against it.

        A holder key other than the one bound is the caller's to judge: attach allows it.
        """
        self._check_scope(token, holder_key)
        standing = self._slices.get(LeaseId(token.lease_id))
        if standing is None or not standing.is_open:
            code = self._epoch_refusal(token.kind, token.epoch, token.extent_offset, token.amount)
            raise refused(code or "NOT_FOUND", token)
        if token.epoch != standing.epoch:
            raise refused("EPOCH_STALE", token)
        if (token.kind, token.amount, token.extent_offset) != (
            standing.kind, standing.amount, standing.extent_offset,
        ):  # fmt: skip
            raise refused("SCOPE", token, "the token is for another slice")
        return standing

    def raise_generation(self, lease_id: str, generation: int, holder_key: str) -> None:
        """From now on only higher generations are taken."""
        standing = self._slices[LeaseId(lease_id)]
        invariant(standing.is_open, "what is closed is not renewed")
        invariant(generation > standing.generation, "generations only rise")
        self._slices[standing.lease_id] = replace(
            standing, generation=generation, holder_key=holder_key
        )

    def take_back_generation(self, lease_id: str, generation: int, holder_key: str) -> None:
        """What `raise_generation` announced does not take place: the same may be asked again."""
        standing = self._slices[LeaseId(lease_id)]
        invariant(generation <= standing.generation, "only what was announced is taken back")
        self._slices[standing.lease_id] = replace(
            standing, generation=generation, holder_key=holder_key
        )

    def close(self, lease_id: str) -> None:
        """No operation under this lease takes effect any more; the slice stays charged."""
        standing = self._slices[LeaseId(lease_id)]
        self._slices[standing.lease_id] = replace(standing, is_open=False)

    def free(self, lease_id: str) -> None:
        """The slice was proved back, or an operator's clear was recorded."""
        gone = self._slices[LeaseId(lease_id)]
        invariant(not gone.is_open, "a slice is closed before it is free")
        del self._slices[gone.lease_id]
        self._sums[gone.kind] -= gone.amount
        if gone.kind.has_extents:
            self._extents[gone.kind].remove((gone.extent_offset, gone.extent_end))

    # Laws

    def check(self) -> None:
        for epochs in self._epochs.values():
            epochs.check()
        invariant(len(self._slices) <= self._slices_max, "slices are bounded")
        for kind, capacity in self._capacities.items():
            slices = [one for one in self._slices.values() if one.kind is kind]
            self._check_kind(kind, capacity, slices)

    def _check_kind(self, kind: Kind, capacity: int, slices: list[Slice]) -> None:
        total = 0
        for one in slices:
            total += one.amount
            invariant(
                self.was_used(kind, one.epoch, one.extent_offset, one.amount),
                f"the epoch of {one.lease_id} is used up while it is bound",
            )
        invariant(total == self._sums[kind], f"the sum of {kind} is what its slices add up to")
        # Only a restart with a smaller capacity can charge more, and then nothing is open.
        opened = any(one.is_open for one in slices)
        invariant(total <= capacity or not opened, f"{kind}: no more is charged than there is")
        if not kind.has_extents:
            return
        taken = self._extents[kind]
        invariant(len(taken) == len(slices), "every extent is listed once")
        for before, after in pairwise(taken):
            invariant(before[1] <= after[0], f"extents of {kind} are apart")
