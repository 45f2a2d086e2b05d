"""Whose signatures this node believes: the keys that the ledger publishes, as of its last answer.

Rules. Tokens are admission's to sign, clear orders an operator's, or the ledger's on his behalf; a
key with another owner is not taken for either purpose. A key past its end is as one never known.
The whole set is replaced at once, so that no reader sees half of it. Tokens whose signature was
found good are remembered until their lease is over, and forgotten when the set of keys changes.
A key is unknown for certain only when a list that came after the question does not have it: until
then the answer is "ask again". Lists are asked for at most once a second, whoever comes with what.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Final

from grafos_core import failure, jws, receipt, spiffe, token
from grafos_core.failure import FabricError
from grafos_core.receipt import ClearOrder
from grafos_core.spiffe import Identity, Role
from grafos_core.token import LeaseToken, VerifiedCache
from grafos_proto.v1 import lease_pb2
from services.runtime import signing

CACHED_MAX: Final = 8_192
STRANGERS_MAX: Final = 256
"""Unknown keys that are remembered; of one that gave way the next list is waited for once more."""
ASK_MS: Final = 1_000
AGAIN_MS: Final = 100
"""A list comes in a few milliseconds."""
_PURPOSES: Final = {"lease": jws.LEASE, "clear": jws.CLEAR}

PublishedKey = tuple[str, str, str, bytes]
"""Use, key id, owner, public key."""


class TrustedKeys:
    """Read from any thread, replaced by one."""

    def __init__(self, trust_domain: str, audience: str) -> None:
        self._issuer = str(Identity(trust_domain, Role.SERVICE, None, "admission"))
        self._trust_domain, self._audience = trust_domain, audience
        self._known: frozenset[PublishedKey] = frozenset()
        self._keys = jws.Keys()
        self._cache = VerifiedCache(CACHED_MAX)
        self._lock = threading.Lock()
        self._revoked: frozenset[str] = frozenset()
        self._lists = 0
        """How many have come."""
        self._strangers: OrderedDict[bytes, int] = OrderedDict()
        """How many had come when this unknown key was met first."""
        self._asked_ms = 0
        self.ask_for_list: Callable[[], None] = lambda: None
        """Called when a fresh one is wanted; returns at once."""

    def replace(
        self,
        published: Iterable[lease_pb2.VerificationKey],
        now_ms: int,
        revoked: Iterable[str] = (),
    ) -> None:
        """From now on these and no others; what `revoked` keys have signed is refused as that."""
        self._revoked = frozenset(revoked)
        self._replace(published, now_ms)
        with self._lock:
            self._lists += 1  # after they are in force: who counts on them finds them

    def _replace(self, published: Iterable[lease_pb2.VerificationKey], now_ms: int) -> None:
        known = frozenset(
            (key.use, key.key_id, key.owner, key.public_key)
            for key in published
            if key.use in _PURPOSES and not 0 < key.not_after_ms <= now_ms
        )
        if known == self._known:
            return
        keys = jws.Keys()
        for use, key_id, owner, public_key in known:
            if self._may_sign(use, owner) and len(public_key) == signing.PUBLIC_KEY_BYTES:
                keys.add(_PURPOSES[use], key_id, signing.verifier(public_key), owner=owner)
        self._keys, self._cache, self._known = keys, VerifiedCache(CACHED_MAX), known

    def accept(self, text: str, holder_thumbprint: str, now_ms: int) -> LeaseToken:
        """A token that is for this node, this moment and this holder."""
        with self._told_why(text, now_ms):
            return token.accept(
                text,
                self._keys,
                issuer=self._issuer,
                audience=self._audience,
                holder_thumbprint=holder_thumbprint,
                now_ms=now_ms,
                cache=self._cache,
            )

    def prove_root(self, text: str, now_ms: int) -> None:
        """A token with which a chain of shares begins: admission's, for this node. Whether it may
        still bind is no matter, nor whose it is: what was bound is held against what it says."""
        with self._told_why(text, now_ms):
            read = LeaseToken.from_claims(jws.verify(text, jws.LEASE, self._keys))
        if read.issuer != self._issuer:
            raise failure.of("TOKEN_ISSUER")
        if read.audience != self._audience:
            raise failure.of("TOKEN_AUDIENCE")

    @contextmanager
    def _told_why(self, text: str, now_ms: int) -> Generator[None, None, None]:
        """A key that is not known may be revoked, or not known yet."""
        try:
            yield
        except FabricError as refusal:
            if refusal.code == "TOKEN_KEY_UNKNOWN" and self._revoked:
                self._refuse_revoked(text, refusal)
            if refusal.code == "TOKEN_KEY_UNKNOWN" and not self._is_certain(text, now_ms):
                raise failure.of(
                    "RETRY_LATER", "the keys are being fetched", retry_after_ms=AGAIN_MS
                ) from refusal
            raise

    def _refuse_revoked(self, text: str, refusal: FabricError) -> None:
        """Nobody's signature is checked for this: who names such a key is refused in any case."""
        header = jws.parse_canonical(jws.from_base64url(text.encode().partition(b".")[0]))
        if header.get("kid") in self._revoked:
            raise failure.of("REVOKED", "the key that signed the token is revoked") from refusal

    def _is_certain(self, text: str, now_ms: int) -> bool:
        """Whether a list that came after this key was met first does not have it."""
        header = hashlib.sha256(text.partition(".")[0].encode()).digest()
        with self._lock:
            met = self._strangers.setdefault(header, self._lists)
            while len(self._strangers) > STRANGERS_MAX:
                self._strangers.popitem(last=False)
            if met < self._lists:
                return True
            ask = abs(now_ms - self._asked_ms) >= ASK_MS
            if ask:
                self._asked_ms = now_ms
        if ask:
            self.ask_for_list()
        return False

    def clear_order(self, text: str) -> ClearOrder:
        return receipt.verify_clear(text, self._keys)

    def count(self) -> int:
        return len(self._known)

    def _may_sign(self, use: str, owner: str) -> bool:
        if use == "lease":
            return owner == self._issuer
        try:
            identity = spiffe.parse_id(owner)
        except FabricError:
            return False
        known = (identity.role, identity.name) == (Role.SERVICE, "ledger")
        may_sign = known or identity.role is Role.OPERATOR
        return may_sign and identity.trust_domain == self._trust_domain
