"""What only a GPU can show of the operators in time: captured graphs, streams, no synchronisation, several devices."""

import pytest
import torch
from gpu_inputs import BF16, BLOCK, ids, randn, small_call
from small_model import VOCABULARY, Model, make_cache
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager

from torch_paged import ops as registration
from torch_paged import unbacked
from torch_paged.kernels import block_groups

pytestmark = pytest.mark.gpu
ops = torch.ops.paged


def captured(call):
    """A graph of `call()`, and its result, whose memory each replay writes anew."""
    call()  # compiles the kernels and makes their tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


# Queries and keys of four sequences, padding among them, for 12 rows of queries.
RAGGED_STEPS = [
    ([1, 1, 1, 1], [1, 40, 128, 17]),
    ([9, 1, 0, 2], [9, 100, 55, 2]),
    ([0, 0, 0, 0], [0, 0, 0, 0]),
    ([1, 1, 0, 0], [128, 3, 0, 0]),
    ([12, 0, 0, 0], [120, 0, 0, 0]),
]
UNIFORM_STEPS = [([3] * 4, keys) for keys in ([3, 40, 128, 17], [0, 0, 0, 0], [128, 127, 0, 5], [2, 1, 3, 4])]


@pytest.mark.parametrize("steps", [RAGGED_STEPS, UNIFORM_STEPS], ids=["ragged", "uniform"])
def test_captured_attention_with_options_serves_other_lengths(steps):
    """A window over float8 keys and int8 values with their tokens' scales; sinks, softcap and slopes changed too."""
    query = randn(12, 8, 128)
    key_cache, value_cache = (
        torch.zeros(40, 16, 2, 128, device="cuda").to(dtype) for dtype in (torch.float8_e4m3fn, torch.int8)
    )
    scales = torch.zeros(40, 16, 2, device="cuda")
    rows, slots = randn(640, 2, 128), torch.arange(640, device="cuda")
    ops.append(rows, rows, key_cache, value_cache, slots, value_scale_cache=scales)
    table, lens = torch.zeros(4, 8, dtype=torch.int32, device="cuda"), torch.zeros(4, dtype=torch.int32, device="cuda")
    bounds = torch.zeros(5, dtype=torch.int32, device="cuda") if steps is RAGGED_STEPS else None
    sinks, slopes = torch.randn(8, device="cuda"), torch.rand(8, device="cuda")

    def attend():
        return ops.attention_with_lse(
            query, key_cache, value_cache, table, lens, cu_seqlens_q=bounds, sliding_window=19, softcap=5.0,
            alibi_slopes=slopes, sinks=sinks, value_scale_cache=scales,
        )  # fmt: skip

    graph, (output, lse) = captured(attend)
    for query_lens, seq_lens in steps:
        table.copy_(torch.randperm(40)[:32].view(4, 8))
        first = [max(keys - queries - 18, 0) // 16 for queries, keys in zip(query_lens, seq_lens, strict=True)]
        columns = torch.arange(8)
        table[(columns >= -(-torch.tensor(seq_lens)[:, None] // 16)) | (columns < torch.tensor(first)[:, None])] = (
            1 << 30
        )
        lens.copy_(torch.tensor(seq_lens))
        if bounds is not None:
            bounds.copy_(torch.tensor([0, *query_lens]).cumsum(0))
        sinks.normal_()
        slopes.uniform_()
        output.fill_(torch.nan)
        graph.replay()
        eager = attend()
        assert torch.equal(output, eager[0])
        assert torch.equal(lse, eager[1])


@pytest.mark.parametrize("heads", [(8, 2), (32, 8)], ids=["8-heads", "32-heads"])
@pytest.mark.parametrize("steps", [RAGGED_STEPS, UNIFORM_STEPS], ids=["ragged", "uniform"])
def test_captured_attention_serves_other_lengths(steps, heads):
    query = randn(12, heads[0], 128)
    caches = [randn(40, 16, heads[1], 128) for _ in range(2)]
    table, lens = torch.zeros(4, 8, dtype=torch.int32, device="cuda"), torch.zeros(4, dtype=torch.int32, device="cuda")
    bounds = torch.zeros(5, dtype=torch.int32, device="cuda") if steps is RAGGED_STEPS else None

    def attend():
        return ops.attention_with_lse(query, *caches, table, lens, cu_seqlens_q=bounds)

    graph, (output, lse) = captured(attend)
    for query_lens, seq_lens in steps:
        table.copy_(torch.randperm(40)[:32].view(4, 8))
        table[torch.arange(8) >= -(-torch.tensor(seq_lens)[:, None] // 16)] = 1 << 30  # nobody may look there
        lens.copy_(torch.tensor(seq_lens))
        if bounds is not None:
            bounds.copy_(torch.tensor([0, *query_lens]).cumsum(0))
        output.fill_(torch.nan)
        graph.replay()
        eager = attend()
        assert torch.equal(output, eager[0])
        assert torch.equal(lse, eager[1])


def test_captured_writes_serve_other_places():
    """append, copy_blocks, gather_blocks and scatter_blocks in one graph; negative ids pad."""
    caches, rows = [randn(12, 4, 2, 64) for _ in range(2)], randn(6, 2, 64)
    slots, pairs, out_of, into = (torch.full(s, -1, device="cuda") for s in ((6,), (3, 2), (2,), (2,)))
    staging = torch.zeros(2, 2, 4, 2, 64, dtype=BF16, device="cuda")

    def write(caches, staging):
        ops.append(rows, rows + 1, *caches, slots)
        ops.copy_blocks(caches, pairs)
        ops.gather_blocks(caches, out_of, staging)
        ops.scatter_blocks(staging, into, caches)

    graph, _ = captured(lambda: write(caches, staging))
    for step in range(4):
        places = torch.randperm(12, device="cuda")
        slots[: 6 - step] = places[: 6 - step] * 4 + step
        slots[6 - step :] = -1
        pairs[step % 3] = places[6:8]
        out_of[0], into[step % 2] = places[8], places[9]
        expected = [cache.clone() for cache in caches], staging.clone()
        write(*expected)
        graph.replay()
        assert all(map(torch.equal, (*caches, staging), (*expected[0], expected[1])))
        pairs.fill_(-1)
        into.fill_(-1)


def test_captured_merge():
    parts = [randn(5, 4, 80), torch.randn(5, 4, device="cuda"), randn(5, 4, 80), torch.randn(5, 4, device="cuda")]
    graph, merged = captured(lambda: ops.merge_attention(*parts))
    for step in range(3):
        for part in parts:
            part.normal_()
        parts[1][step] = -torch.inf
        graph.replay()
        assert all(map(torch.equal, merged, ops.merge_attention(*parts)))


def test_first_copy_on_caches_cannot_be_captured():
    caches, pairs = [randn(4, 3, 5) for _ in range(2)], ids([[0, 1]])
    with pytest.raises(RuntimeError, match="once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.copy_blocks(caches, pairs)
    ops.copy_blocks(caches, pairs[:0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.copy_blocks(caches, pairs)
    graph.replay()
    assert torch.equal(caches[1][0], caches[1][1])


def test_nothing_synchronises():
    caches, rows = [randn(12, 16, 8, 128) for _ in range(2)], randn(4, 8, 128)
    query, table, lens = randn(4, 32, 128), ids([[1, 2]] * 4, torch.int32), ids([20] * 4, torch.int32)
    bounds, blocks, pairs = ids([0, 1, 2, 3, 4], torch.int32), ids([3, 4]), ids([[0, 1]])
    staging = torch.empty(2, 2, *BLOCK, dtype=BF16, device="cuda")

    def everything():
        ops.append(rows, rows, *caches, blocks)
        ops.copy_blocks(caches, pairs)
        ops.gather_blocks(caches, blocks, staging)
        ops.scatter_blocks(staging, blocks, caches)
        for uniform_or_ragged in (None, bounds):
            output, lse = ops.attention_with_lse(query, *caches, table, lens, cu_seqlens_q=uniform_or_ragged)
        ops.merge_attention(output, lse, output, lse)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded_graphs():
    """How many CUDA graphs `torch.compile` has recorded so far; the question itself counts as one."""
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else manager.new_graph_id().id


def test_compiled_decode_under_reduce_overhead():
    """Steps of three and four sequences in one bucket, then of a larger one: graphs are recorded and none skipped."""
    torch.compiler.reset()
    counters.clear()
    before = recorded_graphs()
    caches = [make_cache(device="cuda", buckets=[4, 8, 32]) for _ in range(2)]
    models = [Model(cache.layers).cuda() for cache in caches]
    models[1].load_state_dict(models[0].state_dict())
    models[1] = torch.compile(models[1], mode="reduce-overhead", fullgraph=True)
    seqs = [{cache.add() for cache in caches}.pop() for _ in range(7)]
    steps = [(7, [5, 3, 1, 4, 2, 6, 1])] + [(num_seqs, 1) for num_seqs in (3, 4, 3, 4, 3, 7, 7, 7, 4)]
    for num_seqs, counts in steps:
        logits = []
        for cache, model in zip(caches, models, strict=True):
            batch = cache.prepare(seqs[:num_seqs], counts)
            tokens = torch.arange(len(batch.positions), device="cuda") * 7 % VOCABULARY
            with torch.no_grad():
                logits.append(model(unbacked(tokens), batch)[:num_seqs].clone())
            cache.commit(batch)
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert recorded_graphs() > before + 1


class Copying(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("first", torch.randn(5, 4, 8, device="cuda"), persistent=False)
        self.register_buffer("second", torch.randn(5, 4, 8, device="cuda"), persistent=False)

    def forward(self, pairs):
        ops.copy_blocks([self.first, self.second], pairs)
        return self.first + self.second


def test_compiled_copies_make_their_tables_outside_the_graphs_memory():
    """The first call on these caches happens while PyTorch warms up a CUDA graph."""
    torch.compiler.reset()
    counters.clear()
    module = Copying()
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    for pair in ([0, 1], [2, 3], [4, 0], [1, 2], [3, 4]):
        expected = [buffer.clone() for buffer in (module.first, module.second)]
        ops.copy_blocks(expected, ids([pair]))
        assert torch.equal(compiled(ids([pair])), sum(expected))
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_debug_mode_is_skipped_in_capture(monkeypatch):
    arguments = small_call()
    ops.attention(**arguments)
    monkeypatch.setenv("TORCH_PAGED_DEBUG", "1")
    registration._warn_of_capture.cache_clear()
    with pytest.warns(UserWarning, match="not checked during CUDA graph capture"):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = ops.attention(**arguments)
    graph.replay()
    assert torch.equal(output, ops.attention(**arguments))


def test_tables_that_are_dropped_are_not_awaited(monkeypatch):
    """A stream lags behind by many copies while more sets of caches come than are remembered."""
    monkeypatch.setattr(block_groups, "_MAX_RECENT", 2)
    monkeypatch.setattr(torch.cuda, "synchronize", None)  # called, it would raise
    pairs, busy = ids([[0, 1]]), torch.randn(4096, 4096, device="cuda")
    sets = [[randn(2, 3, 5) for _ in range(2)] for _ in range(8)]
    lagging = torch.cuda.Stream()
    lagging.wait_stream(torch.cuda.current_stream())
    ops.copy_blocks(sets[0], pairs[:0])  # compiles
    with torch.cuda.stream(lagging):
        for _ in range(50):
            torch.mm(busy, busy)
        for caches in sets[:4]:
            ops.copy_blocks(caches, pairs)
    for caches in sets[4:]:
        ops.copy_blocks(caches, pairs)
        torch.full((64,), -1, device="cuda")  # would overwrite a table freed too early
    torch.cuda.current_stream().wait_stream(lagging)
    assert all(torch.equal(cache[0], cache[1]) for caches in sets for cache in caches)


COLD = {
    "append": lambda heads: ops.append(
        randn(1, heads, 24), None, randn(2, 4, heads, 24), None, torch.zeros(1, dtype=torch.int64, device="cuda")
    ),
    "merge": lambda heads: ops.merge_attention(*(randn(1, heads, 24), torch.zeros(1, heads, device="cuda")) * 2),
    "attention": lambda heads: ops.attention(
        randn(1, heads, 24),
        *(randn(2, 4, 1, 24) for _ in range(2)),
        *(torch.zeros(shape, dtype=torch.int32, device="cuda") for shape in ((1, 1), 1)),
    ),
}


@pytest.mark.parametrize("name", COLD)
def test_first_call_cannot_be_captured_and_leaves_the_kernel_usable(name):
    """With a number of heads that no other test has."""
    with pytest.raises(RuntimeError, match="once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        COLD[name](11)
    COLD[name](11)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        COLD[name](11)
    graph.replay()
    torch.cuda.synchronize()


def test_second_gpu():
    """Operators run where their tensors are, whichever device is current, and give what the first GPU gives."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    arguments = small_call()
    key, slots, pairs = randn(2, 2, 32), ids([9, 17]), ids([[0, 3]])

    def everything(current, to):
        with torch.cuda.device(current):
            moved = {name: tensor.to(to, copy=True) for name, tensor in arguments.items()}
            caches = [moved["key_cache"], moved["value_cache"]]
            ops.append(key.to(to), key.to(to), *caches, slots.to(to))
            ops.copy_blocks(caches, pairs.to(to))
            output, lse = ops.attention_with_lse(**moved)
            staging = torch.zeros(2, 2, 4, 2, 32, dtype=BF16, device=to)
            ops.gather_blocks(caches, pairs[0].to(to), staging)
            merged = ops.merge_attention(output, lse, output, lse)
        return [tensor.cpu() for tensor in (*caches, output, lse, staging, *merged)]

    expected = everything("cuda:0", "cuda:0")
    for current, to in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:1"), ("cuda:1", "cuda:0")):
        assert all(map(torch.equal, everything(current, to), expected))
