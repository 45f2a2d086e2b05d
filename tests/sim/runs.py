"""One seed, from the first event to rest, with the collector reading every chain at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from grafos_core.chain import GENESIS, Chain
from grafos_core.collector import Collector
from grafos_core.failure import FabricError
from grafos_core.lease import NodeId
from tests.sim.holder import Holder
from tests.sim.laws import Laws
from tests.sim.ledger import Ledger
from tests.sim.node import Node
from tests.sim.world import RUN_MS, LawBroken, World

NODE_COUNT, HOLDER_COUNT = 3, 4
REST_MS = 60_000


@dataclass(frozen=True, slots=True)
class Result:
    seed: int
    counts: dict[str, int]
    trace: str
    now_ms: int


def run(
    seed: int, *, run_ms: int = RUN_MS, rest_ms: int = REST_MS,
    narrate: Callable[[str], None] | None = None,
) -> Result:  # fmt: skip
    """Raises LawBroken or InvariantViolation, with the world's story attached."""
    world = World(seed, narrate)
    ledger = Ledger(world)
    nodes = {NodeId(name): Node(world, ledger, name) for name in ("n1", "n2", "n3")[:NODE_COUNT]}
    holders = [Holder(world, ledger, nodes, number) for number in range(HOLDER_COUNT)]
    laws = Laws(ledger, list(nodes.values()), holders)
    world.after_each = laws.after_each
    try:
        world.run(run_ms)
        world.calm = True
        ledger.clock.set_right()
        for node in nodes.values():
            node.clock.set_right()
            world.heal(node.node_id, "ledger")
        world.run(run_ms + rest_ms)
        laws.at_the_end()
        collect(nodes)
    except AssertionError as broken:
        broken.add_note(f"seed {seed}, {world.now_ms} ms; the last of its story:")
        broken.add_note("\n".join(world.story[-40:]))
        raise
    return Result(seed, world.counts, world.trace.hexdigest(), world.now_ms)


def collect(nodes: dict[NodeId, Node]) -> None:
    """Law 9: every chain is one chain, and the collector takes it whole."""
    collector = Collector(Chain("audit", "0" * 31 + "1", 1), lambda *_: None)
    for node in nodes.values():
        collector.admit(node.node_id, node.incarnation, f"key-{node.node_id}")
        head = GENESIS
        for batch in node.disk.batches:
            data = [record.data for record in batch.records]
            seals = [node.seal(batch.records[-1])]
            try:
                accepted = collector.offer(
                    node.node_id, node.incarnation, data, seals, lambda *_: True
                )
            except FabricError as refusal:
                raise LawBroken(f"law 9: {node.node_id}: {refusal}") from refusal
            collector.stored(accepted)
            head = accepted.head
        if head != node.disk.head:
            raise LawBroken(f"law 9: the head of {node.node_id} is not its last record")
