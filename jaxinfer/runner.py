"""One model on a JAX device, a step at a time: `common.interface.ModelRunner` over the step that `kernels` names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, get_args

import jax
import numpy as np

from common import interface
from common.batch import Batch, Mask, masked
from common.config import Dtype, EngineConfig, ModelConfig
from common.errors import BackendError
from common.interface import Caps, KVGroup, Progress
from common.kernels.cpu.build import arithmetic
from common.weights.checkpoint import Checkpoint
from jaxinfer import kernels
from jaxinfer.cache import page_memory
from jaxinfer.device import describe, open_device
from jaxinfer.observe import observe
from jaxinfer.parallel import Group, requires_supervision, start, start_remote_ranks
from jaxinfer.step import Step


class ModelRunner(interface.ModelRunner):
    """`common.interface.ModelRunner` on JAX."""

    def __init__(self, config: EngineConfig, group: Group | None = None) -> None:
        """`group`: where this is not the first process of its ranks; else they are started."""
        self._others = None if group else start_remote_ranks(config)
        if self._others:
            self.config, self.device, self.group = self._others.config, self._others.device, self._others.group
        else:
            self.config, self.device = config, open_device(config.device, config.threads, config.ranks)
            self.group = group or start(config, self.device)
        self.state: Any = None  # a State once allocated
        self._step: Any = None  # a step.Step or a kernels.Step once loaded
        self._caps: Any = None
        _compilations()  # from now on

    @classmethod
    def requires_supervision(cls, config: EngineConfig) -> bool:
        return requires_supervision(config)

    @property
    def caps(self) -> Caps:
        return self._caps

    def load(self, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
        self.model_config: ModelConfig = checkpoint.config
        positions = self.config.model_len(checkpoint.config)
        unusable = kernels.unusable(self.config, checkpoint.config, self.device)
        native = unusable is None
        make: Any = kernels.make_step if native else Step
        step = self.group._staged(lambda group: make(self.config, self.device, group))
        self._tell("load", str(checkpoint.path))
        step.load(checkpoint, positions, progress)
        self._step = step
        self._caps = Caps(
            backend="jax",
            device=describe(self.device),
            dtypes=get_args(Dtype),
            kernels=(step.kernels,),
            kernel_library=kernels.built_library().name if native else None,
            kernel_arithmetic=arithmetic(kernels.built_library(), self.config.dtype) if native else None,
            framework_because=unusable,
            token_buckets=step.token_buckets,
            decode_buckets=step.decode_buckets,
            max_tokens=self.config.max_num_batched_tokens,
            max_seqs=self.config.max_num_seqs,
            max_logits=step.max_logits,
            max_model_len=positions,
            vocab_size=self.model_config.vocab_size,
            depth=self.group.stages - 1,
            pipelined=self.group.stages > 1,
            observes=self.config.ranks == 1,
        )

    def kv_groups(self) -> tuple[KVGroup, ...]:
        return interface.one_group(self.model_config, self._step.page_bytes(self.model_config))

    def allocate(self, pages_per_group: Sequence[int]) -> None:
        self._tell("allocate", list(pages_per_group))
        self._num_pages = pages_per_group[0]
        self.reset()

    def reset(self) -> None:
        self._expect_open()
        if self._others and self.state is not None:
            self._step, self.state = None, None
            raise BackendError("A step raised, and processes of JAX that may be at different places of it cannot go on.")
        self.state = None  # the old pool goes before the new one comes
        self.state = self._step.make_state(self._num_pages)
        self._rank_bytes = self._step.held(self.state) if self.config.ranks > 1 else 0

    def warmup(self, progress: Progress | None = None) -> None:
        self._tell("warmup")
        self.state = self._step._copy_pages(self.state, np.zeros((0, 2), np.int32))
        self.state = self._step.warmup(self.state, progress)  # which waits for all stages

    @property
    def compilations(self) -> int:
        return _compilations()[0]

    def stats(self) -> dict[str, float]:
        if self.config.ranks == 1:
            return {}
        memory = self._others.memory() if self._others else {}
        return memory | {"communication_bytes": self._step._told, "rank_bytes": self._rank_bytes}

    def submit(self, batch: Batch, mask: Mask = None) -> interface.StepHandle:
        self._expect_open()
        if self._others:
            batch, mask = masked(batch, mask), None
            self._tell("submit", data=[batch.buffer])
        self._copy(batch)
        self.state, fetch = self._step.run(self.state, batch, mask)
        return interface.LazyResult(batch, fetch)

    def observe(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        self._expect_open()
        if not self.caps.observes:
            return super().observe(batch, names)
        self._copy(batch)
        self.state, taps = observe(self._step, self.state, batch, names)
        return taps

    def read_pages(self, group: int, pages: Sequence[int]) -> dict[str, np.ndarray]:
        self._tell("read_pages", group, list(pages))
        return self._step.read_pages(self.state, pages)

    def write_pages(self, group: int, pages: Sequence[int], arrays: dict[str, np.ndarray]) -> None:
        k, v = arrays["k"], arrays["v"]
        self._tell("write_pages", group, list(pages), k.dtype.name, k.shape, data=[k, v])
        self.state = self._step.write_pages(self.state, pages, arrays)

    def page_memory(self, group: int) -> interface.PageMemory | None:
        if self.config.ranks > 1 or self.device.platform != "cpu":
            return None
        return interface.PageMemory(interface.page_form(self._step.kernels, self.config), page_memory(self.state.cache))

    def close(self) -> None:
        self._step, self.state = None, None
        if self._others:
            self._others.close()

    def _tell(self, call: str, *arguments: Any, data: Sequence[np.ndarray] = ()) -> None:
        """Have all other processes of this engine do what this one is about to do."""
        if self._others:
            self._others.tell(call, *arguments, data=data)

    def _expect_open(self) -> None:
        if self._step is None:
            raise BackendError("This runner has no weights: load a checkpoint, or, if it is closed, make a new one.")

    def _copy(self, batch: Batch) -> None:
        if batch.copies.shape[1]:
            self.state = self._step._copy_pages(self.state, batch.copies[0])


@cache
def _compilations() -> list[int]:
    """How many programs XLA has compiled in this process since this was called first, by whomever: one number, which rises."""
    count = [0]

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    return count
