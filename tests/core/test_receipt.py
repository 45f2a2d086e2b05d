"""Receipts and clear orders: believed only as the very node, or operator, wrote them."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core import jws, receipt
from grafos_core.failure import FabricError
from grafos_core.lease import EndCause, Kind
from grafos_core.receipt import Assurance, Cleared, ClearOrder, Outcome, TeardownReceipt
from grafos_core.token import audience_of

INCARNATION = "4f" * 16
OPERATOR = "spiffe://grafos.local/operator/ann"
NOW_MS = 1_800_000_000_000
GOOD = TeardownReceipt(
    lease_id="01" * 16,
    node_id="node-1",
    incarnation=INCARNATION,
    boot_epoch=3,
    kind=Kind.BLOCK,
    epoch=2**64 - 2,
    amount=16,
    extent_offset=2**40,
    cause=EndCause.AGENT_LOST,
    outcome=Outcome.TORNDOWN,
    assurance=Assurance.FREED,
    measured={"blocks": 0, "zeros_read": True, "by": "st_blocks", "delta": -1},
    begin_ms=NOW_MS,
    end_ms=NOW_MS + 5,
    duration_us=4711,
    record_number=2**63 - 1,
    record_hash="ab" * 32,
)
ORDER = ClearOrder(
    lease_id="01" * 16,
    node_id="node-1",
    incarnation=INCARNATION,
    epoch=7,
    nonce="cd" * 16,
    exp_ms=NOW_MS + 60_000,
    reason='the disk was replaced, "cage" 7, Grüße',
    operator=OPERATOR,
    accept_residue=True,
)


def signer(secret: bytes) -> jws.Sign:
    return lambda message: hashlib.sha512(secret + message).digest()


def verifier(secret: bytes) -> jws.VerifySignature:
    return lambda message, signature: signer(secret)(message) == signature


def keys_in_force() -> jws.Keys:
    keys = jws.Keys()
    for node, secret in (("node-1", b"1"), ("node-2", b"2")):
        owner = audience_of(node, INCARNATION)
        keys.add(jws.RECEIPT, node, verifier(secret), owner=owner)
    keys.add(jws.RECEIPT, "node-1-new", verifier(b"n"), owner=audience_of("node-1", "50" * 16))
    keys.add(jws.CLEAR, "ann", verifier(b"a"), owner=OPERATOR)
    keys.add(jws.CLEAR, "bob", verifier(b"b"), owner="spiffe://grafos.local/operator/bob")
    return keys


KEYS = keys_in_force()


def refusal(text: str | bytes) -> tuple[str, str]:
    with pytest.raises(FabricError) as refused:
        receipt.verify(text, KEYS)
    return refused.value.code, refused.value.detail


def clear_refusal(text: str | bytes) -> tuple[str, str]:
    with pytest.raises(FabricError) as refused:
        receipt.verify_clear(text, KEYS)
    return refused.value.code, refused.value.detail


def forge(claims: dict[str, Any], typ: str = jws.RECEIPT, kid: str = "node-1") -> str:
    secret = {"node-1": b"1", "ann": b"a"}[kid]
    return jws.mint(typ, kid, claims, signer(secret))


def with_outcome(outcome: Outcome, cleared: Cleared | None = None) -> TeardownReceipt:
    if outcome is Outcome.CLEARED and cleared is None:
        cleared = Cleared.OPERATOR
    unproved = outcome is Outcome.FENCED or cleared is Cleared.RESIDUE
    assurance = Assurance.NONE if unproved else Assurance.FREED
    return dataclasses.replace(GOOD, outcome=outcome, cleared=cleared, assurance=assurance)


@pytest.mark.parametrize("cleared", Cleared)
def test_a_cleared_receipt_says_on_whose_word_for_ever(cleared: Cleared) -> None:
    made = with_outcome(Outcome.CLEARED, cleared)
    read = receipt.verify(receipt.mint(made, "node-1", signer(b"1")), KEYS)
    assert (read.cleared, read.frees) == (cleared, True)


@pytest.mark.parametrize(
    "claims",
    [
        {"outcome": "cleared"},
        {"outcome": "cleared", "cleared": "somebody"},
        {"outcome": "cleared", "cleared": ""},
        {"outcome": "torndown", "cleared": "operator"},
        {"outcome": "fenced", "assurance": "none", "cleared": "policy"},
    ],
)
def test_whose_word_it_was_is_said_of_a_clear_and_of_nothing_else(claims: dict[str, Any]) -> None:
    assert refusal(forge(GOOD.to_claims() | claims)) == ("RECEIPT", "TOKEN_CLAIM")


@pytest.mark.parametrize(
    "claims",
    [
        {"outcome": "fenced", "assurance": "freed"},
        {"outcome": "torndown", "assurance": "none"},
        {"outcome": "cleared", "cleared": "residue", "assurance": "detached"},
        {"outcome": "cleared", "cleared": "policy", "assurance": "none"},
    ],
)
def test_nothing_is_promised_of_what_was_not_measured_clean(claims: dict[str, Any]) -> None:
    """And a receipt that says so of what was is no receipt either."""
    assert refusal(forge(GOOD.to_claims() | claims)) == ("RECEIPT", "TOKEN_CLAIM")


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("kind", Kind)
def test_a_receipt_is_read_as_it_was_signed(kind: Kind, outcome: Outcome) -> None:
    offset = 8 if kind.has_extents else 0
    made = dataclasses.replace(with_outcome(outcome), kind=kind, extent_offset=offset)
    assert receipt.verify(receipt.mint(made, "node-1", signer(b"1")), KEYS) == made
    assert made.frees == (outcome is not Outcome.FENCED)
    assert made.extent_length == (16 if kind.has_extents else 0)


def test_a_receipt_can_be_signed_again_with_the_next_key() -> None:
    keys = jws.Keys()
    keys.add(jws.RECEIPT, "k2", verifier(b"k2"), owner=audience_of("node-1", INCARNATION))
    assert receipt.verify(receipt.mint(GOOD, "k2", signer(b"k2")), keys) == GOOD


def test_catalogue_g10_a_forged_receipt_or_one_of_another_node_is_refused() -> None:
    forged = receipt.mint(GOOD, "node-1", signer(b"x"))
    assert refusal(forged) == ("RECEIPT", "TOKEN_SIGNATURE")
    of_neighbour = receipt.mint(GOOD, "node-2", signer(b"2"))
    assert refusal(of_neighbour) == ("RECEIPT", "signed by another node's key")
    of_wiped_node = receipt.mint(GOOD, "node-1-new", signer(b"n"))
    assert refusal(of_wiped_node) == ("RECEIPT", "signed by another node's key")
    as_clear_order = forge(GOOD.to_claims(), jws.CLEAR, "ann")
    assert refusal(as_clear_order) == ("RECEIPT", "TOKEN_HEADER")
    assert refusal(receipt.mint(GOOD, "gone", signer(b"1"))) == ("RECEIPT", "TOKEN_KEY_UNKNOWN")
    assert refusal("") == ("RECEIPT", "TOKEN_ENCODING")


@pytest.mark.parametrize("name", sorted(GOOD.to_claims()))
def test_every_claim_of_a_receipt_must_be_there_and_be_of_its_type(name: str) -> None:
    claims = GOOD.to_claims()
    short = {key: value for key, value in claims.items() if key != name}
    assert refusal(forge(short)) == ("RECEIPT", "TOKEN_CLAIM")
    wrong: Any
    for wrong in (None, True, -1, "", "\x00", ["a"], {"a": []}, "x" * 600, 2**53):
        assert refusal(forge(claims | {name: wrong})) == ("RECEIPT", "TOKEN_CLAIM")
    assert refusal(forge(claims | {"more": 1})) == ("RECEIPT", "TOKEN_CLAIM")


@pytest.mark.parametrize("epoch", ["0", str(2**64 - 1), str(2**64), "07"])
def test_an_epoch_out_of_range_is_in_no_receipt_or_order(epoch: str) -> None:
    assert refusal(forge(GOOD.to_claims() | {"epoch": epoch}))[0] == "RECEIPT"
    order = forge(ORDER.to_claims() | {"epoch": epoch}, jws.CLEAR, "ann")
    assert clear_refusal(order)[0] == "CLEAR"


@pytest.mark.parametrize(
    "measured",
    [
        {"UPPER": 1},
        {"": 1},
        {"a": 2**53},
        {"a": None},
        {"a": []},
        {"a": "x" * 129},
        {"a": "\n"},
        {f"m{i}": i for i in range(25)},
    ],
)
def test_measurements_are_few_and_plain(measured: dict[str, Any]) -> None:
    claims = GOOD.to_claims() | {"measured": measured}
    assert refusal(forge(claims)) == ("RECEIPT", "TOKEN_CLAIM")


@given(
    st.dictionaries(
        st.text("abc_9", min_size=1, max_size=32),
        st.booleans()
        | st.integers(-jws.SAFE_INT_MAX, jws.SAFE_INT_MAX)
        | st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="[{")),
        max_size=receipt.MEASURED_COUNT_MAX,
    ).filter(lambda measured: len(str(measured)) < 1_000)
)
def test_any_measurement_within_bounds_is_carried(measured: dict[str, int | str | bool]) -> None:
    made = dataclasses.replace(GOOD, measured=measured)
    assert receipt.verify(receipt.mint(made, "node-1", signer(b"1")), KEYS) == made


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("erase: IO: EIO", "erase: IO: EIO"),
        ("of äther", "of ?ther"),
        ("one two three four five", "one two three ..."),
        ("one two threefourfivesix", "one two ..."),
        ("onetwothreefourfivesixseven", "onetwothreefourf ..."),
        ("one two three four EIO five", "one two ... EIO"),
        ("one EBADF three four ENOMEM", "one EBADF ... ENOMEM"),
        ("one two EUROPE three EACCES", "one two ... EACCES"),
    ],
)
def test_what_does_not_fit_is_cut_at_a_word_and_its_error_is_kept(text: str, told: str) -> None:
    assert receipt.shortened(text, 20) == told


@given(st.text(max_size=300), st.integers(min_value=24, max_value=128))
def test_whatever_is_shortened_fits_and_is_plain(text: str, chars_max: int) -> None:
    found = receipt.shortened(text, chars_max)
    assert len(found) <= chars_max
    assert re.fullmatch("[ -~]*", found)
    if len(text) > chars_max:
        assert " ..." in found


def test_every_changed_byte_of_a_receipt_or_order_is_refused() -> None:
    good = receipt.mint(GOOD, "node-1", signer(b"1")).encode()
    order = receipt.mint_clear(ORDER, "ann", signer(b"a")).encode()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        assert refusal(bytes(bad))[0] == "RECEIPT"
    for at in range(len(order)):
        bad = bytearray(order)
        bad[at] ^= 1
        assert clear_refusal(bytes(bad))[0] == "CLEAR"


def test_a_clear_order_is_read_as_it_was_signed() -> None:
    text = receipt.mint_clear(ORDER, "ann", signer(b"a"))
    assert receipt.verify_clear(text, KEYS) == ORDER


def test_catalogue_g11_an_order_without_its_parts_or_by_another_is_refused() -> None:
    by_another = receipt.mint_clear(ORDER, "bob", signer(b"b"))
    assert clear_refusal(by_another) == ("CLEAR", "signed by another operator's key")
    claims = ORDER.to_claims()
    for name in claims:
        short = {key: value for key, value in claims.items() if key != name}
        assert clear_refusal(forge(short, jws.CLEAR, "ann")) == ("CLEAR", "TOKEN_CLAIM")
        wrong: Any
        for wrong in (None, -1, "\x00", "x" * 600, [], {}):
            text = forge(claims | {name: wrong}, jws.CLEAR, "ann")
            assert clear_refusal(text) == ("CLEAR", "TOKEN_CLAIM")
    assert clear_refusal(forge(GOOD.to_claims())) == ("CLEAR", "TOKEN_HEADER")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"node_id": "node-2"}, "for another node"),
        ({"incarnation": "50" * 16}, "for another node"),
        ({"lease_id": "02" * 16}, "for another lease"),
        ({"epoch": 8}, "for another lease"),
        ({"nonce": ""}, "the nonce was not given out, or is used"),
        ({"nonce": "ce" * 16}, "the nonce was not given out, or is used"),
        ({"now_ms": ORDER.exp_ms}, "expired"),
        ({"now_ms": ORDER.exp_ms - 300_501}, "expires too late"),
    ],
)
def test_catalogue_g11_an_order_is_for_one_fence_and_one_moment(
    changes: dict[str, Any], why: str
) -> None:
    fence: dict[str, Any] = {
        "lease_id": "01" * 16,
        "node_id": "node-1",
        "incarnation": INCARNATION,
        "epoch": 7,
        "nonce": "cd" * 16,
        "now_ms": NOW_MS,
    }
    receipt.judge_clear(ORDER, **fence)
    with pytest.raises(FabricError) as refused:
        receipt.judge_clear(ORDER, **(fence | changes))
    assert (refused.value.code, refused.value.detail) == ("CLEAR", why)
