"""Addresses of identities: four shapes, and nothing that looks like one of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from grafos_core import spiffe
from grafos_core.failure import Incompatible
from grafos_core.spiffe import Identity, Role

WELL_FORMED = {
    "spiffe://grafos.local/tenant/default/holder/web-1": ("default", Role.HOLDER, "web-1"),
    "spiffe://grafos.local/tenant/t/holder/uid-0/17-4211": ("t", Role.HOLDER, "uid-0/17-4211"),
    "spiffe://a/node/n1": (None, Role.NODE, "n1"),
    "spiffe://a.b.c/service/ledger": (None, Role.SERVICE, "ledger"),
    "spiffe://a/operator/uid-1000": (None, Role.OPERATOR, "uid-1000"),
    f"spiffe://a/node/{'x' * 63}": (None, Role.NODE, "x" * 63),
}
HOSTILE_IDENTIFIERS = {
    "slash": "a/b",
    "NUL": "a\0",
    "right-to-left mark": "a\u200f",
    "10 KiB": "a" * 10_240,
    "64 characters": "a" * 64,
    "lone surrogate": "a\ud800",
    "empty": "",
    "capital": "A",
    "dot": "..",
    "line end": "a\n",
    "percent": "a%2fb",
    "digit of another script": "a\u0663",
    "letter of another script": "\u0430",
}


@pytest.mark.parametrize("text", WELL_FORMED)
def test_a_well_formed_id_is_read_and_written_back_letter_for_letter(text: str) -> None:
    tenant, role, name = WELL_FORMED[text]
    identity = spiffe.parse_id(text)
    assert (identity.tenant, identity.role, identity.name) == (tenant, role, name)
    assert spiffe.format_id(identity) == str(identity) == text


@pytest.mark.parametrize("kind", HOSTILE_IDENTIFIERS)
def test_no_hostile_identifier_passes_anywhere(kind: str) -> None:
    hostile = HOSTILE_IDENTIFIERS[kind]
    refused: list[Callable[[], object]] = [
        lambda: spiffe.check_identifier(hostile, what="node"),
        lambda: spiffe.parse_id(f"spiffe://a/node/{hostile}"),
        lambda: spiffe.parse_id(f"spiffe://a/tenant/{hostile}/holder/x"),
        lambda: Identity("a", Role.SERVICE, None, hostile),
        lambda: Identity("a", Role.HOLDER, hostile, "x"),
    ]
    for attempt in refused:
        with pytest.raises(Incompatible) as refusal:
            attempt()
        assert refusal.value.code == "IDENTIFIER"
        assert len(str(refusal.value)) < 200, "a refusal repeats nothing of what it refuses"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://a/node/n1",
        "spiffe:///node/n1",
        "spiffe://a",
        "spiffe://a/",
        "spiffe://a/node",
        "spiffe://a/node/",
        "spiffe://a/node/n1/",
        "spiffe://a/node/n1/x",
        "spiffe://a/node//n1",
        "spiffe://a/admin/x",
        "spiffe://a/holder/x",
        "spiffe://a/tenant/t/node/x",
        "spiffe://a/tenant/t/holder",
        "spiffe://a/tenant/t/holder/x/y/z",
        "spiffe://a/tenant/t/holder/x/",
        "spiffe://A/node/n1",
        "spiffe://a..b/node/n1",
        "spiffe://user@a/node/n1",
        "spiffe://a:1/node/n1",
        "spiffe://a/node/n1?x",
        "spiffe://a/node/n1#x",
        f"spiffe://{'a.' * 80}a/node/n1",
    ],
)
def test_what_is_not_exactly_one_of_the_four_shapes_is_refused(text: str) -> None:
    with pytest.raises(Incompatible) as refusal:
        spiffe.parse_id(text)
    assert refusal.value.code == "IDENTIFIER"


def test_only_a_holder_has_a_tenant_and_a_second_segment() -> None:
    for tenant, role, name in [
        ("t", Role.NODE, "n1"),
        (None, Role.HOLDER, "x"),
        (None, Role.SERVICE, "a/b"),
        ("t", Role.HOLDER, "a/b/c"),
    ]:
        with pytest.raises(Incompatible):
            Identity("a", role, tenant, name)


def test_the_longest_names_make_a_dns_name_that_dns_allows() -> None:
    domain = ".".join(["d" * 59] * 2)
    name = spiffe.server_name(Identity(domain, Role.SERVICE, None, "n" * 63))
    assert len(name) <= 253
    assert name.startswith("n" * 63 + ".service.d")


def test_holders_and_operators_have_no_server_name() -> None:
    for text in ("spiffe://a/tenant/t/holder/x", "spiffe://a/operator/x"):
        with pytest.raises(Incompatible):
            spiffe.server_name(spiffe.parse_id(text))


def test_the_user_behind_a_local_holder_is_read_from_names_that_we_made_only() -> None:
    made = spiffe.holder_of_process("a", uid=1000, pid=7, start_ticks=99)
    assert str(made) == "spiffe://a/tenant/default/holder/uid-1000/7-99"
    assert spiffe.uid_of_local_holder(made) == 1000
    for other in (
        "spiffe://a/tenant/other/holder/uid-1000/7-99",
        "spiffe://a/tenant/default/holder/uid-1000",
        "spiffe://a/tenant/default/holder/uid-007/7-99",
        "spiffe://a/operator/uid-0",
    ):
        assert spiffe.uid_of_local_holder(spiffe.parse_id(other)) is None
