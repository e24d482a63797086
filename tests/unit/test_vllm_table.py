"""The table of vLLM's protocol, which needs no vLLM: schedules of requests, with an engine that is a few lines."""

from __future__ import annotations

import pytest

from tiercache_connectors.vllm_table import Requests, Scheduled

BLOCK, PAGE = 16, 32


def keys(count: int, start: int = 0) -> list[bytes]:
    return [i.to_bytes(16, "little") for i in range(start, start + count)]


def table(groups: int = 1) -> Requests:
    return Requests(BLOCK, [PAGE] * groups)


def pages(first: int, tokens: int) -> tuple[list[int], ...]:
    return (list(range(first, first + -(-tokens // PAGE))),)


def begin(
    requests: Requests, name: str, tokens: int, *, computed: int = 0, stored: int = 0, first: int = 1, later=False
):
    """A request of `tokens` tokens comes, and gets pages; `stored` blocks of it are in the cache. What to load."""
    row = requests.add(name)
    wanted = requests.wanted(row, tokens)
    row.keys[0].extend(keys(wanted + 1))
    found = requests.matched(row, computed, min(stored, wanted), min(stored, wanted))
    requests.allocated(row, pages(first, tokens), found, [range(min(stored, wanted))], later=later)
    return found


def run(requests: Requests, name: str, computed: int, count: int, known: int, new=None, fresh: bool = False):
    return requests.step([Scheduled(name, computed, count, known, new, fresh)])


def test_a_prompt_that_nobody_knows_is_saved_as_far_as_it_fills_blocks() -> None:
    requests = table()
    assert begin(requests, "a", 100) == 0
    step = run(requests, "a", 0, 100, 100, pages(1, 100), fresh=True)
    (save,) = step.saves
    (move,) = save.moves
    assert (move.start, move.stop, move.first_page, move.pages) == (0, 6, 0, (1, 2, 3))
    assert step.keys == [("a", 0, 0, tuple(keys(6)))]
    assert set(step.written) == {1, 2, 3, 4}
    assert not step.loads


def test_tokens_that_follow_are_saved_block_by_block_and_keys_are_told_once() -> None:
    requests = table()
    begin(requests, "a", 100)
    run(requests, "a", 0, 100, 100, pages(1, 100), fresh=True)
    told, saved = [], []
    requests.get("a").keys[0].extend(keys(20, 7))
    for token in range(100, 160):
        new = ([50 + token],) if token % PAGE == 0 else None
        step = run(requests, "a", token, 1, token + 1, new)
        told += [(first, len(them)) for _, _, first, them in step.keys]
        saved += [(move.start, move.stop, move.pages) for order in step.saves for move in order.moves]
    assert saved == [(6, 7, (4,)), (7, 8, (4,)), (8, 9, (178,)), (9, 10, (178,))]
    assert told == [(6, 1), (7, 1), (8, 1), (9, 1)]


def test_the_last_token_is_computed_and_what_the_engine_has_is_not_loaded() -> None:
    requests = table()
    assert requests.wanted(requests.add("x"), 96) == 5
    assert begin(requests, "a", 96, stored=6) == 80
    step = run(requests, "a", 80, 16, 96, pages(1, 96), fresh=True)
    assert [(m.start, m.stop, m.pages) for m in step.loads[0].moves] == [(0, 5, (1, 2, 3))]
    requests = table()
    assert begin(requests, "b", 200, computed=64, stored=12) == 128
    step = run(requests, "b", 192, 8, 200, pages(1, 200), fresh=True)
    assert [(m.start, m.stop, m.first_page, m.pages) for m in step.loads[0].moves] == [(4, 12, 2, (3, 4, 5, 6))]
    assert set(step.written) == {3, 4, 5, 6, 7}, "pages 1 and 2 are shared with others who may be saving them"


def test_an_engine_with_more_than_the_cache_has_saves_the_rest() -> None:
    requests = table()
    assert begin(requests, "a", 200, computed=128, stored=3) == 0
    step = run(requests, "a", 128, 72, 200, pages(1, 200), fresh=True)
    assert not step.loads
    assert [(m.start, m.stop) for m in step.saves[0].moves] == [(3, 12)]


def test_a_local_hit_inside_a_block_is_left_to_the_engine() -> None:
    requests = Requests(BLOCK, [8])
    row = requests.add("a")
    row.keys[0].extend(keys(6))
    assert requests.matched(row, 24, 6, 6) == 0


def test_what_rests_on_a_load_is_saved_when_every_rank_has_it() -> None:
    requests = table()
    assert begin(requests, "a", 200, stored=6) == 96
    first = run(requests, "a", 96, 104, 200, pages(1, 200), fresh=True)
    assert first.loads
    assert not first.saves
    requests.get("a").keys[0].append(b"k")
    assert not run(requests, "a", 200, 1, 201).saves, "the engine runs ahead of what it has heard"
    requests.proven(first.number)
    step = run(requests, "a", 201, 1, 202)
    assert [(m.start, m.stop) for m in step.saves[0].moves] == [(6, 12)]


def test_a_request_that_shares_a_page_with_a_load_waits_too() -> None:
    requests = table()
    begin(requests, "a", 100, stored=4, first=1)
    begin(requests, "b", 100, computed=64, stored=4, first=1)
    step = requests.step(
        [Scheduled("a", 64, 36, 100, pages(1, 100), True), Scheduled("b", 64, 36, 100, ([1, 2, 7, 8],), True)]
    )
    assert not step.saves
    assert requests.failed({1}) == 2
    requests.proven(step.number)
    assert requests.get("b").most == 0
    assert not run(requests, "b", 100, 1, 101).saves, "nothing of it is believed before it has been computed again"
    step = run(requests, "b", 0, 101, 101)
    assert [(m.start, m.stop) for m in step.saves[0].moves] == [(0, 6)]


def test_a_failed_load_is_never_answered_the_same_way() -> None:
    requests = table()
    answers = []
    for _ in range(20):
        row = requests.add("a")
        row.keys[0][:] = keys(12)
        wanted = requests.wanted(row, 200)
        found = requests.matched(row, 0, min(wanted, 12), min(wanted, 12))
        answers.append(found)
        if not found:
            break
        requests.allocated(row, pages(1, 200), found, [range(found // BLOCK)], later=True)
        requests.step([])
        requests.failed({max(1, found // PAGE)})
        requests.received("a")
    assert answers[-1] == 0
    assert answers == sorted(answers, reverse=True)
    assert len(set(answers)) == len(answers)


def test_a_failed_request_of_several_groups_is_computed() -> None:
    requests = table(2)
    row = requests.add("a")
    for each in row.keys:
        each.extend(keys(12))
    assert requests.matched(row, 0, 12, 12) == 192
    requests.allocated(row, [list(range(1, 8)), [0, 0, 0, 0, 14, 15, 16]], 192, [range(12), range(8, 12)], later=True)
    (load,) = requests.step([]).loads
    assert [(m.group, m.start, m.stop, m.pages) for m in load.moves] == [
        (0, 0, 12, (1, 2, 3, 4, 5, 6)),
        (1, 8, 12, (14, 15)),
    ]
    requests.failed_request("a")
    assert requests.wanted(row, 200) == 0


def test_pages_of_a_preempted_request_are_fenced_by_whoever_writes_them() -> None:
    requests = table()
    begin(requests, "a", 100, first=1)
    run(requests, "a", 0, 100, 100, pages(1, 100), fresh=True)
    begin(requests, "b", 64, first=2)
    step = run(requests, "b", 0, 64, 64, pages(2, 64), fresh=True)  # a was preempted in the same breath
    assert set(step.written) >= {2, 3}
    row = requests.get("a")
    assert requests.matched(row, 0, 6, 6) == 96, "back again: what it had saved is loaded"
    requests.allocated(row, pages(10, 101), 96, [range(6)], later=False)
    step = run(requests, "a", 96, 5, 101, pages(10, 101), fresh=True)
    assert step.loads[0].moves[0].pages == (10, 11, 12)
    assert not step.keys, "the worker has the keys from before"
    assert requests.finished("b", 65, 64, pages(2, 64)), "its save may still read them"


def test_a_finished_request_waits_for_its_saves() -> None:
    requests = table()
    begin(requests, "a", 100)
    run(requests, "a", 0, 100, 100, pages(1, 100), fresh=True)
    assert requests.finished("a", 101, 100, pages(1, 100))
    step = requests.step([])
    assert step.held == ["a"]
    assert not step.saves
    assert len(requests) == 0


def test_a_finished_request_with_nothing_under_way_is_dropped() -> None:
    requests = table()
    begin(requests, "a", 40, stored=2)
    run(requests, "a", 32, 8, 40, pages(1, 40), fresh=True)
    assert not requests.finished("a", 41, 40, pages(1, 40))
    assert requests.step([]).dropped == ["a"], "its keys were told for the load"
    begin(requests, "b", 10)
    assert not requests.finished("b", 11, 10, pages(1, 10))
    assert not requests.step([]).dropped
    assert not requests.finished("never", 1, 1, pages(1, 1))


def test_what_a_request_computed_on_a_load_is_saved_after_its_end() -> None:
    requests = table()
    begin(requests, "a", 200, stored=6)
    first = run(requests, "a", 96, 104, 200, pages(1, 200), fresh=True)
    assert requests.finished("a", 201, 200, pages(1, 200))
    assert not requests.step([]).held, "not before the load is known to be good"
    requests.proven(first.number)
    step = requests.step([])
    assert [(m.start, m.stop) for m in step.saves[0].moves] == [(6, 12)]
    assert step.held == ["a"]


def test_what_a_request_computed_on_a_failed_load_is_never_saved() -> None:
    requests = table()
    begin(requests, "a", 200, stored=6)
    first = run(requests, "a", 96, 104, 200, pages(1, 200), fresh=True)
    assert requests.finished("a", 201, 200, pages(1, 200))
    requests.failed({2})
    requests.proven(first.number)
    step = requests.step([])
    assert not step.saves
    assert step.held == ["a"]


def test_a_request_aborted_while_it_loads_waits_for_the_load_alone() -> None:
    requests = table()
    begin(requests, "a", 200, stored=6, later=True)
    assert requests.step([]).loads[0].later
    assert not requests.finished("a", 200, 96, pages(1, 200))
    assert requests.step([]).dropped == ["a"]


def test_a_request_aborted_after_its_preemption_saves_nothing() -> None:
    requests = table()
    begin(requests, "a", 100)
    requests.get("a").keys[0].extend(keys(4, 6))
    run(requests, "a", 0, 64, 100, pages(1, 100), fresh=True)
    assert requests.finished("a", 100, 0, ([],))
    step = requests.step([])
    assert not step.saves
    assert step.held == ["a"]


@pytest.mark.parametrize("drafts", [0, 3])
def test_drafted_tokens_are_not_saved(drafts: int) -> None:
    requests = table()
    begin(requests, "a", 95)
    requests.get("a").keys[0].extend(keys(4, 6))
    step = run(requests, "a", 0, 95, 95, pages(1, 95), fresh=True)
    assert step.saves[0].moves[0].stop == 5
    step = run(requests, "a", 95, 1 + drafts, 96)
    assert step.saves[0].moves[0].stop == 6, "the block of 96 tokens that are known"
    assert requests.finished("a", 97 + drafts, 96 + drafts, pages(1, 100))
    assert not requests.step([]).saves


def test_a_prompt_in_chunks_is_saved_chunk_by_chunk() -> None:
    requests = table()
    begin(requests, "a", 300)
    seen = []
    requests.get("a").keys[0].extend(keys(4, 19))
    for computed in range(0, 300, 70):
        fresh = computed == 0
        count = min(70, 300 - computed)
        step = run(requests, "a", computed, count, 300, pages(1, 300) if fresh else None, fresh)
        seen += [(m.start, m.stop) for order in step.saves for m in order.moves]
    assert seen == [(0, 4), (4, 8), (8, 13), (13, 17), (17, 18)]
