"""How a server ends, hangs, fails and goes on; over a backend without a framework, whose failures are ordered by files."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http_server import Served, history, serving, until


@pytest.fixture
def control(tmp_path: Path) -> Path:
    history(tmp_path)
    return tmp_path / "control"


@pytest.fixture
def served(tmp_path: Path, control: Path) -> Iterator[Served]:
    with serving(tmp_path, "--backend", "history", "--max-model-len", "512", "--stall-s", "0.2", "--log-json",
                 packages=[tmp_path / "packages"]) as server:  # fmt: skip
        yield server


LONG: dict[str, Any] = {"prompt": "a long one", "max_tokens": 60, "ignore_eos": True}


def test_told_to_end_it_finishes_what_runs_and_takes_nothing_new(served: Served, control: Path) -> None:
    (control / "slow").touch()
    whole: list[Any] = []
    reader = threading.Thread(target=lambda: whole.extend(served.events(**LONG, return_token_ids=True)))
    reader.start()
    until(lambda: served.metric("generation_tokens_total") > 3)
    assert served.stop() == 0
    reader.join()
    assert sum(len(chunk["choices"][0]["token_ids"]) for chunk in whole) == 60
    assert whole[-1]["choices"][0]["finish_reason"] == "length"


def test_a_step_loop_that_died_is_not_healthy_and_requests_learn_of_it(served: Served, control: Path) -> None:
    (control / "slow").touch()
    seen: list[Any] = []
    reader = threading.Thread(target=lambda: seen.extend(served.events(**LONG)))
    reader.start()
    until(lambda: served.metric("generation_tokens_total") > 3)
    (control / "die").touch()
    reader.join()
    assert seen[-1]["error"]["code"] == 503 and "choices" in seen[-2]
    for answer in (served.client.get("/health"), served.post(**LONG), served.client.get("/metrics")):
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "ServiceUnavailableError")
    assert served.client.get("/v1/models").status_code == 200
    assert served.stop() == 0


def test_a_step_that_hangs_is_not_healthy_until_it_goes_on(served: Served, control: Path) -> None:
    (control / "hang").touch()
    reader = threading.Thread(target=served.complete, kwargs=LONG)
    reader.start()
    until(lambda: served.client.get("/health").status_code == 503)
    (control / "hang").unlink()
    reader.join()
    until(lambda: served.client.get("/health").status_code == 200)


def test_a_request_whose_steps_raise_fails_without_telling_why(served: Served, control: Path) -> None:
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


def test_the_log_names_requests_and_never_what_they_say(served: Served) -> None:
    answer = served.client.post("/v1/completions", json=LONG, headers={"x-request-id": "my-own-7"})
    assert answer.headers["x-request-id"] == "my-own-7"
    evil = served.client.post("/v1/completions", json=LONG, headers={"x-request-id": "a b{}" + "x" * 500})
    assert evil.headers["x-request-id"].isalnum()
    lines = [json.loads(line) for line in served.log.read_text().splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line.get("request_id") == "my-own-7" and "status" in line]
    assert (line["path"], line["status"]) == ("/v1/completions", 200)
    assert "a long one" not in served.log.read_text()


def test_a_key_is_asked_for(tmp_path: Path, control: Path) -> None:
    with serving(tmp_path, "--backend", "history", "--api-key", "secret", packages=[tmp_path / "packages"]) as served:
        for given in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "secret"},
            {"authorization": "Bearer " + "x" * 9999},
        ):
            answer = served.client.get("/v1/models", headers=given)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthenticationError")
        assert served.client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert served.client.get("/").status_code == 200
        assert served.post("/reset_prefix_cache").status_code == 401
        assert served.client.post("/reset_prefix_cache", headers={"authorization": "Bearer secret"}).status_code == 404


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "99999"], "Cannot listen"),
        (["--backend", "nothing"], "Unknown backend"),
        (["--model", "no-such-model"], "Unknown model"),
        (["--prot", "8000"], "--port"),
        (["--backend", "history,history"], "twice"),
        (["--backend", "history,nothing"], "exit code 2"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(
    tmp_path: Path,
    control: Path,
    options: list[str],
    says: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from common.serve.__main__ import main

    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    assert main(["--model", "tiny-llama", "--port", "0", "--backend", "history", *options]) == 2
    assert says in capfd.readouterr().err
