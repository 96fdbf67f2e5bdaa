"""The server as it is started: who may reach it, slow and greedy clients, TLS, its end."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from made import make_model

from glasklar.data.chat import Message, parse
from glasklar.engine.engine import Engine
from glasklar.engine.request import SamplingParams
from glasklar.errors import CapacityError, RequestError
from glasklar.loading import load, open_folder
from glasklar.runtime import Runtime
from glasklar.serve.access import FILE, Access
from glasklar.serve.limits import Limits
from glasklar.serve.live import LiveServer
from glasklar.serve.server import Site, opened

LIMITS = Limits(running=4, queued=8, head_seconds=2.5, stall_seconds=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Path:
    return make_model(tmp_path_factory.mktemp("made") / "m", runtime)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folder: Path, runtime: Runtime) -> Iterator[LiveServer]:
    site = Site(home=tmp_path_factory.mktemp("home"), port=0, limits=LIMITS)
    with LiveServer(folder.parent, site) as live:
        live.release(open_folder(folder, runtime))
        yield live


def body(**more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": "m", "messages": messages, "max_tokens": 20, "temperature": 1.0, "seed": 1, **more}


# --- the address ---------------------------------------------------------------------------------------------------


def test_an_address_that_others_can_reach_needs_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(RequestError, match="glasklar keys add"), opened(Site(home=tmp_path, host=host, port=0)):
            pass
    with pytest.raises(RequestError, match="--require-key"), opened(Site(home=tmp_path, port=0, key_required=True)):
        pass
    access = Access(tmp_path / FILE)
    access.add("Ada")
    with opened(Site(home=tmp_path, host="0.0.0.0", port=0, names=("box.example",))) as (_, door):
        assert (door.key_required, door.any_address, "box.example" in door.hosts) == (True, True, True)
    with opened(Site(home=tmp_path, port=0)) as (_, door):
        assert (door.key_required, door.any_address) == (False, False)
    access.revoke("Ada")
    with pytest.raises(RequestError, match="no key yet"), opened(Site(home=tmp_path, host="0.0.0.0", port=0)):
        pass


def test_a_taken_port_and_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CapacityError, match="--port"), opened(Site(home=tmp_path, port=port)):
            pass
    with pytest.raises(RequestError, match="--tls-key"):
        Site(home=tmp_path, certificate=tmp_path)
    with pytest.raises(RequestError, match="no such file"):
        Site(home=tmp_path, certificate=tmp_path / "x", private_key=tmp_path / "y")
    with pytest.raises(RequestError, match="https://chat"):
        Site(home=tmp_path, origins=("chat.example",))
    with pytest.raises(RequestError, match="--access-log"):
        Site(home=tmp_path, log_bodies=True)
    with pytest.raises(RequestError, match="can be written"), opened(Site(home=tmp_path, port=0, log="/no/such/file")):
        pass


# --- slow and greedy clients ---------------------------------------------------------------------------------------


def connected(server: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20)


def received(one: socket.socket, until: bytes) -> bytes:
    content = b""
    while not content.endswith(until) and (piece := one.recv(4096)):
        content += piece
    return content


def test_a_head_that_does_not_come_ends_the_connection(server: LiveServer) -> None:
    """Nothing, or a byte from time to time: neither holds a connection."""
    begin = time.monotonic()
    slow = {connected(server): drip for drip in (b"", b"GET", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")}
    try:
        for one, content in slow.items():
            one.sendall(content)
            one.settimeout(0.1)
        going = set(slow)
        while going and time.monotonic() < begin + 30:
            for one in list(going):
                try:
                    one.sendall(b"a" if slow[one] else b"")
                    if not one.recv(100):
                        going.discard(one)
                except TimeoutError:
                    continue
                except ConnectionError:
                    going.discard(one)
        assert not going
        assert time.monotonic() - begin > 0.8 * LIMITS.head_seconds
    finally:
        for one in slow:
            one.close()


def test_a_connection_between_requests_may_rest_a_while(server: LiveServer) -> None:
    with connected(server) as one:
        for _ in range(2):
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert received(one, b"}").startswith(b"HTTP/1.1 200")
            time.sleep(2.6)


def test_what_is_no_http_gets_the_one_shape_of_errors(server: LiveServer) -> None:
    for content in (b"\x16\x03\x01 nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nX" + b"y" * 70_000):
        with connected(server) as one:
            one.sendall(content)
            reply = received(one, b"}}")
        head, _, content = reply.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_takes_nothing_is_let_go(server: LiveServer) -> None:
    service = server._backend.service
    assert service is not None
    content = json.dumps(body(stream=True, max_tokens=1900, n=4, logprobs=True, top_logprobs=20)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connected(server) as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        deadline = time.monotonic() + 60
        while not service.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while service.waiting:
            assert time.monotonic() < deadline, "it is still written for"
            time.sleep(0.05)


def test_ten_times_the_queue_gets_200_or_429_and_then_all_is_as_before(server: LiveServer) -> None:
    """All arrive while the engine stands still, so that no place comes free too early."""
    service, count = server._backend.service, 10 * LIMITS.queued
    assert service is not None

    def ask(seed: int) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/chat/completions", json=body(seed=seed, stream=True), timeout=120)

    before = [contents(ask(seed)) for seed in range(2)]
    with ThreadPoolExecutor(count) as pool:
        os.kill(service.status["pid"], signal.SIGSTOP)
        try:
            asked = [pool.submit(ask, seed) for seed in range(count)]
            deadline = time.monotonic() + 60
            while sum(one.done() for one in asked) < count - LIMITS.requests:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            os.kill(service.status["pid"], signal.SIGCONT)
        replies = [one.result() for one in asked]
    assert Counter(reply.status_code for reply in replies) == {200: LIMITS.requests, 429: count - LIMITS.requests}
    for reply in replies:
        if reply.status_code == 200:
            assert reply.text.endswith("data: [DONE]\n\n")
            assert 'data: {"error"' not in reply.text
        else:
            assert int(reply.headers["retry-after"]) > 0
            assert reply.json()["error"]["code"] == "rate_limit_exceeded"
    assert [contents(ask(seed)) for seed in range(2)] == before
    assert service.waiting == 0


def test_under_load_answers_are_right_or_their_loss_is_said(server: LiveServer, folder: Path, runtime: Runtime) -> None:
    """Streams side by side, every fourth left early, the engine killed in the middle; whole answers are those of the
    bare engine alone. Afterwards nothing is held any more. (bench/serving.py is the long version.)"""
    service = server._backend.service
    assert service is not None
    model, seeds = load(folder, runtime), range(8)
    prompt = service.prompt([Message(role="user", content="hello")], None)
    wanted = {}
    for seed in seeds:
        params = SamplingParams(max_tokens=60, temperature=1.0, seed=seed, stop_ids=service.tokenizer.stop_ids)
        [completion] = Engine(model.network, max_slots=1).generate([prompt], params)
        wanted[seed] = parse(service.tokenizer, completion.ids, None).content

    def ask(number: int) -> str:
        seed = number % len(seeds)
        wish = body(seed=seed, stream=True, max_tokens=60)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=wish, timeout=120) as reply:
            if number % 4 == 0:
                next(reply.iter_lines())
                return "left"
            reply.read()
        if reply.status_code != 200 or 'data: {"error"' in reply.text:
            return "told" if number < 12 else f"{reply.status_code}: {reply.text[-300:]}"
        return "right" if contents(reply) == wanted[seed] else "wrong"

    with ThreadPoolExecutor(12) as pool:
        pid = service.status["pid"]
        first = [pool.submit(ask, number) for number in range(12)]
        while service.status["running"] < LIMITS.running:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        outcomes = Counter(one.result() for one in first)
        outcomes += Counter(pool.map(ask, range(12, 32)))
    assert set(outcomes) <= {"left", "right", "told"}
    assert 1 <= outcomes["told"] <= LIMITS.running
    assert outcomes["right"] >= 15
    assert service.waiting == 0
    with httpx.Client(base_url=server.url, timeout=60) as client:
        found = client.get("/engine").json()
    assert (found["running"], found["queued"]) == (0, 0)
    assert (found["counters"]["running"], found["counters"]["pages_of_requests"]) == (0, 0)


def contents(reply: httpx.Response) -> str:
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


def test_ready_and_health(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").json()["model"] == "m"


# --- TLS and the end -----------------------------------------------------------------------------------------------


def certificate(folder: Path) -> tuple[Path, Path]:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    formats = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *formats))
    return paths


def test_the_command_serves_over_tls_with_keys_and_finishes_what_it_streams(folder: Path, tmp_path: Path) -> None:
    """`glasklar serve` on all addresses. A signal comes in the middle of an answer, whose end still arrives; meanwhile
    nobody else is let in. The log and the usage are complete."""
    access = Access(tmp_path / FILE)
    key, secret = access.add("Ada")
    chain, private = certificate(tmp_path)
    log = tmp_path / "access.jsonl"
    words = ["serve", str(folder), "--host", "0.0.0.0", "--port", "0", "--threads", "1", "--access-log", str(log)]
    command = [sys.executable, "-m", "glasklar.cli", *words, "--tls-cert", str(chain), "--tls-key", str(private)]
    environ = {**os.environ, "GLASKLAR_HOME": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environ, text=True)
    try:
        usage = _stream_through_the_end(process, chain, secret)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()
    [row] = access.usage()
    assert (row["key"], row["requests"]) == (key.id, 1)
    assert row["completion_tokens"] == usage["completion_tokens"]
    assert row["prompt_tokens"] == usage["prompt_tokens"]
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(entry["status"], entry["key"]) for entry in entries] == [(401, None), (200, "Ada")]
    assert entries[1]["completion_tokens"] == usage["completion_tokens"]


def _stream_through_the_end(process: subprocess.Popen[str], chain: Path, secret: str) -> dict[str, int]:
    """Begins an answer, tells the server to end, reads the answer to its end; returns its usage."""
    assert process.stdout is not None
    url = process.stdout.readline().split(" at ")[1].split()[0]
    assert url.startswith("https://127.0.0.1:")
    trust = ssl.create_default_context(cafile=str(chain))
    with httpx.Client(base_url=url, verify=trust, timeout=60) as client:
        assert client.get("/").status_code == 401
        client.headers["authorization"] = f"Bearer {secret}"
        wish = body(stream=True, max_tokens=1500, stream_options={"include_usage": True})
        with client.stream("POST", "/v1/chat/completions", json=wish) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    usage = json.loads(rest[-2].removeprefix("data: "))["usage"]
    assert usage["completion_tokens"] > 100
    return dict(usage)
