"""Golden scripts for the tenants' book: limit, charge, discharge; the answer is what is in use."""

from collections.abc import Callable

from grafos_core.failure import FabricError, InvariantViolation
from grafos_core.lease import Kind, TenantId
from grafos_core.quota import UNLIMITED, Limit, QuotaBook

RED = TenantId("red")


class Script:
    def __init__(self) -> None:
        self.book = QuotaBook()

    def answer(self, text: str) -> str:
        return "\n".join(self._line(line) for line in text.splitlines())

    def _line(self, line: str) -> str:
        verb, *words = line.split()
        numbers = [UNLIMITED if word == "-" else int(word) for word in words]
        try:
            if verb == "limit":
                self.book.set_limit(RED, Kind.MEM, Limit(*numbers))
            elif verb == "charge":
                self.book.check_charge(RED, Kind.MEM, *numbers)
                self.book.charge(RED, Kind.MEM, *numbers)
            else:
                self.book.discharge(RED, Kind.MEM, *numbers)
        except (FabricError, InvariantViolation) as refusal:
            return f"{type(refusal).__name__}: {refusal}"
        usage = self.book.usage(RED, Kind.MEM)
        return f"{usage.amount} in {usage.count}"


def interpreter() -> Callable[[str], str]:
    return Script().answer
