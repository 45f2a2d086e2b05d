"""Why a slip is refused: every question that is put to it, each with its answer.

A node stops at the first thing that is wrong, as it should: who forges tokens is told as little as
possible, as early as possible. Whoever holds a token and wonders wants the whole list. So here the
same questions are put one by one, by the same functions, and all of them are answered.

Laws: without a failed check `token.accept` takes the token; and what it refuses has a failed check
whose code, the first in the list, is that of the refusal. What could not be asked, for want of a
key or of knowing for whom it is meant, is `unknown` and never counts as good.

Nothing here decides anything. Claims are shown as they were read, also those that nobody signed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from grafos_core import jws, token
from grafos_core.failure import FabricError
from grafos_core.jws import Keys
from grafos_core.share import SEPARATOR, Chain, VerifyWithKey, over, verify_chain
from grafos_core.token import LeaseToken

OK: Final = "ok"
FAILED: Final = "failed"
UNKNOWN: Final = "unknown"


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer."""

    name: str
    outcome: str
    """`ok`, `failed` or `unknown`."""
    code: str = ""
    """Of the refusal that a node would give for this alone."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a node knows when it is shown the token. None: not known here, so it cannot be asked."""

    keys: Keys | None = None
    issuer: str | None = None
    audience: str | None = None
    """`token.audience_of` of the node where it is to be used."""
    holder_thumbprint: str | None = None
    """Of the key of whoever shows it."""
    now_ms: int | None = None
    holder_name: str | None = None
    """SPIFFE id of whoever shows it. Only shares are ever made out to a name."""


@dataclass(slots=True)
class Examination:
    """What a token says, believed or not, and what was asked of it."""

    header: dict[str, Any] = field(default_factory=dict)
    claims: dict[str, Any] = field(default_factory=dict)
    token: LeaseToken | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def refusal(self) -> Check | None:
        """The first thing that is wrong, which is what a node would say."""
        return next((each for each in self.checks if each.outcome == FAILED), None)

    @property
    def is_certain(self) -> bool:
        """Whether every question could be put."""
        return all(each.outcome != UNKNOWN for each in self.checks)

    def ask(self, name: str, question: Callable[[], object], shown: str = "") -> bool:
        """Put one question, which raises its refusal; `shown` stands beside `ok`."""
        try:
            found = question()
            self.checks.append(Check(name, OK, detail=found if isinstance(found, str) else shown))
        except FabricError as refusal:
            self.checks.append(Check(name, FAILED, refusal.code, refusal.detail))
            return False
        return True

    def skip(self, why: str, *names: str) -> None:
        self.checks += [Check(name, UNKNOWN, detail=why) for name in names]


MEANING: Final = ("issuer", "node", "times agree", "time", "epoch", "holder")


def examine(text: str | bytes, expected: Expected) -> Examination:
    """All that can be asked of a lease token."""
    seen = Examination()
    segments: list[bytes] = []

    def shape() -> None:
        segments.extend(jws.segments_of(text))

    if not seen.ask("shape", shape):
        return seen
    seen.header, seen.claims = _shown(segments[0]), _shown(segments[1])
    _ask_signature(seen, text, segments, expected.keys)
    if not seen.ask("claims", lambda: _canonical(segments[1])):
        seen.skip("its claims cannot be read", "types", *MEANING)
    elif not seen.ask("types", lambda: _typed(seen)) or seen.token is None:
        seen.skip("a claim is missing or of the wrong type", *MEANING)
    else:
        _ask_meaning(seen, seen.token, expected)
    return seen


def examine_chain(text: str, expected: Expected, verify: VerifyWithKey) -> Examination:
    """All that can be asked of a share, and of what it was made of.

    The time of the root, and whose it is, are no matter: it is for binding, and another's. What is
    asked in their place is asked of the last share.
    """
    seen = examine(text.partition(SEPARATOR)[0], expected)
    seen.checks = [each for each in seen.checks if each.name not in ("time", "holder")]
    root, found = seen.token, []
    if root is None:
        seen.skip("its root cannot be read", "shares", "time", "holder")
        return seen

    def follow() -> None:
        found.append(verify_chain(text, read_root=lambda _: root, verify=verify))

    if not seen.ask("shares", follow, "each follows from the one before it, and allows no more"):
        seen.skip("what it allows is not proved", "time", "holder")
        return seen
    _ask_share(seen, found[0], expected)
    return seen


def _ask_share(seen: Examination, chain: Chain, expected: Expected) -> None:
    scope = chain.scope
    now_ms, key, name = expected.now_ms, expected.holder_thumbprint, expected.holder_name

    def in_time() -> None:
        if now_ms is not None and now_ms >= scope.end_ms:
            raise over(chain.root.lease_id, chain.root.epoch)

    def his() -> None:
        if not scope.to.is_met_by(key=key or "", name=name or ""):
            jws.refuse("HOLDER_MISMATCH")

    if now_ms is None:
        seen.skip("not known here", "time")
    else:
        seen.ask("time", in_time, f"until {scope.end_ms} ms")
    if (key if scope.to.key else name) is None:
        seen.skip("not known here", "holder")
    else:
        seen.ask("holder", his, str(scope.to))


def _ask_signature(
    seen: Examination, text: str | bytes, segments: list[bytes], keys: Keys | None
) -> None:
    if keys is None:
        seen.skip("no keys to verify it with", "key", "signature")
        return
    kid = f"key {seen.header.get('kid', '?')}"

    def known() -> str:
        keys.find(jws.LEASE, segments[0])
        return kid

    if not seen.ask("key", known):
        seen.skip("its key is not known", "signature")
        return
    seen.ask("signature", lambda: jws.check_signature(text, jws.LEASE, keys))


def _canonical(segment: bytes) -> None:
    jws.parse_canonical(jws.from_base64url(segment))


def _typed(seen: Examination) -> None:
    seen.token = LeaseToken.from_claims(seen.claims)


def _ask_meaning(seen: Examination, read: LeaseToken, expected: Expected) -> None:
    """The questions of `token.judge`, in its order, each whatever the others came to."""

    def known(name: str, given: Any, judge: Callable[[LeaseToken, Any], None], shown: str) -> None:
        if given is None:
            seen.skip("not known here", name)
        else:
            seen.ask(name, lambda: judge(read, given), shown)

    known("issuer", expected.issuer, token.judge_issuer, read.issuer)
    known("node", expected.audience, token.judge_audience, read.audience)
    seen.ask("times agree", lambda: token.judge_times(read), f"a TTL of {read.ttl_ms} ms")
    known("time", expected.now_ms, token.judge_moment, f"until {read.exp_ms} ms")
    seen.ask("epoch", lambda: token.judge_epoch(read), str(read.epoch))
    known("holder", expected.holder_thumbprint, token.judge_holder, read.subject)


def _shown(segment: bytes) -> dict[str, Any]:
    """What stands there, for people: read leniently, believed by nobody."""
    try:
        value = json.loads(jws.from_base64url(segment))
    except (FabricError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
