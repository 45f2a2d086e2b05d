"""What is known of a slice that could not be proved back: when it was looked at, and what was seen.

Like a room that was sealed because nobody could say that it is empty. A guard looks in now and
then, soon at first, later less often, and writes down what changed. The seal stays: looking opens
nothing.

    fenced ──5 s──► probe ──10 s──► probe ──20 s──► …, at most 5 min apart

Rules. A finding is written down when it differs from the one before, when somebody asked for it,
and once an hour though nothing changed; so a fence that stands for a year costs the book a record
an hour. The last few are kept, with the count of all. The pauses double and do not start anew
because a finding changed: a slice that is clean every other time is no reason for haste. They do
at a restart, and after an operator's clear that failed, for then something is being done about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from grafos_core.failure import invariant

PROBE_MS_MIN: Final = 5_000
PROBE_MS_MAX: Final = 300_000
"""Evidence of a fence is never older than this, as long as its node is up."""
FINDINGS_MAX: Final = 4
"""Enough to see what it was like before it changed, and before that."""
UNCHANGED_MS_MAX: Final = 3_600_000


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look at a fenced slice showed."""

    at_ms: int
    """Wall clock, for people."""
    clean: bool
    """A clear would have succeeded then."""
    asked: bool
    """Somebody wanted to know; else the node looked by itself."""
    measured: Mapping[str, int | str | bool]
    number: int = 0
    """How many times this slice had been looked at by then, counted over restarts as far as known:
    what was not written down is not counted on."""

    def body(self) -> dict[str, Any]:
        return {
            "at_ms": self.at_ms, "clean": self.clean, "asked": self.asked,
            "measured": dict(self.measured), "probes": self.number,
        }  # fmt: skip

    @classmethod
    def of_body(cls, body: Mapping[str, Any]) -> Finding:
        return cls(
            body["at_ms"], body["clean"], body.get("asked", True), body["measured"],
            body.get("probes", 0),
        )  # fmt: skip

    def says_more_than(self, other: Finding) -> bool:
        return (self.clean, dict(self.measured)) != (other.clean, dict(other.measured))


class Quarantine:
    """The record of one fence. `now_ms` is boottime."""

    __slots__ = ("_findings", "_pauses", "_probes", "_written_ms", "latest", "since_ms")

    def __init__(self, since_ms: int, findings: Iterable[Finding] = (), probes: int = 0) -> None:
        self.since_ms = since_ms
        """Wall clock."""
        self._findings = list(findings)[-FINDINGS_MAX:]
        self._probes = probes
        self._pauses = 0
        self._written_ms: int | None = None
        """When a finding of this boot was last written down."""
        self.latest: Finding | None = self._findings[-1] if self._findings else None
        """The newest, written down or not."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Those that were written down, the newest last."""
        return tuple(self._findings)

    @property
    def probes(self) -> int:
        return self._probes

    def pause_ms(self) -> int:
        """From now to the next look; longer each time."""
        pause_ms = min(PROBE_MS_MIN << min(self._pauses, 16), PROBE_MS_MAX)
        self._pauses += 1
        return pause_ms

    def hasten(self) -> None:
        """Something is being done about it: look soon."""
        self._pauses = 0

    def found(
        self, measured: Mapping[str, Any], now_ms: int, *, at_ms: int, clean: bool, asked: bool
    ) -> Finding | None:
        """Take a finding in; it is returned where it is to be written down."""
        self._probes += 1
        finding = Finding(at_ms, clean, asked, dict(measured), self._probes)
        self.latest = finding
        written = self._findings[-1] if self._findings else None
        is_old = self._written_ms is None or now_ms - self._written_ms >= UNCHANGED_MS_MAX
        if not (written is None or asked or is_old or finding.says_more_than(written)):
            return None
        self._written_ms = now_ms
        self._findings = [*self._findings, finding][-FINDINGS_MAX:]
        return finding

    def check(self) -> None:
        invariant(len(self._findings) <= FINDINGS_MAX, "few findings are kept")
        numbers = [each.number for each in self._findings]
        invariant(numbers == sorted(numbers), "findings are in order")
        invariant(not numbers or numbers[-1] <= self._probes, "all are counted")
