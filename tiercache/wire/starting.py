"""Starting an owner, when nobody serves a directory yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

LOCK_NAME = "spawn.lock"
LOG_NAME = "owner.log"
LOG_BYTES_MAX = 1 << 20


def find_or_start(
    directory: str,
    settings: Mapping[str, object],
    *,
    group: bool = False,
    deadline_s: float = 20.0,
    module: str = "tiercache.owner",
) -> socket.socket:
    """A blocking connection to the owner of the directory, which is started where there is none, as
    `MODULE DIR --listen FD --settings FD` (sockets.inherited(FD), read_settings(FD)).

    The connection stands before the owner has started: it is answered when the owner is ready, and ends when the owner
    could not start (see last_words). Raises CannotShare where none can be started, Foreign, or UnavailableError when
    the deadline passed."""
    raise NotImplementedError


def read_settings(descriptor: int) -> dict[str, object]:
    """In the owner: the settings that came with it; closes the descriptor."""
    raise NotImplementedError


def last_words(directory: str) -> str:
    """The last line of the owner's log, or nothing: what to tell when an owner did not start or ended."""
    raise NotImplementedError


def trim_log(directory: str) -> None:
    """Cuts the owner's log to its later half where it is over LOG_BYTES_MAX; while an owner writes to it, only that
    owner may."""
