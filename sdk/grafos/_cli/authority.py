"""`grafos ca` and `grafos identity`: the fabric's authority, and certificates by hand."""

from __future__ import annotations

import argparse
from pathlib import Path

from grafos import _clock
from grafos._cli import settings
from grafos._cli.exits import OK
from grafos._cli.nouns import Tree
from grafos._cluster.layout import make_private
from grafos._cluster.programs import TRUST_DOMAIN_DEFAULT


def register(tree: Tree) -> None:
    ca = tree.noun("ca", "the authority that signs who is who")
    init = ca.verb("init", "make an authority whose root key can be taken away", _init)
    init.add_argument("--dir", type=Path, help="its folder [<state>/ca]")
    init.add_argument("--root-dir", type=Path, help="where the root's key is put; keep it offline")
    init.add_argument("--trust-domain", metavar="NAME", help="name of the fabric [grafos.local]")
    renew = ca.verb("renew", "a new intermediate, signed with the root's key", _renew)
    renew.add_argument("--dir", type=Path, help="its folder [<state>/ca]")
    renew.add_argument("--root-dir", type=Path, required=True, help="where the root's key is")
    identity = tree.noun("identity", "certificates")
    issue = identity.verb("issue", "a key and its certificate, in a folder", _issue)
    issue.add_argument("spiffe_id", help="such as spiffe://grafos.local/tenant/acme/holder/alice")
    issue.add_argument("--out", type=Path, required=True, metavar="DIR")
    issue.add_argument("--dir", type=Path, help="the authority's folder [<state>/ca]")
    issue.add_argument("--ttl", type=int, default=3600, metavar="S", help="life [3600]")


def _folder(given: argparse.Namespace) -> Path:
    if given.dir is not None:
        return Path(given.dir).absolute()
    layout = settings.the_layout(given)
    make_private(layout.state)
    return layout.authority


def _init(given: argparse.Namespace) -> int:
    from grafos._authority import ca_init

    root = given.root_dir.absolute() if given.root_dir else None
    authority = ca_init(
        _folder(given), now_ms=_clock.wall_ms(), root_directory=root,
        trust_domain=settings.value(given, "trust_domain") or TRUST_DOMAIN_DEFAULT,
    )  # fmt: skip
    print(f"authority of {authority.trust_domain} in {_folder(given)}, root {authority.pin}")
    return OK


def _renew(given: argparse.Namespace) -> int:
    from grafos._authority import ca_renew

    now_ms = _clock.wall_ms()
    authority = ca_renew(_folder(given), given.root_dir.absolute(), now_ms=now_ms)
    left_h = (authority.not_after_ms - now_ms) / 3_600_000
    print(
        f"authority of {authority.trust_domain} signs for another {left_h:.0f} h without its root"
    )
    return OK


def _issue(given: argparse.Namespace) -> int:
    from grafos._authority import identity_issue

    made = identity_issue(
        _folder(given), given.spiffe_id, given.out.absolute(), ttl_ms=given.ttl * 1000,
        now_ms=_clock.wall_ms(),
    )  # fmt: skip
    print(f"{made.identity} in {given.out.absolute()}")
    return OK
