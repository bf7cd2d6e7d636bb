"""Copies to the device that the host does not wait for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COPIES_IN_FLIGHT = 8


class Uploads:
    """Buffers of pinned memory, by turns: none is written to again while its last copy is in flight."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._buffers = [torch.empty(0, dtype=torch.int64, device="cpu")] * COPIES_IN_FLIGHT
        self._done: list[torch.cuda.Event | None] = [None] * COPIES_IN_FLIGHT
        self._turn = 0
        self._words = 0

    def begin(self, words: int) -> Any:
        """The next buffer's first `words`, to be filled; waits if its last copy is still in flight."""
        self._turn = (self._turn + 1) % COPIES_IN_FLIGHT
        self._words = words
        done = self._done[self._turn]
        if done is not None:
            done.synchronize()
        if len(self._buffers[self._turn]) < words:
            room = 1 << words.bit_length()
            with torch.inference_mode(False):
                self._buffers[self._turn] = torch.empty(room, dtype=torch.int64, device="cpu", pin_memory=self._on_gpu)
        return self._buffers[self._turn].numpy()[:words]

    def send(self) -> Tensor:
        """What was filled, on the device once its stream gets there."""
        sent = self._buffers[self._turn][: self._words].to(self._device, non_blocking=True)
        if self._on_gpu:
            done = self._done[self._turn] = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._device))
        return sent
