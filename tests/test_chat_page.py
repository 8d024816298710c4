"""The page to chat with, in a real headless browser: what it says when something is wrong, and what it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from common.serve.app import PAGE
from tests import browser
from tests.browser import Tab
from tests.http_server import Served, history, serving, until

PHONE, DESK = 390, 1000
TROUBLE = "$('trouble').hidden ? '' : $('trouble').textContent"
FACTS = "document.querySelector('.assistant:last-child small').textContent"
TALK = "[...talks.values()][0].messages"


@contextmanager
def started(folder: Path, *options: str, names: tuple[str, ...] = ("history",)) -> Iterator[tuple[Served, Path]]:
    packages, control = history(folder, *names)
    with serving(folder, "--backend", ",".join(names), "--max-model-len", "512", *options, packages=[packages]) as served:
        yield served, control


def browse(do: Callable[[Tab], Any], url: str, width: int = DESK, dark: bool = False) -> Any:
    """What `do` finds on the page."""
    return browser.browse(lambda found: do(Tab(found, url, width, dark)))


def ask(tab: Tab, question: str, most: int = 20) -> None:
    tab.evaluate(f"$('prompt').value = '{question}'; $('max').value = {most}; send(); 0")


def wait(tab: Tab, condition: str) -> None:
    until(lambda: tab.evaluate(condition))


def test_without_the_right_key_it_says_so_and_keeps_what_was_written(tmp_path: Path) -> None:
    def look(tab: Tab) -> None:
        wait(tab, "!$('locked').hidden")
        assert "asks for a key" in tab.evaluate(TROUBLE)
        ask(tab, "Hello")
        tab.evaluate("$('key').value = 'wrong'; loadModels(); 0")
        wait(tab, f"({TROUBLE}).includes('not the key')")
        ask(tab, "Hello")
        wait(tab, f"({TROUBLE}).includes('not the key')")
        assert tab.evaluate("[$('prompt').value, document.querySelectorAll('article').length]") == ["Hello", 0]
        tab.evaluate("$('key').value = 'secret'; send(); 0")
        wait(tab, "document.querySelector('.assistant')?.textContent.includes('20 tokens') && !running")
        assert tab.evaluate(f"[{TROUBLE}, $('prompt').value]") == ["", ""]
        tab.evaluate("$('key').value = 'wrong again'; 0")  # with a model chosen already
        ask(tab, "Still there?")
        wait(tab, "$('prompt').value == 'Still there?'")
        assert "not the one" in tab.evaluate("document.querySelector('.error:last-child').textContent")

    with started(tmp_path, "--api-key", "secret") as (served, _):
        browse(look, served.url)


def test_what_was_stopped_stays_in_the_talk_and_what_was_cut_says_so(tmp_path: Path) -> None:
    def look(tab: Tab) -> None:
        wait(tab, "shown().length")
        ask(tab, "A long one", most=400)
        wait(tab, f"({FACTS}).includes('5 tokens')")
        tab.evaluate("$('stop').click(); 0")
        wait(tab, "!running")
        assert "stopped" in tab.evaluate(FACTS) and "cut" not in tab.evaluate(FACTS)
        roles, content, seen = tab.evaluate(
            f"[{TALK}.map(m => m.role), {TALK}[1].content, document.querySelector('.assistant .text').textContent]"
        )
        assert roles == ["user", "assistant"] and "".join(content.split()) == "".join(seen.split()) != ""
        ask(tab, "And now?")
        wait(tab, "!running")
        assert tab.evaluate(f"{TALK}.length") == 4
        tab.evaluate("$('clear').click(); 0")  # the time of the stop decides the history, and with it where an answer ends
        ask(tab, "Hello")
        wait(tab, "!running")
        assert "20 tokens" in tab.evaluate(FACTS) and "cut" in tab.evaluate(FACTS)

    with started(tmp_path) as (served, control):
        (control / "slow").touch()
        browse(look, served.url)


def test_an_empty_limit_is_no_limit(tmp_path: Path) -> None:
    def look(tab: Tab) -> None:
        wait(tab, "shown().length")
        tab.evaluate("$('prompt').value = 'Go on'; $('max').value = ''; send(); 0")
        wait(tab, "!running")
        tokens = int(tab.evaluate(FACTS).split()[0])
        assert tokens > 100  # it ends by itself

    with started(tmp_path) as (served, _):
        browse(look, served.url)


@pytest.mark.parametrize("dark", [False, True])
def test_an_error_is_red_and_is_no_statistic(tmp_path: Path, dark: bool) -> None:
    def look(tab: Tab) -> None:
        wait(tab, "shown().length")
        ask(tab, "Fail")
        wait(tab, "document.querySelector('.assistant .error') && !running")
        red, green, blue = tab.evaluate(
            "getComputedStyle(document.querySelector('.assistant .error')).color.match(/\\d+/g).slice(0, 3).map(Number)"
        )
        assert red > max(green, blue) + 80
        assert tab.evaluate("document.querySelector('.assistant small').textContent") == ""
        assert tab.evaluate("$('prompt').value") == "Fail"

    with started(tmp_path) as (served, control):
        (control / "fail").touch()
        browse(look, served.url, dark=dark)


def test_on_a_phone_each_answer_stands_below_the_name_of_its_engine(tmp_path: Path) -> None:
    tops = """[...document.querySelectorAll("section")].map(section => {
      section.scrollTop = section.scrollHeight;
      const box = section.getBoundingClientRect(), title = section.querySelector("h2").getBoundingClientRect();
      return [section.scrollTop > 0, title.top - box.top, box.height, document.documentElement.scrollHeight];
    })"""

    def look(tab: Tab) -> Any:
        wait(tab, "shown().length")
        for _ in range(5):
            ask(tab, "Another one", most=60)
            wait(tab, "!running")
        return tab.evaluate(tops)

    with started(tmp_path, names=("one", "two")) as (served, _):
        seen = browse(look, served.url, PHONE)
    assert len(seen) == 2
    for scrolled, above, height, page in seen:
        assert scrolled and 0 <= above < 2 and height > 200 and page <= 844


MARKDOWN = """# Title
Some **bold** and *soft* `a<b>` text, <script>window.hit = 1</script> <img src=x onerror="window.hit = 1">

**bold with *soft* inside**, *soft with **bold** inside*, **at the *end***, ***both***, 2 * 3 * 4, **open *and `**`

- one
  - inner [good](https://example.org/a)
- [bad](javascript:window.hit=1)

3. three

| a | b |
|---|---|
| 1 | **2** |

> said

```python
x = "**no**"
```
"""


def test_markdown_of_an_answer_becomes_nodes_and_its_scripts_stay_text() -> None:
    """At every length, as in a stream: the page is opened as a file, without a server."""
    script = f"""(() => {{
      const place = document.createElement("div"), text = {json.dumps(MARKDOWN)};
      document.body.append(place);
      for (let end = 1; end <= text.length; end++) render(place, text.slice(0, end));
      const whole = document.createElement("div");
      render(whole, text);
      const kept = place.firstChild;
      render(place, text + "\\nmore");
      const links = [...place.querySelectorAll("a")].map(a => [a.href, a.rel]);
      return [whole.innerHTML, place.querySelectorAll("script, img").length, window.hit ?? 0, links, kept === place.firstChild];
    }})()"""
    html, injected, hit, links, kept = browse(lambda tab: tab.evaluate(script), PAGE.as_uri())
    assert (injected, hit, kept) == (0, 0, True)
    assert links == [["https://example.org/a", "noopener noreferrer"]]
    for part in (
        "<h3>Title</h3>",
        "<strong>bold</strong> and <em>soft</em> <code>a&lt;b&gt;</code>",
        "<p><strong>bold with <em>soft</em> inside</strong>, <em>soft with <strong>bold</strong> inside</em>, "
        "<strong>at the <em>end</em></strong>, <strong><em>both</em></strong>, 2 * 3 * 4, **open *and <code>**</code></p>",
        "&lt;script&gt;window.hit = 1&lt;/script&gt;",
        "<li>one<ul><li>inner <a ",
        "<li>[bad](javascript:window.hit=1)</li></ul>",
        '<ol start="3"><li>three</li></ol>',
        "<th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><strong>2</strong></td>",
        "<blockquote><p>said</p></blockquote>",
        '<pre><code>x = "**no**"</code></pre>',
    ):
        assert part in html, (part, html)
