"""What a run found, as a table for people and as one JSON document for programs."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tests.bench import peers
from tests.bench.harness import Result, Target
from tests.bench.place import Place

VERSION: Final = 1
COLUMNS: Final = ("p50", "p90", "p99", "iqr", "mad")


def document(
    results: Sequence[Result], noise: dict[str, Any], place: Place, *, quick: bool
) -> dict[str, Any]:
    return {
        "v": VERSION,
        "at_ms": time.time_ns() // 1_000_000,
        "quick": quick,
        "machine": machine(place),
        "noise": noise,
        "rows": [each.to_json() for each in results],
    }


def machine(place: Place) -> dict[str, Any]:
    """What was measured on; nothing that names it."""
    return {
        "processors": os.cpu_count(),
        "processor": processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "file_system": place.file_system,
        **peers.libraries(),
        "etcd": peers.version_of("etcd"),
        "redis": peers.version_of("redis-server"),
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write(path: Path, found: dict[str, Any]) -> Path:
    """The document on disk, as a whole or not at all."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The document as text."""
    about = found["machine"]
    yield (
        f"{about['processors']} x {about['processor']}, kernel {about['kernel']}, "
        f"Python {about['python']}, {about['file_system']}; "
        f"{about['etcd'] or 'no etcd'}; {about['redis'] or 'no Redis'}"
    )
    yield ""
    for row in found["rows"]:
        yield from row_lines(row)
        yield ""
    yield from noise_lines(found["noise"])


def row_lines(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['name']}: {row['what']}"
    heading = "".join(f"{name:>11}" for name in COLUMNS)
    yield f"  {'':<40}{heading}{'n':>8}  unit  drift"
    for party in row["parties"]:
        for series in party["series"]:
            name = party["party"] + ("" if series["name"] == "total" else f": {series['name']}")
            numbers = "".join(f"{number(series[column]):>11}" for column in COLUMNS)
            yield (
                f"  {name:<40}{numbers}{series['count']:>8}  {series['unit']:<4}  "
                f"{series['drift']:+.0%}"
            )
    for skipped in row["skipped"]:
        yield f"  skipped: {skipped['peer']}: {skipped['reason']}"
    for target in row["targets"]:
        yield f"  {target_line(target)}"
    for note in row["notes"]:
        yield f"  note: {note}"
    if row["error"]:
        yield f"  NOT MEASURED TO THE END: {row['error']}"


def number(value: float) -> str:
    """Three digits or more, whatever the size."""
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def target_line(target: dict[str, Any]) -> str:
    wanted = f"target: {target['what']} <= {number(target['limit'])} {target['unit']}"
    if target["measured"] is None:
        return f"{wanted}: not judged, {target['why_not']}"
    found = f"{number(target['measured'])} {target['unit']}"
    if target["met"]:
        return f"{wanted}: met, {found}"
    return f"{wanted}: MISSED, {found}, {number(target['factor'])} times the target"


def noise_lines(noise: dict[str, Any]) -> Iterator[str]:
    yield (
        f"noise: {noise['verdict']}; {noise['wall_s']:.0f} s; load average "
        f"{noise['load_before']:.2f} before, {noise['load_after']:.2f} after; "
        f"of all processor time {noise['steal_share']:.1%} stolen, {noise['others_share']:.1%} "
        f"used by other programs, {noise['own_share']:.1%} by this run"
    )
    loop, sync = noise["loop_us"], noise["sync_us"]
    yield (
        f"  the same loop: p50 {loop['p50']:.0f}, p90 {loop['p90']:.0f}, p99 {loop['p99']:.0f} us, "
        f"last quarter against first {noise['loop_drift']:+.0%}; "
        f"a 4 KiB sync: p50 {sync['p50']:.0f}, p90 {sync['p90']:.0f}, p99 {sync['p99']:.0f} us, "
        f"{noise['sync_drift']:+.0%}"
    )


def all_met(results: Sequence[Result]) -> bool:
    targets: list[Target] = [target for each in results for target in each.targets]
    return all(target.is_met for target in targets) and not any(each.error for each in results)
