"""Streams of tokens against the decoding of all of them at once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from common.text.detokenizer import IncrementalDetokenizer
from common.text.tokenizer import Tokenizer, open_tokenizer
from common.weights.zoo import resolve

REPLACEMENT = "\ufffd"


def pieces(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True) -> list[str]:
    """What each token adds, and last what the end adds."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def sentencepiece_like() -> Tokenizer:
    """Words, special tokens and all byte tokens of a vocabulary that drops the space before the first word (Llama 2's kind)."""
    tokens = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁Hello", "▁world", "▁", "x", "é"]
    inner = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(inner)


@pytest.fixture(scope="module", params=["smollm2-135m", "sentencepiece-like", "tiny-llama"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return sentencepiece_like() if request.param == "sentencepiece-like" else open_tokenizer(resolve(request.param))


def test_every_id_of_the_vocabulary_in_random_order_streams_to_its_decoding(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    ids = list(range(tokenizer.vocab_size)) * (1 + 2000 // tokenizer.vocab_size)
    for skip in (True, False):
        rng.shuffle(ids)
        assert "".join(pieces(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip)


def test_random_short_streams_equal_their_decoding_and_never_show_half_a_character(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    broken = [i for i in range(tokenizer.vocab_size) if not is_text(tokenizer.token_bytes(i))]
    for _ in range(2000):
        ids = [
            rng.choice(broken) if rng.random() < 0.7 else rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 9))
        ]
        parts = pieces(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids)
        for n in range(len(ids)):
            shown, whole = "".join(parts[: n + 1]), tokenizer.decode(ids[: n + 1])
            assert whole.startswith(shown), "what is shown stays"
            # Half a character shows as one replacement if the text ends there; half a lone surrogate, never valid, as two.
            assert len(whole) - len(shown) <= 2, "more than one incomplete character is held back"


def is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("name", ["smollm2-135m", "sentencepiece-like"])
def test_text_of_many_scripts_streams_without_replacement_characters(name: str) -> None:
    tokenizer = sentencepiece_like() if name == "sentencepiece-like" else open_tokenizer(resolve(name))
    text = "Hello world é 你好，世界 👩‍👩‍👧‍👦🇫🇷 नमस्ते 𒐫\U0010ffff\n"
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text
    assert not any(REPLACEMENT in part for part in parts)
    assert parts[-1] == ""


def test_bytes_that_never_become_a_character_are_not_held_back() -> None:
    tokenizer = sentencepiece_like()
    stray, lead, follow = (tokenizer._inner.token_to_id(f"<0x{b:02X}>") for b in (0x80, 0xF0, 0x9F))
    assert pieces(tokenizer, [stray] * 1000) == [REPLACEMENT] * 1000 + [""]
    assert pieces(tokenizer, [lead, lead, follow, lead]) == ["", REPLACEMENT, "", REPLACEMENT, REPLACEMENT]
    word = tokenizer._inner.token_to_id("x")
    assert pieces(tokenizer, [lead, follow, word]) == ["", "", REPLACEMENT + "x", ""]


def test_an_incomplete_character_at_the_end_comes_out_with_the_end() -> None:
    tokenizer = open_tokenizer(resolve("smollm2-135m"))
    ids = tokenizer.encode("🤗")
    assert len(ids) > 1
    assert pieces(tokenizer, ids[:-1])[-1] == REPLACEMENT
    assert pieces(tokenizer, ids)[-2:] == ["🤗", ""]


def test_a_special_token_within_a_character_does_not_break_it_when_skipped() -> None:
    tokenizer = open_tokenizer(resolve("smollm2-135m"))
    *first, last = tokenizer.encode("🤗")
    assert "".join(pieces(tokenizer, [*first, 2, last])) == "🤗"
    assert "".join(pieces(tokenizer, [*first, 2, last], skip=False)) == f"{REPLACEMENT}<|im_end|>{REPLACEMENT}"


@pytest.mark.parametrize(
    ("prompt", "skip", "expected"),
    [
        ([], True, "Hello world"),
        (["<s>"], True, "Hello world"),
        (["<s>"], False, " Hello world"),
        (["x"], True, " Hello world"),
        (["<s>", "▁world"], True, " Hello world"),
    ],
)
def test_the_first_space_is_dropped_only_where_the_output_begins_the_text(prompt: list[str], skip: bool, expected: str) -> None:
    tokenizer = sentencepiece_like()
    prompt_ids = [tokenizer._inner.token_to_id(t) for t in prompt]
    ids = [tokenizer._inner.token_to_id(t) for t in ("▁Hello", "▁world")]
    assert "".join(pieces(tokenizer, ids, prompt_ids, skip)) == expected
    whole = tokenizer.decode([*prompt_ids, *ids], skip)
    assert whole == tokenizer.decode(prompt_ids, skip) + expected


def test_the_libraries_own_decoding_is_the_same_for_all_text_that_is_utf8() -> None:
    """Its ByteFallback turns a whole run of byte tokens into replacements if any of it is broken; ours keeps what is whole."""
    tokenizer = sentencepiece_like()
    rng = random.Random(2)
    for _ in range(500):
        text = "".join(rng.choice(["Hello", "é", "世", "🤗", " ", "x"]) for _ in range(8))
        ids = tokenizer.encode(text)
        assert "".join(pieces(tokenizer, ids)) == tokenizer._inner.decode(ids) == text
    ids = [tokenizer._inner.token_to_id(f"<0x{b:02X}>") for b in (0xC3, 0xA9, 0xFF)]
    assert tokenizer._inner.decode(ids) == REPLACEMENT * 3
    assert tokenizer.decode(ids) == "é" + REPLACEMENT


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    """Counted, not timed: each push looks at one token."""
    looked_at: list[int] = []

    class Counting(Tokenizer):
        def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
            looked_at.append(token_id)
            return super().token_bytes(token_id, skip_special_tokens)

    tokenizer = Counting(sentencepiece_like()._inner)
    assert "".join(pieces(tokenizer, [260] * 500)) == tokenizer.decode([260] * 500)
    assert len(looked_at) == 1000  # 500 pushed, 500 in the judge
