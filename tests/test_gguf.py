"""GGUF files: every encoding, what is stored differently undone, and damage of any kind refused."""

import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from common.config import Rope
from common.errors import CheckpointError, ConfigError, TandemError
from common.model.rope import inverse_frequencies
from common.weights.checkpoint import Checkpoint, open_checkpoint
from common.weights.entry import BLOCKS, PLAIN, block_layout
from common.weights.gguf import load_gguf, model_config_from_metadata
from common.weights.gguf_parts import read_metadata
from tests.families import save_family

STORED_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_NAMES = STORED_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TWINS = {
    "llama2": "llama", "llama3": "llama", "smollm": "llama", "llama-biases": "llama", "llama-linear": "llama",
    "llama-yarn": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3",
}  # fmt: skip
"""Family → its GGUF architecture."""


def write_twin(checkpoint: Checkpoint, architecture: str, path: Path) -> Path:
    """The same model as GGUF, written as llama.cpp's converter writes it."""
    config, rope = checkpoint.config, checkpoint.config.ropes[0]
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(rope.base)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if any(config.layer_window):
        writer.add_sliding_window(max(config.layer_window))
    if rope.scaling in ("linear", "yarn"):
        writer.add_string(f"{architecture}.rope.scaling.type", rope.scaling)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
        writer.add_float32(f"{architecture}.rope.scaling.yarn_beta_fast", rope.beta_fast)
        writer.add_float32(f"{architecture}.rope.scaling.yarn_beta_slow", rope.beta_slow)
    if rope.scaling == "llama3":
        factors = inverse_frequencies(replace(rope, scaling="none"), config.head_dim) / inverse_frequencies(
            rope, config.head_dim
        )
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    for name in checkpoint.names():
        data = checkpoint[name].dense()
        if architecture == "llama" and (".q_proj" in name or ".k_proj" in name):
            heads = data.shape[0] // config.head_dim
            data = np.ascontiguousarray(data.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2)).reshape(data.shape)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            data = data + np.float32(1)
        writer.add_tensor(stored_name(name, architecture), data)
    return close(writer, path)


def stored_name(name: str, architecture: str) -> str:
    names = GEMMA_NAMES if architecture == "gemma3" else STORED_NAMES
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{names[rest]}.{kind}"
    return f"{names[stem]}.{kind}"


def close(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MINIMAL: dict[str, Any] = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 64, "llama.embedding_length": 16,
    "llama.feed_forward_length": 24, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 50,
}  # fmt: skip


def write_tensors(path: Path, *tensors: tuple[str, np.ndarray, str]) -> Path:
    """A GGUF file of minimal metadata and the given (name, bytes or values, encoding)."""
    writer = GGUFWriter(path, "llama")
    for key, value in MINIMAL.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    for name, data, encoding in tensors:
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[encoding])
    return close(writer, path)


SCALES = {
    "Q2_K": [slice(-4, -2), slice(-2, None)], "Q3_K": [slice(-2, None)], "Q4_K": [slice(0, 2), slice(2, 4)],
    "Q5_K": [slice(0, 2), slice(2, 4)], "Q6_K": [slice(-2, None)],
}  # fmt: skip
"""Where blocks have float16 scales, if not at their beginning."""


def some_blocks(encoding: str, rows: int, columns: int) -> np.ndarray:
    """Random contents of an encoding: quantized where the library can, else random bits between sane float16 scales."""
    generator = np.random.default_rng(len(encoding) + rows)
    try:
        return quantize(generator.standard_normal((rows, columns), dtype=np.float32), GGMLQuantizationType[encoding])
    except NotImplementedError:
        values, size = block_layout(encoding)
        blocks = generator.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
        if encoding == "NVFP4":
            blocks[..., :4] = generator.integers(0x30, 0x40, (*blocks.shape[:2], 4))  # scales of 8 bits, 0.5 to 2
        elif encoding == "IQ1_M":
            blocks[..., -1] = 0x30 | blocks[..., -1] & 15  # the highest bits of a float16 that is spread over four words
        else:
            scale = generator.uniform(0.5, 2, (*blocks.shape[:2], 1)).astype(np.float16).view(np.uint8)
            for place in SCALES.get(encoding, [slice(0, 2)]):
                blocks[..., place] = scale
        return blocks.reshape(rows, -1)


# ---- twins of safetensors checkpoints


@pytest.mark.parametrize("family", TWINS)
def test_a_gguf_twin_is_the_same_model(family: str, tmp_path: Path) -> None:
    original = as_released(open_checkpoint(save_family(family, tmp_path)))
    twin = open_checkpoint(write_twin(original, TWINS[family], tmp_path / "twin.gguf"))
    assert twin.config == original.config
    assert twin.names() == original.names()
    for name in original.names():
        # A float32 cannot hold every w + 1: half a unit in the last place of a number below 4 is lost by the format.
        lost = 2**-23 if family == "gemma3" and name.endswith("norm.weight") else 0.0
        np.testing.assert_allclose(twin[name].dense(), original[name].dense(), rtol=0, atol=lost, strict=True)


def as_released(checkpoint: Checkpoint) -> Checkpoint:
    """With the settings of real models that GGUF takes for granted: Gemma's attention scale, the ramp of Llama 3."""
    ropes = tuple(
        replace(rope, original_max_position=8192) if rope.scaling == "llama3" else rope for rope in checkpoint.config.ropes
    )
    return replace(checkpoint, config=replace(checkpoint.config, ropes=ropes, attention_scale=0.0))


@pytest.mark.parametrize("factors", [[1.0, 2.0, 3.0, 8.0, 8.0, 8.0, 8.0, 8.0], [1.0, 8.0]])
def test_frequency_factors_of_another_rule_are_refused(factors: list[float], tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a.gguf", ("rope_freqs.weight", np.array(factors, np.float32), "F32"))
    with pytest.raises(ConfigError, match=r"a\.gguf: rope_freqs\.weight holds frequency factors that are not those of Llama 3"):
        load_gguf(path)


# ---- encodings


@pytest.mark.parametrize("encoding", [*PLAIN, *BLOCKS])
def test_every_encoding_is_read_as_a_whole_and_in_parts(encoding: str, tmp_path: Path) -> None:
    stored = some_blocks(encoding, rows=40, columns=768)
    entry = load_gguf(write_tensors(tmp_path / "a.gguf", ("x", stored, encoding)))[1]["x"]
    assert (entry.shape, entry.encoding) == ((40, 768), encoding)
    assert entry.raw().tobytes() == stored.tobytes() and not entry.raw().flags["WRITEABLE"]
    dense = entry.dense()
    np.testing.assert_array_equal(dense, dequantize(stored, GGMLQuantizationType[encoding]), strict=True)
    assert dense.std() > 0.1
    for axis, start, stop in [
        (0, 0, 40),
        (0, 7, 8),
        (0, 39, 40),
        (0, 5, 5),
        (1, 0, 1),
        (1, 250, 515),
        (1, 256, 512),
        (1, 3, 3),
    ]:
        np.testing.assert_array_equal(entry.slice(axis, start, stop), np.take(dense, range(start, stop), axis), strict=True)


@pytest.mark.parametrize("encoding", ["Q4_1", "F16"])
def test_permuted_rows_are_put_back_in_slices_and_beside_raw_blocks(encoding: str, tmp_path: Path) -> None:
    stored = some_blocks(encoding, rows=16, columns=64)
    entry = load_gguf(write_tensors(tmp_path / "a.gguf", ("blk.0.attn_q.weight", stored, encoding)))[1][
        "model.layers.0.self_attn.q_proj.weight"
    ]
    decoded = dequantize(stored, GGMLQuantizationType[encoding])
    canonical = decoded.reshape(4, 2, 2, 64).swapaxes(1, 2).reshape(16, 64)  # 4 heads of (H/2, 2) become (2, H/2)
    np.testing.assert_array_equal(entry.dense(), canonical)
    np.testing.assert_array_equal(entry.slice(0, 5, 11), canonical[5:11])
    np.testing.assert_array_equal(entry.slice(1, 30, 40), canonical[:, 30:40])
    assert entry.row_order is not None
    np.testing.assert_array_equal(dequantize(entry.raw()[entry.row_order], GGMLQuantizationType[encoding]), canonical)


@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_values_are_near_what_was_quantized(encoding: str, tmp_path: Path) -> None:
    values = np.random.default_rng(1).uniform(-1, 1, (8, 64)).astype(np.float32)
    stored = quantize(values, GGMLQuantizationType[encoding])
    entry = load_gguf(write_tensors(tmp_path / "a.gguf", ("x", stored, encoding)))[1]["x"]
    bits = int(encoding[1])
    # A step is 2 / 2**bits: half for rounding, as much again for the clipped end of a signed range; float16 scales add 2**-11.
    assert np.abs(entry.dense() - values).max() <= 2 / 2**bits + 2**-10


def test_an_encoding_that_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a.gguf", ("x", np.zeros((2, 40), np.uint8), "Q8_1"))
    with pytest.raises(CheckpointError, match=r"a\.gguf.*tensor x is encoded as Q8_1, supported are F32, F16, BF16, Q4_0"):
        load_gguf(path)


def test_the_encodings_that_model_files_use_are_all_read() -> None:
    old = {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    assert {*BLOCKS} >= old | {"IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "IQ1_M"}


# ---- files in parts


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model in three parts, as gguf-split writes it: the first has the metadata."""
    checkpoint = open_checkpoint(save_family("smollm", tmp_path))
    whole = GGUFReader(write_twin(checkpoint, "llama", tmp_path / "whole.gguf"))
    paths = [tmp_path / f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for no, path in enumerate(paths):
        writer = GGUFWriter(path, "llama")
        writer.add_uint16("split.no", no)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        if no == 0:
            for key, field in whole.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    writer.add_key_value(key, field.contents(), field.types[0])
        for tensor in whole.tensors[no::3]:
            writer.add_tensor(tensor.name, tensor.data)
        close(writer, path)
    return paths


def test_a_model_in_parts_is_that_of_one_file_whichever_part_is_given(parts: list[Path]) -> None:
    whole = open_checkpoint(parts[0].parent / "whole.gguf")
    for path in parts:
        split = open_checkpoint(path)
        assert split.config == whole.config and split.names() == whole.names()
        assert {split[name].source for name in split.names()} == set(parts)
        for name in whole.names():
            np.testing.assert_array_equal(split[name].dense(), whole[name].dense(), strict=True)
        assert read_metadata(path)["llama.block_count"] == whole.config.num_layers


def test_missing_parts_and_those_of_another_set_are_refused_by_name(parts: list[Path]) -> None:
    second = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 parts are missing: m-00002-of-00003\.gguf"):
        open_checkpoint(parts[2])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: expected split\.no 1, .* got 2, .* another set"):
        open_checkpoint(parts[0])
    firsts, seconds = ({tensor.name for tensor in GGUFReader(path).tensors} for path in (parts[0], parts[2]))
    here, there = next((a, b) for a in sorted(firsts) for b in sorted(seconds) if len(a) == len(b))
    third = parts[2].read_bytes()
    parts[1].write_bytes(second)
    parts[2].write_bytes(third.replace(there.encode(), here.encode(), 1))
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf: tensor .* is in m-00001-of-00003\.gguf too"):
        open_checkpoint(parts[0])
    parts[1].rename(parts[1].with_name("other.gguf"))
    with pytest.raises(CheckpointError, match=r"other\.gguf is one of 3 parts: its name must end in"):
        open_checkpoint(parts[1].with_name("other.gguf"))


@pytest.mark.parametrize("changes", [{"split.count": 70_000}, {"split.count": -1}, {"split.count": "3"}], ids=str)
def test_a_number_of_parts_that_cannot_be_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a-00001-of-00003.gguf", "llama")
    for key, value in changes.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_int32(key, value)
    with pytest.raises(CheckpointError, match=r"split\.count must be a whole number of at most 4096"):
        read_metadata(close(writer, tmp_path / "a-00001-of-00003.gguf"))


# ---- metadata


def test_metadata_of_every_type_is_read_as_plain_values(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    values: dict[str, Any] = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1, "bool": True, "string": "é<|im_end|>",
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    arrays = {"strings": ["", "Ġa", "ß" * 300], "ints": [3, -1], "floats": [0.5, -2.0], "flags": [True, False]}
    for key, array in arrays.items():
        writer.add_array(key, array)
    metadata = read_metadata(close(writer, tmp_path / "a.gguf"))
    assert metadata == {"general.architecture": "llama"} | values | arrays
    assert type(metadata["flags"][0]) is bool and type(metadata["ints"][0]) is int and type(metadata["float64"]) is float


def test_the_header_agrees_with_the_reader_of_the_gguf_library(tmp_path: Path) -> None:
    path = write_twin(open_checkpoint(save_family("smollm", tmp_path)), "llama", tmp_path / "a.gguf")
    reader, (_, entries) = GGUFReader(path), load_gguf(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert read_metadata(path) == fields
    assert [entry.raw().tobytes() for entry in entries.values()] == [tensor.data.tobytes() for tensor in reader.tensors]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen"}, "'qwen' is not supported. Did you mean 'qwen"),
        ({"general.architecture": "mamba"}, "Supported: llama, qwen2, qwen3, gemma3"),
        ({"general.architecture": ...}, "None is not supported"),
        ({"llama.block_count": ...}, "'llama.block_count' must be a whole number"),
        ({"llama.block_count": 10**9}, "'llama.block_count' must be a whole number in [0, 4096]"),
        ({"llama.embedding_length": [16, 16]}, "'llama.embedding_length' must be a whole number"),
        ({"llama.attention.head_count": 0}, "num_heads must be a positive integer"),
        ({"llama.attention.head_count_kv": 3}, "multiple of num_kv_heads"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length must equal the head dimension 4, got 8"),
        ({"llama.rope.dimension_count": 2}, "llama.rope.dimension_count must equal the head dimension 4, got 2"),
        ({"llama.rope.scaling.type": "longrope"}, "RoPE scaling 'longrope'"),
        ({"llama.attention.layer_norm_rms_epsilon": "small"}, "must be a number, got 'small'"),
        ({"llama.vocab_size": ...}, "'llama.vocab_size' must be a whole number"),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, "'tokenizer.ggml.eos_token_id' must be a whole number"),
    ],
)
def test_metadata_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    metadata = {key: value for key, value in (MINIMAL | changes).items() if value is not ...}
    with pytest.raises(ConfigError) as caught:
        model_config_from_metadata(metadata)
    assert message in str(caught.value)


def test_end_tokens_window_and_vocabulary_come_from_metadata() -> None:
    changes = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 9, "llama.attention.sliding_window": 8}
    metadata = MINIMAL | changes | {"tokenizer.ggml.tokens": ["a"] * 77}
    del metadata["llama.vocab_size"]
    config = model_config_from_metadata(metadata)
    assert (config.eos_token_ids, config.layer_window, config.vocab_size) == ((2, 9), (8, 8), 77)
    assert config.norm_eps == 1e-5 and config.tie_embeddings and config.ropes == (Rope(),)


def test_the_largest_gemma_has_its_own_attention_scale() -> None:
    sizes = {"block_count": 62, "embedding_length": 5376, "attention.head_count": 32, "attention.head_count_kv": 16}
    metadata = {key.replace("llama.", "gemma3."): value for key, value in MINIMAL.items()}
    metadata |= {"general.architecture": "gemma3", "gemma3.attention.key_length": 128, "gemma3.attention.sliding_window": 1024}
    metadata |= {f"gemma3.{key}": value for key, value in sizes.items()}
    assert model_config_from_metadata(metadata).attention_scale == 168**-0.5


# ---- damage


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "a.gguf"
    return write_tensors(path, ("x", some_blocks("Q4_0", 2, 64), "Q4_0"), ("y", np.ones(3, np.float32), "F32")).read_bytes()


def test_a_file_cut_anywhere_is_refused(small_file: bytes, tmp_path: Path) -> None:
    for length in range(load_end(small_file, tmp_path)):
        (tmp_path / "cut.gguf").write_bytes(small_file[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            load_gguf(tmp_path / "cut.gguf")


def load_end(content: bytes, tmp_path: Path) -> int:
    """Where the last tensor of a file ends; padding follows."""
    (tmp_path / "whole.gguf").write_bytes(content)
    _, entries = load_gguf(tmp_path / "whole.gguf")
    return content.index(entries["y"].raw().tobytes(), content.index(entries["x"].raw().tobytes())) + entries["y"].raw().nbytes


def test_flipped_bytes_give_a_typed_error_or_a_readable_file(small_file: bytes, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        damaged = np.frombuffer(small_file, np.uint8).copy()
        at = generator.integers(0, len(damaged), 3)
        damaged[at] = generator.integers(0, 256, 3)
        (tmp_path / "a.gguf").write_bytes(damaged.tobytes())
        try:
            for entry in load_gguf(tmp_path / "a.gguf")[1].values():
                entry.dense()
        except TandemError:
            refused += 1
    assert 100 < refused < 500


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + b"\0" * 60, b"GGUF\1\0\0\0" + b"\0" * 60, b"PK\3\4" + b"\0" * 60])
def test_what_is_no_gguf_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.gguf"):
        open_checkpoint(tmp_path / "a.gguf")


def gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_file(tensors: int, keys: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


STRINGS, BYTES, ARRAY = 8, 0, 9
"""Types of values in a GGUF file."""


def key(name: bytes) -> bytes:
    """The start of a key whose value is an array."""
    return gguf_string(name) + struct.pack("<I", ARRAY)


@pytest.mark.parametrize(
    "case",
    {
        "keys": (
            gguf_file(0, 200_000, b"".join(gguf_string(b"%d" % i) + struct.pack("<IB", BYTES, 1) for i in range(200_000))),
            r"announces 200000 metadata keys, at most 4096",
        ),
        "tensors": (gguf_file(10**6, 0, b""), r"announces 1000000 tensors, at most 65536"),
        "strings": (
            gguf_file(0, 1, key(b"a") + struct.pack("<IQ", STRINGS, 5_000_000) + bytes(40_000_000)),
            r"arrays announce 5000000 values, at most 4194304",
        ),
        "numbers in two arrays": (
            gguf_file(
                0, 2, b"".join(key(name) + struct.pack("<IQ", BYTES, 3_000_000) + bytes(3_000_000) for name in (b"a", b"b"))
            ),
            r"arrays announce 6000000 values",
        ),
        "nested arrays": (gguf_file(0, 1, key(b"a") + struct.pack("<IQ", ARRAY, 1) * 1000), "value type 9 .* is unknown"),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_count_beyond_its_limit_is_refused_before_anything_is_read(
    case: tuple[str, tuple[bytes, str]], tmp_path: Path
) -> None:
    content, message = case[1]
    (tmp_path / "a.gguf").write_bytes(content)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "a.gguf")
    assert time.process_time() - begin < 0.5


def test_missing_and_unknown_tensors_are_listed_at_once(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a.gguf", ("blk.0.ssm_in.weight", np.ones((2, 2), np.float32), "F32"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "missing model.embed_tokens.weight (50, 16)" in str(caught.value)
    assert "unexpected blk.0.ssm_in.weight (2, 2)" in str(caught.value)
