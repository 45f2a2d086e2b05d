"""The table: each defence taken away in a world of its own, and what must come of it.

A variant names the law that has to break, or "" where all laws must hold.  `ignored` keeps the
search from stopping at a book-keeping law, so that the harm itself is what is found; a defence
whose loss is expected to be harmless says in its label what else stands in the way.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from tests.model import clock_model as C
from tests.model import key_model as K
from tests.model import lease_model as L
from tests.model import revoke_model as R
from tests.model.clock_model import ClockModel, Timing
from tests.model.key_model import KeyCare, KeyModel
from tests.model.lease_model import SLOT, Defences, LeaseModel, Shape
from tests.model.revoke_model import Grace, RevokeModel
from tests.model.search import Action, Verdict, World, search

TWO_UNITS: Final = Shape(capacity=2, epochs=2)
HARSH_SLOT: Final = Shape(capacity=1, epochs=3, crashes=2, faults=2)
SOUND_AMOUNT: Final = Shape(capacity=2, epochs=3, faults=0)
"""The third lease takes the place of either of the first two; no step of a teardown fails."""
CRASHLESS_AMOUNT: Final = Shape(capacity=2, epochs=3, crashes=0)

ALL_DEFENCES: Final = Defences()

PHYSICAL: Final = frozenset({L.LAW_1_IN_THE_BOOKS, L.LAW_8})
"""Ignored where the books are known to be wrong and only the slice itself is judged."""
BY_EFFECT: Final = frozenset({L.LAW_7, L.LAW_8, L.LAW_10, *PHYSICAL})
TTL_PROMISE: Final = frozenset({C.LAW_5})
"""Ignored where the clocks are allowed to be worse than the promise of the TTL assumes."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One world, and the verdict that is expected of it."""

    label: str
    world: World[Any]
    breaks: str = ""
    ignored: frozenset[str] = frozenset()
    heavy: bool = False
    """Takes seconds: left out of the default suite."""


@dataclass(frozen=True, slots=True)
class Run:
    """A variant with what the search really said."""

    variant: Variant
    verdict: Verdict[Any]
    seconds: float

    @property
    def as_expected(self) -> bool:
        return self.verdict.broken == self.variant.breaks


def run(variant: Variant) -> Run:
    start = time.perf_counter()
    verdict = search(variant.world, variant.ignored)
    return Run(variant, verdict, time.perf_counter() - start)


def lease(
    label: str,
    breaks: str = "",
    *,
    shape: Shape = SLOT,
    ignored: frozenset[str] = frozenset(),
    heavy: bool = False,
    has: Defences = ALL_DEFENCES,
) -> Variant:
    name = "slot" if shape.is_slot else "amount"
    return Variant(f"{name}: {label}", LeaseModel(shape, has), breaks, ignored, heavy)


def clock(
    label: str,
    breaks: str = "",
    *,
    ignored: frozenset[str] = TTL_PROMISE,
    heavy: bool = False,
    **timing: bool,
) -> Variant:
    world = ClockModel(Timing(**timing))
    return Variant(f"clock: {label}", world, breaks, ignored, heavy)


def revocation(label: str, breaks: str = "", **defences: bool) -> Variant:
    return Variant(f"revocation: {label}", RevokeModel(Grace(**defences)), breaks)


def key(label: str, breaks: str = "", **defences: bool) -> Variant:
    return Variant(f"key: {label}", KeyModel(KeyCare(**defences)), breaks)


NOTHING: Final[frozenset[str]] = frozenset()

WHOLE: Final = (
    lease("all defences"),
    lease("all defences, two crashes, two faults, three leases", shape=HARSH_SLOT),
    lease("all defences, two leases at once", shape=TWO_UNITS),
    lease("all defences, a third lease after them", shape=SOUND_AMOUNT, heavy=True),
    lease("all defences, a third lease, faults", shape=CRASHLESS_AMOUNT, heavy=True),
    clock("all defences", ignored=NOTHING),
    clock("all defences, renewals", ignored=NOTHING, renewals=True),
)

EPOCHS: Final = (
    lease(
        "an operation's epoch is not checked",
        L.LAW_4,
        ignored=frozenset({L.LAW_1, *PHYSICAL}),
        has=Defences(epoch_checked_at_use=False),
    ),
    lease("a token's epoch is not checked", L.LAW_7, has=Defences(epoch_checked_at_bind=False)),
    lease(
        "a token's epoch is not checked, judged by harm",
        L.LAW_3,
        shape=SLOT,
        ignored=BY_EFFECT,
        has=Defences(epoch_checked_at_bind=False),
    ),
    lease("floor not durable", L.LAW_7, has=Defences(floor_durable=False)),
    lease(
        "floor not durable, judged by harm",
        L.LAW_3,
        ignored=BY_EFFECT,
        has=Defences(floor_durable=False),
    ),
    lease("floor not durable", L.LAW_7, shape=SOUND_AMOUNT, has=Defences(floor_durable=False)),
    lease(
        "handle given before the bind is durable", L.LAW_7, has=Defences(bind_record_durable=False)
    ),
    lease(
        "handle given before the bind is durable, judged by harm",
        L.LAW_3,
        shape=TWO_UNITS,
        ignored=BY_EFFECT,
        has=Defences(bind_record_durable=False),
    ),
    lease("burnt window forgotten", L.LAW_7, shape=TWO_UNITS, has=Defences(window_kept=False)),
    lease(
        "one floor instead of a window", L.LAW_8, shape=TWO_UNITS, has=Defences(window_used=False)
    ),
    lease("ledger forgets a grant it told of", L.LAW_7, has=Defences(ledger_durable=False)),
    lease("a burn does not raise the floor", L.LAW_7, has=Defences(burn_raises_floor=False)),
)

CAPACITY: Final = (
    lease("freed by timeout", L.LAW_3, ignored=BY_EFFECT, has=Defences(receipts_needed=False)),
    lease(
        "freed by timeout",
        L.LAW_3,
        shape=TWO_UNITS,
        ignored=BY_EFFECT,
        has=Defences(receipts_needed=False),
    ),
    lease(
        "receipt of another epoch accepted",
        L.LAW_3,
        ignored=BY_EFFECT,
        has=Defences(receipt_names_lease=False),
    ),
    lease(
        "receipt of another epoch accepted",
        L.LAW_3,
        shape=TWO_UNITS,
        has=Defences(receipt_names_lease=False),
    ),
    lease(
        "ledger grants too much, agent counts", ignored=PHYSICAL, has=Defences(ledger_counts=False)
    ),
    lease(
        "ledger grants too much, agent does not count",
        L.LAW_1,
        ignored=PHYSICAL,
        has=Defences(ledger_counts=False, agent_counts=False),
    ),
    lease(
        "ledger grants too much, agent does not count",
        L.LAW_1,
        shape=SOUND_AMOUNT,
        ignored=PHYSICAL,
        has=Defences(ledger_counts=False, agent_counts=False),
    ),
    lease("agent does not count, ledger does", has=Defences(agent_counts=False)),
)

TEARDOWN: Final = (
    lease(
        "operations in flight not waited for",
        L.LAW_4,
        has=Defences(teardown=("erase", "measure", "seal")),
    ),
    lease(
        "erase before quiesce, measure after both",
        has=Defences(teardown=("erase", "quiesce", "measure", "seal")),
    ),
    lease(
        "erase and measure before quiesce",
        L.LAW_4,
        has=Defences(teardown=("erase", "measure", "quiesce", "seal")),
    ),
    lease(
        "sealed before measured",
        L.LAW_3,
        has=Defences(teardown=("quiesce", "erase", "seal", "measure")),
    ),
    lease(
        "sealed before measured",
        L.LAW_3,
        shape=TWO_UNITS,
        has=Defences(teardown=("quiesce", "erase", "seal", "measure")),
    ),
    lease(
        "never erased: all fenced, none lost", has=Defences(teardown=("quiesce", "measure", "seal"))
    ),
    lease("fence forgotten in a crash", L.LAW_10, has=Defences(fence_durable=False)),
    lease(
        "fence forgotten in a crash, judged by harm",
        L.LAW_3,
        ignored=BY_EFFECT,
        has=Defences(fence_durable=False),
    ),
    lease("clear without proof", L.LAW_3, has=Defences(clear_proves=False)),
    lease("restart takes old leases for gone", L.LAW_3, has=Defences(recovery_measures=False)),
    lease(
        "restart takes old leases for gone",
        L.LAW_3,
        shape=TWO_UNITS,
        has=Defences(recovery_measures=False),
    ),
)

WARDEN: Final = (
    lease("warden has no descriptor", L.LAW_5, has=Defences(warden_guards=False)),
    lease("warden has no descriptor", L.LAW_5, shape=TWO_UNITS, has=Defences(warden_guards=False)),
    lease(
        "warden has no descriptor: late, but measured",
        shape=TWO_UNITS,
        ignored=frozenset({L.LAW_5}),
        has=Defences(warden_guards=False),
    ),
    lease("warden signs what it took back", L.LAW_3, has=Defences(warden_keyless=False)),
)

CLOCKS: Final = (
    clock("epoch not checked", C.LAW_1, epoch_checked=False),
    clock("floor not durable", C.LAW_1, floor_durable=False),
    clock("floor not durable, no early release", C.LAW_1, floor_durable=False, early_release=False),
    clock("floor not durable, steps back", C.LAW_1, floor_durable=False, clock_steps_back=True),
    clock("expiry not checked: late, but exclusive", expiry_checked=False),
    clock("expiry not checked, the promise judged", C.LAW_5, ignored=NOTHING, expiry_checked=False),
    clock("freed by timeout, good clocks, a wait of eps", receipts_needed=False),
    clock("freed by timeout, no wait", C.LAW_1, receipts_needed=False, ledger_waits=False),
    clock(
        "freed by timeout, epoch not checked", C.LAW_1, receipts_needed=False, epoch_checked=False
    ),
    clock(
        "freed by timeout, expiry not checked", C.LAW_1, receipts_needed=False, expiry_checked=False
    ),
    clock(
        "freed by timeout, clock beyond eps", C.LAW_1, receipts_needed=False, clock_beyond_eps=True
    ),
    clock(
        "freed by timeout, clock steps back", C.LAW_1, receipts_needed=False, clock_steps_back=True
    ),
    clock("clock beyond eps", clock_beyond_eps=True),
    clock("clock beyond eps, the promise judged", C.LAW_5, ignored=NOTHING, clock_beyond_eps=True),
    clock("clock steps back", clock_steps_back=True),
    clock("clock steps back, expiry not checked", clock_steps_back=True, expiry_checked=False),
    clock("clock steps back, renewals", clock_steps_back=True, renewals=True, heavy=True),
    clock("clock beyond eps, renewals", clock_beyond_eps=True, renewals=True, heavy=True),
    clock("a renewal may shorten", C.HOLDER, renewals=True, renewal_only_later=False),
    clock(
        "holder believes the ledger alone", C.HOLDER, renewals=True, holder_trusts_agent_only=False
    ),
)

REVOCATIONS: Final = (
    revocation("all defences"),
    revocation("an order heard again begins the grace anew", R.GRACE_LAW, only_shortens=False),
    revocation("a grace may outlast the lease", R.DEADLINE, within_deadline=False),
    revocation("renewed in its grace: the grace stands", no_renewal=False),
    revocation("the gate is closed after the teardown", R.S14, gate_first=False),
    revocation("operations in flight not waited for", R.S14, in_flight_awaited=False),
    revocation("the ledger believes the latest report", R.VIEW, reports_only_forward=False),
)

SIGNERS: Final = (
    key("all defences"),
    key("leases first, the key after them", K.SURVIVES, key_first=False),
    key("a revoked key goes on signing", K.SURVIVES, signer_checked=False),
    key("the ledger is told the key after the grant", K.SURVIVES, recorded_at_once=False),
    key("the keys of renewals are not recorded: the mint asks again", renewals_recorded=False),
    key("signed with whatever key there is", K.SURVIVES, mint_checks=False),
    key("nodes go on taking what it signed", K.FORGED, node_refuses=False),
)

VARIANTS: Final = (
    *WHOLE, *EPOCHS, *CAPACITY, *TEARDOWN, *WARDEN, *CLOCKS, *REVOCATIONS, *SIGNERS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Counterexample:
    """A shortest way to a broken law, in plain values, to be replayed into real cores."""

    label: str
    broken: str
    start: dict[str, Any]
    """The model's first state; for the clock model it says which clock is off by how much."""
    actions: tuple[Action, ...]


def counterexample(done: Run) -> Counterexample | None:
    """What a run found, for replay; None where every law held."""
    verdict = done.verdict
    if verdict.start is None:
        return None
    start = verdict.start._asdict()
    return Counterexample(done.variant.label, verdict.broken, start, verdict.trace)


def counterexamples(variants: Iterable[Variant] = VARIANTS) -> list[Counterexample]:
    """Each unsafe variant's way to its broken law, for whoever replays them into real cores."""
    found = (counterexample(run(variant)) for variant in variants if variant.breaks)
    return [example for example in found if example is not None]


def plain(example: Counterexample) -> dict[str, Any]:
    """The same with nothing but dictionaries, lists, texts and numbers, as JSON has them."""
    return asdict(example)
