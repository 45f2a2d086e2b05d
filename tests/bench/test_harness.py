"""The measurements' own tools: numbers right, absences named, the document as promised.

What is measured here takes no time and starts no service: the rows themselves are for `make bench`.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bench import __main__ as program
from tests.bench import noise, peers, place, report
from tests.bench.etcd import etcd_pb2
from tests.bench.etcd.__main__ import stale_files
from tests.bench.harness import Bench, Party, PeerMissingError, Result
from tests.bench.statistic import Series, quantile, summarize

HUNDRED = [float(number) for number in range(101)]


def make_bench(folder: Path, *, quick: bool = True) -> Bench:
    return Bench(place.Place(folder), noise.Noise(folder), quick=quick)


def counting(calls: list[str], name: str) -> Callable[[int], Mapping[str, Sequence[float]]]:
    def measure(count: int) -> Mapping[str, Sequence[float]]:
        calls.append(name)
        return {"total": [float(len(calls))] * count}

    return measure


# statistics


def test_a_summary_of_known_values_is_what_can_be_counted_by_hand() -> None:
    values = HUNDRED[:]
    random.Random(7).shuffle(values)
    found = summarize(values)
    assert (found.count, found.least, found.most) == (101, 0.0, 100.0)
    assert (found.p50, found.p90, found.p99) == (50.0, 90.0, 99.0)
    assert (found.iqr, found.mad) == (50.0, 25.0)


def test_quantiles_agree_with_the_standard_library() -> None:
    values = [random.Random(3).gauss(10, 4) ** 2 for _ in range(7)] + [1.0, 900.0, 3.5]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert [quantile(values, share / 100) for share in (50, 90, 99)] == pytest.approx(
        [cuts[49], cuts[89], cuts[98]]
    )


def test_one_wild_value_moves_neither_the_median_nor_the_mad() -> None:
    tame, wild = summarize([*HUNDRED]), summarize([*HUNDRED[:-1], 1e9])
    assert (wild.p50, wild.mad) == (tame.p50, tame.mad)
    assert wild.most == 1e9


def test_a_series_that_slows_down_shows_it_as_drift() -> None:
    series = Series("total", "us")
    for middle in (10.0, 11.0, 15.0):
        series.add_round([middle - 1, middle, middle + 1])
    assert series.drift() == pytest.approx(0.5)


# taking turns


def test_parties_take_turns_and_the_order_turns_round(tmp_path: Path) -> None:
    calls: list[str] = []
    bench, result = make_bench(tmp_path), Result("row", "")
    parties = [Party("a", counting(calls, "a")), Party("b", counting(calls, "b"))]
    bench.take_turns(result, parties, 4, warm_up=False)
    assert calls == ["a", "b", "b", "a"]
    assert [each.party for each in result.parties] == ["a", "b"]
    assert bench.noise.loops_us


def test_what_warms_up_is_not_counted(tmp_path: Path) -> None:
    bench, result = make_bench(tmp_path), Result("row", "")
    bench.take_turns(result, [Party("a", counting([], "a"))], 10)
    assert result.parties[0].series["total"].summary().least == 2.0


def test_a_peer_that_is_not_installed_is_skipped_by_name_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    bench, result = make_bench(tmp_path), Result("row", "")
    with ExitStack() as ends:
        assert (
            bench.with_peer(result, "Redis", lambda: peers.redis_server(bench.place), ends) is None
        )
    assert result.skipped == {"Redis": "redis-server is not installed"}
    assert "  skipped: Redis: redis-server is not installed" in report.row_lines(result.to_json())


def test_a_peer_that_dies_at_once_is_skipped_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", "print('no room'); raise SystemExit(3)"]
    with pytest.raises(PeerMissingError, match="ended by itself: no room"):
        with peers.running(command, log) as process:
            peers.await_up(process, log, lambda: False)


def test_a_peer_ends_with_its_block_even_on_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    with pytest.raises(ZeroDivisionError):
        with peers.running(command, tmp_path / "log") as process:
            raise ZeroDivisionError
    assert process.poll() is not None


# targets


def test_a_missed_target_tells_its_factor_and_fails_only_a_check() -> None:
    result = Result("row", "")
    result.judge("p50", 2.0, 5.0, "us")
    (line,) = [line for line in report.row_lines(result.to_json()) if "target" in line]
    assert "MISSED" in line
    assert "2.50 times the target" in line
    assert not report.all_met([result])


def test_a_ratio_without_its_peer_is_not_judged_and_says_why(tmp_path: Path) -> None:
    result = Result("row", "", skipped={"etcd": "etcd is not installed"})
    bench = make_bench(tmp_path)
    bench.take_turns(result, [Party("ours", counting([], "a"))], 4, warm_up=False)
    result.judge_ratio("ours", "etcd", 3.0, "p50")
    (target,) = result.to_json()["targets"]
    assert (target["met"], target["why_not"]) == (None, "etcd is not installed")
    assert not report.all_met([result])


def test_a_ratio_is_taken_of_the_medians(tmp_path: Path) -> None:
    result = Result("row", "")
    parties = [
        Party("ours", lambda count: {"total": [6.0] * count}),
        Party("etcd", lambda count: {"total": [2.0] * count}),
    ]
    make_bench(tmp_path).take_turns(result, parties, 4)
    result.judge_ratio("ours", "etcd", 3.0, "p50")
    assert result.targets[0].measured == 3.0
    assert report.all_met([result])


# place and noise


def test_a_file_system_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(place.WrongPlaceError, match="lies in memory"):
        place.refuse_memory(Path("/dev/shm"))


def test_another_disk_than_the_runs_is_refused(tmp_path: Path) -> None:
    here = place.Place(tmp_path)
    here.device += 1
    with pytest.raises(place.WrongPlaceError, match="not on the disk"):
        here.check_same_disk(tmp_path)


def test_the_verdict_on_noise_follows_its_worst_part() -> None:
    assert noise.verdict(spread=1.02, steal=0.0, others=0.01) == "quiet"
    assert noise.verdict(spread=1.02, steal=0.02, others=0.01) == "noisy"
    assert noise.verdict(spread=1.2, steal=0.0, others=0.5) == "very noisy"


# the document


def test_the_document_goes_through_json_and_its_path_is_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(bench: Bench, result: Result) -> None:
        bench.take_turns(result, [Party("ours", counting([], "a"))], 4)
        result.skipped["etcd"] = "etcd is not installed"
        result.judge("p50", 1e9, result.p50("ours"), "us")

    monkeypatch.setattr(program, "ROWS", {"row": ("what it is", run)})
    monkeypatch.setattr("signal.signal", lambda *_: None)
    path = tmp_path / "out" / "found.json"
    assert program.main(["--quick", "--json", str(path), "--dir", str(tmp_path), "--check"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    found = json.loads(path.read_text())
    assert set(found) == {"v", "at_ms", "quick", "machine", "noise", "rows"}
    assert {
        "verdict",
        "load_before",
        "steal_share",
        "others_share",
        "loop_us",
        "loop_drift",
    } <= set(found["noise"])
    (row,) = found["rows"]
    (series,) = row["parties"][0]["series"]
    assert {"count", "p50", "p90", "p99", "iqr", "mad", "unit", "drift"} <= set(series)
    assert row["skipped"] == [{"peer": "etcd", "reason": "etcd is not installed"}]
    assert row["targets"][0]["met"] is True


def test_a_row_that_breaks_is_told_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(bench: Bench, result: Result) -> None:
        bench.take_turns(result, [Party("ours", counting([], "a"))], 4)
        raise AssertionError("not credited")

    monkeypatch.setattr(program, "ROWS", {"row": ("what it is", run)})
    result = program.measure("row", make_bench(tmp_path))
    assert result.error == "AssertionError: not credited"
    assert result.p50("ours") is not None
    assert not report.all_met([result])


def test_the_code_for_etcds_messages_is_what_its_proto_file_gives() -> None:
    assert stale_files() == [], "run: python -m tests.bench.etcd"


def test_etcds_messages_have_etcds_bytes_on_the_wire() -> None:
    put = etcd_pb2.PutRequest(key=b"k", value=b"v", lease=5)
    request = etcd_pb2.TxnRequest(
        compare=[etcd_pb2.Compare(key=b"k", version=0)],
        success=[etcd_pb2.RequestOp(request_put=put)],
    )
    assert request.SerializeToString().hex() == "0a051a016b2000120a12080a016b1201761805"


@pytest.mark.requires("setpriv")
def test_a_process_that_is_killed_takes_its_peers_with_it(tmp_path: Path) -> None:
    text = (
        "import sys; from pathlib import Path; from tests.bench import peers\n"
        "with peers.running(['sleep', '60'], Path(sys.argv[1])) as process:\n"
        "    print(process.pid, flush=True); sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", text, str(tmp_path / "log")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        pid = int(child.stdout.readline())
        child.kill()
        child.wait(5)
        assert has_ended(pid)


def has_ended(pid: int) -> bool:
    """Within five seconds; whoever adopted it may still have to bury it."""
    until_s = time.monotonic() + 5
    while time.monotonic() < until_s:
        try:
            state = (
                Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
            )
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
