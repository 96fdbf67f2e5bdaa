"""Keys, quotas and what each has used; and that no route is open without one, however its path is written."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from glasklar import cli
from glasklar.engine.request import TokenEvent
from glasklar.errors import BusyError, RecordError, RequestError
from glasklar.serve.access import FILE, Access, Rate, Visit
from glasklar.serve.app import create_app
from glasklar.serve.backend import Backend
from glasklar.serve.gate import AccessLog, Door
from glasklar.serve.limits import Limits

EVENT = TokenEvent(request=0, token=1, logprob=0.0)


@pytest.fixture
def access(tmp_path: Path) -> Iterator[Access]:
    made = Access(tmp_path / FILE)
    yield made
    made.close()


# --- keys ----------------------------------------------------------------------------------------------------------


def test_a_key_is_found_by_its_secret_and_kept_as_a_hash_only(access: Access) -> None:
    key, secret = access.add("Ada", tokens_per_day=5)
    assert access.find(secret) == key
    assert access.find(secret[:-1]) is None
    assert access.find("") is None
    assert access.find(key.digest) is None
    access.flush()
    kept = b"".join(path.read_bytes() for path in access.path.parent.iterdir())
    assert secret.encode() not in kept
    assert key.digest.encode() in kept
    assert access.path.stat().st_mode & 0o077 == 0


def test_a_key_revoked_by_another_process_is_refused_at_once(access: Access) -> None:
    _, secret = access.add("Ada")
    other = Access(access.path)
    assert access.find(secret) is not None
    other.revoke("Ada")
    assert access.find(secret) is None
    _, again = other.add("Ada")  # the name is free again
    assert access.find(again) is not None
    assert [key.revoked is None for key in access.all_keys()] == [False, True]
    other.close()


@pytest.mark.parametrize("name", ["", " x", "x" * 65, "a\nb", "\x1b[31m"])
def test_names_that_cannot_be_shown_are_refused(access: Access, name: str) -> None:
    with pytest.raises(RequestError, match="characters"):
        access.add(name)


def test_names_are_taken_once_and_unknown_ones_are_named(access: Access) -> None:
    access.add("Ada")
    with pytest.raises(RequestError, match="already"):
        access.add("Ada")
    with pytest.raises(RequestError, match="Ada"):
        access.revoke("Bob")
    with pytest.raises(RequestError, match="at least 1"):
        access.add("Bob", tokens_per_day=0)


def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(RecordError, match="move it away"):
        Access(tmp_path / FILE)


# --- usage ---------------------------------------------------------------------------------------------------------


def test_usage_counts_a_prompt_once_for_all_its_answers_and_survives(access: Access) -> None:
    visit = Visit(key="k", access=access)
    assert visit.begin([1, 2, 3])
    assert not visit.begin([1, 2, 3])
    for _ in range(70):
        visit.made(EVENT)
    visit.settle()
    visit.settle()
    assert (visit.prompt_tokens, visit.completion_tokens) == (3, 70)
    access.flush()
    [row] = Access(access.path).usage()
    assert (row["key"], row["prompt_tokens"], row["completion_tokens"]) == ("k", 3, 70)
    Visit(key="k", access=access).begin([1])
    assert access.used_today("k") == 74
    assert [row["prompt_tokens"] for row in access.usage()] == [4]


def test_a_quota_ends_an_answer_at_the_token(access: Access) -> None:
    visit = Visit(key="k", name="Ada", access=access, quota=10)
    visit.begin([1] * 6)
    for _ in range(3):
        visit.made(EVENT)
    with pytest.raises(BusyError, match="'Ada' may use 10 tokens") as caught:
        visit.made(EVENT)
    assert 0 < caught.value.retry_after <= 86400
    assert access.used_today("k") == 10
    with pytest.raises(BusyError):
        Visit(key="k", access=access, quota=10).check()
    with pytest.raises(BusyError):
        Visit(key="k", access=access, quota=15).begin([1] * 6)
    assert access.used_today("k") == 10


def test_a_quota_of_yesterday_is_no_quota_of_today(access: Access) -> None:
    with sqlite3.connect(access.path) as db:
        db.execute("INSERT INTO usage VALUES ('k', '2000-01-01', 1, 50, 0, 50)")
    Visit(key="k", access=access, quota=10).check()
    assert len(access.usage()) == 1


def test_a_rate_is_a_bucket_that_fills_evenly() -> None:
    rate = Rate()
    assert [rate.take("k", 3, 0.0) for _ in range(3)] == [0, 0, 0]
    assert rate.take("k", 3, 0.0) == pytest.approx(20)
    assert rate.take("other", 3, 0.0) == 0
    assert rate.take("k", 3, 19.0) == pytest.approx(1)
    assert rate.take("k", 3, 20.1) == 0
    assert rate.take("k", 3, 20.1) > 19


# --- the gate ------------------------------------------------------------------------------------------------------


def client_of(door: Door) -> httpx.AsyncClient:
    app = create_app(Backend(), door)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


def ask(door: Door, method: str, path: str, **more: Any) -> httpx.Response:
    async def scene() -> httpx.Response:
        async with client_of(door) as client:
            return await client.request(method, path, **more)

    return asyncio.run(scene())


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_no_route_is_open_without_a_key_however_its_path_is_written(access: Access) -> None:
    _, secret = access.add("Ada")
    door = Door(access=access, key_required=True)
    app = create_app(Backend(), door)
    paths = {getattr(route, "path", "") for route in app.routes} | {"/nothing", "/openapi.json"}
    assert len(paths) > 15
    odd = [
        "//v1/models",
        "/v1//models",
        "/%2e%2e/v1/models",
        "/health/",
        "/health/../v1/models",
        "/HEALTH",
        "/;/health",
    ]

    async def scene() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            for path in [*sorted(paths), *odd]:
                for method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT"):
                    reply = await client.request(method, path)
                    assert reply.status_code == 401, (method, path)
                    assert method == "HEAD" or reply.json()["error"]["code"] == "invalid_api_key"
            assert (await client.get("/health", headers=bearer(secret))).status_code == 200

    asyncio.run(scene())


def test_keys_are_taken_as_every_kind_of_client_sends_them(access: Access) -> None:
    _, secret = access.add("Ada")
    door = Door(access=access, key_required=True)
    basic = base64.b64encode(f"anything:{secret}".encode()).decode()
    for header in (f"Bearer {secret}", f"bearer {secret}", f"Basic {basic}"):
        assert ask(door, "GET", "/health", headers={"authorization": header}).status_code == 200
    assert ask(door, "GET", "/health", headers={"x-api-key": secret}).status_code == 200
    bad = ["", "Bearer", "Bearer ", f"Bearer {secret}x", "Basic !!!", f"Digest {secret}", f"Basic {secret}"]
    for header in bad:
        reply = ask(door, "GET", "/health", headers={"authorization": header})
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"].startswith("Basic")
    access.revoke("Ada")
    assert ask(door, "GET", "/health", headers=bearer(secret)).status_code == 401


def test_without_need_of_a_key_any_is_as_good_as_none(access: Access) -> None:
    assert ask(Door(access=access), "GET", "/health", headers=bearer("none")).status_code == 200
    assert ask(Door(), "GET", "/health", headers=bearer("none")).status_code == 200


def test_a_rate_and_a_spent_quota_are_answered_with_429_and_when_to_come_again(access: Access) -> None:
    _, secret = access.add("Ada", requests_per_minute=2)
    spent, other = access.add("Bob", tokens_per_day=5)
    access.count(spent.id, completion_tokens=5)
    door = Door(access=access, key_required=True)

    async def scene() -> None:
        async with client_of(door) as client:
            replies = [await client.get("/v1/models", headers=bearer(secret)) for _ in range(3)]
            assert [reply.status_code for reply in replies] == [200, 200, 429]
            assert 1 <= int(replies[2].headers["retry-after"]) <= 30
            assert replies[2].json()["error"]["code"] == "rate_limit_exceeded"
            reply = await client.post("/v1/chat/completions", headers=bearer(other), json={})
            assert (reply.status_code, int(reply.headers["retry-after"]) > 0) == (429, True)
            assert "tokens a day" in reply.json()["error"]["message"]
            assert (await client.get("/v1/models", headers=bearer(other))).status_code == 200

    asyncio.run(scene())


def test_the_house_has_room_for_so_many_and_for_every_key_a_share(access: Access) -> None:
    """Places are taken before the body is read: so an upload that does not end holds one."""
    secrets = [access.add(name)[1] for name in ("Ada", "Bob")]
    door = Door(access=access, key_required=True, limits=Limits(running=1, queued=5, body_seconds=60))
    stop = asyncio.Event()

    async def endless() -> Any:
        yield b"{"
        await stop.wait()

    async def scene() -> None:
        async with client_of(door) as client:

            async def post(secret: str, content: Any) -> int:
                return (await client.post("/v1/chat/completions", headers=bearer(secret), content=content)).status_code

            held = [asyncio.ensure_future(post(secrets[0], endless())) for _ in range(4)]
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in held)
            assert await post(secrets[0], b"") == 429  # four of six, twice what it left free
            held.append(asyncio.ensure_future(post(secrets[1], endless())))
            await asyncio.sleep(0.1)
            assert not held[-1].done()
            assert await post(secrets[0], b"") == 429
            assert (await client.get("/health", headers=bearer(secrets[0]))).status_code == 200
            stop.set()
            assert set(await asyncio.gather(*held)) <= {400, 503}
            assert await post(secrets[0], b"") in (400, 503)

    asyncio.run(scene())


def test_the_log_has_a_line_a_request_and_no_prompts_unless_asked(access: Access) -> None:
    _, secret = access.add("Ada")
    for bodies in (False, True):
        written = io.StringIO()
        door = Door(access=access, key_required=True, log=AccessLog(to=written, bodies=bodies))
        ask(door, "POST", "/v1/chat/completions?q=SECRET", headers=bearer(secret), content=b'{"messages": "PROMPT\\n"}')
        ask(door, "GET", "/x%0a{forged}", headers=bearer("wrong"))
        ask(door, "GET", "/health", headers={"host": "evil.example"})
        first, second, third = map(json.loads, written.getvalue().splitlines())
        assert third["status"] == 403
        assert (first["key"], first["method"], first["path"], first["status"]) == (
            "Ada", "POST", "/v1/chat/completions", 400,
        )  # fmt: skip
        assert (second["key"], second["status"]) == (None, 401)
        assert ("PROMPT" in written.getvalue()) == bodies
        assert "SECRET" not in written.getvalue()
        assert secret not in written.getvalue()


# --- the guard -----------------------------------------------------------------------------------------------------


def test_pages_of_other_sites_may_call_only_where_that_is_opened() -> None:
    site = "https://chat.example"
    wish = {"origin": site, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for door in (Door(), Door(origins=("https://other.example",))):
        for headers in ({"origin": site}, wish):
            reply = ask(door, "OPTIONS", "/v1/models", headers=headers)
            assert reply.status_code == 403
            assert "access-control-allow-origin" not in reply.headers
    opened = Door(origins=(site,))
    reply = ask(opened, "OPTIONS", "/v1/chat/completions", headers=wish)
    assert reply.status_code == 204
    assert reply.headers["access-control-allow-origin"] == site
    assert reply.headers["access-control-allow-headers"] == "authorization"
    reply = ask(opened, "GET", "/health", headers={"origin": site})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, site)
    assert ask(opened, "GET", "/health", headers={"origin": "https://chat.example.evil"}).status_code == 403


def test_two_lengths_of_one_body_are_refused() -> None:
    headers = [("content-length", "5"), ("transfer-encoding", "chunked")]
    assert ask(Door(), "POST", "/v1/chat/completions", headers=headers, content=b"12345").status_code == 400


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("192.168.1.7:8421", 200),
        ("[2001:db8::1]:1", 200),
        ("evil.example", 403),
        ("1.2.3.4.evil", 403),
    ],
)
def test_an_address_cannot_be_rebound_so_any_may_stand_for_an_open_server(host: str, status: int) -> None:
    assert ask(Door(any_address=True), "GET", "/health", headers={"host": host}).status_code == status
    if "192" in host:
        assert ask(Door(), "GET", "/health", headers={"host": host}).status_code == 403


def test_a_body_must_come_in_time() -> None:
    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    door = Door(limits=Limits(body_seconds=0.2))
    assert ask(door, "POST", "/v1/chat/completions", content=slow()).status_code == 400


# --- the commands --------------------------------------------------------------------------------------------------


def test_keys_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASKLAR_HOME", str(tmp_path))
    run = CliRunner()

    def call(*words: str) -> str:
        done = run.invoke(cli.app, ["keys", *words])
        assert done.exit_code == 0, done.output
        return done.stdout

    made = json.loads(call("add", "Ada", "--tokens-per-day", "100", "--json"))
    access = Access(tmp_path / FILE)
    found = access.find(made["key"])
    assert found is not None
    assert (found.name, found.tokens_per_day) == ("Ada", 100)
    assert access.find(call("add", "Bob").strip()) is not None
    assert [key["name"] for key in json.loads(call("list", "--json"))["keys"]] == ["Ada", "Bob"]
    assert "digest" not in call("list", "--json")
    access.count(found.id, requests=1, prompt_tokens=2, completion_tokens=3)
    access.close()
    [row] = json.loads(call("usage", "--json"))["usage"]
    assert (row["name"], row["prompt_tokens"], row["completion_tokens"]) == ("Ada", 2, 3)
    assert call("usage", "--csv").splitlines()[1].endswith(f"Ada,{found.id},1,2,0,3")
    call("revoke", "Ada")
    assert "Ada" in call("list")
    assert isinstance(run.invoke(cli.app, ["keys", "revoke", "Ada"]).exception, RequestError)
