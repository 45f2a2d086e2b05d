"""The one clock of the SDK.

Rules. What a holder may believe is decided on the boot-time clock, which never goes back and goes
on while the machine sleeps; the wall clock is for people and for what they wrote down. Nothing else
in the SDK reads a clock or waits.
"""

from __future__ import annotations

import functools
import time
from typing import Final

NS_PER_MS: Final = 1_000_000

boot_ns: Final = functools.partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)
"""A call into C and nothing else: it stands before and after every operation on leased memory."""


def boot_ms() -> int:
    return boot_ns() // NS_PER_MS


def wall_ms() -> int:
    return time.time_ns() // NS_PER_MS


def sleep_ms(duration_ms: float) -> None:
    """Wait between two attempts of one call; never longer than that call may take."""
    time.sleep(duration_ms / 1000)  # noqa: TID251 - the one place of the SDK that waits
