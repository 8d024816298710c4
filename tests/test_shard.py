"""A model shared out over ranks: what they have makes up the whole, and what they compute adds up to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.config import ModelConfig
from common.errors import ConfigError
from common.model.partition import BLOCK, join_heads, pool_config, share, split_heads, stage_layers
from common.weights.checkpoint import Checkpoint
from common.weights.shard import shard, stage_of
from experiments.correctness.reference import Keep, NumpyModel
from tests.backends import checkpoint
from tests.families import FAMILIES
from tests.test_config import MODEL

RANKS = (2, 3, 4)
SMOLLM2 = {"num_heads": 9, "num_kv_heads": 3, "vocab_size": 49152, "intermediate_size": 1536}
GEMMA3 = {"num_heads": 4, "num_kv_heads": 1, "vocab_size": 262144, "intermediate_size": 2048}


def shards(whole: Checkpoint, ranks: int) -> list[Checkpoint]:
    return [shard(whole, rank, ranks) for rank in range(ranks)]


class Summed(NumpyModel):
    """The judge, but for its layers, which are sums over ranks, and its tables of tokens, which are their rows."""

    def __init__(self, parts: list[Checkpoint], config: ModelConfig) -> None:
        super().__init__(parts[0], config)
        self.parts = [NumpyModel(part) for part in parts]

    def _attention(self, layer: int, x_TD: np.ndarray, keep: Keep) -> np.ndarray:
        return sum(part._attention(layer, x_TD, lambda name, x: None) for part in self.parts)  # type: ignore[return-value]

    def _mlp(self, prefix: str, x_TD: np.ndarray) -> np.ndarray:
        return sum(part._mlp(prefix, x_TD) for part in self.parts)  # type: ignore[return-value]

    def _stored(self, name: str) -> np.ndarray:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            return np.concatenate([part._stored(name) for part in self.parts])[: self.config.vocab_size]
        return super()._stored(name)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_ranks_compute_adds_up_to_the_whole(family: str, ranks: int, families: dict[str, Path]) -> None:
    whole = checkpoint(families[family])
    prompt = np.random.default_rng(0).integers(0, whole.config.vocab_size, 24).tolist()
    right = NumpyModel(whole).logits(prompt)
    got = Summed(shards(whole, ranks), whole.config).logits(prompt)
    assert np.abs(got - right).max() < 1e-11 * right.std()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", [*FAMILIES, "smollm2-135m"])
def test_what_ranks_hold_put_together_is_the_checkpoint(name: str, ranks: int, families: dict[str, Path]) -> None:
    whole = checkpoint(families.get(name, name))
    parts = shards(whole, ranks)
    for tensor in whole.names():
        if ".layers." in tensor and ".layers.1." not in tensor:
            continue
        right, held = whole[tensor].dense(), [part[tensor].dense() for part in parts]
        if right.shape == held[0].shape and tensor.endswith(("o_proj.bias", "down_proj.bias")):
            assert np.array_equal(sum(held), right), tensor
        elif "norm" in tensor:
            assert all(np.array_equal(each, right) for each in held), tensor
        else:
            turn = np.transpose if tensor.endswith(("o_proj.weight", "down_proj.weight")) else np.asarray
            rows = [row.tobytes() for row in np.concatenate([turn(each) for each in held]) if row.any()]
            if ".k_proj" in tensor or ".v_proj" in tensor:
                rows = list(dict.fromkeys(rows))  # several ranks may have the same head
            assert rows == [row.tobytes() for row in turn(right) if row.any()], tensor


@pytest.mark.parametrize(
    ("sizes", "ranks", "queries", "kv_heads"),
    [
        ({"num_heads": 4, "num_kv_heads": 2}, 2, [(0, 2, 2), (2, 4, 2)], [(0, 1, 1), (1, 2, 1)]),
        (
            {"num_heads": 4, "num_kv_heads": 2},
            4,
            [(i, i + 1, 1) for i in range(4)],
            [(0, 1, 1), (0, 1, 1), (1, 2, 1), (1, 2, 1)],
        ),
        (SMOLLM2, 2, [(0, 6, 6), (6, 9, 6)], [(0, 2, 2), (2, 3, 2)]),
        (SMOLLM2, 4, [(0, 3, 3), (3, 6, 3), (6, 9, 3), (9, 9, 3)], [(0, 1, 1), (1, 2, 1), (2, 3, 1), (3, 3, 1)]),
        (GEMMA3, 4, [(i, i + 1, 1) for i in range(4)], [(0, 1, 1)] * 4),
        ({"num_heads": 3, "num_kv_heads": 1}, 2, [(0, 2, 2), (2, 3, 2)], [(0, 1, 1)] * 2),
        (
            {"num_heads": 6, "num_kv_heads": 2},
            4,
            [(0, 2, 2), (2, 3, 2), (3, 5, 2), (5, 6, 2)],
            [(0, 1, 1), (0, 1, 1), (1, 2, 1), (1, 2, 1)],
        ),
    ],
    ids=["split", "repeated", "uneven", "one has none", "one for all", "uneven queries of one", "uneven queries of two"],
)
def test_the_table_of_heads(
    sizes: dict[str, int], ranks: int, queries: list[tuple[int, ...]], kv_heads: list[tuple[int, ...]]
) -> None:
    config = replace(MODEL, **sizes)
    shares = [share(config, rank, ranks) for rank in range(ranks)]
    assert [each.queries for each in shares] == queries
    assert [each.kv_heads for each in shares] == kv_heads


@pytest.mark.parametrize("sizes", [SMOLLM2, GEMMA3], ids=["SmolLM2", "Gemma 3"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_tokens_and_features_of_real_models_divide_evenly(sizes: dict[str, int], ranks: int) -> None:
    shares = [share(replace(MODEL, **sizes), rank, ranks) for rank in range(ranks)]
    for spans, whole in (
        ([x.tokens for x in shares], sizes["vocab_size"]),
        ([x.features for x in shares], sizes["intermediate_size"]),
    ):
        assert {(span.stop - span.start, span.size) for span in spans} == {(whole // ranks,) * 2}


@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 199, 1000])
@pytest.mark.parametrize("ranks", RANKS)
def test_no_block_of_tokens_lies_on_two_ranks(vocab_size: int, ranks: int) -> None:
    spans = [share(replace(MODEL, vocab_size=vocab_size, intermediate_size=48), rank, ranks).tokens for rank in range(ranks)]
    assert [token for span in spans for token in range(span.start, span.stop)] == list(range(vocab_size))
    assert {span.size for span in spans} == {spans[0].size} and spans[0].size % BLOCK == 0
    assert all(span.start == min(rank * span.size, vocab_size) for rank, span in enumerate(spans))


@pytest.mark.parametrize("sizes", [SMOLLM2, GEMMA3, {}], ids=["uneven", "one for all", "split"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pages_of_all_ranks_hold_those_of_the_model(sizes: dict[str, int], ranks: int) -> None:
    config = replace(MODEL, **sizes)
    whole = np.random.default_rng(0).standard_normal((2, 3, config.num_kv_heads, config.head_dim))
    held = split_heads(whole, config, ranks)
    assert held.shape[-2] == pool_config(config, ranks).num_kv_heads
    assert np.array_equal(join_heads(held, config, ranks), whole)
    for rank, mine in enumerate(np.split(held, ranks, axis=-2)):
        start, stop, _ = share(config, rank, ranks).kv_heads
        assert (
            np.array_equal(mine[..., : stop - start, :], whole[..., start:stop, :]) and not mine[..., stop - start :, :].any()
        )


def test_one_rank_has_the_checkpoint_as_it_is() -> None:
    whole = checkpoint("tiny-llama")
    assert shard(whole, 0, 1) is whole


@pytest.mark.parametrize("ranks", [3, 5, 63])
def test_numbers_of_ranks_that_do_not_divide_are_refused_with_those_that_do(ranks: int) -> None:
    with pytest.raises(ConfigError, match=rf"={ranks} .* the 128 features .*: 1, 2, 4, 8, 16, 32, 64\."):
        shard(checkpoint("tiny-llama"), 0, ranks)


def test_a_part_reads_as_any_tensor_does() -> None:
    part = shard(checkpoint("smollm2-135m"), 1, 2)["model.layers.0.self_attn.o_proj.weight"]
    dense = part.dense()
    assert part.shape == dense.shape == (576, 384) and dense.dtype == np.float32 and dense.flags["C_CONTIGUOUS"]
    for axis, start, stop in ((0, 5, 9), (1, 100, 300), (-1, 0, 384)):
        np.testing.assert_array_equal(part.slice(axis, start, stop), np.take(dense, range(start, stop), axis), strict=True)
    with pytest.raises(IndexError, match="o_proj"):
        part.slice(1, 0, 385)


# ── stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Staged(NumpyModel):
    """The judge, each of whose layers is computed by the stage that has it, and the tables of tokens are the last one's."""

    def __init__(self, parts: list[Checkpoint], config: ModelConfig) -> None:
        super().__init__(parts[-1], config)
        self.parts = [NumpyModel(part) for part in parts]
        self.places = [(part, layer) for part in self.parts for layer in range(part.config.num_layers)]

    def _attention(self, layer: int, x_TD: np.ndarray, keep: Keep) -> np.ndarray:
        part, at = self.places[layer]
        return part._attention(at, x_TD, keep)

    def _mlp(self, prefix: str, x_TD: np.ndarray) -> np.ndarray:
        part, at = self.places[int(prefix.rpartition(".")[2])]
        return part._mlp(f"model.layers.{at}", x_TD)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        if ".layers." not in name:
            return super()._norm(name, x)
        part, at = self.places[int(name.split(".")[2])]
        return part._norm(f"model.layers.{at}.{name.rpartition('.')[2]}", x)

    def _stored(self, name: str) -> np.ndarray:
        return self.parts[0]._stored(name) if "embed_tokens" in name else super()._stored(name)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_stages_compute_one_after_another_is_the_whole(family: str, stages: int, families: dict[str, Path]) -> None:
    whole = checkpoint(families[family])
    prompt = np.random.default_rng(0).integers(0, whole.config.vocab_size, 24).tolist()
    staged = Staged([stage_of(whole, stage, stages) for stage in range(stages)], whole.config)
    np.testing.assert_array_equal(staged.logits(prompt), NumpyModel(whole).logits(prompt))


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"), [(30, 2, [15, 15]), (30, 4, [8, 8, 7, 7]), (3, 2, [2, 1]), (3, 3, [1, 1, 1]), (7, 1, [7])]
)
def test_layers_are_shared_out_over_stages_as_evenly_as_it_goes(layers: int, stages: int, sizes: list[int]) -> None:
    parts = stage_layers(layers, stages)
    assert [len(part) for part in parts] == sizes
    assert [layer for part in parts for layer in part] == list(range(layers))


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_have_every_tensor_once_and_a_tied_table_twice(family: str, stages: int, families: dict[str, Path]) -> None:
    whole = checkpoint(families[family])
    parts = [stage_of(whole, stage, stages) for stage in range(stages)]
    held = Counter(entry.name for part in parts for entry in part.entries.values())
    twice = {"model.embed_tokens.weight": 2} if whole.config.tie_embeddings and stages > 1 else {}
    assert held == dict.fromkeys(whole.names(), 1) | twice
    ends = [(part.config.embeds, part.config.predicts) for part in parts]
    assert ends == [(stage == 0, stage == stages - 1) for stage in range(stages)]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_of_a_real_model_no_stage_has_much_more_of_the_layers_than_its_part(stages: int) -> None:
    whole = checkpoint("smollm2-135m")
    size = lambda part: sum(int(np.prod(part[name].shape)) for name in part.names() if ".layers." in name)  # noqa: E731
    parts = [size(stage_of(whole, stage, stages)) for stage in range(stages)]
    assert sum(parts) == size(whole) and max(parts) <= (1 / stages + 0.05) * size(whole)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size=31 .* has 30\. Numbers that can: 1 to 30\."):
        stage_of(checkpoint("smollm2-135m"), 0, 31)
