"""Show each request in each step of an engine that is run step by step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import pandas as pd

from common.config import expect
from common.engine import Engine
from common.request import Request, Status

STATES = {"waiting": "#dddddd", "prompt": "#2f6db3", "decode": "#9cc9f0", "preempted": "#e0872f"}
"""What a request does in a step, and its colour."""


def watch(engine: Engine, requests: Sequence[Request], arrivals: Sequence[int] = ()) -> pd.DataFrame:
    """Run `requests` on an idle engine and write down what each does in each step. Request i comes before step arrivals[i];
    without `arrivals` all come before the first.

    A row for each live request and step: `step`, `request`, `state` (of `STATES`), `tokens` that it computes, `pages` that it
    holds, and `held`, the pages that anyone holds. This is the loop of `Engine.step` with its parts laid open; the engine
    counts what it does as ever, but for the host's seconds.
    """
    expect(not engine.has_work, "watch needs an idle engine; this one has requests of its own.")
    expect(
        len(arrivals) in (0, len(requests)), f"arrivals must be one for each of {len(requests)} requests, got {len(arrivals)}."
    )
    expect(engine.caps.depth == 0, f"watch takes one step at a time; this engine keeps {engine.caps.depth} in flight.")
    coming = deque(sorted(zip(arrivals or [0] * len(requests), requests, strict=True), key=lambda pair: pair[0]))
    scheduler, rows, now = engine.scheduler, [], 0
    while coming or scheduler.live:
        while coming and coming[0][0] <= now:
            engine.add(coming.popleft()[1])
        step = scheduler.schedule()
        counts = dict(zip(map(id, step.seqs), np.diff(step.batch.query_starts).tolist(), strict=True)) if step else {}
        held = scheduler.pool.num_pages - 1 - scheduler.pool.num_free
        for seq in scheduler.live.values():
            tokens = counts.get(id(seq), 0)
            busy = "decode" if tokens == 1 and seq.output else "prompt"
            state = "preempted" if seq.status is Status.PREEMPTED else busy if tokens else "waiting"
            rows.append((now, seq.request.request_id, state, tokens, len(seq.pages), held))
        if step:
            engine.submit(step)
            engine.land()
        now += 1
    while engine.has_work:
        engine.step()  # tells of requests that ended because their steps raised
    return pd.DataFrame(rows, columns=["step", "request", "state", "tokens", "pages", "held"])
