"""Lease tokens: catalogue rows K1 to K20, as far as the token itself decides, with real keys."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from typing import Any

import joserfc.jwk
import joserfc.jws
import jwt
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from grafos_core import jws, token
from grafos_core.failure import FabricError, InvariantViolation, RateLimited
from grafos_core.lease import Isolation, Kind, OnHolderExit, Policy, Priority
from grafos_core.token import LEASE, RECEIPT, Keys, LeaseToken, VerifiedCache

NOW_MS = 1_800_000_000_000
NOW_S = NOW_MS // 1000
ISSUER = "spiffe://grafos.local/service/admission"
AUDIENCE = token.audience_of("node-1", "4f" * 16)
THUMBPRINT = "T" * 43
GOOD = LeaseToken(
    issuer=ISSUER,
    subject="spiffe://grafos.local/tenant/a/holder/uid-1000/77-123",
    audience=AUDIENCE,
    jti="ab" * 16,
    iat_ms=NOW_MS,
    nbf_ms=NOW_MS,
    exp_ms=NOW_MS + 30_000,
    holder_thumbprint=THUMBPRINT,
    lease_id="01" * 16,
    kind=Kind.MEM,
    amount=1 << 60,
    ops=("read", "write"),
    epoch=2**64 - 2,
    generation=1,
    ttl_ms=60_000,
    lease_end_ms=NOW_MS + 60_000,
    lifetime_end_ms=NOW_MS + 600_000,
    policy=Policy(OnHolderExit.KEEP, 5_000, 30_000, Isolation.CONTEXT, True, Priority.SCAVENGER),
)
CLAIMS = GOOD.to_claims()

SIGNER = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
STRANGER = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)


def verifier(key: Ed25519PublicKey) -> jws.VerifySignature:
    def verify(message: bytes, signature: bytes) -> bool:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    return verify


def keys_in_force() -> Keys:
    keys = Keys()
    keys.add(LEASE, "k1", verifier(SIGNER.public_key()))
    keys.add(RECEIPT, "k1", verifier(STRANGER.public_key()))
    return keys


KEYS = keys_in_force()
OURS = {"alg": "EdDSA", "kid": "k1", "typ": LEASE}


def head(**fields: Any) -> bytes:
    return jws.to_base64url(jws.canonical(fields))


def forge(
    claims: dict[str, Any] | bytes,
    header: bytes = jws.header(LEASE, "k1"),
    sign: Callable[[bytes], bytes] = SIGNER.sign,
) -> bytes:
    """A token with any header and any payload, signed; `mint` would refuse to make most of them."""
    if isinstance(claims, dict):
        claims = json.dumps(claims, sort_keys=True, separators=(",", ":")).encode()
    message = header + b"." + jws.to_base64url(claims)
    return message + b"." + jws.to_base64url(sign(message))


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in CLAIMS.items() if key != name}


def verdict(raw: str | bytes, **other: Any) -> str:
    expected: dict[str, Any] = {
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "holder_thumbprint": THUMBPRINT,
        "now_ms": NOW_MS,
    }
    try:
        token.accept(raw, KEYS, **(expected | other))
    except FabricError as refused:
        return refused.code
    return "accepted"


def test_what_was_minted_is_read_back_exactly() -> None:
    raw = token.mint(LEASE, "k1", CLAIMS, SIGNER.sign)
    assert raw.encode() == forge(CLAIMS)
    assert verdict(raw) == verdict(raw.encode()) == "accepted"
    assert LeaseToken.from_claims(token.verify(raw, LEASE, KEYS)) == GOOD
    assert (GOOD.node_id, GOOD.incarnation) == ("node-1", "4f" * 16)
    assert len(raw) < 1400


def test_an_extent_is_one_claim_and_an_amount_another() -> None:
    block = dataclasses.replace(GOOD, kind=Kind.BLOCK, amount=16, extent_offset=2**40)
    raw = token.mint(LEASE, "k1", block.to_claims(), SIGNER.sign)
    assert LeaseToken.from_claims(token.verify(raw, LEASE, KEYS)) == block
    assert (block.extent_length, GOOD.extent_length) == (16, 0)
    claims = block.to_claims()
    for extent in ([], ["0"], ["0", "1", "2"], "0", [0, 1], ["0", str(2**64)], ["1", "-1"]):
        assert verdict(forge(claims | {"extent": extent})) == "TOKEN_CLAIM"
    assert verdict(forge(claims | {"extent": ["1", str(2**64 - 1)]})) == "TOKEN_CLAIM"
    assert verdict(forge(claims | {"amount": "16"})) == "TOKEN_CLAIM"
    assert verdict(forge(CLAIMS | {"kind": "block"})) == "TOKEN_CLAIM"


def test_instants_of_issue_travel_in_whole_seconds_rounded_down() -> None:
    late = dataclasses.replace(GOOD, iat_ms=NOW_MS + 999, nbf_ms=NOW_MS + 999, exp_ms=NOW_MS + 1)
    claims = late.to_claims()
    assert (claims["iat"], claims["nbf"], claims["exp"]) == (NOW_S, NOW_S, NOW_S + 1)


NESTED = b'{"a":' + b"[" * 1400 + b"]" * 1400 + b"}"
RAW = jws.canonical(CLAIMS)
CATALOGUE: list[tuple[str, bytes, str]] = [
    ("K1 alg none without signature", head(alg="none") + b"." + jws.to_base64url(RAW) + b".",
     "TOKEN_HEADER"),
    ("K1 alg none, ours otherwise", forge(CLAIMS, head(**OURS | {"alg": "none"})), "TOKEN_HEADER"),
    ("K1 alg nOnE", forge(CLAIMS, head(**OURS | {"alg": "nOnE"})), "TOKEN_HEADER"),
    ("K1 alg HS256", forge(CLAIMS, head(**OURS | {"alg": "HS256"})), "TOKEN_HEADER"),
    ("K1 alg RS256", forge(CLAIMS, head(**OURS | {"alg": "RS256"})), "TOKEN_HEADER"),
    ("K2 typ missing", forge(CLAIMS, head(alg="EdDSA", kid="k1")), "TOKEN_HEADER"),
    ("K2 typ of others", forge(CLAIMS, head(**OURS | {"typ": "at+jwt"})), "TOKEN_HEADER"),
    ("K2 typ in capitals", forge(CLAIMS, head(**OURS | {"typ": LEASE.upper()})), "TOKEN_HEADER"),
    ("K2 typ of a receipt, that key", forge(CLAIMS, jws.header(RECEIPT, "k1"), STRANGER.sign),
     "TOKEN_HEADER"),
    ("K3 crit", forge(CLAIMS, head(**OURS, crit=["x"], x=1)), "TOKEN_HEADER"),
    ("K3 b64 false", forge(CLAIMS, head(**OURS, b64=False, crit=["b64"])), "TOKEN_HEADER"),
    ("K3 jku", forge(CLAIMS, head(**OURS, jku="https://example.org")), "TOKEN_HEADER"),
    ("K3 x5u", forge(CLAIMS, head(**OURS, x5u="https://example.org")), "TOKEN_HEADER"),
    ("K3 jwk", forge(CLAIMS, head(**OURS, jwk={"kty": "OKP"})), "TOKEN_HEADER"),
    ("K3 header in another order", forge(CLAIMS, jws.to_base64url(
        b'{"typ":"grafos-lease+jwt","alg":"EdDSA","kid":"k1"}')), "TOKEN_HEADER"),
    ("K3 header with spaces", forge(CLAIMS, jws.to_base64url(json.dumps(OURS).encode())),
     "TOKEN_HEADER"),
    ("K3 header is no base64url", forge(CLAIMS, b"=="), "TOKEN_HEADER"),
    ("K3 header nested deep", forge(CLAIMS, jws.to_base64url(NESTED[:1000] + NESTED[-1000:])),
     "TOKEN_HEADER"),
    ("K3 header empty", forge(CLAIMS, b""), "TOKEN_HEADER"),
    ("K4 kid unknown", forge(CLAIMS, jws.header(LEASE, "k2")), "TOKEN_KEY_UNKNOWN"),
    ("K4 kid of 2 KiB", forge(b"{}", jws.header(LEASE, "k" * 2048)), "TOKEN_KEY_UNKNOWN"),
    ("K4 kid like a path", forge(CLAIMS, jws.header(LEASE, "../../etc/passwd")),
     "TOKEN_KEY_UNKNOWN"),
    ("K4 kid is a number", forge(CLAIMS, head(**OURS | {"kid": 1})), "TOKEN_HEADER"),
    ("K6 two segments", forge(CLAIMS).rpartition(b".")[0], "TOKEN_ENCODING"),
    ("K6 four segments", forge(CLAIMS) + b".x", "TOKEN_ENCODING"),
    ("K6 nothing", b"", "TOKEN_ENCODING"),
    ("K6 over 4 KiB", forge(CLAIMS | {"jti": "a" * 4096}), "TOKEN_ENCODING"),
    ("K6 a megabyte", b"a" * 1_000_000, "TOKEN_ENCODING"),
    ("K6 not ASCII", forge(CLAIMS)[:-1] + b"\xc3", "TOKEN_ENCODING"),
    ("K6 padding", forge(CLAIMS) + b"==", "TOKEN_ENCODING"),
    ("K6 a newline at the end", forge(CLAIMS) + b"\n", "TOKEN_ENCODING"),
    ("K6 standard alphabet", forge(CLAIMS)[:-4] + b"+/+/", "TOKEN_ENCODING"),
    ("K6 bits after the end", forge(CLAIMS)[:-1] + b"B", "TOKEN_ENCODING"),
    ("K6 signature empty", forge(CLAIMS, sign=lambda _: b""), "TOKEN_ENCODING"),
    ("K7 claims are an array", forge(b"[1,2]"), "TOKEN_PAYLOAD"),
    ("K7 claims are a number", forge(b"1"), "TOKEN_PAYLOAD"),
    ("K7 claims are nothing", forge(b"null"), "TOKEN_PAYLOAD"),
    ("K7 not JSON", forge(b"{"), "TOKEN_PAYLOAD"),
    ("K7 not UTF-8", forge(b'{"iss":"\xff"}'), "TOKEN_PAYLOAD"),
    ("K7 UTF-8 as it is", forge(b'{"iss":"\xc3\xa9"}'), "TOKEN_PAYLOAD"),
    ("K7 nested deep", forge(NESTED), "TOKEN_PAYLOAD"),
    ("K7 a key twice", forge(RAW[:-1] + b',"exp":1900000000}'), "TOKEN_PAYLOAD"),
    ("K7 a key twice inside", forge(RAW.replace(b'{"jkt":', b'{"jkt":"U","jkt":')),
     "TOKEN_PAYLOAD"),
    ("K7 spaces", forge(json.dumps(CLAIMS, sort_keys=True).encode()), "TOKEN_PAYLOAD"),
    ("K7 a space at the end", forge(RAW + b" "), "TOKEN_PAYLOAD"),
    ("K7 another order", forge(json.dumps(dict(sorted(CLAIMS.items(), reverse=True)),
                                          separators=(",", ":")).encode()), "TOKEN_PAYLOAD"),
    ("K7 needless escape", forge(RAW.replace(b'"mem"', b'"\\u006dem"')), "TOKEN_PAYLOAD"),
    ("K7 half a character", forge(RAW.replace(b'"mem"', b'"\\ud800"')), "TOKEN_PAYLOAD"),
    ("K7 leading zero", forge(RAW.replace(b'"generation":1', b'"generation":01')),
     "TOKEN_PAYLOAD"),
    ("K7 minus zero", forge(RAW.replace(b'"generation":1', b'"generation":-0')), "TOKEN_PAYLOAD"),
    ("K8 NaN", forge(RAW.replace(b'"generation":1', b'"generation":NaN')), "TOKEN_CLAIM"),
    ("K8 Infinity", forge(RAW.replace(b'"generation":1', b'"generation":Infinity')),
     "TOKEN_CLAIM"),
    ("K8 1e400", forge(RAW.replace(b'"generation":1', b'"generation":1e400')), "TOKEN_CLAIM"),
    ("K9 a claim more", forge(CLAIMS | {"admin": True}), "TOKEN_CLAIM"),
    ("K10 nbf ahead", forge(CLAIMS | {"nbf": NOW_S + 1}), "TOKEN_IMMATURE"),
    ("K10 iat ahead", forge(CLAIMS | {"iat": NOW_S + 1}), "TOKEN_IMMATURE"),
    ("K10 nbf after exp", forge(CLAIMS | {"nbf": NOW_S + 31}), "TOKEN_TTL"),
    ("K10 iat after exp", forge(CLAIMS | {"iat": NOW_S + 31}), "TOKEN_TTL"),
    ("K11 ttl over the maximum", forge(CLAIMS | {"ttl_ms": 86_400_001}), "TOKEN_TTL"),
    ("K11 ttl 0", forge(CLAIMS | {"ttl_ms": 0}), "TOKEN_TTL"),
    ("K11 ttl negative", forge(CLAIMS | {"ttl_ms": -1}), "TOKEN_TTL"),
    ("K11 ttl 2^63 - 1", forge(CLAIMS | {"ttl_ms": 2**63 - 1}), "TOKEN_TTL"),
    ("K11 a life over 300 s", forge(CLAIMS | {
        "exp": NOW_S + 302, "exp_ms": NOW_MS + 301_001, "lease_end_ms": NOW_MS + 600_000}),
     "TOKEN_TTL"),
    ("K11 outlives its lease", forge(CLAIMS | {"lease_end_ms": NOW_MS + 29_999}), "TOKEN_TTL"),
    ("K11 lease outlives its lifetime", forge(CLAIMS | {"lifetime_end_ms": NOW_MS + 59_999}),
     "TOKEN_TTL"),
    ("K11 two ends that disagree", forge(CLAIMS | {"exp": NOW_S + 31}), "TOKEN_CLAIM"),
    ("K13 another issuer", forge(CLAIMS | {"iss": "spiffe://grafos.local/service/ledger"}),
     "TOKEN_ISSUER"),
    ("K13 iss a prefix of ours", forge(CLAIMS | {"iss": ISSUER[:-1]}), "TOKEN_ISSUER"),
    ("K13 ours a prefix of iss", forge(CLAIMS | {"iss": ISSUER + "2"}), "TOKEN_ISSUER"),
    ("K13 iss a list", forge(CLAIMS | {"iss": [ISSUER]}), "TOKEN_CLAIM"),
    ("K14 cnf missing", forge(without("cnf")), "TOKEN_CLAIM"),
    ("K14 cnf empty", forge(CLAIMS | {"cnf": {}}), "TOKEN_CLAIM"),
    ("K14 cnf a certificate", forge(CLAIMS | {"cnf": {"x5t#S256": THUMBPRINT}}), "TOKEN_CLAIM"),
    ("K14 cnf with two keys", forge(CLAIMS | {"cnf": {"jkt": THUMBPRINT, "kid": "x"}}),
     "TOKEN_CLAIM"),
    ("K14 another holder's key", forge(CLAIMS | {"cnf": {"jkt": "U" * 43}}), "HOLDER_MISMATCH"),
    ("K14 signed by a stranger", forge(CLAIMS, sign=STRANGER.sign), "TOKEN_SIGNATURE"),
    ("K17 epoch 0", forge(CLAIMS | {"epoch": "0"}), "EPOCH_RANGE"),
    ("K17 epoch 2^64 - 1", forge(CLAIMS | {"epoch": str(2**64 - 1)}), "EPOCH_RANGE"),
    ("K17 epoch 2^64", forge(CLAIMS | {"epoch": str(2**64)}), "TOKEN_CLAIM"),
    ("K17 epoch as a number", forge(CLAIMS | {"epoch": 7}), "TOKEN_CLAIM"),
    ("K17 epoch with a zero in front", forge(CLAIMS | {"epoch": "07"}), "TOKEN_CLAIM"),
    ("K17 epoch in other digits", forge(CLAIMS | {"epoch": "\u0667"}), "TOKEN_CLAIM"),
    ("K19 ops empty", forge(CLAIMS | {"ops": []}), "TOKEN_CLAIM"),
    ("K19 ops out of order", forge(CLAIMS | {"ops": ["write", "read"]}), "TOKEN_CLAIM"),
    ("K19 ops twice", forge(CLAIMS | {"ops": ["read", "read"]}), "TOKEN_CLAIM"),
    ("K19 ops not text", forge(CLAIMS | {"ops": [1]}), "TOKEN_CLAIM"),
    ("K19 ops one text", forge(CLAIMS | {"ops": "read"}), "TOKEN_CLAIM"),
    ("K19 ops too many", forge(CLAIMS | {"ops": sorted(f"o{chr(97 + i)}" for i in range(17))}),
     "TOKEN_CLAIM"),
    ("K19 kind unknown", forge(CLAIMS | {"kind": "disk"}), "TOKEN_CLAIM"),
    ("K19 kind a list", forge(CLAIMS | {"kind": ["mem"]}), "TOKEN_CLAIM"),
    ("K20 for the ledger", forge(CLAIMS | {"aud": "spiffe://grafos.local/service/ledger"}),
     "TOKEN_AUDIENCE"),
    ("K20 for another incarnation",
     forge(CLAIMS | {"aud": token.audience_of("node-1", "50" * 16)}), "TOKEN_AUDIENCE"),
    ("K20 aud a list", forge(CLAIMS | {"aud": [AUDIENCE]}), "TOKEN_CLAIM"),
]  # fmt: skip
WRONG_EXP: list[Any] = [
    None,
    str(NOW_S + 30),
    True,
    NOW_S + 30.0,
    2**63,
    10**400,
    -1,
    [],
    {},
    "",
    2**53,
]


@pytest.mark.parametrize(
    ("raw", "expected"), [pytest.param(raw, code, id=name) for name, raw, code in CATALOGUE]
)
def test_catalogue_k_every_hostile_token_gets_its_code(raw: bytes, expected: str) -> None:
    assert verdict(raw) == expected


@pytest.mark.parametrize("name", ["exp", "exp_ms", "iat", "nbf", "lease_end_ms", "generation"])
@pytest.mark.parametrize("value", WRONG_EXP, ids=lambda value: repr(value)[:12])
def test_catalogue_k8_a_number_is_a_whole_number_in_range(name: str, value: Any) -> None:
    assert verdict(forge(CLAIMS | {name: value})) == "TOKEN_CLAIM"


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_every_claim_must_be_there_and_be_of_its_type(name: str) -> None:
    assert verdict(forge(without(name))) == "TOKEN_CLAIM"
    if name != "lifetime_end_ms":
        assert verdict(forge(CLAIMS | {name: None})) == "TOKEN_CLAIM"
    wrong: Any
    for wrong in (1.5, [[]], {"a": 1}, "\x00", "\u202e"):
        assert verdict(forge(CLAIMS | {name: wrong})) == "TOKEN_CLAIM"


@pytest.mark.parametrize("name", sorted(CLAIMS["policy"]))
def test_every_part_of_the_policy_must_be_there_and_be_of_its_type(name: str) -> None:
    policy = CLAIMS["policy"]
    short = {key: value for key, value in policy.items() if key != name}
    assert verdict(forge(CLAIMS | {"policy": short})) == "TOKEN_CLAIM"
    wrong: Any
    for wrong in (1.5, [], {}, "x", -1):
        assert verdict(forge(CLAIMS | {"policy": policy | {name: wrong}})) == "TOKEN_CLAIM"


def test_a_token_holds_from_its_start_less_the_skew_to_just_before_its_end() -> None:
    raw = forge(CLAIMS)
    assert verdict(raw, now_ms=NOW_MS - 501) == "TOKEN_IMMATURE"
    assert verdict(raw, now_ms=NOW_MS - 500) == "accepted"
    assert verdict(raw, now_ms=NOW_MS - 500, skew_ms=0) == "TOKEN_IMMATURE"
    assert verdict(raw, now_ms=NOW_MS + 29_999) == "accepted"
    assert verdict(raw, now_ms=NOW_MS + 30_000) == "TOKEN_EXPIRED"


def test_the_issuer_is_judged_before_the_audience_and_the_audience_before_the_times() -> None:
    claims = CLAIMS | {"iss": "x", "aud": "x", "ttl_ms": 0, "epoch": "0", "cnf": {"jkt": "U" * 43}}
    late = NOW_MS + 10**9
    for name, code in [
        ("iss", "TOKEN_ISSUER"),
        ("aud", "TOKEN_AUDIENCE"),
        ("ttl_ms", "TOKEN_TTL"),
    ]:
        assert verdict(forge(claims), now_ms=late) == code
        claims[name] = CLAIMS[name]
    assert verdict(forge(claims), now_ms=late) == "TOKEN_EXPIRED"
    assert verdict(forge(claims), now_ms=NOW_MS - 10_000) == "TOKEN_IMMATURE"
    assert verdict(forge(claims)) == "EPOCH_RANGE"
    claims["epoch"] = CLAIMS["epoch"]
    assert verdict(forge(claims)) == "HOLDER_MISMATCH"


def test_catalogue_k4_a_retired_key_is_as_one_never_known() -> None:
    keys = keys_in_force()
    keys.retire(LEASE, "k1")
    keys.retire(LEASE, "k1")
    with pytest.raises(FabricError) as refused:
        token.verify(forge(CLAIMS), LEASE, keys)
    assert refused.value.code == "TOKEN_KEY_UNKNOWN"
    assert keys.key_ids(LEASE) == []
    assert keys.key_ids(RECEIPT) == ["k1"]


def test_catalogue_k19_a_token_allows_its_kind_and_operations_alone() -> None:
    GOOD.require(kind=Kind.MEM, op="write")
    reader = dataclasses.replace(GOOD, ops=("read",))
    for kind, op in [(Kind.BLOCK, "read"), (Kind.MEM, "write"), (Kind.MEM, "")]:
        with pytest.raises(FabricError) as refused:
            reader.require(kind=kind, op=op)
        assert refused.value.code == "SCOPE"


def test_every_changed_byte_of_a_token_is_refused() -> None:
    good = forge(CLAIMS)
    for at in range(len(good)):
        for change in (1, 2, 0x20):
            bad = bytearray(good)
            bad[at] ^= change
            assert verdict(bytes(bad)) != "accepted", at


def test_a_purpose_that_is_not_ours_is_our_own_bug() -> None:
    with pytest.raises(InvariantViolation):
        Keys().add("at+jwt", "k1", lambda _message, _signature: True)
    with pytest.raises(InvariantViolation):
        token.mint("at+jwt", "k1", {}, SIGNER.sign)


@pytest.mark.parametrize(
    "claims", [{"a": "x" * 5000}, {"a": 10**30}, {"a": 1.5}, {"a": "\ud800"}, {"a": [[]] * 20}]
)
def test_what_could_not_be_read_is_not_minted(claims: dict[str, Any]) -> None:
    with pytest.raises(FabricError):
        token.mint(LEASE, "k1", claims, SIGNER.sign)


@given(st.binary(max_size=80))
def test_base64url_has_one_encoding_per_value(data: bytes) -> None:
    assert not data or jws.from_base64url(jws.to_base64url(data)) == data


@given(st.text(alphabet="AQgw-_+/=. \n", min_size=1, max_size=12))
def test_base64url_refuses_what_it_would_not_write(segment: str) -> None:
    try:
        data = jws.from_base64url(segment.encode())
    except FabricError as refused:
        code = refused.code
    else:
        code = "TOKEN_ENCODING" if jws.to_base64url(data) != segment.encode() else "same"
    assert code in {"same", "TOKEN_ENCODING"}
    assert code == "TOKEN_ENCODING" or not set(segment) & set("+/=. \n")


# Two general libraries as a second opinion: what we accept, they accept, and read alike. ------


def opinion_of_pyjwt(raw: bytes) -> dict[str, Any] | None:
    unjudged = {f"verify_{name}": False for name in ("exp", "nbf", "iat", "aud", "iss", "sub")}
    try:
        return jwt.decode(raw, SIGNER.public_key(), algorithms=["EdDSA"], options=unjudged)  # type: ignore[arg-type]
    except jwt.InvalidTokenError:
        return None


def opinion_of_joserfc(raw: bytes) -> dict[str, Any] | None:
    key = joserfc.jwk.OKPKey.import_key(SIGNER.public_key())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would rather have us write Ed25519 for EdDSA
        try:
            found = joserfc.jws.deserialize_compact(raw, key, algorithms=["EdDSA"])
            claims = json.loads(found.payload)
        except (joserfc.errors.JoseError, ValueError, RecursionError):
            return None
    return claims if isinstance(claims, dict) else None


SECOND_OPINIONS = [opinion_of_pyjwt, opinion_of_joserfc]


@pytest.mark.parametrize("opinion", SECOND_OPINIONS)
def test_a_general_library_reads_our_token_as_we_do(
    opinion: Callable[[bytes], dict[str, Any] | None],
) -> None:
    assert opinion(forge(CLAIMS)) == token.verify(forge(CLAIMS), LEASE, KEYS) == CLAIMS


@pytest.mark.parametrize("opinion", SECOND_OPINIONS)
def test_where_a_general_library_refuses_we_refuse_too(
    opinion: Callable[[bytes], dict[str, Any] | None],
) -> None:
    refused = [name for name, raw, _ in CATALOGUE if opinion(raw) is None]
    assert len(refused) >= 10  # signatures, algorithms, shapes: there both are strict
    assert all(verdict(raw) != "accepted" for name, raw, _ in CATALOGUE if name in refused)
    assert len(refused) < len(CATALOGUE)  # and much that we refuse, they accept


@given(st.data())
def test_nothing_is_accepted_that_a_general_library_refuses(data: st.DataObject) -> None:
    raw = bytearray(forge(CLAIMS))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        claims = token.verify(bytes(raw), LEASE, KEYS)
    except FabricError:
        return
    assert all(opinion(bytes(raw)) == claims for opinion in SECOND_OPINIONS)


# The cache of verified tokens ------------------------------------------------------------------


def of_lease(lease_id: str, *, end_ms: int = NOW_MS + 60_000) -> tuple[str, LeaseToken]:
    made = dataclasses.replace(GOOD, lease_id=lease_id, lease_end_ms=end_ms)
    return token.mint(LEASE, "k1", made.to_claims(), SIGNER.sign), made


def test_a_cached_token_needs_no_signature_check_but_is_judged_each_time() -> None:
    checked = []
    keys = Keys()

    def count(message: bytes, signature: bytes) -> bool:
        checked.append(message)
        return verifier(SIGNER.public_key())(message, signature)

    keys.add(LEASE, "k1", count)
    cache = VerifiedCache(4)
    raw, made = of_lease("0a" * 16)

    def accept(now_ms: int) -> LeaseToken:
        return token.accept(
            raw, keys, issuer=ISSUER, audience=AUDIENCE, holder_thumbprint=THUMBPRINT,
            now_ms=now_ms, cache=cache,
        )  # fmt: skip

    assert accept(NOW_MS) == accept(NOW_MS + 1) == made
    assert len(checked) == 1
    with pytest.raises(FabricError) as refused:
        accept(NOW_MS + 30_000)
    assert refused.value.code == "TOKEN_EXPIRED"
    cache.clear()
    accept(NOW_MS)
    assert len(checked) == 2


def test_a_full_cache_refuses_and_puts_out_no_live_entry() -> None:
    cache = VerifiedCache(2)
    entries = [of_lease(f"{i:032x}", end_ms=NOW_MS + 60_000 * (i + 1)) for i in range(3)]
    for raw, made in entries[:2]:
        cache.put(raw, made, now_ms=NOW_MS)
        cache.put(raw, made, now_ms=NOW_MS)
    with pytest.raises(RateLimited) as refused:
        cache.put(*entries[2], now_ms=NOW_MS)
    assert refused.value.code == "RATE"
    assert [cache.get(raw) is not None for raw, _ in entries] == [True, True, False]
    cache.put(*entries[2], now_ms=NOW_MS + 60_000)
    assert [cache.get(raw) is not None for raw, _ in entries] == [False, True, True]


def test_a_cached_token_dies_with_its_lease() -> None:
    cache = VerifiedCache(1000)
    kept, made = of_lease("ff" * 16)
    cache.put(kept, made, now_ms=NOW_MS)
    for i in range(200):
        raw, of_other = of_lease(f"{i:032x}")
        cache.put(raw, of_other, now_ms=NOW_MS)
        cache.forget(of_other.lease_id)
        assert cache.get(raw) is None
    cache.forget("00" * 16)
    assert len(cache) == 1
    assert len(cache._ends) < 100
    assert cache.get(kept) == made
    cache.put(*of_lease("0a" * 16, end_ms=NOW_MS + 90_000), now_ms=NOW_MS + 60_000)
    assert cache.get(kept) is None
