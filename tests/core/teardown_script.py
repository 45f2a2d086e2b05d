"""Golden scripts for one teardown: one command a line, answered with where it stands.

teardown [from=dead] [limit=5000] | at 100
done quiesce [k=v …] | failed erase EIO | overdue | seal | measured
"""

from collections.abc import Callable

from grafos_core.failure import InvariantViolation
from grafos_core.teardown import Stage, Step, Teardown
from tests.core.node_script import words


class Script:
    def __init__(self) -> None:
        self.now_ms = 0
        self.teardown = Teardown(0, 0)

    def __call__(self, text: str) -> str:
        lines = []
        for line in text.splitlines():
            head, bare, options = words(line)
            try:
                lines.append(getattr(self, f"do_{head}")(bare, options))
            except InvariantViolation as broken:
                lines.append(f"halts: {broken}")
        return "\n".join(line for line in lines if line)

    def _where(self) -> str:
        one = self.teardown
        cause = f", {one.fence_cause}" if one.fence_cause else ""
        return f"{one.stage}, next {one.next_step()} #{one.attempt}{cause}"

    def do_teardown(self, bare: list[str], options: dict[str, str]) -> str:
        stage, limit_ms = Stage(options.get("from", "dead")), int(options.get("limit", 5000))
        self.teardown = Teardown(self.now_ms, self.now_ms, stage, limit_ms)
        return self._where()

    def do_at(self, bare: list[str], options: dict[str, str]) -> str:
        self.now_ms = int(bare[0])
        return ""

    def do_done(self, bare: list[str], options: dict[str, str]) -> str:
        self.teardown.done(Step(bare[0]), options, self.now_ms)
        self.teardown.check(self.now_ms)
        return self._where()

    def do_failed(self, bare: list[str], options: dict[str, str]) -> str:
        again = self.teardown.failed(Step(bare[0]), " ".join(bare[1:]), self.now_ms)
        self.teardown.check(self.now_ms)
        return f"{'once more' if again else 'over'}: {self._where()}"

    def do_overdue(self, bare: list[str], options: dict[str, str]) -> str:
        over = self.teardown.overdue(self.now_ms)
        self.teardown.check(self.now_ms)
        return f"{over}: {self._where()}"

    def do_seal(self, bare: list[str], options: dict[str, str]) -> str:
        self.teardown.seal()
        self.teardown.check(self.now_ms)
        return self._where()

    def do_measured(self, bare: list[str], options: dict[str, str]) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.teardown.measured().items())


def interpreter() -> Callable[[str], str]:
    return Script()
