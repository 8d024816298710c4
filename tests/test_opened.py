"""The tokenizer, the chat template and the sampling defaults that a user may put in the place of the model's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from common.errors import CheckpointError
from common.llm import LLM
from common.request import SamplingParams
from common.serve.protocol import CompletionRequest, parse
from common.text.opened import defaults_of, tokenizer_of
from common.weights.checkpoint import open_checkpoint
from common.weights.zoo import resolve

RECOMMENDED = {"temperature": 0.25, "top_k": 7, "repetition_penalty": 1.25, "max_new_tokens": 100_000, "eos_token_id": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(resolve("tiny-llama"), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    return tmp_path / "model"


def test_requests_without_parameters_take_those_that_the_model_recommends(backend: str, model: Path, tmp_path: Path) -> None:
    small = {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 32, "num_blocks": 20, "threads": 1, "seed": 3}
    expected = SamplingParams(temperature=0.25, top_k=7, repetition_penalty=1.25)
    with LLM(model, backend=backend, use_tqdm=False, **small) as llm:
        assert llm.get_default_sampling_params() == expected
        (found,) = llm.generate("the and of")
    with LLM(model, backend=backend, use_tqdm=False, generation_config="vllm", **small) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
        (right,) = llm.generate("the and of", expected)
    assert found.outputs == right.outputs


def test_a_request_that_gives_a_parameter_has_its_own(model: Path, tmp_path: Path) -> None:
    defaults = defaults_of(open_checkpoint(model))
    assert defaults == {"temperature": 0.25, "top_k": 7, "repetition_penalty": 1.25}
    params = parse(CompletionRequest, b'{"prompt": "a", "temperature": 0, "top_k": null}').params(16, None, defaults=defaults)
    assert (params.temperature, params.top_k, params.repetition_penalty, params.max_tokens) == (0.0, 7, 1.25, 16)
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match=r"has no generation_config\.json"):
        defaults_of(open_checkpoint(model), str(tmp_path / "other"))
    (tmp_path / "other" / "generation_config.json").write_text('{"top_p": 0.5}')
    assert defaults_of(open_checkpoint(model), str(tmp_path / "other")) == {"top_p": 0.5}


def test_another_tokenizer_and_another_template_take_the_place_of_the_models_own(model: Path, tmp_path: Path) -> None:
    checkpoint, file = open_checkpoint(model), tmp_path / "mine.jinja"
    own = tokenizer_of(checkpoint)
    assert tokenizer_of(checkpoint, "tiny-qwen3").encode("the") == own.encode("the")
    with pytest.raises(CheckpointError, match="not of the same model"):
        tokenizer_of(checkpoint, "smollm2-135m")
    file.write_text("{{ messages[0].content }}!")
    for given in (str(file), "{{ messages[0].content }}!"):
        assert tokenizer_of(checkpoint, chat_template=given).chat_template == "{{ messages[0].content }}!"
    with pytest.raises(CheckpointError, match="neither a file nor a Jinja template"):
        tokenizer_of(checkpoint, chat_template="chatml")
