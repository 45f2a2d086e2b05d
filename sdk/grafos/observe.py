"""What goes on, for those who look from outside: numbers, events, and whose request it was.

    from grafos.observe import FabricMetrics, instrument

    FabricMetrics.global_().leases_total.inc()

    @instrument
    def process_request(request): ...

Three layers over the same happenings: metrics count, `EventRingBuffer` keeps the latest, and the
audit chain (see `grafos.audit`) proves. The first two may lose things, the third may not.

Rules. Metric names carry their unit, labels are few and bounded: a kind or an outcome, never a
lease id or a holder. Traces are W3C `traceparent`: the ids of the caller are passed on in every
call that the SDK makes. Spans are made only where the program has set OpenTelemetry up; without it,
`instrument` costs a few microseconds and changes nothing.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Final, TextIO, TypeVar, cast

from grafos import _clock
from grafos_core.failure import FabricError

TRACEPARENT: Final = "traceparent"
LATENCY_BUCKETS_US: Final = (
    1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000,
    250_000, 500_000, 1_000_000, 5_000_000,
)  # fmt: skip
EVENTS_MAX: Final = 1_024
CHILDREN_MAX: Final = 256
"""Label values of one metric; more, and they are counted together as `other`."""

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_trace: ContextVar[str] = ContextVar("grafos_traceparent", default="")
_F = TypeVar("_F", bound=Callable[..., Any])


class Counter:
    """Only rises."""

    def __init__(self, name: str, text: str, label: str = "") -> None:
        self.name, self.text, self.label = name, text, label
        self._lock = threading.Lock()
        self._values: dict[str, int] = {} if label else {"": 0}

    def inc(self, count: int = 1, label: str = "") -> None:
        if count < 0:
            raise ValueError("a counter only rises")
        with self._lock:
            self._values[self._child(label)] = self._values.get(self._child(label), 0) + count

    def value(self, label: str = "") -> int:
        with self._lock:
            return self._values.get(label, 0)

    def lines(self) -> Iterator[str]:
        with self._lock:
            values = dict(self._values)
        for label, value in values.items():
            yield f"{self.name}{_labels(self.label, label)} {value}"

    def _child(self, label: str) -> str:
        full = label not in self._values and len(self._values) >= CHILDREN_MAX
        return "other" if full else label


class Gauge(Counter):
    """Rises and falls."""

    def inc(self, count: int = 1, label: str = "") -> None:
        with self._lock:
            self._values[self._child(label)] = self._values.get(self._child(label), 0) + count

    def dec(self, count: int = 1, label: str = "") -> None:
        self.inc(-count, label)


class Histogram:
    """How long things take. Observed in microseconds, exported in seconds."""

    def __init__(self, name: str, text: str, label: str = "") -> None:
        self.name, self.text, self.label = name, text, label
        self._lock = threading.Lock()
        self._children: dict[str, list[int]] = {}

    def observe(self, duration_us: float, label: str = "") -> None:
        bucket = bisect_left(LATENCY_BUCKETS_US, duration_us)
        with self._lock:
            if label not in self._children and len(self._children) >= CHILDREN_MAX:
                label = "other"
            counts = self._children.setdefault(label, [0] * (len(LATENCY_BUCKETS_US) + 2))
            counts[bucket] += 1
            counts[-1] += int(duration_us)

    def count(self, label: str = "") -> int:
        with self._lock:
            return sum(self._children.get(label, [0])[:-1])

    def sum_us(self, label: str = "") -> int:
        with self._lock:
            return self._children.get(label, [0])[-1]

    def lines(self) -> Iterator[str]:
        with self._lock:
            children = {label: list(counts) for label, counts in self._children.items()}
        for label, counts in children.items():
            total = 0
            for bound_us, count in zip(LATENCY_BUCKETS_US, counts, strict=False):
                total += count
                labels = _labels(self.label, label, f'le="{bound_us / 1e6:g}"')
                yield f"{self.name}_bucket{labels} {total}"
            total += counts[-2]
            infinite = _labels(self.label, label, 'le="+Inf"')
            yield f"{self.name}_bucket{infinite} {total}"
            yield f"{self.name}_sum{_labels(self.label, label)} {counts[-1] / 1e6:g}"
            yield f"{self.name}_count{_labels(self.label, label)} {total}"


class FabricMetrics:
    """The numbers of one process. The SDK counts into `FabricMetrics.global_()`."""

    _global: FabricMetrics | None = None

    def __init__(self) -> None:
        self.leases_total = Counter("grafos_leases_total", "Leases acquired or attached")
        self.leases_active = Gauge("grafos_leases_active", "Leases held by this process", "kind")
        self.lease_ends_total = Counter("grafos_lease_ends_total", "How leases ended", "cause")
        self.renewals_total = Counter("grafos_lease_renewals_total", "Renewals that succeeded")
        self.renew_failures_total = Counter(
            "grafos_lease_renew_failures_total", "Renewals refused or unanswered", "reason"
        )
        self.op_latency = Histogram("grafos_op_latency_seconds", "Operations on leases", "op")
        self.instrumented = Histogram(
            "grafos_instrumented_seconds", "Functions under @instrument", "function"
        )

    @classmethod
    def global_(cls) -> FabricMetrics:
        """The one of this process."""
        if FabricMetrics._global is None:
            FabricMetrics._global = FabricMetrics()
        return FabricMetrics._global

    def all(self) -> list[Counter | Gauge | Histogram]:
        return [each for each in vars(self).values() if isinstance(each, Counter | Histogram)]


class PrometheusExporter:
    """The numbers in Prometheus' text format, version 0.0.4."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, metrics: FabricMetrics | None = None) -> None:
        self._metrics = metrics or FabricMetrics.global_()

    def text(self) -> str:
        lines: list[str] = []
        for each in self._metrics.all():
            lines.append(f"# HELP {each.name} {each.text}")
            lines.append(f"# TYPE {each.name} {_type_of(each)}")
            lines.extend(each.lines())
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class FabricEvent:
    """One happening, as a log line has it."""

    event: str
    """A stable name, such as `lease.acquired`."""
    wall_ms: int
    lease_id: str = ""
    kind: str = ""
    epoch: int = 0
    reason: str = ""
    trace_id: str = ""


class EventRingBuffer:
    """The latest events; the oldest give way. Thread-safe."""

    def __init__(self, events_max: int = EVENTS_MAX) -> None:
        if events_max < 1:
            raise ValueError("a ring buffer holds at least one event")
        self._events: deque[FabricEvent] = deque(maxlen=events_max)
        self._lock = threading.Lock()
        self.dropped = 0
        """Events that gave way before anybody took them."""

    def push(self, event: FabricEvent) -> None:
        with self._lock:
            self.dropped += len(self._events) == self._events.maxlen
            self._events.append(event)

    def events(self) -> list[FabricEvent]:
        with self._lock:
            return list(self._events)

    def drain(self) -> list[FabricEvent]:
        """Take all of them out."""
        with self._lock:
            taken = list(self._events)
            self._events.clear()
            return taken


class JsonEventSink:
    """Events as JSON lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, event: FabricEvent) -> None:
        fields = {name: value for name, value in asdict(event).items() if value not in ("", 0)}
        self._stream.write(json.dumps(fields, separators=(",", ":")) + "\n")


_events = EventRingBuffer()


def events() -> EventRingBuffer:
    """What the SDK of this process saw last."""
    return _events


def emit(
    event: str, *, lease_id: str = "", kind: str = "", epoch: int = 0, reason: str = ""
) -> None:
    """Put an event into the buffer, with the time and the trace."""
    trace_id = current_traceparent()[3:35]
    _events.push(FabricEvent(event, _clock.wall_ms(), lease_id, kind, epoch, reason, trace_id))


def current_traceparent() -> str:
    """The W3C header of what runs now: OpenTelemetry's span if there is one, else our own."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is not None:
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    return _trace.get()


@contextmanager
def traceparent_scope(header: str) -> Generator[str, None, None]:
    """Work on behalf of whoever sent `header`; one that is not well formed begins a new trace."""
    if not _TRACEPARENT.fullmatch(header):
        import secrets  # loads OpenSSL

        header = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
    before = _trace.get()
    _trace.set(header)
    try:
        yield header
    finally:
        _trace.set(before)


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """What a call carries for the trace's sake."""
    header = current_traceparent()
    return ((TRACEPARENT, header),) if header else ()


def instrument(function: _F) -> _F:
    """Time every call of `function`, and make it a span where OpenTelemetry is set up.

    Works on functions, coroutines, generators and asynchronous generators, and leaves name,
    signature and kind as they were. A generator is timed from its first step to its end.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    if inspect.isasyncgenfunction(function):

        @functools.wraps(function)
        async def async_steps(*args: Any, **kwargs: Any) -> Any:
            with _Timed(name):
                steps = function(*args, **kwargs)
                step = steps.asend(None)
                try:
                    while True:
                        got = await step
                        try:
                            step = steps.asend((yield got))
                        except GeneratorExit:
                            raise
                        except BaseException as thrown:
                            step = steps.athrow(thrown)
                except StopAsyncIteration:
                    return
                finally:
                    await steps.aclose()

        return cast(_F, async_steps)
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            with _Timed(name), _span(name):
                return await function(*args, **kwargs)

        return cast(_F, coroutine)
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def steps(*args: Any, **kwargs: Any) -> Any:
            with _Timed(name):
                return (yield from function(*args, **kwargs))

        return cast(_F, steps)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _Timed(name), _span(name):
            return function(*args, **kwargs)

    return cast(_F, call)


class _Timed:
    """Observes how long its block took, however it ends."""

    __slots__ = ("_label", "_started_ns")

    def __init__(self, label: str) -> None:
        self._label = label

    def __enter__(self) -> None:
        self._started_ns = _clock.boot_ns()

    def __exit__(self, *_: object) -> None:
        took_us = (_clock.boot_ns() - self._started_ns) / 1000
        FabricMetrics.global_().instrumented.observe(took_us, self._label)


@contextmanager
def _span(name: str) -> Generator[None, None, None]:
    """A span, if the program itself has loaded OpenTelemetry and set a provider.

    Not held across the steps of a generator: there, whoever takes the next step may be another
    context, and a span must be left where it was entered.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        yield
        return
    with trace.get_tracer("grafos").start_as_current_span(name) as span:
        try:
            yield
        except FabricError as failed:
            span.set_attribute("error.type", failed.failure.value)
            raise


def _type_of(metric: Counter | Gauge | Histogram) -> str:
    if isinstance(metric, Histogram):
        return "histogram"
    return "gauge" if isinstance(metric, Gauge) else "counter"


def _labels(name: str, value: str, more: str = "") -> str:
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    own = f'{name}="{escaped}"' if name and value else ""
    parts = [part for part in (own, more) if part]
    return "{" + ",".join(parts) + "}" if parts else ""
