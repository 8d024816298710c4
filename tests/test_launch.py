"""Ranks that somebody else has launched, as `torchrun` does: the tokens are those of ranks that an engine starts by itself, one
that is lost is started again, and a launch that cannot go on ends with one clear error and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest

from common import launch
from common.config import EngineConfig
from common.engine import Engine, build_engine
from common.errors import BackendError, ConfigError
from common.interface import ServingEngine
from common.launch import Launched, gather, launched
from common.process import connection
from common.process.agents import Agents, RemoteProcess, machine
from common.process.frames import MAGIC, write_frame
from common.process.secret import SECRET
from common.replicas.data_parallel import Replicas
from common.replicas.factory import open_engine
from common.request import Request, SamplingParams, TokenEvent
from tests.backends import checkpoint
from tests.history_backend import ROOT
from tests.test_lost_ranks import CLOCK, ENDS, ENGINE, MODEL, NOTICED_S, PROMPTS, STAGES, alive, others

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, logprobs=1)
ASKED = [Request(request_id=str(i), prompt_token_ids=prompt, params=PARAMS) for i, prompt in enumerate(PROMPTS)]
BOTH = replace(ENGINE, pipeline_parallel_size=2)
TOKENS = """
import json, sys
from common.engine import build_engine
from tests.backends import checkpoint
from tests.test_launch import MODEL, SHARED, run
engine = build_engine(sys.argv[1], checkpoint(MODEL), SHARED[sys.argv[1]])
print(json.dumps([run(engine), engine.stats()["others_rss_bytes"] > 0]), flush=True)
sys.stdin.read()
engine.close()
"""
"""A module that computes on two ranks, tells what, and ends at the end of its input."""
LATE = """
import time
from common.process import workers

class Late:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, name):
        time.sleep({seconds} if name == "{call}" else 0)
        return self.calls[name]

follow = workers.follow
workers.follow = lambda calls, failed: follow(Late(calls), failed)
"""
"""Of a process that comes late to a call."""
NATIVE_STAGES = replace(STAGES, kernels="native")
"""The bits of these kernels depend on no batch size and no memory address; those of a library's matmul may."""
SHARED = {"jax": ENGINE, "torch": NATIVE_STAGES}
"""How a model is shared out there."""
TOLD = Launched(0, 2, "127.0.0.1", 0, "right, and long enough")


def free_port() -> int:
    """Whose successor is free too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            return port


def start(*command: str, environment: Mapping[str, str], where: Path = ROOT, **options: Any) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(where), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environment, text=True, **options)


def place(rank: int, size: int, port: int) -> dict[str, str]:
    """What `torchrun` tells a process."""
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@contextmanager
def launch_of(size: int, where: Path = ROOT) -> Iterator[tuple[Agents, list[subprocess.Popen[str]]]]:
    """This process is the first of so many; the others, which all end with it."""
    port = free_port()
    started = [start("common.launch", "no", environment=place(rank, size, port), where=where) for rank in range(1, size)]
    with gather(launched(place(0, size, port))) as found:
        yield found, started
    assert [process.wait(30) for process in started if process.returncode is None] == [0] * len(started)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Agents]:
    with launch_of(2) as (found, _):
        adopt(found, monkeypatch)
        yield found


def adopt(found: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on engines of this process are of a launch."""
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)


@contextmanager
def opened(config: EngineConfig) -> Iterator[ServingEngine]:
    """An engine of JAX's processes, as whoever serves requests has it."""
    engine = open_engine("jax", checkpoint(MODEL), config)
    try:
        yield engine
    finally:
        engine.close()


def started_by(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def all_end(processes: Sequence[psutil.Process]) -> bool:
    """Soon: of processes that others have started it is known that they let go of everything, not that they are no more."""
    begin = CLOCK.seconds
    while alive(processes) and CLOCK.seconds - begin < NOTICED_S:
        time.sleep(0.01)
    return not alive(processes)


def run(engine: ServingEngine) -> dict[str, list[Any]]:
    """Tokens of each prompt, and how likely they were."""
    engine.reset_prefix_cache()
    return {name: [token_of(event) for event in each] for name, each in engine.run(ASKED).items()}


def tokens(told: dict[str, list[Any]]) -> dict[str, list[int]]:
    """Of what `run` tells, that alone."""
    return {name: [token for token, _ in each] for name, each in told.items()}


def token_of(event: TokenEvent) -> list[Any]:
    return [event.token_id, event.logprobs and event.logprobs.logprob]


@contextmanager
def engine_of(config: EngineConfig, model: str = MODEL) -> Iterator[Engine]:
    engine = build_engine("torch", checkpoint(model), config)
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("config", "model"),
    [
        pytest.param(ENGINE, MODEL, id="ranks", marks=pytest.mark.accept),
        pytest.param(replace(ENGINE, kernels="native", dtype="bfloat16"), MODEL, id="ranks of native kernels"),
        pytest.param(STAGES, MODEL, id="stages", marks=pytest.mark.accept),
        pytest.param(NATIVE_STAGES, MODEL, id="stages of native kernels"),
        pytest.param(BOTH, MODEL, id="both", marks=pytest.mark.accept),
        pytest.param(replace(STAGES, pipeline_parallel_size=3), "tiny-qwen3", id="three stages", marks=pytest.mark.accept),
    ],
)
def test_launched_ranks_compute_the_bits_of_those_that_an_engine_starts(
    config: EngineConfig, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(config, model) as engine:
        right = run(engine)
        told = engine.stats()["communication_bytes"]
    with launch_of(config.ranks) as (found, started):
        adopt(found, monkeypatch)
        with engine_of(config, model) as engine:
            last = others(engine.runner)
            assert [other.ppid() for other in last] == [process.pid for process in started]
            assert run(engine) == right
            stats = engine.stats()
            assert stats["communication_bytes"] == told > 0 and stats["others_rss_bytes"] > 0 and stats["num_resets"] == 0
        assert all_end(last)


@pytest.mark.parametrize("config", [ENGINE, NATIVE_STAGES], ids=["ranks", "stages"])
@pytest.mark.parametrize("end", ["killed", "stopped", pytest.param("exited", marks=pytest.mark.accept)])
def test_a_launched_rank_that_is_lost_is_started_again_and_costs_nobody_a_token(
    two: Agents, config: EngineConfig, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(config) as engine:
        right = run(engine)
        (other,) = others(engine.runner)
        lost: list[bool] = []

        def hand_out(*arguments: Any) -> Any:
            given = whole(*arguments)
            if not lost:
                lost.append(True)
                ENDS[end](other)
            return given

        whole = engine.runner.group._hand_out  # type: ignore[attr-defined]
        monkeypatch.setattr(engine.runner.group, "_hand_out", hand_out)  # type: ignore[attr-defined]
        assert run(engine) == right and lost
        assert others(engine.runner) != [other]


@pytest.mark.parametrize("config", [ENGINE, STAGES], ids=["ranks", "stages"])
def test_an_engine_whose_agent_is_lost_ends_with_one_error(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with launch_of(2) as (found, started):
        adopt(found, monkeypatch)
        with engine_of(config) as engine:
            (other,) = others(engine.runner)
            begin = CLOCK.seconds
            started[0].kill()
            started.pop().wait()
            with pytest.raises(BackendError, match=r"No rank can be started at 127\.0\.0\.1:\d+"):
                run(engine)
            assert CLOCK.seconds - begin < NOTICED_S
        assert all_end([other])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ENGINE, id="framework", marks=pytest.mark.accept),
        pytest.param(replace(ENGINE, kernels="native", dtype="bfloat16"), id="native"),
        pytest.param(BOTH, id="stages", marks=pytest.mark.accept),
    ],
)
def test_processes_of_jax_compute_the_bits_of_ranks_in_one(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with launch_of(2) as (found, (agent,)):
        with closing(Replicas("jax", checkpoint(MODEL), config)) as alone:  # in whose process JAX has devices enough
            right = run(alone)
        adopt(found, monkeypatch)
        with opened(config) as engine:
            assert run(engine) == right
            stats = engine.stats()
            assert stats["num_resets"] == 0 and len(started_by(agent)) == 1
            assert stats["others_rss_bytes"] > stats["replicas"][0]["others_rss_bytes"] > 0
            last = started_by(agent)
        assert all_end(last)


@pytest.mark.parametrize(
    ("who", "end"),
    [
        pytest.param("another", "killed", marks=pytest.mark.accept),
        pytest.param("another", "stopped", marks=pytest.mark.accept),
        pytest.param("another", "exited", marks=pytest.mark.accept),
        pytest.param("the first", "killed", marks=pytest.mark.accept),
        pytest.param("the first", "stopped", marks=pytest.mark.accept),
    ],
)
def test_a_process_of_jax_that_is_lost_costs_nobody_a_token(who: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with launch_of(2) as (found, (agent,)):
        adopt(found, monkeypatch)
        with opened(replace(ENGINE, kernels="native")) as engine:
            right = run(engine)
            for request in ASKED:
                engine.add(request)
            begun = engine.step(1.0)
            (other,), (state,) = started_by(agent), engine.replicas
            begin = CLOCK.seconds
            ENDS[end](other if who == "another" else psutil.Process(state.pid))
            while engine.replicas[0].serves and engine.replicas[0].pid == state.pid:
                time.sleep(0.01)
            assert CLOCK.seconds - begin < NOTICED_S
            while engine.has_work:
                begun += engine.step(0.1)
            assert {name: [token_of(event) for event in begun if event.request_id == name] for name in right} == right
            assert engine.stats()["num_replicas_lost"] == 1
            assert all_end([other])
            last = [*started_by(agent), psutil.Process(engine.replicas[0].pid)]
        assert all_end(last)


@pytest.mark.accept
def test_a_process_of_jax_may_be_late_by_more_than_xla_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(LATE.format(call="warmup", seconds=35))
    with closing(build_engine("jax", checkpoint(MODEL), replace(ENGINE, tensor_parallel_size=1))) as alone:
        right = tokens(run(alone))
    with launch_of(2, tmp_path) as (found, _):
        adopt(found, monkeypatch)
        with opened(ENGINE) as engine:
            assert tokens(run(engine)) == right


@pytest.mark.accept
def test_why_an_engine_of_jax_cannot_be_is_told_while_another_process_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LATE.format(call="load", seconds=60))
    with launch_of(2, tmp_path) as (found, (agent,)):
        adopt(found, monkeypatch)
        with pytest.raises(ConfigError, match="num_blocks=1000000000 pages"), opened(replace(ENGINE, num_blocks=10**9)):
            pass
        assert not started_by(agent)


def test_ranks_that_processes_of_jax_cannot_share_out_are_refused(two: Agents) -> None:
    with pytest.raises(BackendError, match=r"tensor_parallel_size=1 cannot .* Set a multiple of 2, or launch another"):
        build_engine("jax", checkpoint(MODEL), STAGES)


def test_more_ranks_than_were_launched_are_refused(two: Agents) -> None:
    with pytest.raises(BackendError, match="of 3 ranks needs as many processes, and 2 were launched"):
        build_engine("torch", checkpoint("tiny-qwen3"), replace(STAGES, pipeline_parallel_size=3))


def test_stages_may_be_on_several_machines_and_ranks_may_not(two: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    (agent,) = two.all
    assert agent.machine == machine()
    adopt(two._replace(all=[agent._replace(machine="another")]), monkeypatch)
    with pytest.raises(BackendError, match=r"tensor_parallel_size=2 has ranks that add up in memory .* on several machines"):
        build_engine("torch", checkpoint(MODEL), ENGINE)
    with engine_of(STAGES) as engine:
        assert run(engine)
        assert engine.stats()["others_rss_bytes"] == 0  # which has another process by that number


def test_who_launches_more_than_an_engine_needs_is_told(two: Agents, caplog: pytest.LogCaptureFixture) -> None:
    open_engine("torch", checkpoint(MODEL), replace(ENGINE, tensor_parallel_size=1)).close()
    assert "Of the 2 processes of this launch 1 have nothing to do for an engine of 1 rank: see tensor_p" in caplog.text


def test_an_agent_starts_nothing_without_the_secret(two: Agents) -> None:
    for wrong in ("", "wrong", "\ud800", two.secret[:-1]):
        with pytest.raises(BackendError, match=r"No rank can be started at .* Set TANDEM_LAUNCH_SECRET to the same text"):
            RemoteProcess(two.all[0], wrong, "torch")
    assert not psutil.Process(two.all[0].pid).children()


def test_an_agent_starts_no_entry_point_that_is_not_listed(two: Agents) -> None:
    for entry in ("os:mkdir", "builtins:print", "torchinfer.parallel:_follow", "", None, ["torch"], {}):
        with pytest.raises(BackendError, match="An agent starts jax or torch, and was asked for"):
            RemoteProcess(two.all[0], two.secret, entry, "/nowhere")
    assert not psutil.Process(two.all[0].pid).children()


def test_an_agent_that_had_no_descriptors_left_starts_ranks_afterwards() -> None:
    few = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)); "
        "sys.argv = ['launch', 'nothing']; runpy.run_module('common.launch', run_name='__main__')"
    )
    environment, command = place(1, 2, free_port()), [sys.executable, "-c", few]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE)
    with process, gather(launched(environment | {"RANK": "0"})) as found:
        (agent,) = found.all
        strangers = [socket.create_connection((agent.host, agent.port)) for _ in range(60)]
        assert process.stderr and b"Too many open files" in process.stderr.readline()
        for stranger in strangers:
            stranger.close()
        expect_starts(found)


def test_an_agent_leaves_what_all_are_told_to_the_first(two: Agents) -> None:
    expect_starts(two)
    os.kill(two.all[0].pid, signal.SIGTERM)
    expect_starts(two)


def expect_starts(found: Agents) -> None:
    """Expect a process, which is ended at once."""
    there = RemoteProcess(found.all[0], found.secret, "torch")
    psutil.Process(there.pid).kill()
    there.watch()
    there.end()


def test_a_stage_accepts_a_connection_with_the_secret() -> None:
    silent = []
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]

        def come() -> None:
            silent.append(socket.create_connection(("127.0.0.1", port)))  # delays nobody
            for secret in ("wrong", "\ud800", TOLD.secret):
                with suppress(OSError), connection.connect("127.0.0.1", port, secret, {})[0] as line:
                    line.sendall(secret[:5].encode())

        threading.Thread(target=come).start()
        with connection.accept_one(door, TOLD.secret) as line:
            assert line.recv(16) == b"right"
    silent[0].close()


def hello_of(rank: Any, size: int = 2) -> dict[str, Any]:
    """Of a process of a launch."""
    return {"rank": rank, "size": size, "port": 7, "machine": "ours", "pid": 8}


def come_as(hello: dict[str, Any], told: Launched, within: float = 30) -> socket.socket:
    """Connect to the first process, as `launch.follow` does, once it listens. Raises `OSError` after so many seconds."""
    deadline = time.monotonic() + within
    while True:
        try:
            line, _ = connection.connect(told.host, told.port, told.secret, hello)
        except connection.Refused:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        connection.send(line, {})
        return line


@contextmanager
def gathering(told: Launched, come: Callable[[], object]) -> Iterator[Agents]:
    """The first process, while `come` runs on a thread."""
    with ThreadPoolExecutor(1) as pool:
        came = pool.submit(come)
        with gather(told) as found:
            yield found
            came.result(30)


def read_until_closed(line: socket.socket) -> bytes:
    line.settimeout(30)
    parts = [b""]
    with suppress(ConnectionResetError):  # closed with bytes that were not read
        parts += iter(partial(line.recv, 4096), b"")
    return b"".join(parts)


def frame_of(text: bytes) -> bytes:
    """A frame with a text that need not be JSON."""
    return MAGIC + struct.pack("<IQ", len(text), 0) + text


def test_a_stranger_that_comes_first_learns_nothing_and_does_not_disturb(caplog: pytest.LogCaptureFixture) -> None:
    told, heard, strangers = TOLD._replace(port=free_port()), list[bytes](), list[socket.socket]()

    def come() -> None:
        while not strangers:
            with suppress(OSError):
                strangers.append(socket.create_connection((told.host, told.port)))  # says nothing, and stays
        plain = {"rank": 1, "size": 2, "port": 6, "machine": "ours", "pid": 8}
        nested = [frame_of(b'{"hello":{"":' + b"[" * depth + b"]" * depth + b"}}") for depth in range(900, 1000, 2)]
        messages = (plain, {"hello": plain}, {"hello": plain, "nonce": [], "proof": "é"})
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"", *messages, *nested, frame_of(b"{}") * 2):
            with socket.create_connection((told.host, told.port)) as line:
                strangers.append(line)
                with line.makefile("wb") as stream:
                    stream.write(said) if isinstance(said, bytes) else write_frame(stream, said)
                    stream.flush()
                with suppress(OSError):  # where the connection is reset by now
                    line.shutdown(socket.SHUT_WR)
                heard.append(read_until_closed(line))
        for lost in (hello_of([1]), hello_of(2) | {"port": 6}, {}):  # of another version, or of another launch
            with suppress(OSError):
                connection.connect(told.host, told.port, told.secret, lost)[0].close()
        come_as(hello_of(1), told).close()

    begin = time.monotonic()
    with gathering(told, come) as found:
        assert found.all == [("127.0.0.1", 7, "ours", 8)]
    assert time.monotonic() - begin < connection.HANDSHAKE_S / 2
    assert all(told.secret.encode() not in each for each in heard) and "A connection from 127.0.0.1 was closed" in caplog.text
    strangers[0].close()


@contextmanager
def flood(told: Launched, message: bytes) -> Iterator[None]:
    """From two threads, open connections without a pause, up to 600 at the same time. Each sends the message byte by byte, and
    is opened again where it was closed."""
    over = threading.Event()

    def open_all() -> None:
        held: deque[tuple[socket.socket, Iterator[int]]] = deque()
        with ExitStack() as all_closed:
            all_closed.callback(lambda: [line.close() for line, _ in held])
            while not over.is_set():
                with suppress(OSError):
                    line = socket.create_connection((told.host, told.port), 1)
                    held.append((line, iter(message)))
                if len(held) > 300:
                    held.popleft()[0].close()
                for line, unsent in list(held)[-20:]:
                    with suppress(OSError):
                        line.sendall(bytes(islice(unsent, 1)))

    threads = [threading.Thread(target=open_all) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("message", [b"", b"GET / HTTP/1.1", b"TNDM\xff\0\0\0" + bytes(100)], ids=["silent", "garbage", "slow"])
def test_a_rank_gets_through_a_flood_of_strangers(
    message: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "PATIENCE_S", 8)
    told = TOLD._replace(port=free_port())

    def come() -> None:
        with flood(told, message):
            time.sleep(0.5)
            begin = time.monotonic()
            come_as(hello_of(1), told, within=5).close()
            assert time.monotonic() - begin < 5

    with gathering(told, come) as found:
        assert [agent.pid for agent in found.all] == [8]
    assert len(caplog.records) < 100


def test_a_replayed_handshake_is_refused() -> None:
    told, recorded = TOLD._replace(port=free_port()), list[bytes]()

    def come() -> None:
        with suppress(ConnectionError), socket.create_server(("127.0.0.1", 0)) as tap:
            listen = threading.Thread(target=relay, args=(tap, told, recorded))
            listen.start()
            with come_as(hello_of(1, size=3), told._replace(port=tap.getsockname()[1])):
                listen.join()
        with socket.create_connection((told.host, told.port)) as line:
            line.sendall(recorded[0])
            assert b"The secrets differ" in read_until_closed(line)
        come_as(hello_of(1), told).close()

    with gathering(told, come) as found:
        assert [agent.pid for agent in found.all] == [8]
    assert told.secret.encode() not in recorded[0] and b'"proof"' in recorded[0]


def relay(tap: socket.socket, told: Launched, recorded: list[bytes]) -> None:
    """Pass one handshake on to the first process, and record what its connector sends."""
    near, _ = tap.accept()
    while True:
        with suppress(OSError):
            far = socket.create_connection((told.host, told.port))
            break
    with near, far:
        near.sendall(far.recv(4096))
        recorded.append(near.recv(4096))
        far.sendall(recorded[0])
        near.sendall(far.recv(4096))


def test_a_wrong_secret_is_refused_and_both_sides_say_so(caplog: pytest.LogCaptureFixture) -> None:
    told = TOLD._replace(port=free_port())

    def come() -> None:
        with pytest.raises(BackendError, match=r"The secrets differ\. Set TANDEM_LAUNCH_SECRET to the same text for all"):
            launch.follow(told._replace(rank=1, secret="another secret of 16"))
        come_as(hello_of(1), told).close()

    with gathering(told, come):
        pass
    assert (
        "127.0.0.1 was closed: it did not prove that it knows the secret of this launch (TANDEM_LAUNCH_SECRET)" in caplog.text
    )


def test_a_first_process_that_does_not_know_the_secret_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as fake:
        told = Launched(1, 2, "127.0.0.1", fake.getsockname()[1], TOLD.secret)

        def answer() -> None:
            with suppress(OSError):
                while True:
                    line, _ = fake.accept()
                    connection.send(line, {"nonce": "0"})
                    connection.receive(line)
                    connection.send(line, {"answer": {}, "proof": "0" * 64})

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(BackendError, match="does not know the secret of this launch"):
            launch.follow(told)
        fake.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("host", ["10.0.0.7", "::", "0.0.0.0", "no-such-host.invalid"])
def test_a_launch_beyond_this_machine_needs_a_secret(host: str) -> None:
    with pytest.raises(
        ConfigError, match=r"is not a loopback address, .*export TANDEM_LAUNCH_SECRET=\$\(openssl rand -hex 32\)"
    ):
        launched(place(1, 2, 29500) | {"MASTER_ADDR": host})
    with pytest.raises(ConfigError, match="must have at least 16 characters, got 5"):
        launched(place(1, 2, 29500) | {"MASTER_ADDR": host, SECRET: "short"})
    assert launched(place(1, 2, 29500) | {"MASTER_ADDR": host, SECRET: TOLD.secret}).secret == TOLD.secret


def test_a_launch_on_loopback_shares_a_file_of_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    first, second = (
        launched(place(rank, 2, 29500) | {"MASTER_ADDR": host}) for rank, host in enumerate(["localhost", "127.0.0.2"])
    )
    (file,) = tmp_path.iterdir()
    assert (
        first.secret == second.secret == file.read_text() and len(first.secret) == 64 and file.stat().st_mode & 0o777 == 0o600
    )
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="must be a file that only its owner can read and write"):
        launched(place(0, 2, 29500))
    file.rename(tmp_path / "other")
    file.symlink_to("other")
    with pytest.raises(BackendError, match="cannot be read or created"):
        launched(place(0, 2, 29500))


def test_a_launch_that_does_not_come_together_names_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE_S", 0.2)
    port = free_port()
    missing = r"Of the 3 processes of this launch \[1, 2\] did not come to 127\.0\.0\.1"
    with pytest.raises(BackendError, match=missing), gather(Launched(0, 3, "127.0.0.1", port, TOLD.secret)):
        pass
    with pytest.raises(BackendError, match=rf"The first process of this launch is not at 127\.0\.0\.1:{port}"):
        launch.follow(Launched(1, 2, "127.0.0.1", port, TOLD.secret))


def test_a_process_that_was_told_something_else_is_refused() -> None:
    told, said = Launched(0, 3, "127.0.0.1", free_port(), TOLD.secret), list[str]()

    def come() -> None:
        one = come_as(hello_of(1, 3), told)
        for other in (told._replace(rank=2, size=4), told._replace(rank=1)):
            with pytest.raises(BackendError) as caught:
                launch.follow(other)
            said.append(str(caught.value))
        come_as(hello_of(2, 3), told).close()
        one.close()

    with gathering(told, come):
        pass
    assert said == [
        "WORLD_SIZE is 3 in the first process of this launch, and 4 here.",
        "Another process of this launch has come with RANK=1.",
    ]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": ""}, "RANK or SLURM_PROCID cannot be found"),
        ({"RANK": "2"}, "RANK must be less than WORLD_SIZE=2, got 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
        ({"MASTER_PORT": "65535"}, "MASTER_PORT must be less than 65535, for the port after it is used, got 65535"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "MASTER_ADDR, MASTER_PORT cannot be found"),
    ],
)
def test_what_a_launch_lacks_is_named(changed: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        launched(place(1, 2, 29500) | changed)


def test_slurm_tells_a_process_its_place_under_other_names() -> None:
    told = launched(
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", SECRET: TOLD.secret}
    )
    assert told == (3, 4, "node0", 29501, TOLD.secret)


@pytest.fixture
def module(tmp_path: Path) -> Path:
    (tmp_path / "tokens.py").write_text(TOKENS)
    return tmp_path


@pytest.mark.parametrize(
    ("launcher", "backend"),
    [("torchrun", "torch"), *(pytest.param("slurm", name, marks=pytest.mark.accept) for name in ("torch", "jax"))],
)
def test_two_launched_processes_compute_what_one_engine_does(launcher: str, backend: str, module: Path) -> None:
    with engine_of(replace(NATIVE_STAGES, pipeline_parallel_size=1)) as engine:
        right = run(engine)
    port, ours = str(free_port()), ("common.launch", "tokens", backend)
    if launcher == "torchrun":
        torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m")
        commands = [((*torchrun, *ours), {})]
    else:
        slurm = {"SLURM_NTASKS": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        commands = [(ours, slurm | {"SLURM_PROCID": rank}) for rank in "10"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "where": module}
    started = [start(*command, environment=environment, **pipes) for command, environment in commands]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started)
    told, has_others = json.loads("".join(printed).splitlines()[-1])  # of whom the first alone speaks
    assert has_others and tokens(told) == tokens(right) and (backend == "jax" or told == right)


def test_nothing_outlives_a_launch_whose_first_process_is_killed(module: Path) -> None:
    port = free_port()
    first, second = (
        start("common.launch", "tokens", "torch", environment=place(rank, 2, port), where=module, stdin=pipe, stdout=pipe)
        for rank, pipe in enumerate((subprocess.PIPE, subprocess.DEVNULL))
    )
    with first:
        assert first.stdout and first.stdout.readline()
        (rank,) = psutil.Process(second.pid).children()
        first.kill()
    begin = CLOCK.seconds
    assert second.wait(30) == 0 and CLOCK.seconds - begin < NOTICED_S
    assert all_end([rank])


@pytest.mark.accept
def test_torchrun_launches_a_benchmark_of_two_ranks(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    bench = ["experiments.bench", "engine=torch", "model=tiny-llama", "measure=quick", "parallel=tp2", "measure.limits_s=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*torchrun, "-m", "common.launch", *bench]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["engine"] == "torch" and result["completed"] > 0
