"""PagedKVCache in eager mode: steps against attention over contiguous keys, and what undoes or refuses a step."""

import pickle

import pytest
import torch
from small_caches import DIM, HEADS, KV_HEADS, VALUE_DIM, make_cache

from torch_paged import staging, steps, unbacked
from torch_paged.memory import OutOfBlocks


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Not the interpreter too: it takes a minute to say what the operators' own tests say."""
    return request.param


class Attention:
    """Random queries, keys and values for each step, and every sequence's own keys and values kept contiguous."""

    def __init__(self, cache, device="cpu"):
        self.cache, self.device = cache, device
        self.kept = {}
        self.generator = torch.Generator().manual_seed(0)

    def add(self):
        seq = self.cache.add()
        self.kept[seq] = [(torch.empty(0, KV_HEADS, DIM), torch.empty(0, KV_HEADS, VALUE_DIM)) for _ in range(2)]
        return seq

    def fork(self, seq, n):
        children = self.cache.fork(seq, n)
        self.kept.update({child: list(self.kept[seq]) for child in children})
        return children

    def run(self, batch, seqs, counts):
        """Both layers on a batch; the real rows must be as attention over the contiguous keys, the padding zeros."""
        num_tokens, real = len(batch.slot_mapping), sum(counts)
        for layer in range(2):
            query, key, value = (
                torch.randn(num_tokens, heads, dim, generator=self.generator)
                for heads, dim in [(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM)]
            )
            actual = self.cache(layer, *(part.to(self.device) for part in (query, key, value)), batch).cpu()
            start = 0
            for seq, count in zip(seqs, counts, strict=True):
                keys, values = self.kept[seq][layer]
                end = start + count
                keys, values = torch.cat([keys, key[start:end]]), torch.cat([values, value[start:end]])
                self.kept[seq][layer] = keys, values
                torch.testing.assert_close(actual[start:end], contiguous_attention(query[start:end], keys, values))
                start = end
            assert not actual[real:].any()

    def step(self, seqs, counts, **options):
        batch = self.cache.prepare(seqs, counts, **options)
        self.run(batch, seqs, [counts] * len(seqs) if isinstance(counts, int) else counts)
        self.cache.commit(batch)
        self.cache.check_integrity()


def contiguous_attention(query, keys, values):
    mask = torch.ones(len(query), len(keys), dtype=torch.bool).tril(len(keys) - len(query))
    parts = (part.double().transpose(0, 1)[None] for part in (query, keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1).float()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("buckets", [None, (1, 4, 16)], ids=["unpadded", "buckets"])
def test_steps_equal_contiguous_attention(device, buckets):
    """Ragged prefill, decode, chunks beside decode, forks that part, freed rows reused, another order of sequences."""
    attention = Attention(make_cache(device, buckets=buckets), device)
    first, second, third = (attention.add() for _ in range(3))
    attention.step([first, second], [7, 3])
    attention.step([second, first], 1)
    attention.step([third, first], [9, 1])
    forks = attention.fork(first, 2)
    attention.step([*forks, first, second], 1)
    attention.step([first, forks[1]], [2, 5])
    attention.cache.free([second, forks[0]])
    attention.step([attention.add(), first, third], [6, 1, 1])
    attention.cache.truncate(third, 2)
    attention.kept[third] = [(keys[:2], values[:2]) for keys, values in attention.kept[third]]
    attention.step([third, first], 4)
    attention.cache.free([seq for seq in attention.kept if seq not in (second, forks[0])])
    assert attention.cache.stats().blocks_used == 0


@pytest.mark.usefixtures("either_way")
def test_pipelined_steps(device):
    """Three steps prepared and launched before the first is committed; a sequence ends in between."""
    attention = Attention(make_cache(device), device)
    first, second = attention.add(), attention.add()
    attention.step([first, second], [6, 4])
    attention.step(attention.fork(first, 1), 1)
    open_steps = []
    for seqs in ([first, second], [first, second], [first]):
        open_steps.append(attention.cache.prepare(seqs, 1))
        attention.run(open_steps[-1], seqs, [1] * len(seqs))
        attention.cache.check_integrity()
    attention.cache.free(second)
    for batch in open_steps:
        attention.cache.commit(batch)
        attention.cache.check_integrity()
    assert attention.cache.length(first) == 9
    attention.step([first], 3)


def test_a_model_that_raises_is_rolled_back():
    """Layer 0 has written when layer 1 raises; the same step again gives the right answer."""
    attention = Attention(make_cache())
    seqs = [attention.add()]
    attention.step(seqs, 6)
    seqs += attention.fork(seqs[0], 2)
    before = attention.cache.stats()
    batch = attention.cache.prepare(seqs, 3)
    rows = torch.randn(9, HEADS, DIM), torch.randn(9, KV_HEADS, DIM), torch.randn(9, KV_HEADS, VALUE_DIM)
    attention.cache.layers[0](*rows, batch)
    with pytest.raises(ValueError, match="num_heads"):
        attention.cache.layers[1](rows[0][:, :3], *rows[1:], batch)
    attention.cache.rollback(batch)
    attention.cache.check_integrity()
    assert attention.cache.stats() == before
    attention.step(seqs, 3)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("failing", ["_fill", "copy_blocks"])
def test_a_step_that_cannot_be_sent_changes_nothing(monkeypatch, failing):
    attention = Attention(make_cache())
    first, second = attention.add(), attention.add()
    attention.step([first, second], [13, 2])
    seqs = [second, *attention.fork(first, 1)]
    before = attention.cache.stats()

    def fail(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(staging if failing == "_fill" else steps, failing, fail)
        with pytest.raises(MemoryError):
            attention.cache.prepare(seqs, 1)
    assert attention.cache.stats() == before
    attention.step(seqs, 1)


def test_out_of_blocks_changes_nothing():
    cache = make_cache(num_blocks=4)
    first, second = cache.add(), cache.add()
    cache.commit(cache.prepare([first, second], 5))
    before, sent = cache.stats(), cache._staging.num_entries_sent
    with pytest.raises(OutOfBlocks, match="the step needs 2 blocks, 0 are free"):
        cache.prepare([first, second], 5)
    assert (cache.stats(), cache._staging.num_entries_sent) == (before, sent)
    cache.check_integrity()
    cache.commit(cache.prepare([first, second], 3))
    assert isinstance(pickle.loads(pickle.dumps(OutOfBlocks(3, 2, 1))), OutOfBlocks)


def test_batches_that_are_no_open_step():
    cache = make_cache()
    seq = cache.add()
    batch = cache.prepare([seq], 3, ahead=1)
    for other in (batch._replace(), batch.advance(), make_cache().prepare([], 1)):
        for end in (cache.commit, cache.rollback):
            with pytest.raises(ValueError, match="the batch is no open step of this cache"):
                end(other)
    with pytest.raises(ValueError, match="tokens must be the 3 tokens of the step, got 2"):
        cache.commit(batch, [1, 2])
    with pytest.raises(ValueError, match="advanced = 2, but the step was prepared with ahead = 1"):
        cache.commit(batch, advanced=2)
    cache.commit(batch, [1, 2, 3])
    with pytest.raises(ValueError, match="the batch is no open step of this cache"):
        cache.commit(batch)


@pytest.mark.parametrize("rows", [(6, 6, 6), (8, 8, 8), (8, 4, 4), (2, 4, 4), (4, 6, 6), (4, 2, 2)], ids=str)
def test_layers_want_the_rows_of_the_batch(rows):
    """More queries would be taken for others of the same sequences. Compiled, whatever the compiler says."""
    cache = make_cache()
    batch = cache.prepare([cache.add(), cache.add()], 2)
    sizes = zip(rows, ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM)), strict=True)
    query, key, value = (torch.randn(count, *size) for count, size in sizes)
    name, wrong = ("query", rows[0]) if rows[0] != 4 else ("key", rows[1])
    with pytest.raises(
        ValueError, match=f"{name} must have 4 rows, one for each token of the batch, padding included, got {wrong}"
    ):
        cache.layers[0](query, key, value, batch)
    compiled = torch.compile(cache.layers[0], fullgraph=True, backend="aot_eager")
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        compiled(*map(unbacked, (query, key, value)), batch)
    with pytest.raises(TypeError, match="batch must be a PagedBatch, got Tensor"):
        cache.layers[0](batch.slot_mapping, query, key, value)


def test_ragged_batches_may_be_padded_by_hand():
    cache = make_cache()
    batch = cache.prepare([cache.add(), cache.add()], [2, 1])
    rows = [torch.randn(8, *size) for size in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))]
    output = cache.layers[0](*rows, batch)
    exact = cache.layers[0](*(each[:3] for each in rows), batch)
    assert torch.equal(output, torch.cat([exact, torch.zeros(5, HEADS, VALUE_DIM)]))
