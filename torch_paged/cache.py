"""PagedKVCache: keys and values of many sequences in fixed-size blocks, step by step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from torch_paged.batch import PagedBatch
from torch_paged.capacity import blocks_of_groups, group_limits
from torch_paged.functional import copy_blocks
from torch_paged.layers import FunctionalKV, PagedKVLayer, PagedKVLayers
from torch_paged.layout import LayerGroup, Stored, check_buckets, check_stored, check_windows, group_layers
from torch_paged.memory import MemoryManager, MemoryStats
from torch_paged.memory.arrays import as_integer
from torch_paged.options import FLOAT_DTYPES
from torch_paged.quantise import calibrate_scales, check_dtype
from torch_paged.staging import Staging
from torch_paged.steps import OpenSteps
from torch_paged.swapping import Swapping
from torch_paged.token_feed import TokenFeed
from torch_paged.transfer import Transfer
from torch_paged.untraced import untraced


class PagedKVCache(nn.Module):
    """Keys and values of up to `max_seqs` sequences, in blocks that are given out as sequences grow.

    A step: `prepare` says how many tokens each sequence gets and returns a PagedBatch; the model runs on it, each
    layer calling `cache.layers[i](query, key, value, batch)`; `commit` says that the tokens stand. If the model
    raises, `rollback` undoes the step. The host may work ahead: further steps can be prepared, also on the same
    sequences, before the first is committed. Sequences are named by ints. Every method that raises has changed
    nothing.

        seq = cache.add()
        batch = cache.prepare([seq], [len(prompt)])
        logits = model(prompt, batch)
        cache.commit(batch)

    Args:
        num_layers: attention layers.
        num_kv_heads: key-value heads of each.
        head_dim: of the keys.
        value_head_dim: of the values; None: `head_dim`.
        block_size: tokens a block.
        num_blocks: blocks, each of which serves all layers of a group. Give either `num_blocks` or `memory`.
        memory: instead, bytes (int) for as many blocks as fit, or a share of the device's free memory (float, 0 to 1).
        max_seqs: sequences that can live at the same time.
        max_seq_len: tokens that one sequence can hold.
        dtype: float32, float16 or bfloat16: of keys and values as the layers get them.
        cache_dtype: of the stored ones: float8_e4m3fn, float8_e5m2, int8, or None: `dtype`.
        scales: of stored numbers that are float8 or int8, true value = stored value * scale. "token": one for each
            token and head, found when it is stored, and kept in 4 bytes a head beside key and value. "static": one for
            each head, which you write to `layers[i].key_scale` and `value_scale`. None: "token" for int8, and none, or
            a scale of 1, for float8.
        sliding_window: how many keys a query of the layers sees, itself included: one int for all, or a sequence with
            one int or None for each. The layers give it to `attention`, and blocks that no query can see any more are
            released. Layers with unequal windows have separate blocks, see `groups`: those with the widest get
            `num_blocks`; others no more than they can make use of if `max_seqs` sequences are live and one of
            `max_seq_len` tokens is read in one piece. `memory` is shared out in this way too.
        device: where the cache lies.
        buckets: increasing sizes. Sequences and tokens of a batch are padded to the smallest that holds them, and the
            tensors of these batches never change their addresses, so CUDA graphs can be replayed on them. What no
            bucket holds is not padded. Where all counts are equal, whole sequences are added, and the tokens are as
            many as these have, unless the batch is to be ragged. None: no padding.
        swap_space: bytes of host memory for sequences that are swapped out. None: as much as there is. On a GPU it is
            pinned by PyTorch, which rounds what it allocates up to a power of two.

    Raises:
        ValueError, TypeError: an argument is out of its range or of the wrong type.

    Attributes:
        layers: nn.ModuleList of PagedKVLayer.
        num_blocks: of the group with the widest window, as given, or as found from `memory`.
        block_size, max_seqs, max_seq_len, device: as given.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        memory: int | float | None = None,
        max_seqs: int,
        max_seq_len: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype | None = None,
        scales: str | None = None,
        sliding_window: int | Sequence[int | None] | None = None,
        device: torch.device | str,
        buckets: Sequence[int] | None = None,
        swap_space: int | None = None,
    ) -> None:
        super().__init__()
        device = torch.empty(0, device=device).device  # with its index, where that was left to the current device
        stored = check_stored(num_kv_heads, head_dim, value_head_dim, dtype, cache_dtype, scales)
        windows = check_windows(sliding_window, as_integer("num_layers", num_layers, at_least=1))
        self.block_size = as_integer("block_size", block_size, at_least=1)
        self.max_seqs = as_integer("max_seqs", max_seqs, at_least=1)
        self.max_seq_len = as_integer("max_seq_len", max_seq_len, at_least=1)
        self._groups = group_layers(windows, self.max_seq_len)
        self._bytes_per_token = [len(layers) * stored.bytes_per_token for layers in self._groups.values()]
        block_bytes = [self.block_size * each for each in self._bytes_per_token]
        limits = group_limits(list(self._groups), self.block_size, self.max_seqs, self.max_seq_len)
        sizes = blocks_of_groups(num_blocks, memory, block_bytes, limits, device)
        self._manager = MemoryManager(sizes, self.block_size, self.max_seqs, self.max_seq_len, list(self._groups))
        self.num_blocks, self.device = sizes[0], device
        self.layers = self._build_layers(stored, sizes, windows, dtype)
        caches = [[t for i in members for t in self.layers[i].blocks()] for members in self._groups.values()]
        self._staging = Staging(self._manager, device, check_buckets(buckets))
        self._feed = TokenFeed(self._manager)
        self._steps = OpenSteps(self._manager, self._staging, self._feed, caches)
        transfers = [Transfer(each, size, device) for each, size in zip(caches, block_bytes, strict=True)]
        space = None if swap_space is None else as_integer("swap_space", swap_space, at_least=0)
        self._swapping = Swapping(self._manager, transfers, space)
        # Copying nothing tells a GPU where the caches lie: later copies can be captured in a graph.
        for each in caches:
            copy_blocks(each, torch.empty(0, 2, dtype=torch.int64, device=device))

    def _build_layers(
        self, stored: Stored, sizes: list[int], windows: list[int | None], dtype: torch.dtype
    ) -> PagedKVLayers:
        group_of = {layer: group for group, members in enumerate(self._groups.values()) for layer in members}
        with torch.inference_mode(False):  # whatever mode this runs under, the buffers can be written in any
            return PagedKVLayers(
                PagedKVLayer(
                    stored.allocate(sizes[group], self.block_size, self.device),
                    dtype=dtype,
                    group=group,
                    sliding_window=windows[layer],
                )
                for layer, group in sorted(group_of.items())
            )

    @staticmethod
    def kv_bytes(
        num_layers: int,
        num_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        *,
        dtype: torch.dtype,
    ) -> int:
        """Bytes of the keys and values of `num_tokens` tokens over all layers, their scales aside."""
        num_layers, num_tokens = as_integer("num_layers", num_layers, 0), as_integer("num_tokens", num_tokens, 0)
        num_kv_heads, head_dim = as_integer("num_kv_heads", num_kv_heads, 0), as_integer("head_dim", head_dim, 0)
        value_head_dim = head_dim if value_head_dim is None else as_integer("value_head_dim", value_head_dim, 0)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        return num_layers * num_tokens * num_kv_heads * (head_dim + value_head_dim) * dtype.itemsize

    def forward(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: PagedBatch, **options: Any
    ) -> Tensor:
        """`self.layers[layer](...)`, for eager use. Compiled, each layer number would be a graph of its own."""
        result: Tensor = self.layers[layer](query, key, value, batch, **options)
        return result

    def functional(self) -> FunctionalKV:
        """A layer that takes `tensors()` as its first argument, for `torch.export`.

        An exported program keeps its example inputs: set `program.example_inputs = None` before it is saved, or the
        file holds the caches after all.
        """
        return FunctionalKV([(layer.group, layer.sliding_window) for layer in self.layers])

    def tensors(self) -> list[tuple[Tensor, ...]]:
        """Every layer's key cache and value cache, then its two tensors of scales if it has any: the tensors
        themselves."""
        return [layer.tensors() for layer in self.layers]

    @property
    def groups(self) -> list[LayerGroup]:
        """The layers by their windows, the widest first."""
        return [
            LayerGroup(window, layers, group.pool.num_blocks, group.pool.num_available)
            for (window, layers), group in zip(self._groups.items(), self._manager.groups, strict=True)
        ]

    @untraced
    def add(self, tokens: Any = None, namespace: Hashable = None) -> int:
        """A new sequence. It begins with as many tokens of its prompt as are found in the prefix cache.

        `length(seq)` tells how many: a whole number of blocks, and never the last token, which must be run through the
        model to learn what follows. The rest of the prompt is for `prepare`. What is found are full blocks that
        `commit` was told the tokens of, of sequences live or freed. Nothing but the same tokens from the first on
        finds them.

        Args:
            tokens: the prompt, on the host: a list, bytes, integer array or CPU tensor. None: nothing is looked up.
            namespace: any hashable value, None too; equal ones are the same. Sequences find prefixes of their own
                namespace alone. What is not in the tokens but changes keys and values, such as an adapter's name,
                belongs here.

        Raises:
            TypeError: `tokens` are not integers; `namespace` is not hashable.
            ValueError: `max_seqs` sequences are live; the prompt is longer than `max_seq_len`.
        """
        self._feed.deliver()
        return self._manager.add(() if tokens is None else tokens, namespace)

    @untraced
    def fork(self, seq: int, n: int) -> list[int]:
        """`n` new sequences with all tokens of `seq`. Blocks are shared until one of the sharers writes to them.

        Raises:
            ValueError: `seq` was freed, is swapped out or has an open step; `n < 1`; more than `max_seqs` would live.
        """
        self._feed.deliver()
        return self._manager.fork(seq, n)

    @untraced
    def truncate(self, seq: int, length: int) -> None:
        """Forget the tokens of `seq` from position `length` on, and give back the blocks beyond, reserved ones too.

        If it ends within a block of the prefix cache then, the next token takes that block out of the cache, or is
        written to a copy if others hold it as well.

        With a sliding window, `block_size` tokens of those that were run through the model can always be forgotten,
        or all; more only as long as what the window of the shorter sequence shows was not released.

        Raises:
            ValueError: `seq` was freed, is swapped out or has an open step; `length` is not in 0 to its length, or a
                window has left behind what a sequence of that length sees.
        """
        self._feed.deliver()
        self._manager.truncate(seq, length)

    @untraced
    def free(self, seqs: int | Sequence[int]) -> None:
        """End one sequence or several, open steps or not; what these still compute for them counts for nothing.

        Blocks are reused when no open step may read them. A step is to be committed or rolled back all the same, also
        where all of its sequences have gone.

        Raises:
            ValueError: one was freed before, or occurs twice; none is freed.
        """
        self._feed.deliver()
        self._manager.free(seqs)

    @untraced
    def swap_out(self, seqs: int | Sequence[int]) -> None:
        """Move the tokens of one sequence or several to host memory, and release their blocks.

        The sequences stay live and keep their lengths; until `swap_in`, all they can is wait or be freed. A block that
        several of them share is moved once. On a GPU nothing is waited for: the caches are read on the current stream,
        which steps to come must use too, and the rest happens beside them, through 128 MiB of GPU memory at most.

        Raises:
            ValueError: one was freed, is swapped out already, or has an open step.
            OutOfSwapSpace: `swap_space` does not suffice.
        """
        self._feed.deliver()
        self._swapping.out(seqs)

    @untraced
    def swap_in(self, seqs: int | Sequence[int]) -> None:
        """Move sequences back that were swapped out. Those that left together share again what they shared.

        What the prefix cache still holds is not moved. Host memory is given up when all that left together are back or
        freed.

        Raises:
            ValueError: one was freed or is not swapped out.
            OutOfBlocks: the free blocks do not suffice.
        """
        self._feed.deliver()
        self._swapping.back(seqs)

    def length(self, seq: int) -> int:
        """Tokens of `seq`, those of open steps included. Raises ValueError if it was freed."""
        return self._manager.length(seq)

    @untraced
    def prepare(
        self, seqs: Sequence[int], counts: int | Sequence[int], *, ahead: int = 0, ragged: bool = False
    ) -> PagedBatch:
        """Open a step in which each of `seqs` gets new tokens, and return its tensors.

        THE TENSORS ARE OVERWRITTEN BY THE NEXT `prepare`: run the model on a batch before preparing another. On a
        GPU that means launching it, on the same stream: the host does not wait and may prepare further steps while
        the model runs.

        Args:
            seqs: distinct live sequences (list or integer array), in the order of the batch.
            counts: new tokens of each, at least 1: one int for all, or one for each. Equal counts make a uniform
                batch, without `cu_seqlens_q`, unless it is to be `ragged`.
            ahead: reserve blocks for so many tokens more, for `PagedBatch.advance`.
            ragged: give the batch `cu_seqlens_q` whatever the counts, as a program needs that was exported or captured
                with it; its tokens are then padded to a bucket, too.

        Raises:
            TypeError: `seqs`, `counts` or `ahead` are not integers.
            ValueError: one of `seqs` was freed, is swapped out or occurs twice, or would outgrow `max_seq_len`;
                `counts` does not match `seqs` or is below 1.
            OutOfBlocks: the free blocks do not suffice.
        """
        return self._steps.prepare(seqs, counts, ahead, ragged)

    @untraced
    def commit(self, batch: PagedBatch, tokens: Any = None, *, advanced: int = 0) -> None:
        """End a step: its tokens stand. Sequences freed since are skipped; what was reserved stays reserved.

        Blocks that sliding windows leave behind are released, see `truncate`.

        Args:
            batch: from `prepare`. Steps of one sequence are committed in order, other steps in any order.
            tokens: the token ids in the order of the batch, without padding, then those of each advanced step: a flat
                sequence, array or tensor of integers. Blocks that they fill enter the prefix cache. A sequence some of
                whose tokens were never given is not followed any more: its later blocks stay out. A tensor on a GPU
                is not waited for: it is copied, behind the work queued on the current stream, and looked at by a later
                `commit` or change of sequences; one freed, forked, truncated or swapped out before that is not
                followed any more, nor is one whose windows have left them behind.
            advanced: how many times `batch.advance()` was run on top, at most `ahead`; those tokens stand too.

        Raises:
            TypeError: the tokens are not integers, or uint64 on a GPU.
            ValueError: the batch is no open step; an earlier step of one of its sequences is open, or, with
                `advanced`, a later one; `advanced` exceeds `ahead`; the tokens are not flat or past 64 bits with a
                sign, or their number does not match.
        """
        self._steps.commit(batch, tokens, advanced)

    @untraced
    def rollback(self, batch: PagedBatch) -> None:
        """Undo a step, after the model raised for instance: lengths, tables and free blocks are as before `prepare`.

        Sequences freed since are skipped. What the step evicted from the prefix cache does not come back.

        Raises:
            ValueError: the batch is no open step, or a later step of one of its sequences is open.
        """
        self._steps.rollback(batch)

    @untraced
    def clear_prefixes(self, *namespaces: Hashable) -> None:
        """Empty the prefix cache of these namespaces, or of all if none is given.

        Live sequences of theirs keep their tokens and are not followed any more: none of their blocks, old or new,
        can be found. So this is also the call to make when what the tokens mean has changed, such as the weights.
        """
        self._manager.clear_prefixes(*namespaces)

    def calibrate(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """The static scales that every layer's keys and values need in `dtype`, by the tokens of all live sequences.

        Run an unquantised cache over some thousand tokens, then write what this returns to one with
        `scales="static"`:

            for layer, (key_scale, value_scale) in zip(quantised.layers, cache.calibrate(torch.int8)):
                layer.key_scale.copy_(key_scale)
                layer.value_scale.copy_(value_scale)

        Args:
            dtype: float8_e4m3fn, float8_e5m2 or int8.

        Returns:
            Of each layer two tensors, float32 [num_kv_heads], see `calibrate_scales`.

        Raises:
            TypeError: this cache is quantised itself, or `dtype` is none of these.
            ValueError: it holds no tokens to go by: its sequences are swapped out or freed, or there were none.
        """
        if self.layers[0].key_cache.dtype not in FLOAT_DTYPES:
            raise TypeError(f"calibrate needs an unquantised cache, got one of {self.layers[0].key_cache.dtype}")
        check_dtype(dtype)
        slots = [torch.from_numpy(each).to(self.device) for each in self._manager.slots_in_use()]
        if not all(map(len, slots)):
            raise ValueError("calibrate needs tokens in the cache, got none: no sequence with tokens is in it")
        layers = [(layer.key_cache, layer.value_cache, slots[layer.group]) for layer in self.layers]
        return [
            (calibrate_scales(key_cache, used, dtype), calibrate_scales(value_cache, used, dtype))
            for key_cache, value_cache, used in layers
        ]

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a step can get now, those included that only the prefix cache holds. Costs next to nothing.

        Of the group with the widest window; `groups` tells of all.
        """
        return self._manager.pool.num_available

    def stats(self) -> MemoryStats:
        """How full the cache is, see `MemoryStats`. Costs time in proportion to the blocks."""
        return self._manager.stats(*self._bytes_per_token)

    def check_integrity(self) -> None:
        """Raise IntegrityError if the host's records contradict each other or the device's block table.

        For tests and debugging: it waits for the device.
        """
        self._manager.check_integrity()
        self._steps.check_integrity()
        self._staging.check_integrity()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a PagedKVCache cannot be copied or pickled: build another one")
