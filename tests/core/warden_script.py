"""Golden scripts for the warden's core: one command a line.

warden | at 1000 | hold a until=2000 [epoch=1] [slot=0] | raise a until=3000 | drop a
heard | lost | tick | wait | show
"""

from collections.abc import Callable

from grafos_core.failure import InvariantViolation
from grafos_core.warden import TakeBack, WardenCore
from tests.core.node_script import lease_id, letter, words


def told(taken: list[TakeBack]) -> str:
    return "\n".join(
        f"take {letter(one.lease_id)} epoch {one.epoch}: {one.cause}, {one.late_ms} ms late"
        for one in taken
    )


class Script:
    def __init__(self) -> None:
        self.now_ms = 0
        self.warden = WardenCore(0)

    def __call__(self, text: str) -> str:
        lines = []
        for line in text.splitlines():
            head, bare, options = words(line)
            try:
                lines.append(getattr(self, f"do_{head}")(bare, options))
            except InvariantViolation as broken:
                lines.append(f"halts: {broken}")
        return "\n".join(line for line in lines if line)

    def do_warden(self, bare: list[str], options: dict[str, str]) -> str:
        self.warden = WardenCore(self.now_ms)
        return ""

    def do_at(self, bare: list[str], options: dict[str, str]) -> str:
        self.now_ms = int(bare[0])
        return ""

    def do_hold(self, bare: list[str], options: dict[str, str]) -> str:
        taken = self.warden.hold(
            lease_id(bare[0]), slot=int(options.get("slot", 0)),
            epoch=int(options.get("epoch", 1)), deadline_ms=int(options["until"]),
            now_ms=self.now_ms,
        )  # fmt: skip
        self.warden.check(self.now_ms)
        return told(taken)

    def do_raise(self, bare: list[str], options: dict[str, str]) -> str:
        until = self.warden.raise_deadline(lease_id(bare[0]), int(options["until"]), self.now_ms)
        return f"until {until}"

    def do_drop(self, bare: list[str], options: dict[str, str]) -> str:
        self.warden.drop(lease_id(bare[0]))
        return ""

    def do_heard(self, bare: list[str], options: dict[str, str]) -> str:
        self.warden.agent_heard(self.now_ms)
        return ""

    def do_lost(self, bare: list[str], options: dict[str, str]) -> str:
        return told(self.warden.agent_lost(self.now_ms))

    def do_tick(self, bare: list[str], options: dict[str, str]) -> str:
        taken = self.warden.tick(self.now_ms)
        self.warden.check(self.now_ms)
        return told(taken)

    def do_wait(self, bare: list[str], options: dict[str, str]) -> str:
        return f"{self.warden.timeout_ms(self.now_ms)} ms"

    def do_show(self, bare: list[str], options: dict[str, str]) -> str:
        held = [f"{letter(one.lease_id)} until {one.deadline_ms}" for one in self.warden.held()]
        taken = [letter(one.lease_id) for one in self.warden.taken()]
        return f"held {', '.join(held) or '-'}; taken {', '.join(taken) or '-'}"


def interpreter() -> Callable[[str], str]:
    return Script()
