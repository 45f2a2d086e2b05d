"""How a row is measured: whoever is compared takes turns, round by round, in one run.

    round 1:  noise mark, ours, etcd      round 2:  noise mark, etcd, ours      round 3: …

Rules. Who is compared runs in the same rounds, and the order turns round each time, so that a noisy
minute hits all alike. A peer that is not there is named with the reason. A target that is missed is
told with its factor; it is a finding and no error. What a row starts ends with the row.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grafos
from grafos import Fabric
from grafos._connection import to_cluster
from grafos._local import LocalFabric
from tests.bench.noise import Noise
from tests.bench.place import Place
from tests.bench.statistic import Series

ROUNDS: Final = 6
ROUNDS_QUICK: Final = 2
WARM_UP_SHARE: Final = 0.2
"""Of one round, before the first: connections, caches and pools are then as in daily life."""


class PeerMissingError(Exception):
    """A peer cannot take part; the text says why."""


Round = Callable[[int], Mapping[str, Sequence[float]]]
"""Do the work so many times; the values of each series, `total` first by custom."""


@dataclass(frozen=True, slots=True)
class Party:
    """Who takes part in a row."""

    name: str
    round: Round
    unit: str = "us"


@dataclass(slots=True)
class Measured:
    """What was measured of one party."""

    party: str
    series: dict[str, Series] = field(default_factory=dict)

    def add(self, unit: str, values: Mapping[str, Sequence[float]]) -> None:
        for name, each in values.items():
            self.series.setdefault(name, Series(name, unit)).add_round(each)

    def to_json(self) -> dict[str, Any]:
        return {"party": self.party, "series": [each.to_json() for each in self.series.values()]}


@dataclass(frozen=True, slots=True)
class Target:
    """What was to be reached: `measured` at the most `limit`."""

    what: str
    limit: float
    measured: float | None
    """None: it could not be judged."""
    unit: str
    why_not: str = ""

    @property
    def is_met(self) -> bool | None:
        return None if self.measured is None else self.measured <= self.limit

    def to_json(self) -> dict[str, Any]:
        factor = None if self.measured is None else self.measured / self.limit
        return {
            "what": self.what,
            "limit": self.limit,
            "measured": self.measured,
            "unit": self.unit,
            "met": self.is_met,
            "factor": factor,
            "why_not": self.why_not,
        }


@dataclass(slots=True)
class Result:
    """One row of the table."""

    name: str
    what: str
    parties: list[Measured] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Peer to reason."""
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    """Why the row has no end; what was measured before it is kept."""

    def of(self, party: str) -> Measured | None:
        return next((each for each in self.parties if each.party == party), None)

    def p50(self, party: str, series: str = "total") -> float | None:
        found = self.of(party)
        return found.series[series].summary().p50 if found and series in found.series else None

    def judge_ratio(self, ours: str, peer: str, limit: float, what: str) -> None:
        """Our median at the most `limit` times the peer's."""
        mine, theirs = self.p50(ours), self.p50(peer)
        ratio = mine / theirs if mine is not None and theirs else None
        why_not = "" if ratio is not None else self.skipped.get(peer, "not measured")
        self.targets.append(Target(what, limit, ratio, "x", why_not))

    def judge(self, what: str, limit: float, measured: float | None, unit: str) -> None:
        why_not = "" if measured is not None else "not measured"
        self.targets.append(Target(what, limit, measured, unit, why_not))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "what": self.what,
            "parties": [each.to_json() for each in self.parties],
            "skipped": [{"peer": peer, "reason": why} for peer, why in self.skipped.items()],
            "targets": [each.to_json() for each in self.targets],
            "notes": self.notes,
            "error": self.error,
        }


class Bench:
    """What a row works with: its place on the disk, how long it may be, who is there."""

    def __init__(self, place: Place, noise: Noise, *, quick: bool = False) -> None:
        self.place, self.noise, self.quick = place, noise, quick
        self.rounds = ROUNDS_QUICK if quick else ROUNDS

    def count(self, full: int) -> int:
        """How often in one round."""
        return max(4, full // 4) if self.quick else full

    @contextmanager
    def fabric(self, **options: Any) -> Generator[tuple[LocalFabric, Fabric]]:
        """A fabric of its own, its files in our folder, and a connection to it."""
        with self.place.for_temporary_files():
            local = grafos.local_fabric(**options).start()
        with ExitStack() as ends:
            ends.callback(local.close)
            self.place.check_same_disk(local.state_dir)
            yield local, ends.enter_context(to_cluster(local.description))

    def take_turns(
        self, result: Result, parties: Sequence[Party], count: int, *, warm_up: bool = True
    ) -> None:
        """Measure all parties, `count` times in each round, the order turned round each time."""
        measured = {each.name: Measured(each.name) for each in parties}
        result.parties.extend(measured.values())
        if warm_up:
            for each in parties:
                each.round(max(2, int(count * WARM_UP_SHARE)))
        for number in range(self.rounds):
            self.noise.mark()
            for each in parties if number % 2 == 0 else reversed(parties):
                measured[each.name].add(each.unit, each.round(count))
        self.noise.mark()

    def with_peer(
        self, result: Result, name: str, start: Callable[[], Any], ends: ExitStack
    ) -> Any | None:
        """The peer, started; None where it is missing, which the result then says."""
        try:
            return ends.enter_context(start())
        except PeerMissingError as missing:
            result.skipped[name] = str(missing)
            return None


@contextmanager
def pinned(cpu: int | None, *pids: int) -> Generator[None]:
    """This thread and those processes on one processor; None: left as they are."""
    if cpu is None:
        yield
        return
    before = {pid: os.sched_getaffinity(pid) for pid in (0, *pids)}
    try:
        for pid in before:
            os.sched_setaffinity(pid, {cpu})
        yield
    finally:
        for pid, cpus in before.items():
            os.sched_setaffinity(pid, cpus)


@contextmanager
def short_folder() -> Generator[Path]:
    """For sockets only: their paths must be short, wherever the measurements keep their files."""
    with tempfile.TemporaryDirectory(prefix="grafos-bench-", dir="/tmp") as folder:
        yield Path(folder)
