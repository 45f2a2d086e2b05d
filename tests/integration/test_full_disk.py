"""The ledger's disk is full: nothing new is promised, and all that was promised is kept.

What the ledger alone does then, and with a damaged or a doubly used file, is tried in
tests/services/ledger; here it is what holders meet, with every service in between.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.town import Refused, Town, Visitor, town_in

DISK_MIB = 28
"""The ledger takes 16 of it in reserve."""
CYCLES_MAX = 3_000
AGAIN_S_MAX = 20.0


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    with town_in(tmp_path / "town", walls=False) as made:
        disk = made.members["ledger"].folder / "state"
        disk.mkdir(mode=0o700)
        options = f"size={DISK_MIB}m,mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)
        try:
            made.start()
            yield made
        finally:
            made.stop()
            subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


def give_and_take(holder: Visitor) -> str:
    """The code of the refusal; empty: it went well."""
    try:
        lease = holder("acquire", kind="mem", node="n1", ttl=60, wait=5)
    except Refused as refused:
        return f"{refused.code}"
    holder("release", lease_id=lease["lease_id"])
    return ""


@pytest.mark.root
@pytest.mark.requires("mount", "umount")
def test_a_full_disk_refuses_what_is_new_and_keeps_what_was_promised(town: Town) -> None:
    holder, operator = town.visit("holder"), town.visit("operator")
    assert give_and_take(holder) == ""
    kept = [holder("acquire", kind=kind, node="n1", ttl=60) for kind in ("mem", "block")]
    for lease in kept:
        holder("write", lease_id=lease["lease_id"], text="promised")
    filler = fill(town.members["ledger"].folder / "state")
    refusals = (give_and_take(holder) for _ in range(CYCLES_MAX))
    assert next((code for code in refusals if code), "") == "DISK"
    for lease in kept:
        assert holder("renew", lease_id=lease["lease_id"]) > 50_000
        assert holder("read", lease_id=lease["lease_id"], length=8) == "promised"
        assert holder("release", lease_id=lease["lease_id"]) == {
            "outcome": "torndown",
            "credited": True,
        }
    assert give_and_take(holder) == "DISK"
    books = operator("books", endpoint=town.members["ledger"].endpoint)
    assert all(free == total for _, _, _, free, total in books)
    filler.unlink()
    until = time.monotonic() + AGAIN_S_MAX
    while (code := give_and_take(holder)) and time.monotonic() < until:
        time.sleep(0.2)
    assert code == ""
