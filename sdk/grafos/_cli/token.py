"""`grafos token`: what a token says, and why it was refused.

Rules. The token comes from a file or from standard input, never as an argument, which every user of
the machine could read. What is shown is what stands there, believed or not. `why-denied` puts all
the questions that a node puts, and those that the ledger alone can answer about the lease; without
a fabric it asks what can be asked with the keys of a file. What could not be asked is said.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grafos import _clock
from grafos._cli import output
from grafos._cli.exits import ADVICE, DENIED, FAILED, OK
from grafos._cli.nouns import Tree
from grafos._cli.output import Column, Listing
from grafos_core import denial, failure, jws, token
from grafos_core.denial import Check, Examination, Expected
from grafos_core.share import SEPARATOR
from grafos_core.spiffe import Identity, Role

if TYPE_CHECKING:
    from grafos._cli.operator import Operator
    from grafos_proto.v1 import ledger_pb2

INSTANTS: Final = ("iat", "nbf", "exp_ms", "lease_end_ms", "lifetime_end_ms")
EPILOG: Final = (
    "Exit status: 0 where a node would take the token, 1 where that cannot be said, 4 where it "
    "would be refused."
)


def register(tree: Tree) -> None:
    noun = tree.noun("token", "what a token says, and why it was refused")
    inspect = noun.verb("inspect", "show what stands in a token; verifies nothing", _inspect)
    why = noun.verb("why-denied", "put the questions that a node puts, and show the answers", _why)
    why.epilog = EPILOG
    for verb in (inspect, why):
        verb.add_argument("file", nargs="?", default="-", help="with the token; - is the default")
        output.add_flags(verb, watch=False)
    why.add_argument("--node", default="", metavar="ID", help="where it was shown; else its own")
    why.add_argument("--holder-key", default="", metavar="JKT", help="thumbprint of who showed it")
    why.add_argument(
        "--identity-dir", default="", metavar="DIR", help="or the folder of who showed it"
    )
    why.add_argument("--at", type=int, default=0, metavar="MS", help="wall time; else now")
    why.add_argument("--keys", default="", metavar="FILE", help="ask no fabric: keys as JSON")
    why.add_argument("--save-keys", default="", metavar="FILE", help="write the fabric's keys")


def _read(given: argparse.Namespace) -> str:
    try:
        text = sys.stdin.read() if given.file == "-" else Path(given.file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise failure.of("INVALID", f"{given.file} cannot be read: {error}") from None
    if not text.strip():
        raise failure.of("EMPTY", "a token is expected in the file, or on standard input")
    return text.strip().partition("#")[0]  # behind it a share says where its node is


def _inspect(given: argparse.Namespace) -> int:
    slips = [denial.examine(slip, Expected()) for slip in _read(given).split(SEPARATOR)]
    if not any(each.header or each.claims for each in slips):
        raise failure.of("TOKEN_ENCODING", "neither header nor claims can be read")
    if given.output == "json":
        whole = [{"header": each.header, "claims": each.claims} for each in slips]
        print(json.dumps(whole[0] if len(whole) == 1 else whole, sort_keys=True))
        return OK
    for number, each in enumerate(slips):
        if number:
            print(f"\nshare {number}, of the one above")
        print(output.facts(_facts(each)), end="")
    return OK


def _facts(seen: Examination) -> list[tuple[str, Any]]:
    shown = [(name, str(value)) for name, value in sorted(seen.header.items())]
    for name, value in seen.claims.items():
        shown.append((name, _with_time(name, value)))
    return shown


def _with_time(name: str, value: Any) -> str:
    if name not in INSTANTS or type(value) is not int:
        return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)
    ms = value if name.endswith("_ms") else value * 1000
    left_ms = ms - _clock.wall_ms()
    when = f"in {output.duration(left_ms)}" if left_ms > 0 else f"{output.duration(-left_ms)} ago"
    return f"{value} ({when})"


def _why(given: argparse.Namespace) -> int:
    text = _read(given)
    expected = _shown_by(given)
    if given.keys:
        seen = _examined(text, _by_file(given, text, expected))
        seen.skip("no fabric was asked", "lease")
    else:
        seen = _asked(given, text, expected)
    status = DENIED if seen.refusal else OK if seen.is_certain else FAILED
    output.show(given, lambda: _answer(seen), CHECKS)
    return status


def _asked(given: argparse.Namespace, text: str, expected: Expected) -> Examination:
    """With what the fabric of this machine knows."""
    from grafos._cli.operator import Operator

    with Operator(given) as operator:
        snapshot = operator.snapshot()
        if given.save_keys:
            _save(Path(given.save_keys), snapshot, operator.description.trust_domain)
        audiences = {each.node_id: each.incarnation for each in snapshot.nodes}
        node_id = given.node or _own_node(text)
        if given.node and given.node not in audiences:
            raise failure.of("NOT_FOUND", f"no node {given.node} is registered")
        known = Expected(
            _keys((each.key_id, each.public_key) for each in snapshot.keys if each.use == "lease"),
            _issuer(operator.description.trust_domain),
            token.audience_of(node_id, audiences.get(node_id, "gone")),
            expected.holder_thumbprint,
            expected.now_ms,
            expected.holder_name,
        )
        seen = _examined(text, known)
        _ask_ledger(seen, operator)
        return seen


def _ask_ledger(seen: Examination, operator: Operator) -> None:
    """Whether the lease is what the token says it is."""
    from grafos_proto.wire import convert

    read = seen.token
    if read is None:
        seen.skip("it names no lease", "lease")
        return

    def state() -> str:
        lease = convert.lease_from_proto(operator.lease(read.lease_id))
        if lease.epoch != read.epoch:
            raise failure.of("EPOCH_STALE", f"the lease has epoch {lease.epoch}")
        if lease.state.value not in ("pending", "active"):
            raise failure.of("EPOCH_BURNT", f"the lease is {lease.state.value}")
        if lease.generation > read.generation:
            raise failure.of("LEASE_BOUND", f"generation {lease.generation} was issued since")
        return lease.state.value

    seen.ask("lease", state)


def _by_file(given: argparse.Namespace, text: str, expected: Expected) -> Expected:
    try:
        saved = json.loads(Path(given.keys).read_text())
        keys = [(each["key_id"], base64.b64decode(each["public_key"])) for each in saved["keys"]]
        domain, nodes = saved["trust_domain"], dict(saved["nodes"])
    except (OSError, ValueError, TypeError, KeyError, binascii.Error) as error:
        what = "not keys as --save-keys writes them"
        raise failure.of("INVALID", f"{given.keys}: {what} ({type(error).__name__})") from None
    node_id = given.node or _own_node(text)
    audience = token.audience_of(node_id, nodes[node_id]) if node_id in nodes else None
    return replace(expected, keys=_keys(keys), issuer=_issuer(domain), audience=audience)


def _save(path: Path, snapshot: ledger_pb2.SnapshotResponse, trust_domain: str) -> None:
    """Public keys, and which incarnation each node has: enough to ask again without a fabric."""
    keys = [
        {"key_id": each.key_id, "public_key": base64.b64encode(each.public_key).decode()}
        for each in snapshot.keys
        if each.use == "lease"
    ]
    nodes = {each.node_id: each.incarnation for each in snapshot.nodes}
    whole = {"trust_domain": trust_domain, "nodes": nodes, "keys": keys}
    path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def _keys(known: Any) -> jws.Keys:
    from grafos._receipt import verifier_of

    keys = jws.Keys()
    for key_id, public_key in known:
        keys.add(jws.LEASE, key_id, verifier_of(public_key))
    return keys


def _issuer(trust_domain: str) -> str:
    return str(Identity(trust_domain, Role.SERVICE, None, "admission"))


def _own_node(text: str) -> str:
    """The node that a token names; where it names none, the question fails by itself."""
    root = text.partition(SEPARATOR)[0]
    return str(denial.examine(root, Expected()).claims.get("aud", "")).partition("/")[0]


def _shown_by(given: argparse.Namespace) -> Expected:
    """Who showed it, and when, as far as that was said."""
    now_ms = given.at or _clock.wall_ms()
    if not given.identity_dir:
        return Expected(holder_thumbprint=given.holder_key or None, now_ms=now_ms)
    from grafos_proto.wire.credentials import IdentityFiles

    try:
        known = IdentityFiles(Path(given.identity_dir))()
    except OSError as error:
        raise failure.of("INVALID", f"{given.identity_dir}: {error.strerror}") from None
    return Expected(
        holder_thumbprint=given.holder_key or known.thumbprint, now_ms=now_ms,
        holder_name=str(known.identity),
    )  # fmt: skip


def _examined(text: str, expected: Expected) -> Examination:
    from grafos_proto.wire import es256

    if SEPARATOR in text:
        return denial.examine_chain(text, expected, es256.verify)
    return denial.examine(text, expected)


def _answer(seen: Examination) -> dict[str, Any]:
    rows = [_row(each) for each in seen.checks]
    refusal = seen.refusal
    verdict = "refused" if refusal else "accepted" if seen.is_certain else "not certain"
    code = refusal.code if refusal else ""
    return {"items": rows, "whole": {"verdict": verdict, "code": code, "checks": rows}}


def _row(check: Check) -> Mapping[str, Any]:
    said = check.detail
    if check.code:
        refusal = failure.of(check.code, check.detail)
        said = "; ".join(filter(None, (str(refusal), ADVICE.get(check.code))))
    return {"check": check.name, "outcome": check.outcome, "code": check.code, "detail": said}


CHECKS = Listing(
    [
        Column("CHECK", lambda row: row["check"]),
        Column("ANSWER", lambda row: row["outcome"]),
        Column("CODE", lambda row: row["code"] or "-"),
        Column("DETAIL", lambda row: row["detail"]),
    ],
    name=lambda row: f"{row['check']}={row['outcome']}",
)
