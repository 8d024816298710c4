"""The server as a deployment of Ray Serve: what it refuses, and that a killed replica costs nobody an answer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import psutil
import pytest

from experiments import ray_serve
from tests.history_backend import ROOT

RAY = ROOT / ".venv-ray" / "bin" / "python"
PATIENCE_S = 300.0
"""For Ray, and two engines, to be there."""
CLIENTS, EACH = 6, 5
REPLICA = "ServeReplica"
SMALL = ("--kernels", "framework", "--dtype", "float32", "--max-num-seqs", "8", "--max-model-len", "512")
"""Nothing is compiled that has nothing to do with Ray."""


def test_without_ray_the_server_says_how_to_get_it() -> None:
    hidden = "import sys; sys.modules['ray'] = None; from experiments import ray_serve; sys.exit(ray_serve.main([]))"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "make ray" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "smolm2-135m"], "Did you mean 'smollm2-135m'?"),
        (["--model", "tiny-llama", "--tensor-parallel-size", "3"], "tensor_parallel_size=3"),
        (["--model", "tiny-llama", "--max-model-len", "1000000"], "max_model_len"),
        (["--model", "tiny-llama", "--port", "{taken}"], "Cannot listen at 127.0.0.1:{taken}"),
    ],
)
def test_what_cannot_be_is_told_before_ray_starts(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_serve, "import_ray", lambda: (None, None))
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        free = [] if "--port" in options else ["--port", "0"]
        with pytest.raises(SystemExit) as ended:
            ray_serve.main([option.format(taken=taken) for option in [*options, *free]])
    assert ended.value.code == 2 and said.format(taken=taken) in capsys.readouterr().err


@contextmanager
def server(*options: str) -> Iterator[tuple[str, psutil.Process]]:
    """Its address, and the process that Ray's descend from."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(RAY), "-m", "experiments.ray_serve", "--model", "tiny-llama", "--port", str(port), *SMALL, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_memory_monitor_refresh_ms"] = "0"  # it ends replicas for what other programs take of the memory
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    family: list[psutil.Process] = []
    try:
        said: list[str] = []
        assert process.stdout
        for line in process.stdout:
            said.append(line)
            if line.startswith("Serving"):
                break
        else:
            pytest.fail("".join(said))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        family = psutil.Process(process.pid).children(recursive=True)
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            left = psutil.wait_procs(family, timeout=90)[1]  # of agents that look after their parent now and then
            for each in left:
                each.kill()
    assert not left, f"left behind: {left}"


def replicas(parent: psutil.Process) -> list[psutil.Process]:
    return [each for each in parent.children(recursive=True) if any(REPLICA in word for word in each.cmdline())]


@pytest.mark.accept
@pytest.mark.skipif(not RAY.exists(), reason="no .venv-ray; `make ray` brings it")
def test_every_request_gets_one_answer_while_one_of_two_replicas_is_killed() -> None:
    with server("--backend", "torch", "--replicas", "2") as (url, parent):
        first, second = replicas(parent)
        answers: dict[int, list[str]] = {}
        begun = threading.Barrier(CLIENTS + 1)

        def ask(number: int) -> None:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8, timeout=PATIENCE_S)
            begun.wait()
            for i in range(EACH):
                made = client.completions.create(
                    model="tiny-llama", prompt=f"{number} {i}", max_tokens=64, temperature=0, extra_body={"ignore_eos": True}
                )
                answers.setdefault(number, []).append(made.choices[0].text)

        clients = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        begun.wait()
        while sum(map(len, answers.values())) < CLIENTS:
            time.sleep(0.05)
        first.kill()
        for client in clients:
            client.join(PATIENCE_S)
        assert {number: len(mine) for number, mine in answers.items()} == dict.fromkeys(range(CLIENTS), EACH)

        # The same as of a replica that nobody has killed, and Ray has started another in its place.
        alone = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8, timeout=PATIENCE_S)
        again = alone.completions.create(
            model="tiny-llama", prompt="0 0", max_tokens=64, temperature=0, extra_body={"ignore_eos": True}
        )
        assert again.choices[0].text == answers[0][0]
        deadline = time.monotonic() + PATIENCE_S
        while len(replicas(parent)) < 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert len({each.pid for each in replicas(parent)} - {first.pid, second.pid}) == 1
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.accept
@pytest.mark.skipif(not RAY.exists(), reason="no .venv-ray; `make ray` brings it")
def test_the_api_is_that_of_the_server_streams_and_errors_included() -> None:
    with server("--backend", "jax", "--max-num-batched-tokens", "32", "--api-key", "let-me-in") as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="let-me-in")
        assert [model.id for model in client.models.list()] == ["tiny-llama", "tiny-llama@jax"]
        asked = {"model": "tiny-llama", "prompt": "a b c", "max_tokens": 9, "temperature": 0}
        streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))  # type: ignore[call-overload]
        assert streamed == client.completions.create(**asked).choices[0].text  # type: ignore[call-overload]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="other", prompt="a")
