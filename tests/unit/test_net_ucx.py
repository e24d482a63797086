"""UCX: which library is taken and why, what the ends tell each other, and that a lying peer gets nothing."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tiercache.buffers import Buffer
from tiercache.errors import ConfigError, ProtocolError, UnavailableError
from tiercache.net.ucx import binding, finding, options, pulling, serving, words
from tiercache.net.ucx.finding import Found
from tiercache.net.ucx.pulling import SLOT_BYTES, Span
from tiercache.transport import Memory

OLD = Found("the system", "/a", (1, 13, 1), True, False, "UCX 1.13.1 is too old")
PLAIN = Found("the libucx wheel", "/b", (1, 23, 0), False, True)
VERBS = Found("the nixl wheel", "/c", (1, 22, 0), True, True)
KEY = (1).to_bytes(8, "little") + b"\0" + b"\2ab"


@pytest.mark.parametrize(
    ("found", "rdma", "taken", "why"),
    [
        ([OLD, PLAIN, VERBS], False, PLAIN, "not newer"),
        ([OLD, PLAIN, VERBS], True, VERBS, "it has no RDMA"),
        ([OLD, PLAIN], True, PLAIN, ""),
        ([OLD], True, None, ""),
        ([], False, None, ""),
    ],
)
def test_the_newest_that_has_what_is_needed_is_taken(
    found: list[Found], rdma: bool, taken: Found | None, why: str
) -> None:
    choice = finding.choose(found, rdma)
    assert choice.taken == taken
    reasons = dict(choice.others)
    assert len(reasons) == len(found) - (taken is not None)
    assert not why or why in reasons.values()
    assert OLD not in found or reasons[OLD] == OLD.trouble


def test_what_is_no_library_is_said_to_be_none(tmp_path: Path) -> None:
    wrong = tmp_path / "libucp.so"
    wrong.write_bytes(b"no library")
    for path in (str(wrong), str(tmp_path / "absent.so"), "libc.so.6"):
        assert finding.probe(finding.NAMED, path).trouble
        with pytest.raises(UnavailableError):
            binding.load(path)


def test_versions_and_hosts() -> None:
    assert binding.numbers("1.22.0") == (1, 22, 0)
    assert binding.numbers("1.23-rc1") == (1, 23, 0)
    assert options.interface_of("127.0.0.1") == "lo"
    with pytest.raises(ConfigError, match=r"192\.0\.2\.7"):
        options.interface_of("192.0.2.7")


def test_addresses_and_descriptors_come_back() -> None:
    address = words.Address((1, 22), b"t" * 16, b"worker")
    assert words.unpack_address(words.pack_address(address)) == address
    descriptor = words.Descriptor((1, 22), b"t" * 16, 7, 1 << 40, 4096, True, KEY)
    assert words.unpack_descriptor(words.pack_descriptor(descriptor)) == descriptor
    for wrong in (b"", KEY[:8], KEY[:-1], b"\xff" * 20):
        assert not words.whole_key(wrong)
        with pytest.raises(ProtocolError):
            words.unpack_descriptor(words.pack_descriptor(descriptor._replace(key=wrong)))
    with pytest.raises(ProtocolError):
        words.unpack_descriptor(words.pack_descriptor(descriptor._replace(base=(1 << 63) - 1)))
    with pytest.raises(ProtocolError):
        words.unpack_address(words.pack_descriptor(descriptor))


def test_questions_are_cut_to_slots() -> None:
    pieces = [Buffer(1 << 20, 3 * SLOT_BYTES + 5, None), Buffer(9 << 30, 7, None)]
    asked = pulling.questions([(0, 4, 100, pieces), (1, 5, 0, [Buffer(1, 10, None)])])
    spans = [span for question in asked for span in question.spans]
    assert spans[0] == Span(4, 100, SLOT_BYTES)
    assert spans[-2:] == [Span(4, 100 + 3 * SLOT_BYTES, 12), Span(5, 0, 10)]
    assert all(sum(span.length for span in question.spans) <= SLOT_BYTES for question in asked)
    many = pulling.questions([(i, 1, i, [Buffer(i + 1, 1, None)]) for i in range(1300)])
    assert [len(question.spans) for question in many] == [512, 512, 276]
    assert pulling.questions([]) == []


def test_a_lying_question_is_not_answered() -> None:
    good = pulling.packed(b"descriptor", 3, [Span(1, 2, 3)])
    assert pulling.unpacked(good) == (b"descriptor", 3, [Span(1, 2, 3)])
    lies = [
        pulling.packed(b"", pulling.SLOTS, [Span(1, 2, 3)]),
        pulling.packed(b"", 0, []),
        pulling.packed(b"", 0, [Span(1, 2, SLOT_BYTES + 1)]),
        pulling.packed(b"", 0, [Span(1, 2, SLOT_BYTES)] * 2),
        *[good[:length] for length in range(len(good))],
    ]
    assert [pulling.unpacked(lie) for lie in lies] == [None] * len(lies)
    rng = random.Random(1)
    for _ in range(2000):
        pulling.unpacked(rng.randbytes(rng.randrange(64)))


def test_only_what_is_exposed_is_put_into_a_landing() -> None:
    class Peer:
        token, landings = b"t" * 16, dict[bytes, object]()

    def descriptor(token: bytes = b"t" * 16, length: int = pulling.SLOTS * SLOT_BYTES) -> bytes:
        return words.pack_descriptor(words.Descriptor((1, 22), token, 0, 1 << 30, length, True, KEY))

    memory = Buffer.of(np.zeros(1000, np.uint8), writable=True)
    exposed = {1: serving.Exposed(memory, Memory.HOST, 0), 2: serving.Exposed(memory, Memory.CUDA, 0)}
    spans = [Span(1, 0, 10), Span(1, 990, 10), Span(1, 991, 10), Span(2, 0, 10), Span(9, 0, 10), Span(1, 5, 1)]
    answer = serving.answer(Peer(), pulling.packed(descriptor(), 2, spans), exposed)  # type: ignore[arg-type]
    assert answer is not None
    assert [(op.size, op.remote - (1 << 30) - 2 * SLOT_BYTES) for op in answer.ops] == [(2, 0), (1, 50)]
    assert answer.outcomes(set()) == bytes([2, 0, 0, 1, 1, 1, 0])
    assert answer.outcomes({0}) == bytes([2, 1, 1, 1, 1, 1, 1])
    for lie in (b"", descriptor(b"x" * 16), descriptor(length=5), b"junk" * 30):
        assert serving.answer(Peer(), pulling.packed(lie, 0, spans), exposed) is None  # type: ignore[arg-type]
