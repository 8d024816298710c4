"""Hugging Face `transformers`, the judge from outside, made to compute in float64 throughout.

A float64 model of theirs still rounds norms, softmax and RoPE to float32, which hides errors below 1e-6 of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import logging

logging.disable_progress_bar()


class _NoFloat32(TorchFunctionMode):
    """Turns every request for float32 into one for float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


@contextmanager
def true_float64() -> Iterator[None]:
    """Within it, code written for float32 computes in float64. Build and run a model inside."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _NoFloat32(), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(default)


def transformers_logits(path: Path, token_ids: Sequence[int]) -> np.ndarray:
    """Logits of a directory or a GGUF file by `transformers`, eager attention, float64 throughout: [T] → [T, V]."""
    where: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        dequantize = GgufConfig(dequantize=True)
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "quantization_config": dequantize}
    with true_float64():
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float64, attn_implementation="eager").eval()
        logits: np.ndarray = model(torch.tensor(token_ids)[None]).logits[0].numpy()
    return logits
