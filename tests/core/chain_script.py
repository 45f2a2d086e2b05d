"""Golden scripts for the hash chain.

append <kind> [lease=<letter>] [epoch=n] [name=value …]   the next record
verify | verify without=<n> | verify flipped=<n> | verify swapped=<n>
parse <hexadecimal digits>
"""

from collections.abc import Callable

from grafos_core import chain
from grafos_core.chain import Chain, Record
from grafos_core.failure import FabricError


class Script:
    def __init__(self) -> None:
        self.chain = Chain("n1", "0" * 31 + "7", 1)
        self.records: list[Record] = []

    def answer(self, text: str) -> str:
        return "\n".join(self._line(line) for line in text.splitlines())

    def _line(self, line: str) -> str:
        words = line.split()
        plain = [word for word in words[1:] if "=" not in word]
        options = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        try:
            match words[0]:
                case "append":
                    return self._append(plain[0], options)
                case "parse":
                    return str(chain.parse(bytes.fromhex(plain[0])).number)
                case _:
                    return self._verify({name: int(number) for name, number in options.items()})
        except FabricError as refusal:
            return f"{type(refusal).__name__} {refusal.code}: {refusal.detail}"

    def _append(self, kind: str, options: dict[str, str]) -> str:
        letter = options.pop("lease", "")
        record = self.chain.append(
            kind,
            wall_ms=1_000 + len(self.records),
            boottime_ns=1,
            lease_id=f"{ord(letter):02x}" * 16 if letter else "",
            epoch=int(options.pop("epoch", 0)),
            body=dict(options),
        )
        self.records.append(record)
        return f"{record.number} {record.hash.hex()[:16]} after {record.prev_hash.hex()[:16]}"

    def _verify(self, spoiled: dict[str, int]) -> str:
        data = [record.data for record in self.records]
        if "without" in spoiled:
            del data[spoiled["without"] - 1]
        if "swapped" in spoiled:
            at = spoiled["swapped"] - 1
            data[at], data[at + 1] = data[at + 1], data[at]
        if "flipped" in spoiled:
            at = spoiled["flipped"] - 1
            data[at] = data[at][:-1] + bytes([data[at][-1] ^ 1])
        head, number = chain.verify(data)
        return f"whole up to {number}, head {head.hex()[:16]}"


def interpreter() -> Callable[[str], str]:
    return Script().answer
