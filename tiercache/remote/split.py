"""Split: a fast origin, and a second one for the few names that the fast one cannot say."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from tiercache.errors import OriginError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from tiercache.buffers import Buffer
    from tiercache.model import Outcome
    from tiercache.origin import Origin, Span, Stat

T = TypeVar("T")


class InexpressibleError(OriginError):
    """This origin has no way to ask for that; nothing was asked. Keys with empty segments, URLs with a query."""


class SplitOrigin:
    """An Origin over two of the same identity. What the first refuses with InexpressibleError goes to the second.

    The second is made at its first use: most never need it.
    """

    def __init__(self, first: Origin, make_second: Callable[[], Origin]) -> None:
        self.identity = first.identity
        self._first = first
        self._make_second = make_second
        self._second: Origin | None = None

    async def stat(self, paths: Sequence[str]) -> list[Stat | Outcome]:
        """See Origin."""
        return await self._either(lambda origin: origin.stat(paths))

    async def read(self, stat: Stat, span: Span, targets: Sequence[Buffer]) -> None:
        """See Origin."""
        await self._either(lambda origin: origin.read(stat, span, targets))

    async def read_growing(
        self, stat: Stat, span: Span, targets: Sequence[Buffer], came: Callable[[int], None]
    ) -> None:
        """See GrowingOrigin. All at once where an origin cannot tell."""
        await self._either(lambda origin: read_growing(origin, stat, span, targets, came))

    async def read_tail(self, path: str, length: int) -> tuple[Stat, bytes] | Outcome:
        """See Origin."""
        return await self._either(lambda origin: origin.read_tail(path, length))

    async def write(self, path: str, data: bytes | memoryview) -> Stat:
        """See Origin."""
        return await self._either(lambda origin: origin.write(path, data))

    async def delete(self, paths: Sequence[str]) -> list[Outcome]:
        """See Origin."""
        return await self._either(lambda origin: origin.delete(paths))

    async def close(self) -> None:
        """See Origin."""
        await self._first.close()
        if self._second is not None:
            await self._second.close()

    async def _either(self, call: Callable[[Origin], Awaitable[T]]) -> T:
        try:
            return await call(self._first)
        except InexpressibleError:
            if self._second is None:
                self._second = self._make_second()
            return await call(self._second)

    async def list(self, path: str) -> list[Stat] | Outcome:
        """See Origin."""
        return await self._either(lambda origin: origin.list(path))


async def read_growing(
    origin: Origin, stat: Stat, span: Span, targets: Sequence[Buffer], came: Callable[[int], None]
) -> None:
    """A read that tells how far it is, by an origin that may not know how: then all comes at the end."""
    growing = getattr(origin, "read_growing", None)
    if growing is not None:
        await growing(stat, span, targets, came)
        return
    await origin.read(stat, span, targets)
    came(span.length)
