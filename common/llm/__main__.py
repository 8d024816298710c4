"""Generate text on the command line: `python -m common.llm --backend torch "Once upon a time"`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from common.errors import RequestError, TandemError
from common.llm import LLM
from common.options import add_engine_options, add_model_options, engine_options, flag, parse
from common.process.exits import FAILURE, INTERRUPTED, USER_ERROR, printing, replace_unprintable
from common.request import SamplingParams, expect

_SAMPLING = {
    "max_tokens": (int, "output tokens at most"),
    "temperature": (float, "0 takes the likeliest token each time"),
    "top_k": (int, "keep the k likeliest tokens"),
    "top_p": (float, "keep the likeliest tokens that reach this probability together"),
    "min_p": (float, "keep tokens at least this many times as likely as the likeliest"),
    "min_tokens": (int, "output tokens before one may end the text"),
    "presence_penalty": (float, "taken off the logit of a token that came up"),
    "frequency_penalty": (float, "taken off it each time"),
    "repetition_penalty": (float, "above 1, tokens of prompt and output become less likely"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m common.llm",
        description="Continue a prompt, or answer it with --chat. The text comes out as it is made.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prompt", help="the text to continue, or with --chat the user's message; - reads standard input")
    add_model_options(parser, "jax or torch")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    parser.add_argument("--system", help="a system message for --chat")
    parser.add_argument("--verbose", action="store_true", help="log what is chosen and why")
    sampling = parser.add_argument_group("sampling")
    for name, (kind, text) in _SAMPLING.items():
        default = 128 if name == "max_tokens" else getattr(SamplingParams, name)
        sampling.add_argument(flag(name), type=kind, default=default, help=text)
    sampling.add_argument("--stop", action="append", default=[], help="end where this text appears; may be given repeatedly")
    add_engine_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Stream text to standard output. Returns the exit code: 2 for a mistake of the caller, 1 for a request that failed."""
    replace_unprintable()
    try:
        options = parse(_parser(), sys.argv[1:] if arguments is None else arguments)
        logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s")
        params = SamplingParams(stop=options.stop, **{name: getattr(options, name) for name in _SAMPLING})
        expect(bool(sys.stdout), "Standard output is closed, so that there is nowhere to write the text.")
        prompt: Any = _standard_input() if options.prompt == "-" else options.prompt
        with LLM(options.model, backend=options.backend, **engine_options(options)) as llm:
            if options.chat:
                system = [{"role": "system", "content": options.system}] if options.system is not None else []
                prompt = llm.chat_prompt([*system, {"role": "user", "content": prompt}])
            for delta in llm.stream(prompt, params):
                with printing():
                    print(delta.text, end="", flush=True)
        with printing():
            print(flush=True)
    except TandemError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    if delta.error is not None:
        print(f"error: {delta.error}", file=sys.stderr)
        return FAILURE
    return 0


def _standard_input() -> str:
    expect(bool(sys.stdin), "The prompt - reads standard input, which is closed.")
    try:
        return sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"Standard input cannot be read as text: {error}.") from error


if __name__ == "__main__":
    sys.exit(main())
