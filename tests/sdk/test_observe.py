"""Numbers, events, traces: counted rightly, exported readably, and harmless to what they watch."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import threading
from collections.abc import AsyncIterator, Generator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from grafos import FabricError, LeaseStatus, MemBuilder, observe
from grafos._connection import Fabric
from grafos.observe import (
    EventRingBuffer,
    FabricEvent,
    FabricMetrics,
    JsonEventSink,
    PrometheusExporter,
    current_traceparent,
    instrument,
    traceparent_scope,
)
from grafos_core import failure
from tests.sdk.world import World

HEADER = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


class TestMetrics:
    def test_there_is_one_set_per_process(self) -> None:
        assert FabricMetrics.global_() is FabricMetrics.global_()
        assert FabricMetrics() is not FabricMetrics.global_()

    def test_a_counter_only_rises(self) -> None:
        metrics = FabricMetrics()
        metrics.leases_total.inc()
        metrics.leases_total.inc(4)
        assert metrics.leases_total.value() == 5
        with pytest.raises(ValueError):
            metrics.leases_total.inc(-1)

    def test_latencies_are_observed_in_microseconds(self) -> None:
        metrics = FabricMetrics()
        metrics.op_latency.observe(250)
        metrics.op_latency.observe(750)
        assert metrics.op_latency.count() == 2
        assert metrics.op_latency.sum_us() == 1000

    def test_threads_lose_no_count(self) -> None:
        metrics = FabricMetrics()

        def work() -> None:
            for _ in range(2_000):
                metrics.leases_total.inc()
                metrics.op_latency.observe(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert metrics.leases_total.value() == metrics.op_latency.count() == 8_000

    def test_labels_are_bounded(self) -> None:
        metrics = FabricMetrics()
        for index in range(1_000):
            metrics.lease_ends_total.inc(label=f"cause-{index}")
            metrics.op_latency.observe(1, f"op-{index}")
        assert metrics.lease_ends_total.value("other") == 1_000 - observe.CHILDREN_MAX
        assert metrics.op_latency.count("other") == 1_000 - observe.CHILDREN_MAX

    def test_a_lease_is_counted_from_acquire_to_release(self, fabric: Fabric) -> None:
        metrics = FabricMetrics.global_()
        before = metrics.leases_total.value(), metrics.leases_active.value("mem")
        latencies = metrics.op_latency.count("acquire"), metrics.op_latency.count("release")
        with MemBuilder().fabric(fabric).min_bytes(1).acquire():
            assert metrics.leases_total.value() == before[0] + 1
            assert metrics.leases_active.value("mem") == before[1] + 1
        assert metrics.leases_active.value("mem") == before[1]
        after = metrics.op_latency.count("acquire"), metrics.op_latency.count("release")
        assert after == (latencies[0] + 1, latencies[1] + 1)

    def test_what_was_never_held_is_not_counted_and_what_was_forgotten_once(
        self, world: World, fabric: Fabric
    ) -> None:
        metrics = FabricMetrics.global_()
        builder = MemBuilder().fabric(fabric).min_bytes(1)

        def numbers() -> tuple[int, int, int]:
            ends = metrics.lease_ends_total
            return (
                metrics.leases_total.value(), metrics.leases_active.value("mem"),
                sum(ends.value(each.value) for each in LeaseStatus),
            )  # fmt: skip

        total, active, ended = numbers()

        def refuse(op: str) -> None:
            raise failure.of("UNREACHABLE" if op == "Release" else "SCOPE")

        world.control.before = lambda op: refuse(op) if op == "hand_over" else None
        world.admission.before = lambda method: refuse(method) if method == "Release" else None
        with pytest.raises(FabricError):
            builder.acquire()
        world.control.before = world.admission.before = lambda method: None
        fabric.poll()
        assert numbers() == (total, active, ended)
        held = [builder.acquire()]
        with pytest.warns(ResourceWarning):
            held.clear()
        assert numbers() == (total + 1, active + 1, ended)
        fabric.poll()
        assert numbers() == (total + 1, active, ended + 1)

    def test_the_export_is_what_prometheus_reads(self) -> None:
        metrics = FabricMetrics()
        metrics.leases_total.inc(3)
        metrics.leases_active.inc(label="mem")
        metrics.op_latency.observe(250, 'odd"\n\\')
        text = PrometheusExporter(metrics).text()
        families = {each.name: each for each in text_string_to_metric_families(text)}
        assert families["grafos_leases"].samples[0].value == 3
        assert families["grafos_leases_active"].samples[0].labels == {"kind": "mem"}
        samples = families["grafos_op_latency_seconds"].samples
        assert {each.labels["op"] for each in samples} == {'odd"\n\\'}
        buckets = {each.labels["le"]: each.value for each in samples if "le" in each.labels}
        assert buckets["0.00025"] == 1
        assert buckets["0.0001"] == 0
        assert buckets["+Inf"] == 1
        (total,) = [each.value for each in samples if each.name.endswith("_sum")]
        assert total == pytest.approx(0.00025)


class TestEvents:
    def test_the_oldest_give_way_and_are_counted(self) -> None:
        ring = EventRingBuffer(3)
        for index in range(5):
            ring.push(FabricEvent("e", index))
        assert [each.wall_ms for each in ring.events()] == [2, 3, 4]
        assert ring.dropped == 2
        assert len(ring.drain()) == 3
        assert ring.events() == []
        with pytest.raises(ValueError):
            EventRingBuffer(0)

    def test_a_leases_life_leaves_events_with_its_trace(self, world: World, fabric: Fabric) -> None:
        observe.events().drain()
        with traceparent_scope(HEADER):
            lease = MemBuilder().fabric(fabric).min_bytes(1).acquire()
        world.control.end(lease.lease_id, failure.of("REVOKED"), "revoked")
        with pytest.raises(Exception, match="REVOKED"):
            lease.mem().read(0, 1)
        acquired, revoked = observe.events().drain()
        assert (acquired.event, acquired.lease_id) == ("lease.acquired", lease.lease_id)
        assert acquired.trace_id == "ab" * 16
        assert (revoked.event, revoked.reason) == ("lease.revoked", "REVOKED")
        assert revoked.epoch == lease.epoch

    def test_they_are_written_as_json_lines(self) -> None:
        stream = io.StringIO()
        JsonEventSink(stream).write(FabricEvent("lease.acquired", 5, lease_id="ab", epoch=7))
        assert json.loads(stream.getvalue()) == {
            "event": "lease.acquired", "wall_ms": 5, "lease_id": "ab", "epoch": 7,
        }  # fmt: skip


class TestInstrument:
    def count(self, function: Any) -> int:
        name = f"{function.__module__}.{function.__qualname__}"
        return FabricMetrics.global_().instrumented.count(name)

    def test_a_function_keeps_its_name_signature_and_answer(self) -> None:
        @instrument
        def process_request(request: str, *, times: int = 1) -> str:
            """Doc."""
            return request * times

        assert process_request("ab", times=2) == "abab"
        assert (
            str(inspect.signature(process_request))
            == "(request: 'str', *, times: 'int' = 1) -> 'str'"
        )
        assert (process_request.__name__, process_request.__doc__) == ("process_request", "Doc.")
        assert self.count(process_request) == 1

    def test_what_it_raises_goes_through_and_is_counted(self) -> None:
        @instrument
        def broken() -> None:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            broken()
        assert self.count(broken) == 1

    def test_a_coroutine_stays_one(self) -> None:
        @instrument
        async def work(number: int) -> int:
            await asyncio.sleep(0)
            return number + 1

        assert inspect.iscoroutinefunction(work)
        assert asyncio.run(work(1)) == 2
        assert self.count(work) == 1

    def test_a_generator_takes_what_is_sent_and_returns(self) -> None:
        @instrument
        def steps() -> Generator[Any, Any, str]:
            got = yield 1
            try:
                yield got
            except ValueError:
                yield "caught"
            return "end"

        assert inspect.isgeneratorfunction(steps)
        running: Any = steps()
        assert next(running) == 1
        assert running.send("sent") == "sent"
        assert running.throw(ValueError()) == "caught"
        with pytest.raises(StopIteration) as stopped:
            next(running)
        assert stopped.value.value == "end"
        assert self.count(steps) == 1

    def test_an_asynchronous_generator_stays_one(self) -> None:
        @instrument
        async def steps(count: int) -> AsyncIterator[int]:
            for index in range(count):
                yield index

        async def collect() -> list[int]:
            return [each async for each in steps(3)]

        assert inspect.isasyncgenfunction(steps)
        assert asyncio.run(collect()) == [0, 1, 2]
        assert self.count(steps) == 1

    def test_an_asynchronous_generator_hears_what_is_thrown_into_it(self) -> None:
        seen: list[str] = []

        @instrument
        async def steps() -> AsyncIterator[int]:
            try:
                yield 1
            except ValueError:
                seen.append("thrown")
                yield 2
            finally:
                seen.append("closed")

        async def drive() -> None:
            running: Any = steps()
            assert await anext(running) == 1
            assert await running.athrow(ValueError()) == 2
            await running.aclose()

        asyncio.run(drive())
        assert seen == ["thrown", "closed"]

    def test_it_works_on_methods(self) -> None:
        class Thing:
            @instrument
            def double(self, number: int) -> int:
                return 2 * number

        assert Thing().double(4) == 8


class TestTraces:
    def test_the_trace_of_the_caller_travels_with_every_call(
        self, world: World, fabric: Fabric
    ) -> None:
        seen: list[str] = []

        def note(method: str) -> None:
            from services.runtime import calls

            seen.append(calls.current().traceparent)

        world.admission.before = note
        with traceparent_scope(HEADER):
            with MemBuilder().fabric(fabric).min_bytes(1).acquire():
                pass
        assert seen == [HEADER]
        with MemBuilder().fabric(fabric).min_bytes(1).acquire():
            pass
        assert seen[-1] == ""

    @pytest.mark.parametrize(
        "wrong", ["", "nonsense", "00-" + "0" * 32 + "-" + "cd" * 8 + "-01", HEADER.upper()]
    )
    def test_a_header_that_is_not_well_formed_begins_a_new_trace(self, wrong: str) -> None:
        with traceparent_scope(wrong) as header:
            assert header != wrong
            assert current_traceparent() == header
        assert current_traceparent() == ""

    def test_with_opentelemetry_set_up_a_span_is_made_and_passed_on(self) -> None:
        from opentelemetry import trace

        exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        before = trace._TRACER_PROVIDER
        trace._TRACER_PROVIDER = provider
        try:

            @instrument
            def outer() -> str:
                with pytest.raises(Exception, match="revoked"):
                    inner()
                return current_traceparent()

            @instrument
            def inner() -> None:
                raise failure.of("REVOKED")

            header = outer()
        finally:
            trace._TRACER_PROVIDER = before
        child, parent = exporter.get_finished_spans()
        assert child.parent is not None
        assert parent.context is not None
        assert child.parent.span_id == parent.context.span_id
        assert (child.attributes or {})["error.type"] == "Revoked"
        assert header[36:52] == f"{parent.context.span_id:016x}"
