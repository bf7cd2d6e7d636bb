"""Tokens on their way to the prefix cache: the host never waits for a GPU to learn them."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_paged.memory import MemoryManager, Step, history
from torch_paged.memory.arrays import Ints, as_integers

# Numbers on a GPU are not looked at before they are taken: their type must say that they fit, and uint64 does not.
_WITHIN_INT64 = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint16, torch.uint8)


class _Entry(NamedTuple):
    step: Step
    advanced: int
    tokens: Ints | Tensor
    arrived: torch.cuda.Event | None


class TokenFeed:
    """Hands the tokens of committed steps to the memory manager, in order, as soon as they are on the host.

    Those on a GPU are copied there behind the work already queued, and looked at when the copy has been made.
    """

    def __init__(self, memory: MemoryManager) -> None:
        self._memory = memory
        self._entries: deque[_Entry] = deque()

    def fetch(self, tokens: Any) -> tuple[Ints | Tensor, torch.cuda.Event | None]:
        """Tokens that `put` takes and `deliver` can hand over. Raises TypeError, ValueError."""
        if not (isinstance(tokens, Tensor) and tokens.is_cuda):
            return as_integers("tokens", tokens), None
        if tokens.dim() != 1:
            raise ValueError(f"tokens must be flat: [n] integers, got shape {list(tokens.shape)}")
        if tokens.dtype not in _WITHIN_INT64 and len(tokens):  # of nothing, torch.tensor([]) makes float32
            raise TypeError(f"tokens on a GPU must be integers that int64 can hold, got {tokens.dtype}")
        with torch.cuda.device(tokens.device):
            copy = tokens.to("cpu", non_blocking=True)  # pinned
            arrived = torch.cuda.Event()
            arrived.record()
        return copy, arrived

    def put(self, step: Step, advanced: int, tokens: Ints | Tensor, arrived: torch.cuda.Event | None) -> None:
        """Take the tokens of a step just committed."""
        self._entries.append(_Entry(step, advanced, tokens, arrived))
        self.deliver()

    def deliver(self) -> None:
        """Hand over what has arrived."""
        while self._entries and ((event := self._entries[0].arrived) is None or event.query()):
            step, advanced, tokens, _ = self._entries.popleft()
            known = as_integers("tokens", tokens) if isinstance(tokens, Tensor) else tokens
            history.remember(self._memory, step, known, advanced)
