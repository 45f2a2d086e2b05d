"""A receipt: a node's signed word that a lease's resource was taken back, and what it measured.

Capacity becomes free on nothing else: not because time passed, not because a node was silent. The
other way out is an operator's clear order, for what a failed teardown left fenced; it is signed
too, for one lease on one incarnation of one node, and good once.

Rules. A receipt is a slip as in jws.py, under a `typ` and keys of its own. A node's key speaks for
that node and incarnation alone, an operator's for that operator. Whatever is wrong with a receipt
is the failure `RECEIPT`, with a clear order `CLEAR`: who forges learns no more.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from grafos_core import failure, jws, token
from grafos_core.lease import CLOCK_ERROR_MS, EPOCH_MAX, EndCause, Kind

MEASURED_COUNT_MAX: Final = 24
MEASURED_CHARS_MAX: Final = 128
"""With the count, keeps a receipt below the 4 KiB of any slip."""
CLEAR_MS_MAX: Final = 300_000
"""How far ahead a clear order may expire. Long enough for a person, short enough to forget."""
REASON_CHARS_MAX: Final = 512

_NODE_ID = re.compile(r"[a-z0-9-]{1,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_MEASURED_NAME = re.compile(r"[a-z0-9_]{1,32}")
_MEASURED_TEXT = re.compile(r"[ -~]*")
_MISSING: Final = " ..."
_ERRNO_NAME = re.compile(r"\bE[A-Z][A-Z0-9]{1,13}\b")


_Member = TypeVar("_Member", bound=enum.StrEnum)


class Outcome(enum.StrEnum):
    """How a teardown ended."""

    TORNDOWN = "torndown"
    NOTHING_CREATED = "nothing_created"
    """The epoch was burnt, or the bind failed, before anything existed."""
    FENCED = "fenced"
    """It failed or was overdue: the slice is not free."""
    CLEARED = "cleared"
    """It was fenced and is free again; `Cleared` says on whose word."""


class Cleared(enum.StrEnum):
    """On whose word a fence was cleared, for ever in the receipt."""

    OPERATOR = "operator"
    """Ordered, erased, and measured clean."""
    POLICY = "policy"
    """The node's own, where it was told to clear what it proves clean: erased, measured clean."""
    RESIDUE = "residue"
    """Ordered by an operator who accepted that something may be left: not measured clean."""


class Assurance(enum.StrEnum):
    """What the measurement can promise."""

    FREED = "freed"
    """Nothing could be kept alive."""
    DETACHED = "detached"
    """Access is over; a hostile holder on the same machine may keep pages from being freed."""
    NONE = "none"


@dataclass(frozen=True, slots=True)
class TeardownReceipt:
    """What a node says of one ended lease."""

    lease_id: str
    node_id: str
    incarnation: str
    boot_epoch: int
    """Of the node's agent when the teardown was sealed."""
    kind: Kind
    epoch: int
    amount: int
    extent_offset: int
    """In blocks; 0 for kinds without extents."""
    cause: EndCause
    outcome: Outcome
    assurance: Assurance
    measured: Mapping[str, int | str | bool] = field(default_factory=dict)
    """What was looked at and found, for instance `{"size_bytes": 0, "zeros_read": True}`."""
    begin_ms: int = 0
    """Wall clock, for people; `duration_us` was measured on a clock that does not jump."""
    end_ms: int = 0
    duration_us: int = 0
    record_number: int = 0
    """The record "teardown end" in the node's chain, with its hash: the receipt's evidence."""
    record_hash: str = ""
    """64 hexadecimal digits."""
    cleared: Cleared | None = None
    """Of the outcome `cleared`, and of no other."""

    @property
    def frees(self) -> bool:
        """Whether the capacity may be given out again."""
        return self.outcome is not Outcome.FENCED

    @property
    def extent_length(self) -> int:
        return self.amount if self.kind.has_extents else 0

    def to_claims(self) -> dict[str, Any]:
        return (
            {
                "lease": self.lease_id,
                "node": self.node_id,
                "incarnation": self.incarnation,
                "boot_epoch": self.boot_epoch,
                "kind": self.kind.value,
                "epoch": str(self.epoch),
                "cause": self.cause.value,
                "outcome": self.outcome.value,
                "assurance": self.assurance.value,
                "measured": dict(self.measured),
                "begin_ms": self.begin_ms,
                "end_ms": self.end_ms,
                "duration_us": self.duration_us,
                "record_number": str(self.record_number),
                "record_hash": self.record_hash,
            }
            | token.slice_claims(self.kind, self.amount, self.extent_offset)
            | self._clear_claim()
        )

    def _clear_claim(self) -> dict[str, Any]:
        return {} if self.cleared is None else {"cleared": self.cleared.value}

    @staticmethod
    def from_claims(claims: Mapping[str, Any]) -> TeardownReceipt:
        """Exactly these claims, each of exactly its type; raises `TOKEN_CLAIM`."""
        kind = token.read_kind(claims)
        was_fenced = {"cleared"} if claims.get("outcome") == Outcome.CLEARED else set()
        jws.exactly(claims, _RECEIPT | token.slice_name(kind) | was_fenced)
        outcome = _member(Outcome, claims, "outcome")
        amount, extent_offset = token.read_slice(claims, kind)
        return TeardownReceipt(
            lease_id=jws.text(claims, "lease", jws.HEX_128),
            node_id=jws.text(claims, "node", _NODE_ID),
            incarnation=jws.text(claims, "incarnation", jws.HEX_128),
            boot_epoch=jws.number(claims, "boot_epoch"),
            kind=kind,
            epoch=_read_epoch(claims),
            amount=amount,
            extent_offset=extent_offset,
            cause=_member(EndCause, claims, "cause"),
            outcome=outcome,
            assurance=_read_assurance(claims, outcome),
            measured=_read_measured(claims["measured"]),
            begin_ms=jws.number(claims, "begin_ms"),
            end_ms=jws.number(claims, "end_ms"),
            duration_us=jws.number(claims, "duration_us"),
            record_number=jws.u64(claims, "record_number"),
            record_hash=jws.text(claims, "record_hash", _HASH),
            cleared=_member(Cleared, claims, "cleared") if was_fenced else None,
        )


_RECEIPT: Final = frozenset(
    {
        "lease", "node", "incarnation", "boot_epoch", "kind", "epoch", "cause", "outcome",
        "assurance", "measured", "begin_ms", "end_ms", "duration_us", "record_number",
        "record_hash",
    }
)  # fmt: skip


def _read_assurance(claims: Mapping[str, Any], outcome: Outcome) -> Assurance:
    """Nothing is promised of what is fenced, or was cleared with what may be left in it; all else
    was measured."""
    assurance = _member(Assurance, claims, "assurance")
    unproved = outcome is Outcome.FENCED or claims.get("cleared") == Cleared.RESIDUE
    if unproved != (assurance is Assurance.NONE):
        jws.refuse("TOKEN_CLAIM", "assurance")
    return assurance


def _read_epoch(claims: Mapping[str, Any]) -> int:
    epoch = jws.u64(claims, "epoch")
    if not 0 < epoch <= EPOCH_MAX:
        jws.refuse("TOKEN_CLAIM", "epoch")
    return epoch


def _member(members: type[_Member], claims: Mapping[str, Any], name: str) -> _Member:
    try:
        return members(claims[name])
    except ValueError:
        jws.refuse("TOKEN_CLAIM", name)


def _read_measured(value: Any) -> dict[str, int | str | bool]:
    if type(value) is not dict or len(value) > MEASURED_COUNT_MAX:
        jws.refuse("TOKEN_CLAIM", "measured")
    for name, found in value.items():
        if not _MEASURED_NAME.fullmatch(name) or not _is_measurement(found):
            jws.refuse("TOKEN_CLAIM", "measured")
    return value


def shortened(text: str, chars_max: int = MEASURED_CHARS_MAX) -> str:
    """What people can read of `text` in a receipt: plain characters, whole words, "..." where words
    are missing. The names of errors say most: one that stands among the missing words is kept."""
    plain = re.sub("[^ -~]", "?", text)
    if len(plain) <= chars_max:
        return plain
    room = chars_max - len(_MISSING)
    error = _ERRNO_NAME.search(plain, _word_end(plain, room))
    if error is None:
        return plain[: _word_end(plain, room)] + _MISSING
    room -= len(error[0]) + 1
    before = plain[: _word_end(plain, room)]
    return f"{before}{_MISSING} {error[0]}"


def _word_end(text: str, room: int) -> int:
    """Where the last whole word ends that fits; a word that is longer than all the room is cut."""
    end = text.rfind(" ", 0, room + 1)
    return end if end > 0 else room


def _is_measurement(found: object) -> bool:
    if type(found) is int:
        return abs(found) <= jws.SAFE_INT_MAX
    if type(found) is str:
        return len(found) <= MEASURED_CHARS_MAX and _MEASURED_TEXT.fullmatch(found) is not None
    return type(found) is bool


def mint(receipt: TeardownReceipt, kid: str, sign: jws.Sign) -> str:
    """The receipt, signed with the node's current key; signed again at each sending."""
    return jws.mint(jws.RECEIPT, kid, receipt.to_claims(), sign)


def verify(text: str | bytes, keys: jws.Keys) -> TeardownReceipt:
    """The receipt, if a key of the very node and incarnation that it speaks of signed it."""
    with _refused_as("RECEIPT"):
        claims, owner = jws.verify_owned(text, jws.RECEIPT, keys)
        receipt = TeardownReceipt.from_claims(claims)
        if owner != token.audience_of(receipt.node_id, receipt.incarnation):
            raise failure.of("RECEIPT", "signed by another node's key")
        return receipt


@contextmanager
def _refused_as(code: str) -> Generator[None, None, None]:
    """One code for all that can be wrong; the detail keeps which it was, for the log."""
    try:
        yield
    except failure.FabricError as refused:
        if refused.code == code:
            raise
        raise failure.of(code, refused.code) from refused


@dataclass(frozen=True, slots=True)
class ClearOrder:
    """An operator's order to take a fenced slice back: erase and measure once more, then free."""

    lease_id: str
    node_id: str
    incarnation: str
    epoch: int
    nonce: str
    """128 random bits as hexadecimal digits, from the node's answer to `describe` or `probe`."""
    exp_ms: int
    reason: str
    operator: str
    """SPIFFE id; the owner of the key that signed."""
    accept_residue: bool = False
    """Free it even if something could not be erased; recorded as such."""

    def to_claims(self) -> dict[str, Any]:
        return {
            "lease": self.lease_id,
            "node": self.node_id,
            "incarnation": self.incarnation,
            "epoch": str(self.epoch),
            "nonce": self.nonce,
            "exp_ms": self.exp_ms,
            "reason": self.reason,
            "operator": self.operator,
            "accept_residue": self.accept_residue,
        }

    @staticmethod
    def from_claims(claims: Mapping[str, Any]) -> ClearOrder:
        """Exactly these claims, each of exactly its type; raises `TOKEN_CLAIM`."""
        jws.exactly(claims, _CLEAR)
        reason = claims["reason"]
        if type(reason) is not str or len(reason) > REASON_CHARS_MAX or not reason.isprintable():
            jws.refuse("TOKEN_CLAIM", "reason")
        return ClearOrder(
            lease_id=jws.text(claims, "lease", jws.HEX_128),
            node_id=jws.text(claims, "node", _NODE_ID),
            incarnation=jws.text(claims, "incarnation", jws.HEX_128),
            epoch=_read_epoch(claims),
            nonce=jws.text(claims, "nonce", jws.HEX_128),
            exp_ms=jws.number(claims, "exp_ms"),
            reason=reason,
            operator=jws.text(claims, "operator"),
            accept_residue=jws.flag(claims, "accept_residue"),
        )


_CLEAR: Final = frozenset(
    {
        "lease", "node", "incarnation", "epoch", "nonce", "exp_ms", "reason", "operator",
        "accept_residue",
    }
)  # fmt: skip


def mint_clear(order: ClearOrder, kid: str, sign: jws.Sign) -> str:
    return jws.mint(jws.CLEAR, kid, order.to_claims(), sign)


def verify_clear(text: str | bytes, keys: jws.Keys) -> ClearOrder:
    """The order, if a key of the operator whom it names signed it."""
    with _refused_as("CLEAR"):
        claims, owner = jws.verify_owned(text, jws.CLEAR, keys)
        order = ClearOrder.from_claims(claims)
        if owner != order.operator:
            raise failure.of("CLEAR", "signed by another operator's key")
        return order


def judge_clear(
    order: ClearOrder,
    *,
    lease_id: str,
    node_id: str,
    incarnation: str,
    epoch: int,
    nonce: str,
    now_ms: int,
) -> None:
    """Refuse an order for another fence or moment. `nonce` is the one given out and not used."""
    if (order.node_id, order.incarnation) != (node_id, incarnation):
        raise failure.of("CLEAR", "for another node")
    if (order.lease_id, order.epoch) != (lease_id, epoch):
        raise failure.of("CLEAR", "for another lease")
    if not nonce or order.nonce != nonce:
        raise failure.of("CLEAR", "the nonce was not given out, or is used")
    if now_ms >= order.exp_ms:
        raise failure.of("CLEAR", "expired")
    if order.exp_ms > now_ms + CLEAR_MS_MAX + CLOCK_ERROR_MS:
        raise failure.of("CLEAR", "expires too late")
