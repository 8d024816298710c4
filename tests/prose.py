"""Find prose that breaks the rules of CONTRIBUTING.md: banned words and long sentences in docstrings, comments and Markdown.

`python -m tests.prose FILE ...` prints the findings; without a file, those of all files.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MOST_WORDS = 25
"""Maximum number of words of a sentence."""
BANNED = (
    *("tell", "tells", "told", "telling", "hear", "hears", "heard", "say", "says", "said", "saying", "lend", "lends", "lent"),
    *("who", "whom", "whoever", "nobody", "somebody", "someone", "anybody", "anyone", "everybody", "everyone"),
    *("arraign", "arraigned", "acquit", "acquitted", "guilty", "innocent", "innocents", "court", "heed", "heeds", "heeded"),
    *("keeper", "narrator", "bury", "buried", "deaf", "befall", "befalls", "befell", "bystander", "bystanders"),
)
"""Words of a conversation, a court or a house, and persons as the subject of a sentence about components."""
_BANNED = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)
_CODE = re.compile(r"``[^`]+``|`[^`\n]+`|<[^>\s]+>|https?://\S+|\]\([^)]*\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_SENTENCE = re.compile(r"(?<=[.!?])[\")*`]*\s+(?=[\"(*]*(?:`|[A-Z0-9_\[<]))|\n\s*\n|\n\s*(?=[-*|] |\d+\. )|\n(?=#)")


class Finding(NamedTuple):
    """A broken rule at a line of a file."""

    path: str
    line: int
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.text}"


def prose_of_python(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and text of each docstring and of each block of comments of a Python file."""
    for node in ast.walk(ast.parse(source)):
        for statement in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.lineno, value.value
    block: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"# *(noqa|type:|ruff|fmt|mypy|%%)", token.string):
            whole = not token.line[: token.start[1]].strip()
            if block and not (whole and block[-1][0] + len(block) == token.start[0]):
                yield block[0][0], "\n".join(text for _, text in block)
                block = []
            block.append((block[0][0] if block else token.start[0], token.string.lstrip("#").strip()))
    if block:
        yield block[0][0], "\n".join(text for _, text in block)


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line number and text of each piece of prose in a file. Code blocks of Markdown are left out."""
    source = path.read_text()
    if path.suffix == ".py":
        yield from prose_of_python(source)
    elif path.suffix == ".md":
        yield 1, _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), source)


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield the offset in lines and the text of each sentence. Tables, headings and lists of letters are not sentences."""
    at = 0
    for match in [*_SENTENCE.finditer(text), None]:
        end = match.start() if match else len(text)
        piece = text[at:end]
        if piece.strip() and not piece.lstrip().startswith(("|", "#", "Letters:")):
            yield text[:at].count("\n"), piece
        at = match.end() if match else end


def words(sentence: str) -> list[str]:
    """Return the words of a sentence. A piece of code is one word."""
    return re.findall(r"[^\W_][\w'’./=-]*", _CODE.sub(" code ", sentence))


def findings(paths: Iterable[Path], most_words: int = MOST_WORDS) -> list[Finding]:
    """Return the banned words and the long sentences in the prose of `paths`."""
    found = []
    for path in paths:
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        for line, text in prose_of(path):
            bare = _CODE.sub(lambda code: "\n" * code[0].count("\n"), text)
            for match in _BANNED.finditer(bare):
                found.append(Finding(name, line + bare[: match.start()].count("\n"), "banned word", match[0]))
            for offset, sentence in sentences(text):
                if (count := len(words(sentence))) > most_words:
                    found.append(Finding(name, line + offset, f"{count} words", " ".join(sentence.split())[:100]))
    return found


def files() -> list[Path]:
    """Return the Python and Markdown files of the repository."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split()]


if __name__ == "__main__":
    for finding in findings([Path(name).resolve() for name in sys.argv[1:]] or files()):
        print(finding)
