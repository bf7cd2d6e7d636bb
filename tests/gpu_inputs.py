"""Small bfloat16 tensors on the current GPU."""

import torch

BLOCK = (16, 8, 128)
BF16 = torch.bfloat16


def randn(*shape):
    return torch.randn(shape, device="cuda").to(BF16)


def ids(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device="cuda")


def small_call():
    """Arguments of `attention`, by name."""
    return dict(
        query=randn(2, 4, 32),
        key_cache=randn(5, 4, 2, 32),
        value_cache=randn(5, 4, 2, 32),
        block_table=ids([[0, 1], [2, 3]], torch.int32),
        seq_lens=ids([3, 8], torch.int32),
    )
