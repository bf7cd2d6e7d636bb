"""The queue of samples that are not running: by priority, first come first served, by default nobody for ever."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator

from torch_paged.serving.requests import Sample


class WaitingQueue:
    """Samples in the order of their keys, the least first. They keep their keys for life.

    A key is `(arrival - priority * patience, ...)`: one more in priority counts as if a request had come `patience`
    requests earlier. So a sample waits only for a bounded number of those that came later, and of two that run, the
    one with the greater key gives way.

        patience 100:  request 7 of priority 0 -> 7, request 60 of priority 1 -> -40, request 300 of priority 1 -> 200

    Where patience is infinite a key is `(-priority, ...)`, and there is no such bound.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._arrivals = itertools.count()
        self._heap: list[tuple[tuple[float, int, int], Sample]] = []
        self._gone: set[Sample] = set()

    def __len__(self) -> int:
        return len(self._heap) - len(self._gone)

    def give_keys(self, samples: list[Sample]) -> None:
        """Keys for the samples of one request, on arrival."""
        arrival = next(self._arrivals)
        for sample in samples:
            priority = sample.generation.request.priority
            rank = -priority if self._patience == math.inf else arrival - priority * self._patience
            sample.key = (rank, arrival, sample.index)

    def push(self, sample: Sample) -> None:
        heapq.heappush(self._heap, (sample.key, sample))

    def remove(self, sample: Sample) -> None:
        """Take out a sample that is in the queue."""
        self._gone.add(sample)
        self._drop_gone()

    def head(self) -> Sample | None:
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sample:
        """Take out the head."""
        _, sample = heapq.heappop(self._heap)
        self._drop_gone()
        return sample

    def _drop_gone(self) -> None:
        while self._heap and self._heap[0][1] in self._gone:
            self._gone.discard(heapq.heappop(self._heap)[1])

    def __iter__(self) -> Iterator[Sample]:
        return (sample for _, sample in self._heap if sample not in self._gone)
