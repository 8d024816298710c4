"""Choice of a device, and facts about the machine against what the operating system says."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import BackendError, ConfigError
from common.system.hardware import PLATFORMS, choose, cores, cpu_name, cxx_compiler, memory_available, peak_rss, rss

HAS_NVIDIA = Path("/dev/nvidia0").exists()


def usable() -> None:
    return None


def broken(reason: str) -> Callable[[], str]:
    return lambda: reason


def test_auto_takes_the_first_usable_platform_in_order_whatever_the_order_of_the_probes() -> None:
    assert choose("auto", {"cpu": usable, "xpu": usable, "cuda": broken("no driver")}).platform == "xpu"


def test_auto_falls_back_to_the_cpu_and_says_why_for_each_platform(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="common.system.hardware"):
        choice = choose("auto", {"cuda": broken("no NVIDIA driver"), "cpu": usable})
    assert choice.platform == "cpu"
    assert list(choice.reasons) == [name for name in PLATFORMS if name != "cpu"]
    assert choice.reasons["cuda"] == "no NVIDIA driver"
    told, details = caplog.records
    assert told.levelno == logging.INFO and "using cpu (no accelerator found" in told.getMessage()
    assert details.levelno == logging.DEBUG and "cuda: no NVIDIA driver" in details.getMessage()
    assert "no NVIDIA driver" not in told.getMessage()


def test_probes_after_the_first_usable_one_are_not_run() -> None:
    def never() -> str:
        raise AssertionError("probed needlessly")

    assert choose("auto", {"cuda": usable, "cpu": never}).platform == "cuda"
    assert choose("cpu", {"cuda": never, "cpu": usable}).platform == "cpu"


def test_gpu_means_any_gpu_and_never_the_cpu() -> None:
    assert choose("gpu", {"rocm": usable, "cpu": usable}).platform == "rocm"
    with pytest.raises(BackendError, match=r"device=gpu.*cuda: no card.*device=auto"):
        choose("gpu", {"cuda": broken("no card"), "cpu": usable})


def test_a_requested_device_that_is_not_there_is_refused_with_the_reason() -> None:
    with pytest.raises(BackendError, match="cuda: no NVIDIA driver"):
        choose("cuda", {"cuda": broken("no NVIDIA driver"), "cpu": usable})
    with pytest.raises(BackendError, match="tpu: this backend has no support"):
        choose("tpu", {"cpu": usable})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("JAX_ENABLE_X64", "1", "JAX is set to 64 bits"),
        ("JAX_DISABLE_JIT", "1", "Unset JAX_DISABLE_JIT"),
        ("JAX_TRANSFER_GUARD", "disallow", "Unset JAX_TRANSFER_GUARD"),
        ("JAX_PLATFORMS", "nowhere", "cpu: "),  # no machine has it, so that JAX starts nothing, not even the CPU
        pytest.param("JAX_PLATFORMS", "cuda", "cpu: ", marks=pytest.mark.skipif(HAS_NVIDIA, reason="here JAX starts CUDA")),
    ],
)
def test_settings_of_jax_that_leave_no_engine_are_refused_with_the_reason(name: str, value: str, reason: str) -> None:
    done = open_jax_device(**{name: value})
    last = done.stderr.splitlines()[-1]
    assert last.startswith("common.errors.BackendError: ") and reason in last, done.stderr


def test_a_platform_that_is_not_there_is_no_alarm() -> None:
    """JAX looks for a TPU on every machine."""
    said = open_jax_device().stderr
    assert "using" in said and "Unable to initialize" not in said and "INTERNAL" not in said


def open_jax_device(**variables: str) -> subprocess.CompletedProcess[str]:
    """A process that logs all and takes the first device that there is."""
    script = (
        "import logging; logging.basicConfig(level=logging.INFO); "
        "from jaxinfer.device import open_device; open_device('auto', 1)"
    )
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_nothing_usable_names_every_reason() -> None:
    with pytest.raises(BackendError, match=r"cuda: a; .*cpu: b"):
        choose("auto", {"cuda": broken("a"), "cpu": broken("b")})


def test_a_misspelt_device_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'cuda'\?"):
        choose("cudda", {"cpu": usable})


def test_cores_follow_the_affinity_of_the_process() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= cores() <= len(allowed)
    one = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from common.system.hardware import cores; print(cores())"
    )
    assert subprocess.check_output([sys.executable, "-c", one], text=True).strip() == "1"


def test_the_peak_of_memory_stays_after_what_was_touched_is_freed() -> None:
    """In a process of its own: here the peak is whatever the other tests held at once, and would be touched once more."""
    code = """
from common.system.hardware import peak_rss
before = peak_rss()
block = b"x" * (before + (64 << 20))  # more than any memory that was freed before and not returned
size = len(block)
del block
assert before + (32 << 20) < peak_rss() < before + 2 * size, (before, size, peak_rss())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_that_is_held_counts_until_it_is_given_back() -> None:
    before = rss()
    block = b"x" * (64 << 20)
    held, peak = rss(), peak_rss()
    del block
    assert before + (60 << 20) < held <= peak and rss() < held - (60 << 20)


def test_available_memory_and_the_name_of_the_processor_are_plausible() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory_available() <= total
    assert cpu_name().strip()


def test_the_compiler_is_the_one_that_is_named_or_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    assert cxx_compiler() == [sys.executable]
    monkeypatch.setenv("CXX", f"env  LANG=C '{sys.executable}'")
    assert cxx_compiler() == [shutil.which("env"), "LANG=C", sys.executable]
    for wrong in ("/nowhere/g++ -m64", "g++ '-m64"):  # even where there is another
        monkeypatch.setenv("CXX", wrong)
        with pytest.raises(BackendError, match=re.escape(wrong)):
            cxx_compiler()
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendError, match=r"no C\+\+ compiler"):
        cxx_compiler()


def test_a_fork_of_a_process_with_threads_is_refused() -> None:
    code = """
import os
from common.errors import BackendError
from common.system.hardware import expect_not_forked
for framework in ("one", "one"):
    expect_not_forked(framework)
if not (child := os.fork()):
    expect_not_forked("other")
    try:
        expect_not_forked("one")
    except BackendError as error:
        os._exit("spawn" in str(error))
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_matrix_unit_may_be_used_where_linux_says_so_after_it_was_asked() -> None:
    XTILEDATA = 1 << 18
    granted = "from common.system import hardware; from tests import test_platform as here; "
    granted += "print(hardware.matrix_unit(), here.xcomp_permitted())"
    told = subprocess.run([sys.executable, "-c", granted], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    usable, permitted = told.stdout.split()
    assert (usable == "True") == bool(int(permitted) & XTILEDATA), told.stderr


def xcomp_permitted() -> int:
    """The extended states that this process may use, as bits; 0 where the system knows of none."""
    arch_prctl, ARCH_GET_XCOMP_PERM = 158, 0x1022
    bits = ctypes.c_uint64()
    if platform.machine() == "x86_64":
        ctypes.CDLL(None).syscall(arch_prctl, ARCH_GET_XCOMP_PERM, ctypes.byref(bits))
    return bits.value
