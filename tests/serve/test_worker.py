"""The engine's process: its answers are the bare engine's; its end, its silence and its callers' leaving are
survived."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made import make_model

from glasklar.engine.cpu import library
from glasklar.engine.engine import Engine
from glasklar.engine.request import SamplingParams, TokenEvent
from glasklar.errors import BusyError, CapacityError, CheckpointError, RequestError
from glasklar.loading import Model, load, open_folder
from glasklar.runtime import Runtime
from glasklar.serve.grammar import GuideSpec
from glasklar.serve.limits import Limits
from glasklar.serve.messages import Loading, Message
from glasklar.serve.service import ModelService
from glasklar.serve.worker import Paced

LONG = SamplingParams(max_tokens=1500, temperature=1.0, seed=1)
SHORT = SamplingParams(max_tokens=12, temperature=1.0, seed=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Model:
    return load(make_model(tmp_path_factory.mktemp("made") / "m", runtime), runtime)


@pytest.fixture(scope="module")
def service(model: Model) -> Iterator[ModelService]:
    """Two places in the engine, so that lines form."""
    made = ModelService(model, Limits(running=2))
    yield made
    made.close()


@pytest.fixture
def patient(service: ModelService) -> Iterator[Callable[..., None]]:
    """Sets other deadlines for one test."""

    def set_limits(**seconds: float) -> None:
        service.limits = service._link.limits = Limits(**seconds)  # type: ignore[arg-type]

    before = service.limits
    yield set_limits
    service.limits = service._link.limits = before


async def answer(service: ModelService, prompt: list[int], params: SamplingParams) -> list[TokenEvent]:
    return [event async for event in service.stream(prompt, params)]


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.005)


async def counters(service: ModelService) -> dict[str, int]:
    return await service.call("counters")


def wanted(model: Model, prompt: list[int], params: SamplingParams) -> tuple[list[int], list[float]]:
    [completion] = Engine(model.network).generate([prompt], params)
    return completion.ids, completion.logprobs


def test_answers_are_the_bare_engines_to_the_bit(service: ModelService, model: Model) -> None:
    prompts = [[5, 6, 7], [9] * 40, [300, 5], [8, 8]]
    params = [SamplingParams(max_tokens=20, temperature=1.0, seed=seed, logprobs=2) for seed in range(4)]

    async def ask() -> list[list[TokenEvent]]:
        return await asyncio.gather(*(answer(service, p, s) for p, s in zip(prompts, params, strict=True)))

    for found, prompt, settings in zip(asyncio.run(ask()), prompts, params, strict=True):
        assert ([e.token for e in found], [e.logprob for e in found]) == wanted(model, prompt, settings)
        assert all(len(event.alternatives) == 2 for event in found)
        assert [event.finish for event in found] == [None] * 19 + ["length"]


def test_guides_and_refusals_travel(service: ModelService, model: Model) -> None:
    async def ask() -> str:
        with pytest.raises(RequestError, match="vocabulary"):
            await answer(service, [10**6], SHORT)
        with pytest.raises(RequestError, match="grammar"):
            async for _ in service.stream([5], SHORT, guide=GuideSpec(grammar="start: (")):
                pass
        events = [e async for e in service.stream([5], SHORT, guide=GuideSpec(grammar='start: "abc"'))]
        return service.tokenizer.decode([event.token for event in events])

    assert asyncio.run(ask()) == "abc"
    assert service.waiting == 0


def test_a_look_inside_comes_from_the_engines_process(service: ModelService, model: Model) -> None:
    found = asyncio.run(service.inspect([5, 6, 7, 8], 2))
    assert [token["id"] for token in found["tokens"]] == [7, 8]
    assert found["experts"] == model.config.n_routed_experts

    async def wrong() -> None:
        with pytest.raises(RequestError, match="vocabulary"):
            await service.inspect([5, 10**6], 1)
        with pytest.raises(RequestError, match="first"):
            await service.inspect([5, 6], 2)
        with pytest.raises(RequestError, match="no call"):
            await service.call("os.system")

    asyncio.run(wrong())


async def _leave(task: asyncio.Task[list[TokenEvent]]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("where", ["running", "prefilling", "queued"])
def test_who_leaves_frees_the_place_within_a_step(service: ModelService, where: str) -> None:
    async def scene() -> None:
        prompt = [7] * 1500 if where == "prefilling" else [5]
        count = 3 if where == "queued" else 1
        tasks = [asyncio.ensure_future(answer(service, [k, *prompt], LONG)) for k in range(count)]
        await until(lambda: service.status["running"] == min(2, len(tasks)))
        if where == "running":
            while (await counters(service))["tokens"] == before["tokens"]:
                pass
        await _leave(tasks[-1])
        assert service.status["queued"] == 0
        assert service.waiting == len(tasks) - 1
        first = await counters(service)
        second = await counters(service)
        assert first["running"] + first["waiting"] == len(tasks) - 1
        if where != "queued":  # nothing is left to do: not a step more
            assert second["steps"] == first["steps"]
            assert first["tokens"] < before["tokens"] + LONG.max_tokens
        for task in tasks[:-1]:
            await _leave(task)
        assert (await counters(service))["running"] == 0

    before = asyncio.run(counters(service))
    asyncio.run(scene())


def test_a_short_request_does_not_wait_for_a_long_prompt(service: ModelService) -> None:
    """Both arrive together, the long one first: it is read in pieces, and the short one is answered between them."""
    order: list[str] = []

    async def first_token(name: str, prompt: list[int]) -> None:
        async for _ in service.stream(prompt, SamplingParams(max_tokens=1)):
            order.append(name)

    async def scene() -> None:
        await asyncio.gather(first_token("long", [11] * 1600), first_token("short", [5]))

    asyncio.run(scene())
    assert order == ["short", "long"]


def test_a_line_has_its_deadline(service: ModelService, patient: Callable[..., None]) -> None:
    async def scene() -> None:
        tasks = [asyncio.ensure_future(answer(service, [5], LONG)) for _ in range(2)]
        await until(lambda: service.status["running"] == 2)
        os.kill(service.status["pid"], signal.SIGSTOP)  # so that no place comes free
        try:
            with pytest.raises(BusyError, match="within 1 seconds"):
                await answer(service, [5], SHORT)
        finally:
            os.kill(service.status["pid"], signal.SIGCONT)
        assert service.status["queued"] == 0
        for task in tasks:
            await _leave(task)

    patient(queue_seconds=1)
    asyncio.run(scene())
    assert service.waiting == 0


def test_it_may_be_killed_at_any_time(service: ModelService, model: Model, patient: Callable[..., None]) -> None:
    """Who runs hears of it, who waits in line is answered by the next process, the answers are the same as ever."""

    async def scene() -> None:
        running = [asyncio.ensure_future(answer(service, [k, 5], LONG)) for k in range(2)]
        await until(lambda: service.status["running"] == 2)
        waiting = asyncio.ensure_future(answer(service, [5, 6], SHORT))
        await until(lambda: service.status["queued"] == 1)
        pid = service.status["pid"]
        os.kill(pid, signal.SIGKILL)
        for task in running:
            with pytest.raises(CapacityError, match="SIGKILL"):
                await task
        with pytest.raises(CapacityError, match="starting"):
            await service.ready()
        found = await waiting
        assert ([e.token for e in found], [e.logprob for e in found]) == wanted(model, [5, 6], SHORT)
        assert service.status["pid"] != pid
        assert service.status["restarts"] == 1
        await service.ready()

    patient(queue_seconds=300)  # a loaded machine may need its time to start again
    asyncio.run(scene())
    assert service.waiting == 0


def test_one_that_hangs_is_noticed_and_replaced(service: ModelService, patient: Callable[..., None]) -> None:
    async def scene() -> None:
        await service.ready()
        pid = service.status["pid"]
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(1.1)  # what it made before no longer counts
        with pytest.raises(CapacityError, match="no token within 2 seconds"):
            await service.ready()
        task = asyncio.ensure_future(answer(service, [5], SHORT))
        with pytest.raises(CapacityError, match="SIGKILL"):
            await task
        await until(lambda: service.status["pid"] not in (None, pid) and service.status["state"] == "ready")
        await service.ready()
        assert len(await answer(service, [5], SHORT)) == 12

    patient(ready_seconds=2, hang_seconds=4)
    asyncio.run(scene())


def test_a_whole_request_has_its_deadline(service: ModelService, patient: Callable[..., None]) -> None:
    async def scene() -> None:
        with pytest.raises(CapacityError, match=r"not done within 0\.3 seconds"):
            await answer(service, [5], LONG)
        assert service.waiting == 0

    patient(request_seconds=0.3)
    asyncio.run(scene())


def test_a_restarted_server_finds_its_cache_on_disk(model: Model, tmp_path: Path) -> None:
    limits = Limits(disk_bytes=1 << 20)

    def ask() -> list[TokenEvent]:
        service = ModelService(model, limits, pages=tmp_path)
        try:
            return asyncio.run(answer(service, [7] * 100, SHORT))
        finally:
            service.close()

    first, second = ask(), ask()
    assert first[0].cached == 0
    assert second[0].cached >= 64
    assert [(e.token, e.logprob) for e in first] == [(e.token, e.logprob) for e in second]


def test_disk_without_a_folder_is_refused(model: Model) -> None:
    with pytest.raises(RequestError, match="say where"):
        ModelService(model, Limits(disk_bytes=1))


def test_a_model_that_cannot_be_loaded_is_said_at_once(model: Model, tmp_path: Path, runtime: Runtime) -> None:
    folder = make_model(tmp_path / "m", runtime)
    damaged = load(folder, runtime)
    (folder / "model.safetensors").write_bytes(b"\x08" * 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ModelService(damaged)


def test_loading_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Message] = []
    paced = Paced(sent.append)
    paced(1, 10)
    assert sent == []  # a small model is there before anybody has seen a bar
    monkeypatch.setattr("glasklar.serve.worker.LOADING_SECONDS", -1.0)
    paced(5, 10)
    assert sent == [Loading(done=5, total=10)]


@pytest.mark.skipif(library.best() is None, reason="the C++ pass is not compiled")
@pytest.mark.skipif(
    not Path("/proc/self/status").exists() or 0 <= resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < 1 << 22,
    reason="the system does not tell what it keeps in memory, or keeps too little",
)
def test_weights_stay_in_its_memory_where_asked(model: Model, tmp_path: Path) -> None:
    service = ModelService(open_folder(model.folder, Runtime(), quantize="int8", cache=tmp_path, locked=True))
    try:
        status = Path(f"/proc/{service.status['pid']}/status").read_text()
        kept = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmLck:"))
        [packed] = tmp_path.glob("*.safetensors")
        assert kept >= packed.stat().st_size > 0
    finally:
        service.close()


def test_it_does_not_outlive_its_server(model: Model, tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from glasklar.loading import open_folder
from glasklar.runtime import prepare, start
from glasklar.serve.service import ModelService
service = ModelService(open_folder(Path({str(model.folder)!r}), start(prepare(1), device="cpu")))
print(service.status["pid"], flush=True)
import time; time.sleep(600)
"""
    server = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert server.stdout is not None
    with server.stdout:
        pid = int(server.stdout.readline())
    server.kill()
    server.wait()
    deadline = time.monotonic() + 20
    while _lives(pid):
        assert time.monotonic() < deadline, f"process {pid} goes on without its server"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
