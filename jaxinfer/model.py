"""One decoder for every family in `ModelConfig`: Llama 2/3, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 3.

The model does not depend on pages. `forward` gives q, k and v of each layer to `attend(q_TNH, k_TKH, v_TKH, layer, cache)`.
`attend` returns the attention output and the new cache. A server uses paged attention (`attention.paged_attention`), and all
other callers dense causal attention (`attention.dense_attention`). So gradients, vmap and notebooks run the same file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from common.config import ModelConfig
from jaxinfer.layers import Dtype, Embedding, Linear, RMSNorm, Rotary, activate, matmul, rotate
from jaxinfer.observe import Keep, ignore
from jaxinfer.parallel import ALONE, Group

Attend = Callable[[Array, Array, Array, int, Any], tuple[Array, Any]]


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, dtype: Dtype) -> None:
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv_proj = Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias, split=1, dtype=dtype)
        self.o_proj = Linear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias, split=0, dtype=dtype
        )
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.heads = config.num_heads, config.num_kv_heads, config.head_dim

    def project(self, x_TD: Array, rope: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """q [T, N, H], k and v [T, K, H], rotated."""
        N, K, H = self.heads
        qkv = self.qkv_proj(x_TD).reshape(-1, N + 2 * K, H)
        q_TNH, k_TKH, v_TKH = jnp.split(qkv, (N, N + K), axis=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        return rotate(q_TNH, *rope), rotate(k_TKH, *rope), v_TKH

    def combine(self, out_TNH: Array) -> Array:
        """The heads' outputs, [T, N, H] -> [T, D]."""
        return self.o_proj(out_TNH.reshape(out_TNH.shape[0], -1))


class MLP(nnx.Module):
    """Gated linear unit (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, dtype: Dtype) -> None:
        D, F = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(D, 2 * F, bias=config.mlp_bias, split=1, dtype=dtype)
        self.down_proj = Linear(F, D, bias=config.mlp_bias, split=0, dtype=dtype)
        self.activation = config.activation

    def __call__(self, x_TD: Array) -> Array:
        gate_TF, up_TF = jnp.split(self.gate_up_proj(x_TD), 2, axis=-1)
        return self.down_proj(activate(gate_TF, self.activation) * up_TF)


class Block(nnx.Module):
    """Attention, then MLP, each around a residual. Gemma's sandwich norms also the output of each."""

    def __init__(self, config: ModelConfig, dtype: Dtype, group: Group) -> None:
        norm = lambda: RMSNorm(config.hidden_size, config.norm_eps)  # noqa: E731
        self.input_layernorm = norm()
        self.self_attn = Attention(config, dtype)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm() if config.sandwich_norms else None
        self.mlp = MLP(config, dtype)
        self.post_feedforward_layernorm = norm() if config.sandwich_norms else None
        self.group = group

    def project(self, x_TD: Array, rope: tuple[Array, Array], keep: Keep = ignore) -> tuple[Array, Array, Array]:
        """What comes before attention: q, k and v."""
        x_TD = self.input_layernorm(x_TD)
        keep(attn_norm=x_TD)
        return self.self_attn.project(x_TD, rope)

    def combine(self, x_TD: Array, out_TNH: Array, keep: Keep = ignore) -> Array:
        """What comes after it: the residual stream behind this block."""
        out_TD = self.group.all_reduce(self.self_attn.combine(out_TNH))
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x_TD = x_TD + out_TD
            mlp_TD = self.group.all_reduce(self.mlp(self.post_attention_layernorm(x_TD)))
        else:
            x_TD = x_TD + self.post_attention_layernorm(out_TD)
            mlp_TD = self.group.all_reduce(self.mlp(self.pre_feedforward_layernorm(x_TD)))
            mlp_TD = self.post_feedforward_layernorm(mlp_TD)
        keep(attn_residual=x_TD, mlp=mlp_TD)
        return x_TD + mlp_TD


class Decoder(nnx.Module):
    """Embedding, blocks, final norm and LM head; a stage has some of these.

    Attributes have the checkpoint's names, without the leading `model.`.

    Each of several ranks has a decoder of its part, and `config` describes that part. The sums over the `group` are those of
    the whole model. The logits are of the rank's own tokens.
    """

    def __init__(self, config: ModelConfig, dtype: Dtype, positions: int, group: Group = ALONE) -> None:
        V, D = config.vocab_size, config.hidden_size
        self.embed_tokens: Any = Embedding(V, D, config.embedding_scale, dtype, group) if config.has_table else None
        self.layers = nnx.List([Block(config, dtype, group) for _ in range(config.num_layers)])
        self.norm: Any = RMSNorm(D, config.norm_eps) if config.predicts else None
        head = config.predicts and not config.tie_embeddings
        self.lm_head = Linear(D, V, bias=False, split=1, dtype=dtype) if head else None
        self.ropes = nnx.List([Rotary(positions, config.head_dim) for _ in config.ropes])
        self.config = config


def forward(
    model: Decoder, token_ids: Array, positions: Array, attend: Attend, cache: Any = None, keep: Keep = ignore
) -> tuple[Array, Any]:
    """Return hidden states [T, D] after the final norm, and the cache, for tokens int32[T] at positions int32[T].

    A stage that is not the last returns its residual stream. A stage that is not the first takes the stream of the stage before
    in place of the tokens.
    """
    x_TD = model.embed_tokens(token_ids) if model.config.embeds else token_ids
    keep(embedding=x_TD)
    ropes = [rope(positions) for rope in model.ropes]
    for layer, block in enumerate(model.layers):
        here = partial(keep, layer)
        q_TNH, k_TKH, v_TKH = block.project(x_TD, ropes[model.config.layer_rope[layer]], here)
        out_TNH, cache = attend(q_TNH, k_TKH, v_TKH, layer, cache)
        here(q=q_TNH, k=k_TKH, v=v_TKH, attention=out_TNH)
        x_TD = block.combine(x_TD, out_TNH, here)
        here(residual=x_TD)
    if model.config.predicts:
        x_TD = model.norm(x_TD)
        keep(final_norm=x_TD)
    return x_TD, cache


def logits(model: Decoder, x_TD: Array) -> Array:
    """float32[T, V]"""
    if model.lm_head is None:
        return matmul(x_TD, model.embed_tokens.weight[...], 1)
    return matmul(x_TD, model.lm_head.weight[...], 0)
