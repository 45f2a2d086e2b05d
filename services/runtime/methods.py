"""Who may call which method, and what a call of it must bring along.

Rules. A method that changes something needs a deadline, since its caller must know when to ask
again; the others are capped at 30 s, and streams that only listen end with their connection. An
empty body is a mistake, except where every field may be left out. A method that is not in the table
is treated as one that changes something, for services alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from grafos_core.spiffe import Role

DEADLINE_MS_MAX: Final = 660_000
"""Longest wait that Acquire takes, and a minute."""
UNTIMED_MS_MAX: Final = 30_000
ENDLESS_MS: Final = 7 * 86_400_000
"""For streams that listen: their connection's age ends them long before."""


@dataclass(frozen=True, slots=True)
class Method:
    """What one method asks of its callers."""

    roles: frozenset[Role]
    mutates: bool = True
    may_be_empty: bool = False
    deadline_ms_max: int = DEADLINE_MS_MAX


def _writes(*roles: Role) -> Method:
    return Method(frozenset(roles))


def _reads(*roles: Role, empty: bool = False) -> Method:
    return Method(
        frozenset(roles), mutates=False, may_be_empty=empty, deadline_ms_max=UNTIMED_MS_MAX
    )


def _listens(*roles: Role, empty: bool = True) -> Method:
    return Method(frozenset(roles), mutates=False, may_be_empty=empty, deadline_ms_max=ENDLESS_MS)


_H, _N, _S, _O = Role.HOLDER, Role.NODE, Role.SERVICE, Role.OPERATOR
_ADMISSION, _LEDGER = "/grafos.v1.AdmissionService/", "/grafos.v1.LedgerService/"
_NODE, _CONTROL, _AUDIT = (
    "/grafos.v1.NodeService/", "/grafos.v1.NodeControl/", "/grafos.v1.AuditService/",
)  # fmt: skip
_REFLECTION = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

METHODS: Final[Mapping[str, Method]] = {
    _ADMISSION + "Acquire": _writes(_H, _O),
    _ADMISSION + "AcquireBundle": _writes(_H),
    _ADMISSION + "AcquireMany": _writes(_H),
    _ADMISSION + "Attach": _writes(_H),
    _ADMISSION + "Renew": _writes(_H),
    _ADMISSION + "RenewMany": _writes(_H),
    _ADMISSION + "ReleaseMany": _writes(_H),
    _ADMISSION + "Release": _writes(_H, _O),
    _ADMISSION + "Explain": _reads(_H, _O),
    _ADMISSION + "Get": _reads(_H, _O),
    _ADMISSION + "List": _reads(_H, _O, empty=True),
    _ADMISSION + "Watch": _listens(_H, _O),
    _ADMISSION + "Revoke": _writes(_H, _O),
    _ADMISSION + "Keys": _reads(_H, _O, empty=True),
    _LEDGER + "Commit": _writes(_S, _O),
    _LEDGER + "Renew": _writes(_S),
    _LEDGER + "ReportBound": _writes(_N),
    _LEDGER + "Credit": _writes(_N),
    _LEDGER + "Burn": _writes(_S, _O),
    _LEDGER + "Register": _writes(_N),
    _LEDGER + "Watch": _listens(_S, _N, _O),
    _LEDGER + "Get": _reads(_S, _N, _O),
    _LEDGER + "List": _reads(_S, _N, _O, empty=True),
    _LEDGER + "Snapshot": _reads(_S, _N, _O, empty=True),
    _NODE + "Bind": _writes(_H),
    _NODE + "Attach": _writes(_H),
    _NODE + "Extend": _writes(_H),
    _NODE + "Release": _writes(_H),
    _NODE + "Detach": _writes(_H),
    _NODE + "Read": _reads(_H),
    _NODE + "Write": _writes(_H),
    _NODE + "ReadStream": _reads(_H),
    _NODE + "WriteStream": _writes(_H),
    _NODE + "OpenShare": _writes(_H),
    _NODE + "EndShare": _writes(_H),
    _NODE + "ListShares": _reads(_H),
    _NODE + "Notices": _listens(_H, empty=False),
    _CONTROL + "Burn": _writes(_S, _O),
    _CONTROL + "Revoke": _writes(_S, _O),
    _CONTROL + "Clear": _writes(_S, _O),
    _CONTROL + "Probe": _reads(_S, _O),
    _CONTROL + "ListLeases": _reads(_S, _O, empty=True),
    _AUDIT + "Append": _writes(_N, _S),
    _AUDIT + "Head": _reads(_N, _S, _O, empty=True),
    _AUDIT + "Export": _reads(_S, _O, empty=True),
    "/grpc.health.v1.Health/Check": _reads(*Role, empty=True),
    "/grpc.health.v1.Health/List": _reads(*Role, empty=True),
    "/grpc.health.v1.Health/Watch": _listens(*Role),
    "/" + _REFLECTION: _reads(_S, _O),
}

UNLISTED: Final = Method(frozenset({Role.SERVICE}))
