"""The command `grafos`: a fabric on this machine, and what an operator asks and tells a fabric.

    grafos up | down | status | doctor | demo
    grafos node | lease | fence | audit | token | quota | ca | identity | config …   noun, then verb

Rules. What was asked for goes to standard output, everything else to standard error. A failure is
one line: its name, its code, what happened, what to do. Exit status: 0 ok, 1 failed, 2 usage,
3 not found, 4 denied, 5 timeout. Starting must be quick: what is slow to load (gRPC, cryptography)
is loaded by the commands that need it, when they run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from grafos._cli.exits import INTERRUPTED, exit_status, explained
from grafos._cli.parser import build
from grafos_core.failure import FabricError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    given = build().parse_args(arguments)
    try:
        status: int = given.run(given)
        sys.stdout.flush()
    except FabricError as refusal:
        print(f"grafos: {explained(refusal)}", file=sys.stderr)
        return exit_status(refusal)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    return status
