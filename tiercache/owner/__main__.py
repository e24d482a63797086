"""`python -m tiercache.owner DIR [--listen FD] [--settings FD]`: see the package."""

from __future__ import annotations

import sys

from tiercache.owner.life import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
