"""The one clock of the SDK.

Rules. What a holder may believe is decided on the boot-time clock, which never goes back and goes
on while the machine sleeps; the wall clock is for people and for what they wrote down. Nothing else
in the SDK reads a clock or waits. `grafos.testing` puts a clock of its own here: see `use`.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Final, Protocol

NS_PER_MS: Final = 1_000_000

boot_ns: Callable[[], int] = functools.partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)
"""A call into C and nothing else: it stands before and after every operation on leased memory."""
_wall_ns: Callable[[], int] = time.time_ns
_pause: Callable[[float], None] = time.sleep  # noqa: TID251 - the one place that waits
is_virtual = False
"""Whether time is a test's. Then nothing of a real fabric can be used."""


def boot_ms() -> int:
    return boot_ns() // NS_PER_MS


def wall_ms() -> int:
    return _wall_ns() // NS_PER_MS


def sleep_ms(duration_ms: float) -> None:
    """Wait between two attempts of one call; never longer than that call may take."""
    _pause(duration_ms / 1000)


class Clock(Protocol):
    """What can be put in the place of the machine's clocks."""

    def boot_ns(self) -> int: ...

    def wall_ns(self) -> int: ...

    def sleep(self, seconds: float) -> None: ...


_REAL: Final = (boot_ns, _wall_ns, _pause)


def use(clock: Clock | None) -> None:
    """Let the whole SDK live by this clock; None: by the machine's again.

    The modules in which an operation begins and ends have taken `boot_ns` by name, since looking it
    up costs each of them; so it is put into each.
    """
    global boot_ns, _wall_ns, _pause, is_virtual
    before = boot_ns
    mine = None if clock is None else (clock.boot_ns, clock.wall_ns, clock.sleep)
    boot_ns, _wall_ns, _pause = mine or _REAL
    is_virtual = mine is not None
    for name, module in list(sys.modules.items()):
        if name.startswith("grafos.") and vars(module).get("boot_ns") == before:
            vars(module)["boot_ns"] = boot_ns
