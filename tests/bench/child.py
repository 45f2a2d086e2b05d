"""A helper process of a measurement: told and heard in lines of JSON, always ended.

Rules. Every line is waited for with a bound. The process ends when its input ends, and is killed by
its own handle if it does not.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

END_S_MAX: Final = 3.0
HEAR_S_MAX: Final = 20.0
READ_BYTES: Final = 65_536


class ChildError(Exception):
    """It said nothing in time, or has ended."""


class Child:
    """`python -m <module> …`, with pipes. A context manager."""

    def __init__(self, module: str, *arguments: str, pass_fds: Sequence[int] = ()) -> None:
        self.module = module
        self._rest = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=pass_fds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip

    def tell(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, timeout_s: float = HEAR_S_MAX) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        until_s = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not select.select([self.process.stdout], [], [], left_s)[0]:
                raise ChildError(f"{self.module} said nothing within {timeout_s:.1f} s")
            more = os.read(self.process.stdout.fileno(), READ_BYTES)
            if not more:
                raise ChildError(f"{self.module} has ended")
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self, message: dict[str, Any], timeout_s: float = HEAR_S_MAX) -> dict[str, Any]:
        self.tell(message)
        return self.hear(timeout_s)

    def close(self) -> None:
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except BrokenPipeError:  # it has ended before us
                pass
        try:
            self.process.wait(END_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_S_MAX)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
