"""The dtype of an engine: float16 beside bfloat16, `auto`, and weights that a dtype cannot hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import CheckpointError, ConfigError
from common.llm import LLM
from common.request import SamplingParams
from common.weights.checkpoint import Checkpoint, open_checkpoint
from common.weights.zoo import resolve
from experiments.correctness.reference import NumpyModel
from tests.backends import checkpoint

MODEL = "tiny-llama"
SMALL: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 32, "num_blocks": 20, "threads": 1}


def scored(backend: str, prompt: list[int], **options: Any) -> tuple[np.ndarray, list[int]]:
    """Return the log-probabilities of a prompt's tokens and the greedy tokens after it."""
    with LLM(MODEL, backend=backend, use_tqdm=False, **(SMALL | options)) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
        (first,) = llm.generate([prompt], params)
        (again,) = llm.generate([[*prompt, *first.outputs[0].token_ids[:4]]], replace(params, max_tokens=4))
        assert again.outputs[0].token_ids == first.outputs[0].token_ids[4:]  # from pages that were written before
    found = first.prompt_logprobs or []
    return np.array([each[token].logprob for token, each in zip(prompt, found, strict=True) if each]), first.outputs[
        0
    ].token_ids


def test_float16_is_closer_to_the_judge_than_bfloat16(backend: str) -> None:
    prompt = np.random.default_rng(0).integers(0, checkpoint(MODEL).config.vocab_size, 50).tolist()
    logits = NumpyModel(checkpoint(MODEL)).logits(prompt)
    exact = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(49), prompt[1:]]
    half, brain = (
        np.abs(scored(backend, prompt, dtype=dtype, kernels="framework")[0] - exact).max() for dtype in ("half", "bfloat16")
    )
    assert 0 < half < brain / 4  # float16 has 3 more bits of mantissa


def test_native_kernels_leave_float16_to_the_framework(backend: str) -> None:
    with LLM(MODEL, backend=backend, use_tqdm=False, dtype="float16", **SMALL) as llm:
        assert llm.engine.caps.kernels == ("framework",)
        assert "float16" in str(llm.engine.caps.framework_because)
    with pytest.raises(ConfigError, match="not in float16"):
        LLM(MODEL, backend=backend, use_tqdm=False, dtype="float16", kernels="native", **SMALL)


@pytest.mark.parametrize(
    ("stored", "asked", "dtype"),
    [("F16", "auto", "float16"), ("BF16", "auto", "bfloat16"), ("F32", "auto", "bfloat16"), ("Q4_1", "auto", "bfloat16"),
     ("F16", "float", "float32"), ("BF16", "half", "float16"), ("F16", "bfloat16", "bfloat16")],
)  # fmt: skip
def test_auto_follows_the_weights(stored: str, asked: str, dtype: str) -> None:
    entries = {
        "norm": SimpleNamespace(shape=(8,), encoding="F32"),
        "matrix": SimpleNamespace(shape=(8, 8), encoding=stored),
    }
    options = Checkpoint.engine_config(SimpleNamespace(entries=entries), dtype=asked, block_size=32)
    assert (options.dtype, options.block_size) == (dtype, 32)


def test_a_dtype_that_is_none_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'float16'"):
        checkpoint(MODEL).engine_config(dtype="float61")


def test_a_weight_beyond_float16_is_refused(backend: str, tmp_path: Path) -> None:
    source = resolve(MODEL)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(tmp_path).engine_config(dtype="auto").dtype == "bfloat16"
    with pytest.raises(CheckpointError, match=r"down_proj.*100000, beyond the range of float16. Use dtype=bfloat16"):
        LLM(tmp_path, backend=backend, use_tqdm=False, dtype="float16", **SMALL)
