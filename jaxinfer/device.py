"""Which device JAX computes on, and the settings that must stand before it starts."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from functools import partial

import jax

from common.errors import BackendError, CheckpointError
from common.platform import choose, cores, cpu_name, expect_not_forked
from common.weights.zoo import cache_directory

_log = logging.getLogger(__name__)

PLATFORMS = {"cuda": "cuda", "rocm": "rocm", "tpu": "tpu", "cpu": "cpu"}
"""Ours -> JAX's name."""


def open_device(requested: str, threads: int | None, ranks: int = 1) -> jax.Device:
    """The first usable device for `requested`, as many of which as there are `ranks` a process that starts with it has. Raises
    `ConfigError` for an unknown name, `BackendError` if none is usable."""
    expect_not_forked("JAX")
    if jax.config.read("jax_enable_x64"):
        raise BackendError("JAX is set to 64 bits (JAX_ENABLE_X64, jax_enable_x64); the engine computes with 32. Unset it.")
    # XLA sizes its CPU pool once, when the backend starts. It counts the node's cores inside a container with a quota.
    os.environ.setdefault("PJRT_NPROC", str(threads or cores()))
    if ranks > 1:
        _share_cpu(ranks)
    # A thread that dispatches ahead takes a core from the step it waits for: half the throughput on two cores.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Programs compiled once are read back in later runs. XLA's key does not tell one CPU from another: the folder must.
    folder = re.sub(r"\W+", "-", f"xla-{jax.version.__version__}-{cpu_name()}")
    try:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / folder))
    except CheckpointError as error:
        _log.info("Compiled programs are not kept. %s", error)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    choice = choose(requested, {name: partial(probe, name) for name in PLATFORMS})
    return jax.local_devices(backend=PLATFORMS[choice.platform])[0]


def _share_cpu(ranks: int) -> None:
    """Let JAX see as many CPU devices, if it has not started yet."""
    # They share one pool, in which whoever waits for the others of a collective holds a thread: it must not run out.
    os.environ["PJRT_NPROC"] = str(max(int(os.environ["PJRT_NPROC"]), 2 * ranks))
    with contextlib.suppress(RuntimeError):  # it has
        jax.config.update("jax_num_cpu_devices", max(ranks, jax.config.jax_num_cpu_devices))  # type: ignore[attr-defined]


def probe(platform: str) -> str | None:
    """None if JAX can use the platform, else why not."""
    try:
        jax.local_devices(backend=PLATFORMS[platform])
    except (RuntimeError, AssertionError) as error:  # the second if JAX_PLATFORMS names it in vain
        return (str(error) or "JAX could not start it").splitlines()[0]
    return None


def describe(device: jax.Device) -> str:
    """The device as people name it: `cpu`, `cuda:NVIDIA H100`."""
    return "cpu" if device.platform == "cpu" else f"{device.platform}:{device.device_kind}"
