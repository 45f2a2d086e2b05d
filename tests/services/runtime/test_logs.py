"""What a service writes about itself, and what it never writes."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from typing import Any

import pytest

from grafos_core import failure
from grafos_proto.wire import certificates
from services.runtime.logs import Log, rfc3339, trace_ids

JWT = "eyJhbGciOiJFZERTQSJ9.eyJpc3MiOiJncmFmb3MifQ.c2lnbmF0dXJlLXNpZ25hdHVyZQ"
JOIN = "n1.Zm9vYmFyYmF6cXV4MTIzNA.0123456789abcdef0123456789abcdef"
PEM = certificates.key_pem(certificates.new_tls_key()).decode()
SECRETS = {"jwt": JWT, "join token": JOIN, "private key": PEM, "cut key": PEM[:90]}


def written(event: str = "test.event", **fields: Any) -> str:
    stream = io.StringIO()
    Log("ledger", stream=stream).info(event, **fields)
    return stream.getvalue()


def test_a_line_is_one_json_object_with_a_time_that_machines_read() -> None:
    text = written(lease_id="ab", epoch=7, note="line\nbreak")
    assert text.count("\n") == 1
    line = json.loads(text)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "info", "service": "ledger", "event": "test.event", "lease_id": "ab", "epoch": 7,
        "note": "line\nbreak",
    }  # fmt: skip
    assert rfc3339(1_000_000_000_250) == "2001-09-09T01:46:40.250Z"


def test_a_line_carries_the_trace_of_the_call_it_belongs_to() -> None:
    before = trace_ids.set(("a" * 32, "b" * 16))
    try:
        line = json.loads(written())
    finally:
        trace_ids.reset(before)
    assert (line["trace_id"], line["span_id"]) == ("a" * 32, "b" * 16)


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
def test_no_secret_is_written_whatever_field_or_text_it_stands_in(secret: str) -> None:
    visible = secret.splitlines()[-1] if secret.startswith("-----") else secret.split(".")[1]
    hidden = secret.splitlines()[1] if secret.startswith("-----") else visible
    texts = [
        written(note=secret),
        written(note=f"refused '{secret}' at bind"),
        written(details={"deep": [{"er": secret}]}),
        written(details={secret: 1}),
        written(error=failure.of("INVALID", secret)),
        written(token=secret, holder_token=secret, password=secret),
    ]
    stream = io.StringIO()
    log = Log("ledger", stream=stream)
    try:
        try:
            raise ValueError(f"cannot parse {secret}")
        except ValueError as error:
            raise KeyError(secret) from error
    except KeyError as error:
        log.error("call.failed", error)
    texts.append(stream.getvalue())
    for text in texts:
        assert hidden not in text
        assert "[redacted]" in text


def test_fields_with_telling_names_are_blank_whatever_they_hold() -> None:
    names = [
        "token", "session_token", "secret", "handover_secret", "password", "authorization",
        "key", "private_key", "tls_key", "key_pem", "cookie", "credentials", "clear_order",
    ]  # fmt: skip
    for name in names:
        assert json.loads(written(**{name: "short"}))[name] == "[redacted]"
    open_ones = {"holder_key": "Zm9v", "key_id": "0011", "lease_id": "ab", "public_key": "aa"}
    line = json.loads(written(**open_ones))
    assert {name: line[name] for name in open_ones} == open_ones


def test_bytes_are_counted_and_never_printed() -> None:
    assert json.loads(written(data=b"0123456789"))["data"] == "<10 bytes>"
    assert json.loads(written(parts=[b"ab"]))["parts"] == ["<2 bytes>"]


def test_a_text_is_cut_and_nesting_ends() -> None:
    for long in ("x" * 1_000_000, "eyJ" * 300_000, "a." * 500_000, "-----BEGIN A-----" * 60_000):
        started = time.monotonic()
        assert len(written(note=long)) < 5_000
        assert time.monotonic() - started < 2  # time grows with the text, not with its square
    nested: Any = "bottom"
    for _ in range(50):
        nested = [nested]
    assert len(written(note=nested)) < 1_000


def test_names_of_modules_and_addresses_stay_readable() -> None:
    for text in ("services.nodeagent.control", "spiffe://grafos.local/node/n1", "127.0.0.1:4317"):
        assert json.loads(written(note=text))["note"] == text


def test_what_libraries_log_becomes_a_line_of_ours() -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        Log("ledger", stream=stream).take_over()
        logging.getLogger("grpc").error("Exception servicing %s", JWT)
    finally:
        root.handlers, root.level = handlers, level
    line = json.loads(stream.getvalue())
    assert (line["event"], line["logger"]) == ("library", "grpc")
    assert JWT not in stream.getvalue()


def test_a_reader_who_is_gone_does_not_end_the_service() -> None:
    stream = io.StringIO()
    stream.close()
    Log("ledger", stream=stream).error("test.event", ValueError("x"))
