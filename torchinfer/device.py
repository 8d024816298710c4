"""Which device PyTorch computes on, and the settings that must stand before it starts."""

from __future__ import annotations

from functools import partial

import torch

from common.errors import BackendError
from common.system.hardware import choose, cores, expect_not_forked

PLATFORMS = {"cuda": "cuda", "rocm": "cuda", "xpu": "xpu", "cpu": "cpu"}
"""Ours -> PyTorch's name."""


def open_device(requested: str, threads: int | None, ranks: int = 1) -> torch.device:
    """The first usable device for `requested`, of which this process has its share of the threads. Raises `ConfigError` for an
    unknown name, `BackendError` if none is usable."""
    threads = max(1, (threads or cores()) // ranks)
    if threads > 1:
        expect_not_forked("PyTorch")
    torch.set_num_threads(threads)
    return choose_device(requested)


def choose_device(requested: str) -> torch.device:
    """As `open_device`, which sets threads too."""
    choice = choose(requested, {name: partial(probe, name) for name in PLATFORMS})
    return torch.device(PLATFORMS[choice.platform])


def local_device(device: torch.device, before: int, neighbours: int) -> torch.device:
    """Choose the device of a process that shares its machine with others. Raises `BackendError` if the machine has too few.

    `neighbours` processes run on the machine, each with one device of this kind, and `before` of them come first. The device
    becomes the current one of this process.
    """
    if device.type == "cpu":
        return device
    if (count := torch.accelerator.device_count()) < neighbours:
        raise BackendError(
            f"This engine needs {neighbours} devices of {device.type} on this machine, one for each of its ranks here, and "
            f"PyTorch sees {count}. Change tensor_parallel_size and pipeline_parallel_size, or set device=cpu."
        )
    torch.accelerator.set_device_index(before)
    return torch.device(device.type, before)


def probe(platform: str) -> str | None:
    """None if PyTorch can use the platform, else why not."""
    if platform in ("cuda", "rocm"):
        if (torch.version.hip is not None) != (platform == "rocm"):
            return f"this build of PyTorch has no {platform}"
        return None if torch.cuda.is_available() else "no device found"
    if platform == "xpu":
        return None if torch.xpu.is_available() else "no device found"
    return None


def describe(device: torch.device) -> str:
    """The device as people name it: `cpu`, `cuda:NVIDIA H100`."""
    return f"cuda:{torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
