"""Measure the rate at which the KV pages of a long prompt go from one engine to another: `python -m experiments.handover`.

The command prints the rate for each pair of backends beside the rate of this machine's memory copy, and one line of JSON.

One process holds the pages. Another one fetches them into its own pool, with the code that serves requests
(`common.kv_transfer.connection`), again and again. Between two transfers one thread copies as many bytes from one array to
another. A rate is that of the median time. A transfer copies twice, from pages to shared memory and from there to pages, and
reads once more in between for the receiver's checksums, each with two threads. The sender computes checksums of the data that
it has just copied.
"""

from __future__ import annotations

import argparse
import os
import queue
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from common.batch import KV
from common.config import EngineConfig
from common.errors import TandemError
from common.interface import ModelRunner, load_backend
from common.kv_transfer.connection import SECRET, TransferRequest, TransferServer, fetch
from common.kv_transfer.layout import PageCopier, layouts_of
from common.kv_transfer.protocol import Sender
from common.kv_transfer.shared_memory import SegmentPool
from common.process import child
from common.process.exits import USER_ERROR, expect_output, fail, printing
from common.process.frames import Frame, read_frame, write_frame
from common.replicas.messages import pack_offer, unpack_offer
from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from experiments.display.formatting import number
from experiments.display.progress import ProgressReporter
from experiments.report.console import print_json, wide_console

BACKENDS = ("jax", "torch")
TOKENS, TIMES = 4096, 11
ROOM_BYTES = 1 << 30
STEADY = 1.1
"""By how much the fastest memory copy may pass the slowest on a machine that does nothing else."""
COLUMNS = (
    "brought: from the pages of one process to memory that both have, and checked there; written: from there to the pages of "
    "the other; in all: both; share: in all over memory copy, one of as many bytes by one thread between these. Medians."
)


class Pool:
    """A runner that is loaded, and pages for a prompt of so many tokens, from all over its pool."""

    def __init__(self, backend: str, path: str, config: EngineConfig, tokens: int) -> None:
        self.runner: ModelRunner = load_backend(backend, config)
        self.runner.load(open_checkpoint(path))
        self.size, self.tokens, count = config.block_size, tokens, -(-tokens // config.block_size)
        self.runner.allocate([2 * count + 1] * len(self.runner.kv_groups()))
        self.pages: list[int] = (1 + np.random.default_rng(0).permutation(2 * count)[:count]).tolist()
        self.layouts, self.carrier = layouts_of(self.runner, self.size, path), PageCopier(self.runner, self.size)

    def read(self, start: int, kv: KV) -> list[int]:
        return self.carrier.read(self.pages, start, kv)

    def write(self, kv: KV) -> None:
        self.carrier.write(self.pages, kv)

    def close(self) -> None:
        self.runner.close()

    def fill(self) -> None:
        self.write(self.drawn())

    def drawn(self) -> KV:
        """What two processes draw alike."""
        rng, tokens = np.random.default_rng(1), self.layouts[-1]
        draw = lambda part: np.asarray(rng.standard_normal(part.shape(self.tokens))).astype(part.dtype)  # noqa: E731
        groups = [{part.name: draw(part) for part in parts} for parts in tokens.groups]
        return KV(self.tokens, tuple(groups))


def hold(backend: str, path: str, options: dict[str, Any], tokens: int) -> None:
    """In a process of its own: offer the pages as often as they are asked for."""
    secret = os.environ.pop(SECRET).encode()
    answers, told = child.listen()
    child.die_with_parent()
    pool = Pool(backend, path, EngineConfig(**options), tokens)
    pool.fill()
    asked: queue.SimpleQueue[Frame | TransferRequest] = told
    door = TransferServer(secret, asked.put)
    sender = Sender(pool.layouts, lambda _, *what: pool.read(*what), lambda name: None, time.time_ns())
    while True:
        said = asked.get()
        if isinstance(said, TransferRequest):
            for answer in sender.hear(said.said, time.monotonic(), said.memory):
                said.answer(answer)
            said.answer(None)
        else:
            write_frame(answers, {"offer": pack_offer(door.address, sender.offer("prompt", tokens, time.monotonic()))})


def measure(pool: Pool, offered: Callable[[], Sequence[Any]], secret: str, times: int) -> dict[str, Any]:
    """Seconds of each time, and what came of it. `offered` has the pages offered once more."""
    room, came, copied = SegmentPool(ROOM_BYTES), [], []
    for i in range(times + 2):
        address, offer = unpack_offer(offered())
        kv: Future[KV] = Future()
        begin = time.perf_counter()
        fetch(address, offer, pool.layouts, secret.encode(), room, kv)
        fetched = time.perf_counter()
        got = kv.result()
        pool.write(got)
        written = time.perf_counter()
        if i == 0:
            layout = next(layout for layout in pool.layouts if layout.page == got.page)
            num_bytes = layout.num_bytes(offer.tokens)
            one, other = (np.ones(num_bytes, np.uint8) for _ in range(2))
            check(pool)
        del got, kv
        start = time.perf_counter()
        np.copyto(one, other)
        copied.append(time.perf_counter() - start)
        came.append((fetched - begin, written - fetched, written - begin))
    fetching, writing, whole = (median(seconds) for seconds in zip(*came[2:], strict=True))  # the first have memory to clear
    copy = median(copied[2:])
    rates = {"fetch": fetching, "write": writing, "handover": whole, "copy": copy}
    return {
        "form": layout.form,
        "bytes": num_bytes,
        **{f"{name}_bytes_per_s": num_bytes / seconds for name, seconds in rates.items()},
        "share": copy / whole,
    }


def check(pool: Pool) -> None:
    """That what came is what was held. Raises `RuntimeError` otherwise."""
    drawn, tokens = pool.drawn(), pool.layouts[-1]
    read = tokens.view(np.empty(tokens.num_bytes(pool.tokens), np.uint8), pool.tokens)
    pool.read(0, read)
    for mine, right in zip(read.groups, drawn.groups, strict=True):
        if not all(np.array_equal(x, right[name]) for name, x in mine.items()):
            raise RuntimeError("The pages that came are not those that were held; this is a bug.")


def run(model: str, config: EngineConfig, tokens: int, times: int, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """Every pair of backends, one after the other. `say` is told which comes next."""
    path, found = str(zoo.resolve(model)), list[dict[str, Any]]()
    for giving in BACKENDS:
        secret = secrets.token_hex(32)
        arguments = (giving, path, asdict(config), tokens)
        process = child.start("experiments.handover:hold", *arguments, environment={SECRET: secret})
        assert process.stdin and process.stdout
        stdin, stdout = process.stdin, process.stdout

        def offered(stdin: Any = stdin, stdout: Any = stdout) -> Sequence[Any]:
            write_frame(stdin, {"order": "offer"})
            frame = read_frame(stdout)
            if frame is None:
                raise RuntimeError("The process that holds the pages has ended; its log says more.")
            offer: Sequence[Any] = frame.message["offer"]
            return offer

        try:
            for taking in BACKENDS:
                say(f"pair {len(found) + 1} of {len(BACKENDS) ** 2}: from {giving} to {taking}")
                pool = Pool(taking, path, config, tokens)
                found.append({"from": giving, "to": taking} | measure(pool, offered, secret, times))
                pool.close()
        finally:
            child.end(process)
    return found


@printing()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.handover", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the prompt (default: %(default)s)")
    parser.add_argument("--times", type=int, default=TIMES, help="it is handed over (default: %(default)s)")
    parser.add_argument("--kernels", default="native", choices=["native", "framework"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    words = parser.parse_args()
    for name in ("tokens", "times"):
        if (value := getattr(words, name)) < 1:
            parser.error(f"--{name} must be 1 or more, got {value}.")
    expect_output("the rates")
    try:
        config = EngineConfig(kernels=words.kernels, dtype=words.dtype, device="cpu", threads=1)
        with ProgressReporter() as narrator:
            found = run(words.model, config, words.tokens, words.times, narrator.say)
    except TandemError as error:
        fail(str(error), USER_ERROR)
    table = Table(title=f"A prompt of {words.tokens} tokens handed over, {words.model}, {words.dtype}, kernels={words.kernels}")
    columns = ("from", "to", "form", "MB", "brought, GB/s", "written, GB/s", "in all, GB/s", "memory copy, GB/s", "share")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    for row in found:
        rates = [number(row[f"{name}_bytes_per_s"] / 1e9) for name in ("fetch", "write", "handover", "copy")]
        table.add_row(row["from"], row["to"], row["form"], number(row["bytes"] / 1e6), *rates, number(row["share"]))
    console = wide_console()
    console.print(table)
    console.print(COLUMNS, style="dim", highlight=False)
    slowest, *_, fastest = sorted(row["copy_bytes_per_s"] for row in found)
    if fastest > STEADY * slowest:
        console.print(
            f"The machine was not the same for all rows: memory copy {slowest / 1e9:.1f} to {fastest / 1e9:.1f} GB/s. "
            "Shares stand within a row; rates of two rows do not compare.",
            style="bold red",
            highlight=False,
        )
    print_json(
        {"model": words.model, "tokens": words.tokens, "dtype": words.dtype, "kernels": words.kernels, "handover": found}
    )


if __name__ == "__main__":
    main()
