"""Tool calls in the output of a model, in the formats that model families are trained on.

`hermes` (Hermes, Qwen): `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, anywhere in the text.
`llama3_json` (Llama 3): the whole output is `{"name": …, "parameters": {…}}`, several separated by `;`.
`mistral` (Mistral): `[TOOL_CALLS]` and a list of `{"name": …, "arguments": {…}}`, or `name{…}` for each call.
`pythonic` (Llama 3.2, Llama 4): the whole output is `[name(key=value, …), …]` with Python literals.
"""

from __future__ import annotations

import ast
import json
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_PYTHONIC = 1 << 16
"""Characters of an output that is read as Python. Longer output is plain text."""
_BEFORE_CALL = re.compile(r"(\[TOOL_CALLS\]|[\[\],;\s])*(?P<name>[\w.-]*)\s*(\[CALL_ID\]\w*)?(\[ARGS\])?\s*")
"""The text of a region before the object of a call: separators, and in Mistral's format perhaps the name."""
_AFTER_CALLS = re.compile(r"[\[\],;\s]*")
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls."""

    name: str
    begin: tuple[str, ...]
    """Texts that begin a region of calls."""
    end: str = ""
    """The text that ends a region; empty where the output ends it."""
    anywhere: bool = True
    """Whether a region may begin after plain text. Otherwise the whole output is a region, or none is."""
    keeps_begin: bool = False
    """Whether `begin` is the first character of the calls."""
    special: str = ""
    """A special token of the vocabulary that the format needs in the text."""


HERMES = ToolFormat("hermes", ("<tool_call>",), "</tool_call>")
LLAMA3_JSON = ToolFormat("llama3_json", ("<|python_tag|>", "{"), anywhere=False, keeps_begin=True, special="<|python_tag|>")
MISTRAL = ToolFormat("mistral", ("[TOOL_CALLS]",), special="[TOOL_CALLS]")
PYTHONIC = ToolFormat("pythonic", ("[",), anywhere=False, keeps_begin=True)
FORMATS = {each.name: each for each in (HERMES, LLAMA3_JSON, MISTRAL, PYTHONIC)}


def format_of_template(template: str | None) -> ToolFormat:
    """Return the format that a chat template teaches. `HERMES` for a template that names no format."""
    text = template or ""
    if "[TOOL_CALLS]" in text:
        return MISTRAL
    if "<tool_call>" not in text and ("<|python_tag|>" in text or '"parameters": dictionary' in text):
        return LLAMA3_JSON
    return HERMES


class ToolCalls:
    """Follows the text of one output and separates the calls from the plain text.

    With `eager`, a call comes out in parts while it is written, as streams need it: first its name, then its arguments.
    Without, each call comes out whole, and a region that holds anything else is plain text.
    """

    def __init__(self, form: ToolFormat = HERMES, *, eager: bool = False, most: int | None = None) -> None:
        """`most`: the number of calls that come out; further ones are dropped. None: all."""
        self.form, self._eager, self._most = form, eager, most
        self.count = 0
        """Calls that came out, at least in part."""
        self._held = ""  # text that may begin a region, or a region's last characters that may begin `end`
        self._region: _Region | None = None
        self._plain = False  # no region can begin any more

    def push(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Return the plain text and the parts of calls that `text` completes; `last` for the end of the output.

        A part is a `tool_calls` entry of OpenAI's stream: `index` and `function`, with `id`, `type` and the name in the first
        part of a call.
        """
        text, plain, parts = self._held + text, "", list[dict[str, Any]]()
        self._held = ""
        while True:
            if self._region is None:
                before, begin, text = self._find_region(text, last)
                plain += before
                if not begin:
                    self._held = text
                    return plain, parts
                self._region = _Region(self.form, begin)
                continue
            inner, ended, text = self._to_end(text, last)
            self._region.text += inner
            parts += self._take(self._region.feed(inner) if self._eager else [])
            if not ended:
                self._held = text
                return plain, parts
            region, self._region = self._region, None
            if self._eager and region.emitted:
                continue
            calls = region.calls()
            if calls is None:
                plain += region.begin + region.text + (self.form.end if not last or ended == "end" else "")
                self._plain = not self.form.anywhere
            parts += self._take(calls or [])
            if last and not text:
                return plain, parts

    def _take(self, found: Iterable[tuple[str | None, str]]) -> list[dict[str, Any]]:
        """Return the parts of calls as OpenAI's stream has them."""
        parts = []
        for name, arguments in found:
            self.count += name is not None
            if self._most is not None and self.count > self._most:
                continue
            part: dict[str, Any] = {"index": self.count - 1, "function": {"arguments": arguments}}
            if name is not None:
                part = {"index": self.count - 1, "id": f"call-{uuid.uuid4().hex}", "type": "function"}
                part["function"] = {"name": name, "arguments": arguments}
            parts.append(part)
        return parts

    def _find_region(self, text: str, last: bool) -> tuple[str, str, str]:
        """Return (plain text, the text that begins a region, the rest). Without a region the rest may begin one."""
        if self._plain:
            return text, "", ""
        if not self.form.anywhere:
            start = text.lstrip()
            for begin in self.form.begin:
                if start.startswith(begin):
                    return "", begin, start[len(begin) :]
            if not last and any(begin.startswith(start) for begin in self.form.begin):
                return "", "", text
            self._plain = True
            return text, "", ""
        (begin,) = self.form.begin
        before, found, rest = text.partition(begin)
        if found:
            return before, begin, rest
        keep = 0 if last else _overlap(text, begin)
        return text[: len(text) - keep], "", text[len(text) - keep :]

    def _to_end(self, text: str, last: bool) -> tuple[str, str, str]:
        """Return (text of the region, why it ended or "", the rest)."""
        end = self.form.end
        if end:
            inner, found, rest = text.partition(end)
            if found:
                return inner, "end", rest
        keep = 0 if last or not end else _overlap(text, end)
        return text[: len(text) - keep], "last" if last else "", text[len(text) - keep :]


class _Region:
    """One region of calls."""

    def __init__(self, form: ToolFormat, begin: str) -> None:
        self.form, self.begin = form, begin
        self.text = ""
        self.emitted = self.failed = False
        self._scanner: CallScanner | None = None
        self._before = begin if form.keeps_begin and len(begin) == 1 else ""  # text that no call has taken
        self._name: str | None = None  # of the call that is being read, where it stands before the object
        self._sent: int | None = None  # characters of its arguments that came out; None before its name did

    def feed(self, text: str) -> list[tuple[str | None, str]]:
        """Return the parts of calls that `text` completes, as (name, None in a later part; arguments)."""
        found: list[tuple[str | None, str]] = []
        if self.form is PYTHONIC:  # comes out whole
            return found
        text, self._before = self._before + text, ""
        while text and not self.failed:
            if self._scanner is None:
                before, opened, _ = text.partition("{")
                if not opened:
                    self._before = before
                    break
                name = name_before(self.form, before)
                self.failed = name is None
                self._scanner, self._name, self._sent = CallScanner(bare=bool(name)), name, None
                text = text[len(before) :]
            else:
                text = text[self._scanner.feed(text) :]
                found += self._progress(self._scanner)
                self.failed = self._scanner.failed
                if self._scanner.done:
                    self._scanner = None
        return found

    def _progress(self, scanner: CallScanner) -> list[tuple[str | None, str]]:
        name, arguments = self._name or scanner.name, scanner.arguments.rstrip() or ("{}" if scanner.done else "")
        if name is None or not arguments.startswith("{") or len(arguments) == self._sent:
            return []
        part = (None, arguments[self._sent :]) if self._sent is not None else (name, arguments)
        self._sent, self.emitted = len(arguments), True
        return [part]

    def calls(self) -> list[tuple[str, str]] | None:
        """Return the name and the arguments of each call, or None if the region holds anything else."""
        text = (self.begin if self.form.keeps_begin and len(self.begin) == 1 else "") + self.text
        found = _pythonic_calls(text) if self.form is PYTHONIC else list(_json_calls(self.form, text))
        return [(name, arguments) for name, arguments in found] if found and None not in found else None  # type: ignore[misc]


class CallScanner:
    """Follows the JSON object of one call, character by character.

    `bare`: the object is the arguments. Otherwise its members are `name` and `arguments` (or `parameters`).
    """

    def __init__(self, *, bare: bool = False) -> None:
        self.name: str | None = None
        self.arguments = ""
        """As the model wrote them: numbers and escapes may hold more than Python's values can."""
        self.done = self.failed = False
        self._bare = bare
        self._depth = 0
        self._in_string = self._escaped = False
        self._key: str | None = None  # of the member whose value is being read
        self._token = ""  # the key or the name that is being read
        self._value = False  # behind the colon

    def feed(self, text: str) -> int:
        """Read up to the end of the object. Returns how many characters were read."""
        for at, char in enumerate(text):
            self._read(char)
            if self.done or self.failed:
                return at + 1
        return len(text)

    def _read(self, char: str) -> None:
        taken = self._bare or (self._depth >= 1 and self._value and self._key in _ARGUMENTS)
        ends_value = not self._in_string and self._depth == 1 and char in ",}"
        if taken and (self._bare or not ends_value) and (self.arguments or not char.isspace()):
            self.arguments += char
        elif self._depth == 1 and not ends_value and (self._key == "name" or not self._value):
            self._token += char
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
            return
        match char:
            case '"':
                self._in_string = True
            case "{" | "[":
                self._depth += 1
            case ":" if self._depth == 1 and not self._value and not self._bare:
                self._key, self._token, self._value = _string(self._token[:-1]), "", True
            case "," | "}" if self._depth == 1 and not self._bare:
                self._end_member()
                self._depth -= char == "}"
            case "}" | "]":
                self._depth -= 1
        self.done = self._depth == 0
        self.failed = self.failed or (self.done and not self._bare and self.name is None)

    def _end_member(self) -> None:
        if self._key == "name":
            self.name = _string(self._token)
            self.failed = self.name is None
        if self._key in _ARGUMENTS:
            self.arguments = self.arguments.rstrip()
            self.failed = self.failed or not self.arguments.startswith("{")
        self._key, self._token, self._value = None, "", False


def _string(text: str) -> str | None:
    """Return the string that a JSON text is, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def name_before(form: ToolFormat, text: str) -> str | None:
    """Return the name that stands before the object of a call, "" where none does, or None for any other text."""
    found = _BEFORE_CALL.fullmatch(text)
    if found is None or (found["name"] and form is not MISTRAL):
        return None
    return found["name"]


def _json_calls(form: ToolFormat, text: str) -> Iterator[tuple[str, str] | None]:
    """Yield the name and the arguments of every call; None for anything else."""
    while not _AFTER_CALLS.fullmatch(text):
        before, opened, _ = text.partition("{")
        name = name_before(form, before) if opened else None
        if name is None:
            yield None
            return
        scanner = CallScanner(bare=bool(name))
        end = len(before) + scanner.feed(text[len(before) :])
        name, arguments = name or scanner.name or "", scanner.arguments or "{}"
        sound = scanner.done and not scanner.failed and name and _is_object(text[len(before) : end], arguments)
        yield (name, arguments) if sound else None
        text = text[end:]


def _is_object(whole: str, arguments: str) -> bool:
    try:
        json.loads(whole)
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _pythonic_calls(text: str) -> list[tuple[str, str] | None]:
    """Return the calls of a Python list of calls with literal keyword arguments. The text is parsed and never evaluated."""
    if len(text) > MAX_PYTHONIC:
        return [None]
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return [_pythonic_call(each) for each in tree.elts] if isinstance(tree, ast.List) else [None]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return [None]


def _pythonic_call(node: ast.expr) -> tuple[str, str] | None:
    match node:
        case ast.Call(func=ast.Name() | ast.Attribute() as function, args=[], keywords=keywords):
            arguments = {word.arg: ast.literal_eval(word.value) for word in keywords if word.arg is not None}
            if len(arguments) == len(keywords):
                return ast.unparse(function), json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return None


def _overlap(text: str, marker: str) -> int:
    """Return how many characters at the end of `text` may begin `marker`."""
    return next(n for n in range(min(len(marker) - 1, len(text)), -1, -1) if n == 0 or text.endswith(marker[:n]))
