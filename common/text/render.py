"""Render chat templates in a process of its own: a template is code that came with the weights.

A sandbox keeps a template from reaching Python. It does not limit time and memory; only the end of the process does. The
program runs by path, with the CPU seconds of one request as its argument, and needs jinja2 alone. Its first line of output
reports that it is ready. Then it reads one JSON request per line and writes one answer per line.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY = 1 << 30
"""Bytes of address space of this process."""
MAX_OUTPUT = 1 << 22
"""Characters of a rendered conversation."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here its content renders unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def environment() -> jinja2.Environment:
    """Jinja as chat templates are written for it: the settings, filters and functions that `transformers` documents."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what is special in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The rendered text. Raises whatever the template does."""
    pieces, size = [], 0
    for piece in _compiled(template).generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_OUTPUT:
            raise MemoryError(f"more than {MAX_OUTPUT} characters")
    return "".join(pieces)


def answer(line: str) -> dict[str, str]:
    """What to answer to one request: `text`, or `error` and whether the template itself is at fault (`kind`)."""
    request = json.loads(line)
    try:
        return {"text": render(request["template"], request["variables"])}
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "syntax", "error": f"line {error.lineno}: {error.message}"}
    except jinja2.TemplateError as error:
        return {"kind": "refused", "error": error.message or type(error).__name__}
    except Exception as error:
        return {"kind": "failed", "error": f"{type(error).__name__}: {error}"}


def main() -> None:
    seconds = float(sys.argv[1])
    with suppress(ValueError, OSError):  # a lower limit holds already
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    # The kernel ends the process when the timer of its CPU time expires, also within one long operation.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    print("{}", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = json.dumps(answer(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
