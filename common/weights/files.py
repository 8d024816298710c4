"""The files of a checkpoint, opened safely: only regular files, and text files only up to a limit.

A device or a FIFO in place of a file would otherwise stop the process or fill its memory.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import CheckpointError, json_reason, quoted

MAX_JSON = 1 << 24
"""Bytes of a config.json, generation_config.json or tokenizer_config.json. The largest in use need about 2**21."""
MAX_INDEX = 1 << 26
"""Bytes of the index of a checkpoint in shards. The largest in use need about 2**24."""
MAX_SHARDS = 4096
"""Files of one checkpoint. The largest checkpoints in use have some hundreds."""
MAX_HEADER = 1 << 23
"""Bytes of the header of a safetensors file. The largest in use need about 2**20."""
MAX_TENSORS = 1 << 16
"""Tensors of one file. The largest files in use have some thousands."""
MAX_TOKENIZER = 1 << 28
"""Bytes of a tokenizer.json. The largest vocabularies in use need about 2**25."""
MAX_TEMPLATE = 1 << 20
"""Bytes of a chat_template.jinja."""
_KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a directory",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read. Raises `CheckpointError` for a missing file and for any other kind of file.

    Nothing is read, and the call does not wait for a writer of a FIFO."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a name that no file system takes
        raise _unreadable(path, error) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise CheckpointError(f"{path}: expected a regular file, and it is {kind}. Do not trust this checkpoint.")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, most: int) -> bytes:
    """Return the content of a regular file. Raises `CheckpointError` for more than `most` bytes, before any is read."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CheckpointError(f"{path} has {size} bytes; at most {most} are read.")
        try:
            return file.read(size)
        except OSError as error:
            raise _unreadable(path, error) from error


def read_json(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """Return the object in a JSON file. A key that occurs twice is refused: readers differ in the value they take."""
    try:
        value = json.loads(read_file(path, most), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not readable as JSON ({json_reason(error)}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {quoted(value)}.")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the mapping of the members of a JSON object. Raises `ValueError` if a key occurs twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def map_file(path: Path) -> mmap.mmap:
    """Return the whole file as read-only memory. The views made from it keep it open."""
    with open_regular(path) as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error}). Check the path and its permissions.")
