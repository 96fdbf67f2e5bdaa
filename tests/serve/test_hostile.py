"""Hostile requests over a real socket: each gets its status, the one shape of error, soon, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import tiny

from glasklar.loading import Model
from glasklar.runtime import Runtime
from glasklar.serve.live import LiveServer
from glasklar.serve.server import Site

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, TOKENS, BACK = "/anthropic/v1/messages", "/tokenize", "/detokenize"
QUESTION = [{"role": "user", "content": "What is 3+4?"}]
FUNCTION = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def deep(depth: int, leaf: Any = None) -> Any:
    for _ in range(depth):
        leaf = {"type": "object", "properties": {"a": leaf or {}}}
    return leaf


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def schema(value: Any, strict: bool = True) -> dict[str, Any]:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": value, "strict": strict}}
    return {"response_format": shape}


def tool(parameters: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "add", "parameters": parameters, "strict": True, **more}
    return {"tools": [{"type": "function", "function": function}]}


# Route, what is sent (bytes: the whole body; a table: in place of the fields of a good request), status, parameter.
BODIES: dict[str, tuple[str, bytes | dict[str, Any], int, str | None]] = {
    "nothing": (CHAT, b"", 400, None),
    "no JSON": (CHAT, b"{", 400, None),
    "a word": (CHAT, b'"hello"', 400, None),
    "a list": (CHAT, b"[]", 400, None),
    "null": (CHAT, b"null", 400, None),
    "two objects": (CHAT, b"{}{}", 400, None),
    "invalid UTF-8": (CHAT, b'{"model": "\xff\xfe"}', 400, None),
    "overlong UTF-8": (CHAT, b'{"model": "\xc0\xaf"}', 400, None),
    "UTF-16": (CHAT, '{"model": "m"}'.encode("utf-16"), 400, None),
    "half a character": (CHAT, b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, None),
    "half a character as name": (TEXT, b'{"model": "\\udfff", "prompt": "x"}', 400, None),
    "half a character in a tool": (CHAT, tool({"type": "object"}, description="\ud800"), 400, None),
    "half a character in a schema": (CHAT, schema({"enum": ["\ud800"]}), 400, None),
    "NUL": (CHAT, b"\0" * 64, 400, None),
    "deep lists": (CHAT, b"[" * 200_000, 400, None),
    "deep objects": (CHAT, b'{"a":' * 50_000, 400, None),
    "a number of a million digits": (CHAT, b'{"model": "tiny", "seed": ' + b"9" * 1_000_000 + b"}", 400, None),
    "NaN": (CHAT, b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_p": NaN}', 400, "top_p"),
    "infinity": (CHAT, b'{"model": "tiny", "messages": [], "temperature": Infinity}', 400, None),
    "1e999": (CHAT, {"temperature": 1e308 * 10}, 400, None),
    "negative temperature": (CHAT, {"temperature": -0.1}, 400, "temperature"),
    "hot": (CHAT, {"temperature": 2.1}, 400, "temperature"),
    "text for a number": (CHAT, {"temperature": "hot"}, 400, "temperature"),
    "negative top_k": (CHAT, {"top_k": -1}, 400, "top_k"),
    "zero top_p": (CHAT, {"top_p": 0}, 400, "top_p"),
    "min_p above one": (CHAT, {"min_p": 1.5}, 400, "min_p"),
    "no tokens": (CHAT, {"max_tokens": 0}, 400, "max_tokens"),
    "negative tokens": (CHAT, {"max_completion_tokens": -5}, 400, "max_completion_tokens"),
    "2**63 tokens": (CHAT, {"max_tokens": 1 << 63}, 400, "max_tokens"),
    "two limits": (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens"),
    "many choices": (CHAT, {"n": 10**9}, 400, "n"),
    "minus one choice": (CHAT, {"n": -1}, 400, "n"),
    "half a choice": (CHAT, {"n": 1.5}, 400, "n"),
    "huge seed": (CHAT, {"seed": 1 << 70}, 400, "seed"),
    "many stops": (CHAT, {"stop": ["x"] * 10_000}, 400, None),
    "empty stop": (CHAT, {"stop": ["a", ""]}, 400, "stop"),
    "long stop": (CHAT, {"stop": "x" * 10_000}, 400, "stop"),
    "bias of a name": (CHAT, {"logit_bias": {"__proto__": 1}}, 400, None),
    "bias outside": (CHAT, {"logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    "bias of a negative token": (CHAT, {"logit_bias": {"-1": 1}}, 400, "logit_bias"),
    "huge bias": (CHAT, {"logit_bias": {"1": 1e9}}, 400, None),
    "many biases": (CHAT, {"logit_bias": {str(i): 1 for i in range(5000)}}, 400, "logit_bias"),
    "alternatives without logprobs": (CHAT, {"top_logprobs": 2}, 400, "top_logprobs"),
    "too many alternatives": (CHAT, {"logprobs": True, "top_logprobs": 1000}, 400, "top_logprobs"),
    "usage without a stream": (CHAT, {"stream_options": {"include_usage": True}}, 400, "stream_options"),
    "unknown parameter": (CHAT, {"temprature": 1}, 400, "temprature"),
    "parameter of another API": (CHAT, {"functions": []}, 400, "functions"),
    "prototype": (CHAT, {"__proto__": {"admin": True}}, 400, "__proto__"),
    "audio": (CHAT, {"modalities": ["audio"]}, 400, "modalities"),
    "no messages": (CHAT, {"messages": []}, 400, "messages"),
    "messages as text": (CHAT, {"messages": "hello"}, 400, "messages"),
    "too many messages": (CHAT, {"messages": QUESTION * 5000}, 400, "messages"),
    "unknown role": (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
    "no content": (CHAT, {"messages": [{"role": "user"}]}, 400, None),
    "content of null": (CHAT, user(None), 400, None),
    "content of no parts": (CHAT, user([]), 400, None),
    "an image": (CHAT, user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), 400, None),
    "last is the assistant's": (CHAT, {"messages": [*QUESTION, {"role": "assistant", "content": "7"}]}, 400, None),
    "prefix of a user": (CHAT, {"messages": [{"role": "user", "content": "x", "prefix": True}]}, 400, None),
    "prefix alone": (CHAT, {"messages": [{"role": "assistant", "content": "x", "prefix": True}]}, 400, None),
    "result of no call": (CHAT, {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, 400, None),
    "too long": (CHAT, user("7" * 30_000), 400, "messages"),
    "a text of 3 MB": (CHAT, user("x" * 3_000_000), 400, None),
    "thinking and not": (CHAT, {"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, 400, "thinking"),
    "unknown effort": (CHAT, {"reasoning_effort": "infinite"}, 400, "reasoning_effort"),
    "negative budget": (CHAT, {"thinking": {"type": "enabled", "budget_tokens": -1}}, 400, "thinking.budget_tokens"),
    "code for the template": (CHAT, {"chat_template_kwargs": {"messages": "{{ x }}"}}, 400, None),
    "own template": (CHAT, {"chat_template": "{{ ''.__class__ }}"}, 400, "chat_template"),
    "unknown format": (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format.type"),
    "format without its schema": (CHAT, {"response_format": {"type": "json_schema"}}, 400, None),
    "schema of text": (CHAT, schema("{}"), 400, None),
    "deep schema": (CHAT, schema(deep(200)), 400, None),
    "very deep format": (CHAT, b'{"model": "tiny", "messages": [], "response_format": ' + b'{"a":' * 900 + b"1}", 400,
                         None),
    "large schema": (CHAT, schema({"enum": ["x" * 1000] * 1000}), 400, None),
    "schema elsewhere": (CHAT, schema({"$ref": "http://127.0.0.1:1/x.json"}), 400, None),
    "schema in a file": (CHAT, schema({"$ref": "file:///etc/passwd"}), 400, None),
    "schema of itself": (CHAT, schema({"$ref": "#"}), 400, None),
    "schema in a circle": (CHAT, schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                                         "$ref": "#/$defs/a"}), 400, None),
    "schema without any value": (CHAT, schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), 400, None),
    "schema bomb": (CHAT, schema({"allOf": [{"properties": {f"a{i}": {"pattern": f"^{i}.*"}}} for i in range(300)]}),
                    400, None),
    "unknown keyword, strict": (CHAT, schema({"type": "array", "contains": {}}), 400, None),
    "broken pattern": (CHAT, schema({"type": "string", "pattern": "(?<=x)(("}), 400, None),
    "library's own settings": (CHAT, schema({"x-guidance": {"whitespace_pattern": "(a|aa)*"}, "type": "wizard"}),
                               400, None),
    "tool without a name": (CHAT, {"tools": [{"type": "function", "function": {}}]}, 400, None),
    "tool with a path for a name": (CHAT, tool({}, name="../../x"), 400, None),
    "tool with quotes in its name": (CHAT, tool({}, name='add" | "rm'), 400, None),
    "tool of another kind": (CHAT, {"tools": [{"type": "code_interpreter"}]}, 400, None),
    "two tools of one name": (CHAT, {"tools": [FUNCTION, FUNCTION]}, 400, "tools"),
    "thousands of tools": (CHAT, {"tools": [FUNCTION] * 5000}, 400, "tools"),
    "choice of an unknown tool": (CHAT, {"tools": [FUNCTION],
                                         "tool_choice": {"type": "function", "function": {"name": "b"}}}, 400, None),
    "choice without tools": (CHAT, {"tool_choice": "required"}, 400, "tool_choice"),
    "deep tool": (CHAT, tool(deep(300)), 400, None),
    "prefix and a schema": (CHAT, {"messages": [*QUESTION, {"role": "assistant", "content": "x", "prefix": True}],
                                   **schema({"type": "object"})}, 400, "prefix"),
    "calls in a prefix": (CHAT, {"messages": [*QUESTION, {"role": "assistant", "content": "x", "prefix": True,
                                                          "tool_calls": [CALL]}]}, 400, None),
    "model by a path": (CHAT, {"model": "../../../etc/passwd"}, 404, None),
    "model by an absolute path": (CHAT, {"model": "/etc/passwd"}, 404, None),
    "model by an address": (CHAT, {"model": "http://127.0.0.1/x"}, 404, None),
    "model with a NUL": (CHAT, {"model": "tiny\0.safetensors"}, 404, None),
    "model of 10,000 letters": (CHAT, {"model": "x" * 10_000}, 400, "model"),
    "model as a number": (CHAT, {"model": 7}, 400, "model"),
    "empty prompt list": (TEXT, {"prompt": []}, 400, None),
    "tokens outside": (TEXT, {"prompt": [5, 99999]}, 400, "prompt"),
    "negative tokens in a prompt": (TEXT, {"prompt": [-1]}, 400, None),
    "many prompts": (TEXT, {"prompt": ["x"] * 1000}, 400, None),
    "best of many": (TEXT, {"best_of": 5}, 400, "best_of"),
    "echo with logprobs": (TEXT, {"echo": True, "logprobs": 1}, 400, "echo"),
    "long prompt": (TEXT, {"prompt": "7" * 9000}, 400, "prompt"),
    "filling in": (TEXT, {"suffix": "x"}, 400, "suffix"),
    "no input": (RESPONSES, {"input": []}, 400, None),
    "input of an unknown kind": (RESPONSES, {"input": [{"type": "computer_call"}]}, 400, None),
    "earlier response": (RESPONSES, {"previous_response_id": "../x"}, 400, "previous_response_id"),
    "web search": (RESPONSES, {"tools": [{"type": "web_search"}]}, 400, None),
    "no limit": (MESSAGES, {"max_tokens": None}, 400, "max_tokens"),
    "block of an unknown kind": (MESSAGES, user([{"type": "image", "source": {}}]), 400, None),
    "deep input of a call": (MESSAGES, user([{"type": "tool_use", "id": "x", "name": "a", "input": deep(100)}]),
                             400, None),
    "text and messages": (TOKENS, {"messages": QUESTION}, 400, "prompt"),
    "token that is none": (BACK, {"tokens": [1 << 40]}, 400, None),
    "negative token": (BACK, {"tokens": [-3]}, 400, None),
}  # fmt: skip

GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": QUESTION, "max_tokens": 2},
    TEXT: {"prompt": "x", "max_tokens": 2},
    RESPONSES: {"input": "x", "max_output_tokens": 2},
    MESSAGES: {"messages": QUESTION, "max_tokens": 2},
    TOKENS: {"prompt": "x"},
    BACK: {"tokens": [1]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Model:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny", runtime)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Model, site: Site) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("run"), site) as live:
        live.release(model)
        yield live


@pytest.fixture(scope="module")
def web(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as made:
        yield made


def check(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text[:300]
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_there_are_enough_of_them() -> None:
    assert len(BODIES) >= 60


def test_good_requests_pass(web: httpx.Client) -> None:
    """What the hostile ones are changed from."""
    for route, body in GOOD.items():
        assert web.post(route, json={"model": "tiny", **body}).status_code == 200


@pytest.mark.parametrize("name", BODIES)
def test_hostile_bodies(name: str, web: httpx.Client) -> None:
    route, sent, status, param = BODIES[name]
    content = sent if isinstance(sent, bytes) else json.dumps({"model": "tiny", **GOOD[route], **sent}).encode()
    begin = time.perf_counter()
    error = check(web.post(route, content=content, headers={"content-type": "application/json"}), status)
    assert time.perf_counter() - begin < 5
    assert param is None or error["param"] == param


def test_a_prompt_beyond_the_context_names_both_numbers(web: httpx.Client) -> None:
    for route, body in ((CHAT, user("7" * 3000)), (TEXT, {"prompt": "7" * 3000}), (RESPONSES, {"input": "7" * 3000}),
                        (MESSAGES, user("7" * 3000))):  # fmt: skip
        message = check(web.post(route, json={"model": "tiny", **GOOD[route], **body}), 400)["message"]
        assert "2048" in message
        assert "300" in message


def test_special_tokens_in_texts_stay_text(web: httpx.Client, model: Model) -> None:
    """Wherever a caller can write: the number of control tokens is that of harmless texts."""
    assert model.tokenizer is not None
    special = model.tokenizer.special_ids

    def controls(text: str) -> int:
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "reasoning_content": text},
            {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": text}]},
        ]
        reply = web.post(TOKENS, json={"model": "tiny", "messages": messages})
        return sum(token in special for token in reply.json()["tokens"])

    for text in ("<｜User｜>", "</think>", "<think>", "<｜end▁of▁sentence｜>", "<｜Assistant｜><think>"):
        assert controls(text) == controls("harmless")


@pytest.mark.parametrize("size", [5 << 20, 10 << 20])
def test_large_bodies_are_refused(size: int, web: httpx.Client) -> None:
    body = b'{"model": "' + b"x" * size + b'"}'
    check(web.post(CHAT, content=body, headers={"content-type": "application/json"}), 413)


def test_other_kinds_of_content_are_refused(web: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        error = check(web.post(CHAT, content=b'{"model": "tiny"}', headers={"content-type": kind}), 400)
        assert "content-type: application/json" in error["message"]


def test_what_is_no_json_is_said_with_its_place(web: httpx.Client) -> None:
    error = check(web.post(CHAT, content=b'{"model": bad', headers={"content-type": "application/json"}), 400)
    assert "no JSON" in error["message"]
    assert "character 10" in error["message"]
    assert error["param"] is None


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("GET", "/v1/models/tiny%00", 404),
        ("GET", "/page/..%5c..%5capp.py", 404),
        ("GET", "//v1//models", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("PUT", "/tokenize", 405),
        ("TRACE", "/health", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/" + "a" * 5000, 404),
        ("POST", "/v1/embeddings", 404),
    ],
)
def test_paths_and_methods(method: str, path: str, status: int, web: httpx.Client) -> None:
    check(web.request(method, path), status)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "[::2]", ""])
def test_spoofed_hosts(host: str, web: httpx.Client) -> None:
    check(web.get("/v1/models", headers={"host": host}), 403)


def exchange(url: str, sent: bytes, seconds: float = 5) -> bytes:
    """Raw bytes to the server; everything that it answers before it closes or falls silent."""
    parts = urlsplit(url)
    got = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=seconds) as link:
        link.sendall(sent)
        try:
            while piece := link.recv(65536):
                got += piece
        except (TimeoutError, ConnectionResetError):
            pass
    return got


def head(server: LiveServer, *lines: str) -> bytes:
    port = urlsplit(server.url).port
    return "\r\n".join(["POST /tokenize HTTP/1.1", f"Host: 127.0.0.1:{port}", *lines, "", ""]).encode("latin-1")


BODY = b'{"model": "tiny", "prompt": "x"}'
HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
SMUGGLED: dict[str, tuple[list[str], bytes]] = {
    "two lengths": ([f"Content-Length: {len(BODY)}", "Content-Length: 0", "Connection: close"], BODY + HIDDEN),
    "length and chunks": (
        [f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked", "Connection: close"], b"0\r\n\r\n" + HIDDEN
    ),
    "unknown coding": (["Transfer-Encoding: xchunked", "Connection: close"], b"0\r\n\r\n" + HIDDEN),
    "folded header": (["X-A: b", "  Content-Length: 0", f"Content-Length: {len(BODY)}", "Connection: close"], BODY),
    "blank before the colon": ([f"Content-Length : {len(BODY)}", "Connection: close"], BODY),
    "negative length": (["Content-Length: -1", "Connection: close"], BODY),
    "length of words": (["Content-Length: ten", "Connection: close"], BODY),
    "broken chunks": (["Transfer-Encoding: chunked", "Connection: close"], b"zz\r\n" + BODY),
    "NUL in a header": (["X-A: a\0b", f"Content-Length: {len(BODY)}", "Connection: close"], BODY),
    "two hosts": (["Host: evil.example", f"Content-Length: {len(BODY)}", "Connection: close"], BODY),
    "endless header": (["X-A: " + "a" * 200_000, "Connection: close"], b""),
}  # fmt: skip


@pytest.mark.parametrize("name", SMUGGLED)
def test_smuggled_headers_never_reach_a_second_answer(name: str, server: LiveServer) -> None:
    lines, body = SMUGGLED[name]
    got = exchange(server.url, head(server, *lines) + body)
    assert got.count(b"HTTP/1.1 ") <= 1
    assert b'"object": "list"' not in got
    assert b'"object":"list"' not in got
    assert not got or got.split(b" ", 2)[1][:1] in (b"2", b"4")


def test_slow_callers_hold_nobody_up(server: LiveServer, web: httpx.Client) -> None:
    """Slow-loris: many connections that never finish their request, while others are answered at once."""
    parts = urlsplit(server.url)
    slow = []
    try:
        for number in range(100):
            link = socket.create_connection((parts.hostname, parts.port), timeout=5)
            link.sendall(head(server, "Content-Length: 1000")[: 20 + number] if number % 2 else
                         head(server, "Content-Length: 1000") + b'{"model":')  # fmt: skip
            slow.append(link)
        begin = time.perf_counter()
        assert web.post(TOKENS, json={"model": "tiny", "prompt": "x"}).status_code == 200
        assert time.perf_counter() - begin < 2
    finally:
        for link in slow:
            link.close()


def test_who_hangs_up_before_the_answer_leaves_no_fault(
    web: httpx.Client, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"model": model.name, "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 4000}
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            web.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(30, read=0.3))
    test_good_requests_pass(web)
    assert "Exception in ASGI" not in caplog.text


def test_what_cannot_be_read_is_named(web: httpx.Client, model: Model) -> None:
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    body = {"model": model.name, "messages": [{"role": "user", "content": [picture]}]}
    refused = web.post("/v1/chat/completions", json=body).json()["error"]
    assert refused["param"] == "messages.0.content.0"
    assert "image_url cannot be read here, only text" in refused["message"]
    header = {"content-type": "application/json"}
    for sent in (b'{"model": "\xff\xfe"}', b"[" * 100_000):
        found = web.post("/v1/chat/completions", content=sent, headers=header)
        assert found.status_code == 400
        assert "the body is no JSON" in found.json()["error"]["message"]
