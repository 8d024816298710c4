"""A server as an engine: the wire piece by piece, exchanges with a real server process, and that process's life."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.config import EngineConfig
from common.errors import BackendError, ConfigError, RequestError
from common.interface import Caps
from common.request import Request, SamplingParams, Status, TokenEvent
from common.weights import zoo
from common.weights.checkpoint import open_checkpoint
from experiments import bench, compare
from experiments.baselines.openai_http import CompletionsEngine, Options, build_engine, fill, placeholders
from experiments.engines.http_stream import UNNAMED, EventStream, WireError, read_chunk
from experiments.engines.server import Server, free_port, get, listens, models, program
from experiments.load.driver import drive
from experiments.load.workload import Item
from tests.completions_server import MODEL, VOCABULARY, answer
from tests.events import tokens
from tests.history_backend import command, history, last_line

__all__ = ["history"]

ROOT = Path(__file__).parent.parent
SERVER = [sys.executable, "-m", "tests.completions_server", "{port}"]
CAPS = Caps(backend="openai_http", device="server", dtypes=(), kernels=(), max_model_len=512, vocab_size=VOCABULARY)
PATIENCE_S = 120.0
"""For what a loaded machine does late, and a broken one never."""


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


# ── the wire ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
EVENTS = b": hello\n\ndata: one\n\nevent: x\ndata:two\ndata: lines\n\n"
FRAMED = {
    "chunked": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"5;x=y\r\n: hel\r\n%x\r\n%s\r\n" % (len(EVENTS) - 5, EVENTS[5:])
    + b"0\r\n\r\n",
    "counted": HEAD + b"Content-Length: %d\r\n\r\n" % len(EVENTS) + EVENTS,
    "until close": HEAD + b"Connection: close\r\n\r\n" + EVENTS.replace(b"\n", b"\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("framing", FRAMED)
def test_events_are_read_in_whatever_pieces_they_come(framing: str, size: int) -> None:
    stream, data, events = EventStream(), FRAMED[framing], []
    for at in range(0, len(data), size):
        events += stream.feed(data[at : at + size])
    assert events == ["one", "two\nlines"] and stream.ended == (framing != "until close")
    assert stream.close() == [] and stream.ended


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP"),
        (HEAD + b"Content-Length: many\r\n\r\n", "headers"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "chunk size"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-10\r\nabc", "chunk size"),
        (HEAD + b"Content-Length: -5\r\n\r\n", "headers"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nda", "before the answer was complete"),
        (HEAD + b"Content-Length: 99\r\n\r\ndata: x\n\n", "before the answer was complete"),
        (HEAD, "before the answer was complete"),
        (b"", "before the answer was complete"),
        (b'HTTP/1.1 400 Bad\r\nContent-Length: 26\r\n\r\n{"error":{"message":"no"}}', "HTTP 400: no"),
        (b"HTTP/1.1 502 Bad\r\n\r\nthe gateway", "HTTP 502: the gateway"),
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error(data: bytes, said: str) -> None:
    with pytest.raises(WireError, match=said):
        stream = EventStream()
        stream.feed(data)
        stream.close()


def message(usage: int | None = None, **fields: Any) -> str:
    return json.dumps({"choices": [{"text": ""} | fields], "usage": usage and {"completion_tokens": usage}})


@pytest.mark.parametrize(
    ("data", "seen", "tokens"),
    [
        (message(token_ids=[5, 6], text="x"), 0, (5, 6)),
        (message(token_ids=[], text="x"), 0, ()),  # told, and none
        (message(token_ids=[5], usage=1), 0, (5,)),
        (message(token_ids=[5], usage=4), 2, (5, UNNAMED)),
        (message(text="several words"), 0, (UNNAMED,)),
        (message(text="", role="assistant"), 0, ()),
        (message(text="ab", usage=5), 2, (UNNAMED,) * 3),
        (message(text="", usage=3), 3, ()),
        (json.dumps({"choices": [], "usage": {"completion_tokens": 7}}), 5, (UNNAMED,) * 2),
        (json.dumps({"choices": [], "usage": None}), 5, ()),
        (message(logprobs={"tokens": ["token_id:9", "token_id:8"], "token_logprobs": [-1, -2]}, text="x"), 0, (9, 8)),
        (message(logprobs={"tokens": ["He"], "token_logprobs": [-1]}, text="He"), 0, (UNNAMED,)),
        (message(logprobs={"content": [{"id": 3, "logprob": -1}]}, text="x"), 0, (3,)),
    ],
)
def test_tokens_are_counted_by_what_the_server_tells(data: str, seen: int, tokens: tuple[int, ...]) -> None:
    assert read_chunk(data, seen, None).tokens == tokens


def test_log_probabilities_are_read_in_both_forms() -> None:
    vllm = {
        "tokens": ["token_id:9"],
        "token_logprobs": [-1.5],
        "top_logprobs": [{"token_id:4": -0.5, "token_id:9": -1.5, "token_id:2": -3.0}],
    }
    top = [{"id": 4, "logprob": -0.5}, {"id": 9, "logprob": -1.5}, {"id": 2, "logprob": -3.0}]
    llama = {"content": [{"id": 9, "token": "x", "logprob": -1.5, "top_logprobs": top}]}
    for logprobs in (vllm, llama):
        chunk = read_chunk(message(logprobs=logprobs, text="x"), 0, 2)
        assert chunk.logprobs is not None
        (entry,) = chunk.logprobs
        assert (entry.logprob, entry.rank, entry.top_ids, entry.top_logprobs) == (-1.5, 2, [4, 9], [-0.5, -1.5])
    assert read_chunk(message(text="x"), 0, 2).logprobs is None


@pytest.mark.parametrize(
    "data",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"choices": [7]}',
        '{"choices": [{"token_ids": ["x"]}]}',
        '{"choices": [{"token_ids": [1e999]}]}',
        '{"usage": {"completion_tokens": 1e999}}',
        '{"error": "no"}',
    ],
)
def test_an_event_that_is_no_completion_is_an_error(data: str) -> None:
    with pytest.raises(WireError):
        read_chunk(data, 0, None)


# ── exchanges ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def start(options: list[str] | None = None) -> Server:
    port = free_port()
    return Server([part.replace("{port}", str(port)) for part in options or SERVER], {"PYTHONPATH": str(ROOT)}, url(port))


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = start()
    try:
        assert one.wait(PATIENCE_S) == [MODEL]
        yield one
    finally:
        one.close()


@pytest.fixture
def engine(server: Server) -> Iterator[Callable[..., CompletionsEngine]]:
    made: list[CompletionsEngine] = []

    def make(manner: str = "ids", **body: Any) -> CompletionsEngine:
        made.append(CompletionsEngine(server.url, MODEL, CAPS, {"manner": manner} | body))
        return made[-1]

    yield make
    for one in made:
        one.close()


def greedy(name: str, prompt: list[int], max_tokens: int = 7, logprobs: int | None = None) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs)
    return Request(request_id=name, prompt_token_ids=prompt, params=params)


def right(request: Request) -> list[int]:
    return answer({"prompt": request.prompt_token_ids, "max_tokens": request.params.max_tokens}).tokens


MANNERS: Mapping[str, bool] = {
    "ids": True, "bursts": True, "llama": True, "counted": False, "counted at the end": False, "text": False,
}  # fmt: skip
"""How a server may stream, and whether its tokens are known by id."""


@pytest.mark.parametrize("until_close", [False, True])
@pytest.mark.parametrize("manner", MANNERS)
def test_every_manner_of_streaming_gives_every_token_once(
    manner: str, until_close: bool, engine: Callable[..., CompletionsEngine]
) -> None:
    request = greedy("r", [3, 1, 4])
    events = engine(manner, until_close=until_close).run([request])["r"]
    assert tokens(events) == (right(request) if MANNERS[manner] else [UNNAMED] * 7)
    assert [event.finish for event in events] == [None] * 7 + [Status.FINISHED_LENGTH]
    times = [event.time for event in events]
    assert times == sorted(times)


def test_sixty_four_requests_at_once_each_get_their_own_tokens(engine: Callable[..., CompletionsEngine]) -> None:
    requests = [greedy(f"{i}", [i, *range(i % 13)], 1 + i % 9) for i in range(64)]
    events = engine().run(requests)
    assert [tokens(events[request.request_id]) for request in requests] == [right(request) for request in requests]
    assert all(events[request.request_id][-1].finish is Status.FINISHED_LENGTH for request in requests)


def test_a_token_is_seen_before_the_next_is_made(server: Server, engine: Callable[..., CompletionsEngine]) -> None:
    """So times are those of tokens, not of the answer."""
    one, request = engine("gated"), greedy("r", [1, 2], 3)
    one.add(request)
    for token in right(request):
        assert one.step(0.0) == one.step(0.0) == []
        assert get(server.url, "/go", PATIENCE_S)[0] == 200
        seen: list[TokenEvent] = []
        while not seen:
            seen = one.step(PATIENCE_S)
        assert seen[0].token_id == token
    while one.has_work:
        one.step(PATIENCE_S)


def test_tokens_that_share_a_chunk_share_its_time_and_each_has_a_row_entry(engine: Callable[..., CompletionsEngine]) -> None:
    window = drive(engine("bursts"), [Item(0.0, (5, 6), 7)])
    (row,) = window.rows
    assert row.ok and row.finish == "length" and len(row.times) == len(row.tokens) == 7
    assert row.times[0] == row.times[2] <= row.times[3] == row.times[5] <= row.times[6] and row.times[0] > 0


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("manner", ["ids", "llama"])
def test_log_probabilities_are_those_of_the_server(manner: str, k: int, engine: Callable[..., CompletionsEngine]) -> None:
    request = greedy("r", [2, 7], 4, logprobs=k)
    events = engine(manner).run([request])["r"]
    expected = answer({"prompt": [2, 7], "max_tokens": 4})
    for i, event in enumerate(events[:4]):
        told = expected.logprobs(i, k, VOCABULARY)
        assert event.logprobs is not None and event.logprobs.logprob == told.logprob
        assert dict(zip(event.logprobs.top_ids, event.logprobs.top_logprobs, strict=True)) == dict(
            zip(told.top_ids, told.top_logprobs, strict=True)
        )


@pytest.mark.parametrize(
    ("manner", "count", "said"),
    [
        ("refused", 0, "HTTP 400: the prompt displeases"),
        ("error", 1, "the model fell over"),
        ("garbage", 1, "no completion"),
        ("disconnect", 1, "before the answer was complete"),
        ("unfinished", 1, "without a finish_reason"),
        ("bursts", 0, "no tokens with their log-probabilities"),
        ("unnamed", 0, "no tokens with their log-probabilities"),
        ("strange", 0, "token 320, which the model does not have"),
        ("endless", 7, "more than the 7 tokens"),
        ("miscounted", 0, "more than the 7 tokens"),
    ],
)
def test_a_request_that_fails_ends_alone(manner: str, count: int, said: str, engine: Callable[..., CompletionsEngine]) -> None:
    good, bad = engine(), engine(manner)
    bad.add(greedy("bad", [1, 2], logprobs=3 if manner in ("bursts", "unnamed") else None))
    good._extra = {}
    good.add(greedy("good", [3, 4]))
    events = []
    while bad.has_work:
        events += bad.step(PATIENCE_S)
    assert len(tokens(events)) == count and events[-1].finish is Status.FINISHED_ERROR
    assert said in (events[-1].error or "")
    bad._extra = {}
    again = bad.run([greedy("again", [5, 6])])["again"]
    assert tokens(again) == right(greedy("again", [5, 6]))
    while good.has_work:
        events += good.step(PATIENCE_S)
    assert tokens([event for event in events if event.request_id == "good"]) == right(greedy("good", [3, 4]))


def test_an_answer_that_stops_early_is_no_full_row(engine: Callable[..., CompletionsEngine]) -> None:
    (row,) = drive(engine("early"), [Item(0.0, (5, 6), 7)]).rows
    assert row.finish == "stop" and len(row.tokens) == 1 and not row.ok


def test_an_abort_closes_the_connection(server: Server, engine: Callable[..., CompletionsEngine]) -> None:
    one = engine("silent")
    left = lambda: json.loads(get(server.url, "/left", PATIENCE_S)[1])["left"]  # noqa: E731
    before = left()
    one.add(greedy("r", [1]))
    while one._live["r"].stream.status is None:
        one.step(PATIENCE_S)
    assert one.abort("r") and not one.abort("r") and one.has_work
    (event,) = one.step()
    assert event.finish is Status.FINISHED_ABORT and not one.has_work
    until(lambda: left() == before + 1, "the server never saw that its client had left")


def test_requests_to_nobody_fail_one_by_one() -> None:
    one = CompletionsEngine(url(free_port()), MODEL, CAPS, {})
    events = one.run([greedy("a", [1]), greedy("b", [2])])
    assert all(len(mine) == 1 and mine[0].finish is Status.FINISHED_ERROR for mine in events.values())
    assert "cannot connect" in (events["a"][0].error or "")
    one.close()


def test_what_cannot_be_asked_of_a_server_is_refused(engine: Callable[..., CompletionsEngine]) -> None:
    one = engine()
    for request in (
        Request(request_id="a", prompt_token_ids=[1], params=SamplingParams(temperature=1.0, ignore_eos=True)),
        greedy("b", [VOCABULARY]),
        greedy("c", [1] * 512, 1),
    ):
        with pytest.raises(RequestError):
            one.add(request)
    assert not one.has_work


# ── its process ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_server_is_started_seen_and_ended() -> None:
    one = start()
    assert one.wait(PATIENCE_S) == models(one.url) == [MODEL] and one.exit_code is None
    family = psutil.Process(one._process.pid).children(recursive=True)
    held, most = one.memory()
    assert family and held > 10 << 20 and most > 10 << 20
    one.close()
    one.close()
    until(lambda: not any(process.is_running() for process in family), "the server outlived its run")
    assert not listens(one.url) and "a server that prints" in one.tail()


@pytest.mark.parametrize(
    ("program", "timeout_s", "said"),
    [
        ("print('no such model', flush=True); raise SystemExit(3)", PATIENCE_S, r"exit code 3;(.|\n)*no such model"),
        ("import time; print('loading', flush=True); time.sleep(600)", 2.0, r"within 2 s;"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", PATIENCE_S, r"exit code 137; .* Its log is empty"),
    ],
    ids=["dies", "never answers", "is killed"],
)
def test_a_server_that_does_not_come_up_is_told_with_its_log(program: str, timeout_s: float, said: str) -> None:
    one = start(python(program))
    with pytest.raises(BackendError, match=said):
        one.wait(timeout_s)
    assert one.exit_code is not None


def test_what_a_server_has_started_ends_with_it() -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    program = (
        f"import subprocess, sys; p = [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in range(2)]; p[0].wait()"
    )
    one = start(python(program))
    until(lambda: one.tail().count("deaf") == 2, "the server never came up")
    family = psutil.Process(one._process.pid).children(recursive=True)
    one.close()
    assert len(family) == 3
    until(lambda: not any(alive(process) for process in family), "the server outlived its run")


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = url(listener.getsockname()[1])
        with pytest.raises(BackendError, match="listens at"):
            Server(python(""), {}, where, patience_s=0.0)


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(BackendError, match=r"no program 'no-such-server' .* `make llama-server`"):
        Server(["no-such-server"], {}, url(free_port()))


def test_a_program_of_this_environment_is_found_though_that_is_not_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert program(Path(sys.executable).name) == sys.executable


@pytest.mark.parametrize("first", ["no-such-server", "{peers}/.venv-none/bin/python"])
def test_a_program_that_is_not_there_is_told_before_any_engine_starts(
    first: str, history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SMALL, f"engines=[history,{{name:openai_http,base_url:null,command:['{first}']}}]")
    assert exit.value.code == 2 and "There is no program" in capfd.readouterr().err
    assert not (history / "runs").exists()


def test_a_server_does_not_outlive_who_started_it() -> None:
    """Not even where that is killed together with its group, as the harness does with an engine that hangs."""
    program = (
        "from experiments.engines.server import Server; import psutil, time\n"
        "one = Server([__import__('sys').executable, '-c', 'import time; time.sleep(600)'], {}, 'http://127.0.0.1:1')\n"
        "mine = psutil.Process()\n"
        "while len(mine.children(recursive=True)) < 2: time.sleep(0.01)\n"
        "print(*(child.pid for child in mine.children(recursive=True)), flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(python(program), stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert run.stdout
    pids = [int(pid) for pid in run.stdout.readline().split()]
    processes = [psutil.Process(pid) for pid in pids]
    assert len(processes) == 2
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    until(lambda: not any(alive(process) for process in processes), "the server outlived who started it")


def alive(process: psutil.Process) -> bool:
    """A zombie is dead, whoever is to collect it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_requests_to_a_server_that_has_died_say_so() -> None:
    one = start()
    one.wait(PATIENCE_S)
    engine = CompletionsEngine(one.url, MODEL, CAPS, {"manner": "silent"}, one)
    engine.add(greedy("r", [1]))
    while engine._live["r"].stream.status is None:
        engine.step(PATIENCE_S)
    (server,) = psutil.Process(one._process.pid).children()
    server.kill()
    one._process.wait()
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step(PATIENCE_S)
    assert events[-1].finish is Status.FINISHED_ERROR and "ended with exit code 137" in (events[-1].error or "")
    engine.close()


# ── the engine ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs base_url"),
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "https://host"}, "base_url"),
        ({"base_url": "http://host:port"}, "base_url"),
        ({"base_url": "http://host/v1"}, "without a path"),
        ({"command": "my-server --port 1"}, "command must be a list"),
        ({"command": ["a", 1]}, "command must be a list"),
        ({"base_url": "http://host", "environment": {"A": "b"}}, "environment is for the server"),
        ({"command": ["a"], "environment": {"A": 1}}, "environment must be"),
        ({"command": ["a"], "start_timeout_s": 0}, "start_timeout_s"),
        ({"command": ["a"], "served_model": ""}, "served_model"),
        ({"command": ["a"], "extra_body": []}, "extra_body"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Options(**options)


def test_a_command_is_filled_in() -> None:
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=8, max_model_len=100, threads=2)
    checkpoint = open_checkpoint(zoo.resolve("tiny-llama"))
    values = placeholders(checkpoint, config, "http://127.0.0.1:81")
    command = ["{model}", "--p={port}", "{threads}/{kv_tokens}/{max_num_seqs}/{dtype}", "{unknown}", '{"a": 1}']
    expected = [str(checkpoint.path), "--p=81", "2/400/4/bfloat16", "{unknown}", '{"a": 1}']
    assert fill(command, values) == expected


@pytest.mark.parametrize(
    "options",
    [{"base_url": "http://127.0.0.1:1"}, {"command": ["my-server", "--ranks=2"]}],
    ids=["a server that runs", "a command that does not say it"],
)
def test_ranks_and_replicas_of_which_a_server_is_not_told_are_refused(options: dict[str, Any]) -> None:
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "prefill_parallel_size"):
        with pytest.raises(ConfigError, match=rf"{name}=2 does not reach the server: .* \{{{name}\}}"):
            Options(**options).check(EngineConfig(**{name: 2}))


def test_ranks_reach_a_server_whose_command_names_them() -> None:
    options = Options(command=[sys.executable, "--tensor-parallel-size={tensor_parallel_size}"])
    checkpoint, config = open_checkpoint(zoo.resolve("tiny-llama")), EngineConfig(tensor_parallel_size=2)
    options.check(config)
    assert fill(options.command, placeholders(checkpoint, config, "http://127.0.0.1:81"))[-1] == "--tensor-parallel-size=2"


def test_a_server_that_is_not_there_or_offers_another_model_is_told(server: Server) -> None:
    checkpoint = open_checkpoint(zoo.resolve("tiny-llama"))
    with pytest.raises(BackendError, match="No server answers at"):
        build_engine(checkpoint, EngineConfig(), options=Options(base_url=url(free_port())))
    with pytest.raises(BackendError, match=f"offers {MODEL}, not other"):
        build_engine(checkpoint, EngineConfig(), options=Options(base_url=server.url, served_model="other"))


SMALL = (
    "model=tiny-llama",
    "workload=single",
    "workload.num_requests=3",
    "workload.output_len=6",
    "measure=quick",
    "measure.limits_s=0",
)


def test_a_server_of_the_run_is_compared_with_an_engine(
    history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = ",".join(f"'{part}'" for part in SERVER)
    engines = f"engines=[history,{{name:openai_http,base_url:null,max_model_len:512,command:[{program}]}}]"
    command(monkeypatch, compare.main, *SMALL, engines)
    result = last_line(capsys.readouterr().out)
    _, figures = result["engines"].values()
    assert (figures["completed"], figures["failed"], figures["total_output_tokens"]) == (3, 0, 18)
    assert figures["median_ttft_ms"] > 0 and figures["median_itl_ms"] >= 0 and figures["rss_mib"] > 20
    assert (result["tokens_equal"], result["tokens_equal_share"]) == (True, 1.0)
    log = next(Path(result["run"]).glob("openai_http*.log"))
    assert "a server that prints" in log.read_text()


def test_a_server_that_tells_no_log_probabilities_is_not_called_wrong(
    server: Server, history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"name:openai_http,base_url:'{server.url}',max_model_len:512,extra_body:{{manner:bursts}}"
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, compare.main, *SMALL, f"engines=[history,{{{options}}}]")
    assert exit.value.code == 1
    result = last_line(capsys.readouterr().out)
    (failure,) = result["failures"].values()
    assert "correctness.num_requests=0 asks for none" in failure["message"]
    assert result["unjustified_divergences"] is None and len(result["engines"]) == 2


def test_a_server_that_runs_already_is_timed(
    server: Server, history: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, bench.main, *SMALL, "engine=openai_http", f"engine.base_url={server.url}", "engine.max_model_len=512")
    assert last_line(capsys.readouterr().out)["completed"] == 3
    assert models(server.url) == [MODEL]  # it is not ours to end


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.base_url=here", "base_url must be"),
        ("engine.base_url=null", "needs base_url"),
        ("+engine.base_ulr=x", "Did you mean 'base_url'"),
        ("engine.cache=dens", "Did you mean 'dense'"),
    ],
)
def test_a_mistake_in_its_options_is_told_before_anything_starts(
    override: str, said: str, history: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, bench.main, *SMALL, "engine=openai_http", override)
    assert exit.value.code == 2 and said in capfd.readouterr().err
    assert not (history / "runs").exists()
