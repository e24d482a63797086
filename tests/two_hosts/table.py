"""Table: runs cases, a row each, and says what came of them."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.two_hosts import cases, crowd
from tests.two_hosts.ends import machines
from tiercache import net
from tiercache.testing import netns

LINK_BYTES_S = 125e6
"""A link of 1 Gbit/s: transfers take long enough to be cut off."""
MOMENTS, STEP_S = 10, 0.04
REQUESTS = 200
SKEW_S = 5 * 3600.0
COMBINATIONS = [(True, True), (True, False), (False, True), (False, False)]
WHO = {True: "owner", False: "lone"}


@dataclass
class Case:
    """One row: what it is called, and what to call. `hosts` on one switch, with the limit of a link where it is
    `narrow`."""

    what: str
    call: Callable[..., str]
    arguments: dict[str, Any]
    hosts: int = 2
    narrow: bool = False


@dataclass
class Row:
    """What came of a case."""

    what: str
    transport: str
    came: str
    seconds: float
    said: str

    @property
    def failed(self) -> bool:
        return self.came == "FAILED"

    def __str__(self) -> str:
        return f"{self.what:42}{self.transport:6}{self.came:>14}{self.seconds:>8.1f} s  {self.said}"


def every() -> list[Case]:
    """All cases, of one transport."""
    found = []
    for writer, reader in COMBINATIONS:
        who = {"writer": writer, "reader": reader}
        found.append(Case(f"write, read: {WHO[writer]} to {WHO[reader]}", cases.exchange, who))
    for writer, reader in ((True, True), (False, False)):
        who = {"writer": writer, "reader": reader}
        found.append(Case(f"lake pages: {WHO[writer]} to {WHO[reader]}", cases.lake, who))
    for share in (True, False):
        much = {"share": share, "moments": MOMENTS, "step_s": STEP_S}
        found.append(Case(f"lender killed, {WHO[share]}", cases.killed, much, narrow=True))
        found.append(Case(f"reader killed, {WHO[share]}", cases.reader_killed, much, narrow=True))
        for which in ("lender", "reader"):
            how = {"share": share, "which": which, "after_s": 0.1}
            found.append(Case(f"{which} hangs, {WHO[share]}", cases.hung, how, narrow=True))
        cut = {"share": share, "after_s": 0.1}
        found.append(Case(f"network cut and restored, {WHO[share]}", cases.severed, cut, narrow=True))
    rate = {"rate_bytes_s": LINK_BYTES_S / 2, "count": 256}
    return [
        *found,
        Case("half the link's rate is the cap", cases.paced, rate, narrow=True),
        Case("clock 5 h ahead", cases.skewed, {"skew_s": SKEW_S}),
        Case("clock 5 h behind", cases.skewed, {"skew_s": -SKEW_S}),
        Case("another secret", cases.stranger, {}, hosts=3),
        Case(f"{REQUESTS} requests published at once", crowd.published, {"requests": REQUESTS}),
        Case(f"{REQUESTS} requests in one call", crowd.published, {"requests": REQUESTS, "whole": True}),
        Case(f"{REQUESTS} requests pulled at once", crowd.pulled, {"requests": REQUESTS}),
        Case("pinned until taken", crowd.pinned, {"requests": REQUESTS}),
        Case("consumer killed while it pulls", crowd.consumer_killed, {"requests": REQUESTS, "after_s": 0.2}),
        Case("three times the memory, spilled", crowd.spilled, {"memory_mib": 32}),
        Case("both full", crowd.both_full, {"memory_mib": 32}),
    ]


def run(transports: list[str], pattern: str, say: Callable[[object], None]) -> list[Row]:
    """Runs the cases whose name has the pattern over each transport."""
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        say(row)

    for transport in transports:
        chosen = [one for one in every() if re.search(pattern, one.what)]
        usable = net.usable(transport)
        lacking = netns.why_not(rate=any(one.narrow for one in chosen))
        for case in chosen:
            if not usable.usable or lacking:
                add(Row(case.what, transport, "not exercised", 0.0, usable.why if not usable.usable else lacking))
            else:
                add(_row(case, transport))
    if "auto" not in transports and not netns.why_not() and re.search(pattern, "auto"):
        takes = next(name for name in net.choose("auto") if name != "shm")
        how = {"writer": True, "reader": True, "takes": takes}
        add(_row(Case("write, read: owner to owner", cases.exchange, how), "auto"))
    return rows


def _row(case: Case, transport: str) -> Row:
    home, began_s = Path(tempfile.mkdtemp(prefix="two-hosts-")), time.monotonic()
    try:
        with machines(case.hosts, home, rate_bytes_s=LINK_BYTES_S if case.narrow else 0.0) as hosts:
            said = case.call(hosts, home, transport, **case.arguments)
        shutil.rmtree(home)
        return Row(case.what, transport, "ok", time.monotonic() - began_s, said)
    except Exception as fault:  # any is a row
        why = f"{type(fault).__name__}: {str(fault)[:300]}; see {home}"
        return Row(case.what, transport, "FAILED", time.monotonic() - began_s, why)
