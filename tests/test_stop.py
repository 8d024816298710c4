"""Stop strings against a judge that sees the whole text after every character."""

from __future__ import annotations

import random

import pytest

from common.text.stop import StopChecker


def feed(stops: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    """All text that comes out, and the stop string that ended it."""
    checker, shown = StopChecker(stops, include), ""
    for piece in pieces:
        text, stop = checker.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + checker.flush(), None


def judge(stops: list[str], text: str, include: bool) -> tuple[str, str | None]:
    """The same from the definition: the shortest prefix of the text that ends in a stop string, ties by list order."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@pytest.mark.parametrize(
    ("pieces", "stops", "include", "expected"),
    [  # vLLM's tests/v1/engine/test_check_stop_strings.py: the earliest completion wins, then the order of the list
        ([" The use", "r is a"], ["a", "is"], False, (" The user ", "is")),
        ([" The use", "r is a"], ["is", "a"], False, (" The user ", "is")),
        ([" The use", "r is a"], ["a", "is"], True, (" The user is", "is")),
        (["abc"], ["abc", "b"], False, ("a", "b")),
        (["abc"], ["bc", "c"], False, ("a", "bc")),
        (["abc"], ["c", "bc"], False, ("ab", "c")),
        (["abc"], ["abc"], True, ("abc", "abc")),
        (["ab", "cd", "e"], ["cd"], False, ("ab", "cd")),
        (["ab", "cd", "e"], ["cd"], True, ("abcd", "cd")),
    ],
)
def test_vllm_s_cases(pieces: list[str], stops: list[str], include: bool, expected: tuple[str, str]) -> None:
    assert feed(stops, pieces, include) == expected


def test_every_text_over_a_small_alphabet_however_it_is_cut() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choices("abc", [4, 4, 1], k=rng.randint(0, 24)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        include = rng.random() < 0.5
        assert feed(stops, pieces, include) == judge(stops, text, include), (stops, pieces)


def test_only_what_could_become_a_stop_string_is_held_back() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        stops = ["".join(rng.choices("ab", k=rng.randint(2, 6))) for _ in range(2)]
        checker, fed, shown = StopChecker(stops), "", ""
        for char in rng.choices("ab", k=20):
            text, stop = checker.push(char)
            fed, shown = fed + char, shown + text
            if stop is not None:
                break
            could_start = (n for n in range(len(fed) + 1) if any(s.startswith(fed[n:]) for s in stops))
            assert shown == fed[: next(could_start)]


def test_a_stop_string_across_many_pieces_and_beyond_the_bmp() -> None:
    assert feed(["🤗終わり"], ["start 🤗", "終", "わ", "り", "rest"]) == ("start ", "🤗終わり")
    assert feed(["🤗終わり"], ["start 🤗終", "わ!"]) == ("start 🤗終わ!", None)


def test_what_is_held_back_comes_out_when_the_text_ends() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert checker.push("answer\n\nUse") == ("answer", None)
    assert checker.flush() == "\n\nUse"
    assert checker.flush() == ""


def test_a_string_that_is_complete_too_early_passes_and_may_be_the_start_of_the_next() -> None:
    checker = StopChecker(["aa"])
    assert checker.push("xaa", may_stop=False) == ("xa", None)
    assert checker.push("a") == ("", "aa")


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert feed([], ["a", "", "b"]) == ("ab", None)
    assert StopChecker([]).push("text") == ("text", None)
