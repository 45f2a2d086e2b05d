"""Leases are taken back by id or by selector, and every one of them gets its line."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import grafos
from grafos import MemBuilder, MemLease, Revoked
from grafos._cli import exits, main, operator, revocation
from grafos._local import LocalFabric, local_fabric
from tests.sdk.cli.conftest import Cli
from tests.sdk.cluster.stand import eventually

MIB = 1 << 20
WHY = ("--reason", "for maintenance")


@pytest.fixture(scope="module")
def fabric() -> Iterator[LocalFabric]:
    """Two nodes; at the second one no memory can be erased."""
    faults = {"node-n2": "memory.erase:EIO"}
    with local_fabric(2, memory_bytes=64 * MIB, block_bytes=16 * MIB, faults=faults) as started:
        yield started


@pytest.fixture
def ask(cli: Cli, fabric: LocalFabric) -> Cli:
    """The command, speaking to the fabric of this module."""
    layout = fabric.layout

    def run(*words: str, timeout_s: float = 60, **more: str) -> subprocess.CompletedProcess[str]:
        return cli(
            *words, timeout_s=timeout_s, GRAFOS_RUN_DIR=str(layout.run),
            GRAFOS_STATE_DIR=str(layout.state), **more,
        )  # fmt: skip

    return run


@pytest.fixture
def here(fabric: LocalFabric, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, run in this process, speaks to the fabric of this module."""
    monkeypatch.setenv("GRAFOS_RUN_DIR", str(fabric.layout.run))
    monkeypatch.setenv("GRAFOS_STATE_DIR", str(fabric.layout.state))


@contextlib.contextmanager
def held(count: int, node: str = "n1") -> Iterator[list[MemLease]]:
    """Leases that are active by the ledger's knowledge; what is left of them is given back."""
    builder = MemBuilder().min_bytes(4096).where(node=node)
    leases = [builder.acquire() for _ in range(count)]
    connection = grafos._connection.default_fabric()
    mine = ids_of(leases)
    eventually(lambda: mine <= {each.lease_id for each in connection.leases(state="active")})
    try:
        yield leases
    finally:
        for each in leases:
            with contextlib.suppress(grafos.FabricError):
                each.release()


def rows_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {row["lease_id"]: row for row in json.loads(done.stdout)}


def ids_of(leases: list[MemLease]) -> set[str]:
    return {each.lease_id for each in leases}


def test_who_chooses_nothing_takes_nothing(ask: Cli) -> None:
    with held(1) as (lease,):
        for words in ((), ("--node", ""), ("--node", "n1", "--all"), (lease.lease_id, "--all")):
            done = ask("lease", "revoke", *words, *WHY)
            assert (done.returncode, done.stdout) == (exits.USAGE, ""), words
            assert "--all" in done.stderr
        lease.mem().read(0, 1)


def test_a_dry_run_lists_what_would_be_taken_and_takes_nothing(ask: Cli) -> None:
    with held(2) as leases:
        done = ask("lease", "revoke", "--node", "n1", *WHY, "--dry-run", "-o", "name")
        assert (done.returncode, set(done.stdout.split())) == (0, ids_of(leases))
        shown = ask("lease", "revoke", "--all", *WHY, "--dry-run")
        assert shown.stdout.startswith("LEASE")
        for each in leases:
            each.mem().read(0, 1)


def test_a_selector_takes_what_it_names_and_nothing_beside_it(ask: Cli) -> None:
    with held(3) as leases, held(1, "n2") as others:
        for words in (("--node", "n9"), ("--kind", "block"), ("--tenant", "acme")):
            done = ask("lease", "revoke", *words, *WHY, "-o", "json")
            assert (done.returncode, done.stdout) == (0, "[]\n")
        chosen = ("--node", "n1", "--kind", "mem", "--tenant", "default", "--state", "active")
        done = ask("lease", "revoke", *chosen, *WHY, "--wait", "-o", "json")
        assert (done.returncode, done.stderr) == (0, "")
        rows = rows_of(done)
        assert set(rows) == ids_of(leases)
        assert {(row["state"], row["cause"]) for row in rows.values()} == {("released", "revoked")}
        for each in leases:
            with pytest.raises(Revoked):
                each.mem().read(0, 1)
        left = ask("lease", "list", "--node", "n2", "--state", "active", "-o", "name")
        assert set(left.stdout.split()) == ids_of(others)


def test_holders_are_chosen_by_whole_segments_of_their_id(
    ask: Cli, fabric: LocalFabric, place: Path
) -> None:
    people = ("alice", "alice2")
    with contextlib.ExitStack() as stack:
        leases = {}
        for name in people:
            who = f"spiffe://grafos.local/tenant/acme/holder/{name}"
            assert ask("identity", "issue", who, "--out", str(place / name)).returncode == 0
            connection = grafos.connect(fabric.description.admission, identity=place / name)
            stack.callback(connection.close)
            builder = MemBuilder().min_bytes(4096).where(node="n1").fabric(connection)
            leases[name] = builder.acquire()

        def listed(*words: str) -> set[str]:
            return set(ask("lease", "list", *words, "-o", "name").stdout.split())

        both = ids_of(list(leases.values()))
        assert listed("--holder-prefix", "spiffe://grafos.local/tenant/acme/holder/") == both
        assert listed("--tenant", "acme") == both
        alice = "spiffe://grafos.local/tenant/acme/holder/alice"
        assert listed("--holder-prefix", alice) == {leases["alice"].lease_id}
        done = ask("lease", "revoke", "--holder-prefix", alice, *WHY, "--wait")
        assert (done.returncode, done.stdout.split()[0]) == (0, leases["alice"].lease_id)
        leases["alice2"].mem().read(0, 1)
        with pytest.raises(Revoked):
            leases["alice"].mem().read(0, 1)


def test_waiting_tells_what_is_fenced_and_fails_for_it(ask: Cli) -> None:
    with held(1) as good, held(1, "n2") as bad:
        ids = [each.lease_id for each in (*good, *bad)]
        done = ask("lease", "revoke", *ids, *WHY, "--wait")
        assert done.returncode == exits.FAILED
        first, second = done.stdout.splitlines()
        assert first == f"{ids[0]} released (revoked)"
        assert second.startswith(f"{ids[1]} fenced (")
        assert "EIO" in second


def test_without_waiting_the_order_is_enough(ask: Cli) -> None:
    with held(1) as (lease,):
        done = ask("lease", "revoke", lease.lease_id[:10], *WHY, "--grace", "30")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{lease.lease_id} ending (revoked)\n")


def described(ask: Cli, lease_id: str) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(ask("lease", "describe", lease_id, "-o", "json").stdout)
    return shown


def test_the_stage_that_is_shown_is_what_the_node_has_told(ask: Cli) -> None:
    with held(2) as (saved, silent):
        for grace in ("60", "30"):
            done = ask("lease", "revoke", "--node", "n1", *WHY, "--grace", grace)
            assert done.returncode == 0, done.stderr
        for each in (saved, silent):
            eventually(lambda: described(ask, each.lease_id)["stage"] == "grace_running")  # noqa: B023
            assert described(ask, each.lease_id)["grace_ms"] == 30_000
        assert saved.checkpoint_done().revoke_stage == "checkpoint_reported"
        eventually(lambda: described(ask, saved.lease_id)["stage"] == "torndown")
        silent.mem().read(0, 1)
        done = ask("lease", "revoke", silent.lease_id, *WHY, "--wait")
        assert done.stdout == f"{silent.lease_id} released (revoked)\n"
        with pytest.raises(Revoked):
            silent.mem().read(0, 1)


def test_a_signing_key_is_revoked_with_all_that_it_signed(ask: Cli) -> None:
    with held(1) as (before,):
        (key_id,) = described(ask, before.lease_id)["key_ids"]
        assert ask("lease", "revoke", "--key", "0" * 16, *WHY).returncode == exits.NOT_FOUND
        shown = ask("lease", "revoke", "--key", key_id, *WHY, "--dry-run", "-o", "name")
        assert shown.stdout.split() == [before.lease_id]
        done = ask("lease", "revoke", "--key", key_id, *WHY, "--wait", "-o", "name")
        assert (done.returncode, done.stdout.split()) == (0, [before.lease_id])
        with pytest.raises(Revoked):
            before.mem().read(0, 1)
    with held(1) as (after,):
        (other,) = described(ask, after.lease_id)["key_ids"]
        assert other != key_id
        after.mem().read(0, 1)


def test_a_lease_that_does_not_end_in_time_is_status_5(
    fabric: LocalFabric, here: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("GRAFOS_TIMEOUT_S", "1")
    monkeypatch.setattr(revocation, "TEARDOWN_MS_MAX", 0)
    with held(1) as (lease,):
        fabric.kill("node-n1", signal.SIGSTOP)  # for less long than its warden puts up with
        try:
            status = main(["lease", "revoke", lease.lease_id, *WHY, "--wait", "-o", "json"])
        finally:
            fabric.kill("node-n1", signal.SIGCONT)
        (row,) = json.loads(capsys.readouterr().out)
        assert (status, row["lease_id"], row["state"]) == (exits.TIMEOUT, lease.lease_id, "ending")


def test_an_id_that_does_not_exist_stops_before_the_first_order(ask: Cli) -> None:
    with held(1) as (lease,):
        done = ask("lease", "revoke", lease.lease_id, "f" * 32, *WHY)
        assert (done.returncode, done.stdout) == (exits.NOT_FOUND, "")
        lease.mem().read(0, 1)


def test_many_leases_go_in_many_pages_and_messages(
    here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operator, "PAGE_MAX", 2)
    monkeypatch.setattr(revocation, "BATCH", 3)
    monkeypatch.setattr(revocation, "LOOK_ONE_BY_ONE_MAX", 1)
    with held(7) as leases:
        words = ["lease", "revoke", "--node", "n1", *WHY, "--wait", "-o", "name"]
        assert main(words) == 0
        assert set(capsys.readouterr().out.split()) == ids_of(leases)
        monkeypatch.setattr(operator, "LEASES_MAX", 2)
    with held(5):
        assert main(["lease", "list"]) == exits.FAILED
        assert "say more of which" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statuses", "whole"),
    [([], 0), ([0, 0], 0), ([0, 5, 5], 5), ([1], 1), ([3, 5], 1), ([0, 3], 3)],
)
def test_many_things_end_as_those_that_failed(statuses: list[int], whole: int) -> None:
    assert exits.together(statuses) == whole
