"""The receipt that a holder gets for a lease: what the node took back, and how sure that is.

Rules. What is read from a receipt before `verify` is the node's word over an authenticated
connection; after `verify` it is a signed statement that anybody with the node's public key can
check. `credited` is no part of it: it says whether the ledger had counted the capacity as free
again when `release()` returned. Where no receipt came in time, there is an empty one that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from grafos_core import failure

if TYPE_CHECKING:
    from grafos_core.chain import Record
    from grafos_core.jws import Keys as CoreKeys
    from grafos_core.receipt import TeardownReceipt as CoreReceipt

NO_RECEIPT: Final = "unknown"
"""The outcome where the node could not be asked."""


class VerificationKey(Protocol):
    """What is known of a public key; `NodeKey` and `grafos.v1.VerificationKey` are some."""

    @property
    def key_id(self) -> str: ...

    @property
    def owner(self) -> str:
        """`<node id>/<incarnation>`, or the SPIFFE id of a node for all of its incarnations."""

    @property
    def use(self) -> str: ...

    @property
    def public_key(self) -> bytes: ...


class Named(Protocol):
    """What a receipt is to be about: a lease, or whatever remembers these three of it."""

    @property
    def lease_id(self) -> str: ...

    @property
    def node_id(self) -> str: ...

    @property
    def epoch(self) -> int: ...


@dataclass(frozen=True, slots=True)
class NodeKey:
    """With which a node signs its receipts, as the control plane publishes it."""

    key_id: str
    owner: str
    """SPIFFE id of the node."""
    use: str
    public_key: bytes
    """Ed25519, 32 bytes."""


@dataclass(frozen=True, slots=True)
class TeardownReceipt:
    """What happened to one lease's resource when the lease ended."""

    lease_id: str
    node_id: str
    epoch: int
    kind: str
    credited: bool
    """The ledger has counted the capacity as free again."""
    outcome: str = NO_RECEIPT
    """`torndown`, `nothing_created`, `fenced`, `cleared`; `unknown` where no receipt came."""
    assurance: str = "none"
    """`freed`: nothing could be kept alive. `detached`: access is over, pages may linger."""
    cause: str = ""
    measured: Mapping[str, int | str | bool] = field(default_factory=dict)
    begin_ms: int = 0
    """Wall clock, for people."""
    end_ms: int = 0
    duration_us: int = 0
    record_number: int = 0
    """Of the record in the node's audit chain, with its hash."""
    record_hash: str = ""
    incarnation: str = ""
    """Of the node: made anew when its state is."""
    boot_epoch: int = 0
    """Of the node's agent when this was signed."""
    amount: int = 0
    """What was taken back, in the kind's unit."""
    cleared: str = ""
    """Where it was fenced, on whose word it is free: `operator`, `policy`; or `residue`, where
    an operator accepted that something may be left."""
    signed: str = field(default="", repr=False)
    """The slip as the node signed it; empty where no receipt came."""

    def verify(
        self,
        keys: CoreKeys | Iterable[VerificationKey],
        *,
        lease: Named | None = None,
        records: Iterable[Record] | None = None,
    ) -> TeardownReceipt:
        """This receipt, if it is signed by a key of the node that it speaks of.

        Args:
            keys: what `Fabric.keys()` gives; or keys kept from elsewhere. One whose owner names an
                incarnation is believed for that incarnation alone.
            lease: what it is to be about, so that no genuine receipt of another lease or epoch
                passes for it.
            records: of the node's chain, as `grafos.audit.records` reads them from an export; the
                one that this receipt names must be among them, and say the same.

        Raises:
            Denied: code RECEIPT; there is no signature, or it proves something else.
        """
        from grafos_core import jws, receipt  # for those who verify; slow to load

        if not self.signed:
            raise failure.of("RECEIPT", "no receipt came", lease_id=self.lease_id, epoch=self.epoch)
        said = _claims(self.signed)
        if _made_of(said, self.signed, credited=self.credited) != self:
            raise failure.of("RECEIPT", "it says something else than what was signed")
        found = receipt.verify(
            self.signed, keys if isinstance(keys, jws.Keys) else _keys(keys, said)
        )
        if lease is not None:
            self._check_about(lease)
        if records is not None:
            _check_recorded(found, records)
        return self

    def _check_about(self, lease: Named) -> None:
        ours = (self.lease_id, self.node_id, self.epoch)
        if ours != (lease.lease_id, lease.node_id, lease.epoch):
            raise failure.of("RECEIPT", "it is about another lease", lease_id=self.lease_id)

    @property
    def revoke_stage(self) -> str:
        """Of a lease that was revoked: `checkpoint_reported` where its holder agreed in its grace,
        else `forced_teardown`, or `expired` where its own end came first."""
        return str(self.measured.get("revoke_stage", ""))

    @property
    def frees(self) -> bool:
        """Whether the node has taken the resource back."""
        return self.outcome in ("torndown", "nothing_created", "cleared")


def _check_recorded(found: CoreReceipt, records: Iterable[Record]) -> None:
    from grafos_core import evidence  # for those who have the node's chain

    where = (found.node_id, found.incarnation, found.record_number)
    for record in records:
        if (record.origin, record.incarnation, record.number) == where:
            evidence.judge_record(found, record)
            return
    raise failure.of("RECEIPT", "its record is not there", lease_id=found.lease_id)


def from_slip(text: str, *, credited: bool) -> TeardownReceipt:
    """What a slip says, not verified yet."""
    return _made_of(_claims(text), text, credited=credited)


def _claims(text: str) -> CoreReceipt:
    from grafos_core import jws, receipt

    parts = jws.as_ascii(text).split(b".")
    if len(parts) != 3:
        raise failure.of("RECEIPT", "not a receipt")
    return receipt.TeardownReceipt.from_claims(jws.parse_canonical(jws.from_base64url(parts[1])))


def _made_of(found: CoreReceipt, text: str, *, credited: bool) -> TeardownReceipt:
    return TeardownReceipt(
        lease_id=found.lease_id,
        node_id=found.node_id,
        epoch=found.epoch,
        kind=found.kind.value,
        credited=credited,
        outcome=found.outcome.value,
        assurance=found.assurance.value,
        cause=found.cause.value,
        measured=dict(found.measured),
        begin_ms=found.begin_ms,
        end_ms=found.end_ms,
        duration_us=found.duration_us,
        record_number=found.record_number,
        record_hash=found.record_hash,
        incarnation=found.incarnation,
        boot_epoch=found.boot_epoch,
        amount=found.amount,
        cleared=found.cleared.value if found.cleared else "",
        signed=text,
    )


def _keys(published: Iterable[VerificationKey], said: CoreReceipt) -> CoreKeys:
    """Those that may have signed what was said. A node's own word on which incarnation it was is
    believed where its key is published for the node as such."""
    from grafos_core import jws, spiffe, token

    keys = jws.Keys()
    for each in published:
        if each.use != "receipt":
            continue
        owner = each.owner
        if owner.startswith(spiffe.SCHEME) and owner.endswith(f"/node/{said.node_id}"):
            owner = token.audience_of(said.node_id, said.incarnation)
        keys.add(jws.RECEIPT, each.key_id, verifier_of(each.public_key), owner=owner)
    return keys


def verifier_of(public_key: bytes) -> Any:
    """Whether a message was signed with this Ed25519 key of 32 bytes; RECEIPT where it is none."""
    from cryptography.exceptions import InvalidSignature  # a slow import, for those who verify
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(public_key)
    except ValueError:
        raise failure.of("RECEIPT", "what was given as a key is none") from None

    def verify(message: bytes, signature: bytes) -> bool:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    return verify
