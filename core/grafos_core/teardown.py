"""Taking a slice back, step by step, until it is proved to be back or known not to be.

Like clearing a flat: close the door, wait until nobody is inside, remove the people who stayed,
empty the rooms, and then let somebody else look whether they are empty. Only what was looked at
counts as empty.

    DEAD ──quiesce──► QUIESCED ──reap──► REAPED ──erase──► ERASED ──measure──► MEASURED ──► SEALED
     │                   │                 │                 │                              seal
     └───────────────────┴── fails twice, or the time is up ─┴──► FENCED

Rules: a step that failed is tried once more, a second failure fences. The time is up after
`limit_ms`, whatever is under way. What comes back from an older attempt is ignored. The core does
no step: it says which is next and is told how it went.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from grafos_core.failure import invariant
from grafos_core.lease import TEARDOWN_MS_MAX, Kind
from grafos_core.receipt import MEASURED_COUNT_MAX, shortened

QUIESCE_MS_MAX: Final = 250
"""How long operations in flight may take to end before the front is killed."""
ATTEMPTS_MAX: Final = 2
GPU_MS_MAX: Final = 15_000
"""A driver takes its time to give device memory back."""


def limit_ms(kind: Kind) -> int:
    """How long the end of a lease of this kind may take at its node."""
    return GPU_MS_MAX if kind is Kind.GPU else TEARDOWN_MS_MAX


class Stage(enum.StrEnum):
    """How far a lease's end has come at its node."""

    LIVE = "live"
    DEAD = "dead"
    QUIESCED = "quiesced"
    REAPED = "reaped"
    ERASED = "erased"
    MEASURED = "measured"
    SEALED = "sealed"
    FENCED = "fenced"


class Step(enum.StrEnum):
    QUIESCE = "quiesce"
    REAP = "reap"
    ERASE = "erase"
    MEASURE = "measure"


STEPS: Final[Mapping[Stage, tuple[Step, Stage]]] = {
    Stage.DEAD: (Step.QUIESCE, Stage.QUIESCED),
    Stage.QUIESCED: (Step.REAP, Stage.REAPED),
    Stage.REAPED: (Step.ERASE, Stage.ERASED),
    Stage.ERASED: (Step.MEASURE, Stage.MEASURED),
}
"""From a stage, by a step, to the next. SEALED follows MEASURED once the record is durable."""


@dataclass(slots=True)
class Teardown:
    """One lease's end. `began_ms` and all later instants are boottime."""

    began_ms: int
    began_wall_ms: int
    stage: Stage = Stage.DEAD
    limit_ms: int = TEARDOWN_MS_MAX
    attempt: int = 1
    """Rises with each step begun, so that a late answer is not taken for this one's."""
    failures: int = 0
    """Of the present step."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """What the steps reported, by step."""
    fence_cause: str = ""

    @property
    def deadline_ms(self) -> int:
        return self.began_ms + self.limit_ms

    @property
    def is_running(self) -> bool:
        return self.stage in STEPS

    def next_step(self) -> Step | None:
        """What is to be done now; None when nothing is left but to seal, or when it is over."""
        found = STEPS.get(self.stage)
        return found[0] if found else None

    def expects(self, step: Step, attempt: int) -> bool:
        """Whether an answer about this attempt of this step still matters."""
        return self.next_step() is step and attempt == self.attempt

    def done(self, step: Step, evidence: Mapping[str, Any], now_ms: int) -> None:
        """The step has succeeded; the next one is due."""
        invariant(self.next_step() is step, f"{step} is not the next step at {self.stage}")
        invariant(now_ms >= self.began_ms, "time does not go back")
        self.evidence[step.value] = dict(evidence)
        self.stage = STEPS[self.stage][1]
        self.attempt += 1
        self.failures = 0

    def failed(self, step: Step, why: str, now_ms: int) -> bool:
        """Whether the step is to be tried once more; else this teardown is fenced."""
        invariant(self.next_step() is step, f"{step} is not the next step at {self.stage}")
        self.failures += 1
        self.evidence[f"{step.value}_failure_{self.failures}"] = why
        self.attempt += 1
        if self.failures < ATTEMPTS_MAX and now_ms < self.deadline_ms:
            return True
        self.fence(f"{step.value}: {why}")
        return False

    def overdue(self, now_ms: int) -> bool:
        """Fence if the time is up; whether it was."""
        if not self.is_running or now_ms < self.deadline_ms:
            return False
        self.fence(f"{self.next_step()}: not done within {self.limit_ms} ms")
        return True

    def fence(self, cause: str) -> None:
        invariant(self.stage is not Stage.SEALED, "what is sealed is over")
        self.stage = Stage.FENCED
        self.fence_cause = cause

    def seal(self) -> None:
        """Its record is about to be made durable; the slice is free after that."""
        invariant(self.stage is Stage.MEASURED, "only what was measured is sealed")
        self.stage = Stage.SEALED

    def measured(self) -> dict[str, int | str | bool]:
        """The evidence as a receipt can carry it: flat, short, plain characters."""
        found: dict[str, int | str | bool] = {}
        if self.fence_cause:
            found["cause"] = shortened(self.fence_cause)
        for step, evidence in self.evidence.items():
            parts = evidence.items() if isinstance(evidence, dict) else [("", evidence)]
            for name, value in parts:
                found[_name(step, name)] = (
                    value if isinstance(value, int) else shortened(str(value))
                )
        return dict(list(found.items())[:MEASURED_COUNT_MAX])

    def check(self, now_ms: int) -> None:
        invariant(
            not self.is_running or now_ms < self.deadline_ms, "no teardown runs past its time"
        )
        invariant(self.failures < ATTEMPTS_MAX or not self.is_running, "two failures fence")
        if self.stage in (Stage.MEASURED, Stage.SEALED):
            invariant(Step.MEASURE.value in self.evidence, "what is sealed was measured")


def _name(step: str, name: object) -> str:
    whole = f"{step}_{name}" if name != "" else step
    return re.sub("[^a-z0-9_]", "_", whole.lower())[:32]
