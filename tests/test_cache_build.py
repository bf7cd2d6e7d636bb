"""Building a PagedKVCache: sizes, what is refused, and what holds for it as an nn.Module."""

import copy
import mmap
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from small_caches import build
from torch import nn

from torch_paged.cache import PagedKVCache


def test_buffers_are_separate_and_head_major():
    cache = build(value_head_dim=24)
    shapes = [(tuple(key.shape), tuple(value.shape)) for key, value in cache.tensors()]
    assert shapes == [((8, 4, 2, 16), (8, 4, 2, 24))] * 2
    assert all(part.transpose(1, 2).is_contiguous() for pair in cache.tensors() for part in pair)
    assert len({part.untyped_storage().data_ptr() for pair in cache.tensors() for part in pair}) == 4
    assert cache.state_dict() == {}
    assert cache.tensors()[1][0] is cache.layers[1].key_cache


def test_kv_bytes():
    assert PagedKVCache.kv_bytes(3, 100, 2, 16, dtype=torch.bfloat16) == 3 * 100 * 2 * (16 + 16) * 2
    assert PagedKVCache.kv_bytes(3, 100, 2, 16, 24, dtype=torch.float32) == 3 * 100 * 2 * (16 + 24) * 4
    large = map(np.int32, (80, 131072, 8, 128))
    assert PagedKVCache.kv_bytes(*large, dtype=torch.float16) == 80 * 131072 * 8 * 256 * 2
    with pytest.raises(ValueError, match="num_layers must be at least 0, got -1"):
        PagedKVCache.kv_bytes(-1, 2, 3, 4, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got 'x'"):
        PagedKVCache.kv_bytes(1, 2, 3, 4, dtype="x")
    cache = build()
    held = sum(part.numel() * part.element_size() for pair in cache.tensors() for part in pair)
    assert held == PagedKVCache.kv_bytes(2, 8 * 4, 2, 16, dtype=torch.bfloat16)
    cache.commit(cache.prepare([cache.add()], 9))
    assert cache.stats().bytes_used == held * 3 // 8


def test_memory_decides_how_many_blocks(monkeypatch):
    block = PagedKVCache.kv_bytes(2, 4, 2, 16, dtype=torch.bfloat16)
    assert build(num_blocks=None, memory=5 * block).stats().blocks_total == 5
    assert build(num_blocks=None, memory=6 * block - 1).stats().blocks_total == 5
    pages = {"SC_AVPHYS_PAGES": 10 * block, "SC_PAGE_SIZE": 2}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert build(num_blocks=None, memory=0.25).stats().blocks_total == 5
    assert build(num_blocks=None, memory=1.0).stats().blocks_total == 20


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(memory=1 << 20), ValueError, "exactly one of num_blocks and memory must be given"),
        (dict(num_blocks=None), ValueError, "exactly one of num_blocks and memory must be given"),
        (dict(num_blocks=None, memory=1.5), ValueError, r"share of free memory must lie in \(0, 1\], got 1.5"),
        (dict(num_blocks=None, memory=0.0), ValueError, r"share of free memory must lie in \(0, 1\], got 0.0"),
        (dict(num_blocks=None, memory=1), ValueError, "memory = 1 is 1 bytes, less than one block of 1024 bytes"),
        (dict(num_blocks=None, memory="1 GB"), TypeError, "memory must be an integer, got '1 GB'"),
        (dict(num_blocks=0), ValueError, "num_blocks must be at least 1, got 0"),
        (dict(block_size=0), ValueError, "block_size must be at least 1, got 0"),
        (dict(max_seqs=0), ValueError, "max_seqs must be at least 1, got 0"),
        (dict(max_seq_len=2.0), TypeError, "max_seq_len must be an integer, got 2.0"),
        (dict(num_layers=0), ValueError, "num_layers must be at least 1, got 0"),
        (dict(num_kv_heads=0), ValueError, "num_kv_heads must be at least 1, got 0"),
        (dict(head_dim=0), ValueError, "head_dim must be at least 1, got 0"),
        (dict(value_head_dim=0), ValueError, "value_head_dim must be at least 1, got 0"),
        (dict(dtype=torch.int8), TypeError, "dtype must be float32, float16 or bfloat16, got torch.int8"),
        (dict(dtype="float16"), TypeError, "dtype must be float32, float16 or bfloat16, got 'float16'"),
        (dict(cache_dtype=torch.int16), TypeError, "cache_dtype must be float8_e4m3fn, float8_e5m2, int8, or dtype"),
        (dict(buckets=[4, 4]), ValueError, r"buckets must increase from at least 1, got \[4, 4\]"),
        (dict(buckets=[0, 4]), ValueError, r"buckets must increase from at least 1, got \[0, 4\]"),
        (dict(buckets=[1.5]), TypeError, "buckets must be integers"),
    ],
)
def test_bad_arguments_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        build(**options)


def test_built_under_inference_mode_works_outside():
    with torch.inference_mode():
        cache = build(dtype=torch.float32, buckets=[2, 4])
        seqs = [cache.add(), cache.add()]
        with torch.inference_mode(False):
            cache.rollback(cache.prepare(seqs, 1))
        first = cache.prepare(seqs, 5)
        cache(0, *(torch.randn(10, 2, 16) for _ in range(3)), first)
        cache.commit(first)
    seqs += cache.fork(seqs[0], 1)
    batch = cache.prepare(seqs, [3, 1, 2])
    with torch.no_grad():
        cache(1, *(torch.randn(len(batch.positions), 2, 16) for _ in range(3)), batch)
    cache.commit(batch)
    assert not any(part.is_inference() for pair in cache.tensors() for part in pair)
    assert not any(part.is_inference() for part in (*first, *batch) if part is not None)


class Decoder(nn.Module):
    def __init__(self, kv):
        super().__init__()
        self.project, self.kv = nn.Linear(4, 4), kv


def test_models_move_around_their_cache():
    cache = build()
    model = Decoder(cache.layers[0])
    before = cache.layers[0].key_cache
    model.to("cpu").to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
    model.bfloat16().share_memory()
    assert cache.layers[0].key_cache is before
    assert cache.tensors()[0][0] is before
    assert before.transpose(1, 2).is_contiguous()
    with pytest.raises(RuntimeError, match=r"stays torch.bfloat16 on cpu, it cannot become torch.float32 on cpu"):
        model.float()
    with pytest.raises(RuntimeError, match=r"cannot become torch.bfloat16 on meta"):
        cache.to("meta")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps])
def test_caches_are_not_copied(duplicate):
    cache = build()
    with pytest.raises(TypeError, match="a PagedKVCache cannot be copied or pickled"):
        duplicate(cache)
    with pytest.raises(TypeError, match="a PagedKVLayer cannot be copied or pickled"):
        duplicate(Decoder(cache.layers[0])) if duplicate is not copy.copy else duplicate(cache.layers[0])


def test_the_shorthand_and_the_functional_layer_are_the_layers():
    caches = [build(dtype=torch.float32) for _ in range(3)]
    inputs = [torch.randn(3, heads, 16) for heads in (4, 2, 2)]
    outputs = []
    for way, cache in enumerate(caches):
        batch = cache.prepare([cache.add()], 3)
        outputs.append(
            cache.layers[1](*inputs, batch, scale=0.5)
            if way == 0
            else cache(1, *inputs, batch, scale=0.5)
            if way == 1
            else cache.functional()(cache.tensors(), 1, *inputs, batch, scale=0.5)
        )
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    with pytest.raises(ValueError, match="softcap must be 0"):
        caches[0].layers[0](*inputs, caches[0].prepare([0], 3), softcap=-3.0)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages on demand")
def test_a_cache_on_a_cpu_asks_for_large_pages():
    cache = PagedKVCache(1, 8, 128, num_blocks=512, max_seqs=2, max_seq_len=64, dtype=torch.float32, device="cpu")
    middle = cache.layers[0].key_cache.data_ptr() + (8 << 20)
    inside, flags = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:  # a mapping begins: its addresses
            start, end = (int(address, 16) for address in first.split("-"))
            inside = start <= middle < end
        elif inside and first == "VmFlags:":
            flags = rest
    assert "hg" in flags, flags


def test_a_cache_on_a_cpu_begins_where_a_page_does():
    cache = PagedKVCache(2, 8, 128, num_blocks=65, max_seqs=2, max_seq_len=64, dtype=torch.float32, device="cpu")
    for tensor in (part for layer in cache.layers for part in layer.tensors()):
        assert tensor.data_ptr() % mmap.PAGESIZE == 0
        assert tensor.shape == (65, 16, 8, 128) and tensor.transpose(1, 2).is_contiguous()
        tensor.fill_(1)  # to its very end


def test_tiny_caches_have_no_whole_page_to_ask_for():
    cache = PagedKVCache(
        1, 1, 16, block_size=1, num_blocks=1, max_seqs=1, max_seq_len=1, dtype=torch.float16, device="cpu"
    )
    assert cache.layers[0].key_cache.shape == (1, 1, 1, 16)
