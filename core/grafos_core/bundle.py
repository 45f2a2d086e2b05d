"""Several leases that are granted all together or not at all.

A bundle is one request with several members, each of a kind, amount and node of its own. Once it is
granted its leases are like any others; nothing ties them together but that they began together.

Rules. One tenant and one holder. Each member has a request id that follows from the bundle's, so
that a retried bundle is answered with the leases that it was granted, and a bundle of another
content under the same id is refused. A refusal names the member, in `details["member"]`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Final

from grafos_core import failure
from grafos_core.commands import GrantBundle
from grafos_core.failure import FabricError
from grafos_core.lease import LeaseId, TenantId, check_request_id

MEMBERS_MAX: Final = 16
"""A bundle and its answer fit into one message, and its events below one seal."""
REQUEST_ID_CHARS_MAX: Final = 60
"""What is put behind it has to fit as well."""
_OTHER: Final = "the request id was used before, for something else"


def check_id(request_id: str) -> str:
    check_request_id(request_id)
    if len(request_id) > REQUEST_ID_CHARS_MAX:
        raise failure.of("IDENTIFIER", f"a bundle's: at most {REQUEST_ID_CHARS_MAX} characters")
    return request_id


def member_id(request_id: str, index: int) -> str:
    """The request id of one member."""
    return f"{request_id}.{index}"


def check_count(count: int) -> None:
    if count == 0:
        raise failure.of("EMPTY", "a bundle has members")
    if count > MEMBERS_MAX:
        raise failure.of("RANGE", f"members: at most {MEMBERS_MAX}")


def check(ask: GrantBundle) -> None:
    """The shape; what each member asks for is judged with it."""
    check_id(ask.request_id)
    check_count(len(ask.grants))
    first = ask.grants[0]
    for index, grant in enumerate(ask.grants):
        if grant.request_id != member_id(ask.request_id, index):
            raise failure.of("INVALID", "a member's request id follows from its bundle's")
        if (grant.tenant, grant.holder) != (first.tenant, first.holder):
            raise failure.of("INVALID", "all members are for one holder")
    if len({grant.lease_id for grant in ask.grants}) < len(ask.grants):
        raise failure.of("PRECONDITION", "two members have one lease id")


def granted_before(
    ask: GrantBundle, requests: Mapping[tuple[TenantId, str], LeaseId]
) -> list[LeaseId]:
    """The leases that this request was granted, in order; empty: it is new."""
    tenant, count = ask.grants[0].tenant, len(ask.grants)
    ids = [member_id(ask.request_id, index) for index in range(count + 1)]
    known = [requests.get((tenant, each)) for each in ids]
    found = [lease_id for lease_id in known if lease_id is not None]
    if found and (len(found) != count or known[-1] is not None):
        raise other_content()
    return found


def other_content() -> FabricError:
    return failure.of("PRECONDITION", _OTHER)


@contextmanager
def named(index: int, what: str) -> Generator[None, None, None]:
    """A refusal that is raised inside names this member."""
    try:
        yield
    except FabricError as refused:
        raise of_member(refused, index, what) from refused


def of_member(refused: FabricError, index: int, what: str) -> FabricError:
    """The same refusal, and whose it is."""
    fields = refused.fields()
    fields["detail"] = f"member {index} ({what}): {refused.detail or refused.code}"
    fields["details"] = {**refused.details, "member": str(index)}
    return failure.from_fields(type(refused).__name__, fields)


def member_of(refused: FabricError) -> int | None:
    """Whose refusal it is; None: nobody's in particular."""
    number = refused.details.get("member", "")
    return int(number) if number.isdecimal() else None
