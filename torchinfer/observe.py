"""A step with its insides shown: what `ModelRunner.observe` runs.

The same operations as the step that serves, taken apart no further than its kernels are: native layers show what lies between
their three operators, and blocks under torch.compile what they return.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.kernels.cpu.step import pack_step
from common.schedule.batch import Batch
from torchinfer import kernels
from torchinfer.arrays import to_device, to_host
from torchinfer.model import Attend, Block, Decoder, logits
from torchinfer.step import State

Keep = Callable[[str, Tensor], None]
"""Called with the name and the value of what was just computed."""


class Observer:
    """Observes the steps of a loaded `step.Step` or `kernels.Step`."""

    def __init__(self, step: Any) -> None:
        self._step = step

    def run(self, state: State, batch: Batch, names: Collection[str] | None) -> tuple[State, dict[str, np.ndarray]]:
        """One step, and what it computed on the way: those of `names`, or all."""
        taps: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> None:
            if names is None or name in names:
                taps[name] = x.clone()  # operators work in place

        with torch.inference_mode():
            observed = _native if isinstance(self._step, kernels.Step) else _framework
            state = observed(self._step, state, batch, keep)
        return state, {name: x if name == "tokens" else x.astype(np.float32) for name, x in to_host(taps).items()}


def forward(model: Decoder, token_ids: Tensor, positions: Tensor, attend: Attend, cache: Any, keep: Keep) -> tuple[Tensor, Any]:
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


def within(keep: Keep, layer: int, name: str, x: Tensor) -> None:
    """`keep` what a layer computed, under its full name."""
    keep(f"layers.{layer}.{name}", x)


def project(block: Block, x_TD: Tensor, rope: tuple[Tensor, Tensor], keep: Keep) -> tuple[Tensor, Tensor, Tensor]:
    """`Block.project`, shown."""
    if _is_compiled(block):
        q_TNH, k_TKH, v_TKH = block.project(x_TD, rope)
    else:
        x_TD = block.input_layernorm(x_TD)
        keep("attn_norm", x_TD)
        q_TNH, k_TKH, v_TKH = block.self_attn.project(x_TD, rope)
    keep("q", q_TNH)
    keep("k", k_TKH)
    keep("v", v_TKH)
    return q_TNH, k_TKH, v_TKH


def combine(block: Block, x_TD: Tensor, out_TNH: Tensor, keep: Keep) -> Tensor:
    """`Block.combine`, shown."""
    if _is_compiled(block):
        return block.combine(x_TD, out_TNH)
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


def _is_compiled(block: Block) -> bool:
    """Whether the step has put compiled functions in the place of the block's methods."""
    return "project" in vars(block)


def _framework(step: Any, state: State, batch: Batch, keep: Keep) -> State:
    def shown(model: Decoder, x_TD: Tensor) -> Tensor:
        logits_RV = logits(model, x_TD)
        keep("logits", logits_RV)
        return logits_RV

    inputs = to_device(step._inputs(batch), step.device)
    state, sampled = step._step(state, inputs, partial(forward, keep=keep), shown)
    keep("tokens", sampled.tokens.int())
    return state


def _native(step: Any, state: State, batch: Batch, keep: Keep) -> State:
    packed = torch.from_numpy(pack_step(batch))
    config, weights = step.model_config, step.weights

    def layer(config: Any, weights: Any, number: int, packed: Tensor, pools: Any, x_TD: Tensor) -> tuple[Any, Tensor]:
        if number == 0:
            keep("embedding", x_TD)
        here = partial(within, keep, number)
        pools, x_TD = kernels.layer_in_parts(config, weights, number, packed, pools, x_TD, here)
        here("residual", x_TD)
        return pools, x_TD

    logits_RV, state = kernels.forward(config, weights, state, packed, batch.num_tokens, len(batch.logit_rows), layer)
    keep("logits", logits_RV)
    sampled, state = kernels.sample(state, packed, logits_RV)
    keep("tokens", sampled[:, 0])
    return state
