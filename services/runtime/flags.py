"""What a service is told at its start, from the command line and the environment.

Rules. A flag rules over the variable `GRAFOS_<NAME>`, which rules over the default. Everything is
checked before anything is opened: one that does not fit is named, with what would fit, and the exit
status is 2. `--help` lists all flags, their variables and defaults, and the fault points.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from grafos_core import failure, spiffe
from grafos_core.failure import FabricError
from grafos_proto.wire.ttrpc_frames import SUFFIX
from services.runtime import faults
from services.runtime.logs import LEVELS

USAGE_STATUS: Final = 2
UNIX_PATH_BYTES_MAX: Final = 107 - len(SUFFIX)
"""sun_path less its final zero (unix(7)), and less the ending of the socket beside it."""

Values = argparse.Namespace


@dataclass(frozen=True, slots=True)
class Flag:
    """One setting: `--name VALUE` or `GRAFOS_NAME`."""

    name: str
    """With hyphens and without the two in front."""
    help: str
    default: str | None = ""
    """None: it must be given."""
    parse: Callable[[str], Any] = str
    """Text to value; a ValueError or failure says what would fit."""
    bare: str | None = None
    """What the flag says where nothing follows it; None: something must."""

    @property
    def field(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return f"GRAFOS_{self.field.upper()}"


def endpoint(text: str) -> str:
    """`unix:<absolute path>` or `<host>:<port>`."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
            raise ValueError(f"unix:<absolute path of at most {UNIX_PATH_BYTES_MAX} bytes>")
        return text
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ValueError("unix:<absolute path> or <host>:<port>")
    return text


def number(least: int, most: int) -> Callable[[str], int]:
    """A whole number within bounds."""

    def parse(text: str) -> int:
        digits = text.removeprefix("-")
        if not digits.isascii() or not digits.isdigit() or not least <= int(text) <= most:
            raise ValueError(f"a whole number, {least} to {most}")
        return int(text)

    return parse


def choice(*allowed: str) -> Callable[[str], str]:
    """One of a few words."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"one of: {', '.join(allowed)}")
        return text

    return parse


def switch(text: str) -> bool:
    """On or off."""
    return choice("on", "off")(text) == "on"


def directory(text: str) -> Path:
    """A folder; made later if it is not there."""
    path = Path(text)
    if not path.is_absolute():
        raise ValueError("an absolute path")
    if path.exists() and not path.is_dir():
        raise ValueError("a folder, not a file")
    return path


def socket_path(text: str) -> str:
    """The path of a unix socket."""
    if not text.startswith("/") or len(os.fsencode(text)) > UNIX_PATH_BYTES_MAX:
        raise ValueError(f"an absolute path of at most {UNIX_PATH_BYTES_MAX} bytes")
    return text


def optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """What `parse` makes of a text, and None of no text."""
    return lambda text: parse(text) if text else None


def descriptor(text: str) -> int:
    """An open file descriptor that we inherited."""
    value = number(0, 1 << 20)(text)
    try:
        os.fstat(value)
    except OSError:
        raise ValueError("an open file descriptor") from None
    return int(value)


def pipe(text: str) -> int:
    """The reading end of an inherited pipe, or a socket."""
    value = descriptor(text)
    mode = os.fstat(value).st_mode
    if not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):
        raise ValueError("a pipe or a socket")
    return value


COMMON: Final[tuple[Flag, ...]] = (
    Flag("state-dir", "folder for this service's state, 0700", None, directory),
    Flag("listen", "where callers connect", "127.0.0.1:0", endpoint),
    Flag("control-listen", "where operators and services connect", "", optional(endpoint)),
    Flag("http-listen", "readiness and metrics, plain HTTP", "127.0.0.1:0", endpoint),
    Flag("identity-dir", "folder of tls.key, tls.crt and ca.crt", "", optional(directory)),
    Flag("identity-socket", "unix socket that gives out certificates", "", optional(socket_path)),
    Flag("ledger", "address of the ledger", "", optional(endpoint)),
    Flag("audit", "address of the audit collector", "", optional(endpoint)),
    Flag("trust-domain", "whose certificates are believed", "grafos.local",
         spiffe.check_trust_domain),
    Flag("mode", "development allows faults", "production", choice("development", "production")),
    Flag("log-level", "least level that is written", "info", choice(*LEVELS)),
    Flag("ready-fd", "descriptor for one JSON line once serving", "", optional(descriptor)),
    Flag("exit-with-parent-fd", "pipe whose end of file ends us", "", optional(pipe)),
    Flag("secret-fd", "pipe with the secret for a first certificate", "", optional(pipe)),
    Flag("otlp-endpoint", "where spans go, for instance http://127.0.0.1:4318", ""),
)  # fmt: skip
"""What all services take."""


def read(
    program: str,
    description: str,
    own: Sequence[Flag] = (),
    *,
    arguments: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
) -> Values:
    """The settings of this process, all checked; exits with status 2 where one does not fit.

    `own` flags stand in the place of common ones of the same name. Fault points are armed here.
    """
    given = os.environ if environment is None else environment
    replaced = {flag.name for flag in own} | set(without)
    flags = [*own, *(flag for flag in COMMON if flag.name not in replaced)]
    texts = vars(_parser(program, description, flags).parse_args(arguments))
    values = Values()
    for flag in flags:
        text = texts[flag.field]
        text = given.get(flag.variable, flag.default) if text is None else text
        setattr(values, flag.field, _value(program, flag, text))
    try:
        faults.arm_from_environment(
            given, development=getattr(values, "mode", "production") == "development"
        )
    except FabricError as refusal:
        refuse(program, f"{faults.VARIABLE}: {refusal.detail}")
    return values


def refuse(program: str, why: str) -> NoReturn:
    """Say what does not fit, and exit with status 2."""
    print(f"{program}: {why}", file=sys.stderr)
    raise SystemExit(USAGE_STATUS)


def _value(program: str, flag: Flag, text: str | None) -> Any:
    if text is None:
        refuse(program, f"--{flag.name} (or {flag.variable}) is needed: {flag.help}")
    try:
        return flag.parse(text)
    except failure.FabricError as refusal:
        refuse(program, f"--{flag.name}: {refusal.detail or refusal}")
    except ValueError as error:
        refuse(program, f"--{flag.name}: must be {error}")


def _parser(program: str, description: str, flags: Sequence[Flag]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program,
        description=description,
        epilog=f"fault points ({faults.VARIABLE}, in development mode):\n{faults.described()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag in flags:
        shown = "needed" if flag.default is None else (flag.default or "none")
        parser.add_argument(
            f"--{flag.name}",
            metavar="VALUE",
            nargs=None if flag.bare is None else "?",
            const=flag.bare,
            help=f"{flag.help} [{flag.variable}; {shown}]",
        )
    return parser
