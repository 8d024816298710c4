"""A completions server for tests: it answers with the tokens of the history oracle, in the manner that a request asks for.

`python -m tests.completions_server PORT`. The key `manner` of a body says how to stream, and what to get wrong.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from common.request import Request, SamplingParams
from tests.history_runner import Expected, expected

MODEL = "history"
VOCABULARY = 320
DONE = b"data: [DONE]\n\n"


def answer(body: dict[str, Any]) -> Expected:
    """What is right for a request."""
    params = SamplingParams(temperature=0.0, max_tokens=body["max_tokens"], ignore_eos=True)
    request = Request(request_id="x", prompt_token_ids=body["prompt"], params=params)
    return expected(request, vocab_size=VOCABULARY, max_tokens=1)


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps({"object": "text_completion", "model": MODEL} | fields).encode() + b"\n\n"


def choice(text: str, finish: str | None = None, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish} | fields])


def stream(manner: str, body: dict[str, Any], gate: threading.Semaphore) -> Iterator[bytes]:
    """The events of an answer. Raises `ConnectionError` where the connection is to end in the middle."""
    right = answer(body)
    tokens, count = right.tokens, len(right.tokens)
    wanted = body.get("logprobs")
    if manner == "ids":
        for i, token in enumerate(tokens):
            logprobs = None if wanted is None else vllm_logprobs(right, i, wanted)
            yield choice("x", "length" if i == count - 1 else None, token_ids=[token], logprobs=logprobs)
        yield event(choices=[], usage={"completion_tokens": count})
    elif manner == "bursts":
        for i in range(0, count, 3):
            yield choice("xyz", token_ids=tokens[i : i + 3])
        yield choice("", "length", token_ids=[])
    elif manner == "counted":
        for i in range(0, count, 2):
            seen = min(i + 2, count)
            yield event(choices=[{"index": 0, "text": "xy", "finish_reason": None}], usage={"completion_tokens": seen})
        yield choice("", "length")
    elif manner == "counted at the end":
        for _ in range(0, count, 2):
            yield choice("xy")
        yield choice("", "length")
        yield event(choices=[], usage={"completion_tokens": count})
    elif manner == "text":
        yield b": a comment\r\n\r\n"
        yield choice("")
        for i in range(count):
            yield choice("x", "length" if i == count - 1 else None).replace(b"\n", b"\r\n")
            yield choice("")
    elif manner == "llama":
        for i in range(count):
            yield choice("x", logprobs={"content": [llama_entry(right, i, wanted or 1)]})
        yield choice("", "length")
        yield event(choices=[], usage={"completion_tokens": count})
    elif manner == "gated":
        for i, token in enumerate(tokens):
            gate.acquire()
            yield choice("x", "length" if i == count - 1 else None, token_ids=[token])
    elif manner == "unnamed":
        for _ in range(count):
            yield choice("x", logprobs={"tokens": ["x"], "token_logprobs": [-1.0], "top_logprobs": [{"x": -1.0}]})
        yield choice("", "length")
    elif manner == "strange":
        yield choice("x", token_ids=[VOCABULARY])
    elif manner == "endless":
        while True:
            yield choice("x", token_ids=tokens[:1])
    elif manner == "miscounted":
        yield event(choices=[], usage={"completion_tokens": 1 << 60})
    elif manner == "early":
        yield choice("x", "stop", token_ids=tokens[:1])
    else:
        yield choice("x", token_ids=tokens[:1])
        if manner == "error":
            yield event(error={"message": "the model fell over", "code": 500})
        elif manner == "garbage":
            yield b"data: {not json}\n\n"
        elif manner == "unfinished":
            return
        raise ConnectionError


def vllm_logprobs(right: Expected, i: int, k: int) -> dict[str, Any]:
    told = right.logprobs(i, k, VOCABULARY)
    top = {f"token_id:{token}": value for token, value in zip(told.top_ids, told.top_logprobs, strict=True)}
    return {"tokens": [f"token_id:{right.tokens[i]}"], "token_logprobs": [told.logprob], "top_logprobs": [top]}


def llama_entry(right: Expected, i: int, k: int) -> dict[str, Any]:
    told = right.logprobs(i, k, VOCABULARY)
    top = [{"id": token, "logprob": value} for token, value in zip(told.top_ids, told.top_logprobs, strict=True)]
    return {"id": right.tokens[i], "token": "x", "logprob": told.logprob, "top_logprobs": top}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    gate = threading.Semaphore(0)
    left = 0
    """Clients that left in the middle of an answer."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": MODEL}]})
        elif self.path == "/go":
            Handler.gate.release()
            self.reply(200, {})
        elif self.path == "/left":
            self.reply(200, {"left": Handler.left})
        else:
            self.reply(404, {"error": {"message": f"no {self.path}"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        manner = body.get("manner", "ids")
        if self.path != "/v1/completions" or body["model"] != MODEL or not (body["stream"] and body["ignore_eos"]):
            self.reply(404, {"error": {"message": "no such model"}})
        elif manner == "refused":
            self.reply(400, {"error": {"message": "the prompt displeases", "code": 400}})
        elif manner == "silent":
            self.begin(chunked=True)
            if not self.rfile.read(1):  # until the client leaves
                Handler.left += 1
        else:
            self.stream(manner, body)

    def stream(self, manner: str, body: dict[str, Any]) -> None:
        chunked = not body.get("until_close")
        self.begin(chunked)
        frame = (lambda data: b"%x\r\n%s\r\n" % (len(data), data)) if chunked else (lambda data: data)
        try:
            for data in stream(manner, body, Handler.gate):
                self.wfile.write(frame(data))
                self.wfile.flush()
            self.wfile.write(frame(DONE) + (b"0\r\n\r\n" if chunked else b""))
        except ConnectionError:
            pass
        self.close_connection = True

    def begin(self, chunked: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")))
        self.end_headers()
        self.wfile.flush()

    def reply(self, status: int, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class CompletionsServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def main(port: int) -> None:
    print("a server that prints", flush=True)
    CompletionsServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
