"""Each native operator against its definition in float64, on random shapes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from common.config import ModelConfig
from common.kernels.cpu.pack import pack_head, pack_layers
from common.kernels.cpu.pages import keys_in, keys_out, values_in, values_out
from common.kernels.cpu.step import pack_step
from common.kernels.cpu.sums import SharedMemoryGroup, meeting_place
from common.model.rope import rope_tables
from tests.backends import Packer, part

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Of a row's greatest absolute value."""
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
POSITIONS = 700

SHAPES: tuple[dict[str, Any], ...] = (
    {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "hidden_size": 576, "intermediate_size": 200},
    {"num_heads": 4, "num_kv_heads": 1, "head_dim": 256, "hidden_size": 96, "intermediate_size": 64, "qk_norm": True}
    | {"sandwich_norms": True, "activation": "gelu_tanh"},
    {"num_heads": 5, "num_kv_heads": 5, "head_dim": 24, "hidden_size": 51, "intermediate_size": 37, "qkv_bias": True}
    | {"output_bias": True, "mlp_bias": True},
    {"num_heads": 7, "num_kv_heads": 1, "head_dim": 80, "hidden_size": 33, "intermediate_size": 16},
)


@dataclass
class Tensor:
    array: np.ndarray

    def dense(self) -> np.ndarray:
        return self.array


class RandomCheckpoint:
    """One layer of random weights, as a checkpoint gives them."""

    def __init__(self, shape: dict[str, Any], window: int, seed: int) -> None:
        self.config = ModelConfig(
            **({"family": "llama", "vocab_size": 77, "num_layers": 1, "max_position": POSITIONS, "norm_eps": 1e-5} | shape),
            layer_window=(window,),
        )
        c, rng = self.config, np.random.default_rng(seed)
        D, F, q, kv = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        shapes = {"self_attn.q_proj": (q, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D)}
        shapes |= {"self_attn.o_proj": (D, q), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        self.tensors = {
            f"model.layers.0.{name}.weight": rng.standard_normal(size) * size[1] ** -0.5 for name, size in shapes.items()
        }
        self.tensors |= {f"model.layers.0.{name}.bias": rng.standard_normal(size[0]) for name, size in shapes.items()}
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        self.tensors |= {f"model.layers.0.{name}_layernorm.weight": 1 + 0.3 * rng.standard_normal(D) for name in norms}
        self.tensors |= {f"model.layers.0.self_attn.{x}_norm.weight": rng.standard_normal(c.head_dim) for x in "qk"}
        self.tensors |= {
            "model.embed_tokens.weight": rng.standard_normal((77, D)),
            "lm_head.weight": rng.standard_normal((77, D)),
        }
        self.tensors["model.norm.weight"] = rng.standard_normal(D)

    def __getitem__(self, name: str) -> Tensor:
        return Tensor(self.tensors[name].astype(np.float32))


class Case:
    """A random step over a random layer: what goes in, and where."""

    def __init__(self, shape: dict[str, Any], dtype: str, window: int, seed: int, page_size: int = 16) -> None:
        self.checkpoint: Any = RandomCheckpoint(shape, window, seed)
        self.config, self.dtype, self.page_size = self.checkpoint.config, dtype, page_size
        kernels = part("torch", "kernels")
        kernels.open_library()
        torch.ops.tandem.threads(2)
        rng = self.rng = np.random.default_rng(seed)
        # Beside the edges of pages, blocks and partitions, and anywhere; decodes and chunks.
        edges = [0, 1, 15, 16, 17, 31, 32, 63, 64, 65, 127, 511, 512, 513]
        count = int(rng.integers(1, 9))
        starts = [int(rng.choice(edges) if rng.random() < 0.7 else rng.integers(0, 600)) for _ in range(count)]
        counts = [1 if rng.random() < 0.5 else int(rng.integers(2, 41)) for _ in range(count)]
        self.plan = sorted(zip(starts, counts, strict=True), key=lambda part: part[1] > 1)
        pages = sum(-(-(start + n) // page_size) for start, n in self.plan) + 3
        packer = Packer(pages, page_size, max_len=POSITIONS, seed=seed)
        rows = [packer.add(rng.integers(0, 77, start + n).tolist()) for start, n in self.plan]
        self.batch = packer.step([(row, start, n) for row, (start, n) in zip(rows, self.plan, strict=True)])
        self.tables = [packer.rows.pages[row] for row in rows]
        self.step = torch.from_numpy(pack_step(self.batch))
        self.layers = torch.from_numpy(pack_layers(self.checkpoint, dtype))
        self.rope = np.concatenate(rope_tables(self.config.ropes[0], self.config.head_dim, POSITIONS), 1)
        self.cache = kernels.make_cache(self.config, pages, page_size, dtype)
        for pool in (self.cache.k[0], self.cache.v[0]):
            pool.fill_(float("nan"))

    def draw(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(DTYPES[self.dtype])

    def weight(self, name: str) -> np.ndarray:
        """In float64, of the values that the layer has."""
        array = self.checkpoint[f"model.layers.0.{name}"].dense()
        return (array if "norm" in name else array.astype(DTYPES[self.dtype])).astype(np.float64)

    def linear(self, name: str, x: np.ndarray, bias: bool) -> np.ndarray:
        y = x @ self.weight(f"{name}.weight").T
        return y + self.weight(f"{name}.bias") if bias else y

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.norm_eps) * self.weight(f"{name}.weight")

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return part("torch", "arrays").to_device(array, torch.device("cpu"))

    def pages_in(self, seq: int, k: np.ndarray, v: np.ndarray) -> None:
        """Write the first tokens of a sequence, [n, K, H] each, as earlier steps would have; slots behind are NaN."""
        pair, B = self.cache.k[0].shape[-1], self.page_size
        for pool, x, pack in ((self.cache.k[0], k, keys_in), (self.cache.v[0], v, values_in)):
            for at in range(0, len(x), B):
                page = np.full((1, 1, B, *x.shape[1:]), np.nan, x.dtype)
                page[0, 0, : len(x[at : at + B])] = x[at : at + B]
                pool[:, int(self.tables[seq][at // B])] = self.tensor(np.ascontiguousarray(pack(page, pair)[:, 0]))

    def pages_out(self, seq: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        ids = self.tables[seq][: -(-n // self.page_size)].tolist()
        host = part("torch", "arrays").to_host
        k, v = (host(pool[:, ids]) for pool in (self.cache.k[0], self.cache.v[0]))
        flat = lambda x: x.reshape(-1, *x.shape[2:])[:n].astype(np.float64)  # noqa: E731
        K, H = self.config.num_kv_heads, self.config.head_dim
        return flat(keys_out(k, K)[0]), flat(values_out(v, K, H)[0])

    def expect_near(self, got: torch.Tensor | np.ndarray, right: np.ndarray) -> None:
        got = got.float().numpy() if isinstance(got, torch.Tensor) else got
        got, right = (x.reshape(len(right), -1).astype(np.float64) for x in (got, right))
        assert np.isfinite(got).all()
        assert (np.abs(got - right).max(1) <= TOLERANCE[self.dtype] * np.abs(right).max(1)).all()


CASES = [
    (shape, dtype, window, seed, page_size)
    for shape in range(len(SHAPES))
    for dtype in ("float32", "bfloat16")
    for window, seed, page_size in ((0, 0, 16), (0, 1, 32), (20, 2, 16), (100, 3, 16), (0, 4, 16))
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest) -> Case:
    shape, dtype, window, seed, page_size = request.param
    return Case(SHAPES[shape], dtype, window, seed * 100 + shape, page_size)


def test_project_is_norm_matmul_rotation_and_a_write_to_pages(case: Case) -> None:
    c, T = case.config, case.batch.num_tokens
    N, H = c.num_heads, c.head_dim
    x = case.rng.standard_normal((T, c.hidden_size)).astype(np.float32) * 3
    q = torch.empty((T, N, H), dtype=case.cache.k[0].dtype)
    torch.ops.tandem.project(case.step, case.layers, torch.from_numpy(case.rope[None]), torch.from_numpy(x), *pools(case), q, 0)
    normed = case.norm("input_layernorm", x.astype(np.float64))
    heads = {name: case.linear(f"self_attn.{name}_proj", normed, c.qkv_bias).reshape(T, -1, H) for name in "qkv"}
    if c.qk_norm:
        heads |= {name: case.norm(f"self_attn.{name}_norm", heads[name]) for name in "qk"}
    cos, sin = (
        case.rope[case.batch.positions][:, None, part].astype(np.float64) for part in (slice(0, H // 2), slice(H // 2, H))
    )
    for name in "qk":
        a, b = np.split(heads[name], 2, axis=-1)
        heads[name] = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    case.expect_near(q, heads["q"])
    for seq, (start, n) in enumerate(case.plan):
        k, v = case.pages_out(seq, start + n)
        rows = slice(int(case.batch.query_starts[seq]), int(case.batch.query_starts[seq + 1]))
        case.expect_near(k[start:], heads["k"][rows])
        case.expect_near(v[start:], heads["v"][rows])
        assert np.isnan(k[:start]).all() and np.isnan(v[:start]).all()


def pools(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return case.cache.k[0], case.cache.v[0]


def test_attend_is_softmax_over_the_keys_a_query_sees(case: Case) -> None:
    c, T = case.config, case.batch.num_tokens
    N, K, H, window = c.num_heads, c.num_kv_heads, c.head_dim, c.layer_window[0]
    q = case.draw(T, N, H)
    right = np.zeros((T, N, H))
    for seq, (start, n) in enumerate(case.plan):
        k, v = case.draw(start + n, K, H), case.draw(start + n, K, H)
        case.pages_in(seq, k, v)
        first = int(case.batch.query_starts[seq])
        for i in range(n):
            at = start + i
            seen = slice(max(0, at - window + 1) if window else 0, at + 1)
            for head in range(N):
                group = head // (N // K)
                s = k[seen, group].astype(np.float64) @ q[first + i, head].astype(np.float64) * c.attention_scale
                p = np.exp(s - s.max())
                right[first + i, head] = p / p.sum() @ v[seen, group].astype(np.float64)
    out = case.tensor(q)
    torch.ops.tandem.attend(case.step, case.layers, *pools(case), out, 0)
    case.expect_near(out, right)


def test_the_greatest_of_huge_scores_is_all_that_is_seen(case: Case) -> None:
    """As of small ones: less their maximum they are 0 and far below, however coarsely numbers of their size are rounded."""
    c, T = case.config, case.batch.num_tokens
    N, K, H, window = c.num_heads, c.num_kv_heads, c.head_dim, c.layer_window[0]
    q = (case.rng.standard_normal((T, N, H)) * 1e12).astype(case.draw(1).dtype)
    right, clear = np.zeros((T, N, H)), np.zeros((T, N), bool)
    for seq, (start, n) in enumerate(case.plan):
        k, v = case.draw(start + n, K, H), case.draw(start + n, K, H)
        case.pages_in(seq, k, v)
        first = int(case.batch.query_starts[seq])
        for i in range(n):
            seen = slice(max(0, start + i - window + 1) if window else 0, start + i + 1)
            for head in range(N):
                group = head // (N // K)
                s = k[seen, group].astype(np.float64) @ q[first + i, head].astype(np.float64)
                order = np.sort(s)
                clear[first + i, head] = len(s) == 1 or order[-1] - order[-2] > 1e-4 * np.abs(s).max()
                right[first + i, head] = v[seen, group][s.argmax()]
    out = case.tensor(q)
    torch.ops.tandem.attend(case.step, case.layers, *pools(case), out, 0)
    got = out.float().numpy().reshape(T, N, H)
    assert clear.mean() > 0.9
    case.expect_near(got[clear], right[clear])


def test_scores_may_be_as_low_as_float32_can_tell(case: Case) -> None:
    """A key is hidden by its position: no score hides it."""
    c, T = case.config, case.batch.num_tokens
    q = np.full((T, c.num_heads, c.head_dim), 1e17).astype(case.draw(1).dtype)
    for seq, (start, n) in enumerate(case.plan):
        ones = np.ones((start + n, c.num_kv_heads, c.head_dim)).astype(q.dtype)
        case.pages_in(seq, -q[0, 0, 0] * ones, ones)
    out = case.tensor(q)
    torch.ops.tandem.attend(case.step, case.layers, *pools(case), out, 0)
    case.expect_near(out, np.ones((T, c.num_heads, c.head_dim)))


def test_combine_is_two_branches_on_the_residual_stream(case: Case) -> None:
    c, T = case.config, case.batch.num_tokens
    attended = case.draw(T, c.num_heads, c.head_dim)
    x = case.rng.standard_normal((T, c.hidden_size)).astype(np.float32)
    branch = case.linear("self_attn.o_proj", attended.reshape(T, -1).astype(np.float64), c.output_bias)
    right = x.astype(np.float64) + (case.norm("post_attention_layernorm", branch) if c.sandwich_norms else branch)
    before = "pre_feedforward_layernorm" if c.sandwich_norms else "post_attention_layernorm"
    gate, up = (case.linear(f"mlp.{name}_proj", case.norm(before, right), c.mlp_bias) for name in ("gate", "up"))
    if c.activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    branch = case.linear("mlp.down_proj", gate * up, c.mlp_bias)
    right = right + (case.norm("post_feedforward_layernorm", branch) if c.sandwich_norms else branch)
    out = torch.from_numpy(x)
    torch.ops.tandem.combine(case.step, case.layers, case.tensor(attended), out, 0)
    case.expect_near(out, right)


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_norm_and_matmul_and_embed_gives_rows(case: Case, tied: bool) -> None:
    case.checkpoint = RandomCheckpoint({**SHAPES[0], "tie_embeddings": tied, "embedding_scale": 3.3}, 0, 5)
    c, T = case.checkpoint.config, case.batch.num_tokens
    head = torch.from_numpy(pack_head(case.checkpoint, case.dtype))
    rounded = lambda name: case.checkpoint[name].dense().astype(DTYPES[case.dtype])  # noqa: E731
    x = case.rng.standard_normal((T, c.hidden_size)).astype(np.float32)
    wanted = x[case.batch.logit_rows].astype(np.float64)
    normed = wanted / np.sqrt((wanted * wanted).mean(-1, keepdims=True) + c.norm_eps)
    normed = normed * case.checkpoint["model.norm.weight"].dense().astype(np.float64)
    logits = torch.empty((len(wanted), c.vocab_size))
    torch.ops.tandem.head(case.step, head, torch.from_numpy(x), logits)
    right = normed @ rounded("model.embed_tokens.weight" if tied else "lm_head.weight").astype(np.float64).T
    case.expect_near(logits, right)
    out = torch.empty((T, c.hidden_size))
    torch.ops.tandem.embed(case.step, head, torch.zeros(64, dtype=torch.int32), out)
    table, scale = rounded("model.embed_tokens.weight"), np.asarray(3.3, DTYPES[case.dtype])
    exact = (table[case.batch.token_ids].astype(np.float32) * scale.astype(np.float32)).astype(table.dtype)
    assert np.array_equal(out.numpy(), exact.astype(np.float32))


@pytest.mark.parametrize("sandwich_norms", [False, True])
def test_the_sums_of_a_large_step_are_those_of_a_small_one(sandwich_norms: bool) -> None:
    """Of which the large one's go in pieces."""
    D, rng = 2304, np.random.default_rng(0)
    shape = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "hidden_size": D, "intermediate_size": 64}
    checkpoint: Any = RandomCheckpoint(shape | {"sandwich_norms": sandwich_norms}, 0, 3)
    config, kernels = checkpoint.config, part("torch", "kernels")
    kernels.open_library()
    weights = torch.from_numpy(pack_layers(checkpoint, "float32"))
    ropes = torch.from_numpy(np.concatenate(rope_tables(config.ropes[0], config.head_dim, POSITIONS), 1)[None])
    ids, x = rng.integers(0, 77, 240).tolist(), rng.standard_normal((240, D)).astype(np.float32)

    def run(tokens: int) -> list[np.ndarray]:
        packer = Packer(32, 16, max_len=POSITIONS)
        step = torch.from_numpy(pack_step(packer.step([(packer.add(ids[:tokens]), 0, tokens)])))
        streams = [torch.from_numpy(x[:tokens].copy()) for _ in range(2)]

        def rank(exchange: SharedMemoryGroup, stream: torch.Tensor, rank: int) -> None:
            (k,), (v,) = kernels.make_cache(config, 32, 16, "float32")
            memory = torch.from_numpy(exchange.memory)
            assert torch.ops.tandem.layers_in_terms(step, weights, ropes, k, v, stream, memory, rank, 2) == 0

        with meeting_place(2) as place:
            exchanges = [SharedMemoryGroup(place, rank, 2) for rank in range(2)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(rank, exchanges, streams, range(2)))
        assert [exchange.told.bytes for exchange in exchanges] == [2 * tokens * D * 4] * 2
        return [stream.numpy() for stream in streams]

    large, small = run(240), run(24)
    assert np.array_equal(large[0], large[1]) and np.array_equal(large[0][:24], small[0])
    assert np.isfinite(large[0]).all() and (large[0] != x).mean() > 0.9


def test_best_is_the_first_of_the_highest_and_sees_what_is_not_finite() -> None:
    part("torch", "kernels").open_library()
    rng = np.random.default_rng(0)
    logits = rng.integers(-40, 0, (9, 300)).astype(np.float32)  # many are equal
    logits[3, 200], logits[4, 77], logits[5, 299] = np.nan, -np.inf, np.inf
    for real in (1, 64, 65, 299, 300):
        best = torch.empty((9, 3), dtype=torch.int32)
        torch.ops.tandem.best(torch.from_numpy(logits), real, best)
        seen = logits[:, :real]
        assert best[:, 2].tolist() == np.isfinite(seen).all(axis=1).tolist()
        numbers = ~np.isnan(seen).any(axis=1)
        assert np.array_equal(best[:, 0].view(torch.float32).numpy()[numbers], seen.max(axis=1)[numbers])
        assert np.array_equal(best[:, 1].numpy()[numbers], seen.argmax(axis=1)[numbers])
    torch.ops.tandem.best(torch.from_numpy(logits), 0, best)
    assert best[:, 0].view(torch.float32).tolist() == [-np.inf] * 9 and best[:, 1:].tolist() == [[0, 1]] * 9
    with pytest.raises(ValueError, match="at most 300 columns, got 301"):
        torch.ops.tandem.best(torch.from_numpy(logits), 301, best)


@pytest.mark.parametrize("wrong", [{"attention_scale": 0.13}, {"window": 17}, {"window": 19}])
def test_the_judge_sees_a_wrong_scale_and_a_mask_off_by_one(wrong: dict[str, Any]) -> None:
    case = Case(SHAPES[0], "bfloat16", 18, 7)
    window = wrong.pop("window", 18)
    case.layers = Case({**SHAPES[0], **wrong}, "bfloat16", window, 7).layers
    with pytest.raises(AssertionError):
        test_attend_is_softmax_over_the_keys_a_query_sees(case)
