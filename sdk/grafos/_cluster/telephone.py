"""The unix socket by which a supervisor is asked how things are, and told what to do.

Rules. One line of JSON each way per connection, at most 256 KiB. The socket lies in a folder that
only its owner may enter, so whoever can connect may command. Callers are served one after another
and have a second to say what they want.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from grafos_core import failure
from grafos_core.failure import FabricError

LINE_BYTES_MAX: Final = 262_144
CALL_S: Final = 1.0
ANSWER_S: Final = 10.0

Answer = Callable[[dict[str, Any]], dict[str, Any]]


class Telephone:
    """Answers from `start` to `stop`, in one thread."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self._path, self._answer = path, answer
        self._listening = socket.socket(socket.AF_UNIX)
        path.unlink(missing_ok=True)  # the caller holds the lock on this folder
        self._listening.bind(str(path))
        path.chmod(0o600)
        self._listening.listen(16)
        self._thread = threading.Thread(target=self._serve, name="telephone", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._path.unlink(missing_ok=True)
        try:
            self._listening.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # never connected to
        self._listening.close()
        if self._thread.is_alive():
            self._thread.join(timeout=CALL_S)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return  # stopped
            with connection:
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        connection.settimeout(CALL_S)
        try:
            request = json.loads(_line(connection))
            answer = self._answer(request)
        except FabricError as refusal:
            answer = {"code": refusal.code, "detail": refusal.detail}
        except (ValueError, TypeError, KeyError, OSError):
            answer = {"code": "INVALID", "detail": "not a question that a supervisor knows"}
        try:
            connection.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            pass  # he hung up


def ask(path: Path | str, request: dict[str, Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
    """The supervisor's answer; UNREACHABLE where nobody listens."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer: dict[str, Any] = json.loads(_line(connection))
    except TimeoutError:
        raise failure.of("DEADLINE", "the supervisor did not answer in time") from None
    except (OSError, ValueError):
        raise failure.of("UNREACHABLE", "no supervisor answers: is the fabric up?") from None
    if "code" in answer:
        raise failure.of(answer["code"], answer["detail"])
    return answer


def _line(connection: socket.socket) -> bytes:
    data = bytearray()
    while not data.endswith(b"\n"):
        part = connection.recv(65_536)
        if not part or len(data) + len(part) > LINE_BYTES_MAX:
            raise ValueError("no complete line")
        data += part
    return bytes(data)
