"""Who gets which certificate: the rules behind the identity socket and the join listener.

    asked by                                      gets
    a local program                               /tenant/default/holder/uid-<n>/<pid>-<start>
    the fabric's own user or root, want=operator  /operator/uid-<n>
    a process that shows a spawn secret           what its supervisor made the secret for
    a machine that shows a join token             /node/<the id in the token>
    the owner of a certificate in force           the same again, over the same key

Rules. Nobody is asked who he is: the kernel says it of local programs, and everything else is
proved by a secret that works once or by a key. A secret is used up before the signature is made,
and stored only as a hash. No secret, key or certificate reaches a log or a failure's text.
Everything that grows has a limit, and everybody has a rate.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass

from grafos._authority import LEAF_TTL_MS_DEFAULT, Authority
from grafos_core import failure, spiffe
from grafos_core.spiffe import Identity, Role
from grafos_proto.wire import certificates
from grafos_proto.wire.identity import VERSION, Message

SPAWNED_MAX = 64
SPAWN_TTL_MS = 30_000
"""A service that has not asked after half a minute hangs, and is started again with another one."""
PEERS_MAX = 1_024
"""Users and addresses whose rate is remembered; whoever was heard of longest ago is forgotten."""


@dataclass(frozen=True, slots=True)
class LocalPeer:
    """A program on this machine, as the kernel names it."""

    uid: int
    pid: int
    start_ticks: int


class Rate:
    """Lets each peer ask `burst` times at once, and then `per_s` times a second."""

    def __init__(self, *, burst: int, per_s: float) -> None:
        self._burst, self._per_s = float(burst), per_s
        self._left: dict[str, tuple[float, int]] = {}

    def take(self, peer: str, elapsed_ms: int) -> None:
        """Count one attempt, or refuse it and say when the next one is welcome."""
        left, seen_ms = self._left.pop(peer, (self._burst, elapsed_ms))
        left = min(self._burst, left + (elapsed_ms - seen_ms) / 1000 * self._per_s)
        allowed = left >= 1
        self._left[peer] = (left - 1 if allowed else left, elapsed_ms)
        if len(self._left) > PEERS_MAX:
            del self._left[next(iter(self._left))]
        if not allowed:
            wait_ms = int((1 - left) / self._per_s * 1000) + 1
            raise failure.of("RATE", "identity requests", retry_after_ms=wait_ms)


class IdentityIssuer:
    """Answers the questions of local programs and of machines that join."""

    def __init__(
        self, authority: Authority, *, operator_uid: int, leaf_ttl_ms: int = LEAF_TTL_MS_DEFAULT
    ) -> None:
        self.authority = authority
        self._operator_uid, self._leaf_ttl_ms = operator_uid, leaf_ttl_ms
        self._spawned: dict[str, tuple[Identity, int]] = {}
        self._local_rate = Rate(burst=200, per_s=100)
        self._remote_rate = Rate(burst=20, per_s=1)

    def expect(self, role: Role, name: str, *, elapsed_ms: int) -> str:
        """A secret by which a process that is being started becomes this service or node, once.

        `elapsed_ms` is of any clock that does not go back. Hand it over by `spawn_pipe`.
        """
        if role not in (Role.SERVICE, Role.NODE):
            raise failure.of("ROLE", "only services and nodes are started with a secret")
        self._forget_unused(elapsed_ms)
        if len(self._spawned) >= SPAWNED_MAX:
            raise failure.of("RATE", "too many processes are being started")
        identity = Identity(self.authority.trust_domain, role, None, name)
        secret = secrets.token_hex(32)
        self._spawned[_digest(secret)] = (identity, elapsed_ms + SPAWN_TTL_MS)
        return secret

    def answer_local(
        self, peer: LocalPeer, request: Message, *, now_ms: int, elapsed_ms: int
    ) -> Message:
        """The answer to a program on this machine."""
        self._local_rate.take(str(peer.uid), elapsed_ms)
        match request:
            case {"op": "issue", "csr": str(csr), **rest}:
                identity = self._identity_for(peer, rest, elapsed_ms)
            case {"op": "renew", "csr": str(csr)}:
                identity = self._renewed(request, now_ms)
                if spiffe.uid_of_local_holder(identity) not in (None, peer.uid):
                    raise failure.of("HOLDER_MISMATCH", "another user's certificate")
            case _:
                raise failure.of("INVALID", "the identity socket does not know this question")
        return self._signed(csr, identity, now_ms)

    def answer_remote(
        self, address: str, request: Message, *, now_ms: int, elapsed_ms: int
    ) -> Message:
        """The answer to another machine. Only `root` is told to anybody: it is no secret."""
        self._remote_rate.take(address, elapsed_ms)
        match request:
            case {"op": "root"}:
                return {"v": VERSION, "bundle": self.authority.bundle_pem.decode("ascii")}
            case {"op": "join", "csr": str(csr), "token": str(token)}:
                identity = self._joined(csr, token, now_ms)
            case {"op": "renew", "csr": str(csr)}:
                identity = self._renewed(request, now_ms)
                if (
                    identity.role is Role.OPERATOR
                    or spiffe.uid_of_local_holder(identity) is not None
                ):
                    raise failure.of("ROLE", "this identity is renewed on the fabric's machine")
            case _:
                raise failure.of("INVALID", "the join listener does not know this question")
        return self._signed(csr, identity, now_ms)

    def _identity_for(self, peer: LocalPeer, rest: Message, elapsed_ms: int) -> Identity:
        trust_domain = self.authority.trust_domain
        match rest:
            case {"secret": str(secret)}:
                return self._spawned_identity(secret, elapsed_ms)
            case {"want": "operator"}:
                if peer.uid not in (0, self._operator_uid):
                    raise failure.of("ROLE", "only the fabric's own user and root operate it")
                return Identity(trust_domain, Role.OPERATOR, None, f"uid-{peer.uid}")
            case {"want": _} | {"secret": _}:
                raise failure.of("INVALID", "only the role of an operator can be asked for")
        return spiffe.holder_of_process(
            trust_domain, uid=peer.uid, pid=peer.pid, start_ticks=peer.start_ticks
        )

    def _spawned_identity(self, secret: str, elapsed_ms: int) -> Identity:
        self._forget_unused(elapsed_ms)
        found = self._spawned.pop(_digest(secret), None)
        if found is None:
            raise failure.of("DENIED", "the secret is unknown, used or too old")
        return found[0]

    def _forget_unused(self, elapsed_ms: int) -> None:
        for digest in [key for key, (_, end) in self._spawned.items() if end <= elapsed_ms]:
            del self._spawned[digest]

    def _joined(self, csr: str, token: str, now_ms: int) -> Identity:
        """The request is checked first, so that a clumsy one does not cost the token."""
        certificates.requested_key(csr.encode())
        node_id = self.authority.tokens.consume(token, pin=self.authority.pin, now_ms=now_ms)
        return Identity(self.authority.trust_domain, Role.NODE, None, node_id)

    def _renewed(self, request: Message, now_ms: int) -> Identity:
        match request:
            case {"csr": str(csr), "chain": str(chain), "proof": str(proof)}:
                try:
                    signature = bytes.fromhex(proof)
                except ValueError:
                    raise failure.of("ENCODING", "the proof is not hexadecimal") from None
                return self.authority.check_renewal(
                    csr.encode(), chain.encode(), signature, now_ms=now_ms
                )
        raise failure.of("INVALID", "a renewal shows the certificate and proves its key")

    def _signed(self, csr: str, identity: Identity, now_ms: int) -> Message:
        chain = self.authority.sign_request(
            csr.encode(), identity, ttl_ms=self._leaf_ttl_ms, now_ms=now_ms
        )
        bundle = self.authority.bundle_pem.decode("ascii")
        return {"v": VERSION, "chain": chain.decode("ascii"), "bundle": bundle}


def spawn_pipe(secret: str) -> int:
    """A descriptor to be inherited by the process that is being started; close it after the start.

    Give it to `subprocess` as one of `pass_fds`, and its number as a flag: a number is no secret.
    """
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(secret.encode("ascii"))
    return reading


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
