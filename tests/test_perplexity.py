"""Perplexity: from windows of a text, the same number from every engine, and none where logits are broken."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import EngineConfig
from common.errors import ConfigError
from common.interface import load_backend
from experiments.correctness.config import CorrectnessConfig
from experiments.correctness.perplexity import TEXT, chosen_logprobs, perplexity, read_text, surprise, tokenize, windows
from experiments.correctness.reference import NumpyModel
from tests.backends import checkpoint

MODEL, CONTEXT = "tiny-llama", 40


def test_windows_cover_a_text_and_the_last_single_token_predicts_nothing() -> None:
    assert [list(window) for window in windows(range(7), 3)] == [[0, 1, 2], [3, 4, 5]]
    assert [list(window) for window in windows(range(5), 3)] == [[0, 1, 2], [3, 4]]
    assert windows([], 3) == []


@pytest.mark.parametrize(("backend", "kernels"), [("jax", "native"), ("torch", "native"), ("torch", "framework")])
def test_an_engine_gives_the_perplexity_that_float64_gives(backend: str, kernels: str) -> None:
    tokens = tokenize(checkpoint(MODEL), TEXT)[:100]
    options: dict[str, Any] = {"kernels": kernels, "dtype": "float32", "device": "cpu", "threads": 1}
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64, **options)  # chunks of 16
    runner = load_backend(backend, config)
    runner.load(checkpoint(MODEL))
    runner.allocate([4])
    total, count = surprise(runner, config, tokens, CONTEXT, lambda *_: None)
    exact, model = 0.0, NumpyModel(checkpoint(MODEL))
    for window in windows(tokens, CONTEXT):
        logits = model.logits(window)[:-1]
        exact -= chosen_logprobs(logits, np.array(window[1:])).sum()
    assert count == 39 + 39 + 19
    assert total == pytest.approx(exact, rel=1e-6)
    assert perplexity({"total": total, "count": count}) == pytest.approx(math.exp(exact / count), rel=1e-5)


def test_uniform_logits_are_as_surprising_as_the_vocabulary_is_large() -> None:
    logprobs = chosen_logprobs(np.full((5, 64), 3.0, np.float32), np.arange(5))
    assert perplexity({"total": -logprobs.sum(), "count": 5}) == pytest.approx(64)


def test_broken_logits_or_an_empty_text_have_no_perplexity() -> None:
    broken = chosen_logprobs(np.array([[1.0, np.nan]]), np.array([0]))
    assert perplexity({"total": -broken.sum(), "count": 1}) is None
    assert perplexity({"total": 0.0, "count": 0}) is None


def test_a_text_of_ones_own_is_read_and_a_missing_one_refused_early(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("mine")
    assert read_text(str(path)) == "mine" and read_text(None) == TEXT
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_text(str(path))
    for bad in (path, tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(ConfigError, match=r"correctness\.perplexity_text must be a file of UTF-8 text"):
            CorrectnessConfig(num_requests=1, output_len=1, tolerance=1e-3, perplexity_text=str(bad))
