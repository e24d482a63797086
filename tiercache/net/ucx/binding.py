"""Binding of libucp through ctypes: the calls and structures that this package uses, as UCX 1.13 and later have them.

Structures carry a mask of the fields that are set, so that one declaration serves every version. No object here keeps
anything alive: whoever passes an address holds what lies there.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int8, c_size_t, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any, NamedTuple

from tiercache.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping

OLDEST = (1, 21)
"""Before that, moves over TCP are emulated in software where peers may die; and where one does, its emulation ends this
process."""
API = (1, 13)
"""The version of the calls and fields that are used here."""

OK, IN_PROGRESS, NO_MEMORY, CANCELED = 0, 1, -4, -16
ERRORS = (1 << 64) - 100
"""A request's address from here on is no address but a status."""

RMA, WAKEUP, AM = 2, 16, 64
SINGLE_THREAD = 0
PEER_ERRORS = 1
FORCE = 1
IOV = 2
REPLY, EAGER = 1, 2
WHOLE_MESSAGE = 1
GIVES_REPLY, RENDEZVOUS = 1, 1 << 17
FLAGS_SET, DATATYPE_SET, MEMORY_SET, MEMH_SET = 1 << 4, 1 << 3, 1 << 6, 1 << 8


class Params(Structure):
    """ucp_params_t."""

    _fields_ = (
        ("field_mask", c_uint64),
        ("features", c_uint64),
        ("request_size", c_size_t),
        ("request_init", c_void_p),
        ("request_cleanup", c_void_p),
        ("tag_sender_mask", c_uint64),
        ("mt_workers_shared", c_int),
        ("estimated_num_eps", c_size_t),
        ("estimated_num_ppn", c_size_t),
        ("name", c_char_p),
        ("node_local_id", c_size_t),
    )


class WorkerParams(Structure):
    """ucp_worker_params_t."""

    _fields_ = (
        ("field_mask", c_uint64),
        ("thread_mode", c_int),
        ("cpu_mask", c_uint64 * 16),
        ("events", c_uint32),
        ("user_data", c_void_p),
        ("event_fd", c_int),
        ("flags", c_uint64),
        ("name", c_char_p),
        ("am_alignment", c_size_t),
        ("client_id", c_uint64),
    )


class EndpointParams(Structure):
    """ucp_ep_params_t, up to what is set here."""

    _fields_ = (
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("err_mode", c_int),
        ("err_call", c_void_p),
        ("err_argument", c_void_p),
        ("user_data", c_void_p),
        ("flags", c_uint32),
        ("sockaddr", c_void_p * 2),
        ("conn_request", c_void_p),
        ("name", c_char_p),
        ("local_sockaddr", c_void_p * 2),
    )


class MapParams(Structure):
    """ucp_mem_map_params_t."""

    _fields_ = (
        ("field_mask", c_uint64),
        ("address", c_void_p),
        ("length", c_size_t),
        ("flags", c_uint32),
        ("prot", c_uint32),
        ("memory_type", c_int),
        ("exported", c_void_p),
    )


class RequestParams(Structure):
    """ucp_request_param_t."""

    _fields_ = (
        ("op_attr_mask", c_uint32),
        ("flags", c_uint32),
        ("request", c_void_p),
        ("call", c_void_p),
        ("datatype", c_uint64),
        ("user_data", c_void_p),
        ("reply_buffer", c_void_p),
        ("memory_type", c_int),
        ("recv_info", c_void_p),
        ("memh", c_void_p),
        ("remote_datatype", c_uint64),
        ("remote", c_void_p),
        ("remote_count", c_size_t),
    )


class ListenerParams(Structure):
    """ucp_am_handler_param_t."""

    _fields_ = (
        ("field_mask", c_uint64),
        ("id", c_uint32),
        ("flags", c_uint32),
        ("call", c_void_p),
        ("argument", c_void_p),
    )


class Arrival(Structure):
    """ucp_am_recv_param_t."""

    _fields_ = (("attributes", c_uint64), ("reply", c_void_p))


class Span(Structure):
    """ucp_dt_iov_t."""

    _fields_ = (("address", c_void_p), ("length", c_size_t))


class TransportName(Structure):
    """ucp_transport_entry_t."""

    _fields_ = (("transport", c_char_p), ("device", c_char_p))


class EndpointFacts(Structure):
    """ucp_ep_attr_t."""

    _fields_ = (
        ("field_mask", c_uint64),
        ("name", ctypes.c_char * 32),
        ("local", c_uint64 * 16),
        ("remote", c_uint64 * 16),
        ("entries", POINTER(TransportName)),
        ("count", c_uint32),
        ("entry_size", c_size_t),
        ("user_data", c_void_p),
    )


ON_ERROR = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int8)
ON_MESSAGE = ctypes.CFUNCTYPE(c_int8, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, POINTER(Arrival))

_STATUS, _REQUEST = c_int8, c_void_p  # ucs_status_t is a packed enum of one byte
_CALLS: dict[str, tuple[Any, list[Any]]] = {
    "ucp_get_version_string": (c_char_p, []),
    "ucp_config_read": (_STATUS, [c_char_p, c_char_p, POINTER(c_void_p)]),
    "ucp_config_modify": (_STATUS, [c_void_p, c_char_p, c_char_p]),
    "ucp_config_release": (None, [c_void_p]),
    "ucp_init_version": (_STATUS, [c_uint32, c_uint32, POINTER(Params), c_void_p, POINTER(c_void_p)]),
    "ucp_cleanup": (None, [c_void_p]),
    "ucp_worker_create": (_STATUS, [c_void_p, POINTER(WorkerParams), POINTER(c_void_p)]),
    "ucp_worker_destroy": (None, [c_void_p]),
    "ucp_worker_progress": (c_uint32, [c_void_p]),
    "ucp_worker_wait": (_STATUS, [c_void_p]),
    "ucp_worker_signal": (_STATUS, [c_void_p]),
    "ucp_worker_get_address": (_STATUS, [c_void_p, POINTER(c_void_p), POINTER(c_size_t)]),
    "ucp_worker_release_address": (None, [c_void_p, c_void_p]),
    "ucp_worker_set_am_recv_handler": (_STATUS, [c_void_p, POINTER(ListenerParams)]),
    "ucp_ep_create": (_STATUS, [c_void_p, POINTER(EndpointParams), POINTER(c_void_p)]),
    "ucp_ep_close_nbx": (_REQUEST, [c_void_p, POINTER(RequestParams)]),
    "ucp_ep_flush_nbx": (_REQUEST, [c_void_p, POINTER(RequestParams)]),
    "ucp_mem_map": (_STATUS, [c_void_p, POINTER(MapParams), POINTER(c_void_p)]),
    "ucp_mem_unmap": (_STATUS, [c_void_p, c_void_p]),
    "ucp_rkey_pack": (_STATUS, [c_void_p, c_void_p, POINTER(c_void_p), POINTER(c_size_t)]),
    "ucp_rkey_buffer_release": (None, [c_void_p]),
    "ucp_ep_rkey_unpack": (_STATUS, [c_void_p, c_char_p, POINTER(c_void_p)]),
    "ucp_rkey_destroy": (None, [c_void_p]),
    "ucp_put_nbx": (_REQUEST, [c_void_p, c_void_p, c_size_t, c_uint64, c_void_p, POINTER(RequestParams)]),
    "ucp_get_nbx": (_REQUEST, [c_void_p, c_void_p, c_size_t, c_uint64, c_void_p, POINTER(RequestParams)]),
    "ucp_am_send_nbx": (
        _REQUEST,
        [c_void_p, c_uint32, c_char_p, c_size_t, c_char_p, c_size_t, POINTER(RequestParams)],
    ),
    "ucp_request_check_status": (_STATUS, [c_void_p]),
    "ucp_request_free": (None, [c_void_p]),
}
_QUERY: tuple[Any, list[Any]] = (_STATUS, [c_void_p, POINTER(EndpointFacts)])
_FACTS = 1 << 3  # the field of EndpointFacts that is asked for: which transports the endpoint has
NAMES_MAX = 32

QUIET = {"HANDLE_ERRORS": "none", "WARN_UNUSED_ENV_VARS": "n", "LOG_LEVEL": "fatal"}
HOOKS = {"MEM_EVENTS": "n", "MEM_MMAP_HOOK_MODE": "none", "MEM_MALLOC_HOOKS": "n", "MEM_CUDA_HOOK_MODE": "none"}
"""Read while the library is loaded, from the environment only: UCX catches no signal, prints nothing, and patches
neither malloc nor mmap (what moves is registered by name here, so it has nothing to watch)."""


class Library(NamedTuple):
    """A loaded libucp."""

    calls: Any
    """Gives up the GIL in each call: for those that take long."""
    quick: Any
    """Keeps the GIL: for those that are over before another thread could use it."""
    version: tuple[int, int, int]
    path: str


def load(path: str) -> Library:
    """Loads libucp from here. Raises UnavailableError where that is none that can be used."""
    try:
        with Environment({f"UCX_{name}": value for name, value in (QUIET | HOOKS).items()}):
            calls, quick = ctypes.CDLL(path), ctypes.PyDLL(path)
        for library in (calls, quick):
            for name, (result, arguments) in _CALLS.items():
                call = getattr(library, name)
                call.restype, call.argtypes = result, arguments
            if hasattr(library, "ucp_ep_query"):
                library.ucp_ep_query.restype, library.ucp_ep_query.argtypes = _QUERY
        version = numbers(calls.ucp_get_version_string().decode())
    except (OSError, AttributeError, ValueError) as error:
        raise UnavailableError(f"{path}: {error}") from error
    if version[:2] < OLDEST:
        raise UnavailableError(
            f"{path} is UCX {'.'.join(map(str, version))}; {OLDEST[0]}.{OLDEST[1]} or later is needed"
        )
    return Library(calls, quick, version, path)


def numbers(text: str) -> tuple[int, int, int]:
    """A version such as "1.22.0" as numbers."""
    major, minor, patch, *_ = [int(part) for part in text.split("-")[0].split(".")] + [0, 0]
    return major, minor, patch


class Environment:
    """Variables of the C library's environment while a library loads that reads its options nowhere else. Those of
    Python, and so of children that are started meanwhile, stay as they are."""

    def __init__(self, wanted: Mapping[str, str]) -> None:
        self._wanted, self._c = wanted, ctypes.PyDLL(None)  # the GIL is kept: no other Python thread looks meanwhile
        self._c.getenv.restype = c_char_p

    def __enter__(self) -> None:
        self._before = {name: self._c.getenv(name.encode()) for name in self._wanted}
        for name, value in self._wanted.items():
            self._c.setenv(name.encode(), value.encode(), name != "UCX_LOG_LEVEL")  # who debugs sets that

    def __exit__(self, *error: object) -> None:
        for name, value in self._before.items():
            if value is None:
                self._c.unsetenv(name.encode())
            else:
                self._c.setenv(name.encode(), value, 1)


def check(status: int, what: str) -> None:
    """Raises UnavailableError for a status that is an error."""
    if status < 0:
        raise UnavailableError(f"UCX: {what} failed with status {status}")


def context(library: Library, options: Mapping[str, str]) -> int:
    """A new ucp_context with these options; those that this version does not know are left out by it."""
    config, made = c_void_p(), c_void_p()
    check(library.calls.ucp_config_read(None, None, byref(config)), "reading its options")
    try:
        for name, value in options.items():
            library.calls.ucp_config_modify(config, name.encode(), value.encode())
        params = Params(field_mask=1, features=RMA | WAKEUP | AM)
        check(library.calls.ucp_init_version(*API, byref(params), config, byref(made)), "ucp_init")
    finally:
        library.calls.ucp_config_release(config)
    return made.value or 0


def worker(library: Library, made: int) -> int:
    """A new ucp_worker of this context, for the thread that calls this."""
    found = c_void_p()
    params = WorkerParams(field_mask=1, thread_mode=SINGLE_THREAD)
    check(library.calls.ucp_worker_create(made, byref(params), byref(found)), "ucp_worker_create")
    return found.value or 0


def worker_address(library: Library, made: int) -> bytes:
    """Where peers reach this worker, as UCX says it."""
    address, length = c_void_p(), c_size_t()
    check(library.calls.ucp_worker_get_address(made, byref(address), byref(length)), "ucp_worker_get_address")
    found = ctypes.string_at(address.value or 0, length.value)
    library.calls.ucp_worker_release_address(made, address)
    return found


def listen(library: Library, made: int, number: int, call: Any) -> None:
    """Has `call`, an ON_MESSAGE, hear the messages with this number. The caller holds it."""
    params = ListenerParams(field_mask=7, id=number, flags=WHOLE_MESSAGE, call=ctypes.cast(call, c_void_p))
    check(library.calls.ucp_worker_set_am_recv_handler(made, byref(params)), "ucp_worker_set_am_recv_handler")


def endpoint(library: Library, made: int, address: bytes, call: Any, argument: int) -> int:
    """A new ucp_ep to this address that survives the death of its peer: `call`, an ON_ERROR, hears of it."""
    padded = address + bytes(4096)  # UCX walks it without knowing its length
    params = EndpointParams(field_mask=7, err_mode=PEER_ERRORS, err_argument=argument)
    params.address = ctypes.cast(c_char_p(padded), c_void_p)
    params.err_call = ctypes.cast(call, c_void_p)
    found = c_void_p()
    check(library.calls.ucp_ep_create(made, byref(params), byref(found)), "ucp_ep_create")
    return found.value or 0


def map_memory(library: Library, made: int, address: int, length: int, memory_type: int) -> tuple[int, bytes]:
    """Registers memory; its ucp_mem and remote key."""
    params = MapParams(field_mask=3 | 1 << 4, address=address, length=length, memory_type=memory_type)
    memh, key, size = c_void_p(), c_void_p(), c_size_t()
    check(library.calls.ucp_mem_map(made, byref(params), byref(memh)), "ucp_mem_map")
    status = library.calls.ucp_rkey_pack(made, memh, byref(key), byref(size))
    if status < 0:
        library.calls.ucp_mem_unmap(made, memh)
    check(status, "ucp_rkey_pack")
    found = ctypes.string_at(key.value or 0, size.value)
    library.calls.ucp_rkey_buffer_release(key)
    return memh.value or 0, found


def unpack_key(library: Library, made: int, key: bytes) -> int:
    """The ucp_rkey for this endpoint, or 0 where UCX does not take it."""
    found = c_void_p()
    if library.quick.ucp_ep_rkey_unpack(made, key + bytes(4096), byref(found)) < 0:
        return 0
    return found.value or 0


def transports(library: Library, made: int) -> list[str]:
    """Names of the transports that an endpoint uses, as UCX calls them; empty before 1.14, which does not say."""
    if library.version[:2] < (1, 14):
        return []
    rows = (TransportName * NAMES_MAX)()
    facts = EndpointFacts(field_mask=_FACTS, entries=rows, count=NAMES_MAX, entry_size=ctypes.sizeof(TransportName))
    if library.quick.ucp_ep_query(made, byref(facts)) < 0:
        return []
    return [(row.transport or b"").decode(errors="replace") for row in rows[: min(NAMES_MAX, facts.count)]]
