"""The scheduler: who takes part in the next step, and what comes of it. No torch in here."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from torch_paged.memory import OutOfBlocks
from torch_paged.memory.arrays import as_integer
from torch_paged.serving.plan import Chunk, Plan
from torch_paged.serving.requests import Generation, Sample, TokenLogprobs, as_real
from torch_paged.serving.residents import Residents
from torch_paged.serving.writers import Writers

POLICIES = ("wait", "recompute", "swap")


class Load(NamedTuple):
    """What the scheduler has on its hands.

    Attributes:
        running: samples that take part in steps.
        waiting: samples without a place in the cache, for the first time or again; forks of a prompt that is yet to
            be read count with it.
        swapped: samples whose blocks lie in host memory.
        preemptions: how often a running sample gave way, so far.
    """

    running: int
    waiting: int
    swapped: int
    preemptions: int


class Scheduler:
    """Continuous batching over a PagedKVCache, within a budget of tokens a step.

    A step takes one token of every running sample that writes, then chunks of the prompts of those that read, then
    of those that it lets in from the queue. A plan is opened by `schedule`, and ended by `complete` or `undo`; the
    next one may be scheduled before the last one's results are known, as lengths need no tokens.

    Where a step does not fit into the free blocks and nothing is in flight, the running samples with the greatest
    keys (see WaitingQueue) give way, as many as it takes; the least key never does, so it comes to its end. A sample
    that does not fit alone fails, and the others go on.

    Args:
        cache: a PagedKVCache, or whatever has its methods.
        token_budget: tokens a step, at most.
        max_running: samples that run at the same time, at most; None: as many as cache and budget allow.
        policy: "wait": a sample is let in when all that the running ones may come to need is there, so that none has
            to give way. "recompute" and "swap": when what it needs now is there; one that gives way later reads its
            tokens again, or has its blocks kept in host memory.
        watermark: share of the blocks of each group of layers that admission leaves free, 0 to 1, unless nothing else
            runs.
        patience: how many later requests of a priority higher by one may go first; `math.inf`: all of any higher
            priority, so that the others may wait for ever.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of another type.
    """

    def __init__(
        self,
        cache: Any,
        *,
        token_budget: int = 512,
        max_running: int | None = None,
        policy: str = "recompute",
        watermark: float = 0.02,
        patience: float = 1000.0,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        token_budget = as_integer("token_budget", token_budget, at_least=1)
        if max_running is not None:
            max_running = as_integer("max_running", max_running, at_least=1)
        watermark, patience = as_real("watermark", watermark), as_real("patience", patience)
        if not 0 <= watermark < 1:
            raise ValueError(f"watermark must lie in [0, 1), got {watermark}")
        if not patience >= 0:
            raise ValueError(f"patience must be at least 0, got {patience}")
        self.open_plans: deque[Plan] = deque()
        self._name = object()  # by which generations know it, and keep no cache alive
        self._cache = cache
        self._budget = token_budget
        self._max_running = min(max_running or cache.max_seqs, cache.max_seqs, token_budget)
        self._residents = Residents(cache, policy, self._max_running, token_budget, watermark, patience)

    @property
    def load(self) -> Load:
        residents = self._residents
        swapped = sum(sample.seq >= 0 for sample in residents.queue)
        return Load(len(residents.running), len(residents.queue) - swapped, swapped, residents.preemptions)

    @property
    def busy(self) -> bool:
        """Whether something is left to do."""
        return bool(self._residents.running or self.open_plans or len(self._residents.queue))

    def submit(self, generation: Generation) -> None:
        """Queue a request. One that could never run is finished at once, with its error."""
        generation.owner = self._name
        leader, *forks = generation.samples
        leader.forks = forks
        error = self._why_never(leader)
        if error is not None:
            self.finish([leader], "error", error)
            return
        self._residents.queue.give_keys(generation.samples)
        for sample in forks:
            sample.state = "forking"
        leader.state = "waiting"
        self._residents.queue.push(leader)

    def _why_never(self, sample: Sample) -> ValueError | None:
        cached = sample.limit - 1  # the last token is written, never read
        if cached > self._cache.max_seq_len:
            return ValueError(f"prompt and new tokens take {cached} places, max_seq_len is {self._cache.max_seq_len}")
        shortage = self._residents.shortage(cached)
        if shortage is not None:
            return ValueError(shortage)
        if 1 + len(sample.forks) > self._max_running:
            return ValueError(f"{1 + len(sample.forks)} samples cannot run at once, {self._max_running} can")
        return None

    def cancel(self, generation: Generation) -> None:
        """End what has not ended of a request, whatever it is at. Its blocks are free once no open step reads them.

        Raises:
            ValueError: the request was not submitted here.
        """
        if generation.owner is not self._name:
            raise ValueError("the generation was not submitted here, and can be cancelled where it was alone")
        self.finish(generation.samples, "cancelled")

    def finish(self, samples: Iterable[Sample], reason: str, error: BaseException | None = None) -> None:
        """End samples, with the forks that have not parted from them. Those that have ended before stay as they are."""
        samples = [each for sample in samples for each in (sample, *sample.forks)]
        ending = [sample for sample in dict.fromkeys(samples) if sample.finish_reason is None]
        for sample in ending:
            sample.end(reason, error)
        if ending:
            self._residents.end(ending)
            for plan in self.open_plans:
                plan.writers.whole &= plan.writers is self._residents.writers

    def fail(self, error: BaseException) -> None:
        """End everything with an error."""
        self.finish([*self._residents.running, *self._residents.queue], "error", error)

    def schedule(self) -> Plan | None:
        """Open the next step. None: there is nothing to do before the open ones end, or nothing at all."""
        gave_way = False
        while True:
            writers, chunks = self._select(admit=not gave_way)
            if not (writers or chunks):
                return None
            try:
                batch = self._prepare(writers, chunks)
            except OutOfBlocks as shortage:
                if self.open_plans:
                    return None  # their ends free blocks perhaps, and nobody gives way while in flight
                self._make_room(shortage)
                gave_way = True
                continue
            plan = Plan(batch, writers, chunks)
            self.open_plans.append(plan)
            if plan.changes_writers:
                self._residents.changed = True
            return plan

    def _select(self, admit: bool) -> tuple[Writers, list[Chunk]]:
        """Who takes part: as in Plan."""
        residents = self._residents
        writers, readers = residents.parts()
        chunks: list[Chunk] = []
        budget = self._budget - len(writers)
        outstanding = residents.blocks(0)
        for sample in readers:
            budget = _take(sample, budget, chunks)
            outstanding = outstanding + residents.blocks(sample.length, sample.cached)
        while admit and budget > 0 and len(residents.queue):
            admitted, needed = residents.admit(outstanding, bool(self.open_plans))
            if not admitted:
                break
            outstanding = outstanding + needed
            for sample in admitted:
                budget = _take(sample, budget, chunks)
        return writers, chunks

    def _prepare(self, writers: Writers, chunks: list[Chunk]) -> Any:
        if not chunks:
            return self._cache.prepare(writers.seqs, 1)
        seqs = [chunk.sample.seq for chunk in chunks]
        counts = [chunk.size for chunk in chunks]
        return self._cache.prepare(
            np.concatenate([writers.seqs, np.array(seqs)]),
            np.concatenate([np.ones(len(writers), dtype=np.int64), np.array(counts)]),
        )

    def _make_room(self, shortage: OutOfBlocks) -> None:
        alone = self._residents.make_room(shortage)
        if alone is not None:
            error = RuntimeError(f"a sample of {alone.length} tokens does not fit into the cache alone: {shortage}")
            self.finish([alone], "error", error)

    def undo(self, plan: Plan) -> None:
        """Roll back the newest open plan, after the model raised for instance: its samples are as before it."""
        self._cache.rollback(plan.batch)
        self.open_plans.pop()
        plan.undo()
        self._residents.start_over()

    def complete(self, plan: Plan, drawn: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None) -> None:
        """End the oldest open plan: whoever has read all gets the token that was drawn.

        Args:
            plan: the oldest of the open ones.
            drawn: a token for each sample of the plan.
            logprobs: of each, where one of them asked for it.
        """
        self._cache.commit(plan.batch, plan.tokens())  # what is unknown still was read for samples that have ended
        self.open_plans.popleft()
        for reason, samples in plan.write(drawn, logprobs).items():
            self.finish(samples, reason)
        if plan.chunks:
            self._residents.look_again()
        for sample, _, _, _ in plan.chunks:
            if sample.finish_reason is None:
                self._residents.part_forks(sample)


def _take(sample: Sample, budget: int, chunks: list[Chunk]) -> int:
    """Let a sample read as much as the budget allows of what it has not read; what is left of the budget."""
    count = min(sample.unread, budget)
    if count > 0:
        chunks.append(Chunk(sample, sample.cached, count, count == sample.length - sample.cached))
        budget -= count
    return budget
