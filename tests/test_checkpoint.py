"""Hugging Face directories: read back whole and in parts, and refused with every reason when they are not right."""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from common.errors import CheckpointError, ConfigError, TandemError
from common.request import SamplingParams
from common.weights.checkpoint import expected_shapes, open_checkpoint
from common.weights.config_json import ARCHITECTURES, model_config_from_json
from common.weights.files import MAX_HEADER
from common.weights.generation import sampling_defaults
from common.weights.hf import read_safetensors
from tests.families import FAMILIES, save_family

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
Edit = Callable[[dict[str, torch.Tensor]], object]


def save(directory: Path, edit: Edit = lambda tensors: None, **config: Any) -> Path:
    """A small valid directory, after `edit` has changed its tensors and `config` its config.json."""
    generator = torch.Generator().manual_seed(0)
    data = {key: value for key, value in (CONFIG | config).items() if value is not ...}
    shapes = expected_shapes(
        model_config_from_json(CONFIG | {"tie_word_embeddings": config.get("tie_word_embeddings") is True})
    )
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    edit(tensors)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(data))
    save_file(tensors, directory / "model.safetensors")
    return directory


def shard(directory: Path) -> Path:
    """Cut model.safetensors in two, with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def remap(directory: Path, shard_name: str) -> None:
    """Make the index of a sharded directory name `shard_name` for one tensor."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = shard_name
    path.write_text(json.dumps(index))


# ---- reading


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_reads_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_family(family, tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert sorted(checkpoint.names()) == sorted(saved)
    for name, tensor in saved.items():
        dense = checkpoint[name].dense()
        assert dense.flags["C_CONTIGUOUS"] and dense.flags["WRITEABLE"] and not np.shares_memory(dense, checkpoint[name].raw())
        np.testing.assert_array_equal(dense, tensor.numpy(), strict=True)


@pytest.mark.parametrize(("dtype", "encoding"), [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float32, "F32")])
def test_half_precision_is_widened_exactly(dtype: torch.dtype, encoding: str, tmp_path: Path) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items()}

    checkpoint = open_checkpoint(save(tmp_path / "model", convert))
    entry = checkpoint["model.layers.1.mlp.up_proj.weight"]
    expected = load_file(tmp_path / "model" / "model.safetensors")[entry.name]
    assert (entry.encoding, entry.shape) == (encoding, (24, 16))
    np.testing.assert_array_equal(entry.dense(), expected.float().numpy(), strict=True)
    assert entry.raw().nbytes == expected.nbytes and not entry.raw().flags["WRITEABLE"]
    assert entry.raw().tobytes() == expected.view(torch.uint8).numpy().tobytes()


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path) -> None:
    whole, sharded = open_checkpoint(save(tmp_path / "one")), open_checkpoint(shard(save(tmp_path / "two")))
    assert whole.names() == sharded.names() and whole.config == sharded.config
    for name in whole.names():
        np.testing.assert_array_equal(whole[name].dense(), sharded[name].dense())


@pytest.mark.parametrize(("axis", "start", "stop"), [(0, 3, 9), (1, 5, 6), (-1, 0, 16), (0, 24, 24), (-2, 0, 1)])
def test_a_slice_is_that_part_of_the_dense_tensor(axis: int, start: int, stop: int, tmp_path: Path) -> None:
    entry = open_checkpoint(save(tmp_path / "model"))["model.layers.0.mlp.gate_proj.weight"]
    part = entry.slice(axis, start, stop)
    np.testing.assert_array_equal(part, np.take(entry.dense(), range(start, stop), axis), strict=True)
    assert part.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 25)])
def test_a_slice_outside_the_tensor_is_refused(start: int, stop: int, tmp_path: Path) -> None:
    entry = open_checkpoint(save(tmp_path / "model"))["model.layers.0.mlp.gate_proj.weight"]
    with pytest.raises(IndexError, match="gate_proj"):
        entry.slice(0, start, stop)


def test_opening_and_slicing_read_no_more_than_they_need(tmp_path: Path) -> None:
    """An embedding of 8 GB, a hole in a sparse file: nobody could read it whole in this test."""
    save(
        tmp_path / "model", lambda tensors: tensors.pop("model.embed_tokens.weight"), tie_word_embeddings=True, vocab_size=2**27
    )
    path = tmp_path / "model" / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["model.embed_tokens.weight"] = {"dtype": "F32", "shape": [2**27, 16], "data_offsets": [end, end + 2**33]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    os.truncate(path, 8 + len(text) + end + 2**33)
    tracemalloc.start()
    part = open_checkpoint(tmp_path / "model")["model.embed_tokens.weight"].slice(0, 2**26, 2**26 + 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.shape == (2, 16) and (part == 0).all() and peak < 2**20


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Did you mean 'model\.norm\.weight'"):
        open_checkpoint(save(tmp_path / "model"))["model.norm.weigth"]


def test_end_tokens_of_generation_config_are_added(tmp_path: Path) -> None:
    (save(tmp_path / "model") / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9]}')
    assert open_checkpoint(tmp_path / "model").config.eos_token_ids == (2, 7, 9)


def test_what_nothing_reads_is_ignored(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2, dtype=torch.float64)
        tensors["lm_head.weight"] = torch.ones(50, 16)

    checkpoint = open_checkpoint(save(tmp_path / "model", edit, tie_word_embeddings=True))
    assert "lm_head.weight" not in checkpoint.names() and len(checkpoint.names()) == 20


def test_a_hub_cache_of_links_is_read(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shard(save(tmp_path / "plain")).rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert len(open_checkpoint(snapshot).names()) == 21


# ---- tensors that do not fit


def test_every_mismatch_is_listed_at_once(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(16, 24)
        tensors["model.layers.1.mlp.router.weight"] = torch.ones(3)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(save(tmp_path / "model", edit))
    for part in (
        "4 tensor(s)",
        "missing model.layers.0.mlp.up_proj.weight (24, 16)",
        "missing model.norm.weight (16,)",
        "model.layers.1.mlp.up_proj.weight has shape (16, 24), expected (24, 16)",
        "unexpected model.layers.1.mlp.router.weight (3,)",
    ):
        assert part in str(caught.value)


def test_of_very_many_mismatches_ten_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(save(tmp_path / "model", num_hidden_layers=4096))
    first, *named, last = str(caught.value).splitlines()
    assert "36846 tensor(s) do not fit" in first and len(named) == 50 and last.strip() == "and 36796 more"


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("vocab_size", 51, ["embed_tokens", "lm_head"]),
        ("num_hidden_layers", 3, ["missing model.layers.2.self_attn.q_proj"]),
        ("num_hidden_layers", 1, ["unexpected model.layers.1.self_attn.q_proj"]),
        ("head_dim", 8, ["q_proj", "o_proj"]),
        ("attention_bias", True, ["missing model.layers.0.self_attn.o_proj.bias"]),
        ("architectures", ["Qwen3ForCausalLM"], ["missing model.layers.0.self_attn.q_norm.weight"]),
    ],
)
def test_a_configuration_of_another_model_is_refused(field: str, value: Any, names: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(save(tmp_path / "model", **{field: value}))
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38])
def test_weights_that_are_not_finite_even_in_bfloat16_are_refused_when_read(value: float, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "model", lambda tensors: tensors["model.norm.weight"].fill_(value)))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds 16 values that are NaN, infinite or beyond"):
        checkpoint["model.norm.weight"].dense()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bool])
def test_a_dtype_that_is_no_weight_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    path = save(tmp_path / "model", lambda tensors: tensors.update({"model.norm.weight": torch.ones(16, dtype=dtype)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype .* supported are F32, F16, BF16"):
        open_checkpoint(path)


# ---- damaged files

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(header: bytes, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def described(*tensors: dict[str, Any], data: int = 8) -> bytes:
    return raw_file(json.dumps({f"t{i}": tensor for i, tensor in enumerate(tensors)}).encode(), b"\0" * data)


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "seven bytes": b"\1" * 7,
        "header longer than the file": raw_file(b"{}", length=1000),
        "header of 200 MB": raw_file(b"{}", length=200_000_000),
        "header of 2**64 - 1": raw_file(b"{}", length=2**64 - 1),
        "not an object": raw_file(b"[]"),
        "not UTF-8": raw_file(b'{"\xff": 1}'),
        "not JSON": raw_file(b"{nonsense}"),
        "a name twice": raw_file(json.dumps({"a": TENSOR}).encode()[:-1] + b", " + json.dumps({"a": TENSOR}).encode()[1:]),
        "negative offset": described(TENSOR | {"data_offsets": [-8, 0]}),
        "reversed offsets": described(TENSOR | {"data_offsets": [8, 0]}),
        "overlap": described(TENSOR, TENSOR),
        "hole": described(TENSOR, TENSOR | {"data_offsets": [16, 24]}, data=24),
        "outside the file": described(TENSOR | {"data_offsets": [800, 808]}),
        "shape too large": described(TENSOR | {"shape": [2**62, 2**62]}),
        "shape and bytes differ": described(TENSOR | {"shape": [3]}),
        "unknown dtype": described(TENSOR | {"dtype": "F7"}),
        "truncated": described(TENSOR, data=5),
        "101 axes": described(TENSOR | {"shape": [2] + [1] * 100}),
        "an empty shape that overflows": described(TENSOR | {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, data=0),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_file_is_refused_by_name(content: tuple[str, bytes], tmp_path: Path) -> None:
    (save(tmp_path / "model") / "model.safetensors").write_bytes(content[1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path / "model")


def test_a_truncated_last_shard_is_refused_by_name(tmp_path: Path) -> None:
    last = shard(save(tmp_path / "model")) / "model-00002-of-00002.safetensors"
    os.truncate(last, last.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("escape", ["../secret.safetensors", "/etc/passwd", "link.safetensors", "sub/../x.safetensors", ".."])
def test_an_index_that_points_outside_is_refused(escape: str, tmp_path: Path) -> None:
    directory = shard(save(tmp_path / "model"))
    (save(tmp_path / "other") / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (directory / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    remap(directory, escape)
    with pytest.raises(CheckpointError, match="points outside its directory"):
        open_checkpoint(directory)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    remap(shard(save(tmp_path / "model")), "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="1 of 3 shards are missing: model-00003-of-00003"):
        open_checkpoint(tmp_path / "model")


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    directory = shard(save(tmp_path / "model"))
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    other = ({*index.values()} - {index["model.norm.weight"]}).pop()
    remap(directory, other)
    with pytest.raises(CheckpointError, match=r"do not hold: model\.norm\.weight"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "a\\u0000b"}}',
        '{"weight_map": {"a": "' + "a" * 5000 + '"}}',
        "[]",
        "",
        "[" * 100_000,
    ],
)
def test_an_index_that_is_no_index_is_refused(index: str, tmp_path: Path) -> None:
    directory = shard(save(tmp_path / "model"))
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(directory)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused_with_a_hint(file: str, tmp_path: Path) -> None:
    (save(tmp_path / "model") / "model.safetensors").rename(tmp_path / "model" / file)
    with pytest.raises(CheckpointError, match=r"pickle.*safetensors"):
        open_checkpoint(tmp_path / "model")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    (save(tmp_path / "weightless") / "model.safetensors").unlink()
    (tmp_path / "with gguf").mkdir()
    (tmp_path / "with gguf" / "a.gguf").touch()
    for name, message in {
        "nowhere": "does not exist",
        "empty": "has no config.json",
        "with gguf": "Did you mean .*a.gguf",
        "file.txt": r"expected a \.gguf file",
        "weightless": "has no weights",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)


# ---- config.json


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spelling_before_transformers_5_means_the_same(family: str, tmp_path: Path) -> None:
    save_family(family, tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    parameters = new["rope_parameters"]
    full = parameters.get("full_attention", parameters)
    if family == "gemma3":
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = 6
    old["rope_theta"] = full["rope_theta"]
    if full["rope_type"] != "default":
        scaling = {key: value for key, value in full.items() if key not in ("rope_theta", "rope_type")}
        old["rope_scaling"] = scaling | {"type": full["rope_type"]}
    assert "rope_parameters" in new and model_config_from_json(old) == model_config_from_json(new)


def test_optional_fields_take_the_defaults_of_the_family() -> None:
    bare = {key: value for key, value in CONFIG.items() if key not in ("num_key_value_heads", "eos_token_id")}
    llama = model_config_from_json(bare)
    assert (llama.num_kv_heads, llama.head_dim, llama.norm_eps, llama.tie_embeddings) == (4, 4, 1e-6, False)
    assert llama.ropes[0].base == 10_000 and llama.eos_token_ids == () and llama.layer_window == (0, 0)
    gemma = model_config_from_json(bare | {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 8})
    assert (gemma.head_dim, gemma.tie_embeddings, gemma.embedding_scale, gemma.attention_scale) == (256, True, 4.0, 1 / 16)
    assert [rope.base for rope in gemma.ropes] == [1e6, 1e4] and gemma.activation == "gelu_tanh"
    assert gemma.layer_window == (4096,) * 5 + (0,) + (4096,) * 2 and gemma.layer_rope == (1, 1, 1, 1, 1, 0, 1, 1)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_window_that_is_switched_off_does_not_count(architecture: str) -> None:
    config = CONFIG | {"architectures": [architecture], "sliding_window": 8, "max_window_layers": 1}
    assert model_config_from_json(config).layer_window == (0, 0)
    assert model_config_from_json(config | {"use_sliding_window": True}).layer_window == (0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": ..., "hidden_size": ...}, "vocab_size, hidden_size are missing"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"head_dim": 0}, "head_dim must be a positive integer"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"num_attention_heads": 0}, "num_heads must be a positive integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number in"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
        ({"hidden_size": "16"}, "hidden_size must be a whole number"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"hidden_size": 2**40}, "hidden_size must be a whole number in"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": 0}, "norm_eps must lie in"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a finite number"),
        ({"rope_theta": 10**400}, "rope_theta must be a finite number"),
        ({"partial_rotary_factor": 10**400}, "partial_rotary_factor must be a finite number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": "relu"}, 'Activation "relu" is not supported'),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a whole number"),
        ({"rope_theta": -1}, "RoPE base must be finite"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'RoPE scaling "dynamic" is not supported'),
        ({"rope_scaling": {"rope_type": "yarnn", "factor": 2.0}}, "Did you mean 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor must be a number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be a number"),
        ({"rope_scaling": "yarn"}, "must be an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
        ({"architectures": ["Gemma3ForCausalLM"], "final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        ({"architectures": ["Gemma3ForCausalLM"], "layer_types": ["full_attention"]}, "layer_types must name"),
        ({"architectures": ["Gemma3ForCausalLM"], "layer_types": [{}, {}]}, "layer_types must name"),
        *(
            ({"architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": scalar}, f"query_pre_attn_scalar must {be}")
            for be, scalars in {"lie in": (0, -4, 1e-320), "be a finite": (float("nan"), float("inf"))}.items()
            for scalar in scalars
        ),
        ({"eos_token_id": 99999}, "eos token ids must lie in the vocabulary"),
        ({"architectures": ["Gemma3ForCausalLM"], "sliding_window": None}, "sliding_window must be a positive integer"),
        ({"architectures": ["LlamaForCausalLm"]}, "Did you mean 'LlamaForCausalLM'"),
        ({"architectures": ["MambaForCausalLM"]}, ", ".join(ARCHITECTURES)),
        ({"architectures": ...}, "Architecture null is not supported"),
        ({"architectures": []}, "is not supported"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_file_and_field(changes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        open_checkpoint(save(tmp_path / "model", **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"text"', "null", "\xff", "[" * 100_000, '{"vocab_size": 1, "vocab_size": 2}']
)
def test_a_config_that_is_no_json_object_is_refused(content: str, tmp_path: Path) -> None:
    (save(tmp_path / "model") / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path / "model")


def test_code_named_by_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    directory = save(
        tmp_path / "model",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        _attn_implementation_internal="evil/kernel",
        _target_="os.system",
    )
    (directory / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    open_checkpoint(directory)["model.norm.weight"].dense()
    assert not canary.exists()


# ---- files that are no files


def replaced(path: Path, kind: str) -> str:
    """Put something else in the place of a file. Returns the description that an error message has to give."""
    path.unlink(missing_ok=True)
    match kind:
        case "FIFO":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "directory":
            path.mkdir()
        case "1 GB":
            path.touch()
            os.truncate(path, 1 << 30)
            return "has 1073741824 bytes; at most"
    return f"expected a regular file, and it is a {kind}"


JSON_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in JSON_FILES for kind in ("FIFO", "device", "directory", "1 GB")),
        *(("model.safetensors", kind) for kind in ("FIFO", "device", "directory")),
        *(("a.gguf", kind) for kind in ("FIFO", "device")),
    ],
)
def test_what_is_no_regular_file_or_too_large_is_refused_before_it_is_read(name: str, kind: str, tmp_path: Path) -> None:
    directory = save(tmp_path / "model")
    message = replaced(directory / name, kind)
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory / name if name == "a.gguf" else directory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert name in str(caught.value) and message in str(caught.value) and peak < 2**22


def test_an_index_that_names_very_many_shards_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path / "model")
    weight_map = {f"tensor{i}": f"{i}.safetensors" for i in range(100_000)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"index\.json names 100000 shards; at most 4096"):
        open_checkpoint(directory)
    few = dict(list(weight_map.items())[:4096])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": few}))
    with pytest.raises(CheckpointError, match=r"4096 of 4096 shards are missing: 0\.safetensors, .* and 4086 more"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"__metadata__":{"":"' + b" " * MAX_HEADER + b'"}}', f"at most {MAX_HEADER} are accepted"),
        (
            b"{%s}" % b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1001)),
            "has 1001 tensors; at most 1000 are accepted",
        ),
    ],
    ids=["bytes", "tensors"],
)
def test_a_safetensors_header_has_limits(header: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.weights.hf.MAX_TENSORS", 1000)
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, b""))
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["architectures", "layer_types", "hidden_act", "rope_scaling", "quantization_config", "eos_token_id"]
)
def test_a_value_of_megabytes_is_refused_at_once_and_in_short(name: str) -> None:
    gemma = ["Gemma3ForCausalLM"] if name == "layer_types" else CONFIG["architectures"]
    long: Any = "x" * (1 << 20)
    with pytest.raises(ConfigError) as caught:
        model_config_from_json(CONFIG | {"architectures": gemma} | {name: [long] if name == "architectures" else long})
    assert len(str(caught.value)) < 1000


# ---- recommended sampling parameters


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, {}),
        ({"eos_token_id": 2, "do_sample": True, "_from_model_config": True, "transformers_version": "5.0"}, {}),
        (
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0, "repetition_penalty": 1.05, "max_new_tokens": 2048},
            {
                "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.05, "max_tokens": 2048,
            },
        ),
        ({"temperature": None, "top_k": 64, "top_p": 1, "penalty_alpha": "x"}, {"top_k": 64, "top_p": 1.0}),
    ],
)  # fmt: skip
def test_recommended_sampling_parameters_are_read(content: Any, found: dict[str, Any], tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert sampling_defaults(tmp_path) == found
    assert SamplingParams(**found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": "hot"}, "temperature: temperature must be a number"),
        ({"temperature": float("nan")}, "temperature: temperature must be a number"),
        ({"top_p": 2}, "top_p: top_p must be a number"),
        ({"top_k": 1.5}, "top_k: top_k must be an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens: max_tokens must be an integer"),
        ({"repetition_penalty": 10**400}, "repetition_penalty: repetition_penalty must be a number"),
        ([], "expected a JSON object"),
    ],
)
def test_a_recommendation_that_cannot_be_followed_is_refused_with_file_and_field(
    content: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(TandemError, match=r"generation_config\.json") as caught:
        sampling_defaults(tmp_path)
    assert message in str(caught.value)


def test_recommendations_in_a_gguf_file_are_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 40)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert sampling_defaults(tmp_path / "a.gguf") == {"temperature": 0.5, "top_k": 40}
