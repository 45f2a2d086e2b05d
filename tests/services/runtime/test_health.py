"""Gates, and the plain HTTP listener that shows them."""

from __future__ import annotations

import io
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from grafos_core import failure
from services.runtime.health import HttpListener, Readiness
from services.runtime.logs import Log
from services.runtime.telemetry import Metrics


@pytest.fixture
def readiness() -> Readiness:
    return Readiness(["serving", "ledger"], ["mem", "block"])


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def http(readiness: Readiness, metrics: Metrics) -> Iterator[HttpListener]:
    listener = HttpListener("127.0.0.1:0", readiness, metrics, Log("test", stream=io.StringIO()))
    listener.start()
    yield listener
    listener.stop()


def get(http: HttpListener, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{http.endpoint}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_every_gate_is_closed_until_somebody_opens_it(readiness: Readiness) -> None:
    assert not readiness.is_ready()
    readiness.open("serving")
    assert not readiness.is_ready()
    readiness.open("ledger")
    assert readiness.is_ready()
    readiness.close("ledger", "unreachable since 3 s")
    assert not readiness.is_ready()
    assert readiness.closed()["ledger"] == "unreachable since 3 s"


def test_a_gate_of_a_kind_holds_up_that_kind_alone(readiness: Readiness) -> None:
    readiness.open("serving")
    readiness.open("ledger")
    readiness.open("device", kind="mem")
    assert (readiness.is_ready("mem"), readiness.is_ready("block")) == (True, False)
    readiness.close("self-test", "canary differs", kind="mem")
    assert readiness.closed() == {"mem/self-test": "canary differs", "block/device": "starting"}
    assert readiness.is_ready()


def test_who_listens_is_told_at_once_and_of_changes_only(readiness: Readiness) -> None:
    told: list[bool] = []
    readiness.on_change(told.append)
    readiness.open("serving")
    readiness.open("ledger")
    readiness.open("ledger")
    readiness.close("serving", "draining")
    readiness.close("ledger", "gone")
    assert told == [False, True, False]


def test_readiness_shows_each_gate_and_why(http: HttpListener, readiness: Readiness) -> None:
    readiness.open("serving")
    readiness.close("ledger", "unreachable")
    readiness.open("device", kind="mem")
    readiness.policies.append("does more")
    status, body = get(http, "/api/v1/readiness")
    assert status == 503
    assert json.loads(body) == {
        "state": "not_ready",
        "gates": {"serving": {"open": True}, "ledger": {"open": False, "why": "unreachable"}},
        "kinds": {
            "mem": {"ready": False, "gates": {"device": {"open": True}}},
            "block": {
                "ready": False, "gates": {"device": {"open": False, "why": "starting"}},
            },
        },
        "policies": ["does more"],
    }  # fmt: skip
    readiness.open("ledger")
    assert get(http, "/api/v1/readiness")[0] == 200


def test_metrics_are_what_prometheus_reads(http: HttpListener, metrics: Metrics) -> None:
    metrics.gauge("grafos_leases").labels("mem", "active").set(3)
    metrics.counter("grafos_nodes_forgotten").inc()
    metrics.histogram("grafos_teardown_seconds").labels("mem", "sealed").observe(0.002)
    metrics.watch("grafos_fences", lambda: [(("block", "io"), 2.0)])
    status, body = get(http, "/metrics")
    assert status == 200
    samples = {
        (sample.name, tuple(sorted(sample.labels.values()))): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }
    assert samples["grafos_leases", ("active", "mem")] == 3
    assert samples["grafos_nodes_forgotten_total", ()] == 1
    assert samples["grafos_fences", ("block", "io")] == 2
    assert samples["grafos_teardown_seconds_count", ("mem", "sealed")] == 1


def test_it_lives_and_knows_nothing_else(http: HttpListener) -> None:
    assert get(http, "/livez") == (200, "alive\n")
    for path in ("/", "/etc/passwd", "/metrics/../livez", "/api/v1/readiness/x"):
        assert get(http, path)[0] == 404
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://{http.endpoint}/livez", data=b"write", timeout=5)
    with caught.value:
        assert caught.value.code == 501


def test_more_silent_watchers_than_places_are_hung_up_on(http: HttpListener) -> None:
    host, _, port = http.endpoint.rpartition(":")
    silent: list[Any] = [socket.create_connection((host, int(port)), 5) for _ in range(60)]
    for each in silent[40:]:
        assert each.recv(1) == b""
    for each in silent:
        each.close()
    for _ in range(50):
        if get_or_nothing(http) == (200, "alive\n"):
            return
    raise AssertionError("it no longer answers")


def get_or_nothing(http: HttpListener) -> tuple[int, str]:
    try:
        return get(http, "/livez")
    except OSError:
        return (0, "")


def test_an_address_that_is_none_is_refused(readiness: Readiness, metrics: Metrics) -> None:
    for endpoint in ("", "8080", "host:port", "127.0.0.1:99999"):
        with pytest.raises(failure.FabricError):
            HttpListener(endpoint, readiness, metrics, Log("test"))
