"""The pieces of a decoder, as equations.

Letters: T tokens · D model · N query heads · K key/value heads · H head dim · F feed-forward · V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchinfer.parallel import Group

Dtype = torch.dtype


class Linear(nn.Module):
    """Compute y = x W^T + b, with W stored [out, in] as in checkpoints.

    `split` is the axis of W that ranks share. The shapes are already a rank's own. If it is the input axis, y is a term of a
    sum over the ranks, and the first rank has the bias.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, split: int, dtype: Dtype) -> None:
        super().__init__()
        self.weight = _parameter((outputs, inputs), dtype)
        self.bias = _parameter((outputs,), dtype) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        return _linear(x_TD, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * w over the last axis, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = _parameter((size,), torch.float32)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class Embedding(nn.Module):
    """Rows of a table, stored [V, D]; a tied LM head multiplies by its transpose."""

    def __init__(self, vocab: int, size: int, scale: float, dtype: Dtype, group: Group) -> None:
        super().__init__()
        self.weight = _parameter((vocab, size), dtype)
        self.scale, self.group = scale, group

    def forward(self, token_ids: Tensor) -> Tensor:
        x_TD = self.group.look_up(lambda ids: F.embedding(ids, self.weight), token_ids, len(self.weight))
        # The scale is rounded to the model's dtype first, as Gemma was trained.
        return x_TD * x_TD.new_tensor(self.scale) if self.scale != 1.0 else x_TD


class Rotary(nn.Module):
    """Tables of cos and sin, float32[positions, H/2], looked up once a step (Su et al. 2021, arXiv:2104.09864)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, positions: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("cos", torch.empty((positions, head_dim // 2)))
        self.register_buffer("sin", torch.empty((positions, head_dim // 2)))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[positions], self.sin[positions]


def _parameter(shape: tuple[int, ...], dtype: Dtype) -> nn.Parameter:
    """An uninitialised weight."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def matmul(x: Tensor, weight: Tensor, inputs: int) -> Tensor:
    """x W in the dtype of x, returned in float32; `inputs` is the axis of W that is summed over."""
    return _linear(x, weight if inputs == 1 else weight.T, None).float()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.is_mkldnn:  # packed by the runner
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def rotate(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of each head: halves (a, b) become (a cos - b sin, b cos + a sin). cos, sin: float32[T, H/2]."""
    a, b = x_TNH.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_TNH.dtype)


def activate(x_TF: Tensor, kind: str) -> Tensor:
    """SiLU, or GELU in its tanh form."""
    return F.silu(x_TF) if kind == "silu" else F.gelu(x_TF, approximate="tanh")
