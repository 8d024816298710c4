"""What runs in processes of `test_replicas`, which are to start fast: no framework is imported here."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

from common.config import EngineConfig
from common.process import child
from common.process.frames import write_frame
from common.replicas.factory import open_engine
from common.weights import zoo
from common.weights.checkpoint import open_checkpoint

MODEL = "tiny-llama"
SMALL = EngineConfig(
    max_num_seqs=8, max_num_batched_tokens=64, max_model_len=512, num_blocks=200, data_parallel_size=2, threads=2, device="cpu"
)
PAIR = replace(SMALL, data_parallel_size=1, prefill_parallel_size=1)


def chatter(what: str) -> None:
    """A replica that serves, and then does not do as it should."""
    answers, told = child.listen()
    write_frame(answers, {"ready": {}})
    if what == "garbage":
        answers.write(b"HTTP/1.1 200 OK\r\n\r\n")
    elif what == "half a frame":
        answers.write(b"TNDM\x05")
    elif what == "oversize":
        answers.write(b"TNDM" + b"\xff" * 12)
    answers.flush()
    if what == "half a frame":
        os._exit(3)
    told.get()


def parent() -> None:
    """Start replicas, or those that the option says, say who they are, and sleep."""
    config = PAIR if "disaggregated" in sys.argv else SMALL
    engine = open_engine("history", open_checkpoint(zoo.resolve(MODEL)), config)
    print(*[state.pid for state in engine.replicas], flush=True)
    time.sleep(600)


if __name__ == "__main__":
    parent()
