"""Every setting of the command line, and where its value came from.

Rules. A flag rules over the variable, which rules over the configuration file, which rules over the
default; `grafos config view --show-origin` says which of them it was. The file is TOML at
`$GRAFOS_CONFIG`, else `$XDG_CONFIG_HOME/grafos/config.toml`; a name in it that is not a setting is
refused, since a mistyped setting must not look like one that was taken.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from grafos._cluster import layout
from grafos._cluster.layout import Layout
from grafos_core import failure


@dataclass(frozen=True, slots=True)
class Setting:
    """One of them. The variable is `GRAFOS_<NAME>`."""

    name: str
    help: str
    default: str
    parse: Callable[[str], Any] = str

    @property
    def variable(self) -> str:
        return f"GRAFOS_{self.name.upper()}"


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise failure.of("INVALID", "a whole number is needed")
    return int(text)


def _flag(text: str) -> bool:
    if text.lower() not in {"true", "false", "1", "0", "yes", "no", ""}:
        raise failure.of("INVALID", "true or false is needed")
    return text.lower() in {"true", "1", "yes"}


SETTINGS: Final = {
    each.name: each
    for each in (
        Setting("state_dir", "where the fabric's state is", "", str),
        Setting("run_dir", "where the fabric's sockets are", "", str),
        Setting("nodes", "how many node agents `up` starts", "1", _count),
        Setting("memory", "memory that each node leases out", "", str),
        Setting("block", "block storage that each node leases out", "", str),
        Setting("tcp", "listen on loopback ports, not on unix sockets", "false", _flag),
        Setting("port_base", "first loopback port; 0: any", "7440", _count),
        Setting("trust_domain", "name of the fabric in its certificates", "", str),
        Setting("join_listen", "host:port where machines join; empty: nowhere", "", str),
        Setting("timeout_s", "for one command to be answered, in seconds", "10", _count),
    )
}


@dataclass(frozen=True, slots=True)
class Value:
    """A setting's value and its origin, as people read it."""

    setting: Setting
    text: str
    origin: str

    @property
    def parsed(self) -> Any:
        try:
            return self.setting.parse(self.text)
        except failure.Incompatible as refusal:
            where = f"{self.setting.name} ({self.origin})"
            raise failure.of("INVALID", f"{where}: {refusal.detail}") from None


def value(given: argparse.Namespace, name: str) -> Any:
    """The setting that is in force for this command."""
    return found(given, name).parsed


def found(given: argparse.Namespace, name: str) -> Value:
    setting = SETTINGS[name]
    flag = getattr(given, name, None)
    if flag is not None and flag is not False:
        return Value(setting, str(flag), "flag")
    if setting.variable in os.environ:
        return Value(setting, os.environ[setting.variable], f"variable {setting.variable}")
    path = config_file(os.environ)
    in_file = read_file(path)
    if name in in_file:
        return Value(setting, in_file[name], f"file {path}")
    return Value(setting, setting.default or _derived(name), "default")


def the_layout(given: argparse.Namespace) -> Layout:
    """The folders of the fabric that this command is about."""
    state, run = str(value(given, "state_dir")), str(value(given, "run_dir"))
    return Layout(Path(state).absolute(), Path(run).absolute())


def config_file(environment: Mapping[str, str]) -> Path:
    if given := environment.get("GRAFOS_CONFIG"):
        return Path(given)
    home = environment.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(home) / "grafos" / "config.toml"


def read_file(path: Path) -> dict[str, str]:
    """Name to text; empty where there is no file."""
    try:
        text = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise failure.of("INVALID", f"{path}: {error}") from None
    import tomllib  # only where there is a file

    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise failure.of("INVALID", f"{path}: {error}") from None
    unknown = sorted(set(raw) - set(SETTINGS))
    if unknown:
        known = ", ".join(sorted(SETTINGS))
        raise failure.of("OPTION", f"{path}: no setting {unknown[0]!r}; there are: {known}")
    return {name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in raw.items()}  # fmt: skip


def _derived(name: str) -> str:
    if name == "state_dir":
        return str(layout.state_directory(os.environ))
    if name == "run_dir":
        return str(layout.run_directory(os.environ))
    return ""
