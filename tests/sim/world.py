"""The simulated world: true time, an event queue, a network that misbehaves, and one bad day.

    seed     draws the fault rates first (some zero), then every event: a seed is a test case
    network  loses, delays, reorders, duplicates late, cuts one pair off for a while
    clocks   each boot-time clock runs a little fast or slow, at a changing pace; each wall clock is
             off, and steps by seconds or by an hour and back
    sleep    a node's machine is suspended: all of it stands still, and then all of it is late

What is simulated are the cores that ship: Lessor, placement, NodeCore, WardenCore, HolderLease, the
chain, the collector, the state folded from records. The world stands in for sockets, disks,
processes and clocks only. Laws are checked after every event (laws.py); bugs.py plants mistakes to
see that they are.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grafos_core.node_effects import Instant

RUN_MS = 30_000
WALL_START_MS = 1_700_000_000_000


class LawBroken(AssertionError):
    """A law does not hold; the message names it."""


@dataclass(slots=True)
class Rates:
    """How bad this day is. Drawn once per seed, so that each seed is a different kind of day."""

    loss: float
    delay_ms_max: int
    duplicate: float
    agent_crash: float
    warden_crash: float
    front_crash: float
    ledger_crash: float
    cut: float
    wall_step: float
    slew: float
    suspend: float
    step_failure: float
    slow_operation: float
    holder_stall: float
    holder_exit: float
    hang_up: float
    revoke: float
    hostile: float
    stir: float
    """How often a device undoes what it had done to a fenced slice."""
    policy: bool
    """Nodes clear what they prove clean."""
    operator: float
    """How soon a person clears a fence."""

    @staticmethod
    def draw(dice: random.Random) -> Rates:
        def rate(at_most: float) -> float:
            return dice.choice([0.0, dice.random() * at_most, at_most])

        return Rates(
            loss=rate(0.25), delay_ms_max=dice.choice([1, 20, 300]), duplicate=rate(0.1),
            agent_crash=rate(0.3), warden_crash=rate(0.2), front_crash=rate(0.3),
            ledger_crash=rate(0.3), cut=rate(0.4), wall_step=rate(0.2), slew=rate(0.4),
            suspend=rate(0.15), step_failure=rate(0.15),
            slow_operation=rate(0.1), holder_stall=rate(0.1), holder_exit=rate(0.1),
            hang_up=rate(0.1), revoke=rate(0.2), hostile=rate(0.3), stir=rate(0.5),
            policy=dice.random() < 0.5, operator=dice.choice([0.0, 0.05, 0.3]),
        )  # fmt: skip


RATE_ERROR_MAX = 0.0009
"""Of each clock; two of them then stay within what is published."""


class Clock:
    """One machine's clocks. The rate error stays within the published bound."""

    def __init__(self, world: World) -> None:
        dice = world.dice
        self._world = world
        self._since_ms, self._boot_ms = world.now_ms, float(dice.randint(1_000, 10_000_000))
        self._rate = 1 + dice.uniform(-RATE_ERROR_MAX, RATE_ERROR_MAX)
        self._wall_offset_ms = dice.randint(-250, 250)
        self._step_ms = 0

    def boot_ms(self) -> int:
        return int(self._boot_ms + (self._world.now_ms - self._since_ms) * self._rate)

    def wall_ms(self) -> int:
        return WALL_START_MS + self._world.now_ms + self.wall_error_ms

    @property
    def wall_error_ms(self) -> int:
        return self._wall_offset_ms + self._step_ms

    def instant(self) -> Instant:
        return Instant(self.boot_ms(), self.wall_ms())

    def suffer(self) -> None:
        """Perhaps another pace from now on; perhaps a step, which somebody may notice soon."""
        world, dice = self._world, self._world.dice
        if world.chance(world.rates.slew):
            self._boot_ms += (world.now_ms - self._since_ms) * self._rate
            self._since_ms = world.now_ms
            self._rate = 1 + dice.uniform(-RATE_ERROR_MAX, RATE_ERROR_MAX)
        if world.chance(world.rates.wall_step):
            world.count("wall_steps")
            self._step_ms = dice.choice([-3_600_000, -2_000, 2_000, 3_600_000])
            if dice.random() < 0.7:
                world.after(dice.randint(300, 6_000), self.set_right)

    def set_right(self) -> None:
        self._step_ms = 0


class World:
    """True time and everything that happens in it."""

    def __init__(self, seed: int, narrate: Callable[[str], None] | None = None) -> None:
        self.dice = random.Random(seed)
        self.seed, self._narrate = seed, narrate
        self.now_ms = 0
        self.rates = Rates.draw(self.dice)
        self.calm = False
        """Faults are over: what is left must come to rest."""
        self.trace = hashlib.sha256()
        self.counts: dict[str, int] = {}
        self.story: list[str] = []
        self.after_each: Callable[[], None] = lambda: None
        self._queue: list[tuple[int, float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self._cuts: set[tuple[str, str]] = set()
        self._asleep: dict[str, int] = {}

    def after(self, delay_ms: int, call: Callable[..., None], *args: Any) -> None:
        """Later; of two things at one instant either may be first."""
        self._number += 1
        entry = (self.now_ms + delay_ms, self.dice.random(), self._number, call, args)
        heapq.heappush(self._queue, entry)

    def send(self, origin: str, target: str, call: Callable[..., None], *args: Any) -> None:
        """A message: it may be lost, late, early, or come twice."""
        if (origin, target) in self._cuts or (target, origin) in self._cuts:
            return
        rates = self.rates
        if not self.calm and self.dice.random() < rates.loss:
            return
        self.after(self.dice.randint(0, rates.delay_ms_max), self.awake, target, call, *args)
        if not self.calm and self.dice.random() < rates.duplicate:
            late_ms = self.dice.randint(0, rates.delay_ms_max * 20)
            self.after(late_ms, self.awake, target, call, *args)

    def sleep(self, name: str, for_ms: int) -> None:
        self.tell(name, "sleeps for", for_ms)
        self.count("sleeps")
        self._asleep[name] = self.now_ms + for_ms

    def awake(self, name: str, call: Callable[..., None], *args: Any) -> None:
        """Now, or as soon as this machine is awake; its own ticks first."""
        left_ms = self._asleep.get(name, 0) - self.now_ms
        if left_ms > 0:
            self.after(left_ms + (call.__name__ != "_tick"), self.awake, name, call, *args)
        else:
            call(*args)

    def cut(self, one: str, other: str) -> None:
        self._cuts.add((one, other))

    def heal(self, one: str, other: str) -> None:
        self._cuts.discard((one, other))

    def chance(self, rate: float) -> bool:
        return not self.calm and self.dice.random() < rate

    def run(self, until_ms: int) -> None:
        while self._queue and self._queue[0][0] <= until_ms:
            self.now_ms, _, _, call, args = heapq.heappop(self._queue)
            call(*args)
            self.count("events")
            self.after_each()
        self.now_ms = max(self.now_ms, until_ms)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def tell(self, *words: object) -> None:
        """What happened, for the trace hash and for whoever replays the seed."""
        line = f"{self.now_ms} " + " ".join(str(word) for word in words)
        self.trace.update(line.encode() + b"\n")
        self.story.append(line)
        if self._narrate is not None:
            self._narrate(line)
        if len(self.story) > 4000:
            del self.story[:2000]
