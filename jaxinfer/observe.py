"""A step with its insides shown: what `ModelRunner.observe` runs.

The same operations as the step that serves, taken apart no further than its kernels are: native layers show what lies between
their three operators. A program is compiled for each set of names: XLA leaves out what nobody asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.kernels.cpu.step import max_step_size, pack_step
from common.schedule.batch import Batch
from jaxinfer import kernels
from jaxinfer.arrays import to_host
from jaxinfer.model import Attend, Block, Decoder, logits
from jaxinfer.step import State, _Bucket

Keep = Callable[[str, Array], None]
"""Called with the name and the value of what was just computed."""


_Program = Callable[[Any, State, Array, Keep], State]
"""(weights, state, inputs, keep) → state, to be compiled."""


class Observer:
    """Observes the steps of a loaded `step.Step` or `kernels.Step`."""

    def __init__(self, step: Any) -> None:
        self._step = step
        self._compiled: dict[Any, Any] = {}

    def run(self, state: State, batch: Batch, names: Collection[str] | None) -> tuple[State, dict[str, np.ndarray]]:
        """One step, and what it computed on the way: those of `names`, or all."""
        observed = _native if isinstance(self._step, kernels.Step) else _framework
        key, inputs, function = observed(self._step, batch)
        wanted = None if names is None else frozenset(names)
        if (key, wanted) not in self._compiled:
            self._compiled[key, wanted] = self._compile(function, wanted, state, inputs)
        compiled, order = self._compiled[key, wanted]
        state, taps = compiled(self._step.weights, state, inputs)
        rows = {"logits": len(batch.logit_rows), "tokens": len(batch.logit_rows)}
        named = zip(order, to_host(taps), strict=True)
        return state, {name: _typed(x[: rows.get(name, batch.num_tokens)]) for name, x in named}

    def _compile(
        self, function: _Program, wanted: frozenset[str] | None, state: State, inputs: np.ndarray
    ) -> tuple[Any, list[str]]:
        """The compiled program, and the names of what it gives beside the state."""
        order: list[str] = []

        def program(weights: Any, state: State, inputs: Array) -> tuple[State, list[Array]]:
            taps: dict[str, Array] = {}

            def keep(name: str, x: Array) -> None:
                if wanted is None or name in wanted:
                    taps[name] = x

            state = function(weights, state, inputs, keep)
            order.extend(taps)
            return state, list(taps.values())

        return jax.jit(program, donate_argnums=1).lower(self._step.weights, state, inputs).compile(), order


def forward(model: Decoder, token_ids: Array, positions: Array, attend: Attend, cache: Any, keep: Keep) -> tuple[Array, Any]:
    """`model.forward`, shown."""
    x_TD = model.embed_tokens(token_ids)
    keep("embedding", x_TD)
    ropes = [rope(positions) for rope in model.ropes]
    for layer, block in enumerate(model.layers):
        here = partial(within, keep, layer)
        q_TNH, k_TKH, v_TKH = project(block, x_TD, ropes[model.config.layer_rope[layer]], here)
        out_TNH, cache = attend(q_TNH, k_TKH, v_TKH, layer, cache)
        here("attention", out_TNH)
        x_TD = combine(block, x_TD, out_TNH, here)
        here("residual", x_TD)
    x_TD = model.norm(x_TD)
    keep("final_norm", x_TD)
    return x_TD, cache


def within(keep: Keep, layer: int, name: str, x: Array) -> None:
    """`keep` what a layer computed, under its full name."""
    keep(f"layers.{layer}.{name}", x)


def project(block: Block, x_TD: Array, rope: tuple[Array, Array], keep: Keep) -> tuple[Array, Array, Array]:
    """`Block.project`, shown."""
    x_TD = block.input_layernorm(x_TD)
    keep("attn_norm", x_TD)
    q_TNH, k_TKH, v_TKH = block.self_attn.project(x_TD, rope)
    keep("q", q_TNH)
    keep("k", k_TKH)
    keep("v", v_TKH)
    return q_TNH, k_TKH, v_TKH


def combine(block: Block, x_TD: Array, out_TNH: Array, keep: Keep) -> Array:
    """`Block.combine`, shown."""
    out_TD = block.self_attn.combine(out_TNH)
    if block.pre_feedforward_layernorm is None or block.post_feedforward_layernorm is None:
        x_TD = x_TD + out_TD
        mlp_TD = block.mlp(block.post_attention_layernorm(x_TD))
    else:
        x_TD = x_TD + block.post_attention_layernorm(out_TD)
        mlp_TD = block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x_TD)))
    keep("attn_residual", x_TD)
    keep("mlp", mlp_TD)
    return x_TD + mlp_TD


def _framework(step: Any, batch: Batch) -> tuple[Any, np.ndarray, _Program]:
    """What the program is compiled for, its inputs, and the program. Two sizes serve all steps, and every token may ask for
    logits."""
    chunked = batch.num_tokens > int(batch.num_decodes[0])
    tokens = (step.token_buckets if chunked else step.decode_buckets)[-1]
    bucket = _Bucket(tokens, tokens, -(-step._positions // step.config.block_size), chunked)

    def program(weights: Any, state: State, inputs: Array, keep: Keep) -> State:
        def shown(model: Decoder, x_TD: Array) -> Array:
            logits_RV = logits(model, x_TD)
            keep("logits", logits_RV)
            return logits_RV

        state, sampled = step._step(bucket, weights, state, inputs, partial(forward, keep=keep), shown)
        keep("tokens", sampled.tokens)
        return state

    return bucket, step._pack(bucket, batch), program


def _native(step: Any, batch: Batch) -> tuple[Any, np.ndarray, _Program]:
    """Likewise for the native kernels."""
    config, model = step.config, step.model_config
    tokens = next(size for size in step._sizes if size >= batch.num_tokens)
    packed, pages = pack_step(batch), -(-config.model_len(model) // config.block_size)
    inputs = np.zeros(max_step_size(tokens, tokens, pages), np.int32)
    inputs[: len(packed)] = packed

    def program(weights: Any, state: State, inputs: Array, keep: Keep) -> State:
        def layer(config: Any, weights: Any, number: int, inputs: Array, pools: Any, x_TD: Array) -> tuple[Any, Array]:
            if number == 0:
                keep("embedding", x_TD)
            here = partial(within, keep, number)
            pools, x_TD = kernels.layer_in_parts(model, weights, number, inputs, pools, x_TD, here)
            here("residual", x_TD)
            return pools, x_TD

        logits_RV, state = kernels.forward(model, weights, state, inputs, tokens, tokens, layer)
        keep("logits", logits_RV)
        sampled, state = kernels.sample(state, inputs, logits_RV)
        keep("tokens", sampled[:, 0])
        return state

    return tokens, inputs, program


def _typed(x: np.ndarray) -> np.ndarray:
    """As float32; bfloat16 in native kernels is kept as uint16."""
    if x.dtype == np.int32:
        return x
    return (x.view(jnp.bfloat16) if x.dtype == np.uint16 else x).astype(np.float32)
