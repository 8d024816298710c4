"""A Hugging Face directory: config.json, generation_config.json, and safetensors in one file or in shards.

No other weight format is read: .bin and .pt files are pickles, which run code when they are loaded.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.config import ModelConfig
from common.errors import CheckpointError, ConfigError, listed, shown
from common.weights.config_json import model_config_from_json, token_ids
from common.weights.entry import PLAIN, Entry, map_tensor
from common.weights.files import MAX_HEADER, MAX_INDEX, MAX_SHARDS, MAX_TENSORS, map_file, read_json, unique

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def load_directory(path: Path) -> tuple[ModelConfig, dict[str, Entry]]:
    """The configuration and the lazy entries of a directory. Raises CheckpointError or ConfigError."""
    config_path = path / "config.json"
    if not config_path.exists():
        files = sorted(p.name for p in path.glob("*.gguf"))
        hint = f" Did you mean {path / files[0]}?" if files else ""
        raise CheckpointError(f"{path} has no config.json: it is not a Hugging Face checkpoint.{hint}")
    try:
        config = model_config_from_json(read_json(config_path))
        generation_path = path / "generation_config.json"
        if generation_path.exists():
            extra = token_ids(read_json(generation_path), "eos_token_id")
            config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + extra)))
    except ConfigError as error:
        raise ConfigError(f"{config_path}: {error}") from error
    if (path / _INDEX).exists():
        return config, _read_shards(path)
    if (path / _SINGLE).exists():
        return config, read_safetensors(path / _SINGLE)
    pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} has its weights only as {pickles[0]}, a pickle, which can run code when loaded and is never read here. "
            "Save it as safetensors: model.save_pretrained(directory, safe_serialization=True)."
        )
    raise CheckpointError(f"{path} has no weights: expected {_SINGLE}, or {_INDEX} and the shards that it names.")


def read_safetensors(path: Path) -> dict[str, Entry]:
    """Return lazy entries of one file, mapped from the offsets that its header names.

    The library `safetensors` checks the header: lengths, offsets without overlap or hole, and shape × dtype against bytes.
    """
    file = map_file(path)
    start = 8 + int.from_bytes(file[:8], "little")
    if start > min(len(file), MAX_HEADER):
        told = f"its header has {start - 8} bytes, in a file of {len(file)} bytes; at most {MAX_HEADER} are accepted"
        raise CheckpointError(f"{path}: not a readable safetensors file ({told}). Download it again.")
    try:
        with safe_open(path, framework="numpy"):
            pass
        header = json.loads(file[8:start], object_pairs_hook=unique)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}). Download it again.") from error
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(header)} tensors; at most {MAX_TENSORS} are accepted.")
    entries = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        encoding, shape = info["dtype"], tuple(info["shape"])
        if encoding not in PLAIN and not name.endswith("inv_freq"):
            raise CheckpointError(f"{path}: tensor {name} has dtype {encoding}, supported are {', '.join(PLAIN)}.")
        try:
            stored = map_tensor(file, start + info["data_offsets"][0], shape, encoding)
        except ValueError as error:  # more axes than NumPy has, or sizes whose product overflows beside a 0
            raise CheckpointError(f"{path}: tensor {shown(name)} has the shape {shown(shape)}, which no array has.") from error
        entries[name] = Entry(name=name, shape=shape, encoding=encoding, stored=stored, source=path)
    return entries


def _read_shards(path: Path) -> dict[str, Entry]:
    index_path = path / _INDEX
    weight_map = read_json(index_path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_path}: expected an object weight_map of tensor names to file names.")
    shards = sorted(set(weight_map.values()))
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(f"{index_path} names {len(shards)} shards; at most {MAX_SHARDS} are accepted.")
    _expect_inside(path, index_path, shards)
    missing = [shard for shard in shards if not (path / shard).exists()]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(shards)} shards are missing: {listed(missing)}.")
    files = {shard: read_safetensors(path / shard) for shard in shards}
    astray = [f"{name} (in {shard})" for name, shard in weight_map.items() if name not in files[shard]]
    if astray:
        raise CheckpointError(f"{index_path} names tensors that the shards do not hold: {listed(astray)}.")
    return {name: files[shard][name] for name, shard in weight_map.items()}


def _expect_inside(path: Path, index_path: Path, shards: list[str]) -> None:
    """A shard is a plain file name, and if it is a link it stays in the directory or in the hub cache around it."""
    root = path.resolve()
    homes = [root] + ([root.parent.parent] if root.parent.name == "snapshots" else [])
    for shard in shards:
        try:
            target = (root / shard).resolve()
            inside = shard and Path(shard).name == shard and any(target.is_relative_to(home) for home in homes)
            target.exists()  # raises for a name that no file system takes
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{index_path} names a shard that is no file name: {shown(shard)} ({error}).") from error
        if not inside:
            raise CheckpointError(f"{index_path} points outside its directory: {shown(shard)}. Do not trust this checkpoint.")
