"""Progress on a terminal: bars while work goes on, one line when a part of it ends; elsewhere only those lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from tiercache.cli import output

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType


class Show:
    """A watcher of the demo (see testing.demo.run.Watcher) that draws on stderr. A context manager."""

    def __init__(self) -> None:
        self._console = output.console(errors=True)
        columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task: Any = None
        self._left = 0
        self._seconds = 0.0

    def __enter__(self) -> Show:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def started(self, title: str, count: int) -> None:
        """A new bar."""
        self._left, self._seconds = count, 0.0
        self._task = self._bar.add_task(title, total=count)

    def query(self, title: str, event: Mapping[str, Any]) -> None:
        """One step; with the last, the bar gives way to a line."""
        self._left -= 1
        self._seconds += event["seconds"]
        self._bar.update(self._task, advance=1, description=f"{title} {event['query']}")
        if not self._left:
            self._bar.remove_task(self._task)
            self.note(f"{title:<20} {self._seconds:7.2f} s")


class WarmShow:
    """How far a warm-up is (see warm.Progress). A context manager."""

    def __init__(self) -> None:
        self._console = output.console(errors=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        more = (TransferSpeedColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, *more, console=self._console, disable=not self._console.is_terminal)
        self._task: Any = None

    def __enter__(self) -> WarmShow:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def planned(self, files: int, size_bytes: int) -> None:
        """The bar's length."""
        self._task = self._bar.add_task(f"{files} files", total=size_bytes)

    def advanced(self, size_bytes: int) -> None:
        """One step."""
        self._bar.update(self._task, advance=size_bytes)

    def note(self, text: str) -> None:
        """One line."""
        self._console.print(text, markup=False, soft_wrap=True)
