"""PagedKVCache in eager mode: steps against contiguous attention, what a batch holds, what is sent, what is refused."""

import math
import pickle

import pytest
import torch

from torch_paged import cache as cache_module
from torch_paged.batch import PagedBatch
from torch_paged.cache import PagedKVCache
from torch_paged.memory import OutOfBlocks
from torch_paged.staging import Staging

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 16, 24


def make_cache(device="cpu", **options):
    defaults = dict(block_size=4, num_blocks=32, max_seqs=8, max_seq_len=40, dtype=torch.float32, device=device)
    cache = PagedKVCache(2, KV_HEADS, DIM, value_head_dim=VALUE_DIM, **(defaults | options))
    for tensor in sum(cache.tensors(), ()):
        tensor.fill_(math.nan)
    return cache


@pytest.fixture(params=["in-place", "upload"])
def either_way(request, monkeypatch):
    """Written straight into host tensors, and sent through a buffer as to a GPU."""
    if request.param == "upload":
        monkeypatch.setattr(
            cache_module, "Staging", lambda *args, **options: Staging(*args, **(options | {"in_place": False}))
        )


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


def values(batch):
    """A batch's tensors as lists, its table aside."""
    return [part if part is None else part.tolist() for part in batch[1:6]]


@pytest.mark.usefixtures("either_way")
def test_a_batch_by_hand():
    """The example in PagedBatch's docstring, and the same with a fifth token."""
    cache = make_cache(buckets=[4, 8])
    first = cache.add()
    cache.commit(cache.prepare([first], 6))
    second = cache.add()
    batch = cache.prepare([first, second], [1, 3])
    assert batch.block_table.shape == (4, 10)
    assert batch.block_table[:2, :3].tolist() == [[0, 1, -1], [2, -1, -1]]
    assert values(batch) == [[7, 3, 0, 0], [0, 1, 4, 4, 4], [6, 8, 9, 10], [6, 0, 1, 2], [0, 3, 0, 0]]
    cache.rollback(batch)
    batch = cache.prepare([first, second], [1, 4])
    slots, positions = [6, 8, 9, 10, 11, -1, -1, -1], [6, 0, 1, 2, 3, 0, 0, 0]
    assert values(batch) == [[7, 4, 0, 0], [0, 1, 5, 5, 5], slots, positions, [0, 4, 0, 0]]
    assert [part.dtype for part in batch] == [torch.int32] * 3 + [torch.int64] * 4
    assert batch.block_size.tolist() == 4


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("buckets", "counts", "num_seqs", "num_tokens", "ragged"),
    [
        (None, [1, 1, 1], 3, 3, False),
        (None, [2, 2, 2], 3, 6, False),
        (None, [1, 2, 3], 3, 6, True),
        ([2, 4, 8], [1, 1, 1], 4, 4, False),
        ([2, 4, 8], [2, 2, 2], 4, 8, False),
        ([2, 4, 8], [3, 3, 3], 3, 9, False),
        ([2, 4, 8], [1, 2, 3], 4, 8, True),
        ([2, 4, 8], [1, 2, 6], 4, 9, True),
        ([2], [1, 1, 1], 3, 3, False),
        ([100], [1], 100, 100, False),
        ([2, 4], [], 2, 2, False),
        (None, [], 0, 0, False),
    ],
)
def test_shapes_are_padded_to_buckets(buckets, counts, num_seqs, num_tokens, ragged):
    cache = make_cache(buckets=buckets)
    seqs = [cache.add() for _ in counts]
    cache.commit(cache.prepare(seqs, 2))
    batch = cache.prepare(seqs, counts)
    assert batch.block_table.shape == (num_seqs, 10)
    assert (batch.cu_seqlens_q is not None) == ragged
    assert [len(part) for part in batch[3:6]] == [num_tokens, num_tokens, num_seqs]
    assert batch.seq_lens.tolist() == [2 + count for count in counts] + [0] * (num_seqs - len(counts))
    real = sum(counts)
    assert batch.slot_mapping[real:].tolist() == [-1] * (num_tokens - real)
    assert batch.positions.tolist() == [2 + i for n in counts for i in range(n)] + [0] * (num_tokens - real)
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    assert batch.last_token.tolist() == [end - 1 for end in ends[1:]] + [0] * (num_seqs - len(counts))
    if ragged:
        assert batch.cu_seqlens_q.tolist() == ends + [real] * (num_seqs - len(counts))
    cache.check_integrity()


@pytest.mark.usefixtures("either_way")
def test_addresses_are_stable():
    """Whatever shapes come in between, even more of them than are remembered."""
    cache = make_cache(buckets=[2, 4, 8], max_seq_len=400, num_blocks=400)
    seqs = [cache.add() for _ in range(5)]

    def pointers(seqs, counts):
        batch = cache.prepare(seqs, counts)
        cache.rollback(batch)
        return [part.data_ptr() for part in batch if part is not None]

    shapes = [(seqs[:1], 1), (seqs[:3], 1), (seqs, 1), (seqs[:3], [1, 2, 3]), (seqs[:2], 2)]
    before = [pointers(*shape) for shape in shapes]
    for count in range(1, 300):
        pointers(seqs[:1], count)
    assert [pointers(*shape) for shape in reversed(shapes)] == before[::-1]
    assert pointers(seqs[:4], 1) == before[1], "3 and 4 sequences are one bucket"
    assert all(address % 64 == 0 for addresses in before for address in addresses[:-1])


@pytest.mark.usefixtures("either_way")
def test_only_what_changed_is_sent():
    cache = make_cache()

    def sent(seqs, counts, **options):
        before = cache._staging.num_entries_sent
        cache.commit(cache.prepare(seqs, counts, **options))
        cache.check_integrity()
        return cache._staging.num_entries_sent - before

    first, second = cache.add(), cache.add()
    assert sent([first, second], [9, 4]) == 3 + 1
    assert sent([first, second], 1) == 1, "the second sequence's new block"
    assert [sent([first, second], 1) for _ in range(4)] == [0, 0, 1, 1]
    assert sent([first], 1, ahead=9) == 2
    assert sent([first, second], 1) == 0, "blocks were reserved"
    assert sent([second, first], 1) == 6 + 6, "rows change places: blocks 2 and 4, and nothing where the longer was"
    (child,) = cache.fork(second, 1)
    assert sent([second, child], [1, 1]) == 3 + 6, "a copied block, and the fork's row in the place of a longer one"
    cache.truncate(second, 2)
    assert sent([second], 1) == 3


@pytest.mark.usefixtures("either_way")
def test_advance_equals_prepare():
    """Three decode steps after a ragged one, without the host, are what prepare would have made."""
    cache = make_cache(buckets=[4, 16])
    seqs = [cache.add() for _ in range(3)]
    batch = cache.prepare(seqs, [6, 3, 8], ahead=3)
    advanced = [batch := batch.advance() for _ in range(3)]
    expected = []
    cache.commit(cache.prepare([cache.add()], 1))
    other = make_cache(buckets=[4, 16])
    others = [other.add() for _ in range(3)]
    other.commit(other.prepare(others, [6, 3, 8], ahead=3))
    for _ in range(3):
        batch = other.prepare(others, 1)
        expected.append(values(batch))
        other.commit(batch)
    assert [values(step) for step in advanced] == expected
    assert all(step.block_table.dtype == torch.int32 for step in advanced)


def test_advanced_tokens_are_committed():
    cache = make_cache()
    seqs = [cache.add(), cache.add()]
    batch = cache.prepare(seqs, [6, 3], ahead=4)
    with pytest.raises(ValueError, match="tokens must be the 13 tokens of the step, got 9"):
        cache.commit(batch, list(range(9)), advanced=2)
    cache.commit(batch, torch.arange(13), advanced=2)
    assert [cache.length(seq) for seq in seqs] == [8, 5]
    assert cache.prepare(seqs, 1).slot_mapping.tolist() == [8, 17], "blocks 0 1 2, then 3 4"
    cache.check_integrity()


def test_advance_past_what_is_reserved_stores_nothing():
    """Past the reserved blocks, and past the table's last column, slots are -1 and sequences stop growing."""
    cache = make_cache(max_seq_len=8)
    full, short = cache.add(), cache.add()
    batch = cache.prepare([full, short], [7, 2]).advance()
    assert values(batch) == [[8, 3], None, [7, 10], [7, 2], [0, 1]]
    batch = batch.advance().advance()
    assert values(batch) == [[8, 4], None, [-1, -1], [8, 4], [0, 1]]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("failing", ["send", "copy_blocks"])
def test_a_step_that_cannot_be_sent_changes_nothing(monkeypatch, failing):
    attention = Attention(make_cache())
    first, second = attention.add(), attention.add()
    attention.step([first, second], [13, 2])
    seqs = [second, *attention.fork(first, 1)]
    before = attention.cache.stats()

    def fail(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        target = attention.cache._staging if failing == "send" else cache_module
        patch.setattr(target, "_changed_entries" if failing == "send" else "copy_blocks", fail)
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


def test_batches_are_plain_tuples():
    batch = make_cache().prepare([], 1)
    assert isinstance(batch, PagedBatch)
    leaves, structure = torch.utils._pytree.tree_flatten(batch)
    assert torch.utils._pytree.tree_unflatten(leaves, structure) == batch
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 6
