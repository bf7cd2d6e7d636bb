"""Who has a place in the cache: letting samples in, parting forks, and giving way when blocks run out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_paged.memory import OutOfBlocks
from torch_paged.serving.requests import Sample
from torch_paged.serving.waiting import WaitingQueue
from torch_paged.serving.writers import Writers

Blocks = NDArray[np.int64]  # of each group of layers
_FAILED_SWAP = (RuntimeError, MemoryError)  # of a device, of the blocks, of the host's memory


class Residents:
    """The running samples, and the queue of those that are not: without blocks, or with theirs in host memory.

        waiting --admit--> running --release--> finished
           ^                  |
           +----- preempt ----+        "recompute": without blocks; "swap": its blocks go to host memory

    A sample's `state` says where it is: "waiting" (in the queue; swapped if it has a `seq`), "running", "forking" (its
    leader has yet to read the prompt) or "finished".

    Attributes:
        queue: of those that wait.
        writers: the running samples that decode, as far as `parts` has looked.
        preemptions: how often a running sample gave way.
        changed: whether `parts` has to look at the running samples again: some have come, or have read all they had to,
            or a step has drawn the last token of some.
    """

    def __init__(
        self, cache: Any, policy: str, max_running: int, chunk: int, watermark: float, patience: float
    ) -> None:
        self.queue = WaitingQueue(patience)
        self.preemptions = 0
        self.changed = False
        self.writers = Writers.of([])
        self._others: list[Sample] = []  # the other running ones
        self._readers: list[Sample] = []  # of these, see `parts`
        self._cache = cache
        self._block_size: int = cache.block_size
        self._policy = policy
        self._max_running = max_running
        self._sizes = np.array([group.num_blocks for group in cache.groups])
        self._reserve = np.ceil(watermark * self._sizes).astype(int)  # blocks that admission leaves free
        # Blocks that a sample holds at most: those of its window, and of a chunk of so many tokens that it reads.
        self._most = np.array(
            [
                np.iinfo(np.int64).max if window is None else (window + chunk) // self._block_size + 3
                for window in (group.sliding_window for group in cache.groups)
            ]
        )
        self._nothing = np.zeros_like(self._sizes)
        self._unlimited = np.full_like(self._sizes, np.iinfo(np.int64).max // 2)
        self._running_rows = 0  # of the cache, those of forks to come included
        self._swapped_rows = 0
        self._refused: tuple[Sample, Blocks] | None = None  # who did not fit last, and the room that there was
        self._crowded = False  # since one gave way, none has ended: who is let in would be the next to give way

    @property
    def running(self) -> list[Sample]:
        """In no order."""
        return [*self.writers.samples, *self._others]

    def parts(self) -> tuple[Writers, list[Sample]]:
        """The running samples that decode, and those that have something of their prompts to read, the least key first.

        Who draws its last token, on the device, belongs to neither.
        """
        if self.changed:
            self.changed = False
            leaving = self.writers.at_limit(self.writers.steps)
            joining = [sample for sample in self._others if sample.decodes]
            self._others = [sample for sample in self._others if not sample.decodes]
            self._others += [self.writers.samples[place] for place in leaving]
            self.writers = self.writers.followed_by(leaving, joining)
            readers = [sample for sample in self._others if sample.forks or sample.cached + 1 < len(sample.tokens)]
            self._readers = sorted(readers, key=lambda sample: sample.key)
        return self.writers, self._readers

    def start_over(self) -> None:
        """A step was undone: `parts` has to look at everybody again."""
        self._others = self.running
        self.writers = Writers.of([])
        self.changed = True

    def blocks(self, tokens: Any, cached: int = 0) -> Blocks:
        """Blocks of each group of layers that so many tokens take at most, on top of those `cached`.

        `tokens`: an int, or an array [n, 1] of them.
        """
        full = -(-tokens // self._block_size) - -(-cached // self._block_size)
        blocks: Blocks = np.minimum(full, self._most)
        return blocks

    def shortage(self, tokens: int) -> str | None:
        """Why so many tokens do not fit even into an empty cache; None if they do."""
        needed = self.blocks(tokens)
        for group in np.flatnonzero(needed > self._sizes):
            where = f" in groups[{group}]" if group else ""
            return f"prompt and new tokens take {needed[group]} blocks{where}, the cache has {self._sizes[group]}"
        return None

    def admit(self, outstanding: Blocks, in_flight: bool) -> tuple[list[Sample], Blocks]:
        """Let the head of the queue in if there is room.

        Args:
            outstanding: blocks of each group that others let in before have yet to take.
            in_flight: whether open steps may still hold blocks of finished samples.

        Returns:
            It and its forks, if they have parted already, and the blocks that they have yet to take; nobody and 0
            where there is no room.

        Raises:
            ValueError: nothing runs, and others hold all rows of the cache.
        """
        head, nothing = self.queue.head(), self._nothing
        if head is None or (self._crowded and self.running) or not self._has_rows(head):
            return [], nothing
        room = self._room(head) - outstanding
        if self._refused is not None and self._refused[0] is head and (room <= self._refused[1]).all():
            return [], nothing
        needed = self._swap_in(head, room, in_flight) if head.seq >= 0 else self._add(head, room, in_flight)
        if needed is None:
            return [], nothing
        self.queue.pop()
        head.state = "running"
        self._running_rows += _rows(head)
        self._others.append(head)
        self.changed = True
        return [head, *self.part_forks(head)], needed

    def look_again(self) -> None:
        """Prompts were read: whoever did not fit may share their blocks."""
        self._refused = None

    def _room(self, head: Sample) -> Blocks:
        """Blocks of each group that admission may give to the head of the queue."""
        if not self.running:
            return self._unlimited  # what does not fit even so fits never
        if self._policy == "wait":
            promised = self.blocks(self.writers.limits[:, None] - 1).sum(axis=0)
            promised = promised + sum(map(self._most_blocks, [*self._others, head]))
            return self._unlimited if (promised <= self._sizes - self._reserve).all() else -self._unlimited
        room: Blocks = np.array([group.num_free_blocks for group in self._cache.groups]) - self._reserve
        return room

    def _has_rows(self, head: Sample) -> bool:
        """Whether one more can run. If only swapped samples stand in the way, the last of them give up their rows."""
        rows = _rows(head)
        if self._running_rows + rows > self._max_running:
            return False
        lacking = self._running_rows + self._swapped_rows + rows - self._cache.max_seqs
        if head.seq >= 0 or lacking <= 0:
            return True
        if self.running:
            return False
        swapped = sorted((sample for sample in self.queue if sample.seq >= 0), key=lambda sample: sample.key)
        self.release(swapped[-lacking:])
        return True

    def _add(self, head: Sample, room: Blocks, in_flight: bool) -> Blocks | None:
        """Give a sample a new sequence; the blocks that it needs on top of its cached prefix."""
        try:
            seq = self._cache.add(head.tokens, head.generation.request.namespace)
        except ValueError:  # others have taken the cache's rows
            if self.running or in_flight:
                return None
            raise
        cached: int = self._cache.length(seq)
        needed = self.blocks(head.length, cached) + len(head.forks)
        if (needed > room).any():
            self._cache.free(seq)
            self._refused = head, room
            return None
        head.seq, head.cached = seq, cached
        return needed

    def _swap_in(self, head: Sample, room: Blocks, in_flight: bool) -> Blocks | None:
        if (self.blocks(head.length) > room).any():
            return None
        try:
            self._cache.swap_in([head.seq])
        except _FAILED_SWAP as error:
            if isinstance(error, OutOfBlocks) and (self.running or in_flight):
                return None
            self.release([head])  # its tokens are known: it reads them again
            return self._add(head, room, in_flight)
        self._swapped_rows -= _rows(head)
        return np.full_like(self._sizes, 1 + len(head.forks))

    def _most_blocks(self, sample: Sample) -> Blocks:
        """Blocks of each group that a sample and its forks may come to hold."""
        return self.blocks(sample.limit - 1) * _rows(sample)

    def part_forks(self, sample: Sample) -> list[Sample]:
        """The forks of a sample whose prompt is in the cache but for its last token: they run from now on."""
        if not sample.forks or sample.unread > 0:
            return []
        forks, sample.forks = sample.forks, []
        self.changed = True
        try:
            seqs = self._cache.fork(sample.seq, len(forks))
        except ValueError:  # others have taken the cache's rows
            for fork in forks:  # each reads the prompt alone, then
                fork.state = "waiting"
                self.queue.push(fork)
            self._running_rows -= len(forks)
            return []
        for fork, seq in zip(forks, seqs, strict=True):
            fork.seq, fork.cached, fork.state = seq, sample.cached, "running"
        self._others += forks
        return forks

    def make_room(self, shortage: OutOfBlocks) -> Sample | None:
        """With nothing in flight, the running samples with the greatest keys give way. One that runs alone cannot:
        it is returned."""
        oldest, *others = sorted(self.running, key=lambda sample: sample.key)
        if not others:
            return oldest
        victims, missing = [], shortage.needed - shortage.free
        while others and missing > 0:
            victims.append(others.pop())
            missing -= int(self.blocks(victims[-1].length)[shortage.group])
        self._preempt(victims)
        return None

    def _preempt(self, victims: list[Sample]) -> None:
        self.preemptions += len(victims)
        self._crowded = True
        # Samples of one request leave together, so that what they share is moved once.
        for _, group in itertools.groupby(victims, key=lambda sample: sample.generation):
            samples = list(group)
            if not (self._policy == "swap" and self._swap_out(samples)):
                self.release(samples)
        for sample in victims:
            sample.state = "waiting"
            self.queue.push(sample)
        self._forget_gone()

    def _swap_out(self, samples: list[Sample]) -> bool:
        """Move running samples to host memory. False: that failed, and nothing has changed."""
        try:
            self._cache.swap_out([sample.seq for sample in samples])
        except _FAILED_SWAP:
            return False
        rows = sum(map(_rows, samples))
        self._running_rows -= rows
        self._swapped_rows += rows
        return True

    def release(self, samples: Iterable[Sample]) -> None:
        """Take the sequences of running and swapped samples from them."""
        held = [sample for sample in samples if sample.seq >= 0]
        if not held:
            return
        self._cache.free([sample.seq for sample in held])
        for sample in held:
            if sample.state == "running":
                self._running_rows -= _rows(sample)
            else:
                self._swapped_rows -= _rows(sample)
            sample.seq, sample.cached = -1, 0

    def end(self, samples: list[Sample]) -> None:
        """Forget samples for good, wherever they are."""
        for sample in samples:
            if sample.state == "waiting":
                self.queue.remove(sample)
        self.release(samples)
        self._crowded = False
        for sample in samples:
            sample.state = "finished"
        self._forget_gone()

    def _forget_gone(self) -> None:
        gone = [place for place, sample in enumerate(self.writers.samples) if sample.state != "running"]
        if gone:
            self.writers = self.writers.followed_by(gone, [])
        self._others = [sample for sample in self._others if sample.state == "running"]
        self._readers = [sample for sample in self._readers if sample.state == "running"]


def _rows(sample: Sample) -> int:
    """Rows of the cache that a sample takes, those of its forks to come included."""
    return 1 + len(sample.forks)
