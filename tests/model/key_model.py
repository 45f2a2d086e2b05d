"""A signing key is revoked while admission goes on granting, renewing, signing and changing keys.

One lease.  An authority revokes a key, and ends the leases that it has signed tokens of, in two
steps.  Admission has a key, which changes at any moment; it asks the ledger for a grant or a
renewal, and signs the token of the answer later, with the key that it has by then.  A thief has a
copy of every key and signs what he likes.  The node hears late which keys are revoked.

Which key it will be is settled by the ledger's record alone, so the model has no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.model.lease_model import act
from tests.model.search import Step

KEYS: Final = 3
REVOCABLE: Final = (0, 1)
NOBODY: Final = -1
ABSENT, LIVE, ENDED = range(3)

SURVIVES: Final = "key: a lease lives on, and a revoked key has signed for it"
FORGED: Final = "forged: a node that knows of the revocation takes what the key has signed"


@dataclass(frozen=True, slots=True)
class KeyCare:
    """Defences of a key's revocation, all there by default."""

    key_first: bool = True
    """The key is revoked before the leases are looked for, not after."""
    signer_checked: bool = True
    """The ledger grants and renews nothing under a key that is revoked."""
    recorded_at_once: bool = True
    """Which key it is stands in the record of the grant itself."""
    renewals_recorded: bool = True
    """And in that of each renewal."""
    mint_checks: bool = True
    """Admission signs with the key that the ledger has recorded, or asks again."""
    node_refuses: bool = True
    """A node that has heard takes nothing that the key has signed."""


class State(NamedTuple):
    key: int = 0  # admission's
    revoked: int = NOBODY
    phase: int = 0  # of the authority: 2 when it takes the key for dealt with
    lease: int = ABSENT
    recorded: int = 0  # keys, as bits
    untold: int = 0  # that admission has still to tell the ledger
    waiting: bool = False  # an answer of the ledger whose token is not signed yet
    tokens: int = 0  # keys, as bits
    renewed: bool = False
    heard: bool = False


class KeyModel:
    """Every step that authority, admission, node and thief can take from a state."""

    def __init__(self, has: KeyCare) -> None:
        self._has = has

    def first_states(self) -> list[State]:
        return [State()]

    def steps(self, s: State) -> Iterator[Step[State]]:
        yield from self._authority(s)
        yield from self._admission(s)
        if s.revoked != NOBODY and not s.heard:
            yield act("hear"), s._replace(heard=True), ""
        if s.revoked != NOBODY and not (s.heard and self._has.node_refuses):
            yield act("forge"), s, FORGED if s.heard else ""

    def broken_laws(self, s: State) -> Iterator[str]:
        if s.phase == 2 and s.lease == LIVE and s.tokens >> s.revoked & 1:
            yield SURVIVES

    def _authority(self, s: State) -> Iterator[Step[State]]:
        if s.phase == 0:
            for key in REVOCABLE:
                after = s._replace(phase=1, revoked=key)
                yield act("begin", key), after if self._has.key_first else _looked(after), ""
        elif s.phase == 1:
            yield act("finish"), (_looked(s) if self._has.key_first else s)._replace(phase=2), ""

    def _may_sign(self, s: State) -> bool:
        """By what the ledger knows: without `key_first` it hears of the key at the end."""
        known = s.phase == 2 or (s.phase == 1 and self._has.key_first)
        return not (self._has.signer_checked and known and s.key == s.revoked)

    def _admission(self, s: State) -> Iterator[Step[State]]:
        bit = 1 << s.key
        if s.key + 1 < KEYS:
            yield act("change_key"), s._replace(key=s.key + 1), ""
        if s.lease == ABSENT and self._may_sign(s):
            granted = s._replace(lease=LIVE, waiting=True)
            at_once = self._has.recorded_at_once
            told = granted._replace(recorded=bit) if at_once else granted._replace(untold=bit)
            yield act("grant"), told, ""
        if s.untold:
            yield act("tell"), s._replace(recorded=s.recorded | s.untold, untold=0), ""
        if s.lease == LIVE and not s.renewed and not s.waiting and self._may_sign(s):
            kept = bit if self._has.renewals_recorded else 0
            recorded = s.recorded | kept
            yield act("renew"), s._replace(renewed=True, waiting=True, recorded=recorded), ""
        if s.waiting and (not self._has.mint_checks or (s.recorded | s.untold) & bit):
            yield act("mint"), s._replace(waiting=False, tokens=s.tokens | bit), ""
        elif s.waiting and s.lease == LIVE and self._may_sign(s):
            yield act("ask_again"), s._replace(recorded=s.recorded | bit), ""


def _looked(s: State) -> State:
    """Whatever is recorded as signed by the key is ended."""
    return s._replace(lease=ENDED) if s.lease == LIVE and s.recorded >> s.revoked & 1 else s
