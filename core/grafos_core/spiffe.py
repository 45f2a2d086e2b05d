"""Who somebody is: the name that stands in a certificate, and nothing else.

Every certificate of a fabric names its owner by one address, for instance
`spiffe://grafos.local/service/ledger`. This module reads and writes those addresses.

Rules. An identifier is 1 to 63 characters of `a-z 0-9 -`: so it can be a path segment, a DNS label
and a file name without quoting, and nothing that looks like another identifier can be made of it.
There are exactly four shapes, one per role:

    /tenant/<tenant>/holder/<name>      a program that holds leases
    /node/<id>                          a node agent
    /service/<name>                     admission, ledger, audit, identity
    /operator/<name>                    a person who runs the fabric

The name of a holder that lives on the machine of its fabric has two segments: who started it, and
which process it is, `uid-<n>/<pid>-<start>`. An `Identity` that breaks the rules cannot be made. A
refusal never repeats what was refused: that may be long, or made to mislead whoever reads the log.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from grafos_core import failure

IDENTIFIER_CHARS_MAX = 63
"""What a DNS label may have (RFC 1035, section 2.3.4)."""
TRUST_DOMAIN_CHARS_MAX = 120
"""Leaves room for `<name>.<role>.` in front of it within the 253 characters of a DNS name."""
URI_CHARS_MAX = 512
"""Protects the parser. The longest well-formed id has 335 characters."""
SCHEME = "spiffe://"

_IDENTIFIER = re.compile(r"[a-z0-9-]{1,63}")
_TRUST_DOMAIN = re.compile(r"[a-z0-9-]{1,63}(\.[a-z0-9-]{1,63})*")


class Role(Enum):
    """What a certificate's owner may be to the others."""

    HOLDER = "holder"
    NODE = "node"
    SERVICE = "service"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Identity:
    """One owner of a key. `tenant` is there for holders and for nobody else."""

    trust_domain: str
    role: Role
    tenant: str | None
    name: str
    """One identifier; for a holder on the fabric's own machine two, joined by a slash."""

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        segments = self.name.split("/", 2)
        if len(segments) > (2 if self.role is Role.HOLDER else 1):
            raise failure.of("IDENTIFIER", "a name has too many segments")
        for segment in segments:
            check_identifier(segment, what="name")
        if (self.tenant is None) is (self.role is Role.HOLDER):
            raise failure.of("IDENTIFIER", "a holder has a tenant, and nobody else has one")
        if self.tenant is not None:
            check_identifier(self.tenant, what="tenant")

    def __str__(self) -> str:
        return format_id(self)


def check_identifier(text: str, *, what: str) -> str:
    """Give `text` back if it is an identifier; `what` names the field in the refusal."""
    if len(text) > IDENTIFIER_CHARS_MAX or _IDENTIFIER.fullmatch(text) is None:
        raise failure.of("IDENTIFIER", f"{what}: 1 to 63 characters of a-z, 0-9 and - are allowed")
    return text


def check_trust_domain(text: str) -> str:
    """Give `text` back if it is a trust domain: identifiers joined by dots."""
    if len(text) > TRUST_DOMAIN_CHARS_MAX or _TRUST_DOMAIN.fullmatch(text) is None:
        raise failure.of("IDENTIFIER", "trust domain: identifiers joined by dots are allowed")
    return text


def format_id(identity: Identity) -> str:
    """The address of an identity, as it stands in a certificate."""
    tenant = "" if identity.tenant is None else f"tenant/{identity.tenant}/"
    return f"{SCHEME}{identity.trust_domain}/{tenant}{identity.role.value}/{identity.name}"


def parse_id(text: str) -> Identity:
    """The identity of an address; what this accepts, `format_id` writes back letter for letter."""
    if len(text) > URI_CHARS_MAX or not text.startswith(SCHEME):
        raise failure.of("IDENTIFIER", "not a SPIFFE id")
    trust_domain, *path = text[len(SCHEME) :].split("/")
    match path:
        case ["tenant", tenant, "holder", *name] if 1 <= len(name) <= 2:
            return Identity(trust_domain, Role.HOLDER, tenant, "/".join(name))
        case [("node" | "service" | "operator") as role, name]:
            return Identity(trust_domain, Role(role), None, name)
    raise failure.of("IDENTIFIER", "not the id of a holder, node, service or operator")


def is_below(spiffe_id: str, prefix: str) -> bool:
    """Whether an id begins with these whole segments: user 1 is no beginning of user 10."""
    return not prefix or f"{spiffe_id}/".startswith(f"{prefix.rstrip('/')}/")


def server_name(identity: Identity) -> str:
    """The DNS name under which a node or service proves itself to its callers.

    TLS libraries compare DNS names, not SPIFFE ids, so the certificate carries this one beside the
    id; it is made of the id and therefore says the same. Callers say it as the name they expect.
    """
    if identity.role not in (Role.NODE, Role.SERVICE):
        raise failure.of("IDENTIFIER", "only nodes and services are called by others")
    return f"{identity.name}.{identity.role.value}.{identity.trust_domain}"


def holder_of_process(trust_domain: str, *, uid: int, pid: int, start_ticks: int) -> Identity:
    """The identity of a program on the fabric's own machine, in the tenant that they all share."""
    return Identity(trust_domain, Role.HOLDER, "default", f"uid-{uid}/{pid}-{start_ticks}")


def uid_of_local_holder(identity: Identity) -> int | None:
    """The user behind a name that `holder_of_process` made; None for every other identity."""
    if identity.role is not Role.HOLDER or identity.tenant != "default":
        return None
    found = re.fullmatch(r"uid-(0|[1-9][0-9]{0,9})/[1-9][0-9]*-[0-9]+", identity.name)
    return None if found is None else int(found[1])
