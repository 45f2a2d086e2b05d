"""What a fabric was made with, so that starting it again needs no flags.

Rules. The size of the nodes' block files and the name of the fabric are part of its state: they are
written down at the first start, taken from there at every later one, and a flag that contradicts
them is refused before anything runs. How many nodes there are, and how much memory each leases out,
may change from start to start.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from grafos._cluster.layout import shown_size
from grafos._cluster.programs import BLOCK_BYTES_DEFAULT, TRUST_DOMAIN_DEFAULT, Plan
from grafos_core import failure

FILE_NAME: Final = "plan.json"
VERSION: Final = 1


def remembered(plan: Plan, state: Path) -> Plan:
    """The plan with what this state was made with; written down if this is its first start."""
    path = state / FILE_NAME
    try:
        raw = json.loads(path.read_text("utf-8"))
        version, made_with = raw["v"], (int(raw["block_bytes"]), str(raw["trust_domain"]))
    except FileNotFoundError:
        return _remember(plan, path)
    except (OSError, ValueError, KeyError, TypeError):
        raise failure.of("ENCODING", f"{path} cannot be read") from None
    if version != VERSION:
        raise failure.of("VERSION", f"{path}: version {VERSION} is known here")
    block_bytes, trust_domain = made_with
    if plan.block_bytes not in (0, block_bytes):
        raise failure.of(
            "INVALID",
            f"this state was made with {shown_size(block_bytes)} of blocks per node, not "
            f"{shown_size(plan.block_bytes)}: leave --block out, or choose another --state-dir",
        )
    if plan.trust_domain not in ("", trust_domain):
        raise failure.of("INVALID", f"this state belongs to the trust domain {trust_domain}")
    return replace(plan, block_bytes=block_bytes, trust_domain=trust_domain)


def _remember(plan: Plan, path: Path) -> Plan:
    made = replace(
        plan,
        block_bytes=plan.block_bytes or BLOCK_BYTES_DEFAULT,
        trust_domain=plan.trust_domain or _domain_of_authority(path.parent),
    )
    _write(made, path)
    return made


def _domain_of_authority(state: Path) -> str:
    """Of the one that `grafos ca init` has made here, if it has."""
    try:
        raw = json.loads((state / "ca" / "authority.json").read_text("utf-8"))
        return str(raw["trust_domain"])
    except FileNotFoundError:
        return TRUST_DOMAIN_DEFAULT
    except (OSError, ValueError, KeyError, TypeError):
        raise failure.of("ENCODING", "the authority's settings cannot be read") from None


def _write(made: Plan, path: Path) -> None:
    draft = path.with_suffix(".new")
    text = {"v": VERSION, "block_bytes": made.block_bytes, "trust_domain": made.trust_domain}
    draft.write_text(json.dumps(text) + "\n", "utf-8")
    os.replace(draft, path)
