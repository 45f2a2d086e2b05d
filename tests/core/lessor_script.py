"""Golden scripts for the lessor and for placement: one command a line, time in ms.

    at 1000                                now
    register n1 mem=65536 block=16 boot=1 ready=mem,block live=- [policy=on]
    grant a mem 4096 n1 tenant=t ttl=60000 (lease ids are written by their first letter)
    bound a | renew a | attach a | end a release|revoked | burn a | clear a [residue=accept]
    credit a torndown|fenced|nothing_created|cleared [by=policy] [epoch=9]
    quota t mem amount=8192 count=2 | tick | books n1 | lease a | owes n1 | place mem 4096

The answer is what became durable, then the lease, or the refusal.
"""

from collections.abc import Callable
from typing import Any

from grafos_core import commands as c
from grafos_core import placement
from grafos_core.failure import FabricError
from grafos_core.lease import (
    EndCause,
    Kind,
    Lease,
    LeaseId,
    NodeId,
    OnHolderExit,
    Policy,
    Priority,
    RevokeStage,
    TenantId,
)
from grafos_core.lessor import Lessor
from grafos_core.quota import UNLIMITED, Limit
from grafos_core.receipt import Assurance, Cleared, Outcome, TeardownReceipt

KEY = b"\x01" * 32
NOT_FREED = ("fenced", "nothing_created")


def lease_id(letter: str) -> LeaseId:
    return LeaseId(f"{ord(letter[0]):02x}" * 16)


def letter(identity: str) -> str:
    return chr(int(identity[:2], 16))


def incarnation(number: int) -> str:
    return f"{number:032x}"


def register(name: str, now: dict[str, Any]) -> c.Register:
    live = now.get("live")
    return c.Register(
        node_id=NodeId(name),
        incarnation=incarnation(int(now.get("incarnation", 1))),
        boot_epoch=int(now.get("boot", 1)),
        offers={kind: int(now[kind]) for kind in Kind if kind in now},
        high_waters={kind: int(now[f"hw-{kind}"]) for kind in Kind if f"hw-{kind}" in now},
        ready_kinds=frozenset(Kind(k) for k in now.get("ready", "mem,block").split(",") if k),
        closed_gates={"selftest": now["closed"]} if "closed" in now else {},
        front_endpoint=f"unix:/{name}",
        control_endpoint=f"unix:/{name}-control",
        labels=dict(pair.split(":") for pair in now.get("labels", "").split(",") if pair),
        receipt_key=c.PublishedKey(f"key-{name}", f"node/{name}", "receipt", KEY),
        live=None
        if live is None
        else tuple(c.LiveLease(lease_id(x), 1, 1) for x in live.strip("-").split(",") if x),
        clears_proved_clean="policy" in now,
    )


def receipt(lease: Lease, outcome: str, options: dict[str, str]) -> TeardownReceipt:
    cleared = Cleared(options.get("by", "operator")) if outcome == "cleared" else None
    return TeardownReceipt(
        lease_id=lease.lease_id,
        node_id=options.get("node", lease.node_id),
        incarnation=lease.incarnation,
        boot_epoch=1,
        kind=lease.kind,
        epoch=int(options.get("epoch", lease.epoch)),
        amount=lease.amount,
        extent_offset=lease.extent_offset,
        cause=EndCause(options.get("cause", "release")),
        outcome=Outcome(outcome),
        assurance=Assurance.NONE if outcome in NOT_FREED else Assurance.FREED,
        measured={"cause": "erase", "st_blocks": 8} if outcome == "fenced" else {"st_blocks": 0},
        begin_ms=1,
        end_ms=2,
        duration_us=1000,
        record_number=7,
        record_hash="ab" * 32,
        cleared=cleared,
    )


class Script:
    def __init__(self) -> None:
        self.lessor = Lessor()
        self.now_ms = 0
        self._requests = 0

    def answer(self, text: str) -> str:
        return "\n".join(filter(None, (self._line(line) for line in text.splitlines())))

    def _line(self, line: str) -> str:
        words = line.split()
        plain = [word for word in words[1:] if "=" not in word]
        options = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        try:
            return str(getattr(self, f"_{words[0]}")(plain, options))
        except FabricError as refusal:
            return f"{type(refusal).__name__} {refusal.code}: {refusal.detail}"

    def _at(self, plain: list[str], _: dict[str, str]) -> str:
        self.now_ms = int(plain[0])
        return ""

    def _do(self, command: c.Command) -> str:
        step = self.lessor.handle(command, self.now_ms)
        self.lessor.check()
        return describe(step)

    def _request(self, options: dict[str, str]) -> str:
        self._requests += 1
        return options.get("request", f"r{self._requests}")

    def _register(self, plain: list[str], options: dict[str, Any]) -> str:
        return self._do(register(plain[0], options))

    def _grant(self, plain: list[str], options: dict[str, str]) -> str:
        tenant = options.get("tenant", "t")
        policy = Policy(
            on_holder_exit=OnHolderExit(options.get("exit", "release")),
            priority=Priority(options.get("class", "standard")),
        )
        return self._do(
            c.Grant(
                request_id=self._request(options),
                lease_id=lease_id(plain[0]),
                tenant=TenantId(tenant),
                holder=f"spiffe://f/tenant/{tenant}/holder/{options.get('holder', 'h')}",
                holder_key="K",
                kind=Kind(plain[1]),
                node_id=NodeId(plain[3]),
                incarnation=incarnation(int(options.get("incarnation", 1))),
                amount=int(plain[2]),
                ttl_ms=int(options.get("ttl", 60_000)),
                lifetime_ms=int(options["lifetime"]) if "lifetime" in options else None,
                bind_within_ms=int(options.get("bind", 30_000)),
                policy=policy,
                key_id=options.get("key", ""),
            )
        )

    def _revoke_key(self, plain: list[str], _: dict[str, str]) -> str:
        return self._do(c.RevokeKey(plain[0], "seen elsewhere", "op"))

    def _publish(self, plain: list[str], options: dict[str, str]) -> str:
        use = options.get("use", "lease")
        return self._do(c.PublishKey(c.PublishedKey(plain[0], "admission", use, KEY)))

    def _keys(self, plain: list[str], _: dict[str, str]) -> str:
        return ",".join(self.lessor.lease(lease_id(plain[0])).key_ids) or "-"

    def _who(self, options: dict[str, str]) -> dict[str, Any]:
        tenant = options.get("tenant", "t")
        holder = f"spiffe://f/tenant/{tenant}/holder/{options.get('holder', 'h')}"
        return {"tenant": TenantId(tenant), "holder": holder}

    def _bound(self, plain: list[str], options: dict[str, str]) -> str:
        lease = self.lessor.lease(lease_id(plain[0]))
        node = NodeId(options.get("node", lease.node_id))
        epoch = int(options.get("epoch", lease.epoch))
        stage = RevokeStage(options["stage"]) if "stage" in options else None
        return self._do(c.ReportBound(node, lease.incarnation, lease.lease_id, epoch, 1, stage))

    def _renew(self, plain: list[str], options: dict[str, str]) -> str:
        ttl = int(options["ttl"]) if "ttl" in options else None
        request = self._request(options)
        who = self._who(options) | {"key_id": options.get("key", "")}
        return self._do(c.Renew(request, lease_id(plain[0]), ttl, **who))

    def _attach(self, plain: list[str], options: dict[str, str]) -> str:
        request = self._request(options)
        return self._do(
            c.Attach(
                request, lease_id(plain[0]), holder_key="K2", bind_within_ms=30_000,
                key_id=options.get("key", ""), **self._who(options),
            )
        )  # fmt: skip

    def _end(self, plain: list[str], options: dict[str, str]) -> str:
        who = {} if options.get("by") == "operator" else self._who(options)
        return self._do(
            c.End(
                self._request(options), lease_id(plain[0]), EndCause(plain[1]), by="someone",
                reason=options.get("reason", ""), grace_ms=int(options.get("grace", 0)), **who,
            )
        )  # fmt: skip

    def _burn(self, plain: list[str], _: dict[str, str]) -> str:
        return self._do(c.Burn(lease_id(plain[0]), "given up"))

    def _credit(self, plain: list[str], options: dict[str, str]) -> str:
        lease = self.lessor.lease(lease_id(plain[0]))
        signer = NodeId(options.get("signer", lease.node_id))
        return self._do(c.Credit(receipt(lease, plain[1], options), signer))

    def _clear(self, plain: list[str], options: dict[str, str]) -> str:
        accept = options.get("residue") == "accept"
        return self._do(
            c.ClearFence(
                "rc", lease_id(plain[0]), options.get("reason", ""), accept, "op", "0f" * 16
            )
        )

    def _quota(self, plain: list[str], options: dict[str, str]) -> str:
        limit = Limit(int(options.get("amount", UNLIMITED)), int(options.get("count", UNLIMITED)))
        return self._do(c.SetQuota(TenantId(plain[0]), Kind(plain[1]), limit))

    def _mode(self, plain: list[str], _: dict[str, str]) -> str:
        return self._do(c.SetMode(NodeId(plain[0]), plain[1], "op"))

    def _forget(self, plain: list[str], options: dict[str, str]) -> str:
        accept = options.get("residue") == "accept"
        return self._do(c.ForgetNode(NodeId(plain[0]), accept, "gone", "op"))

    def _tick(self, _: list[str], __: dict[str, str]) -> str:
        step = self.lessor.tick(self.now_ms)
        self.lessor.check()
        return describe(step) or "nothing"

    def _timeout(self, _: list[str], __: dict[str, str]) -> str:
        return str(self.lessor.timeout_ms(self.now_ms))

    def _books(self, plain: list[str], _: dict[str, str]) -> str:
        view = self.lessor.node_view(NodeId(plain[0]), self.now_ms)
        return "\n".join(
            f"{kind}: {b.free} free + {b.leased} leased + {b.ending} ending + {b.fenced} fenced + "
            f"{b.withheld} withheld = {b.total}"
            for kind, b in sorted(view.books.items())
        )

    def _usage(self, plain: list[str], _: dict[str, str]) -> str:
        used = self.lessor.state.quotas.usage(TenantId(plain[0]), Kind(plain[1]))
        return f"{used.amount} in {used.count}"

    def _lease(self, plain: list[str], _: dict[str, str]) -> str:
        return tell(self.lessor.lease(lease_id(plain[0])))

    def _stage(self, plain: list[str], _: dict[str, str]) -> str:
        lease = self.lessor.lease(lease_id(plain[0]))
        grace = f", grace {lease.grace_ms} from {lease.ended_at_ms}" if lease.grace_ms else ""
        return f"{lease.stage}{grace}"

    def _owes(self, plain: list[str], _: dict[str, str]) -> str:
        owed = self.lessor.obligations(NodeId(plain[0]))
        strangers = self.lessor.strangers(NodeId(plain[0]))
        lines = [f"{o.action} {letter(o.lease.lease_id)}" for o in owed]
        return "\n".join([*lines, *(f"stranger {letter(s.lease_id)}" for s in strangers)]) or "-"

    def _place(self, plain: list[str], options: dict[str, str]) -> str:
        where = {k: v for k, v in options.items() if k not in ("request",)}
        ask = placement.Request(
            options.get("request", "r"), Kind(plain[0]), int(plain[1]), where=where
        )
        decision = placement.evaluate(ask, self.lessor.nodes(self.now_ms))
        if isinstance(decision, placement.Deny):
            return f"Deny {decision.code}: {decision.reason}"
        assert isinstance(decision, placement.Admit)
        return f"Admit {decision.node_id} {decision.amount}"

    def _explain(self, plain: list[str], options: dict[str, str]) -> str:
        ask = placement.Request("r", Kind(plain[0]), int(plain[1]), where=options)
        leases = list(self.lessor.state.leases.values())
        decision, reports = placement.explain(ask, self.lessor.nodes(self.now_ms), leases)
        lines = [type(decision).__name__]
        for report in reports:
            failed = report.failed
            why = f"{failed.name}: {failed.detail}" if failed else "fits"
            held = ",".join(letter(x) for x in report.held_by)
            lines.append(f"{report.node_id} {why} held_by={held} free_by={report.free_by_ms}")
        return "\n".join(lines)


def describe(step: c.Step) -> str:
    lines = [
        f"{event.kind} {letter(event.lease_id) if event.lease_id else ''}".rstrip()
        for event in step.events
    ]
    if step.failure:
        lines.append(f"{type(step.failure).__name__} {step.failure.code}: {step.failure.detail}")
    if step.lease:
        lines.append(tell(step.lease))
    if step.nodes:
        lines.append("wake " + ",".join(sorted(step.nodes)))
    return "\n".join(lines)


def tell(lease: Lease) -> str:
    extent = f" at {lease.extent_offset}" if lease.kind.has_extents else ""
    over = f" {lease.cause}" if lease.cause else ""
    late = " unconfirmed" if lease.unconfirmed else ""
    late += f" cleared by {lease.cleared}" if lease.cleared else ""
    return (
        f"{letter(lease.lease_id)} {lease.state}{over}{late} {lease.kind} {lease.amount}{extent} "
        f"on {lease.node_id} epoch {lease.epoch} generation {lease.generation} end {lease.end_ms}"
    )


def interpreter() -> Callable[[str], str]:
    return Script().answer
