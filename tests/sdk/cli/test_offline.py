"""What the command does without any fabric: authority, settings, completion, checks."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from grafos._cli import completion, settings
from grafos._cli.exits import exit_status, explained
from grafos._cli.output import Column, Listing, duration, rendered
from grafos._cli.parser import build
from grafos._cluster.layout import parse_size, shown_size
from grafos._cluster.machine import UNLIMITED, group_headroom, memory_for_each
from grafos._cluster.programs import free_ports
from grafos_core import failure
from tests.sdk.cli.conftest import Cli


def test_an_authority_is_made_and_issues_an_identity_into_a_folder(cli: Cli, place: Path) -> None:
    made = cli("ca", "init", "--root-dir", str(place / "vault"))
    assert made.returncode == 0, made.stderr
    assert (place / "vault" / "root.key").exists()
    assert not (place / "state" / "ca" / "root.key").exists()
    assert (place / "state").stat().st_mode & 0o077 == 0  # else `up` would refuse it
    who = "spiffe://grafos.local/tenant/acme/holder/alice"
    issued = cli("identity", "issue", who, "--out", str(place / "alice"))
    assert (issued.returncode, issued.stdout.split()[0]) == (0, who), issued.stderr
    assert (place / "alice" / "tls.key").stat().st_mode & 0o077 == 0
    renewed = cli("ca", "renew", "--root-dir", str(place / "vault"))
    assert (renewed.returncode, "for another 24 h" in renewed.stdout) == (0, True), renewed.stderr
    assert cli("ca", "renew", "--root-dir", str(place)).returncode == 4
    again = cli("ca", "init")
    assert again.returncode == 1
    assert "holds an authority already" in again.stderr


def test_a_join_token_is_made_and_a_wrong_one_is_denied(cli: Cli, place: Path) -> None:
    assert cli("ca", "init").returncode == 0
    token = cli("node", "token", "create", "n7")
    assert token.returncode == 0, token.stderr
    assert token.stdout.startswith("n7.")
    refused = cli(
        "node", "join", "127.0.0.1:9", "--token", "nonsense", "--out", str(place / "node")
    )
    assert refused.returncode == 4
    assert refused.stderr.startswith("grafos: Denied (JOIN_TOKEN)")


def test_a_flag_rules_over_the_variable_over_the_file_over_the_default(
    cli: Cli, place: Path
) -> None:
    def origin(**more: str) -> tuple[str, str]:
        rows = json.loads(cli("config", "view", "-o", "json", **more).stdout)
        row = next(row for row in rows if row["name"] == "nodes")
        return row["value"], row["origin"].split()[0]

    assert origin() == ("1", "default")
    (place / "config" / "grafos").mkdir(parents=True)
    (place / "config" / "grafos" / "config.toml").write_text("nodes = 3\ntcp = true\n")
    assert origin() == ("3", "file")
    assert origin(GRAFOS_NODES="5") == ("5", "variable")
    given = argparse.Namespace(nodes=7)
    assert settings.found(given, "nodes").origin == "flag"
    assert settings.value(given, "nodes") == 7


def test_a_setting_that_does_not_exist_is_refused_with_those_that_do(cli: Cli, place: Path) -> None:
    (place / "config" / "grafos").mkdir(parents=True)
    (place / "config" / "grafos" / "config.toml").write_text("nodez = 3\n")
    done = cli("config", "view")
    assert done.returncode == 1
    assert "'nodez'" in done.stderr
    assert "nodes" in done.stderr


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_knows_every_command(shell: str) -> None:
    text = completion.script(build(), shell)
    for word in ("up", "lease", "describe", "--reason", "clear"):
        assert word.lstrip("-") in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_the_bash_completion_offers_the_verbs_of_a_noun() -> None:
    text = completion.script(build(), "bash") + (
        'COMP_WORDS=(grafos fence ""); COMP_CWORD=2; _grafos; echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, check=True)
    assert set(done.stdout.split()) >= {"list", "describe", "probe", "clear"}


def test_the_doctor_finds_what_a_fabric_needs(cli: Cli) -> None:
    done = cli("doctor", "-o", "json")
    rows = {row["check"]: row for row in json.loads(done.stdout)}
    assert rows["sealed memory files"]["ok"]
    assert rows["pidfd"]["ok"]
    assert done.returncode == (0 if all(r["ok"] for r in rows.values() if r["needed"]) else 1)


def test_every_failure_has_its_exit_status_and_one_line() -> None:
    statuses = {"NOT_FOUND": 3, "ROLE": 4, "IDENTITY": 4, "DEADLINE": 5, "UNREACHABLE": 1}
    for code in failure.CODES:
        refusal = failure.of(code, "two\nlines")
        assert exit_status(refusal) in (1, 3, 4, 5)
        assert "\n" not in explained(refusal)
        assert code in explained(refusal)
    assert {code: exit_status(failure.of(code)) for code in statuses} == statuses


def test_tables_json_and_names_show_the_same_rows() -> None:
    rows = [{"id": "a", "size": 1}, {"id": "bb", "size": 22}]
    columns = [Column("ID", lambda r: r["id"]), Column("SIZE", lambda r: r["size"], wide=True)]
    listing = Listing(columns, name=lambda row: str(row["id"]))
    assert rendered(rows, listing, "table", headers=True) == "ID\na\nbb\n"
    assert rendered(rows, listing, "wide", headers=True) == "ID  SIZE\na   1\nbb  22\n"
    assert rendered(rows, listing, "wide", headers=False) == "a   1\nbb  22\n"
    assert rendered(rows, listing, "name", headers=True) == "a\nbb\n"
    assert json.loads(rendered(rows, listing, "json", headers=True)) == rows


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), ("64KiB", 65_536), ("256MiB", 1 << 28), ("2g", 2 << 30)]
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5GiB", "12XB", "1 2", "٣"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(failure.Incompatible):
        parse_size(text)


def test_sizes_and_durations_are_shown_for_people() -> None:
    assert [shown_size(n) for n in (0, 1023, 1536, 3 << 40)] == [
        "0 B", "1023 B", "1.5 KiB", "3.0 TiB",
    ]  # fmt: skip
    assert [duration(ms) for ms in (350, 12_000, 303_000, 7_440_000, 266_400_000)] == [
        "350ms", "12s", "5m03s", "2h04m", "3d02h",
    ]  # fmt: skip


def test_a_quarter_of_the_tighter_of_machine_and_control_group_is_leased_out(
    tmp_path: Path,
) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    8388608 kB\n")
    assert memory_for_each(1, tmp_path) == 2 << 30
    assert memory_for_each(4, tmp_path) == 512 << 20
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/memory.max", f"{1 << 30}\n")
    write("sys/fs/cgroup/a/memory.current", f"{512 << 20}\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    assert group_headroom(tmp_path) == 512 << 20
    assert memory_for_each(1, tmp_path) == 128 << 20
    write("proc/self/cgroup", "4:memory:/c\n")
    write("sys/fs/cgroup/memory/c/memory.limit_in_bytes", "9223372036854771712\n")
    assert group_headroom(tmp_path) == UNLIMITED


def test_free_ports_are_all_different() -> None:
    assert len(set(free_ports(20))) == 20
