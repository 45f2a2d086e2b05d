"""What a service says about itself: one JSON object per line, on standard error.

Rules. Every line has `time` (RFC 3339, UTC), `level`, `service` and `event`, a stable name with
dots; `trace_id`, `span_id`, `lease_id` and `epoch` where there are any. Nothing that opens a door
reaches the output: fields with telling names are blanked, and whatever looks like a token or a key
is cut out of all other text, tracebacks included. Bytes are never printed, only counted.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from services.runtime.clock import SYSTEM, Clock

LEVELS: Final = ("debug", "info", "warning", "error")
TEXT_CHARS_MAX: Final = 4_096
TRACEBACK_CHARS_MAX: Final = 16_384
REDACT_CHARS_MAX: Final = 262_144
DEPTH_MAX: Final = 6
BLANK: Final = "[redacted]"

_OPEN_NAMES: Final = frozenset(
    {"holder_key", "public_key", "key_id", "receipt_key", "key_number", "token_expires_in_ms"}
)
"""Names that sound secret and are not."""
_SECRET_NAME: Final = re.compile(
    r"token|secret|passw|authorization|cookie|credential|private|proof|_pem$|^pem$|(^|_)keys?$"
    r"|clear_order|^order$|^receipt$",
    re.IGNORECASE,
)
_SECRET_TEXT: Final = re.compile(
    r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)"  # PEM, cut off or whole
    r"|eyJ[A-Za-z0-9_-]{4,}+(?:\.[A-Za-z0-9_-]*+){0,4}+"  # begins like a JWT: a JSON object
    r"|(?<![\w-])[\w-]{20,}+\.[\w-]{20,}+\.[\w-]{20,}+"  # three parts of base64url
    r"|(?<![\w-])[a-z0-9-]{1,63}+\.[\w-]{16,}+\.[0-9a-f]{32}(?![0-9a-f])"  # to join
    r"|(?i:bearer )\S+",
    re.DOTALL | re.ASCII,
)
"""Possessive, so that its time grows with the text and not with its square."""

trace_ids: ContextVar[tuple[str, str]] = ContextVar("trace_ids", default=("", ""))
"""(trace id, span id) of the call that this thread serves."""


def redact(text: str) -> str:
    """`text` without anything that looks like a token or a key."""
    return _SECRET_TEXT.sub(BLANK, text[:REDACT_CHARS_MAX])


def clean(value: Any, name: str = "", depth: int = 0) -> Any:
    """A field's value as it may be written down."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if name not in _OPEN_NAMES and _SECRET_NAME.search(name):
        return BLANK
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if depth < DEPTH_MAX and isinstance(value, dict):
        return {redact(str(key)): clean(each, str(key), depth + 1) for key, each in value.items()}
    if depth < DEPTH_MAX and isinstance(value, list | tuple | set | frozenset):
        return [clean(each, "", depth + 1) for each in value]
    return _cut(redact(str(value)), TEXT_CHARS_MAX)


def _cut(text: str, chars_max: int) -> str:
    return text if len(text) <= chars_max else text[:chars_max] + "…"


class Log:
    """Writes the lines of one process. Safe from any thread."""

    def __init__(
        self,
        service: str,
        *,
        level: str = "info",
        stream: TextIO | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self.service, self._clock = service, clock
        self._stream, self._least = stream, LEVELS.index(level)
        self._lock = threading.Lock()

    def debug(self, event: str, **fields: Any) -> None:
        self.write("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self.write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self.write("warning", event, fields)

    def error(self, event: str, error: BaseException | None = None, **fields: Any) -> None:
        """With `error`, its traceback too, redacted like everything else."""
        if error is not None:
            text = "".join(traceback.format_exception(error))
            fields["exception"] = type(error).__name__
            fields["traceback"] = _cut(redact(text), TRACEBACK_CHARS_MAX).splitlines()
        self.write("error", event, fields)

    def write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if LEVELS.index(level) < self._least:
            return
        line: dict[str, Any] = {
            "time": rfc3339(self._clock.wall_ms()), "level": level, "service": self.service,
            "event": event,
        }  # fmt: skip
        trace_id, span_id = trace_ids.get()
        if trace_id:
            line |= {"trace_id": trace_id, "span_id": span_id}
        for name, value in fields.items():
            line[name if name not in line else f"{name}_"] = clean(value, name)
        text = json.dumps(line, ensure_ascii=True, separators=(",", ":")) + "\n"
        with self._lock:
            self._put(text)

    def _put(self, text: str) -> None:
        stream = self._stream or sys.stderr
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            pass  # whoever read our lines is gone; the service is not

    def take_over(self) -> None:
        """Write what libraries log by the standard library's `logging` as lines of ours."""
        root = logging.getLogger()
        root.handlers = [_Bridge(self)]
        root.setLevel(logging.WARNING)


class _Bridge(logging.Handler):
    """From `logging` to a `Log`."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warning"
        fields: dict[str, Any] = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[1] is not None:
            text = "".join(traceback.format_exception(record.exc_info[1]))
            fields["traceback"] = _cut(redact(text), TRACEBACK_CHARS_MAX).splitlines()
        self._log.write(level, "library", fields)


def rfc3339(wall_ms: int) -> str:
    """UTC with milliseconds, for instance 2031-05-01T12:00:00.250Z."""
    moment = datetime.fromtimestamp(wall_ms // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{wall_ms % 1000:03d}Z"
