"""Golden scripts for shares: who gives what to whom, shows it, ends it; the answer is what follows.

    lease <size> <end>                     a lease of ann's, memory, with both rights
    give <parent> <name> <to> <ops> <offset> <length> <end>     as its holder's own library does it
    forge <parent> <name> <signer> <to> <ops> <offset> <length> <end> <depth>   as nobody should
    show <name> <who> <now> [<boot>]       at the node; its clocks agree unless said otherwise
    use <name> <now>                       an operation under what was shown
    end <name> <by>                        by the lease's holder (`ann`), or the holder of a share
    tree <now>

Rules: keys are names, and a signature is a hash; what is proved with real keys is in test_share.py.
"""

import hashlib
from collections.abc import Callable

from grafos_core import jws, share, sharebook
from grafos_core.failure import FabricError
from grafos_core.lease import Kind
from grafos_core.share import Chain, Recipient, Scope, Share, Signer
from grafos_core.token import LeaseToken

LEASE_ID = "1e" * 16
EPOCH = 7
PEOPLE = ("ann", "ben", "cid", "dan", "eve")


def point_of(name: str) -> bytes:
    return b"\x04" + hashlib.sha512(name.encode()).digest()


def signature(point: bytes, message: bytes) -> bytes:
    return share.lower(hashlib.sha512(point + message).digest())


def verify(point: bytes, message: bytes, signed: bytes) -> bool:
    return signed == signature(point, message)


def signer(name: str) -> Signer:
    point = point_of(name)
    return Signer(point, lambda message: signature(point, message))


def key_of(name: str) -> str:
    return share.thumbprint_of(point_of(name))


def name_of(who: str) -> str:
    return f"spiffe://grafos.local/tenant/a/holder/{who}"


def recipient(to: str) -> Recipient:
    """`@ben` is ben by his name, `ben` by his key."""
    return Recipient(name=name_of(to[1:])) if to.startswith("@") else Recipient(key=key_of(to))


def root_of(size: int, end_ms: int, holder: str = "ann") -> LeaseToken:
    return LeaseToken(
        "spiffe://grafos.local/service/admission", name_of(holder), "n1/" + "ab" * 16, "0a" * 16,
        0, 0, min(30_000, end_ms), key_of(holder), LEASE_ID, Kind.MEM, size, ("read", "write"),
        EPOCH, 1, 60_000, end_ms,
    )  # fmt: skip


def slip_of(root: LeaseToken) -> str:
    """As admission's, with a signature that nobody looks at here."""
    parts = [jws.header(jws.LEASE, "k1"), jws.to_base64url(jws.canonical(root.to_claims())), b"eA"]
    return b".".join(parts).decode()


def ops_of(letters: str) -> tuple[str, ...]:
    return tuple(op for op in ("read", "write") if op[0] in letters)


class Script:
    def __init__(self) -> None:
        self.book = sharebook.ShareBook()
        self.chains: dict[str, Chain] = {}
        self.entries: dict[str, sharebook.Entry] = {}
        self.ids: dict[str, str] = {}
        self.root = root_of(4096, 1000)

    def answer(self, text: str) -> str:
        return "\n".join(self._line(line) for line in text.splitlines())

    def _line(self, line: str) -> str:
        verb, *words = line.split()
        try:
            return str(getattr(self, "_" + verb)(*words))
        except FabricError as refusal:
            return f"{type(refusal).__name__} {refusal.code}: {refusal.detail}"

    def _lease(self, size: str, end: str) -> str:
        self.root = root_of(int(size), int(end))
        self.chains = {"lease": Chain(slip_of(self.root), self.root, ())}
        return f"{size} bytes to {end}"

    def _id(self, name: str) -> str:
        found = hashlib.sha256(name.encode()).hexdigest()[:32]
        self.ids[found] = name
        return found

    def _give(
        self, parent: str, name: str, to: str, ops: str, offset: str, length: str, end: str
    ) -> str:
        chain = self.chains[parent]
        scope = Scope(recipient(to), ops_of(ops), int(offset), int(length), int(end))
        given = share.narrowed(chain, share_id=self._id(name), scope=scope)
        pen = next(signer(who) for who in PEOPLE if chain.scope.to.key == key_of(who))
        self.chains[name] = share.mint(chain, given, pen)
        return f"depth {given.depth}"

    def _forge(
        self, parent: str, name: str, by: str, to: str, ops: str, offset: str, length: str,
        end: str, depth: str,
    ) -> str:  # fmt: skip
        chain = self.chains[parent]
        last = chain.text.rpartition("~")[2]
        scope = Scope(recipient(to), ops_of(ops), int(offset), int(length), int(end))
        made = Share(self._id(name), share.digest_of(last), LEASE_ID, int(depth), scope)
        pen = signer(by)
        payload = jws.to_base64url(jws.canonical(made.to_claims()))
        message = share.header(pen.point) + b"." + payload
        slip = message + b"." + jws.to_base64url(pen.sign(message))
        text = f"{chain.text}~{slip.decode()}"
        self.chains[name] = Chain(text, chain.root, (*chain.shares, made))
        return "forged"

    def _show(self, name: str, who: str, now: str, boot: str = "") -> str:
        now_ms, boot_ns = int(now), int(boot or now) * 1_000_000
        chain = share.verify_chain(
            self.chains[name].text, read_root=lambda token: self.root, verify=verify
        )
        share.judge(chain, key=key_of(who), name=name_of(who), now_ms=now_ms)
        entry = self.book.show(chain, key=key_of(who), now_ms=now_ms, now_ns=boot_ns)
        self.entries[name] = entry
        scope = entry.scope
        return f"{','.join(scope.ops)} {scope.offset}+{scope.length} to {scope.end_ms}"

    def _use(self, name: str, now: str) -> str:
        end = self.entries[name].end(int(now) * 1_000_000)
        if end is not None:
            raise end
        return "open"

    def _end(self, name: str, by: str) -> str:
        speaks = "" if by == "ann" else self._id(by)
        struck = self.book.end(LEASE_ID, EPOCH, self._id(name), by=speaks)
        return ", ".join(self.ids[each.share_id] for each in struck) or "nothing in use"

    def _tree(self, now: str) -> str:
        views = self.book.tree(LEASE_ID, below="", now_ns=int(now) * 1_000_000)
        views.sort(key=lambda view: self.ids[view.share_id])
        return "; ".join(
            f"{self.ids[v.share_id]} of {self.ids.get(v.parent_id, 'lease')} {v.state} "
            f"{v.remaining_ms}"
            for v in views
        )


def interpreter() -> Callable[[str], str]:
    return Script().answer
