"""Every refusal of a token is explained by the very code with which it is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core import denial
from grafos_core.denial import FAILED, OK, UNKNOWN, Expected, examine
from grafos_core.jws import LEASE, Keys, mint
from grafos_core.share import Recipient
from grafos_proto.wire import es256
from tests.core import test_share as shares
from tests.core.test_token import (
    AUDIENCE,
    CATALOGUE,
    CLAIMS,
    GOOD,
    ISSUER,
    KEYS,
    NOW_MS,
    SIGNER,
    THUMBPRINT,
    forge,
    verdict,
)  # fmt: skip

NODE = Expected(KEYS, ISSUER, AUDIENCE, THUMBPRINT, NOW_MS)


def code_of(raw: str | bytes, expected: Expected = NODE) -> str:
    refusal = examine(raw, expected).refusal
    return "accepted" if refusal is None else refusal.code


def test_a_good_token_has_an_answer_to_every_question() -> None:
    seen = examine(forge(CLAIMS), NODE)
    assert [each.outcome for each in seen.checks] == [OK] * len(seen.checks)
    names = [each.name for each in seen.checks]
    assert names == ["shape", "key", "signature", "claims", "types", *denial.MEANING]
    assert seen.is_certain
    assert seen.token == GOOD
    assert (seen.header["kid"], seen.claims["lease"]) == ("k1", GOOD.lease_id)


@pytest.mark.parametrize(
    ("raw", "expected"), [pytest.param(raw, code, id=name) for name, raw, code in CATALOGUE]
)
def test_catalogue_k_what_a_node_says_is_the_first_thing_found(raw: bytes, expected: str) -> None:
    assert code_of(raw) == expected


@given(st.data())
def test_whatever_is_changed_the_two_agree(data: st.DataObject) -> None:
    claims = dict(CLAIMS)
    for name in data.draw(st.lists(st.sampled_from(sorted(claims)), max_size=3, unique=True)):
        values: list[Any] = [None, "", 0, -1, NOW_MS - 1, NOW_MS * 2, "someone", 1, {}, [], "0"]
        claims[name] = data.draw(st.sampled_from(values))
    raw = forge(claims)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw = raw[:at] + bytes([raw[at] ^ data.draw(st.integers(1, 255))]) + raw[at + 1 :]
    now_ms = NOW_MS + data.draw(st.sampled_from([-100_000, 0, 29_999, 30_000, 10**9]))
    holder = data.draw(st.sampled_from([THUMBPRINT, "x" * 43]))
    node = replace(NODE, now_ms=now_ms, holder_thumbprint=holder)
    assert code_of(raw, node) == verdict(raw, now_ms=now_ms, holder_thumbprint=holder)


def test_everything_that_is_wrong_is_told_not_the_first_alone() -> None:
    raw = forge(CLAIMS | {"iss": "spiffe://other.local/service/admission"})
    node = replace(NODE, audience="n9/" + "cd" * 16, now_ms=NOW_MS + 10**6, holder_thumbprint="y")
    failed = {each.name: each.code for each in examine(raw, node).checks if each.outcome == FAILED}
    assert failed == {
        "issuer": "TOKEN_ISSUER", "node": "TOKEN_AUDIENCE", "time": "TOKEN_EXPIRED",
        "holder": "HOLDER_MISMATCH",
    }  # fmt: skip


def test_what_cannot_be_asked_is_unknown_and_not_good() -> None:
    seen = examine(forge(CLAIMS), Expected())
    unknown = {each.name for each in seen.checks if each.outcome == UNKNOWN}
    assert unknown == {"key", "signature", "issuer", "node", "time", "holder"}
    assert seen.refusal is None
    assert not seen.is_certain


def test_a_key_that_is_gone_leaves_the_rest_to_be_read() -> None:
    seen = examine(forge(CLAIMS), replace(NODE, keys=Keys()))
    assert (seen.refusal and seen.refusal.code) == "TOKEN_KEY_UNKNOWN"
    assert {each.name: each.outcome for each in seen.checks}["signature"] == UNKNOWN
    assert seen.token == GOOD


def test_a_token_that_contradicts_itself_is_judged_in_the_rest_all_the_same() -> None:
    raw = mint(LEASE, "k1", CLAIMS | {"ttl_ms": 1}, SIGNER.sign)
    node = replace(NODE, holder_thumbprint="z")
    failed = [each.code for each in examine(raw, node).checks if each.outcome == FAILED]
    assert failed == ["TOKEN_TTL", "HOLDER_MISMATCH"]


class TestChains:
    def outcome(self, text: str, **known: Any) -> dict[str, str]:
        seen = denial.examine_chain(text, Expected(**known), es256.verify)
        return {each.name: each.code or each.outcome for each in seen.checks}

    def test_of_a_share_time_and_holder_are_its_own(self) -> None:
        chain = shares.deep(2).text
        found = self.outcome(chain, holder_thumbprint=shares.THUMBS[2], now_ms=shares.NOW_MS)
        assert (found["shares"], found["time"], found["holder"]) == (OK, OK, OK)
        late = self.outcome(chain, holder_thumbprint=shares.THUMBS[1], now_ms=shares.END_MS)
        assert (late["shares"], late["time"]) == (OK, "LEASE_EXPIRED")
        assert late["holder"] == "HOLDER_MISMATCH"

    def test_a_slip_that_does_not_follow_leaves_the_rest_unproved(self) -> None:
        root, first, second = shares.deep(2).text.split("~")
        found = self.outcome(f"{root}~{second}~{first}", now_ms=shares.NOW_MS)
        assert found["shares"] == "TOKEN_CLAIM"
        assert (found["time"], found["holder"]) == (UNKNOWN, UNKNOWN)

    def test_a_root_that_cannot_be_read_ends_it(self) -> None:
        found = self.outcome("a.b.c~d.e.f")
        assert (found["claims"], found["shares"]) == ("TOKEN_ENCODING", UNKNOWN)

    def test_a_share_for_a_name_is_asked_by_name(self) -> None:
        name = "spiffe://grafos.local/tenant/a/holder/bob"
        wish = shares.scope(to=1)
        wish = replace(wish, to=Recipient(name=name))
        chain = shares.minted(shares.start(), wish, 0).text
        at = {"holder_thumbprint": shares.THUMBS[1], "now_ms": shares.NOW_MS}
        assert self.outcome(chain, **at)["holder"] == UNKNOWN
        assert self.outcome(chain, holder_name=name, **at)["holder"] == OK
        assert self.outcome(chain, holder_name=name + "by", **at)["holder"] == "HOLDER_MISMATCH"
