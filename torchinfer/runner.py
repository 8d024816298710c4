"""One model on a PyTorch device, a step at a time: `common.interface.ModelRunner` over the step that `kernels` names."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch._dynamo.utils import counters

from common import interface
from common.batch import Batch, Mask
from common.config import Dtype, EngineConfig, ModelConfig
from common.errors import BackendError
from common.interface import Caps, KVGroup, Progress
from common.kernels.cpu.build import arithmetic
from common.weights.checkpoint import Checkpoint
from torchinfer import kernels
from torchinfer.arrays import to_device
from torchinfer.cache import copy_pages, page_memory
from torchinfer.device import describe, open_device
from torchinfer.observe import observe
from torchinfer.parallel import Group, requires_supervision, start
from torchinfer.step import Step


class _Waiting:
    """A submitted step. Where stages come before this one, this stage runs its part when a caller fetches the result.

    Until then those stages compute, and the caller may submit more steps.
    """

    def __init__(self, runner: ModelRunner, batch: Batch, mask: Mask) -> None:
        self._runner, self._batch, self._mask = runner, batch, mask
        self._fetch: Any = None

    def run(self) -> None:
        runner = self._runner
        runner._copy(self._batch)
        runner.state, self._fetch = runner._step.run(runner.state, self._batch, self._mask)

    def fetch(self) -> Any:
        self._runner._catch_up(self)
        return self._fetch()


class ModelRunner(interface.ModelRunner):
    """`common.interface.ModelRunner` on PyTorch."""

    def __init__(self, config: EngineConfig, group: Group | None = None) -> None:
        """`group`: where this is not the first of its ranks; else they are started."""
        self.config = config
        device = open_device(config.device, config.threads, config.ranks)
        self.group = group or start(config, device)
        self.device = self.group._claim(device)
        self.state: Any = None  # a State once allocated
        self._step: Any = None  # a step.Step or a kernels.Step once loaded
        self._caps: Any = None
        self._waiting: deque[_Waiting] = deque()

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
        step: Any = (kernels.make_step if native else Step)(self.config, self.device, self.group)
        self.group._load(checkpoint.path)
        step.load(checkpoint, positions, progress)
        self.group._settle()
        self._step = step
        self._caps = Caps(
            backend="torch",
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
        self._num_pages = pages_per_group[0]
        self.reset()

    def reset(self) -> None:
        self._expect_open()
        self.state = None  # the old pool goes before the new one comes
        self._waiting.clear()
        self.group._rendezvous()
        self.group._tell("allocate", [self._num_pages])
        self.state = self._step.make_state(self._num_pages)
        self._rank_bytes = self._step.held(self.state) if self.config.ranks > 1 else 0

    def warmup(self, progress: Progress | None = None) -> None:
        self.group._tell("warmup")
        self.state = self._step.warmup(self.state, progress)

    @property
    def compilations(self) -> int:
        return int(counters["stats"]["unique_graphs"])

    def stats(self) -> dict[str, float]:
        return self.group._stats() | {"rank_bytes": self._rank_bytes} if self.config.ranks > 1 else {}

    def submit(self, batch: Batch, mask: Mask = None) -> interface.StepHandle:
        self._expect_open()
        step = _Waiting(self, *self.group._hand_out(batch, mask))
        self._waiting.append(step)
        if self.group.stage == 0:
            self._catch_up()
        return interface.LazyResult(batch, step.fetch)

    def observe(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        self._expect_open()
        if not self.caps.observes:
            return super().observe(batch, names)
        self._copy(batch)
        self.state, taps = observe(self._step, self.state, batch, names)
        return taps

    def read_pages(self, group: int, pages: Sequence[int]) -> dict[str, np.ndarray]:
        self.group._tell("read_pages", group, list(pages))
        self._catch_up()
        return self._step.read_pages(self.state, pages)

    def write_pages(self, group: int, pages: Sequence[int], arrays: dict[str, np.ndarray]) -> None:
        k, v = arrays["k"], arrays["v"]
        self.group._tell("write_pages", group, list(pages), k.dtype.name, k.shape, data=[k, v])
        self._catch_up()
        self.state = self._step.write_pages(self.state, pages, arrays)

    def page_memory(self, group: int) -> interface.PageMemory | None:
        if self.config.ranks > 1 or self.device.type != "cpu":
            return None
        return interface.PageMemory(interface.page_form(self._step.kernels, self.config), page_memory(self.state.cache))

    def close(self) -> None:
        self._step, self.state = None, None
        self.group._close()

    def _catch_up(self, last: _Waiting | None = None) -> None:
        """Run this rank's part of all steps that wait for it, or of those up to one."""
        while self._waiting and (last is None or last in self._waiting):
            self._waiting.popleft().run()

    def _copy(self, batch: Batch) -> None:
        if batch.copies.shape[1]:
            with torch.inference_mode():
                copy_pages(self.state.cache, to_device(batch.copies[0].astype(np.int64), self.device))

    def _expect_open(self) -> None:
        if self._step is None:
            raise BackendError("This runner has no weights: load a checkpoint, or, if it is closed, make a new one.")
