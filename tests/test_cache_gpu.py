"""What only a GPU can show: copies in flight, captured graphs, free memory."""

import pytest
import torch
from test_cache_build import build

from torch_paged import staging
from torch_paged.cache import PagedKVCache

pytestmark = pytest.mark.gpu


def test_a_share_of_a_gpus_memory():
    free, _ = torch.cuda.mem_get_info()
    cache = build(num_blocks=None, memory=0.001, device="cuda")
    assert 0 < cache.stats().blocks_total * PagedKVCache.kv_bytes(2, 4, 2, 16, dtype=torch.bfloat16) <= free * 0.0011


def test_pinned_memory_is_not_reused_in_flight():
    """The device is kept busy while more steps are prepared than there are buffers: each batch arrives whole."""
    cache = build(device="cuda", max_seq_len=200, num_blocks=200)
    seq = cache.add()
    warm_up = torch.randn(4096, 4096, device="cuda")
    seen = []
    for _ in range(3 * staging._COPIES_IN_FLIGHT):
        torch.mm(warm_up, warm_up)
        batch = cache.prepare([seq], 1)
        seen.append(torch.cat([batch.seq_lens, batch.slot_mapping, batch.positions]))
        cache.commit(batch)
    assert torch.stack(seen).tolist() == [[i + 1, i, i] for i in range(len(seen))]
    cache.check_integrity()


def test_a_captured_graph_replays_on_the_next_batch():
    """No copies: the graph reads where the next batches of its bucket are written; advance() is captured too."""
    cache = build(device="cuda", buckets=[2, 4], num_blocks=64, max_seq_len=40)
    seqs = [cache.add() for _ in range(3)]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def flatten(batch):
        return torch.cat([part.long().flatten() for part in (batch.block_table, batch.seq_lens, *batch[3:6])])

    batch = cache.prepare(seqs, 1, ahead=2)
    with torch.cuda.stream(stream):
        flatten(batch.advance().advance())
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        seen = flatten(batch), flatten(batch.advance().advance())
    cache.commit(batch)
    for step in range(8):
        cache.rollback(cache.prepare(seqs[:1], 1))
        batch = cache.prepare(seqs[: 3 + step % 2], 1, ahead=2)
        graph.replay()
        assert torch.equal(seen[0], flatten(batch))
        assert torch.equal(seen[1], flatten(batch.advance().advance()))
        cache.commit(batch, advanced=step % 3)
    cache.check_integrity()


def test_copies_on_write_reach_the_device_in_order():
    """Blocks are copied after the steps before have written them, and before this step writes."""
    cache = build(device="cuda", num_blocks=64, max_seqs=32)
    parent = cache.add()
    cache.commit(cache.prepare([parent], 6))
    for key, value in cache.tensors():
        key[1].fill_(7)
        value[1].fill_(8)
    seqs = [parent, *cache.fork(parent, 31)]
    batch = cache.prepare(seqs, 1)
    blocks = batch.block_table[:, 1].long()
    assert blocks.unique().numel() == 32
    for key, value in cache.tensors():
        assert (key[blocks] == 7).all()
        assert (value[blocks] == 8).all()
