"""A share: a slip by which a holder lets somebody else use a part of what he leases.

Like a tenant who writes a note to the porter: "let her into the left room until noon". The porter
knows the tenant's hand; no landlord is asked. A note may be passed on by another note, and each
lets in to less than the one before it.

    chain    root ~ share ~ share …        at most 8 KiB
    root     the lease token that the holder was given (token.py), signed by admission
    share    a slip in the form of jws.py, signed by whoever the slip before it names

What a share says is judged against the slip before it:

    signer   the key that the parent is for; a share for a name, and not for a key, goes no further
    parent   SHA-256 of the parent as it stands in the chain, and the same lease
    less     no right that the parent has not, no byte beyond its range, no instant after its end
    depth    one more than the parent's, at most 3

Rules. The root is read for what it says; the time in it is for binding, and a share is good as long
as its lease was when it was signed. The header names the signer's public key whole, so that it can
be compared with the parent's claim and needs no look-up; nothing is parsed before its signature is
known. A signature has one form only (its lower half), or strangers could make a second chain of
one that they saw. Whether the lease still lives, and whether a share was ended, is not for the
chain to say: see sharebook.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from grafos_core import failure, jws, spiffe
from grafos_core.failure import FabricError
from grafos_core.jws import SHARE, Sign
from grafos_core.lease import BLOCK_BYTES, Kind
from grafos_core.lessor import principal
from grafos_core.token import LeaseToken

CHAIN_BYTES_MAX: Final = 8192
DEPTH_MAX: Final = 3
SEPARATOR: Final = "~"
OPS: Final = frozenset({"read", "write"})
UNIT_BYTES: Final = {Kind.MEM: 1, Kind.BLOCK: BLOCK_BYTES}
"""Of the kinds that can be shared, what their amounts count."""
ALIGN_BYTES: Final = {Kind.MEM: 8, Kind.BLOCK: BLOCK_BYTES}
"""Where a range may begin: words that several change stay whole in every share of them."""
POINT_BYTES: Final = 65
SIGNATURE_BYTES: Final = 64

_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Of P-256. Source: FIPS 186-4, D.1.2.3."""
_PUBLIC_KEY_HEAD: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
"""What stands before the point in a SubjectPublicKeyInfo on P-256. Source: RFC 5480, 2."""
_HEADER = re.compile(rb'\{"alg":"ES256","kid":"([A-Za-z0-9_-]{87})","typ":"grafos-share\+jwt"\}')
_HASH = re.compile(r"[0-9a-f]{64}")
_THUMBPRINT = re.compile(r"[A-Za-z0-9_-]{43}")
_CLAIMS: Final = frozenset(
    {"cnf", "depth", "exp", "exp_ms", "jti", "lease", "ops", "parent", "range"}
)

VerifyWithKey = Callable[[bytes, bytes, bytes], bool]
"""(public point, message, signature) → whether that key signed it; never raises."""
ReadRoot = Callable[[str], LeaseToken]
"""What the first slip of a chain says; raises where it is not to be believed at this node."""


@dataclass(frozen=True, slots=True)
class Recipient:
    """Whom a slip is for: exactly one of the two is there."""

    key: str = ""
    """Thumbprint of a TLS key: 43 characters."""
    name: str = ""
    """SPIFFE id; of a user of this machine it stands for all of his processes."""

    def is_met_by(self, *, key: str, name: str) -> bool:
        """Whether somebody with this key and name is meant. Nothing here is secret."""
        if self.key:
            return self.key == key
        return self.name in (name, principal(name))

    def __str__(self) -> str:
        return self.key or self.name


@dataclass(frozen=True, slots=True)
class Scope:
    """What a slip lets do."""

    to: Recipient
    ops: tuple[str, ...]
    """Sorted, each once."""
    offset: int
    """In bytes from the beginning of the lease, whatever its kind."""
    length: int
    end_ms: int
    """Wall clock."""

    @property
    def range_end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Share:
    """What one share says."""

    share_id: str
    """128 random bits as hexadecimal digits."""
    parent: str
    """SHA-256 of the slip before it, as hexadecimal digits."""
    lease_id: str
    depth: int
    scope: Scope

    def to_claims(self) -> dict[str, Any]:
        scope = self.scope
        cnf = {"jkt": scope.to.key} if scope.to.key else {"sub": scope.to.name}
        return {
            "cnf": cnf,
            "depth": self.depth,
            "exp": -(-scope.end_ms // 1000),
            "exp_ms": scope.end_ms,
            "jti": self.share_id,
            "lease": self.lease_id,
            "ops": list(scope.ops),
            "parent": self.parent,
            "range": [str(scope.offset), str(scope.length)],
        }

    @staticmethod
    def from_claims(claims: Mapping[str, Any]) -> Share:
        """Exactly these claims, each of exactly its type and within its bounds."""
        jws.exactly(claims, _CLAIMS)
        offset, length = _read_range(claims["range"])
        end_ms = jws.number(claims, "exp_ms")
        if jws.number(claims, "exp") != -(-end_ms // 1000):
            jws.refuse("TOKEN_CLAIM", "exp and exp_ms disagree")
        return Share(
            share_id=jws.text(claims, "jti", jws.HEX_128),
            parent=jws.text(claims, "parent", _HASH),
            lease_id=jws.text(claims, "lease", jws.HEX_128),
            depth=jws.number(claims, "depth", DEPTH_MAX),
            scope=Scope(_read_recipient(claims), _read_ops(claims), offset, length, end_ms),
        )


@dataclass(frozen=True, slots=True)
class Chain:
    """A root and the shares that follow it, each less than the one before."""

    text: str
    root: LeaseToken
    shares: tuple[Share, ...]

    @property
    def scope(self) -> Scope:
        """What the last slip lets do, which is what the chain lets do."""
        return self.shares[-1].scope if self.shares else scope_of(self.root)

    @property
    def lineage(self) -> tuple[str, ...]:
        """Ids of the shares, the holder's own first."""
        return tuple(each.share_id for each in self.shares)

    @property
    def digest(self) -> str:
        """128 bits of a hash of the text: what this very chain is called once it was shown."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Signer:
    """A holder's TLS key, as far as signing needs it."""

    point: bytes
    """Its public key: 4, x, y."""
    sign: Sign
    """(message) → r, s: 64 bytes. ES256 (RFC 7518, section 3.4)."""


def scope_of(root: LeaseToken) -> Scope:
    """What a lease token lets do. Its lease's end counts, and not its own."""
    if root.kind not in UNIT_BYTES:
        raise failure.of("OPTION", f"leases of kind {root.kind} are not shared")
    length = root.amount * UNIT_BYTES[root.kind]
    recipient = Recipient(key=root.holder_thumbprint)
    return Scope(recipient, root.ops, 0, length, root.lease_end_ms)


def digest_of(slip: str) -> str:
    return hashlib.sha256(slip.encode("ascii")).hexdigest()


def thumbprint_of(point: bytes) -> str:
    """SHA-256 of the SubjectPublicKeyInfo, base64url: as lease tokens name keys."""
    found = hashlib.sha256(_PUBLIC_KEY_HEAD + point).digest()
    return jws.to_base64url(found).decode("ascii")


# Giving --------------------------------------------------------------------------------------


def narrowed(chain: Chain, *, share_id: str, scope: Scope) -> Share:
    """The share that may follow `chain`.

    Raises:
        FabricError: it would let do more than the chain does, code `RANGE` or `SCOPE`.
    """
    parent, kind = chain.scope, chain.root.kind
    if not scope.ops or not set(scope.ops) <= OPS or list(scope.ops) != sorted(set(scope.ops)):
        raise failure.of("INVALID", "ops: some of 'read' and 'write', each once")
    if not set(scope.ops) <= set(parent.ops):
        raise failure.of("SCOPE", "a share allows nothing that its giver may not do")
    if not _is_whole(kind, scope) or not _is_within(scope, parent):
        raise failure.of(
            "RANGE",
            f"within bytes {parent.offset} to {parent.range_end}, at multiples of "
            f"{ALIGN_BYTES[kind]}",
        )
    if scope.end_ms > parent.end_ms:
        raise failure.of("RANGE", "ttl: a share ends no later than what it is of; renew that first")
    if len(chain.shares) >= DEPTH_MAX:
        raise failure.of("RANGE", f"a lease is shared {DEPTH_MAX} deep at most")
    if not parent.to.key:
        raise failure.of("SCOPE", "what was given to a name, and not to a key, goes no further")
    last = chain.text.rpartition(SEPARATOR)[2]
    return Share(share_id, digest_of(last), chain.root.lease_id, len(chain.shares) + 1, scope)


def mint(chain: Chain, share: Share, signer: Signer) -> Chain:
    """`chain` and `share` after it."""
    if thumbprint_of(signer.point) != chain.scope.to.key:
        raise failure.of("HOLDER_MISMATCH", "only its holder shares it")
    payload = jws.canonical(share.to_claims())
    if Share.from_claims(jws.parse_canonical(payload)) != share:
        raise failure.of("INVALID", "share")
    message = header(signer.point) + b"." + jws.to_base64url(payload)
    slip = message + b"." + jws.to_base64url(lower(signer.sign(message)))
    text = chain.text + SEPARATOR + slip.decode("ascii")
    if len(text) > CHAIN_BYTES_MAX:
        raise failure.of("TOKEN_ENCODING", f"a chain has at most {CHAIN_BYTES_MAX} characters")
    return Chain(text, chain.root, (*chain.shares, share))


def header(point: bytes) -> bytes:
    """The one header of a share that this key signs, as it stands in the slip."""
    kid = jws.to_base64url(point).decode("ascii")
    return jws.to_base64url(jws.canonical({"alg": "ES256", "kid": kid, "typ": SHARE}))


def lower(signature: bytes) -> bytes:
    """The one of a signature's two forms that is taken."""
    failure.invariant(len(signature) == SIGNATURE_BYTES, "a signature on P-256 has 64 bytes")
    s = int.from_bytes(signature[32:], "big") % _ORDER
    return signature[:32] + min(s, _ORDER - s).to_bytes(32, "big")


def _is_lower(signature: bytes) -> bool:
    return int.from_bytes(signature[32:], "big") <= _ORDER // 2


# Taking --------------------------------------------------------------------------------------


def verify_chain(text: str | bytes, *, read_root: ReadRoot, verify: VerifyWithKey) -> Chain:
    """What a chain says, once each slip in it is proved to follow from the one before.

    Whose it is and whether its time is over is judged by `judge`.
    """
    root_slip, *slips = _split(text)
    root = read_root(root_slip)
    chain = Chain(root_slip, root, ())
    for slip in slips:
        share = Share.from_claims(_proved(slip, chain.scope.to, verify))
        _check_follows(chain, share)
        chain = Chain(chain.text + SEPARATOR + slip, root, (*chain.shares, share))
    return chain


def read_chain(text: str | bytes) -> Chain:
    """What a chain says, believed without proof: for those whose own it is, and to show it."""
    root_slip, *slips = _split(text)
    root = LeaseToken.from_claims(jws.parse_canonical(_segments(root_slip)[1]))
    shares = [Share.from_claims(jws.parse_canonical(_segments(slip)[1])) for slip in slips]
    return Chain(SEPARATOR.join([root_slip, *slips]), root, tuple(shares))


def read_root(token: str) -> Chain:
    """The chain of a holder who has shared nothing yet: his token, which admission gave him."""
    return Chain(token, LeaseToken.from_claims(jws.parse_canonical(_segments(token)[1])), ())


def judge(chain: Chain, *, key: str, name: str, now_ms: int) -> None:
    """Refuse a proved chain that is not for this caller and this moment."""
    if not chain.scope.to.is_met_by(key=key, name=name):
        jws.refuse("HOLDER_MISMATCH")
    if now_ms >= chain.scope.end_ms:
        raise over(chain.root.lease_id, chain.root.epoch)


def over(lease_id: str, epoch: int) -> FabricError:
    """What the holder of a share meets whose time is over."""
    return failure.of("LEASE_EXPIRED", "the share", lease_id=lease_id, epoch=epoch)


def _split(text: str | bytes) -> list[str]:
    """The slips of a chain, if it has the shape of one."""
    if len(text) > CHAIN_BYTES_MAX or not text.isascii():
        jws.refuse("TOKEN_ENCODING", "ASCII, at most 8 KiB")
    slips = (text if isinstance(text, str) else text.decode("ascii")).split(SEPARATOR)
    if len(slips) < 2:
        jws.refuse("TOKEN_ENCODING", "a root, and at least one share")
    if len(slips) > DEPTH_MAX + 1:
        jws.refuse("TOKEN_CLAIM", f"at most {DEPTH_MAX} deep")
    for slip in slips:
        if len(slip) > jws.TOKEN_BYTES_MAX or slip.count(".") != 2:
            jws.refuse("TOKEN_ENCODING", "three segments, at most 4 KiB")
    return slips


def _segments(slip: str) -> list[bytes]:
    segments = jws.as_ascii(slip).split(b".")
    if len(segments) != 3:
        jws.refuse("TOKEN_ENCODING", "three segments")
    return [jws.from_base64url(each) for each in segments]


def _proved(slip: str, signer: Recipient, verify: VerifyWithKey) -> dict[str, Any]:
    """The claims of a share, if it was signed by whom its parent is for."""
    named, payload, signature = _segments(slip)
    found = _HEADER.fullmatch(named)
    if found is None:
        jws.refuse("TOKEN_HEADER")
    point = jws.from_base64url(found[1])
    if len(point) != POINT_BYTES or point[0] != 4:
        jws.refuse("TOKEN_HEADER")
    if thumbprint_of(point) != signer.key:
        jws.refuse("TOKEN_CLAIM", "signed by another key than the one that it was given to")
    if len(signature) != SIGNATURE_BYTES or not _is_lower(signature):
        jws.refuse("TOKEN_SIGNATURE")
    if not verify(point, slip.rpartition(".")[0].encode(), signature):
        jws.refuse("TOKEN_SIGNATURE")
    return jws.parse_canonical(payload)


def _check_follows(chain: Chain, share: Share) -> None:
    """Whether the share lets do no more than what is before it."""
    parent, scope = chain.scope, share.scope
    if share.parent != digest_of(chain.text.rpartition(SEPARATOR)[2]):
        jws.refuse("TOKEN_CLAIM", "of another parent")
    if share.lease_id != chain.root.lease_id:
        jws.refuse("TOKEN_CLAIM", "of another lease")
    if share.depth != len(chain.shares) + 1:
        jws.refuse("TOKEN_CLAIM", "depth")
    if not set(scope.ops) <= set(parent.ops):
        jws.refuse("TOKEN_CLAIM", "more rights than its parent's")
    if not _is_whole(chain.root.kind, scope) or not _is_within(scope, parent):
        jws.refuse("TOKEN_CLAIM", "a range that is not its parent's")
    if scope.end_ms > parent.end_ms:
        jws.refuse("TOKEN_CLAIM", "it ends after its parent")
    if share.share_id in chain.lineage:
        jws.refuse("TOKEN_CLAIM", "an id that its parent has")


def _is_within(scope: Scope, parent: Scope) -> bool:
    return parent.offset <= scope.offset and scope.range_end <= parent.range_end


def _is_whole(kind: Kind, scope: Scope) -> bool:
    """Whether a range is one that leases of this kind can be cut to."""
    unit_bytes = UNIT_BYTES[kind]
    return (
        scope.length > 0
        and scope.length % unit_bytes == 0
        and scope.offset >= 0
        and scope.offset % ALIGN_BYTES[kind] == 0
    )


def _read_recipient(claims: Mapping[str, Any]) -> Recipient:
    cnf = claims["cnf"]
    if type(cnf) is dict and cnf.keys() == {"jkt"}:
        return Recipient(key=jws.text(cnf, "jkt", _THUMBPRINT))
    if type(cnf) is not dict or cnf.keys() != {"sub"}:
        jws.refuse("TOKEN_CLAIM", "cnf")
    return Recipient(name=check_name(jws.text(cnf, "sub")))


def check_name(text: str) -> str:
    """The SPIFFE id of a holder, or of a user of this machine."""
    try:
        found = spiffe.parse_id(text)
    except FabricError:
        jws.refuse("TOKEN_CLAIM", "cnf: not a holder's SPIFFE id")
    if found.role is not spiffe.Role.HOLDER:
        jws.refuse("TOKEN_CLAIM", "cnf: not a holder's SPIFFE id")
    return text


def _read_ops(claims: Mapping[str, Any]) -> tuple[str, ...]:
    ops = claims["ops"]
    if type(ops) is not list or not all(type(op) is str and op in OPS for op in ops):
        jws.refuse("TOKEN_CLAIM", "ops")
    if not ops or ops != sorted(set(ops)):
        jws.refuse("TOKEN_CLAIM", "ops: sorted, each once")
    return tuple(ops)


def _read_range(value: object) -> tuple[int, int]:
    if type(value) is not list or len(value) != 2:
        jws.refuse("TOKEN_CLAIM", "range")
    offset, length = (jws.u64_text(part, "range") for part in value)
    if not length or offset + length >= 1 << 64:
        jws.refuse("TOKEN_CLAIM", "range")
    return offset, length
