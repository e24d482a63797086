"""Options: how UCX is set up here, and why."""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path

from tiercache.errors import ConfigError
from tiercache.net.ucx.finding import rdma_devices
from tiercache.transport import LINKS_MAX

_SIOCGIFADDR = 0x8915


def options(version: tuple[int, int, int], interface: str) -> dict[str, str]:
    """Options of a context whose peers reach it at this network interface, or over RDMA.

    Shared memory of UCX (posix, sysv) tells nobody that a peer has died, so it is not used. Without rendezvous
    (RNDV_THRESH) puts over TCP, and cma, go without a copy where peers may die too. Emulated moves are off: their
    answers end the process when the asker dies. What is received with a header is copied once more, so RX_SEG_SIZE is
    small: of it depends how much of a put that is. Connecting never blocks the thread (CONN_NB)."""
    return {
        "TLS": "tcp,cma,ib,cuda" if version[:2] >= (1, 22) else "tcp,ib,cuda",
        "NET_DEVICES": ",".join([interface, *[f"{name}:1" for name in rdma_devices()]]),
        "RNDV_THRESH": "inf",
        "PROTO_EMULATION_ENABLE": "n",
        "TCP_TX_SEG_SIZE": "16k",
        "TCP_RX_SEG_SIZE": "64k",
        "TCP_CONN_NB": "y",
        "TCP_MAX_NUM_EPS": str(4 * LINKS_MAX),
    }


def interface_of(host: str) -> str:
    """Name of the network interface with this address. Raises ConfigError where this machine has none."""
    if ":" in host:
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, _, _, name = line.split()
            if bytes.fromhex(digits) == socket.inet_pton(socket.AF_INET6, host):
                return name
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                except OSError:  # it has no IPv4 address
                    continue
                if answer[20:24] == socket.inet_aton(host):
                    return name
    raise ConfigError(f"no network interface of this machine has the address {host}")
