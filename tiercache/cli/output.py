"""How commands speak: results on stdout (text or one JSON object), everything else on stderr; exit codes."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tiercache.errors import CapacityError, ConfigError, CorruptionError, TierCacheError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

GOOD, FOUND, USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: done; done and something is wrong (damage, results that differ); wrong arguments or settings; something
that is needed is not there or did not answer; stopped by the user."""

WIDE = 1000
PLAIN_WIDTH = 110
"""Columns where stdout is no terminal, so that tables in logs keep their lines."""


class Stopped(Exception):
    """The user stopped a command that has more to say of that than others."""


def console(*, errors: bool = False) -> Console:
    """Where text goes: stdout, or stderr for progress and errors."""
    made = Console(stderr=errors, highlight=False)
    return made if made.is_terminal else Console(stderr=errors, highlight=False, width=PLAIN_WIDTH)


def print_json(value: object) -> None:
    """One JSON object on stdout and nothing else."""
    print(json.dumps(value, indent=1, default=str))


def print_rows(rows: Sequence[Mapping[str, object]], *, title: str = "", wide: bool = False) -> None:
    """A table of equal rows; numbers to the right. Nothing when there are no rows. With `wide`, cells keep their line
    however narrow the terminal is."""
    if not rows:
        return
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(number(value) for value in row.values()))
    where = console()
    if wide:
        where.width = WIDE
    where.print(table)


def number(value: object) -> str:
    """A value as a cell."""
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def exit_code(error: BaseException) -> int:
    """The exit code that tells a script what kind of fault this was."""
    if isinstance(error, ConfigError | CapacityError):
        return USAGE
    return FOUND if isinstance(error, CorruptionError) else UNAVAILABLE


def _first(fault: BaseException) -> BaseException:
    """The first fault of a group: one is enough for one line."""
    while isinstance(fault, BaseExceptionGroup):
        fault = fault.exceptions[0]
    return fault


class OneLine(logging.Formatter):
    """What is logged, in one line: of a fault only what it says, not the frames that it came through."""

    def format(self, record: logging.LogRecord) -> str:
        """See Formatter."""
        fault = record.exc_info[1] if record.exc_info else None
        said = f": {str(fault) or type(fault).__name__}" if fault is not None else ""
        return " ".join(f"tiercache: {record.getMessage()}{said}".split())


def listen() -> None:
    """Warnings of everything below go to stderr, one line each."""
    ear = logging.StreamHandler()
    ear.setFormatter(OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[ear])


KEY_DIGITS_MIN = 12


def shortened(keys: Sequence[str]) -> list[str]:
    """Keys cut to so many digits that they still differ."""
    distinct = set(keys)
    longest = max(map(len, distinct), default=0)
    digits = next((n for n in range(KEY_DIGITS_MIN, longest) if len({key[:n] for key in distinct}) == len(distinct)), 0)
    return [key[:digits] if digits else key for key in keys]


@contextmanager
def one_line_errors() -> Iterator[list[int]]:
    """Turns faults into one line on stderr; the list that it yields then holds the exit code."""
    codes: list[int] = []
    try:
        try:
            yield codes
        except BaseExceptionGroup as faults:
            raise _first(faults) from faults
    except (TierCacheError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        console(errors=True).print(f"tiercache: {message}", markup=False, soft_wrap=True)
        codes.append(exit_code(error))
    except Stopped as stopped:
        console(errors=True).print(f"tiercache: {stopped}", markup=False, soft_wrap=True)
        codes.append(INTERRUPTED)
    except KeyboardInterrupt:
        console(errors=True).print("tiercache: stopped", markup=False)
        codes.append(INTERRUPTED)
