"""Perplexity of a text on an engine: exp of the mean surprise of its tokens, each predicted from those before it.

The text is cut into windows of `CONTEXT` tokens that know nothing of each other, and the first token of each is not predicted.
Two engines that compute the same model give the same number to a few digits; two texts, or two tokenizers, cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.batch import VIEWS, Batch
from common.config import EngineConfig
from common.errors import ConfigError
from common.interface import ModelRunner, Progress
from common.request import SamplingParams
from common.schedule.request_table import Rows
from common.weights.checkpoint import Checkpoint
from experiments.correctness.judge import log_softmax

CONTEXT = 256
"""Tokens of a window."""
MOST = 16_384
"""Tokens of a text that are read."""
TEXT = """\
The harbour lies at the end of a long valley, and for most of the year the wind comes down it in the evening and goes
back up in the morning. The people who mend nets there say that it breathes. They rise early, because the light on the
water is best before the sun has cleared the eastern hill, and they work with their backs to the wall of the old customs
house, where the stone keeps the warmth of the day before.

When the ferry still ran, it brought the post on Tuesdays and on Fridays. A boy would wait at the landing with a
handcart, and the captain, who disliked waiting, would throw him the bags before the ropes were fast. Twice a bag fell
into the sea. The first time everything in it was lost; the second time a farmer's daughter dived after it and came up
with the strap between her teeth. The letters were dried on a line in the school yard, and anyone could read them who
wanted to, but nobody did, or nobody said so.

Her name was Marit, and she later built the lighthouse. It was not a tall one. She had asked the council for forty feet
and been given twenty-five, so she put it on the highest rock, which nobody had thought of, and it could be seen from
farther away than the one they had refused her. In the accounts of that winter there is a line for paint, a line for
glass, a line for oil, and a line that says only: for being right, nothing.

How does a lighthouse work? A lamp alone is soon lost in the dark, since its light spreads in all directions and grows
weaker with the square of the distance. A lens gathers what would have gone to the sky and the ground and bends it
toward the horizon. The lens need not be thick: it can be cut into rings, each of which bends the light just as much as
its place requires. If the lens turns, a ship sees a flash, and from the time between two flashes a sailor knows which
light it is. One, two, three, dark; one, two, three, dark: that was Marit's, and it is so to this day.

The valley has changed less than one might think. There are fewer boats and more windows. The school has eleven
children, who learn to count in tides. At noon the bell is rung by hand, and on the first day of spring whoever is
oldest rings it, however long that takes. Visitors ask whether the place is lonely. It depends, they are told, on what
you have brought with you.
"""


def read_text(config_text: str | None) -> str:
    """The text of a file, or the one above. Raises `ConfigError` for a file that cannot be read."""
    if config_text is None:
        return TEXT
    try:
        return Path(config_text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a path may hold what no name can
        said = f"correctness.perplexity_text must be a file of UTF-8 text, and {config_text!r} is not: {error}."
        raise ConfigError(said) from error


def tokenize(checkpoint: Checkpoint, text: str) -> list[int]:
    """The text's tokens, without special ones. Raises `CheckpointError` for a checkpoint without a tokenizer."""
    from common.text.tokenizer import open_tokenizer

    return open_tokenizer(checkpoint.path).encode(text, add_special_tokens=False)[:MOST]


def windows(tokens: Sequence[int], context: int) -> list[Sequence[int]]:
    """Cut into windows; a last one of a single token predicts nothing and is left out."""
    cut = [tokens[at : at + context] for at in range(0, len(tokens), context)]
    return [window for window in cut if len(window) > 1]


def surprise(
    runner: ModelRunner, config: EngineConfig, tokens: Sequence[int], context: int, progress: Progress
) -> tuple[float, int]:
    """The sum of -log p over all predicted tokens, in nats, and their number, on a runner whose pages and rows are free."""
    total, count, chunk = 0.0, 0, config.max_num_batched_tokens
    every = windows(tokens, context)
    for done, window in enumerate(every):
        rows = Rows(1, len(window), config.block_size)
        pages = range(1, 1 + -(-len(window) // config.block_size))
        row = rows.take(np.array(window, np.int32), pages, SamplingParams(temperature=0.0), 0)
        for start in range(0, len(window) - 1, chunk):
            size = min(chunk, len(window) - 1 - start)
            logits = runner.observe(every_row(rows.build([row], [start], [size], [0], [])), ("logits",))["logits"]
            following = np.array(window[start + 1 : start + 1 + size])
            total -= float(chosen_logprobs(logits, following).sum())
            count += size
        progress(done + 1, len(every), "perplexity")
    return total, count


def every_row(batch: Batch) -> Batch:
    """The batch of one sequence, asking for the logits of each of its tokens."""
    rows = np.arange(batch.num_tokens)
    asked = {"logit_rows": rows, "logit_owner": np.zeros_like(rows), "want": np.ones_like(rows)}
    return Batch.pack(**({name: getattr(batch, name) for name in VIEWS} | asked))


def chosen_logprobs(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """float64[n]: the log-probability of each token under its row of logits [n, V]. NaN stays NaN."""
    return log_softmax(logits)[np.arange(len(tokens)), tokens]


def perplexity(answer: Mapping[str, float]) -> float | None:
    """From `total` and `count`; None where logits were not finite, or there was nothing to predict."""
    mean = answer["total"] / answer["count"] if answer["count"] else math.nan
    return math.exp(mean) if math.isfinite(mean) else None
