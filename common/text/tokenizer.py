"""Text to token ids and back, from a `tokenizer.json` or from the metadata of a GGUF file.

The library `tokenizers` encodes. Decoding is done here, token by token to bytes. Bytes concatenate. So a stream of tokens
decodes to the same text as all of them at once, even where they split a character.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from common.errors import CheckpointError, RequestError, nearest_hint
from common.text.library import library_errors
from common.weights.files import MAX_TEMPLATE, MAX_TOKENIZER, read_file, read_json
from common.weights.gguf_parts import read_metadata

MAX_TOKEN_LENGTH = 1024
"""Characters; the ways to cut a token in two are all tried."""
MAX_SPELT = 1 << 18
"""Tokens whose bytes are cached."""
PROBE = "a 1"
"""A tokenizer that fails on this text fails on nearly all texts."""


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory (`tokenizer.json`) or of a `.gguf` file. Raises `CheckpointError`."""
    tokenizer = _from_gguf(path) if path.suffix == ".gguf" else _from_directory(path)
    with library_errors(CheckpointError, f"{path}: its tokenizer fails on the text {PROBE!r}"):
        tokenizer._inner.encode(PROBE)
    return tokenizer


class Tokenizer:
    """A vocabulary of byte-level BPE or of SentencePiece's BPE with byte fallback, its special tokens and its chat template."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        pad_token_id: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._lock = threading.Lock()
        self._plain: tokenizers.Tokenizer | None = None
        self._decoding = _Decoding.of(inner.decoder)
        self._bytes = lru_cache(maxsize=MAX_SPELT)(self._bytes_of)  # each log-probability in an answer asks for its token
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.pad_token_id = pad_token_id
        self.chat_template = chat_template
        self.vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
        """1 + the highest id."""
        self.special_tokens = {t.content: i for i, t in inner.get_added_tokens_decoder().items() if t.special}
        """Control tokens by their text."""
        self.special_ids = frozenset(self.special_tokens.values())
        # A vocabulary of nothing but these: what it makes of a text is where they are. Linear, however many there are.
        self._finder = tokenizers.Tokenizer(models.BPE())
        self._finder.add_special_tokens([AddedToken(text, normalized=False) for text in self.special_tokens])

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """The ids of `text`. `add_special_tokens` adds what the model expects around a text (BOS for most).

        Where the text spells a special token, it becomes that token if `parse_special` holds, and plain text otherwise.
        Raises `RequestError` for text that is not Unicode (lone surrogates), and for text on which this tokenizer fails.
        """
        inner = self._inner if parse_special else self._without_special()
        with _typed(text):
            # A batch of one: unlike `encode`, it releases Python's lock, and it computes no offsets.
            return inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def _without_special(self) -> tokenizers.Tokenizer:
        """Return a copy, made at the first call, to which the text of a special token is plain text.

        The library has a switch for this. A switch would serialize the threads that encode."""
        with self._lock:
            if self._plain is None:
                self._plain = tokenizers.Tokenizer.from_str(self._inner.to_str())
                self._plain.encode_special_tokens = True
            return self._plain

    def starts(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return where in `text` each token of `encode` begins, in characters.

        A token that is added around the text has no place in it, and begins where the token before it ends. A token that
        continues a character begins where the character does.
        """
        with _typed(text):
            (encoding,) = self._inner.encode_batch([text], add_special_tokens=add_special_tokens)
        starts, end = list[int](), 0
        for (first, last), added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            trimmed = text[end:first].isspace()  # some vocabularies leave out a token's own space
            starts.append(end if added or trimmed else first)
            end = end if added else max(last, end)
        return starts

    def bad_words(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The ids of each word as it stands at the start of a text and behind a space, for `Request.bad_words`."""
        spelt = [space + word.strip() for word in words for space in ("", " ")]
        return tuple(dict.fromkeys(tuple(self.encode(text, add_special_tokens=False)) for text in spelt))

    def find_special(self, text: str) -> list[tuple[int, int]]:
        """Where `text` spells special tokens, as (start, end) in order. Raises `RequestError` as `encode` does."""
        with _typed(text):
            return self._finder.encode_batch([text])[0].offsets

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`. Bytes that are not UTF-8 become U+FFFD, one for each longest broken sequence."""
        raw = b"".join(self.token_bytes(i, skip_special_tokens) for i in token_ids)
        return self.strip_first(raw).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """What one token adds to the text: UTF-8, perhaps cut within a character; empty for an id without token."""
        return b"" if skip_special_tokens and token_id in self.special_ids else self._bytes(token_id)

    def _bytes_of(self, token_id: int) -> bytes:
        piece = self._inner.id_to_token(token_id)
        return b"" if piece is None else self._decoding.piece_bytes(piece)

    def strip_first(self, raw: bytes) -> bytes:
        """Without the space that encoding puts before the first word of a text, where it does."""
        return raw.removeprefix(b" ") if self._decoding.strip_first_space else raw

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it."""
        return self._inner.id_to_token(token_id)

    def all_eos(self, of_model: Iterable[int]) -> tuple[int, ...]:
        """What ends a text: the ids that the model's configuration names, then those that only the tokenizer does."""
        return tuple(dict.fromkeys((*of_model, *self.eos_token_ids)))

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise `CheckpointError` unless every id has a row in the model's embedding table. (Rows to spare are legal.)"""
        if self.vocab_size > model_vocab_size:
            raise CheckpointError(
                f"The tokenizer has ids up to {self.vocab_size - 1}, but the model embeds only {model_vocab_size} tokens. "
                "Tokenizer and weights are not of the same model."
            )


@contextmanager
def _typed(text: object) -> Iterator[None]:
    """Raise the errors of the library for a text as `RequestError`."""
    with library_errors(RequestError, "The tokenizer of this model fails on this text"):
        try:
            yield
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(f"A prompt must be Unicode text, got {type(text).__name__}: {error}.") from error


_BYTE_LEVEL = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""The bytes that byte-level BPE spells as themselves, read as Latin-1; the others go on from U+0100 (GPT-2, Radford 2019)."""
_HIDDEN = [byte for byte in range(0x100) if byte not in _BYTE_LEVEL]
_ALPHABET = {chr(byte): byte for byte in _BYTE_LEVEL} | {chr(0x100 + i): byte for i, byte in enumerate(_HIDDEN)}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, kw_only=True)
class _Decoding:
    """How a piece of the vocabulary becomes bytes: the decoder of a `tokenizer.json`, as far as language models use them."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip_first_space: bool = False

    def piece_bytes(self, piece: str) -> bytes:
        if self.byte_level:
            try:
                return bytes(map(_ALPHABET.__getitem__, piece))
            except KeyError:  # an added token, spelt as it is
                return piece.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(match[1])
        for old, new in self.replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    @classmethod
    def of(cls, decoder: decoders.Decoder | None) -> _Decoding:
        if decoder is None:
            raise CheckpointError("This tokenizer has no decoder: it does not say how tokens become text.")
        description: dict[str, Any] = json.loads(decoder.__getstate__())
        steps = description["decoders"] if description["type"] == "Sequence" else [description]
        found: dict[str, Any] = {"replacements": ()}
        for step in steps:
            match step:
                case {"type": "ByteLevel"}:
                    found["byte_level"] = True
                case {"type": "ByteFallback"}:
                    found["byte_fallback"] = True
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    found["replacements"] += ((old, new),)
                case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                    found["strip_first_space"] = True
                case {"type": "Fuse"}:
                    pass
                case _:
                    raise CheckpointError(
                        f"This tokenizer's decoder has a step {step}; known are ByteLevel, ByteFallback, Replace, Fuse and "
                        "Strip, as byte-level BPE and SentencePiece vocabularies use them."
                    )
        return cls(**found)


# ---- A Hugging Face directory ---------------------------------------------------------------------------------------------


def _from_directory(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(
            f"No tokenizer in {folder}: expected a file tokenizer.json. A SentencePiece model must be converted."
        )
    content = read_file(file, MAX_TOKENIZER)
    with library_errors(CheckpointError, f"{file} is not a tokenizer that this library reads"):
        inner = tokenizers.Tokenizer.from_buffer(content)
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.exists() else {}

    def id_of(name: str) -> int | None:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        return inner.token_to_id(text) if isinstance(text, str) else None

    eos = id_of("eos_token")
    return Tokenizer(
        inner,
        bos_token_id=id_of("bos_token"),
        eos_token_ids=() if eos is None else (eos,),
        pad_token_id=id_of("pad_token"),
        chat_template=_directory_template(folder, config),
    )


def _directory_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own wins over the entry in the configuration; of several named ones, `default` is taken."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return read_file(file, MAX_TEMPLATE).decode("utf-8", errors="replace")
    entry = config.get("chat_template")
    for choice in entry if isinstance(entry, list) else [{"name": "default", "template": entry}]:
        match choice:
            case {"name": "default", "template": str(template)}:
                return template
    return None


# ---- A GGUF file ----------------------------------------------------------------------------------------------------------

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
"""Values of `tokenizer.ggml.token_type` (the format's own numbers)."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT_LLAMA3 = _CONTRACTIONS + r"|\p{N}{1,3}" + _REST
_SPLIT_QWEN2 = _CONTRACTIONS + r"|\p{N}" + _REST

_PRE_KINDS = {
    name: kind
    for kind, names in {
        "gpt2": ("gpt-2", "default", "olmo", "mpt", "phi-2"),
        "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell"),
        "llama3": ("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"),
        "qwen2": ("qwen2", "deepseek-r1-qwen", "megrez"),
    }.items()
    for name in names
}
"""`tokenizer.ggml.pre` to how text is split before merging. Each name stands for the pre-tokenizer of one published model."""


def _from_gguf(path: Path) -> Tokenizer:
    metadata = read_metadata(path)

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, tokens = get("model"), get("tokens")
    if kind is None or not isinstance(tokens, list) or not tokens:
        raise CheckpointError(f"{path} holds no tokenizer: tokenizer.ggml.model and tokenizer.ggml.tokens are expected.")
    if kind not in ("gpt2", "llama"):
        known = "gpt2 (byte-level BPE) and llama (SentencePiece)"
        raise CheckpointError(f"{path}: tokenizer kind {kind!r} is not known. Known: {known}.")
    types = get("token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{path}: {len(tokens)} tokens but {len(types)} token types.")
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_LENGTH:
        raise CheckpointError(f"{path}: a token has {longest} characters; at most {MAX_TOKEN_LENGTH} are accepted.")
    named = {name: get(f"{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding", "unknown")}
    for name, i in named.items():
        if i is not None and not (isinstance(i, int) and 0 <= i < len(tokens)):
            raise CheckpointError(f"{path}: tokenizer.ggml.{name}_token_id is {i!r}, but there are {len(tokens)} tokens.")
    pre = get("pre", "default")
    with library_errors(CheckpointError, f"{path}: its tokens and merges do not make a tokenizer"):
        if kind == "gpt2":
            inner = _byte_level(tokens, get("merges"), pre)
        else:
            inner = _sentencepiece(tokens, types, get("scores"), named["unknown"], bool(get("add_space_prefix", True)))

    marked = [
        (t, k)
        for t, k in zip(tokens, types, strict=True)
        if k in (_CONTROL, _USER_DEFINED) and inner.token_to_id(t) is not None
    ]
    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in marked if k == _CONTROL])
    inner.add_tokens([AddedToken(t, normalized=False) for t, k in marked if k == _USER_DEFINED])

    adds_bos = get("add_bos_token", kind == "llama" or _PRE_KINDS.get(pre) == "llama3")
    adds_eos = get("add_eos_token", False)
    inner.post_processor = _surround(tokens, named["bos"] if adds_bos else None, named["eos"] if adds_eos else None)
    return Tokenizer(
        inner,
        bos_token_id=named["bos"],
        eos_token_ids=[i for i in (named["eos"], named["eot"], named["eom"]) if i is not None],
        pad_token_id=named["padding"],
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _byte_level(tokens: Sequence[str], merges: Sequence[str] | None, pre: str) -> tokenizers.Tokenizer:
    """Byte-level BPE: merges in their order, after a split of the text that differs from model to model."""
    if pre not in _PRE_KINDS:
        hint = nearest_hint(pre, _PRE_KINDS)
        raise CheckpointError(f"Pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not known.{hint} Known: {', '.join(_PRE_KINDS)}.")
    if merges is None:
        raise CheckpointError("A byte-level BPE tokenizer needs tokenizer.ggml.merges.")
    split = _PRE_KINDS[pre]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    # Llama 3 takes a whole word that is in the vocabulary even where the merges lead elsewhere.
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split == "llama3"))
    match split:
        case "gpt2":
            inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        case "digits":
            inner.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        case "llama3" | "qwen2":
            pattern = Regex(_SPLIT_LLAMA3 if split == "llama3" else _SPLIT_QWEN2)
            inner.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(pattern, behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
    if split == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float] | None, unknown: int | None, add_prefix: bool
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE (Kudo & Richardson 2018): spaces are ▁, and any two neighbours that make a token may merge.

    SentencePiece merges the pair whose token has the highest score. The `tokenizers` library wants a list of pairs in order:
    all ways to cut each token in two, best token first. Runs of spaces are stored as spaces; they are respelt and merge like
    other tokens, and their scores have no meaning. So the order of the file, which places them too, is used unless it
    contradicts the scores of normal tokens.
    """
    pieces = [t.replace(" ", "▁") for t in tokens]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    normal = [s for s, k in zip(scores or (), types, strict=False) if k == 1]
    if not scores or all(a >= b for a, b in pairwise(normal)):
        order: Iterable[int] = range(len(pieces))
    else:
        order = sorted(range(len(pieces)), key=lambda i: -scores[i])
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            list(_merges((pieces[i] for i in order if types[i] not in (_CONTROL, _BYTE)), vocabulary)),
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if add_prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_prefix else steps)
    return inner


def _merges(pieces: Iterable[str], vocabulary: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    """Every way to make each piece of two others; of one piece, those with the longer left part first."""
    for piece in pieces:
        for cut in range(len(piece) - 1, 0, -1):
            left = piece[:cut]
            if left in vocabulary:
                right = piece[cut:]
                if right in vocabulary:
                    yield left, right


def _surround(tokens: Sequence[str], bos: int | None, eos: int | None) -> processors.TemplateProcessing:
    before = [] if bos is None else [tokens[bos]]
    after = [] if eos is None else [tokens[eos]]
    named = [(tokens[i], i) for i in (bos, eos) if i is not None]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *after, *before, "$B", *after], special_tokens=named
    )
