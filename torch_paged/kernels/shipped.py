"""What is compiled ahead of time: a selection of all launches, for tests."""

import itertools
from dataclasses import dataclass

from torch_paged.kernels.features import PLAIN_FEATURES, Features, Stored
from torch_paged.kernels.launch_config import AttentionLaunch, attention_launches
from torch_paged.kernels.problem import Device, Problem


@dataclass(frozen=True)
class ShippedVariant:
    """A launch that is compiled ahead of time, by name."""

    name: str
    dtype: str  # of query and, without quantisation, caches, as the compiler spells it
    launch: AttentionLaunch


SHIPPED_HEAD_DIMS = (64, 80, 128, 256)
SHIPPED_BLOCK_SIZES = (1, 16, 64)
SHIPPED_DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}


# What models use: Mistral, gpt-oss, Gemma 2, BLOOM; and caches of every type.
SHIPPED_OPTIONS = {
    "window": (Features(window=True), "bf16", 128),
    "sinks": (Features(sinks=True), "bf16", 64),
    "softcap": (Features(softcap=True), "bf16", 256),
    "window-sinks": (Features(window=True, sinks=True), "bf16", 64),
    "window-softcap": (Features(window=True, softcap=True), "bf16", 256),
    "alibi": (Features(alibi=True), "fp16", 128),
    "e4m3": (Features(key=Stored("e4m3", "scalar"), value=Stored("e4m3", "scalar"), normalised=True), "bf16", 128),
    "e5m2": (Features(key=Stored("e5m2", "head"), value=Stored("e5m2", "head")), "fp16", 128),
    "int8-token": (Features(key=Stored("int8", "token"), value=Stored("int8", "token"), normalised=True), "bf16", 128),
}
# Name, sequences, query tokens, whether ragged.
_DECODE = ("decode", 8, 8, False)
_PREFILL = ("prefill", 8, 16384, False)
_MIXED = ("mixed", 8, 4096, True)
_KINDS = (_DECODE, _PREFILL, _MIXED)
_SEVERAL = ("several", 16, 256, False)  # queries a sequence, as in speculative decoding
_SHORT = ("short", 4, 4096, False)  # prompts, for which Hopper's kernel may have smaller programs
_CHUNKS = ("chunks", 2, 16384, True)  # of which shapes tell that they are long
_IN_PARTS = (48, 256)  # block sizes of which Hopper's copy engine takes parts
_PADDED = (192, 128)  # head dims of values of which Hopper has sums in two pieces and in one, of keys of 192
_MANY = ("decode-of-many", 16, 16, False)  # served otherwise than a few are where caches hold 8-bit numbers


def shipped_variants(device: Device) -> list[ShippedVariant]:
    """Everything without options that is compiled ahead of time for `device`: 32 query heads, 8 KV heads, causal."""
    return [
        variant
        for dtype, dim, block_size in itertools.product(SHIPPED_DTYPES, SHIPPED_HEAD_DIMS, SHIPPED_BLOCK_SIZES)
        for kind in (*_KINDS, _SEVERAL, _SHORT, _CHUNKS)
        for variant in _variants(device, "", PLAIN_FEATURES, dtype, dim, block_size, *kind)
        if kind in _KINDS
        or (variant.launch.variant.copy_rows and kind == _SHORT)
        or (dtype == "bf16" and (kind == _SEVERAL or (variant.launch.variant.copy_rows and kind == _CHUNKS)))
    ]


def shipped_option_variants(device: Device) -> list[ShippedVariant]:
    """The same for `SHIPPED_OPTIONS`, and prefill on Hopper of short windows, of blocks and of rows in parts."""
    found = [
        variant
        for name, (features, dtype, dim) in SHIPPED_OPTIONS.items()
        for short in (False, True)[: 1 + features.window]
        for kind in (_DECODE, _PREFILL, *[_MIXED] * short, _SEVERAL, _MANY)
        for variant in _variants(device, "short-" * short + f"{name}-", features, dtype, dim, 16, *kind, short)
    ]
    parts = [
        ("short-" * short + "window-", Features(window=True), 128, 128, block_size, short)
        for block_size, short in itertools.product(_IN_PARTS, (False, True))
    ]
    parts += [(f"values{value_dim}-", PLAIN_FEATURES, 192, value_dim, 16, False) for value_dim in _PADDED]
    found += [
        variant
        for prefix, features, dim, value_dim, block_size, short in parts
        for variant in _variants(device, prefix, features, "bf16", dim, block_size, *_PREFILL, short, value_dim)
        if variant.launch.variant.copy_rows
    ]
    return list({(variant.dtype, variant.launch): variant for variant in reversed(found)}.values())[::-1]


def _variants(
    device: Device,
    prefix: str,
    features: Features,
    dtype: str,
    dim: int,
    block_size: int,
    kind: str,
    num_seqs: int,
    num_tokens: int,
    ragged: bool,
    short_window: bool = False,
    value_dim: int | None = None,
) -> list[ShippedVariant]:
    problem = Problem(
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        num_heads=32,
        num_kv_heads=8,
        head_dim=dim,
        value_dim=value_dim or dim,
        block_size=block_size,
        itemsize=SHIPPED_DTYPES[dtype],
        causal=True,
        ragged=ragged,
        features=features,
        short_window=short_window,
    )
    return [
        ShippedVariant(f"{prefix}{kind}-{dtype}-dim{dim}-block{block_size}-rows{launch.variant.block_m}", dtype, launch)
        for launch in attention_launches(problem, device)
    ]
