"""Two backends behind one address, and the page that shows them side by side."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import psutil
import pytest

from common.process.child import Silence
from common.process.exits import TERMINATED
from common.replicas.supervisor import SILENCE_S
from common.serve.cut_stream import Chunks, ResponseEvents
from common.serve.errors import ApiError
from common.serve.folder import PrivateFolder
from common.serve.responses import response_event
from tests.bad_requests import BYTES, http
from tests.browser import Tab, browse
from tests.http_server import (
    PATIENCE_S,
    ROOT,
    Awake,
    Served,
    expect_told_that_it_ends,
    history,
    interrupt_twice,
    raw_request,
    serving,
    until,
)
from tests.test_serve_abuse import UNFINISHED, faults, send

BODY = {"prompt": "the", "max_tokens": 8, "ignore_eos": True}


@contextmanager
def two(folder: Path) -> Iterator[Served]:
    packages, control = history(folder, "one", "two")
    (control / "slow").touch()
    with serving(folder, "--backend", "one,two", packages=[packages]) as server:
        yield server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """For tests that leave it as it was."""
    with two(tmp_path_factory.mktemp("front")) as server:
        yield server


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Served]:
    """For a test that ends it."""
    with two(tmp_path) as server:
        yield server


def test_requests_reach_the_backend_that_they_name(served: Served) -> None:
    names = [model["id"] for model in served.client.get("/v1/models").json()["data"]]
    assert sorted(names) == ["tiny-llama", "tiny-llama@one", "tiny-llama@two"]
    for name in names:
        assert served.client.get(f"/v1/models/{name}").json()["id"] == name
    assert served.client.get("/v1/models/tiny-llama@three").json()["error"]["param"] == "model"
    texts = set()
    for name in (None, *names):
        engine = "two" if name == "tiny-llama@two" else "one"
        before = served.metric("generation_tokens_total", engine=engine)
        body = BODY if name is None else {**BODY, "model": name}
        answer = served.complete(**body)
        assert answer["model"] == f"tiny-llama@{engine}"
        assert served.metric("generation_tokens_total", engine=engine, model_name=answer["model"]) == before + 8
        assert "".join(chunk["choices"][0]["text"] for chunk in served.events(**body)) == answer["choices"][0]["text"]
        texts.add(answer["choices"][0]["text"])
        response = served.post("/v1/responses", input="the", max_output_tokens=2, model=name).json()
        assert response["model"] == f"tiny-llama@{engine}" and response["object"] == "response"
    assert len(texts) == 1
    assert served.post(**BODY, model="tiny-llama@three").status_code == 404
    assert served.client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert served.client.get("/tokenizer_info").json()["eos_token"] == "<|im_end|>"
    long = served.post(prompt="x " * 5000)
    assert long.json()["error"]["code"] == "context_length_exceeded"


ODD = {
    "a header that is not ASCII": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTraceparent: \xe9\r\n"
        b'Accept: \xff\xe9\r\nContent-Length: 34\r\n\r\n{"prompt": "the", "max_tokens": 2}',
        200,
    ),
    "a path of two slashes": (http("GET // HTTP/1.1\nHost: x"), 404),
    "a path like a host": (http("GET //x@y:99999/health HTTP/1.1\nHost: x"), 404),
    "a host with a path": (http("GET /nowhere HTTP/1.1\nHost: x/v1/models?"), 404),
}


def test_malformed_requests_get_the_answers_of_a_server_of_one_backend(served: Served) -> None:
    cases = {name: (data, status, False) for name, (data, status) in (BYTES | ODD).items()}
    cases |= {str(data): (data, 400, True) for data in UNFINISHED}
    wrong = {}
    for name, (data, status, half_closed) in cases.items():
        answer = send(served, data, half_closed)
        if answer[0] != status or (status != 200 and faults(*answer, status)):
            wrong[name] = answer
    assert wrong == {} and "Traceback" not in served.log.read_text()


def test_routes_that_take_no_body_need_no_header_for_one(tmp_path: Path) -> None:
    """As a server of one backend answers: `curl -X POST` sends neither."""
    packages, _ = history(tmp_path, "one", "two")
    with serving(tmp_path, "--backend", "one,two", "--admin", packages=[packages]) as server:
        assert server.client.post("/reset_prefix_cache").status_code == 200
        assert server.client.post("/nowhere").status_code == 404
        assert server.client.post("/v1/completions").status_code == 415


def test_a_client_that_closes_its_side_gets_its_answer(served: Served) -> None:
    for body in (BODY, {**BODY, "stream": True}):
        with raw_request(served, **body) as connection:
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        final = answer[answer.index(b"HTTP/1.1 200") :]
        assert b"finish_reason" in final and (b"[DONE]" in final) == ("stream" in body)


def test_head_is_answered_where_get_is(served: Served) -> None:
    for path in ("/", "/health", "/metrics", "/version", "/v1/models"):
        answer = served.client.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path
        assert answer.headers.get("content-type") == served.client.get(path).headers.get("content-type")
    assert served.client.head("/v1/completions").status_code == 405


def test_a_body_that_a_get_brings_is_ignored(served: Served) -> None:
    """As a server of one backend ignores it: `curl -X GET -d …` calls it a form."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    answer = served.client.request("GET", "/tokenizer_info", content=b"x=1", headers=form)
    assert answer.status_code == 200 and answer.json()["eos_token"] == "<|im_end|>"
    assert served.client.request("GET", "/nowhere", content=b"x=1", headers=form).status_code == 404


def test_each_request_and_the_end_are_logged_once(mortal: Served) -> None:
    assert mortal.client.post("/v1/completions", json=BODY, headers={"x-request-id": "asked-once"}).status_code == 200
    mortal.stop()
    log = mortal.log.read_text()
    lines = [line for line in log.splitlines() if "request_id='asked-once'" in line]
    assert ["Answered." in line for line in lines].count(True) == 1
    assert ["completion_tokens=8" in line for line in lines].count(True) == 1  # which the backend alone knows
    assert log.count("Told to end") == log.count("common.serve.main: Ended.") == 1


def test_whoever_leaves_is_noticed_behind_the_front_too(served: Served) -> None:
    before = served.metric("request_success_total", finished_reason="abort")
    with served.client.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 400, "stream": True}) as response:
        next(response.iter_raw())
    served.wait_idle()
    with raw_request(served, prompt="the", max_tokens=400, ignore_eos=True):
        until(lambda: served.metric("num_requests_running") == 1)
    served.wait_idle()
    until(lambda: served.metric("request_success_total", finished_reason="abort") == before + 2)


def test_whoever_leaves_as_soon_as_it_has_asked_leaves_nothing_open(mortal: Served) -> None:
    """A front that let go of a request between the connection to its backend and the first byte kept that connection."""
    mortal.complete(**BODY)
    processes = [psutil.Process(mortal.process.pid), *psutil.Process(mortal.process.pid).children()]
    before = [process.num_fds() for process in processes]
    for i in range(120):
        with raw_request(mortal, **BODY, stream=i % 2 == 0, model=f"tiny-llama@{('one', 'two')[i % 3 % 2]}"):
            time.sleep(i % 4 * 0.001)
    mortal.wait_idle()
    until(lambda: [process.num_fds() for process in processes] <= [count + 4 for count in before])
    assert "ERROR" not in mortal.log.read_text()


def test_an_operator_reaches_every_backend_or_the_one_that_is_named(tmp_path: Path) -> None:
    packages, _ = history(tmp_path, "one", "two")
    with serving(tmp_path, "--backend", "one,two", "--admin", packages=[packages]) as server:
        prompt = "long enough to fill a page or more of them, which is what is kept of it"
        hits = lambda engine: server.metric("prefix_cache_hits_total", engine=engine)  # noqa: E731

        def ask() -> list[float]:
            """Tokens that each backend finds in its cache."""
            before = [hits(name) for name in ("one", "two")]
            for name in ("one", "two"):
                server.complete(prompt=prompt, max_tokens=2, model=f"tiny-llama@{name}")
            server.wait_idle()
            return [hits(name) - count for name, count in zip(("one", "two"), before, strict=True)]

        assert ask() == [0, 0] and min(ask()) > 0
        assert server.client.post("/reset_prefix_cache").status_code == 200
        assert ask() == [0, 0]
        assert server.client.post("/reset_prefix_cache?model=tiny-llama@two").status_code == 200
        one, two = ask()
        assert one > 0 and two == 0
        assert server.client.post("/reset_prefix_cache?model=three").status_code == 404
        absent = server.client.post("/start_profile")
        assert absent.status_code == 404 and "--profile-dir" in absent.json()["error"]["message"]


def test_a_path_of_any_length_that_is_none_is_not_found(served: Served) -> None:
    answer = served.client.get("/" + "a" * 60_000)
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "NotFoundError"
    with socket.create_connection((urlsplit(served.url).hostname or "", urlsplit(served.url).port or 0)) as connection:
        connection.sendall(b"GET /" + b"a" * 66_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(12).split()[1] in (b"400", b"404", b"414", b"431")


def backend_of(served: Served, model: str) -> psutil.Process:
    (found,) = [child for child in psutil.Process(served.process.pid).children() if model in child.cmdline()]
    return found


def two_streams_of_a_backend_that_dies(mortal: Served) -> None:
    """OpenAI's client gets the failure of each in the form that its API has."""
    client = openai.OpenAI(base_url=f"{mortal.url}/v1", api_key="none", max_retries=0)
    model: Any = {"model": "tiny-llama@two", "stream": True, "extra_body": {"ignore_eos": True}}
    create: Any = client.responses.create
    with client, client.completions.create(prompt="the", max_tokens=400, **model) as chunks:
        next(iter(chunks))
        with create(input="the", max_output_tokens=400, **model) as events:
            seen = []
            for event in events:
                if event.type == "response.output_text.delta" and event.type not in {each.type for each in seen}:
                    backend_of(mortal, "tiny-llama@two").send_signal(signal.SIGKILL)
                seen.append(event)
        with pytest.raises(openai.APIError, match="does not answer"):
            list(chunks)
    before, last = seen[-2:]
    assert last.type == "response.failed" and last.sequence_number == before.sequence_number + 1
    assert last.response.status == "failed" and last.response.error.code == "server_error"
    assert "does not answer" in last.response.error.message


def test_a_stream_that_ends_within_an_event_passes_whole_events_only() -> None:
    error = ApiError(503, "It does not answer.")
    events = [response_event({"type": kind, "response": {"id": "a"}}, i) for i, kind in enumerate(("created", "in_progress"))]
    passing, data = ResponseEvents(), b"".join(events)[:-3]
    assert b"".join(passing.push(data[i : i + 7]) for i in range(0, len(data), 7)) == events[0]
    failed = json.loads(passing.end(error).partition(b"data: ")[2])
    assert (failed["sequence_number"], failed["response"]["id"], failed["response"]["status"]) == (1, "a", "failed")
    assert json.loads(ResponseEvents().end(error).partition(b"data: ")[2])["type"] == "error"
    chunks = Chunks()
    assert chunks.push(b"data: {}\n\ndata: {") == b"data: {}\n\n" and chunks.end(error).startswith(b"data: {")


def test_a_backend_that_died_takes_only_its_own_requests_with_it_and_is_started_again(mortal: Served) -> None:
    right = mortal.complete(**BODY)["choices"][0]["text"]
    two_streams_of_a_backend_that_dies(mortal)
    until(lambda: mortal.client.get("/health").status_code == 503)
    assert mortal.post(**BODY, model="tiny-llama@two").status_code == 503
    assert mortal.post(**BODY).status_code == mortal.post(**BODY, model="tiny-llama").status_code == 200
    names = [model["id"] for model in mortal.client.get("/v1/models").json()["data"]]
    assert sorted(names) == ["tiny-llama", "tiny-llama@one"]
    assert 'tandem:backend_serves{engine="two"} 0.0' in mortal.client.get("/metrics").text
    assert mortal.metric("generation_tokens_total", engine="one") == 24
    until(lambda: "The server of the two engine was killed by SIGKILL and is started again." in mortal.log.read_text())
    until(lambda: mortal.client.get("/health").status_code == 200)
    assert mortal.complete(**BODY, model="tiny-llama@two")["choices"][0]["text"] == right
    until(lambda: "The two engine serves again." in mortal.log.read_text())
    assert 'tandem:backend_serves{engine="two"} 1.0' in mortal.client.get("/metrics").text
    backend_of(mortal, "tiny-llama@one").send_signal(signal.SIGKILL)
    until(lambda: mortal.client.get("/health").status_code == 503)
    answers = [mortal.complete(**BODY), mortal.complete(**BODY, model="tiny-llama")]  # the plain name means the other now
    assert [answer["model"] for answer in answers] == ["tiny-llama@two"] * 2
    assert mortal.post(**BODY, model="tiny-llama@one").status_code == 503


def test_a_server_all_of_whose_backends_are_given_up_ends(mortal: Served, tmp_path: Path) -> None:
    for backend in [backend_of(mortal, f"tiny-llama@{name}") for name in ("one", "two")]:
        backend.send_signal(signal.SIGKILL)
    for package in (tmp_path / "packages").iterdir():
        (package / "__init__.py").write_text("raise SystemExit(9)")
    assert mortal.process.wait(PATIENCE_S) == 1
    log = mortal.log.read_text()
    assert log.count("ended with exit code 9 once more before it served, and is given up.") == 2
    assert "No engine is left, so the server ends" in log


def test_a_backend_that_is_stopped_is_ended_and_started_again(mortal: Served) -> None:
    stopped = backend_of(mortal, "tiny-llama@two")
    stopped.send_signal(signal.SIGSTOP)
    answer = mortal.post(**BODY, model="tiny-llama@two")  # which it does not, and nobody else can
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "ServiceUnavailableError")
    assert mortal.client.get("/health").status_code == 503 and mortal.post(**BODY).status_code == 200
    assert "The server of the two engine was stopped, and is ended." in mortal.log.read_text()
    until(lambda: mortal.client.get("/health").status_code == 200)
    assert mortal.post(**BODY, model="tiny-llama@two").status_code == 200
    assert backend_of(mortal, "tiny-llama@two").pid != stopped.pid


def test_a_backend_whose_step_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    packages, control = history(tmp_path, "one", "two")
    with serving(tmp_path, "--backend", "one,two", "--stall-s", "0.2", packages=[packages]) as server:
        (control / "hang").touch()
        assert [set(chunk) for chunk in server.events(**BODY, model="tiny-llama@two")] == [{"error"}]
        (control / "hang").unlink()
        assert "The server of the two engine is not well (The step loop hangs.), and is ended." in server.log.read_text()
        until(lambda: server.client.get("/health").status_code == 200)
        assert server.post(**BODY, model="tiny-llama@two").status_code == 200
        assert "one engine" not in server.log.read_text()


def test_a_backend_that_hangs_outside_a_step_is_ended_and_started_again(tmp_path: Path) -> None:
    packages, control = history(tmp_path, "one", "two")
    with serving(tmp_path, "--backend", "one,two", "--stall-s", "0.2", packages=[packages]) as server:
        (control / "hang outside a step").touch()
        hanging = backend_of(server, "tiny-llama@two")
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(server.client.get, "/metrics")
            until(lambda: "The server of the two engine is not well (The step loop hangs.), and is ended." in read(server))
            (control / "hang outside a step").unlink()
            asking.result()
        until(lambda: server.client.get("/health").status_code == 200)
        assert backend_of(server, "tiny-llama@two").pid != hanging.pid


@pytest.mark.accept
def test_a_backend_that_is_silent_for_long_while_it_computes_is_not_ended(tmp_path: Path) -> None:
    """Its threads wait for Python's lock, the event loop's too, for longer than an idle process may be silent."""
    packages, control = history(tmp_path, "one", "two")
    with serving(tmp_path, "--backend", "one,two", "--stall-s", "300", packages=[packages]) as server:
        (control / "hold").touch()
        began = time.monotonic()
        answer = server.post(**BODY, model="tiny-llama@two")
        assert answer.status_code == 200 and time.monotonic() - began > SILENCE_S + 2
        assert "is ended" not in read(server)


def read(served: Served) -> str:
    return served.log.read_text()


SPIN = "while True: pass"
SLEEP = "import time; time.sleep(600)"


def turns(code: str, seconds: float, *, pause_s: float = 0.0, idle_s: float = 1.0, busy_s: float = 60.0) -> str:
    """Why a process without any sign of life counts as dead to an observer of so many seconds, who stops it for `pause_s` of
    each turn; the empty string if it does not."""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        silence, why = Silence(process.pid, idle_s, busy_s), ""
        while not why and silence.seconds < seconds:
            if pause_s:
                process.send_signal(signal.SIGSTOP)
                time.sleep(pause_s)
                why = silence.go_on(0.1)
                process.send_signal(signal.SIGCONT)
                time.sleep(0.05)
            else:
                time.sleep(0.1)
                why = silence.go_on(0.1)
        return why
    finally:
        process.kill()
        process.wait()


def test_a_process_that_computes_is_alive_and_one_that_does_not_is_dead() -> None:
    assert turns(SLEEP, 5.0) == "gave no sign of life for 1 s"
    assert turns(SPIN, 2.0) == ""
    assert turns(SPIN, 2.0, pause_s=0.05) == ""  # starved, and mostly stopped where it is looked at
    assert turns(SPIN, 5.0, busy_s=0.5) == "gave no sign of life for 0.5 s, though it computed"


def test_a_folder_goes_with_the_process_that_made_it_or_when_the_next_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from common.serve.folder import PrivateFolder; print(PrivateFolder.make().path, flush=True); input()"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    start = lambda: subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1, text=True)  # noqa: E731
    with start() as dead, start() as living:
        assert dead.stdout and living.stdout
        left, held = (Path(process.stdout.readline().strip()) for process in (dead, living) if process.stdout)
        (left / "socket").touch()
        assert left.stat().st_mode & 0o777 == 0o700
        dead.kill()
        dead.wait()
        made = PrivateFolder.make()
        assert sorted(tmp_path.iterdir()) == sorted([held, made.path])
        made.remove()
        assert list(tmp_path.iterdir()) == [held]
        living.kill()


def test_what_a_backend_says_of_its_refusals_comes_through(served: Served) -> None:
    late = served.post(**BODY, deadline=0.0)
    assert (late.status_code, late.headers["x-should-retry"]) == (504, "false")


def test_backends_are_not_told_the_key_and_their_lines_carry_their_names(tmp_path: Path) -> None:
    packages, _ = history(tmp_path, "one", "two")
    with serving(tmp_path, "--backend", "one,two", "--api-key", "very-secret", packages=[packages]) as server:
        for child in psutil.Process(server.process.pid).children():
            assert "very-secret" not in " ".join(child.cmdline())
        server.client.headers["authorization"] = "Bearer very-secret"
        assert server.post(**BODY, model="tiny-llama@two").status_code == 200
        log = server.log.read_text()
        assert "INFO [two] common.serve.serving: Ended." in log and "HTTP Request" not in log


def test_what_outlasts_the_drain_is_told_so_behind_the_front_too(tmp_path: Path) -> None:
    packages, control = history(tmp_path, "one", "two")
    (control / "slow").touch()
    with serving(tmp_path, "--backend", "one,two", "--drain-s", "1", packages=[packages]) as server:
        expect_told_that_it_ends(server)


def test_all_names_of_a_model_and_what_goes_with_an_answer_come_through(tmp_path: Path) -> None:
    packages, control = history(tmp_path, "one", "two")
    (control / "slow").touch()
    names, few = ("--served-model-name", "a", "b"), ("--max-num-seqs", "1", "--max-waiting", "1")
    with serving(tmp_path, "--backend", "one,two", *names, *few, packages=[packages]) as server:
        listed = [model["id"] for model in server.client.get("/v1/models").json()["data"]]
        assert sorted(listed) == ["a", "a@one", "a@two", "b", "b@one", "b@two"]
        answers = {name: server.complete(**BODY, model=name)["model"] for name in listed}
        assert answers == {name: "a@two" if name.endswith("two") else "a@one" for name in listed}
        with ThreadPoolExecutor(3) as users:
            long = {"prompt": "the", "max_tokens": 100, "ignore_eos": True}
            asked = [users.submit(server.post, **long, stream=True) for _ in range(3)]
            ends = sorted([user.result() for user in asked], key=lambda answer: answer.status_code)
        assert [answer.status_code for answer in ends] == [200, 200, 429]
        assert ends[2].headers["retry-after"] == "1" and ends[0].headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_backends_end_with_the_front_also_while_they_load(tmp_path: Path, how: signal.Signals) -> None:
    packages, control = history(tmp_path, "one", "two")
    (control / "load").touch()
    command = [sys.executable, "-m", "common.serve", "--model", "tiny-llama", "--port", "0", "--backend", "one,two"]
    env = os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", "TMPDIR": str(tmp_path)}
    front = subprocess.Popen(command, env=env)
    try:
        until(lambda: (control / "loading").exists())
        children = psutil.Process(front.pid).children()
        assert len(children) == 2 and list(tmp_path.glob("tandem-*"))
        front.send_signal(how)
        assert front.wait(PATIENCE_S) == (TERMINATED if how is signal.SIGTERM else -how)
        until(lambda: not any(child.is_running() for child in children))  # which would load for ever
        assert how is signal.SIGKILL or not list(tmp_path.glob("tandem-*"))
    finally:
        (control / "load").unlink()
        front.kill()


def test_a_second_ctrl_c_ends_at_once_with_all_backends(mortal: Served) -> None:
    children = psutil.Process(mortal.process.pid).children()
    with raw_request(mortal, prompt="the", max_tokens=400, ignore_eos=True):
        until(lambda: mortal.metric("num_requests_running") == 1)
        interrupt_twice(mortal)
    until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_backends_end_with_the_front_however_it_ends(mortal: Served, how: signal.Signals) -> None:
    children = psutil.Process(mortal.process.pid).children()
    assert len(children) == 2
    os.kill(mortal.process.pid, how)
    code = mortal.process.wait()
    assert code == (0 if how is signal.SIGTERM else -signal.SIGKILL)
    until(lambda: not any(child.is_running() for child in children))


def test_no_backend_outlives_a_front_that_is_killed_not_even_one_that_is_stopped_or_hangs(tmp_path: Path) -> None:
    """Neither sees that its standard input ends, or can act on it."""
    packages, control = history(tmp_path, "one", "two")
    with serving(tmp_path, "--backend", "one,two", packages=[packages]) as server:
        children = psutil.Process(server.process.pid).children()
        assert len(children) == 2
        (control / "hang").touch()
        with raw_request(server, **BODY, model="tiny-llama@one"):
            until((control / "hanging").exists)
            backend_of(server, "tiny-llama@two").suspend()
            server.process.kill()
            try:
                assert Awake().wait(lambda: not any(child.is_running() for child in children)) < 2
            finally:
                for child in children:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()


def test_the_page_shows_both_answers_as_they_come(served: Served) -> None:
    seen, complaints, asked = browse(lambda browser: ask_the_page(Tab(browser, served.url, 1000, dark=False)))
    assert [column["model"] for column in seen] == ["tiny-llama@one", "tiny-llama@two"]
    assert seen[0]["answer"] == seen[1]["answer"] != ""
    assert all(column["question"] == "Say <b>it</b>" and "20 tokens · " in column["facts"] for column in seen)
    assert all("tokens/s" in column["facts"] for column in seen)
    assert complaints == []
    assert all(url.startswith((served.url, "data:")) for url in asked)


def ask_the_page(tab: Tab) -> tuple[Any, list[Any], list[str]]:
    """What its columns show after a question, what its console says, and what it asked for."""
    until(lambda: tab.evaluate("document.querySelectorAll('section').length") == 2)
    tab.evaluate("$('prompt').value = 'Say <b>it</b>'; $('max').value = 20; send(); 0")
    until(lambda: tab.evaluate("running === null"))
    return tab.evaluate(SEEN), tab.complaints(), tab.requests()


SEEN = """
[...document.querySelectorAll("section")].map(section => ({
  model: section.dataset.model,
  question: section.querySelector(".user").textContent,
  answer: section.querySelector(".assistant").firstChild.textContent,
  facts: section.querySelector(".assistant small").textContent,
}))
"""
