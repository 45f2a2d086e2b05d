"""Mints the tokens with which a node is bound: for one lease, one node, one key, 30 seconds."""

from __future__ import annotations

import secrets
from typing import Final

from grafos_core import failure, token
from grafos_core.lease import TOKEN_MS_DEFAULT, Lease, LeaseState
from grafos_core.token import LeaseToken
from services.runtime.signing import SigningKey

OPERATIONS: Final = ("read", "write")


class Minter:
    def __init__(self, issuer: str, key: SigningKey) -> None:
        self._issuer, self.key = issuer, key
        """The key may be replaced at any time by another thread."""

    @property
    def key_id(self) -> str:
        return self.key.key_id

    def mint(self, lease: Lease, now_ms: int) -> tuple[str, int]:
        """The token, and how many ms it lives. It never outlives the lease, nor the time after
        which the ledger burns what was not bound."""
        expires_ms = min(now_ms + TOKEN_MS_DEFAULT, lease.end_ms)
        if lease.state is LeaseState.PENDING:
            expires_ms = min(expires_ms, lease.bind_by_ms)
        if expires_ms <= now_ms:
            raise failure.of("LEASE_EXPIRED", lease_id=lease.lease_id, epoch=lease.epoch)
        claims = LeaseToken(
            issuer=self._issuer,
            subject=lease.holder,
            audience=token.audience_of(lease.node_id, lease.incarnation),
            jti=secrets.token_hex(16),
            iat_ms=now_ms,
            nbf_ms=now_ms,
            exp_ms=expires_ms,
            holder_thumbprint=lease.holder_key,
            lease_id=lease.lease_id,
            kind=lease.kind,
            amount=lease.amount,
            extent_offset=lease.extent_offset,
            ops=OPERATIONS,
            epoch=lease.epoch,
            generation=lease.generation,
            ttl_ms=lease.ttl_ms,
            lease_end_ms=lease.end_ms,
            lifetime_end_ms=lease.lifetime_end_ms,
            policy=lease.policy,
        ).to_claims()
        key = self.key
        if lease.key_ids and key.key_id not in lease.key_ids:
            why = "the signing key has changed since the ledger wrote down which it would be"
            raise failure.of("RETRY_LATER", why, lease_id=lease.lease_id, retry_after_ms=100)
        text = token.mint(token.LEASE, key.key_id, claims, key.sign)
        return text, expires_ms - now_ms
