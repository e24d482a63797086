"""ucx_perftest of the libucx wheel as a side of bench.transport: both ends spin, reuse one buffer, handle no errors.

What it moves stays in the processor's caches, and it has no batches: `-O` keeps so many operations under way.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
from pathlib import Path

PATIENCE_S = 30.0
ROUNDS = 3
MOVED_BYTES = 128 << 20
TESTS = {"put": "ucp_put_bw", "get": "ucp_get"}
CHANNELS = {"perftest tcp": "tcp", "perftest cma": "tcp,cma"}
"""Names of the sides, and the UCX transports they may take."""


def program() -> Path | None:
    """Where it is, if it is installed."""
    found = importlib.util.find_spec("libucx")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / "bin" / "ucx_perftest"
        if path.exists():
            return path
    return None


class Perftest:
    """Runs one test at a time, in two processes that are started for it."""

    def __init__(self, path: Path, transports: str) -> None:
        self.path, self.negotiated = path, transports
        self.environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(path.parents[1] / "lib"),
            "UCX_TLS": transports,
            "UCX_NET_DEVICES": "lo",
            "UCX_TCP_TX_SEG_SIZE": "512k",
            "UCX_TCP_RX_SEG_SIZE": "512k",
            "UCX_WARN_UNUSED_ENV_VARS": "n",
        }

    def _start(self, port: int, *more: str) -> subprocess.Popen[str]:
        line = ["stdbuf", "-oL", str(self.path), "-p", str(port), *more]
        return subprocess.Popen(line, env=self.environment, stdout=subprocess.PIPE, text=True)

    def joins(self, case: tuple[str, int, int], turn: int) -> bool:
        """It takes most of a second to start, so it takes part seldom."""
        return 0 < turn <= ROUNDS and (self.negotiated == "tcp" or case[1] == 1 << 20)

    def move(self, case: tuple[str, int, int], *, moved_bytes: int, verify: bool = False) -> float:
        """Seconds a byte."""
        assert not verify
        way, size, window = case
        count = max(moved_bytes, MOVED_BYTES) // size
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        test = ["-t", TESTS[way], "-s", str(size), "-n", str(count), "-w", "2", "-O", str(window), "-f", "-v"]
        with self._start(port) as server:
            assert server.stdout is not None
            try:
                for line in server.stdout:
                    if line.startswith("Waiting"):
                        break
                with self._start(port, "127.0.0.1", *test) as client:
                    try:
                        printed, _ = client.communicate(timeout=PATIENCE_S)
                    finally:
                        client.kill()
            finally:
                server.kill()
        fields = printed.strip().splitlines()[-1].split(",")
        return float(fields[3]) * 1e-6 / size
