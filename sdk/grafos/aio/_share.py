"""What was given, for those who await. See `grafos.aio`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grafos.aio import _lanes

if TYPE_CHECKING:
    import grafos


class Share:
    """The twin of `grafos.Share`: a text to pass on, and the way to end what was given."""

    __slots__ = ("sync",)

    def __init__(self, sync: grafos.Share) -> None:
        self.sync = sync

    @property
    def text(self) -> str:
        return self.sync.text

    @property
    def share_id(self) -> str:
        return self.sync.share_id

    @property
    def lease_id(self) -> str:
        return self.sync.lease_id

    @property
    def to(self) -> str:
        return self.sync.to

    @property
    def ops(self) -> tuple[str, ...]:
        return self.sync.ops

    @property
    def offset(self) -> int:
        return self.sync.offset

    @property
    def length(self) -> int:
        return self.sync.length

    @property
    def expiry_ms(self) -> int:
        return self.sync.expiry_ms

    async def end(self) -> None:
        """As the original: when this returns, nothing moves under it any more."""
        await _lanes.finish(self.sync.end)

    def __str__(self) -> str:
        return self.sync.text

    def __repr__(self) -> str:
        return f"<aio {self.sync!r}>"
