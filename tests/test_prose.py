"""The rules of CONTRIBUTING.md for English hold in every file that is not listed as still to be rewritten."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from tests.prose import ROOT, files, findings, prose_of, sentences, words

TO_REWRITE = (
    "common/kernels",
    "common/kv_transfer",
    "common/process",
    "common/replicas",
    "common/serve",
    "experiments",
    "tests",
)
"""Folders whose Python files, and kernel page, still break the rules."""
REWRITTEN = ("common/replicas/README.md", "common/serve/README.md", "experiments/README.md", "experiments/RESULTS.md")
"""Files of those folders that follow the rules."""
MOST_MEAN_WORDS = 16
"""Maximum mean number of words of a sentence of the README."""


def _is_held(path: Path) -> bool:
    name = path.relative_to(ROOT).as_posix()
    return name in REWRITTEN or not name.startswith(tuple(f"{folder}/" for folder in TO_REWRITE))


def test_prose_follows_the_rules() -> None:
    assert [str(finding) for finding in findings(filter(_is_held, files()))] == []


def test_readme_has_short_sentences() -> None:
    counts = [len(words(sentence)) for _, text in prose_of(ROOT / "README.md") for _, sentence in sentences(text)]
    assert mean(counts) <= MOST_MEAN_WORDS


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ('"""Whoever waits gets a page."""', "banned word"),
        ("x = 1  # nobody reads it", "banned word"),
        (f'"""The pool {"very " * 21}often frees pages."""', "26 words"),
        (f"# The pool {'very ' * 10}\n# {'very ' * 11}often frees pages.", "26 words"),
    ],
)
def test_finder_detects_a_planted_defect(tmp_path: Path, source: str, rule: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(source + "\n")
    assert [finding.rule for finding in findings([path])] == [rule]


@pytest.mark.parametrize(
    "source",
    [
        '"""Return `nobody` as it is."""',
        f'"""The pool {"very " * 20}often frees pages."""',
        f'"""The pool {"very " * 12}often frees pages. It {"very " * 12}often allocates pages."""',
        'text = "nobody"',
    ],
)
def test_finder_accepts_code_and_short_sentences(tmp_path: Path, source: str) -> None:
    path = tmp_path / "planted.py"
    path.write_text(source + "\n")
    assert findings([path]) == []
