"""How a command ends: a status that scripts can rely on, and one line that people understand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from grafos_core.failure import DeadlineExceeded, Denied, FabricError

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
DENIED: Final = 4
TIMEOUT: Final = 5
INTERRUPTED: Final = 130

ADVICE: Final = {
    "UNREACHABLE": "see `grafos status`; start a fabric with `grafos up`",
    "DEADLINE": "see `grafos status` for who is not ready",
    "NOT_READY": "see `grafos status` for the closed gates",
    "ROLE": "operators are the user who ran `grafos up`, and root",
    "CERT_EXPIRED": "check this machine's clock, then try again",
    "NOT_FOUND": "list what there is: `grafos lease list`, `grafos node list`",
    "LIVE_LEASES": "revoke them first: `grafos lease revoke`",
    "JOIN_TOKEN": "make a new one: `grafos node token create <node id>`",
    "RATE": "wait a moment and try again",
    "TOKEN_KEY_UNKNOWN": "its key is replaced or revoked, or another fabric's: get a new one",
    "TOKEN_AUDIENCE": "show it to the node that it names, or get one for this node",
    "TOKEN_EXPIRED": "a token is for binding, within seconds: renew the lease, or acquire anew",
    "TOKEN_IMMATURE": "compare the clocks of holder, admission and node",
    "HOLDER_MISMATCH": "only the holder of its key may show it: attach, or have it shared with you",
    "EPOCH_STALE": "the lease went on under a newer epoch: use that one's token",
    "EPOCH_BURNT": "the lease is over: acquire anew",
    "LEASE_BOUND": "a later token was given out since: use that one",
}


def exit_status(refusal: FabricError) -> int:
    if refusal.code == "NOT_FOUND":
        return NOT_FOUND
    if isinstance(refusal, DeadlineExceeded):
        return TIMEOUT
    return DENIED if isinstance(refusal, Denied) else FAILED


def together(statuses: Iterable[int]) -> int:
    """Of many things: ok if all are; what the others have in common; else that it failed."""
    others = set(statuses) - {OK}
    if not others:
        return OK
    return others.pop() if len(others) == 1 else FAILED


def explained(refusal: FabricError) -> str:
    """The failure in one line."""
    said = " ".join(str(refusal.detail or refusal).split())
    line = f"{type(refusal).__name__} ({refusal.code}): {said}"
    if refusal.incident_id:
        line += f" [incident {refusal.incident_id}]"
    advice = ADVICE.get(refusal.code)
    return f"{line}; {advice}" if advice else line
