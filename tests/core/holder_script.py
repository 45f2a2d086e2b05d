"""Golden scripts for what a holder believes, and for the renewal manager: one command a line.

lease remaining=60000 [sent=0] [margin=20] [jitter=0.1] [at=0.75] [backoff=5]
at 100 | show | sent | renewed 60000 | failed | ended | tick | due | wait

manager | at 100 [wall=…] | register a expiry=… [jitter=0.1] [blind]
renewed a expiry=… | failed a | forget a | tick [blind]        blind: without boottime
"""

from collections.abc import Callable

from grafos_core.failure import InvariantViolation
from grafos_core.holder import HolderLease, RenewalManager, RenewalPolicy
from tests.core.node_script import words

WALL_MS = 1_000_000


def policy(options: dict[str, str]) -> RenewalPolicy:
    return RenewalPolicy(
        renew_at_fraction=float(options.get("at", 0.75)),
        jitter_fraction=float(options.get("jitter", 0)),
        min_renew_secs=int(options.get("min", 30)),
        max_backoff_secs=int(options.get("backoff", 5)),
    )


class Script:
    def __init__(self) -> None:
        self.now_ms, self.wall_ms = 0, WALL_MS
        self.lease = HolderLease("a", remaining_ms=1000, sent_ms=0)
        self.manager: RenewalManager | None = None

    def __call__(self, text: str) -> str:
        lines = []
        for line in text.splitlines():
            head, bare, options = words(line)
            try:
                lines.append(getattr(self, f"do_{head}")(bare, options))
            except InvariantViolation as broken:
                lines.append(f"halts: {broken}")
            self.lease.check(self.now_ms)
            if self.manager is not None:
                self.manager.check()
        return "\n".join(line for line in lines if line)

    def do_at(self, bare: list[str], options: dict[str, str]) -> str:
        self.now_ms = int(bare[0])
        self.wall_ms = int(options.get("wall", WALL_MS + self.now_ms))
        return ""

    def do_lease(self, bare: list[str], options: dict[str, str]) -> str:
        self.manager = None
        self.lease = HolderLease(
            "a", remaining_ms=int(options["remaining"]),
            sent_ms=int(options.get("sent", self.now_ms)), now_ms=self.now_ms,
            policy=policy(options), margin_ms=int(options.get("margin", 20)),
        )  # fmt: skip
        return self.do_show(bare, options)

    def do_show(self, bare: list[str], options: dict[str, str]) -> str:
        one = self.lease
        belief = one.belief(self.now_ms)
        return f"{belief}, stops at {one.usable_until_ms}, renews at {one.renew_at_ms}"

    def do_sent(self, bare: list[str], options: dict[str, str]) -> str:
        self.lease.renewal_sent(self.now_ms)
        return ""

    def do_ended(self, bare: list[str], options: dict[str, str]) -> str:
        self.lease.ended()
        return self.do_show(bare, options)

    def do_due(self, bare: list[str], options: dict[str, str]) -> str:
        return str(self.lease.renew_due(self.now_ms))

    def do_wait(self, bare: list[str], options: dict[str, str]) -> str:
        return f"{self.lease.timeout_ms(self.now_ms)} ms"

    def do_manager(self, bare: list[str], options: dict[str, str]) -> str:
        self.manager = RenewalManager()
        return ""

    def do_register(self, bare: list[str], options: dict[str, str]) -> str:
        assert self.manager is not None
        known = "blind" not in bare
        self.manager.register(
            bare[0], int(options["expiry"]), policy(options),
            now_ms=self.wall_ms if known else None, boot_ms=self.now_ms if known else None,
        )  # fmt: skip
        return ""

    def do_renewed(self, bare: list[str], options: dict[str, str]) -> str:
        if self.manager is None:
            self.lease.renewed(int(bare[0]), self.now_ms)
            return self.do_show(bare, options)
        self.manager.renewed(
            bare[0], int(options["expiry"]), now_ms=self.wall_ms, boot_ms=self.now_ms
        )
        return ""

    def do_failed(self, bare: list[str], options: dict[str, str]) -> str:
        if self.manager is None:
            self.lease.renewal_failed(self.now_ms)
            return self.do_show(bare, options)
        self.manager.failed(bare[0])
        return ""

    def do_forget(self, bare: list[str], options: dict[str, str]) -> str:
        assert self.manager is not None
        self.manager.forget(bare[0])
        return ""

    def do_tick(self, bare: list[str], options: dict[str, str]) -> str:
        if self.manager is None:
            return ", ".join(self.lease.tick(self.now_ms)) or "nothing"
        found = self.manager.tick(self.wall_ms, None if "blind" in bare else self.now_ms)
        parts = [
            f"{name} {','.join(ids)}"
            for name, ids in (
                ("due", found.due), ("renewed", found.renewed), ("failed", found.failed),
                ("expired", found.expired),
            )
            if ids
        ]  # fmt: skip
        ahead = "-" if found.next_due_ms is None else str(found.next_due_ms - self.wall_ms)
        return "; ".join([*parts, f"next in {ahead}"])


def interpreter() -> Callable[[str], str]:
    return Script()
