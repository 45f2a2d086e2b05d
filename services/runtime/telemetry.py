"""Traces and numbers: what passes through a service, for those who look at it from outside.

Rules. Metric names have their unit in them, and their labels are bounded: kind, class, node, state,
reason, method, code; never a lease id or a holder. A trace is carried on by the W3C header
`traceparent` in gRPC's metadata. Without an endpoint to send them to, no spans are made: the ids of
the caller are still in our log lines and in the calls that we make in turn.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Final, cast

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from grafos_core.failure import FabricError
from services.runtime import logs

TRACEPARENT: Final = "traceparent"
SECONDS_BUCKETS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10,
)  # fmt: skip
LATENESS_BUCKETS: Final = (
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10,
)  # fmt: skip
"""The goals for lateness are borders here: a bucket that ends elsewhere could not tell."""

GAUGES: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "grafos_leases": ("Leases by state", ("kind", "state")),
    "grafos_teardown_obligations": ("Teardowns that the node owes", ()),
    "grafos_fences": ("Slices in quarantine", ("kind", "cause")),
    "grafos_fence_age_seconds_max": ("Age of the oldest quarantined slice", ()),
    "grafos_capacity_bytes": ("Capacity by state", ("kind", "state")),
    "grafos_ledger_imbalance_bytes": ("Total less the sum of its states; must be 0", ("kind",)),
    "grafos_readiness_state": ("1 where the gate is open", ("gate",)),
    "grafos_audit_head_lag_seconds": ("Age of the oldest unacknowledged record", ()),
}
COUNTERS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "grafos_lease_renew_failures": ("Renewals refused", ("reason",)),
    "grafos_admission_decisions": ("Decisions of admission", ("result", "reason")),
    "grafos_epoch_rejects": ("Operations refused at the gate", ("kind",)),
    "grafos_audit_verify_failures": ("Records that did not verify", ()),
    "grafos_ledger_events": ("Events made durable", ()),
    "grafos_nodes_forgotten": ("Nodes that an operator gave up", ()),
    "grafos_call_failures": ("Calls that ended in a failure", ("method", "code")),
}
HISTOGRAMS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "grafos_lease_acquire_seconds": ("From the request to its answer", ("kind",)),
    "grafos_lease_deadline_overrun_seconds": (
        "From a deadline until nothing can be used any more",
        ("kind", "by"),
    ),
    "grafos_teardown_seconds": ("From the end of access to the receipt", ("kind", "result")),
    "grafos_admission_wait_seconds": ("Waiting for evidence and capacity", ("kind",)),
    "grafos_ledger_commit_seconds": ("From a batch's last decision until it is durable", ()),
    "grafos_call_seconds": ("From the headers to the answer", ("method",)),
}
BUCKETS: Final[Mapping[str, tuple[float, ...]]] = {
    "grafos_lease_deadline_overrun_seconds": LATENESS_BUCKETS,
}
"""Of histograms that have others than `SECONDS_BUCKETS`."""

_TRACEPARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_tracer: trace.Tracer | None = None


class Metrics:
    """The numbers of one process, in a registry of its own; made when first asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._made: dict[str, Any] = {}

    def gauge(self, name: str) -> Gauge:
        return cast(Gauge, self._get(name, Gauge, GAUGES))

    def counter(self, name: str) -> Counter:
        """`name` without the ending `_total`, which the output adds."""
        return cast(Counter, self._get(name, Counter, COUNTERS))

    def histogram(self, name: str) -> Histogram:
        made = self._made.get(name)
        if made is None:
            text, labels = HISTOGRAMS[name]
            buckets = BUCKETS.get(name, SECONDS_BUCKETS)
            made = self._made[name] = Histogram(
                name, text, labels, registry=self.registry, buckets=buckets
            )
        return cast(Histogram, made)

    def watch(self, name: str, read: Callable[[], Iterable[tuple[tuple[str, ...], float]]]) -> None:
        """A gauge that is read when it is asked for: `read()` gives (label values, value)."""
        self.registry.register(_Watched(name, *GAUGES[name], read=read))

    def _get(self, name: str, kind: Any, known: Mapping[str, tuple[str, tuple[str, ...]]]) -> Any:
        made = self._made.get(name)
        if made is None:
            text, labels = known[name]
            made = self._made[name] = kind(name, text, labels, registry=self.registry)
        return made


class _Watched(Collector):
    def __init__(self, name: str, text: str, labels: tuple[str, ...], *, read: Any) -> None:
        self._name, self._text, self._labels, self._read = name, text, labels, read

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for values, value in self._read():
            family.add_metric(values, value)
        yield family


class CallMeters:
    """How calls went, per method. Only methods that exist become labels."""

    def __init__(self, metrics: Metrics) -> None:
        self._seconds = metrics.histogram("grafos_call_seconds")
        self._failures = metrics.counter("grafos_call_failures")
        self._by_method: dict[str, Any] = {}

    def served(self, method: str, nanoseconds: int) -> None:
        child = self._by_method.get(method)
        if child is None:
            child = self._by_method[method] = self._seconds.labels(method)
        child.observe(nanoseconds / 1e9)

    def refused(self, method: str, error: FabricError) -> None:
        self._failures.labels(method, error.code).inc()


def set_up(service: str, otlp_endpoint: str) -> Callable[[], None]:
    """Send spans to `otlp_endpoint`, if there is one. The answer flushes and stops sending."""
    global _tracer
    if not otlp_endpoint:
        return lambda: None
    provider = TracerProvider(resource=Resource.create({"service.name": f"grafos-{service}"}))
    exporter = OTLPSpanExporter(endpoint=f"{otlp_endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("grafos")
    return provider.shutdown


def parse_traceparent(text: str) -> tuple[str, str]:
    """(trace id, span id) of a W3C header; both empty where it is not well formed."""
    found = _TRACEPARENT.fullmatch(text)
    if found is None or not int(found[1], 16) or not int(found[2], 16):
        return ("", "")
    return (found[1], found[2])


def traceparent() -> str:
    """The header for a call that is made on behalf of the one being served; empty: no trace."""
    trace_id, span_id = logs.trace_ids.get()
    return f"00-{trace_id}-{span_id}-01" if trace_id else ""


def new_trace() -> tuple[str, str]:
    """Ids for work that nobody asked for, such as a tick."""
    return (secrets.token_hex(16), secrets.token_hex(8))


@contextmanager
def serving(method: str, header: str) -> Generator[None, None, None]:
    """Serve a call within its caller's trace."""
    if _tracer is None and not header:
        yield
        return
    parent = parse_traceparent(header)
    if _tracer is None:
        with _ids(parent):
            yield
        return
    with _tracer.start_as_current_span(
        method.lstrip("/"), context=_remote(parent), kind=SpanKind.SERVER
    ) as span:
        own = span.get_span_context()
        with _ids((f"{own.trace_id:032x}", f"{own.span_id:016x}")):
            yield


@contextmanager
def _ids(ids: tuple[str, str]) -> Generator[None, None, None]:
    before = logs.trace_ids.get()
    logs.trace_ids.set(ids)
    try:
        yield
    finally:
        logs.trace_ids.set(before)


def _remote(parent: tuple[str, str]) -> Any:
    if not parent[0]:
        return None
    context = SpanContext(
        int(parent[0], 16), int(parent[1], 16), is_remote=True, trace_flags=TraceFlags(1)
    )
    return trace.set_span_in_context(NonRecordingSpan(context))
