"""How a server ends, hangs, fails and goes on; over a backend without a framework, whose failures are ordered by files."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.datastructures import Headers

from common.errors import ConfigError
from common.options import parse
from common.serve.app import STATS_PATIENCE_S
from common.serve.command import make_app, make_parser
from common.serve.errors import ApiError
from common.serve.guard import Guard
from tests.http_server import (
    PATIENCE_S,
    Served,
    expect_told_that_it_ends,
    history,
    interrupt_twice,
    raw_request,
    serving,
    until,
)


@contextmanager
def started(folder: Path, *options: str) -> Iterator[Server]:
    packages, control = history(folder)
    with serving(folder, "--backend", "history", "--max-model-len", "512", *options, packages=[packages]) as served:
        yield served, control


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(tmp_path_factory.mktemp("serve"), "--stall-s", "0.2", "--log-json") as server:
        yield server


@pytest.fixture
def server(lasting: Server) -> Iterator[Server]:
    """For tests after which it goes on, with nothing going wrong any more."""
    yield lasting
    for file in lasting[1].iterdir():
        file.unlink()


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Server]:
    """For a test that ends it."""
    with started(tmp_path) as server:
        yield server


Server = tuple[Served, Path]
"""And the folder whose files say what goes wrong in it."""
LONG: dict[str, Any] = {"prompt": "a long one", "max_tokens": 60, "ignore_eos": True}


@pytest.mark.parametrize("told", [[signal.SIGTERM], [signal.SIGINT] * 2], ids=["once", "twice, as a launcher passes it on"])
def test_told_to_end_it_finishes_what_runs_and_takes_nothing_new(mortal: Server, told: list[signal.Signals]) -> None:
    served, control = mortal
    (control / "slow").touch()
    whole: list[Any] = []
    reader = threading.Thread(target=lambda: whole.extend(served.events(**LONG, return_token_ids=True)))
    reader.start()
    until(lambda: served.metric("generation_tokens_total") > 3)
    for number in told:
        served.process.send_signal(number)
    assert served.process.wait(PATIENCE_S) == 0
    reader.join()
    assert sum(len(chunk["choices"][0]["token_ids"]) for chunk in whole) == 60
    assert whole[-1]["choices"][0]["finish_reason"] == "length"
    assert "Told to end: takes nothing new; 1 HTTP request is unfinished, with 60 s left." in served.log.read_text()


def test_what_outlasts_the_drain_is_told_so(tmp_path: Path) -> None:
    with started(tmp_path, "--drain-s", "1") as (served, control):
        (control / "slow").touch()
        expect_told_that_it_ends(served)


def test_a_second_ctrl_c_ends_at_once_even_in_a_step_that_hangs(mortal: Server) -> None:
    served, control = mortal
    with raw_request(served, prompt="the", max_tokens=400, ignore_eos=True):
        until(lambda: served.metric("generation_tokens_total") > 3)
        (control / "hang").touch()
        interrupt_twice(served)


def test_a_server_whose_step_loop_died_tells_its_requests_and_ends(mortal: Server) -> None:
    served, control = mortal
    (control / "slow").touch()
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.extend(served.events(**{**LONG, "max_tokens": 450})))
    reader.start()
    until(lambda: served.metric("generation_tokens_total") > 3)
    where = urlsplit(served.url)
    with socket.create_connection((where.hostname or "", where.port or 0)) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        (control / "die").touch()
        reader.join(3.0)
        assert seen[-1]["error"]["code"] == 503 and "choices" in seen[-2]
        assert served.process.wait(6.0) == 1
    log = served.log.read_text()
    assert log.index("The step loop has died") < log.index("No engine is left, so the server ends") < log.index("Ended.")


def stats_age_s(metrics: str) -> float:
    (line,) = [line for line in metrics.splitlines() if line.startswith("tandem:stats_age_seconds{")]
    return float(line.split()[-1])


def test_a_step_that_hangs_is_not_healthy_until_it_goes_on(server: Server) -> None:
    served, control = server
    (control / "hang").touch()
    reader = threading.Thread(target=served.complete, kwargs=LONG)
    reader.start()
    until(lambda: served.client.get("/health").status_code == 503)
    during = served.client.get("/metrics")  # with the last known values
    (control / "hang").unlink()
    reader.join()
    until(lambda: served.client.get("/health").status_code == 200)
    assert during.status_code == 200 and "vllm:num_requests_running{" in during.text
    assert stats_age_s(during.text) > STATS_PATIENCE_S > stats_age_s(served.client.get("/metrics").text)


def test_a_client_that_closes_its_side_gets_its_answer_and_one_that_closes_both_has_left(server: Server) -> None:
    served, control = server
    (control / "slow").touch()
    with raw_request(served, prompt="the", max_tokens=40, ignore_eos=True) as connection:
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert b"HTTP/1.1 200" in answer and b"finish_reason" in answer
    before = served.metric("request_success_total", finished_reason="abort")
    with raw_request(served, prompt="the", max_tokens=450, ignore_eos=True):
        until(lambda: served.metric("num_requests_running") == 1)
    until(lambda: served.metric("request_success_total", finished_reason="abort") == before + 1)


def test_a_hang_outside_a_step_is_not_healthy_until_it_goes_on(server: Server) -> None:
    served, control = server
    (control / "hang outside a step").touch()
    asking = threading.Thread(target=served.client.get, args=("/metrics",))
    asking.start()
    until(lambda: served.client.get("/health").status_code == 503)
    (control / "hang outside a step").unlink()
    asking.join()
    until(lambda: served.client.get("/health").status_code == 200)


def test_a_request_whose_steps_raise_fails_without_telling_why(server: Server) -> None:
    served, control = server
    right = served.complete(**LONG)["choices"][0]["text"]
    (control / "fail").touch()
    answer = served.post(**LONG)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
    streamed = served.events(**LONG)
    assert streamed == [{"error": answer.json()["error"]}]
    assert "0x7ffd" not in answer.text and "/usr" not in answer.text
    (control / "fail").unlink()
    assert served.complete(**LONG)["choices"][0]["text"] == right
    served.wait_idle()


def test_a_deadline_ends_a_request_and_a_full_queue_turns_one_away(tmp_path: Path) -> None:
    with started(tmp_path, "--max-num-seqs", "1", "--max-waiting", "1") as (served, control):
        (control / "slow").touch()
        late = served.post(**LONG, deadline=0.0)
        assert (late.status_code, late.json()["error"]["type"]) == (504, "GatewayTimeoutError")
        assert late.headers["x-should-retry"] == "false"  # as OpenAI's clients read it
        readers = [threading.Thread(target=served.events, kwargs=LONG) for _ in range(2)]
        readers[0].start()
        until(lambda: served.metric("num_requests_running") == 1)
        readers[1].start()
        until(lambda: served.metric("num_requests_waiting") == 1)
        full = served.post(**LONG)
        assert (full.status_code, full.json()["error"]["type"]) == (429, "RateLimitError")
        assert "max_waiting=1" in full.json()["error"]["message"] and full.headers["retry-after"] == "1"
        (control / "slow").unlink()
        for reader in readers:
            reader.join()
        served.wait_idle()


def test_the_choices_of_a_request_are_taken_however_few_may_wait(tmp_path: Path) -> None:
    with started(tmp_path, "--max-num-seqs", "2", "--max-waiting", "2") as (served, control):
        assert len(served.complete(**LONG, n=7, temperature=1.0, seed=1)["choices"]) == 7
        before = served.metric("prompt_tokens_total")
        never = served.post(**{**LONG, "prompt": ["a", "b", "c", "d", "e"]})
        assert never.status_code == 400 and "send them in several requests" in never.json()["error"]["message"]
        assert served.metric("prompt_tokens_total") == before > 0  # none of the five, though four were taken for a moment
        (control / "slow").touch()
        with ThreadPoolExecutor(8) as pool:
            codes = [answer.status_code for answer in pool.map(lambda _: served.post(**LONG), range(8))]
        assert sorted(codes) == [200] * 4 + [429] * 4


def test_the_log_names_requests_and_never_what_they_say(server: Server) -> None:
    served, _ = server
    answer = served.client.post("/v1/completions", json=LONG, headers={"x-request-id": "my-own-7"})
    assert answer.headers["x-request-id"] == "my-own-7"
    evil = served.client.post("/v1/completions", json=LONG, headers={"x-request-id": "a b{}" + "x" * 500})
    assert evil.headers["x-request-id"].isalnum()
    lines = [json.loads(line) for line in served.log.read_text().splitlines() if line.startswith("{")]
    ended, answered = [line for line in lines if line.get("request_id") == "my-own-7"]
    assert (answered["path"], answered["status"]) == ("/v1/completions", 200)
    assert (ended["id"], ended["completion_tokens"], ended["unfinished"]) == (answer.json()["id"], 60, 0)
    assert "a long one" not in served.log.read_text()


def test_without_its_packages_the_server_says_what_to_install() -> None:
    hide = "find = util.find_spec; util.find_spec = lambda name: None if name == 'uvicorn' else find(name)"
    code = f"import sys; from importlib import util; {hide}; from common.serve.__main__ import main; sys.exit(main(['--help']))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "error: The server needs uvicorn: pip install -e '.[serve]', or make serve.\n"


def test_an_empty_key_is_refused_and_not_taken_for_none() -> None:
    with pytest.raises(ConfigError, match="The API key is empty"):
        make_app(parse(make_parser(), ["--api-key", ""]))


@pytest.mark.parametrize("key", ["schlüssel", "key 🔑"])
def test_a_key_that_clients_send_in_different_ways_is_known_in_each(key: str) -> None:
    guard = Guard(lambda *_: None, api_key=key)
    for encoding in ("utf-8", *(("latin-1",) if key == "schlüssel" else ())):
        guard._check_key("/v1/models", Headers(raw=[(b"authorization", b"Bearer " + key.encode(encoding))]))
    for wrong in (key[:-1], "schl?ssel", "key ?"):
        with pytest.raises(ApiError, match="not the one"):
            guard._check_key("/v1/models", Headers(raw=[(b"authorization", b"Bearer " + wrong.encode())]))


def test_a_key_is_required_and_pages_of_allowed_origins_may_call(tmp_path: Path) -> None:
    page = "https://page.example"
    with started(tmp_path, "--api-key", "secret", "--allowed-origins", json.dumps([page])) as (served, _):
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
        for origin, code, allowed in ((page, 200, page), ("https://other.example", 400, None)):
            preflight = served.client.options("/v1/completions", headers={"origin": origin} | asks)  # which brings no key
            assert (preflight.status_code, preflight.headers.get("access-control-allow-origin")) == (code, allowed)
            refused = served.client.get("/v1/models", headers={"origin": origin})
            assert (refused.status_code, refused.headers.get("access-control-allow-origin")) == (401, allowed)
        for given, told in (
            ({}, "A key is needed"),
            ({"authorization": "Bearer wrong"}, "not the one"),
            ({"authorization": "secret"}, "A key is needed"),
            ({"authorization": "Bearer " + "x" * 9999}, "not the one"),
        ):
            answer = served.client.get("/v1/models", headers=given)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthenticationError")
            assert told in answer.json()["error"]["message"]
        assert served.client.get("/metrics").status_code == 401
        assert served.client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert served.client.get("/").status_code == 200
        assert served.post("/reset_prefix_cache").status_code == 401
        absent = served.client.post("/reset_prefix_cache", headers={"authorization": "Bearer secret"})
        assert absent.status_code == 404 and "--admin" in absent.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "99999"], "Cannot listen"),
        (["--backend", "nothing"], "Unknown backend"),
        (["--model", "no-such-model"], "Unknown model"),
        (["--prot", "8000"], "--port"),
        (["--backend", "history,history"], "twice"),
        (["--backend", "history,nothing"], "Unknown backend 'nothing'"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(
    tmp_path: Path,
    options: list[str],
    says: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from common.serve.__main__ import main

    packages, _ = history(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(packages), prepend=":")
    monkeypatch.syspath_prepend(str(packages))
    assert main(["--model", "tiny-llama", "--port", "0", "--backend", "history", *options]) == 2
    assert says in capfd.readouterr().err
