"""A model of `examples/model.py` as a `LlamaForCausalLM` with the same weights."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from model import Config

RENAMED = {
    "embedding": "embed_tokens", "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj", "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}  # fmt: skip


def as_llama(config: Config, weights: dict[str, Tensor], most_tokens: int) -> Any:
    """`weights`: of a `Decoder`. `most_tokens`: of a sequence. Raises ImportError without Transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.ffn_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=most_tokens,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
    )
    renamed = {_rename(name): tensor for name, tensor in weights.items()}
    lacking = model.load_state_dict(renamed, strict=False)
    assert lacking.missing_keys == ["lm_head.weight"] and not lacking.unexpected_keys, lacking
    return model.eval()


def _rename(name: str) -> str:
    for ours, theirs in RENAMED.items():
        name = name.replace(f"{ours}.weight", f"{theirs}.weight")
    return f"model.{name}"
