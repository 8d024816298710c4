"""Describe one engine of a run, and check its options: `EngineSpec` from the composed group `engine`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module, util
from typing import Any

from omegaconf import DictConfig

from common.config import EngineConfig, expect
from common.system.hardware import cores
from experiments.engines.constraints import check_policies
from experiments.engines.environments import PEERS, interpreter
from experiments.options import known_options, resolved

SHARED_OUT = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_parallel_size",
    "prefill_backend",
    "routing",
    "threads",
)
"""Options of an engine by which its ranks may differ on one curve."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine of a run."""

    label: str
    """What it is called in results and files: what its entry says, else its name, then the options that differ from the
    defaults of that name, and a number if it is not the first so called."""
    name: str
    config: EngineConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the engine has beside `EngineConfig`, as plain Python: the fields of `Options` in `experiments.baselines.<name>`,
    whose `check` is given the `EngineConfig` too."""

    @property
    def is_server(self) -> bool:
        """Whether the engine is a server over HTTP, which need not report the ids of its tokens."""
        return "base_url" in self.options


def engine_spec(options: DictConfig, label: str | None = None) -> EngineSpec:
    """Check the composed group `engine`. Raises `BackendError` where what runs it is not installed."""
    values: dict[str, Any] = dict(resolved(options))
    name = values.pop("name")
    expect(
        isinstance(name, str) and name.isidentifier(), f"engine.name must be the name of an engine, such as jax, got {name!r}."
    )  # or files that are called after it lie anywhere
    own = own_options(name, values)
    interpreter(name)
    engine = EngineConfig.of(**{key: value for key, value in values.items() if key not in own})
    check_policies(name, engine)
    if own:
        declared_options(name)(**own).check(engine)
    expect(
        not (engine.compile and engine.kernels == "native") or name in PEERS,  # a peer has kernels of its own
        f"Engine {label or name} has kernels=native and compile=true, but native kernels leave a compiler nothing to compile. "
        "Use kernels=framework, or compile=false.",
    )
    return EngineSpec(label=label or name, name=name, config=engine, options=own)


def own_options(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that only an outside engine has, checked. Its module is imported only where there are any."""
    known = {each.name for each in fields(EngineConfig)}
    own = {key: value for key, value in values.items() if key not in known}
    declared = declared_options(name) if own and util.find_spec(f"experiments.baselines.{name}") else None
    if declared is None:
        return {}
    declared(**known_options(declared, f"engine={name}:", own))
    return own


def declared_options(name: str) -> Any:
    """The class of the options that only engine `name` has, None if it has none."""
    return getattr(import_module(f"experiments.baselines.{name}"), "Options", None)


def scale(spec: EngineSpec) -> dict[str, Any]:
    """What a result has to tell of an engine, so that it finds its place on a curve."""
    config = spec.config
    rest = {name: value for name, value in asdict(config).items() if name not in SHARED_OUT} | {"options": spec.options}
    digest = hashlib.blake2b(repr(sorted(rest.items())).encode(), digest_size=4).hexdigest()
    sizes = {
        "tensor": config.tensor_parallel_size,
        "pipeline": config.pipeline_parallel_size,
        "data": config.data_parallel_size,
    }
    shared = {name: size for name, size in sizes.items() if size > 1}
    if config.prefill_parallel_size:
        shared["prefill"] = config.prefill_parallel_size
    return {
        "shared_by": " and ".join(shared),
        "shared_out": ", ".join(f"{name} {size}" for name, size in shared.items()) or None,
        "ranks": config.ranks * (config.data_parallel_size + config.prefill_parallel_size),
        "compute_threads": config.threads or cores(),
        "scales_as": f"{spec.name}-{digest}",
    }
