"""Which device JAX computes on, and the settings that must stand before it starts."""

from __future__ import annotations

import logging
import os
import re
from functools import partial

import jax

from common.errors import BackendError, CheckpointError
from common.system.hardware import choose, cores, cpu_name, expect_not_forked
from common.weights.zoo import cache_directory

_log = logging.getLogger(__name__)

PLATFORMS = {"cuda": "cuda", "rocm": "rocm", "tpu": "tpu", "cpu": "cpu"}
"""Ours -> JAX's name."""
_GUARDS = ("transfer_guard", "transfer_guard_host_to_device", "transfer_guard_device_to_host")


def open_device(requested: str, threads: int | None, ranks: int = 1) -> jax.Device:
    """The first usable device for `requested`, as many of which as there are `ranks` a process that starts with it has. Raises
    `ConfigError` for an unknown name, `BackendError` if none is usable."""
    expect_not_forked("JAX")
    _check_settings()
    # XLA sizes its CPU pool once, when the backend starts. It counts the node's cores inside a container with a quota.
    os.environ.setdefault("PJRT_NPROC", str(threads or cores()))
    if ranks > 1:
        _share_cpu(ranks)
    # A thread that dispatches ahead takes a core from the step it waits for: half the throughput on two cores.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # Later runs read compiled programs from this folder. XLA's key does not identify the CPU, so the name of the folder does.
    folder = re.sub(r"\W+", "-", f"xla-{jax.version.__version__}-{cpu_name()}")
    try:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / folder))
    except CheckpointError as error:
        _log.info("Compiled programs are not kept. %s", error)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    choice = choose(requested, {name: partial(probe, name) for name in PLATFORMS})
    return jax.local_devices(backend=PLATFORMS[choice.platform])[0]


def _check_settings() -> None:
    """Raises `BackendError` for what a user may set and no step of the engine survives."""
    settings: dict[str, object] = jax.config.values
    refused = {
        "enable_x64": "is set to 64 bits; the engine computes with 32",
        "disable_jit": "is set to compile nothing; the engine's steps are compiled programs",
    }
    refused |= dict.fromkeys(_GUARDS, "is set to refuse transfers; the engine sends each step to its device")
    for name, why in refused.items():
        value = settings[f"jax_{name}"]
        if value is True or str(value).startswith("disallow"):
            raise BackendError(f"JAX {why}. Unset JAX_{name.upper()} (jax_{name}), which is {value}.")


def _share_cpu(ranks: int) -> None:
    """Let JAX see as many CPU devices, if it has not started yet."""
    # The devices share one pool. A device that waits in a collective holds a thread, so the pool needs more threads than
    # devices.
    os.environ["PJRT_NPROC"] = str(max(int(os.environ["PJRT_NPROC"]), 2 * ranks))
    make_cpu_devices(ranks)


def make_cpu_devices(count: int) -> bool:
    """Have JAX make at least so many CPU devices as it starts. Return False if it has started without them."""
    try:
        jax.config.update("jax_num_cpu_devices", max(count, jax.config.jax_num_cpu_devices))  # type: ignore[attr-defined]
    except RuntimeError:
        return len(jax.local_devices(backend="cpu")) >= count
    return True


def probe(platform: str) -> str | None:
    """None if JAX can use the platform, else why not."""
    bridge = logging.getLogger("jax._src.xla_bridge")
    bridge.addFilter(_concerns_users)
    try:
        jax.local_devices(backend=PLATFORMS[platform])
    except (RuntimeError, AssertionError) as error:  # the second if JAX_PLATFORMS names it in vain
        reason = (str(error) or "JAX could not start it").splitlines()[0]
        return "libtpu is not installed" if "Failed to open libtpu.so" in reason else reason
    finally:
        bridge.removeFilter(_concerns_users)
    return None


def _concerns_users(record: logging.LogRecord) -> bool:
    """Return False for JAX's message about a platform that it could not open, as `INTERNAL: Failed to open libtpu.so`.

    `choose` reports the missing platform and the reason.
    """
    return not record.getMessage().startswith("Unable to initialize backend")


def describe(device: jax.Device) -> str:
    """The device as people name it: `cpu`, `cuda:NVIDIA H100`."""
    return "cpu" if device.platform == "cpu" else f"{device.platform}:{device.device_kind}"
