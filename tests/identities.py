"""Which kernels PagedKVCache needs while it serves, and which `warmup` compiled: run as a program, without a GPU.

    python identities.py        one line for each model; exit status 1 if serving needed what `warmup` had not compiled

What is compiled is decided by Triton itself, for a GPU that is not there; the compilation and the launch are left out.
This process must not use a GPU.
"""

import itertools
import sys
from importlib import import_module

import aot
import torch
import triton
from triton.runtime.jit import JITFunction

import torch_paged
from torch_paged import PagedKVCache, kernels, ops
from torch_paged.kernels import attention_plan
from torch_paged.kernels.problem import Device

# Functions of these names hide the modules.
append, copy_blocks, merge_attention, rotary_append, warmup = (
    import_module(f"torch_paged.kernels.{name}")
    for name in ("append", "copy_blocks", "merge_attention", "rotary_append", "warmup")
)
DTYPE = torch.bfloat16
H200 = Device(multiprocessors=132, shared_memory=227 * 1024, capability=90)
MODELS = {
    f"dim {dim}, {heads}/{kv_heads} heads, block size {block_size}": (heads, kv_heads, dim, value_dim, block_size)
    for (dim, value_dim), (heads, kv_heads), block_size in itertools.product(
        [(72, 72), (128, 128), (200, 72)], [(3, 1), (8, 1), (32, 8), (40, 40)], [1, 16]
    )
} | {
    "latent": (16, 1, 576, 512, 64),
    "dim 64, 14/2 heads": (14, 2, 64, 64, 16),  # long prompts have other tiles
    "dim 64, 32/2 heads": (32, 2, 64, 64, 16),
    "dim 64, 32/8 heads, block size 8": (32, 8, 64, 64, 8),
    "dim 64, 32/8 heads, block size 128": (32, 8, 64, 64, 128),
}

OPTIONS = {
    "window, sinks": dict(sliding_window=True, sinks=True),
    "softcap": dict(softcap=True),
    "softcap, ALiBi": dict(softcap=True, alibi_slopes=True),
    "float8, rotary": dict(cache_dtype=torch.float8_e4m3fn, rotary_dim=64),
    "float8, one scale": dict(cache_dtype=torch.float8_e5m2, scales="scalar"),
    "float8, scales of heads": dict(cache_dtype=torch.float8_e4m3fn, scales="head"),
    "int8, scales of tokens, rotary": dict(cache_dtype=torch.int8, scales="token", rotary_dim=128, sliding_window=True),
}


class Compiled:
    """Stands for a compiled kernel that is never launched."""

    module = function = packed_metadata = None

    def launch_metadata(self, *_):
        return None

    def run(self, *_):
        pass


class FreshDevice(aot._AbsentDevice):
    """A device for which nothing is compiled yet."""

    def __init__(self, number):
        super().__init__("sm_90")
        self.number = number

    def get_current_device(self):
        return self.number


def record_compilations(device):
    """Makes CPU tensors run the kernels' launch functions; the set of what Triton is asked to compile for `device`."""
    compiled = set()

    def compile_nothing(self, key, _, device, *__):
        compiled.add((self.__name__, key))
        kernel = self.device_caches[device][0][key] = Compiled()
        return kernel

    triton.runtime.driver.set_active(FreshDevice(device))
    attention_plan._plans.clear()
    ops._calls.clear()
    append._quantising_plans.clear()
    for module in (append, copy_blocks, merge_attention, rotary_append):
        module._plans.clear()
    JITFunction._do_compile = compile_nothing
    for module in (attention_plan, warmup):
        module.device_of = lambda _: H200
    ops._cpu_package = lambda: kernels.__name__
    return compiled


def packed_projection(num_tokens, heads, kv_heads, dim, value_dim):
    """Query, key and value as slices of one matrix."""
    widths = [heads * dim, kv_heads * dim, kv_heads * value_dim]
    parts = torch.zeros(num_tokens, sum(widths), dtype=DTYPE).split(widths, 1)
    return [part.view(num_tokens, n, -1) for part, n in zip(parts, (heads, kv_heads, kv_heads), strict=True)]


def projections(num_tokens, heads, kv_heads, dim, value_dim):
    """Query, key and value as tensors of their own."""
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim)
    return [torch.zeros(num_tokens, *shape, dtype=DTYPE) for shape in shapes]


def serve(heads, kv_heads, dim, value_dim, block_size, project):
    """Steps of one to five sequences, uniform and ragged, with copies on write, and with merged parts."""
    cache = PagedKVCache(
        2, kv_heads, dim, value_head_dim=value_dim, block_size=block_size, num_blocks=2048, max_seqs=16,
        max_seq_len=300, dtype=DTYPE, device="cpu",
    )  # fmt: skip
    seqs = [cache.add() for _ in range(5)]
    steps = [(1, 1), (1, 17), (1, 200), (3, 1), (2, 5), (2, 70), (3, [1, 9, 2]), (1, 1), (4, [1, 1, 1, 1])]
    for num_seqs, counts in [*steps, (3, [1, 100, 1]), (5, [1, 2, 1, 3, 1]), (5, 1)]:
        batch = cache.prepare(seqs[:num_seqs], counts)
        for layer in range(2):
            cache(layer, *project(len(batch.positions), heads, kv_heads, dim, value_dim), batch)
        cache.commit(batch)
    forks = cache.fork(seqs[1], 3)
    cache.prepare(forks, 1)
    for num_tokens in (1, 2, 17):
        part = torch.zeros(num_tokens, heads, value_dim, dtype=DTYPE), torch.zeros(num_tokens, heads)
        torch_paged.merge_attention(*part, *part)


def serve_in_layout(heads, kv_heads, dim, value_dim, block_size, head_major, latent):
    """The operators on caches of one layout, ids in memory of any alignment, one row or several."""

    def empty(width):
        if head_major:
            return torch.zeros(9, kv_heads, block_size, width, dtype=DTYPE).transpose(1, 2)
        return torch.zeros(9, block_size, kv_heads, width, dtype=DTYPE)

    key_cache = empty(dim)
    value_cache = key_cache[..., :value_dim] if latent else empty(value_dim)
    caches = [key_cache, empty(dim)] if latent else [key_cache, value_cache, empty(dim), empty(value_dim)]
    for rows, first in itertools.product((1, 2, 5), (0, 1)):
        query, key, value = projections(rows, heads, kv_heads, dim, value_dim)
        ids = torch.arange(rows + first)[first:]
        table = torch.zeros((rows + 1) * 3 + first, dtype=torch.int32)[first : first + rows * 3].view(rows, 3)
        lens = torch.zeros(rows + first, dtype=torch.int32)[first:]
        torch_paged.append(key, None if latent else value, key_cache, None if latent else value_cache, ids)
        torch_paged.attention(query, key_cache, value_cache, table, lens)
        bounds = torch.arange(rows + 1 + first, dtype=torch.int32)[first:].sub_(first)
        torch_paged.attention(query, key_cache, value_cache, table, lens, cu_seqlens_q=bounds)
        staging = torch.zeros(rows, sum(cache[0].numel() for cache in caches), dtype=DTYPE)
        torch_paged.gather_blocks(caches, ids % 5 if rows < 5 else ids - first, staging)
        torch_paged.scatter_blocks(staging, ids, caches)
        torch_paged.copy_blocks(caches, torch.full((3,), -1)[first : first + 2].view(1, 2))


def serve_long(heads, kv_heads, dim, value_dim, block_size, head_major):
    """Prompts of many tokens, of a few sequences, or among many."""
    slots = (9, kv_heads, block_size) if head_major else (9, block_size, kv_heads)
    caches = [torch.empty(*slots, width, dtype=DTYPE) for width in (dim, value_dim)]
    key_cache, value_cache = [cache.transpose(1, 2) for cache in caches] if head_major else caches
    sizes = [(2048, 1), (1900, 1), (1500, 1), (4500, 3), (20000, 3), (100000, 1), (2048, 64), (40000, 50)]
    sizes += [(16384, 16), (3000, 2)]
    for (queries, seqs), ragged in itertools.product(sizes, (False, True)):
        query = torch.empty(queries - queries % seqs, heads, dim, dtype=DTYPE)
        table, bounds = torch.zeros(seqs, 5, dtype=torch.int32), torch.zeros(seqs + 1, dtype=torch.int32)
        torch_paged.attention(
            query, key_cache, value_cache, table, table[:, 0], cu_seqlens_q=bounds if ragged else None
        )


def serve_with(heads, kv_heads, dim, value_dim, block_size, options, head_major):
    """Attention, append and rotary_append with `options` of `warmup`, of any values, in one layout."""
    cache_dtype, scales = options.get("cache_dtype", DTYPE), options.get("scales")
    slots = (9, kv_heads, block_size) if head_major else (9, block_size, kv_heads)

    def empty(*width, dtype=cache_dtype):
        cache = torch.zeros(*slots, *width, dtype=dtype)
        return cache.transpose(1, 2) if head_major else cache

    caches = empty(dim), empty(value_dim)
    batches = [(1, 1), (2, 1), (5, 1), (64, 1), (9, 9), (128, 128), (1, 128), (5, 200), (16, 200), (40, 200)]
    batches += [(2100, 1), (2100, 3)]
    for first, (rows, seqs) in itertools.product((0, 1), batches):
        per_head = torch.ones(heads + first)[first:]
        scale = {"scalar": torch.ones(2)[first], "head": torch.ones(kv_heads + first)[first:]}.get(scales)
        written = {f"{side}_scale": scale for side in ("key", "value")}
        if scales == "token":
            written = {f"{side}_scale_cache": empty(dtype=torch.float32) for side in ("key", "value")}
        query, key, value = projections(rows, heads, kv_heads, dim, value_dim)
        ids = torch.arange(rows + first)[first:] % 9
        torch_paged.append(key, value, *caches, ids, **written)
        if "rotary_dim" in options:
            angles = torch.zeros(9, options["rotary_dim"] // 2)
            torch_paged.rotary_append(query, key, value, angles, angles, ids, *caches, ids, **written)
        starts = (torch.arange(seqs + 1, dtype=torch.int32) * -(-rows // seqs)).clamp(max=rows)
        for bounds in [starts, None] if seqs <= rows else [starts]:
            torch_paged.attention(
                query, *caches, torch.zeros(seqs, 5, dtype=torch.int32), torch.full((seqs,), 5, dtype=torch.int32),
                cu_seqlens_q=bounds, sliding_window=(7, 2000)[first] if "sliding_window" in options else None,
                softcap=2.0 if "softcap" in options else 0.0,
                alibi_slopes=per_head if "alibi_slopes" in options else None,
                sinks=per_head if "sinks" in options else None, **written,
            )  # fmt: skip


def missing_with(model, options, device):
    """The same for a model whose attention has options."""
    heads, kv_heads, dim, value_dim, block_size = model
    compiled = record_compilations(device)
    torch_paged.warmup(
        heads, kv_heads, dim, value_head_dim=value_dim, block_size=block_size, dtype=DTYPE, device="cpu", **options
    )
    warm = set(compiled)
    for head_major in (False, True):
        serve_with(*model, options, head_major)
    return len(warm), compiled - warm


def missing(model, device):
    """How many kernels `warmup` compiles for a model, and those that serving it needs beside."""
    heads, kv_heads, dim, value_dim, block_size = model
    compiled = record_compilations(device)
    torch_paged.warmup(heads, kv_heads, dim, value_head_dim=value_dim, block_size=block_size, dtype=DTYPE, device="cpu")
    warm = set(compiled)
    for project in (projections, packed_projection):
        serve(*model, project)
    for head_major, latent in itertools.product((False, True), (False, True) if value_dim < dim else (False,)):
        serve_in_layout(*model, head_major, latent)
    for head_major in (False, True):
        serve_long(*model, head_major)
    return len(warm), compiled - warm


if __name__ == "__main__":
    failed = False
    cases = [(name, model, {}) for name, model in MODELS.items()]
    cases += [(name, (32, 8, 128, 128, 16), options) for name, options in OPTIONS.items()]
    for device, (name, model, options) in enumerate(cases):
        number, lacking = missing(model, device) if not options else missing_with(model, options, device)
        print(f"{name}: {number} compiled, {len(lacking)} lacking", *sorted(lacking), sep="\n  ")
        failed |= bool(lacking)
    sys.exit(failed)
