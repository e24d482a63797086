"""Mooncake and LMCache as sides of bench.local: `.venv-peers/bin/python -m bench.local_peers NAME WORKDIR`."""

from __future__ import annotations

import json
import os
import sys

from bench.local_lmcache import LMCache
from bench.local_mooncake import Mooncake
from bench.local_sides import serve
from bench.local_ways import FAULTS

PEERS = {"mooncake": Mooncake, "lmcache": LMCache}


def main(name: str, directory: str) -> None:
    """Makes the side and serves; where it cannot be made, the first answer says why."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes elsewhere
    try:
        side = PEERS[name](directory)
    except FAULTS as fault:
        os.write(answers, (json.dumps({"left_out": str(fault)}) + "\n").encode())
        os._exit(1)
    os.dup2(answers, 1)
    serve(side)
    side.close()
    os._exit(0)  # without the libraries' own ends, which wait for servers that are gone


if __name__ == "__main__":
    main(*sys.argv[1:])
