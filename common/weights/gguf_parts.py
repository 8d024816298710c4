"""A model in one GGUF file, or in the parts that llama.cpp's `gguf-split` writes.

The first part has the metadata. Every part has `split.no`, from 0, and `split.count`, and all are in one directory.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, listed, shown
from common.weights.files import MAX_SHARDS, map_file
from common.weights.gguf_header import Header, read_header

_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")


@dataclass(frozen=True)
class Part:
    path: Path
    file: mmap.mmap
    header: Header


def open_parts(path: Path) -> tuple[Part, ...]:
    """Return all parts of a model in their order, given the path of any of them. A model in one file has one part.

    Raises `CheckpointError` for files that are damaged or missing, and for parts that do not belong together."""
    given = _opened(path)
    count = given.header.metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= MAX_SHARDS:
        raise CheckpointError(f"{path}: split.count must be a whole number of at most {MAX_SHARDS}, got {shown(count)}.")
    if count <= 1:
        return (given,)
    name = _NAME.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise CheckpointError(f"{path} is one of {count} parts: its name must end in -00001-of-{count:05}.gguf or the like.")
    paths = [path.with_name(f"{name[1]}-{i:05}-of-{name[3]}.gguf") for i in range(1, count + 1)]
    missing = [each.name for each in paths if not each.exists()]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {count} parts are missing: {listed(missing)}.")
    parts = tuple(given if each == path else _opened(each) for each in paths)
    _check_together(parts)
    return parts


def read_metadata(path: Path | str) -> dict[str, Any]:
    """Return the key-value section of a GGUF model as plain strings, numbers, booleans and lists of them.

    Raises `CheckpointError` as `open_parts` does."""
    return open_parts(Path(path))[0].header.metadata


def _opened(path: Path) -> Part:
    file = map_file(path)
    return Part(path, file, read_header(path, file))


def _check_together(parts: tuple[Part, ...]) -> None:
    """Raise `CheckpointError` unless the parts are of one set, each in its place."""
    tensors = parts[0].header.metadata.get("split.tensors.count")
    homes: dict[str, Path] = {}
    for i, part in enumerate(parts):
        number, count, total = (part.header.metadata.get(f"split.{key}") for key in ("no", "count", "tensors.count"))
        if (number, count, total) != (i, len(parts), tensors):
            raise CheckpointError(
                f"{part.path}: expected split.no {i}, split.count {len(parts)} and split.tensors.count {tensors}, got "
                f"{shown(number)}, {shown(count)} and {shown(total)}: it belongs to another set of files."
            )
        for tensor in part.header.tensors:
            if tensor.name in homes:
                told = f"tensor {shown(tensor.name)} is in {homes[tensor.name].name} too"
                raise CheckpointError(f"{part.path}: {told}: the parts are not of one set.")
            homes[tensor.name] = part.path
    if tensors is not None and len(homes) != tensors:
        raise CheckpointError(f"{parts[0].path}: its {len(parts)} parts hold {len(homes)} tensors, and {tensors} are expected.")
