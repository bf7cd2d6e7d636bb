"""What only a GPU can show: copies in flight, captured graphs, free memory."""

import pytest
import torch
from small_caches import build

from torch_paged import transfer, uploads
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
    for _ in range(3 * uploads.COPIES_IN_FLIGHT):
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


def keep_busy():
    """Give the device some tenths of a second of work, and return an event at its end."""
    large = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    for _ in range(10):
        torch.mm(large, large)
    event = torch.cuda.Event()
    event.record()
    return event


def test_tokens_on_a_gpu_are_not_waited_for():
    """The device is busy when they are committed; their blocks enter the prefix cache once they are on the host."""
    cache = build(device="cuda", num_blocks=64, max_seq_len=40, max_seqs=8)
    tokens = torch.arange(12, device="cuda")
    for namespace in ("warm-up, in which memory is pinned", "measured"):
        seq = cache.add(namespace=namespace)
        busy = keep_busy()
        cache.commit(cache.prepare([seq], 9), tokens[:9])
        cache.commit(cache.prepare([seq], 1), [9])
        early = cache.add(range(10), namespace)
        waited = busy.query()
        torch.cuda.synchronize()
        late = cache.add(range(10), namespace)
        cache.commit(cache.prepare([seq], 2), tokens[10:].int())
        torch.cuda.synchronize()
        later = cache.add(range(13), namespace)
        lengths = [cache.length(each) for each in (early, late, later)]
        cache.free([seq, early, late, later])
    assert not waited, "the host has waited for the device"
    assert lengths == [0, 8, 12]
    assert cache._feed.fetch(tokens)[0].is_pinned()
    with pytest.raises(TypeError, match=r"tokens on a GPU must be integers that int64 can hold, got torch\.float32"):
        cache.commit(cache.prepare([cache.add()], 1), torch.ones(1, device="cuda"))
    cache.check_integrity()


@pytest.mark.parametrize("chunk_blocks", [1, 3, 100])
def test_swapped_blocks_are_given_away_at_once(monkeypatch, chunk_blocks):
    """The device is busy while sequences leave and others write to their blocks; they come back one after another."""
    cache = build(device="cuda", num_blocks=24, max_seq_len=40, max_seqs=8)
    monkeypatch.setattr(transfer, "_CHUNK_BYTES", chunk_blocks * cache._swapping.transfers[0].block_bytes)
    caches = [tensor for pair in cache.tensors() for tensor in pair]
    seqs = [cache.add() for _ in range(2)]
    cache.commit(cache.prepare(seqs, [39, 37]))
    seqs += cache.fork(seqs[1], 1)
    cache.swap_out(seqs)  # compiles the kernels, and pins memory
    cache.swap_in(seqs)
    before = blocks_of_rows(cache, 2)
    for number, tensor in enumerate(caches):
        tensor.copy_(torch.arange(24, device="cuda")[:, None, None, None] + number)
    busy = keep_busy()
    cache.swap_out(seqs)
    waited = busy.query()
    intruder = cache.add()
    batch = cache.prepare([intruder], 40)
    for tensor in caches:
        tensor[batch.block_table[0].long()] = -1
    cache.commit(batch)
    cache.swap_in(seqs[0])
    cache.free(intruder)
    cache.swap_in(seqs[1:])
    assert not waited, "the host has waited for the device"
    cache.check_integrity()
    assert cache.stats().blocks_shared == 10
    for number, tensor in enumerate(caches):
        stored = tensor[blocks_of_rows(cache, 2)]
        expected = (before + number)[:, None, None, None].to(tensor.dtype)
        assert torch.equal(stored, expected.expand_as(stored))


def blocks_of_rows(cache, count):
    """The blocks of the first sequences, which fill their tables, one after another."""
    table = torch.from_numpy(cache._manager.groups[0].table[:count].copy())
    assert (table >= 0).all()
    return table.flatten().long().cuda()


def test_copies_to_the_host_are_pinned_and_may_be_dropped():
    cache = build(device="cuda", num_blocks=24, max_seq_len=40)
    seq = cache.add()
    cache.commit(cache.prepare([seq], 39))
    for _ in range(4):
        cache.swap_out(seq)
        assert cache._manager.parcels[seq].parts[0].content.is_pinned()
        cache.swap_in(seq)
    cache.swap_out(seq)
    cache.free(seq)
    assert cache.stats().bytes_swapped == 0
    cache.check_integrity()
