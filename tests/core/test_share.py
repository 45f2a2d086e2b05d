"""Shares of a lease: catalogue rows K15a, K6 and their neighbours with real keys, and the law that
no share ever permits what its parent does not."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grafos_core import jws, share
from grafos_core.failure import FabricError
from grafos_core.lease import BLOCK_BYTES, Kind
from grafos_core.share import Chain, Recipient, Scope, Share
from grafos_core.sharebook import (
    ENDED_BY_SHARE_MAX,
    ENDED_MAX,
    KEYS_MAX,
    SHOWN_MAX,
    Entry,
    ShareBook,
)
from grafos_core.token import LeaseToken
from grafos_proto.wire import certificates, es256
from tests.core.share_script import EPOCH, LEASE_ID, root_of, slip_of

NOW_MS = 1_000
END_MS = 60_000
KEYS = [ec.derive_private_key(number + 7, ec.SECP256R1()) for number in range(5)]
THUMBS = [certificates.thumbprint(key.public_key()) for key in KEYS]
IDS = [f"{number:032x}" for number in range(1, 6)]
ROOT = dataclasses.replace(root_of(4096, END_MS), holder_thumbprint=THUMBS[0])


def start(root: LeaseToken = ROOT) -> Chain:
    return Chain(slip_of(root), root, ())


def scope(to: int = 1, **changes: Any) -> Scope:
    return dataclasses.replace(
        Scope(Recipient(key=THUMBS[to]), ("read", "write"), 0, 4096, END_MS), **changes
    )


def followed(chain: Chain, share_: Share, by: int) -> Chain:
    """What `mint` makes, without its look at what may follow."""
    return written(chain, share_.to_claims(), by)


def written(chain: Chain, claims: Any, by: int, head: bytes = b"") -> Chain:
    payload = claims if isinstance(claims, bytes) else jws.canonical(claims)
    named = head or share.header(es256.point_of(KEYS[by].public_key()))
    message = named + b"." + jws.to_base64url(payload)
    signed = share.lower(es256.sign(KEYS[by], message))
    slip = message + b"." + jws.to_base64url(signed)
    return Chain(f"{chain.text}~{slip.decode()}", chain.root, chain.shares)


def first(chain: Chain | None = None, **changes: Any) -> Share:
    chain = chain or start()
    last = chain.text.rpartition("~")[2]
    depth = len(chain.shares) + 1
    return dataclasses.replace(
        Share(IDS[depth], share.digest_of(last), LEASE_ID, depth, scope(to=depth)), **changes
    )


def minted(chain: Chain, wish: Scope, by: int) -> Chain:
    """As a giver's own library does it."""
    made = share.narrowed(chain, share_id=IDS[len(chain.shares) + 1], scope=wish)
    return share.mint(chain, made, es256.signer(KEYS[by]))


def is_minted(chain: Chain, wish: Scope, by: int) -> bool:
    try:
        minted(chain, wish, by)
    except FabricError:
        return False
    return True


def proved(text: str | bytes, root: LeaseToken = ROOT) -> Chain:
    def read_root(token: str) -> LeaseToken:
        if token != slip_of(root):
            jws.refuse("TOKEN_SIGNATURE")
        return root

    return share.verify_chain(text, read_root=read_root, verify=es256.verify)


def code_of(act: Callable[[], Any]) -> str:
    with pytest.raises(FabricError) as refused:
        act()
    return refused.value.code


def deep(count: int) -> Chain:
    """So many shares, one of the other, each for the next key."""
    chain = start()
    for depth in range(count):
        chain = minted(chain, scope(to=depth + 1), depth)
    return chain


# What is right


def test_three_shares_that_follow_each_other_are_proved() -> None:
    chain = deep(3)
    assert (
        proved(chain.text) == proved(chain.text.encode()) == chain == share.read_chain(chain.text)
    )
    assert chain.lineage == tuple(IDS[1:4])
    assert len(chain.text) < share.CHAIN_BYTES_MAX
    assert (len(chain.digest), chain.scope.to) == (32, Recipient(key=THUMBS[3]))


def test_a_key_is_named_as_certificates_name_it() -> None:
    for key, thumb in zip(KEYS, THUMBS, strict=True):
        assert share.thumbprint_of(es256.point_of(key.public_key())) == thumb


def test_a_chain_is_for_one_key_or_for_whoever_goes_by_a_name() -> None:
    user = "spiffe://grafos.local/tenant/default/holder/uid-7"
    for name, met in (
        (user, True),
        (f"{user}/1-2", True),
        (f"{user}0/1-2", False),
        (f"{user}0", False),
    ):
        assert Recipient(name=user).is_met_by(key="", name=name) is met
    exact = Recipient(name=f"{user}/1-2")
    assert exact.is_met_by(key="x", name=f"{user}/1-2")
    assert not exact.is_met_by(key="x", name=f"{user}/1-3")
    assert not Recipient(key=THUMBS[1]).is_met_by(key=THUMBS[2], name=THUMBS[1])


# What is not


BAD_CLAIMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "K15a a right that the parent has not": lambda c: {**c, "ops": ["execute", "read"]},
    "K15a a range that begins before": lambda c: {**c, "range": ["0", "4104"]},
    "K15a exp later": lambda c: {**c, "exp": END_MS // 1000 + 1, "exp_ms": END_MS + 1},
    "K15a depth 2 where 1 is": lambda c: {**c, "depth": 2},
    "K15a depth 0": lambda c: {**c, "depth": 0},
    "K15a depth 4": lambda c: {**c, "depth": 4},
    "K15a of another parent": lambda c: {**c, "parent": "0" * 64},
    "K15a of another lease": lambda c: {**c, "lease": "2e" * 16},
    "exp and exp_ms that disagree": lambda c: {**c, "exp": c["exp"] - 1},
    "exp_ms a float": lambda c: jws.canonical(c).replace(b"60000", b"6e4"),
    "exp_ms a bool": lambda c: {**c, "exp_ms": True},
    "a claim too many": lambda c: {**c, "iss": "me"},
    "a claim too few": lambda c: {k: v for k, v in c.items() if k != "jti"},
    "cnf of nobody": lambda c: {**c, "cnf": {}},
    "cnf of two": lambda c: {**c, "cnf": {"jkt": THUMBS[1], "sub": "spiffe://a/tenant/a/holder/b"}},
    "cnf no thumbprint": lambda c: {**c, "cnf": {"jkt": "short"}},
    "cnf of a node": lambda c: {**c, "cnf": {"sub": "spiffe://grafos.local/node/n1"}},
    "cnf no SPIFFE id": lambda c: {**c, "cnf": {"sub": "ben"}},
    "cnf a text": lambda c: {**c, "cnf": THUMBS[1]},
    "ops none": lambda c: {**c, "ops": []},
    "ops twice": lambda c: {**c, "ops": ["read", "read"]},
    "ops not sorted": lambda c: {**c, "ops": ["write", "read"]},
    "ops a text": lambda c: {**c, "ops": "read"},
    "range of numbers": lambda c: {**c, "range": [0, 8]},
    "range of three": lambda c: {**c, "range": ["0", "8", "8"]},
    "range of nothing": lambda c: {**c, "range": ["0", "0"]},
    "range beyond 2^64": lambda c: {**c, "range": ["8", str(2**64 - 8)]},
    "range that cuts a word": lambda c: {**c, "range": ["4", "8"]},
    "jti no 128 bits": lambda c: {**c, "jti": "1"},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CLAIMS)
def test_a_claim_that_does_not_follow_is_refused(name: str) -> None:
    bad = BAD_CLAIMS[name](first().to_claims())
    assert code_of(lambda: proved(written(start(), bad, 0).text)) == "TOKEN_CLAIM"


@pytest.mark.parametrize(
    "bad",
    [
        b'{"a": 1}', b"[]", b'{"a":1,"a":1}', b"\xff", b"{" * 17, b"", b'{"b":1,"a":1}',
    ],
)  # fmt: skip
def test_claims_that_are_not_canonical_are_refused(bad: bytes) -> None:
    codes = {"TOKEN_PAYLOAD", "TOKEN_ENCODING"} if not bad else {"TOKEN_PAYLOAD"}
    assert code_of(lambda: proved(written(start(), bad, 0).text)) in codes


def test_k15a_signed_by_another_key_than_the_one_that_the_parent_is_for() -> None:
    assert code_of(lambda: proved(followed(start(), first(), by=1).text)) == "TOKEN_CLAIM"
    two = deep(2)
    assert code_of(lambda: proved(followed(two, first(two), by=0).text)) == "TOKEN_CLAIM"


def test_k15a_another_s_key_with_one_s_own_signature() -> None:
    head = share.header(es256.point_of(KEYS[0].public_key()))
    stolen = written(start(), first().to_claims(), 1, head)
    assert code_of(lambda: proved(stolen.text)) == "TOKEN_SIGNATURE"


def test_k15a_a_fourth_share() -> None:
    three = deep(3)
    made = dataclasses.replace(first(deep(2)), depth=3, share_id=IDS[4])
    assert code_of(lambda: proved(followed(three, made, by=3).text)) == "TOKEN_CLAIM"
    narrow = scope(to=4)
    assert code_of(lambda: share.narrowed(three, share_id=IDS[4], scope=narrow)) == "RANGE"


def test_k15a_a_slip_left_out_or_taken_twice_or_in_another_order() -> None:
    root, one, two, three = deep(3).text.split("~")
    for slips in (
        [root, two], [root, one, three], [root, two, one], [root, one, one], [one, two],
        [root, one, two, two], [root, root, one],
    ):  # fmt: skip
        assert code_of(lambda: proved("~".join(slips))) in (  # noqa: B023
            "TOKEN_CLAIM", "TOKEN_SIGNATURE", "TOKEN_HEADER",
        )  # fmt: skip


def test_k6_a_chain_that_is_too_long_or_has_another_shape() -> None:
    good = deep(1).text
    root, one = good.split("~")
    wrong = [
        root, "", "~", f"{good}~", f"~{good}", f"{good}#unix:/x", f"{root}~~{one}",
        good.replace(".", "", 1), f"{good}.x", good + "=", good + "\u00e9", good + "~" + "A" * 4097,
        "A" * 8193, f"{root}~{one[:-1]}", f"{root}~{'A.' * 2}{'B' * 4096}",
    ]  # fmt: skip
    for text in wrong:
        assert code_of(lambda: proved(text)) in (  # noqa: B023
            "TOKEN_ENCODING", "TOKEN_SIGNATURE",
        ), text  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"alg": "none"}, {"alg": "EdDSA"}, {"alg": "HS256"}, {"alg": "es256"},
        {"typ": "grafos-lease+jwt"}, {"typ": "at+jwt"}, {"crit": ["b64"], "b64": False},
        {"jwk": {}}, {"jku": "https://x"}, {"kid": "0" * 87}, {"kid": "k1"},
    ],
)  # fmt: skip
def test_k1_to_k4_a_header_that_is_not_ours(fields: dict[str, Any]) -> None:
    kid = jws.to_base64url(es256.point_of(KEYS[0].public_key())).decode()
    named = {"alg": "ES256", "kid": kid, "typ": jws.SHARE, **fields}
    head = jws.to_base64url(jws.canonical(named))
    text = written(start(), first().to_claims(), 0, head).text
    assert code_of(lambda: proved(text)) in ("TOKEN_HEADER", "TOKEN_ENCODING")


def test_a_chain_over_8_kib_is_not_even_looked_into() -> None:
    text = "~".join(["A" * 3990 + ".B.C"] * 3)

    def read_root(token: str) -> LeaseToken:
        raise AssertionError

    with pytest.raises(FabricError) as refused:
        share.verify_chain(text, read_root=read_root, verify=es256.verify)
    assert refused.value.code == "TOKEN_ENCODING"


def test_every_bit_of_a_share_counts() -> None:
    good = deep(1).text
    at = good.index("~") + 1
    dice = random.Random(3)
    for place in {at, len(good) - 1, *(dice.randrange(at, len(good)) for _ in range(60))}:
        for letter in ("A", "z", "."):
            if good[place] == letter:
                continue
            bad = good[:place] + letter + good[place + 1 :]
            with pytest.raises(FabricError):
                proved(bad)


def test_a_signature_has_one_form_only() -> None:
    root, one = deep(1).text.split("~")
    message, _, signed = one.rpartition(".")
    raw = jws.from_base64url(signed.encode())
    other = raw[:32] + (share._ORDER - int.from_bytes(raw[32:], "big")).to_bytes(32, "big")
    point = es256.point_of(KEYS[0].public_key())
    assert es256.verify(point, message.encode(), other)  # for others it would do
    twin = f"{root}~{message}.{jws.to_base64url(other).decode()}"
    assert code_of(lambda: proved(twin)) == "TOKEN_SIGNATURE"
    high = (
        b"\xff" * 32,
        (share._ORDER - 1).to_bytes(32, "big"),
        (share._ORDER + 1).to_bytes(32, "big"),
    )
    for bad in (
        *(raw[:32] + s for s in high),
        b"\xff" * 64,
        bytes(64),
        raw[:32] + bytes(32),
        bytes(32) + raw[32:],
        raw + b"x",
    ):
        text = f"{root}~{message}.{jws.to_base64url(bad).decode()}"
        assert code_of(lambda: proved(text)) == "TOKEN_SIGNATURE"  # noqa: B023


def test_a_point_that_is_not_on_the_curve_signs_nothing() -> None:
    assert not es256.verify(b"\x04" + bytes(64), b"x", bytes(64))
    assert not es256.verify(b"\x04", b"x", bytes(64))


def test_a_share_is_judged_for_its_caller_and_its_moment() -> None:
    chain = deep(1)
    share.judge(chain, key=THUMBS[1], name="", now_ms=END_MS - 1)
    assert code_of(lambda: share.judge(chain, key=THUMBS[1], name="", now_ms=END_MS)) == (
        "LEASE_EXPIRED"
    )
    assert code_of(lambda: share.judge(chain, key=THUMBS[0], name="", now_ms=NOW_MS)) == (
        "HOLDER_MISMATCH"
    )


def test_only_its_holder_shares_a_lease_and_only_some_kinds_are_shared() -> None:
    made = share.narrowed(start(), share_id=IDS[1], scope=scope())
    assert code_of(lambda: share.mint(start(), made, es256.signer(KEYS[1]))) == "HOLDER_MISMATCH"
    gpu = dataclasses.replace(ROOT, kind=Kind.GPU)
    assert code_of(lambda: share.scope_of(gpu)) == "OPTION"


# The law


kinds = st.sampled_from([Kind.MEM, Kind.BLOCK])
rights = st.sampled_from([("read",), ("write",), ("read", "write")])


@st.composite
def wishes(draw: st.DrawFn, unit: int) -> tuple[tuple[str, ...], int, int, int]:
    """Ops, offset, length, end: often within what is there, and often not."""
    offset, length = draw(st.integers(0, 10)) * unit, draw(st.integers(0, 10)) * unit
    crooked = draw(st.sampled_from([0, 0, 0, 1, 4]))
    end_ms = END_MS + draw(st.integers(-3, 2)) * 1000
    return draw(rights), offset + crooked, length, end_ms


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=kinds, root_ops=rights)
def test_no_share_ever_permits_what_its_parent_does_not(
    data: st.DataObject, kind: Kind, root_ops: tuple[str, ...]
) -> None:
    """Whatever is signed, with whichever key: what is proved is less than all before it."""
    unit = 8 if kind is Kind.MEM else BLOCK_BYTES
    amount = 64 if kind is Kind.MEM else 8
    root = dataclasses.replace(ROOT, kind=kind, amount=amount, ops=root_ops)
    chain, whole = start(root), share.scope_of(root)
    assume(whole.length == 8 * unit)
    for depth in range(1, data.draw(st.integers(1, 4)) + 1):
        ops, offset, length, end_ms = data.draw(wishes(unit))
        wish = scope(to=min(depth, 4), ops=ops, offset=offset, length=length, end_ms=end_ms)
        by = data.draw(st.sampled_from([depth - 1, depth - 1, depth - 1, 4]))
        made = first(chain, scope=wish, depth=depth, share_id=IDS[depth])
        text = followed(chain, made, by=by).text
        try:
            found = proved(text, root)
        except FabricError:
            assert not is_minted(chain, wish, by), "its giver's own library does not sign it"
            return
        assert by == depth - 1
        for above in (whole, *(each.scope for each in chain.shares)):
            below = found.scope
            assert set(below.ops) <= set(above.ops)
            assert below.end_ms <= above.end_ms
            assert above.offset <= below.offset
            assert below.range_end <= above.range_end
        assert found.scope.length > 0
        assert len(found.shares) == depth <= share.DEPTH_MAX
        chain = found


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3))
def test_bytes_that_are_no_chain_are_refused_and_nothing_else_happens(
    noise: bytes, tail: int
) -> None:
    text = [noise, slip_of(ROOT).encode() + b"~" + noise, deep(1).text.encode() + noise][tail % 3]
    try:
        proved(text)
    except FabricError as refused:
        assert refused.code.startswith("TOKEN_")
    else:
        assert not noise


# The book


def shown(book: ShareBook, chain: Chain, now_ms: int = NOW_MS) -> Entry:
    return book.show(chain, key=chain.scope.to.key, now_ms=now_ms, now_ns=now_ms * 1_000_000)


def many(count: int, end_ms: int = END_MS) -> list[Chain]:
    """Chains whose signatures nobody looks at here."""
    made = []
    for number in range(count):
        each = first(share_id=f"{number:032x}", scope=scope(end_ms=end_ms))
        made.append(Chain(f"chain {number} {end_ms}", ROOT, (each,)))
    return made


def test_a_node_knows_a_bounded_number_of_shares_and_lets_go_of_those_that_are_over() -> None:
    book = ShareBook()
    for chain in many(SHOWN_MAX, END_MS - 1000):
        shown(book, chain)
    late = many(1)[0]
    assert code_of(lambda: shown(book, late)) == "RATE"
    assert len(book.tree(LEASE_ID, below="", now_ns=0)) == SHOWN_MAX
    shown(book, late, END_MS - 1000)
    assert len(book.tree(LEASE_ID, below="", now_ns=0)) == 1


def test_what_was_ended_is_bounded_and_a_share_can_fill_only_a_part() -> None:
    book, entry = ShareBook(), shown(ShareBook(), deep(1))
    for number in range(ENDED_BY_SHARE_MAX):
        book.end(LEASE_ID, EPOCH, f"{number:032x}", by=entry.share_id)
    assert code_of(lambda: book.end(LEASE_ID, EPOCH, "f" * 32, by=entry.share_id)) == "RATE"
    for number in range(ENDED_MAX - ENDED_BY_SHARE_MAX):
        book.end(LEASE_ID, EPOCH, f"{number + 10**6:032x}", by="")
    assert code_of(lambda: book.end(LEASE_ID, EPOCH, "e" * 32, by="")) == "RATE"
    assert book.end(LEASE_ID, EPOCH, f"{10**6:032x}", by="") == []
    assert len(book.ended(LEASE_ID)) == ENDED_MAX
    again = ShareBook()
    for share_id, by in book.ended(LEASE_ID):
        again.end(LEASE_ID, EPOCH, share_id, by=by)
    assert again.ended(LEASE_ID) == book.ended(LEASE_ID)
    book.forget(LEASE_ID)
    assert book.ended(LEASE_ID) == []


def test_an_entry_is_for_the_keys_that_have_shown_it() -> None:
    book, chain = ShareBook(), many(1)[0]
    entry = book.show(chain, key="a", now_ms=0, now_ns=0)
    assert book.find(LEASE_ID, chain.digest, "a") is entry
    for lease_id, digest, key in (
        (LEASE_ID, chain.digest, "b"), (LEASE_ID, "0" * 32, "a"), ("0" * 32, chain.digest, "a")
    ):  # fmt: skip
        assert code_of(lambda: book.find(lease_id, digest, key)) == "NOT_FOUND"  # noqa: B023
    for number in range(2 * KEYS_MAX):
        book.show(chain, key=str(number), now_ms=0, now_ns=0)
    assert len(entry.keys) == KEYS_MAX


def test_another_epoch_of_the_lease_is_another_lease() -> None:
    book, chain = ShareBook(), deep(1)
    shown(book, chain)
    book.end(LEASE_ID, EPOCH, IDS[1], by="")
    assert code_of(lambda: shown(book, chain)) == "REVOKED"
    later = dataclasses.replace(ROOT, epoch=EPOCH + 1)
    assert shown(book, Chain("later", later, chain.shares)).cause is None
