"""The `tiercache` command. Its parts: `app` (the commands), `doctor`, `contents`, `warm`, `show`, `output`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script; one line where the packages that it prints with are missing."""
    try:
        from tiercache.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        print(f"the command line needs {error.name}: pip install tiercache[cli]", file=sys.stderr)
        sys.exit(2)
    sys.exit(run())
