"""The pieces of a decoder, as equations.

Letters: T tokens · D model · N query heads · K key/value heads · H head dim · F feed-forward · V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxinfer.parallel import Group

Dtype = jnp.dtype


class Linear(nnx.Module):
    """Compute y = x W + b, with W stored [in, out] as XLA's CPU dot library wants it.

    `split` is the axis of W that ranks share. If it is the input axis, y is a term of a sum over the ranks, and the first rank
    has the bias.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, split: int, dtype: Dtype) -> None:
        self.weight = nnx.Param(jnp.zeros((inputs, outputs), dtype), split=split)
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype), split=0) if bias else None

    def __call__(self, x_TD: Array) -> Array:
        y = matmul(x_TD, self.weight[...], 0)
        return (y + self.bias[...] if self.bias is not None else y).astype(x_TD.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * w over the last axis, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones((size,), jnp.float32), split=None)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale * self.weight[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a table, stored [V, D]; a tied LM head multiplies by its transpose."""

    def __init__(self, vocab: int, size: int, scale: float, dtype: Dtype, group: Group) -> None:
        self.weight = nnx.Param(jnp.zeros((vocab, size), dtype), split=0)
        self.scale, self.group = scale, group

    def __call__(self, token_ids: Array) -> Array:
        table = self.weight[...]
        x_TD = self.group.look_up(partial(_take_rows, table), token_ids, len(table))
        # The scale is rounded to the model's dtype first, as Gemma was trained.
        return x_TD * jnp.asarray(self.scale, x_TD.dtype) if self.scale != 1.0 else x_TD


def _take_rows(table: Array, rows: Array) -> Array:
    """Return table[rows]. Numbers of 16 bits travel as integers: XLA:CPU would convert the whole table to float32 first."""
    if table.dtype.itemsize != 2:
        return jnp.take(table, rows, axis=0, mode="clip")
    bits = jnp.take(jax.lax.bitcast_convert_type(table, jnp.uint16), rows, axis=0, mode="clip")
    return jax.lax.bitcast_convert_type(bits, table.dtype)


class Rotary(nnx.Module):
    """Tables of cos and sin, float32[positions, H/2], looked up once a step (Su et al. 2021, arXiv:2104.09864)."""

    def __init__(self, positions: int, head_dim: int) -> None:
        self.cos = nnx.Variable(jnp.zeros((positions, head_dim // 2), jnp.float32))
        self.sin = nnx.Variable(jnp.zeros((positions, head_dim // 2), jnp.float32))

    def __call__(self, positions: Array) -> tuple[Array, Array]:
        return jnp.take(self.cos[...], positions, axis=0, mode="clip"), jnp.take(self.sin[...], positions, axis=0, mode="clip")


def matmul(x: Array, weight: Array, inputs: int) -> Array:
    """x W, accumulated and returned in float32; `inputs` is the axis of W that is summed over. A transpose in the graph would
    cost XLA:CPU its fast path."""
    return jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (inputs,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )


def rotate(x_TNH: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding of each head: halves (a, b) become (a cos - b sin, b cos + a sin). cos, sin: float32[T, H/2]."""
    a, b = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_TNH.dtype)


def activate(x_TF: Array, kind: str) -> Array:
    """SiLU, or GELU in its tanh form, in float32."""
    x32 = x_TF.astype(jnp.float32)
    y = jax.nn.silu(x32) if kind == "silu" else jax.nn.gelu(x32, approximate=True)
    return y.astype(x_TF.dtype)
