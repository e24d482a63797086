"""Table: what vLLM's scheduler and this connector have told each other about requests. Pure: it knows neither vLLM nor
the cache, asks nobody and waits for nothing; what it decides is a value (Step) that workers carry out.

Blocks are counted in the cache's own block tokens, pages are the engine's; item g of every tuple belongs to group g of
layers (see vllm_layout.Group). Rules that it keeps, each of which was somebody's bug before:

- A load that failed is never answered with the same blocks again (`most`), or the engine asks for ever.
- Nothing that was computed on top of a load is saved before every rank has said that the load came through: the engine
  learns of a failed load after the step that used it.
- Pages that the engine is about to write (`Step.written`) are named in the very step in which it does, whatever freed
  them: preemption, a finished or aborted request, a window that has moved on.
- What was computed on a failed load is not believed, whoever finds it in the engine's own prefix cache afterwards
  (vLLM leaves it there), until it has been computed again.
- What is not known to be true of a token is not saved: tokens that were drafted, or are still in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

BLOCKS_MAX = 1 << 40


@dataclass(frozen=True, slots=True)
class Move:
    """Blocks of one group of a request, and the pages that hold them: pages[0] is page `first_page` of the request."""

    group: int
    start: int
    stop: int
    first_page: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker does for a request in one step: loads or saves."""

    request: str
    moves: tuple[Move, ...]
    later: bool = False
    """A load that the step does not wait for."""
    deadline_s: float = 0.0
    """A load is given up after this; 0: the connector's own deadline."""


@dataclass(slots=True)
class Step:
    """Everything that workers must know of one step of the engine. Plain values: it travels between processes."""

    number: int
    keys: list[tuple[str, int, int, tuple[bytes, ...]]] = field(default_factory=list)
    """(request, group, index of the first, keys): what workers have not been told yet."""
    loads: list[Order] = field(default_factory=list)
    saves: list[Order] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    """Pages that this step may write: what still reads them must be over first."""
    held: list[str] = field(default_factory=list)
    """Finished requests whose pages wait for the worker's word."""
    dropped: list[str] = field(default_factory=list)
    """Requests that will not be heard of again."""
    idle: bool = False
    """The engine computes nothing in it: it only waits."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What the engine runs of a request in a step. Counts are tokens."""

    request: str
    computed: int
    """Whose KV is there before the step."""
    scheduled: int
    known: int
    """Whose ids are known for certain (no drafts)."""
    pages: tuple[list[int], ...] | None = None
    """New pages, or all of them where `fresh`."""
    fresh: bool = False
    """New in the batch, or back after a preemption."""


@dataclass(slots=True)
class Request:
    """One request. Counts are blocks unless they say otherwise."""

    name: str
    keys: list[list[bytes]]
    pages: list[list[int]]
    told: list[int]
    """Keys that workers have, by group."""
    saved: int = 0
    """Leading blocks that are stored, or on their way."""
    most: int = BLOCKS_MAX
    """Leading blocks that may still be loaded: those behind it failed."""
    own_page: int = 0
    """Pages from here on are not shared with other requests when the request enters the batch."""
    asked: int = 0
    """Tokens that the engine had itself when it last asked."""
    load: Order | None = None
    receiving: bool = False
    reach: int = 0
    """Tokens whose KV is there after the last step."""
    doubt: int = -1
    """Tokens from which on everything has to be computed again, after a failed load; -1: none."""
    saves: int = 0
    """Orders to save so far."""
    final: int = -1
    """Once finished: the blocks that are worth saving."""


class Requests:
    """See the module. One thread: the scheduler's."""

    def __init__(self, block_tokens: int, page_tokens: Sequence[int]) -> None:
        """`page_tokens[g]`: tokens of a page of group g."""
        self.block_tokens = block_tokens
        self.page_tokens = tuple(page_tokens)
        self._rows: dict[str, Request] = {}
        self._ending: dict[str, Request] = {}
        self._unproven: dict[int, set[int]] = {}
        self._lists: dict[int, list[list[int]]] = {}
        """Page lists (of group 0) of what ran in steps whose loads have not come through, as they were then."""
        self.suspect: set[int] = set()
        """Pages (of group 0) that hold what was computed on a failed load."""
        self._loads: list[Request] = []
        self._dropped: list[str] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._rows) + len(self._ending)

    def get(self, name: str) -> Request | None:
        """A request that is neither finished nor unknown."""
        return self._rows.get(name)

    def add(self, name: str) -> Request:
        """A request that is new, or known already."""
        groups = len(self.page_tokens)
        empty = Request(name, [[] for _ in range(groups)], [[] for _ in range(groups)], [0] * groups)
        return self._rows.setdefault(name, empty)

    # -- matching and loading ------------------------------------------------------------------------------------------

    def wanted(self, row: Request, tokens: int) -> int:
        """Blocks worth asking for of a request of `tokens` tokens: the last token is computed in any case."""
        return max(0, min((tokens - 1) // self.block_tokens, row.most))

    def matched(self, row: Request, computed: int, usable: int, stored: int) -> int:
        """Tokens that the engine can have beyond the `computed` ones that it has itself.

        `usable`: leading blocks that a load can bring (with all groups' rules); `stored`: those that need no saving.
        """
        row.asked, row.own_page = computed, computed // self.page_tokens[0]
        row.saved = stored
        if computed % self.block_tokens:
            return 0
        return max(0, min(usable, row.most) * self.block_tokens - computed)

    def allocated(
        self,
        row: Request,
        pages: Sequence[Sequence[int]],
        tokens: int,
        ranges: Sequence[range],
        *,
        later: bool,
        deadline_s: float = 0.0,
    ) -> None:
        """The engine has pages for the request, and takes `tokens` tokens of what was matched (0: nothing).

        `ranges[g]`: the blocks that group g needs for that; what the engine has itself is left out here."""
        row.pages = [list(each) for each in pages]
        if tokens <= 0:
            return
        first, stop = row.asked // self.block_tokens, -(-(row.asked + tokens) // self.block_tokens)
        spans = [range(max(each.start, first), min(each.stop, stop)) for each in ranges]
        moves = tuple(self._move(row, group, span) for group, span in enumerate(spans) if span)
        row.load = Order(row.name, moves, later, deadline_s)
        row.receiving = later
        self._loads.append(row)

    def _move(self, row: Request, group: int, blocks: range) -> Move:
        size = self.page_tokens[group]
        first, last = blocks.start * self.block_tokens // size, -(-blocks.stop * self.block_tokens // size)
        return Move(group, blocks.start, blocks.stop, first, tuple(row.pages[group][first:last]))

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, scheduled: Iterable[Scheduled]) -> Step:
        """Orders for the step that the engine has just planned. Keys must have been extended to what it computes."""
        self._number += 1
        step = Step(self._number, dropped=self._dropped)
        self._dropped = []
        for row in self._loads:
            if row.load is not None:
                self._begin_load(step, row, row.load)
        self._loads.clear()
        rows = [(one, self._rows[one.request]) for one in scheduled if one.request in self._rows]
        for one, row in rows:
            self._advance(step, one, row)
        if self._unproven:
            self._lists[step.number] = [row.pages[0] for _, row in rows]
        for _, row in rows:
            self._save(step, row, min(row.reach // self.block_tokens, len(row.keys[0])))
        for row in list(self._ending.values()):
            if row.final > row.saved and self._is_unproven(row):
                continue
            self._save(step, row, row.final)
            step.held.append(row.name)
            del self._ending[row.name]
        return step

    def _begin_load(self, step: Step, row: Request, load: Order) -> None:
        row.load = None
        self._tell(step, row, [move.stop for move in load.moves], [move.group for move in load.moves])
        step.loads.append(load)
        pages = {page for move in load.moves for page in move.pages}
        step.written.extend(pages)
        if not load.later:
            self._unproven[step.number] = self._unproven.get(step.number, set()) | pages

    def _advance(self, step: Step, one: Scheduled, row: Request) -> None:
        row.receiving = False
        if one.computed <= row.doubt:
            row.doubt = -1
        if one.fresh and one.pages is not None:
            row.pages = [list(each) for each in one.pages]
            new = [pages[row.own_page :] for pages in row.pages]
        else:
            new = [list(each) for each in one.pages or ()]
            for mine, more in zip(row.pages, new):
                mine.extend(more)
        step.written.extend(page for pages in new for page in pages)
        row.reach = min(one.computed + one.scheduled, one.known)
        if self.suspect:
            self._clear(row, one.computed, new[0] if new else [])

    def _clear(self, row: Request, computed: int, new: list[int]) -> None:
        """Pages that the request has for itself, or computes again from their first token on, are as good as what they
        rest on."""
        self.suspect.difference_update(new)
        size, pages = self.page_tokens[0], row.pages[0]
        again = range(-(-computed // size), row.reach // size)
        if self.suspect.isdisjoint(pages[: again.start]):
            self.suspect.difference_update(pages[again.start : again.stop])
        else:
            self.suspect.update(pages[again.start :])

    def _save(self, step: Step, row: Request, stop: int) -> None:
        if stop <= row.saved or self._is_suspect(row) or self._is_unproven(row):
            return
        groups = range(len(row.pages))
        moves = tuple(self._move(row, group, range(row.saved, stop)) for group in groups)
        self._tell(step, row, [stop] * len(groups), groups)
        step.saves.append(Order(row.name, moves))
        row.saved = stop
        row.saves += 1

    def _tell(self, step: Step, row: Request, stops: Sequence[int], groups: Iterable[int]) -> None:
        for group, stop in zip(groups, stops):
            told = row.told[group]
            if stop > told:
                step.keys.append((row.name, group, told, tuple(row.keys[group][told:stop])))
                row.told[group] = stop

    def _is_unproven(self, row: Request) -> bool:
        """Whether anything of the request rests on a load that has not come through on all ranks yet."""
        loads = self._unproven.values()
        return any(not pages.isdisjoint(mine) for pages in loads for mine in row.pages) if loads else False

    def _is_suspect(self, row: Request) -> bool:
        """Whether anything of the request rests on a load that has failed."""
        if row.doubt >= 0 or not self.suspect:
            return row.doubt >= 0
        # What its last page has, if that is not full, the request has computed itself.
        return not self.suspect.isdisjoint(row.pages[0][: row.reach // self.page_tokens[0]])

    # -- what workers say ----------------------------------------------------------------------------------------------

    def proven(self, number: int) -> None:
        """The loads of all steps up to `number` are over on every rank; call it after `failed`."""
        for steps in (self._unproven, self._lists):
            for each in [one for one in steps if one <= number]:
                del steps[each]

    def failed(self, pages: set[int]) -> int:
        """Loads into these pages (of group 0) failed. Returns how many requests that concerns: all that have them."""
        concerned = 0
        for listed in [one for lists in self._lists.values() for one in lists]:
            first = next((i for i, page in enumerate(listed) if page in pages), len(listed))
            self.suspect.update(listed[first:])
        for row in [*self._rows.values(), *self._ending.values()]:
            bad = next((i for i, page in enumerate(row.pages[0]) if page in pages), None)
            if bad is not None:
                concerned += 1
                self.suspect.update(row.pages[0][bad:])
                self._cut(row, bad * self.page_tokens[0] // self.block_tokens)
        return concerned

    def failed_request(self, name: str) -> None:
        """A load of several groups failed: nothing of it is believed."""
        row = self._rows.get(name)
        if row is not None:
            self._cut(row, row.asked // self.block_tokens)

    def received(self, name: str) -> None:
        """A load that no step waited for is over."""
        row = self._rows.get(name)
        if row is not None:
            row.receiving = False

    def _cut(self, row: Request, blocks: int) -> None:
        row.most, row.saved = min(row.most, blocks), min(row.saved, blocks)
        row.reach = row.doubt = min(row.reach, blocks * self.block_tokens)
        row.final = min(row.final, blocks)

    def forget(self) -> None:
        """No request that is known now is loaded or saved any more."""
        for row in self._rows.values():
            self._dropped.extend([row.name] if any(row.told) else [])
        self._rows.clear()
        self._loads.clear()

    def finished(self, name: str, known: int, computed: int, pages: Sequence[Sequence[int]]) -> bool:
        """A request is over, done or aborted. True: its pages must wait until the workers say so.

        Tokens: `known` ids (the last one's KV is not there), `computed` KV (0: the request has lost its pages). Keys
        must have been extended to what is known.
        """
        row = self._rows.pop(name, None)
        if row is None:
            return False
        if row.receiving:  # its pages wait for the load in any case
            row.load = None
            self._dropped.append(name)
            return False
        row.final = min(min(row.reach, known - 1, computed) // self.block_tokens, len(row.keys[0]))
        if row.final > row.saved:
            row.pages = [list(each) for each in pages]
        if not row.saves and row.final <= row.saved:
            self._dropped.extend([name] if any(row.told) else [])
            return False
        self._ending[name] = row
        return True
