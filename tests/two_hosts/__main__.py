"""`python -m tests.two_hosts [--transports tcp,ucx] [PATTERN]`: two caches on two hosts, and all that may happen to
them; a row a case, exit status 1 where one failed. Every block that is read is compared: wrong bytes fail a case."""

from __future__ import annotations

import argparse
import sys

from tests.two_hosts.table import run

parser = argparse.ArgumentParser(prog="python -m tests.two_hosts")
parser.add_argument("pattern", nargs="?", default="", help="only cases whose name has this (a regular expression)")
parser.add_argument("--transports", default="tcp,ucx")
options = parser.parse_args()
rows = run(options.transports.split(","), options.pattern, lambda row: print(row, flush=True))
failed = sum(row.failed for row in rows)
print(f"{len(rows)} rows, {failed} failed, {sum(row.came == 'ok' for row in rows)} ok; wrong bytes fail a row")
sys.exit(bool(failed))
