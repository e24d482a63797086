"""`python -m tiercache.cli`: the same as the `tiercache` command."""

from __future__ import annotations

from tiercache.cli import main

if __name__ == "__main__":
    main()
