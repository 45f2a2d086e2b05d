"""`grafos audit`: what was recorded, taken out of the fabric and checked without it.

Rules. `verify` needs the file and the public keys, nothing else: no fabric, no network. Without
`--keys` it believes the keys that the file brings, which shows that the file is whole, and not who
wrote it; it says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from grafos._cli import output
from grafos._cli.exits import FAILED, OK
from grafos._cli.nouns import Tree
from grafos._cli.output import Column, Listing
from grafos_core import failure

KEYS_BYTES_MAX = 1 << 20


def register(tree: Tree) -> None:
    noun = tree.noun("audit", "what was recorded, and its proof")
    verify = noun.verb("verify", "check an exported chain, without any fabric", _verify)
    verify.add_argument("file", type=Path)
    verify.add_argument("--keys", type=Path, metavar="FILE", help="public keys to believe, hex")
    verify.add_argument("-o", "--output", choices=("table", "json"), default="table")
    export = noun.verb("export", "every chain as JSON lines, with its keys", _export)
    export.add_argument("--out", type=Path, metavar="FILE", help="[standard output]")
    export.add_argument("--keys-out", type=Path, metavar="FILE", help="the public keys, apart")
    export.add_argument("--origin", default="", help="only this chain: ledger, or a node's id")
    head = noun.verb("head", "how far each chain is stored by the collector", _head)
    output.add_flags(head)


def _verify(given: argparse.Namespace) -> int:
    from grafos._cli.chains import verify_file

    trusted = _read_keys(given.keys) if given.keys else None
    try:
        report = verify_file(given.file, trusted)
    except OSError as error:
        raise failure.of("NOT_FOUND", f"{given.file}: {error.strerror}") from None
    chains: list[dict[str, Any]] = [
        {
            "origin": each.origin, "incarnation": each.incarnation, "first": each.first,
            "number": each.number, "sealed": each.sealed, "seals": each.seals,
            "head": each.head.hex(), "keys": sorted(each.key_ids),
        }
        for each in report.chains.values()
    ]  # fmt: skip
    if given.output == "json":
        problems = [{"line": line, "what": what} for line, what in report.problems]
        print(json.dumps({"ok": report.ok, "chains": chains, "problems": problems}))
        return OK if report.ok else FAILED
    for chain in chains:
        print(f"{chain['origin']}: records {chain['first']} to {chain['number']}, "
              f"{chain['seals']} seals, keys {', '.join(chain['keys'])}")  # fmt: skip
    for line, what in report.problems:
        print(f"line {line}: {what}")
    if report.ok:
        print("whole: every record is linked and sealed")
        if trusted is None:
            output.progress("the keys are those in the file: say --keys to check who wrote it")
    return OK if report.ok else FAILED


def _export(given: argparse.Namespace) -> int:
    from grafos._cli.chains import export_lines
    from grafos._cli.operator import Operator

    keys: set[bytes] = set()
    with Operator(given) as operator:
        lines = export_lines(operator, given.origin, keys)
        if given.out is None:
            count = _write(lines, sys.stdout)
        else:
            with given.out.open("w", encoding="ascii") as file:
                count = _write(lines, file)
    if given.keys_out is not None:
        given.keys_out.write_text("".join(f"{key.hex()}\n" for key in sorted(keys)), "ascii")
    output.progress(f"{count} lines, {len(keys)} public keys")
    return OK


def _write(lines: Iterator[str], file: IO[str]) -> int:
    count = 0
    for line in lines:
        file.write(line + "\n")
        count += 1
    return count


def _read_keys(path: Path) -> set[bytes]:
    """One public key per line, in hexadecimal digits; `#` begins a remark."""
    try:
        text = path.read_text("ascii")[:KEYS_BYTES_MAX]
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        return {bytes.fromhex(line) for line in lines if line}
    except OSError as error:
        raise failure.of("NOT_FOUND", f"{path}: {error.strerror}") from None
    except ValueError:
        raise failure.of("ENCODING", f"{path}: one key in hexadecimal digits per line") from None


def _head(given: argparse.Namespace) -> int:
    from grafos._cli.operator import Operator
    from grafos_proto.v1 import audit_pb2

    with Operator(given) as operator:

        def fetch() -> list[dict[str, Any]]:
            heads = operator.audit("Head", audit_pb2.HeadRequest()).heads
            return [
                {
                    "origin": each.origin, "incarnation": each.incarnation, "number": each.number,
                    "head": each.head.hex(), "quarantined": each.quarantined,
                    "evidence": each.evidence,
                }
                for each in heads
            ]  # fmt: skip

        return output.show(given, fetch, HEADS)


HEADS = Listing(
    [
        Column("CHAIN", lambda row: row["origin"]),
        Column("RECORDS", lambda row: row["number"]),
        Column("STATE", lambda row: "quarantined" if row["quarantined"] else "good"),
        Column("HEAD", lambda row: row["head"][:16]),
        Column("INCARNATION", lambda row: row["incarnation"], wide=True),
        Column("EVIDENCE", lambda row: row["evidence"] or "-", wide=True),
    ],
    name=lambda row: str(row["origin"]),
    empty="no chain is stored",
)
