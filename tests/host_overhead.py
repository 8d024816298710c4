"""How long the host works per step when the device takes no time at all: `python -m tests.host_overhead`.

Schedule, batch and update are real; the runner answers at once with the same token. Goals: at most 0.5 ms with 64 running
requests and 0.15 ms with one.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from common.batch import Batch, Mask
from common.config import EngineConfig
from common.engine import Engine
from common.interface import Result, StepHandle
from common.request import Request, SamplingParams
from tests.history_runner import HistoryRunner


class IdleRunner(HistoryRunner, StepHandle):
    """Answers every step with token 1 for everyone."""

    def submit(self, batch: Batch, mask: Mask = None) -> StepHandle:
        self._batch = batch
        return self

    def result(self) -> Result:
        batch = self._batch
        starts = np.zeros(batch.num_seqs + 1, np.int32)
        starts[batch.logit_owner + 1] = 1
        count = len(batch.logit_rows)
        return Result(tokens=np.ones(count, np.int32), token_starts=starts.cumsum(), finite=np.ones(count, bool))


def host_ms_per_step(requests: int, tokens: int = 300, temperature: float = 0.0) -> float:
    """Median over the decode steps of `requests` requests, in ms, all of `step` but for the runner."""
    runner = IdleRunner(num_pages=8192)
    config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=2048)
    engine = Engine(runner, config, num_pages=8192)
    params = SamplingParams(max_tokens=tokens, temperature=temperature)
    for i in range(requests):
        engine.add(Request(request_id=str(i), prompt_token_ids=[i, *range(60)], params=params))
    while engine.stats()["num_waiting"]:
        engine.step()
    times = []
    while engine.has_work:
        runner_before, begin = engine.stats()["device_seconds"], perf_counter()
        engine.step()
        times.append(perf_counter() - begin - (engine.stats()["device_seconds"] - runner_before))
    return 1e3 * float(np.median(times))


if __name__ == "__main__":
    for requests in (1, 64):
        for temperature in (0.0, 1.0):
            print(
                f"{requests:3} running, temperature {temperature}: {host_ms_per_step(requests, 300, temperature):.3f} ms a step"
            )
