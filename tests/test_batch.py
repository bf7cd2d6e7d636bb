"""PagedBatch: exact values, padding, stable addresses, what is sent, and advance()."""

import pytest
import torch
from small_caches import make_cache

from torch_paged.batch import PagedBatch
from torch_paged.uploads import Uploads


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
    assert [part.dtype for part in batch[:7]] == [torch.int32] * 3 + [torch.int64] * 4
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
    cache.rollback(cache.prepare([cache.add() for _ in range(4)], 3))  # the row of padding holds a block
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


def test_batches_are_plain_tuples():
    batch = make_cache().prepare([], 1)
    assert isinstance(batch, PagedBatch)
    leaves, structure = torch.utils._pytree.tree_flatten(batch)
    assert torch.utils._pytree.tree_unflatten(leaves, structure) == batch
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 6


def test_a_buffer_in_flight_is_waited_for():
    """Each upload takes the next of a ring of buffers, after the copy that was last made from it."""

    class Copy:
        waited = 0

        def synchronize(self):
            self.waited += 1

    uploads = Uploads(torch.device("cpu"))
    uploads._done = [Copy() for _ in uploads._done]
    filled = [uploads.begin(10) for _ in uploads._done]
    assert [copy.waited for copy in uploads._done] == [1] * len(filled)
    assert len({buffer.ctypes.data for buffer in filled}) == len(filled)
    assert uploads.begin(10).ctypes.data == filled[0].ctypes.data
    assert [copy.waited for copy in uploads._done].count(2) == 1
    assert len(uploads.begin(1000)) == 1000


def test_rows_of_the_block_table_are_as_many_as_there_can_be_sequences():
    """Buckets for tokens may be far larger."""
    cache = make_cache(buckets=[4, 12, 4096])
    (table,) = cache._staging.block_tables
    assert len(table) == 12
    seqs = [cache.add() for _ in range(8)]
    batch = cache.prepare(seqs, [1] * 7 + [6])
    assert [len(part) for part in batch[3:6]] == [4096, 4096, 12]
    cache.check_integrity()


def test_equal_counts_may_be_ragged():
    """As a program wants that was exported with `cu_seqlens_q`; and tokens are padded to a bucket."""
    cache = make_cache(buckets=[4, 32])
    seqs = [cache.add() for _ in range(2)]
    uniform = cache.prepare(seqs, [10, 10])
    assert uniform.cu_seqlens_q is None
    expected = [part.tolist() for part in (uniform.slot_mapping[:20], uniform.positions[:20], uniform.seq_lens[:2])]
    cache.rollback(uniform)
    for counts in (10, [10, 10]):
        batch = cache.prepare(seqs, counts, ragged=True)
        assert batch.cu_seqlens_q.tolist() == [0, 10, 20, 20, 20]
        assert batch.last_token.tolist() == [9, 19, 0, 0]
        assert len(batch.slot_mapping) == 32
        parts = batch.slot_mapping[:20], batch.positions[:20], batch.seq_lens[:2]
        assert [part.tolist() for part in parts] == expected
        cache.rollback(batch)
    batch = cache.prepare(seqs, 1, ragged=True)
    cache.commit(batch, [1, 2])
    batch = cache.prepare([], 1, ragged=True)
    assert batch.cu_seqlens_q.tolist() == [0] * 5
    cache.commit(batch)
    cache.check_integrity()
