"""What an operator asks and tells a running fabric, as he types it; all services are real."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from grafos import BlockBuilder, Fenced, MemBuilder, RateLimited, Revoked, _clock
from grafos._calls import new_request_id
from grafos._cli import exits, main
from grafos._connection import default_fabric
from grafos._local import LocalFabric, local_fabric
from tests.sdk.cli.conftest import Cli
from tests.sdk.cluster.stand import eventually

MIB = 1 << 20


@pytest.fixture(scope="module")
def fabric() -> Iterator[LocalFabric]:
    """Two nodes; at the second one no memory can be erased."""
    faults = {"node-n2": "memory.erase:EIO"}
    with local_fabric(2, memory_bytes=64 * MIB, block_bytes=64 * MIB, faults=faults) as started:
        yield started


@pytest.fixture
def ask(cli: Cli, fabric: LocalFabric) -> Cli:
    """The command, speaking to the fabric of this module."""
    layout = fabric.layout

    def run(*words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        return cli(
            *words, timeout_s=timeout_s, GRAFOS_RUN_DIR=str(layout.run),
            GRAFOS_STATE_DIR=str(layout.state),
        )  # fmt: skip

    return run


def restarted_with(fabric: LocalFabric, name: str, fault: str) -> None:
    fabric.set_fault(name, fault)
    fabric.wait_replaced(name, fabric.kill(name))
    fabric.wait_ready()


def test_a_lease_is_listed_described_and_revoked_with_its_reason(ask: Cli) -> None:
    with MemBuilder().min_bytes(8192).where(node="n1").acquire() as lease:
        row = eventually(
            lambda: [
                each
                for each in json.loads(ask("lease", "list", "-o", "json").stdout)
                if each["lease_id"] == lease.lease_id and each["state"] == "active"
            ]
        )[0]
        assert (row["kind"], row["amount"], row["node_id"]) == ("mem", 8192, "n1")
        assert lease.lease_id[:12] in ask("lease", "list", "--node", "n1").stdout
        assert ask("lease", "list", "--node", "n2", "-o", "name").stdout == ""
        described = ask("lease", "describe", lease.lease_id[:8])
        assert "on_holder_exit:" in described.stdout
        assert re.search(
            r"granted_at_ms: +\d{13} \(20\d\d-\d\d-\d\d [\d:]{8} UTC\)\n", described.stdout
        )
        assert re.search(r"key_ids: +[0-9a-f]{16}\n", described.stdout)
        revoked = ask("lease", "revoke", lease.lease_id, "--reason", "for maintenance")
        assert revoked.returncode == 0, revoked.stderr
        with pytest.raises(Revoked):
            eventually(lambda: lease.mem().read(0, 1) and False, 5_000)


def test_what_does_not_exist_is_status_3_and_one_line(ask: Cli) -> None:
    for words in (("lease", "describe", "f" * 32), ("lease", "describe", "fffffff")):
        done = ask(*words)
        assert done.returncode == 3, done.stderr
        assert done.stdout == ""
        assert done.stderr.startswith("grafos: Denied (NOT_FOUND)")
        assert done.stderr.count("\n") == 1


def test_a_request_that_cannot_be_met_is_explained_term_by_term(ask: Cli) -> None:
    done = ask("lease", "explain", "--amount", "1GiB", "-o", "json")
    assert (done.returncode, done.stderr) == (1, "")
    answer = json.loads(done.stdout)
    assert not answer["admissible"]
    assert {node["node_id"] for node in answer["nodes"]} == {"n1", "n2"}
    assert "yes, at node" in ask("lease", "explain", "--amount", "1MiB").stdout


def test_nodes_are_listed_with_their_books(ask: Cli) -> None:
    rows = {row["node_id"]: row for row in json.loads(ask("node", "list", "-o", "json").stdout)}
    assert set(rows) == {"n1", "n2"}
    book = rows["n1"]["capacity"]["mem"]
    assert book["total"] == 64 * MIB
    assert book["total"] == sum(book[part] for part in book if part != "total")


def test_a_node_is_not_forgotten_without_saying_that_residue_is_accepted(ask: Cli) -> None:
    done = ask("node", "forget", "n1", "--reason", "gone")
    assert (done.returncode, "--i-accept-residue" in done.stderr) == (1, True)
    unknown = ask("node", "forget", "n9", "--reason", "gone", "--i-accept-residue")
    assert unknown.returncode == 3, unknown.stderr


def test_a_quota_refuses_what_goes_beyond_it(ask: Cli) -> None:
    assert ask("quota", "set", "default", "--kind", "block", "--count", "1").returncode == 0
    with BlockBuilder().min_blocks(1).acquire():
        rows = json.loads(ask("quota", "get", "default", "-o", "json").stdout)
        row = next(row for row in rows if row["kind"] == "block")
        assert (row["count"], row["used_count"]) == (1, 1)
        with pytest.raises(RateLimited):
            BlockBuilder().min_blocks(1).acquire()
    assert ask("quota", "set", "default", "--kind", "block").returncode == 0


def test_a_fence_is_listed_probed_and_cleared_only_when_the_slice_is_clean(
    ask: Cli, fabric: LocalFabric
) -> None:
    lease = MemBuilder().min_bytes(MIB).where(node="n2").acquire()
    lease.mem().write(0, b"cannot be erased")
    with pytest.raises(Fenced):
        lease.release()
    listed = ask("fence", "list", "--node", "n2", "-o", "json")
    fence = next(f for f in json.loads(listed.stdout) if f["lease_id"] == lease.lease_id)
    assert fence["fence_cause"]
    assert "cause:" in ask("fence", "describe", lease.lease_id).stdout
    dirty = ask("fence", "clear", lease.lease_id, "--reason", "too early", "--no-wait")
    assert dirty.returncode == 0, dirty.stderr
    assert ask("fence", "probe", lease.lease_id).returncode == exits.FAILED
    dirty = ask("fence", "clear", lease.lease_id, "--reason", "too early")
    assert (dirty.returncode, dirty.stdout) == (
        exits.FAILED,
        f"{lease.lease_id} fenced: not clean\n",
    )
    assert ask("fence", "list", "-o", "name").stdout.split() == [lease.lease_id]
    restarted_with(fabric, "node-n2", "")
    done = ask("fence", "clear", lease.lease_id, "--reason", "the device works again")
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout == f"{lease.lease_id} released\n"
    assert ask("fence", "list", "-o", "name").stdout == ""
    for words in (("describe",), ("probe",), ("clear", "--reason", "once more")):
        assert ask("fence", words[0], lease.lease_id, *words[1:]).returncode == exits.NOT_FOUND


def test_a_node_that_does_not_answer_is_told_from_a_slice_that_is_not_clean(
    fabric: LocalFabric, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restarted_with(fabric, "node-n2", "memory.erase:EIO")
    lease = MemBuilder().min_bytes(MIB).where(node="n2").acquire()
    with pytest.raises(Fenced):
        lease.release()
    monkeypatch.setenv("GRAFOS_RUN_DIR", str(fabric.layout.run))
    monkeypatch.setenv("GRAFOS_STATE_DIR", str(fabric.layout.state))
    monkeypatch.setenv("GRAFOS_TIMEOUT_S", "1")
    monkeypatch.setattr("grafos._cli.fence.CLEAR_MS_MAX", 500)
    fabric.set_fault("node-n2", "")
    agent = fabric.kill("node-n2", signal.SIGSTOP)
    assert main(["fence", "probe", lease.lease_id]) == exits.TIMEOUT
    assert main(["fence", "clear", lease.lease_id, "--reason", "drill"]) == exits.TIMEOUT
    assert "the order stands" in capsys.readouterr().out
    fabric.kill("node-n2")
    fabric.wait_replaced("node-n2", agent)
    fabric.wait_ready()
    eventually(lambda: main(["fence", "describe", lease.lease_id]) == exits.NOT_FOUND)


def test_exported_chains_are_verified_without_the_fabric_and_a_changed_byte_is_found(
    ask: Cli, cli: Cli, place: Path
) -> None:
    MemBuilder().min_bytes(4096).where(node="n1").acquire().release()
    exported, keys = place / "chains.jsonl", place / "keys"

    def export() -> bool:
        """Whether it holds a grant; the ledger sends its records to the collector in batches."""
        done = ask("audit", "export", "--out", str(exported), "--keys-out", str(keys))
        assert done.returncode == 0, done.stderr
        return '"lease.granted"' in exported.read_text()

    eventually(export)
    whole = cli("audit", "verify", str(exported), "--keys", str(keys), "-o", "json")
    assert whole.returncode == 0, whole.stdout
    assert {chain["origin"] for chain in json.loads(whole.stdout)["chains"]} >= {"ledger", "n1"}
    text = exported.read_text()
    at = text.index('"lease.granted"')
    exported.write_text(text[:at] + '"lease.grantee"' + text[at + 15 :])
    changed = cli("audit", "verify", str(exported), "--keys", str(keys))
    assert (changed.returncode, "line " in changed.stdout) == (1, True)
    exported.write_text(text)
    strangers = place / "strangers"
    strangers.write_text("00" * 32 + "\n")
    assert cli("audit", "verify", str(exported), "--keys", str(strangers)).returncode == 1


def test_heads_name_every_chain(ask: Cli) -> None:
    origins = ask("audit", "head", "-o", "name").stdout.split()
    assert set(origins) >= {"ledger", "n1", "n2"}


def test_a_watch_goes_on_until_it_is_interrupted(ask: Cli) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as ended:
        ask("lease", "list", "--watch", "-o", "json", timeout_s=4)
    assert json.loads(ended.value.stdout or b"[]") == []


class TestToken:
    """A token that was granted and not bound, in the hands of who wonders about it."""

    @pytest.fixture
    def slip(self, fabric: LocalFabric, place: Path) -> Path:
        from grafos_proto.v1 import admission_pb2, lease_pb2

        request = admission_pb2.AcquireRequest(
            request_id=new_request_id(), kind=lease_pb2.KIND_MEM, amount=4096, ttl_ms=60_000,
            where={"node": "n1"},
        )  # fmt: skip
        path = place / "slip"
        path.write_text(default_fabric()._ask("Acquire", request, 10_000).token + "\n")
        return path

    def why(self, ask: Cli, *words: str) -> tuple[int, dict[str, str], str]:
        done = ask("token", "why-denied", *words, "-o", "json")
        whole = json.loads(done.stdout)
        failed = {
            each["check"]: each["code"] for each in whole["checks"] if each["outcome"] == "failed"
        }
        return done.returncode, failed, whole["verdict"]

    def test_what_it_says_is_shown(self, ask: Cli, slip: Path) -> None:
        shown = ask("token", "inspect", str(slip)).stdout
        assert "grafos-lease+jwt" in shown
        assert "(in " in shown
        raw = json.loads(ask("token", "inspect", str(slip), "-o", "json").stdout)
        assert raw["claims"]["aud"].startswith("n1/")
        assert ask("token", "inspect", str(slip.parent)).returncode == 1
        slip.write_text("nothing like it")
        assert ask("token", "inspect", str(slip)).returncode == 4

    def test_every_reason_is_given(self, ask: Cli, slip: Path) -> None:
        me = default_fabric()._provider().thumbprint
        assert self.why(ask, str(slip), "--holder-key", me) == (0, {}, "accepted")
        assert self.why(ask, str(slip)) == (1, {}, "not certain")
        refused = self.why(ask, str(slip), "--holder-key", "A" * 43, "--node", "n2")
        assert refused[:2] == (4, {"holder": "HOLDER_MISMATCH", "node": "TOKEN_AUDIENCE"})
        late = str(_clock.wall_ms() + 3_600_000)
        assert self.why(ask, str(slip), "--at", late)[1] == {"time": "TOKEN_EXPIRED"}
        said = ask("token", "why-denied", str(slip), "--at", late).stdout
        assert "renew the lease, or acquire anew" in said

    def test_of_a_lease_that_is_over_the_ledger_knows(self, ask: Cli, slip: Path) -> None:
        raw = json.loads(ask("token", "inspect", str(slip), "-o", "json").stdout)
        lease_id = raw["claims"]["lease"]
        assert ask("lease", "revoke", lease_id, "--reason", "tried", "--wait").returncode == 0
        assert self.why(ask, str(slip))[1] == {"lease": "EPOCH_BURNT"}

    def test_a_share_is_asked_about_as_a_whole(self, ask: Cli, slip: Path) -> None:
        with MemBuilder().min_bytes(8192).where(node="n1").acquire() as lease:
            friend = "spiffe://grafos.local/tenant/default/holder/friend"
            slip.write_text(lease.share(ops=("read",), to=friend).text)
            shown = ask("token", "inspect", str(slip)).stdout
            assert "share 1, of the one above" in shown
            assert friend in shown
            checks = json.loads(ask("token", "why-denied", str(slip), "-o", "json").stdout)
            found = {each["check"]: each["outcome"] for each in checks["checks"]}
            assert (found["signature"], found["shares"], found["lease"]) == ("ok", "ok", "ok")
            assert (found["holder"], checks["verdict"]) == ("unknown", "not certain")

    def test_without_a_fabric_saved_keys_do(self, cli: Cli, ask: Cli, slip: Path) -> None:
        keys = str(slip.with_name("keys.json"))
        assert ask("token", "why-denied", str(slip), "--save-keys", keys).returncode == 1
        me = default_fabric()._provider().thumbprint
        status, failed, verdict = self.why(cli, str(slip), "--keys", keys, "--holder-key", me)
        assert (status, failed, verdict) == (1, {}, "not certain"), "nobody was asked of the lease"
        text = slip.read_text()
        slip.write_text(text[:-10] + ("A" if text[-10] != "A" else "B") + text[-9:])
        assert self.why(cli, str(slip), "--keys", keys)[1] == {"signature": "TOKEN_SIGNATURE"}
        assert cli("token", "why-denied", str(slip), "--keys", str(slip)).returncode == 1
