"""The layers' weights as one buffer: of each a header that describes it, norms, biases, and matrices in the order kernels read
them; and the head's as another.

A matrix W[outputs, inputs] becomes panels of 32 outputs. In a panel the inputs go by in groups, two of bfloat16 or one of
float32, and for each group the 32 outputs lie side by side: a kernel that walks down a panel reads memory in order, and each
load brings one group of inputs for sixteen outputs. `step.h` has the header in C++.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from common.config import Dtype, ModelConfig
from common.weights.checkpoint import Checkpoint
from common.weights.parameters import NUMPY_DTYPES, parameter
from common.weights.shard import shard

MAGIC = 0x31_57_44_54
ALIGN = 64
LARGE_PAGE = 2 << 20
COLUMNS, LANES = 32, 16
PARTS = (
    *("qkv", "qkv_bias", "o", "o_bias", "gate_up", "gate_up_bias", "down", "down_bias"),
    *("input_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm", "q_norm", "k_norm"),
    *("head", "final_norm", "embedding"),
)
HEADER = np.dtype(
    [(name, "<i4") for name in ("inputs", "heads", "kv_heads", "head_dim", "hidden", "vocab", "window", "gelu")]
    + [(name, "<f4") for name in ("eps", "attention_scale", "embedding_scale")]
    + [(name, "<i4") for name in ("magic", "itemsize", "rope", "first_token", "all_tokens")]
    + [("bytes", "<i8")]
    + [(name, "<i8") for name in PARTS]
)
MAX_HEAD_DIM = 512


def pack_layers(
    checkpoint: Checkpoint, dtype: Dtype, done: Callable[[int], None] = lambda layers: None, rank: int = 0, ranks: int = 1
) -> np.ndarray:
    """What a rank has of the decoder's layers: uint8[L, n], from a large memory page's begin on. Calls `done` with the number
    of those packed."""
    checkpoint = shard(checkpoint, rank, ranks)
    config, packed = checkpoint.config, np.empty((0, 0), np.uint8)
    for layer in range(config.num_layers):
        parts = _layer(checkpoint, layer, dtype)
        header = _describe(config, dtype, parts)
        header["window"], header["rope"] = config.layer_window[layer], config.layer_rope[layer]
        if layer == 0:
            packed = aligned(config.num_layers, int(header["bytes"]))
        _write(packed[layer], header, parts)
        done(layer + 1)
    return packed


def pack_head(checkpoint: Checkpoint, dtype: Dtype, rank: int = 0, ranks: int = 1) -> np.ndarray:
    """What a rank has of embedding, final norm and LM head: uint8[n], from a large memory page on, and nothing of a stage that
    has none of them. A head serves the embedding rows too where it is tied, or stands for the head of a later stage."""
    whole, checkpoint = checkpoint.config, shard(checkpoint, rank, ranks)
    config, get = checkpoint.config, partial(parameter, checkpoint, dtype=dtype)
    parts = {"final_norm": get("model.norm.weight")} if config.predicts else {}
    if config.predicts and not config.tie_embeddings:
        parts |= {"embedding": get("model.embed_tokens.weight")} if config.embeds else {}
        parts["head"] = panels(get("lm_head.weight"))
    elif config.has_table:
        parts["head"] = panels(get("model.embed_tokens.weight"))
    if not parts:
        return aligned(1, 0)[0]
    header = _describe(config, dtype, parts)
    header["first_token"], header["all_tokens"] = rank * config.vocab_size, whole.vocab_size
    packed = aligned(1, int(header["bytes"]))[0]
    _write(packed, header, parts)
    return packed


def panels(w: np.ndarray) -> np.ndarray:
    """[outputs, inputs] -> [outputs / 32, inputs / PAIR, 32, PAIR], both padded with zeros."""
    pair = 4 // w.dtype.itemsize
    w = _pad(_pad(w, 0, COLUMNS), 1, 2)
    return w.reshape(w.shape[0] // COLUMNS, COLUMNS, w.shape[1] // pair, pair).transpose(0, 2, 1, 3)


def interleaved(gate_up: np.ndarray) -> np.ndarray:
    """Gate's rows and then up's, [2 F, …], as sixteen of gate, the same sixteen of up, and so on: both meet in one panel."""
    gate, up = (_pad(half, 0, LANES) for half in np.split(gate_up, 2))
    return np.stack([half.reshape(-1, LANES, *half.shape[1:]) for half in (gate, up)], axis=1).reshape(-1, *gate.shape[1:])


def _layer(checkpoint: Checkpoint, layer: int, dtype: Dtype) -> dict[str, np.ndarray]:
    """One decoder layer's parts."""
    config = checkpoint.config
    get = lambda name: parameter(checkpoint, f"model.layers.{layer}.{name}", dtype)  # noqa: E731
    parts = {
        "qkv": panels(get("self_attn.qkv_proj.weight")),
        "o": panels(get("self_attn.o_proj.weight")),
        "gate_up": panels(interleaved(get("mlp.gate_up_proj.weight"))),
        "down": panels(_pad(get("mlp.down_proj.weight"), 1, LANES)),
        "input_norm": get("input_layernorm.weight"),
    }
    if config.qkv_bias:
        parts["qkv_bias"] = _bias(get("self_attn.qkv_proj.bias"))
    if config.output_bias:
        parts["o_bias"] = _bias(get("self_attn.o_proj.bias"))
    if config.mlp_bias:
        parts["gate_up_bias"] = _bias(interleaved(get("mlp.gate_up_proj.bias")))
        parts["down_bias"] = _bias(get("mlp.down_proj.bias"))
    if config.qk_norm:
        parts |= {"q_norm": get("self_attn.q_norm.weight"), "k_norm": get("self_attn.k_norm.weight")}
    if config.sandwich_norms:
        parts["post_attention_norm"] = get("post_attention_layernorm.weight")
        parts["pre_mlp_norm"] = get("pre_feedforward_layernorm.weight")
        parts["post_mlp_norm"] = get("post_feedforward_layernorm.weight")
    else:
        parts["pre_mlp_norm"] = get("post_attention_layernorm.weight")
    return parts


def _pad(w: np.ndarray, axis: int, multiple: int) -> np.ndarray:
    short = -w.shape[axis] % multiple
    return np.pad(w, [(0, short if i == axis else 0) for i in range(w.ndim)]) if short else w


def _bias(bias: np.ndarray) -> np.ndarray:
    return _pad(bias.astype(np.float32), 0, COLUMNS)


def _describe(config: ModelConfig, dtype: Dtype, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The header of a buffer with these parts behind it, each in an aligned place."""
    element = NUMPY_DTYPES[dtype]
    header = np.zeros((), HEADER)
    sizes = (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size)
    for name, value in zip(HEADER.names or (), (*sizes, config.vocab_size, 0, config.activation != "silu"), strict=False):
        header[name] = value
    header["eps"], header["attention_scale"] = config.norm_eps, config.attention_scale
    # Rounded to the model's dtype first, as Gemma was trained.
    header["embedding_scale"] = np.asarray(config.embedding_scale, element).astype(np.float32)
    header["magic"], header["itemsize"] = MAGIC, element.itemsize
    end = _aligned(HEADER.itemsize)
    for name, part in parts.items():
        header[name] = end
        end = _aligned(end + part.nbytes)
    header["bytes"] = end
    return header


def _write(buffer: np.ndarray, header: np.ndarray, parts: Mapping[str, np.ndarray]) -> None:
    buffer[: HEADER.itemsize] = np.frombuffer(header.tobytes(), np.uint8)
    for name, part in parts.items():
        at = int(header[name])
        buffer[at : at + part.nbytes].view(part.dtype).reshape(part.shape)[...] = part


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def aligned(count: int, size: int) -> np.ndarray:
    """uint8[count, size], zeroed, alone in as many large memory pages as it takes: a matrix that lies partly in small ones is
    read slower. Frameworks take such memory as it is, without a copy."""
    memory = np.zeros(-(-count * size // LARGE_PAGE) * LARGE_PAGE + LARGE_PAGE, np.uint8)
    start = -memory.ctypes.data % LARGE_PAGE
    return memory[start : start + count * size].reshape(count, size)
