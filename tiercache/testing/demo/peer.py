"""fsspec's own caches, made usable by DuckDB: most of their methods do not know the protocol that they are named by."""

from __future__ import annotations

from typing import Any, ClassVar

from fsspec import AbstractFileSystem

MARK = "peer://"


class Peer(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Any filesystem under the protocol `peer`; only what a reader of Parquet calls."""

    protocol: ClassVar[str] = "peer"
    cachable = False

    def __init__(self, inner: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._inner = inner

    def info(self, path: str, **kwargs: Any) -> Any:
        return self._inner.info(path.removeprefix(MARK), **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return self._inner.ls(path.removeprefix(MARK), detail=detail, **kwargs)

    def glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> Any:
        return self._inner.glob(path.removeprefix(MARK), maxdepth=maxdepth, **kwargs)

    def modified(self, path: str) -> Any:
        return self._inner.modified(path.removeprefix(MARK))

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return self._inner.open(path.removeprefix(MARK), mode, **kwargs)
