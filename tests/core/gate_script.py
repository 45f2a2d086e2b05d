"""Golden scripts for the gate: one command a line.

gate mem=65536 block=64 [slices=8]
bind a epoch=1 [amount=4096] [kind=mem] [offset=0] [gen=1] [key=K]   check, and bind
renew a epoch=1 gen=2 [key=L]      check_raise, and raise the generation
close a | free a | burn mem epoch=3 [offset=0] [amount=4096] | restore a epoch=1 …
open a [epoch=1] | show
"""

from collections.abc import Callable

from grafos_core.epochs import EpochWindow
from grafos_core.failure import FabricError, InvariantViolation
from grafos_core.gate import Gate, Slice
from grafos_core.lease import Kind
from grafos_core.node_effects import Instant
from tests.core.node_script import INCARNATION, NODE, WALL_MS, lease_id, letter, token, told, words


class Script:
    def __init__(self) -> None:
        self.gate = Gate(NODE, INCARNATION, {Kind.MEM: 65_536, Kind.BLOCK: 64})

    def __call__(self, text: str) -> str:
        lines = []
        for line in text.splitlines():
            head, bare, options = words(line)
            try:
                lines.append(getattr(self, f"do_{head}")(bare, options))
            except FabricError as refused:
                lines.append(told(refused))
            except InvariantViolation as broken:
                lines.append(f"halts: {broken}")
            self.gate.check()
        return "\n".join(line for line in lines if line)

    def do_gate(self, bare: list[str], options: dict[str, str]) -> str:
        capacities = {
            Kind.MEM: int(options.get("mem", 65_536)), Kind.BLOCK: int(options.get("block", 64))
        }  # fmt: skip
        slices_max = int(options.get("slices", 4096))
        self.gate = Gate(NODE, INCARNATION, capacities, slices_max=slices_max)
        return ""

    def do_bind(self, bare: list[str], options: dict[str, str]) -> str:
        presented = token(bare[0], options, Instant(0, WALL_MS))
        self.gate.check_bind(presented, presented.holder_thumbprint)
        return f"bound under {self.gate.bind(presented).epoch}"

    def do_renew(self, bare: list[str], options: dict[str, str]) -> str:
        presented = token(bare[0], options, Instant(0, WALL_MS))
        self.gate.check_raise(presented, presented.holder_thumbprint)
        self.gate.raise_generation(
            presented.lease_id, presented.generation, presented.holder_thumbprint
        )
        return f"generation {presented.generation}"

    def do_close(self, bare: list[str], options: dict[str, str]) -> str:
        self.gate.close(lease_id(bare[0]))
        return ""

    def do_free(self, bare: list[str], options: dict[str, str]) -> str:
        self.gate.free(lease_id(bare[0]))
        return ""

    def do_burn(self, bare: list[str], options: dict[str, str]) -> str:
        fresh = self.gate.burn(
            Kind(bare[0]), int(options["epoch"]), int(options.get("offset", 0)),
            int(options.get("amount", 4096)),
        )  # fmt: skip
        return "given up" if fresh else "was used before"

    def do_restore(self, bare: list[str], options: dict[str, str]) -> str:
        was = token(bare[0], options, Instant(0, WALL_MS))
        self.gate.restore(
            Slice(lease_id(bare[0]), was.kind, was.epoch, 1, was.amount, was.extent_offset, "K")
        )
        return ""

    def do_open(self, bare: list[str], options: dict[str, str]) -> str:
        return str(self.gate.is_open(lease_id(bare[0]), int(options.get("epoch", 1))))

    def do_show(self, bare: list[str], options: dict[str, str]) -> str:
        lines = [
            f"{letter(one.lease_id)} {one.kind} {one.extent_offset}+{one.amount} epoch {one.epoch}"
            f" gen {one.generation} {'open' if one.is_open else 'closed'}"
            for one in self.gate.slices()
        ]
        for kind in (Kind.MEM, Kind.BLOCK):
            epochs = self.gate.epochs(kind)
            used = sorted(epochs.burnt) if isinstance(epochs, EpochWindow) else list(epochs.runs)
            lines.append(f"{kind}: {self.gate.charged(kind)} charged, used {used}")
        return "\n".join(lines)


def interpreter() -> Callable[[str], str]:
    return Script()
