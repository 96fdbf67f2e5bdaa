"""The API over a real socket with the clients that people use: their own types parse every reply."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import openai
import pydantic
import pytest
import tiny

from glasklar.data.chat import Message, parse, render
from glasklar.engine.engine import Engine
from glasklar.engine.request import SamplingParams
from glasklar.loading import Model
from glasklar.runtime import Runtime
from glasklar.serve.live import LiveServer
from glasklar.serve.server import Site

QUESTION = [{"role": "user", "content": "What is 3+4?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "sign": {"enum": ["+", "-"]}},
            "required": ["a", "sign"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
SUB = {"type": "function", "function": {"name": "sub", "parameters": {"type": "object", "properties": {}}}}


class Sum(pydantic.BaseModel):
    """What `parse` must give."""

    model_config = pydantic.ConfigDict(extra="forbid")
    sign: Literal["+", "-"]
    right: bool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Model:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny", runtime)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Model, site: Site) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("run"), site) as live:
        live.release(model)
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def claude(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=f"{server.url}/anthropic", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def web(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


# --- chat ---------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_engine_sync_and_async(
    server: LiveServer, client: openai.OpenAI, model: Model
) -> None:
    assert model.tokenizer is not None
    prompt = render(model.tokenizer, [Message(role="user", content="What is 3+4?")], True)
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=3, stop_ids=model.tokenizer.stop_ids)
    [completion] = Engine(model.network).generate([prompt], params)
    wanted = parse(model.tokenizer, completion.ids, True)
    settings: dict[str, Any] = {
        "model": model.name, "messages": QUESTION, "max_tokens": 60, "temperature": 1.0, "seed": 3,
        "extra_body": {"thinking": {"type": "enabled"}},
    }  # fmt: skip
    message = client.chat.completions.create(**settings).choices[0].message
    whole = message.reasoning_content or "", message.content
    assert whole == (wanted.reasoning, wanted.content)

    async def asynchronous() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as other:
            text, thought = "", ""
            async for chunk in await other.chat.completions.create(**settings, stream=True):
                text += chunk.choices[0].delta.content or ""
                thought += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            return thought, text

    assert asyncio.run(asynchronous()) == whole


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("thinking", [None, {"type": "disabled"}, {"type": "enabled", "budget_tokens": 7}])
def test_a_schema_holds_for_any_seed(client: openai.OpenAI, model: Model, seed: int, thinking: Any) -> None:
    parsed = client.chat.completions.parse(
        model=model.name, messages=QUESTION, temperature=1.5, seed=seed, max_tokens=200, response_format=Sum,
        extra_body={} if thinking is None else {"thinking": thinking},
    )  # fmt: skip
    assert parsed.choices[0].finish_reason == "stop"
    assert isinstance(parsed.choices[0].message.parsed, Sum)
    if thinking and "budget_tokens" in thinking:
        assert parsed.usage.completion_tokens_details.reasoning_tokens <= 8


def test_json_mode_gives_an_object(client: openai.OpenAI, model: Model) -> None:
    found = 0
    for seed in range(4):
        reply = client.chat.completions.create(
            model=model.name, messages=QUESTION, temperature=1.0, seed=seed, max_tokens=150,
            response_format={"type": "json_object"}, extra_body={"thinking": {"type": "disabled"}},
        )  # fmt: skip
        assert reply.choices[0].message.content.startswith("{")
        if reply.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(reply.choices[0].message.content), dict)
            found += 1
    assert found


@pytest.mark.parametrize("effort", ["none", "low", "high"])
def test_effort_is_a_budget(client: openai.OpenAI, model: Model, effort: Any) -> None:
    reply = client.chat.completions.create(
        model=model.name, messages=QUESTION, max_tokens=80, reasoning_effort=effort, temperature=1.0, seed=1,
        logit_bias={str(model.tokenizer.end_think_id): -100, str(model.tokenizer.eos_id): -100},
    )  # fmt: skip
    thought = reply.usage.completion_tokens_details.reasoning_tokens
    assert thought == 0 if effort == "none" else thought in (0, {"low": 11, "high": 41}[effort])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_calls_of_tools_whole_and_streamed(client: openai.OpenAI, model: Model, choice: Any) -> None:
    whole = 0
    for seed in range(6):
        settings: dict[str, Any] = {
            "model": model.name, "messages": QUESTION, "tools": [ADD, SUB], "tool_choice": choice, "seed": seed,
            "temperature": 1.2, "max_tokens": 300, "parallel_tool_calls": False, "reasoning_effort": "low",
        }  # fmt: skip
        reply = client.chat.completions.create(**settings)
        if reply.choices[0].finish_reason == "length":  # an untrained network may write digits for ever
            continue
        whole += 1
        [call] = reply.choices[0].message.tool_calls
        assert reply.choices[0].finish_reason == "tool_calls"
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "add" or choice == "required"
        if call.function.name == "add":
            assert set(arguments) == {"a", "sign"}
        with client.chat.completions.stream(**settings) as stream:
            for _ in stream:
                pass
            streamed = stream.get_final_completion().choices[0]
        assert streamed.finish_reason == "tool_calls"
        assert streamed.message.tool_calls[0].function.name == call.function.name
        assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    assert whole >= 2


def test_results_of_tools_go_back_to_the_model(client: openai.OpenAI, web: httpx.Client, model: Model) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "sign": "+"}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "7</tool_response>x"},
    ]
    reply = client.chat.completions.create(model=model.name, messages=messages, tools=[ADD], max_tokens=5)  # type: ignore[arg-type]
    assert reply.usage.prompt_tokens > 20
    ids = web.post("/tokenize", json={"model": model.name, "messages": messages}).json()["tokens"]
    text = web.post("/detokenize", json={"model": model.name, "tokens": ids}).json()["prompt"]
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1, "sign": "+"}}\n</tool_call>' in text
    assert text.count("</tool_response>") == 1
    wrong = [*messages[:2], {**messages[2], "tool_call_id": "call_2"}]
    with pytest.raises(openai.BadRequestError, match="call_2"):
        client.chat.completions.create(model=model.name, messages=wrong, tools=[ADD])  # type: ignore[arg-type]


def test_free_answers_beside_tools_are_text_or_calls(client: openai.OpenAI, model: Model) -> None:
    for seed in range(4):
        reply = client.chat.completions.create(
            model=model.name, messages=QUESTION, tools=[ADD], seed=seed, temperature=1.0, max_tokens=60
        )
        message = reply.choices[0].message
        for call in message.tool_calls or ():
            assert call.function.name == "add"
        assert "<tool_call>" not in (message.content or "")


def test_a_prefix_is_gone_on_with(client: openai.OpenAI, model: Model) -> None:
    assert model.tokenizer is not None
    head = render(model.tokenizer, [Message(role="user", content="What is 3+4?")], False)
    params = SamplingParams(max_tokens=12, stop_ids=model.tokenizer.stop_ids)
    [completion] = Engine(model.network).generate([[*head, *model.tokenizer.encode("The sum is")]], params)
    messages = [*QUESTION, {"role": "assistant", "content": "The sum is", "prefix": True}]
    reply = client.chat.completions.create(model=model.name, messages=messages, max_tokens=12)
    assert reply.choices[0].message.content == model.tokenizer.decode(completion.ids)
    messages[-1] = {"role": "assistant", "content": "", "reasoning_content": "Let me", "prefix": True}
    reply = client.chat.completions.create(model=model.name, messages=messages, max_tokens=6)
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0


def test_usage_tells_what_the_cache_had(client: openai.OpenAI, model: Model) -> None:
    messages = [{"role": "user", "content": "a question that has not been asked before " * 4}]
    first, again = (
        client.chat.completions.create(model=model.name, messages=messages, max_tokens=2).usage
        for _ in range(2)  # type: ignore[arg-type]
    )
    assert first.prompt_cache_hit_tokens + first.prompt_cache_miss_tokens == first.prompt_tokens
    assert again.prompt_cache_hit_tokens == again.prompt_tokens_details.cached_tokens
    assert first.prompt_cache_hit_tokens < 32 <= again.prompt_cache_hit_tokens


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", 1), ("min_p", 1.0), ("top_p", 1e-6), ("repetition_penalty", 1.3), ("frequency_penalty", 1.0),
     ("presence_penalty", 2.0), ("seed", 12), ("temperature", 0.3), ("logit_bias", {"100": 100})],
)  # fmt: skip
def test_every_knob_of_sampling_turns_something(client: openai.OpenAI, model: Model, name: str, value: Any) -> None:
    base = {"temperature": 1.0, "seed": 11, "max_tokens": 40, "thinking": {"type": "disabled"}}

    def ask(**more: Any) -> str:
        return (
            client.chat.completions.create(model=model.name, messages=QUESTION, extra_body=base | more)
            .choices[0]
            .message.content
        )

    assert ask(**{name: value}) != ask()
    assert ask(**{name: value}) == ask(**{name: value})


# --- completions --------------------------------------------------------------------------------------------------


def test_completions_of_text_and_ids(client: openai.OpenAI, model: Model) -> None:
    assert model.tokenizer is not None
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("what is 1")]
    settings: dict[str, Any] = {"model": model.name, "max_tokens": 9, "temperature": 1.0, "seed": 4}
    one = client.completions.create(prompt="what is 1", **settings, echo=True)
    two = client.completions.create(prompt=[ids, ids], **settings, n=2, logprobs=2)
    assert one.choices[0].text == "what is 1" + two.choices[0].text
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[2].text != two.choices[1].text
    assert two.usage.prompt_tokens == 2 * len(ids)
    chosen = two.choices[0].logprobs
    assert len(chosen.tokens) == len(chosen.token_logprobs) == len(chosen.text_offset)
    streamed = "".join(c.choices[0].text for c in client.completions.create(prompt=ids, **settings, stream=True))
    assert streamed == two.choices[0].text


def test_filling_in_needs_tokens_for_it(client: openai.OpenAI, model: Model) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model.name, prompt="a", suffix="b")
    assert refused.value.param == "suffix"


# --- responses ----------------------------------------------------------------------------------------------------


def test_responses_whole_streamed_and_parsed(client: openai.OpenAI, model: Model) -> None:
    settings: dict[str, Any] = {
        "model": model.name, "input": "What is 3+4?", "instructions": "Be brief.", "max_output_tokens": 60,
        "temperature": 1.0, "metadata": {"a": "b"}, "reasoning": {"effort": "low"},
    }  # fmt: skip
    whole = client.responses.create(**settings)
    assert whole.metadata == {"a": "b"}
    assert whole.output[-1].type in ("message", "reasoning")
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    numbers = []
    with client.responses.stream(**settings) as stream:
        text = ""
        for event in stream:
            numbers.append(event.sequence_number)
            if event.type == "response.output_text.delta":
                text += event.delta
        final = stream._state._completed_response or event.response
    assert numbers == list(range(len(numbers)))
    assert "".join(p.text for item in final.output if item.type == "message" for p in item.content) == text
    parsed = client.responses.parse(model=model.name, input=[*QUESTION], text_format=Sum, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Sum)


def test_responses_call_functions_and_take_results(client: openai.OpenAI, model: Model) -> None:
    tool = {"type": "function", **ADD["function"]}  # type: ignore[dict-item]
    settings: dict[str, Any] = {
        "model": model.name, "tools": [tool], "tool_choice": "required", "max_output_tokens": 400, "temperature": 1.0,
        "parallel_tool_calls": False,
    }  # fmt: skip
    first = client.responses.create(input=[*QUESTION], **settings)
    [call] = [item for item in first.output if item.type == "function_call"]
    assert set(json.loads(call.arguments)) == {"a", "sign"}
    again = [*QUESTION, *(item.model_dump(exclude_none=True) for item in first.output)]
    again.append({"type": "function_call_output", "call_id": call.call_id, "output": "7"})
    with client.responses.stream(input=again, **settings) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert "response.function_call_arguments.delta" in kinds
    assert [item.type for item in final.output if item.type == "function_call"] == ["function_call"]


@pytest.mark.parametrize(("name", "value"), [("store", True), ("previous_response_id", "resp_1"), ("background", True)])
def test_responses_refuse_what_they_do_not_keep(client: openai.OpenAI, model: Model, name: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=model.name, input="x", **{name: value})
    assert refused.value.param == name


# --- messages -----------------------------------------------------------------------------------------------------


def test_messages_whole_and_streamed(claude: anthropic.Anthropic, model: Model) -> None:
    settings: dict[str, Any] = {
        "model": model.name, "messages": QUESTION, "max_tokens": 60, "system": "Be brief.",
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }  # fmt: skip
    whole = claude.messages.create(**settings)
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert whole.content[0].type == "thinking"
    with claude.messages.stream(**settings) as stream:
        for _ in stream:
            pass
        final = stream.get_final_message()
    assert [block.model_dump(exclude_none=True) for block in final.content] == [
        block.model_dump(exclude_none=True) for block in whole.content
    ]
    assert final.usage.output_tokens == whole.usage.output_tokens
    count = claude.messages.count_tokens(model=model.name, messages=QUESTION, system="Be brief.")  # type: ignore[arg-type]
    assert count.input_tokens > 10


def test_messages_call_tools_and_take_results(claude: anthropic.Anthropic, model: Model) -> None:
    function: dict[str, Any] = ADD["function"]  # type: ignore[assignment]
    tool = {"name": "add", "input_schema": function["parameters"], "strict": True}
    settings: dict[str, Any] = {
        "model": model.name, "tools": [tool], "max_tokens": 300, "extra_body": {"temperature": 1.0},
        "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": True},
    }  # fmt: skip
    first = claude.messages.create(messages=QUESTION, **settings)
    assert first.stop_reason == "tool_use"
    [use] = [block for block in first.content if block.type == "tool_use"]
    assert set(use.input) == {"a", "sign"}  # type: ignore[call-overload]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "7"}]}
    again = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    with claude.messages.stream(messages=again, **settings) as stream:
        for _ in stream:
            pass
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    assert set(final.content[-1].input) == {"a", "sign"}


def test_messages_end_at_stop_sequences(claude: anthropic.Anthropic, model: Model) -> None:
    ask: dict[str, Any] = {
        "model": model.name, "messages": QUESTION, "max_tokens": 50, "thinking": {"type": "disabled"}
    }  # fmt: skip
    text = claude.messages.create(**ask).content[0].text
    reply = claude.messages.create(**ask, stop_sequences=[text[5:7]])
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", text[5:7])


# --- other clients ------------------------------------------------------------------------------------------------


def test_langchain_streams_calls_and_parses(server: LiveServer, model: Model) -> None:
    from langchain_openai import ChatOpenAI

    # LangChain never closes a connection pool that it made itself.
    with httpx.Client(timeout=60) as pool:
        settings: dict[str, Any] = {
            "base_url": f"{server.url}/v1", "api_key": "none", "model": model.name, "max_retries": 0, "max_tokens": 200,
            "http_client": pool,
        }  # fmt: skip
        chat = ChatOpenAI(**settings, temperature=1.0, seed=3)
        whole = chat.invoke("What is 3+4?")
        assert "".join(str(chunk.content) for chunk in chat.stream("What is 3+4?")) == whole.content
        assert whole.usage_metadata["output_tokens"] > 0
        called = chat.bind_tools([ADD], tool_choice="add").invoke("What is 3+4?")
        assert called.tool_calls[0]["name"] == "add"
        assert isinstance(chat.with_structured_output(Sum).invoke("What is 3+4?"), Sum)
        assert ChatOpenAI(**settings, use_responses_api=True).invoke("What is 3+4?").content


@pytest.mark.slow  # importing it alone takes long
@pytest.mark.filterwarnings("ignore")
def test_litellm_by_both_forms(server: LiveServer, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    common: dict[str, Any] = {"messages": QUESTION, "max_tokens": 30, "api_key": "none", "num_retries": 0}
    whole = litellm.completion(model=f"openai/{model.name}", api_base=f"{server.url}/v1", **common)
    assert whole.usage.completion_tokens > 0
    chunks = list(litellm.completion(model=f"openai/{model.name}", api_base=f"{server.url}/v1", stream=True, **common))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == (whole.choices[0].message.content or "")
    other = litellm.completion(model=f"anthropic/{model.name}", api_base=f"{server.url}/anthropic", **common)
    assert other.usage.completion_tokens > 0


# --- the rest -----------------------------------------------------------------------------------------------------


def test_tokens_there_and_back(web: httpx.Client, model: Model) -> None:
    assert model.tokenizer is not None
    text = "größe <think> <｜User｜>"
    found = web.post("/tokenize", json={"model": model.name, "prompt": text}).json()
    assert found == {"tokens": model.tokenizer.encode(text), "count": len(found["tokens"]), "max_model_len": 2048}
    assert not set(found["tokens"]) & model.tokenizer.special_ids
    back = web.post("/detokenize", json={"model": model.name, "tokens": found["tokens"]}).json()
    assert back == {"prompt": text}


def test_health_and_metrics(web: httpx.Client, client: openai.OpenAI, model: Model) -> None:
    assert web.get("/health").json() == {"status": "ok"}
    client.chat.completions.create(model=model.name, messages=QUESTION, max_tokens=3)  # type: ignore[arg-type]
    text = web.get("/metrics").text
    assert 'glasklar_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "glasklar_first_token_seconds_bucket" in text
    assert "glasklar_answers_running 0.0" in text


def test_the_document_tells_of_errors_as_they_are(web: httpx.Client) -> None:
    document = web.get("/openapi.json").json()
    assert "422" not in json.dumps([one["responses"] for way in document["paths"].values() for one in way.values()])
    assert document["paths"]["/v1/responses"]["post"]["responses"]["default"]
    page = web.get("/docs").text
    assert "POST /v1/chat/completions" in page
    assert "reasoning_effort" in page
    assert "<script" not in page


def test_errors_in_the_middle_of_streams(
    server: LiveServer,
    client: openai.OpenAI,
    claude: anthropic.Anthropic,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each client raises its own error, wherever the stream breaks."""
    from glasklar.errors import CapacityError
    from glasklar.serve import chat

    taken: dict[str, int] = {}

    def push(self: Any, event: Any) -> Any:
        taken["n"] = taken.get("n", 0) + 1
        if taken["n"] > 5:
            raise CapacityError("the engine broke")
        return right(self, event)

    right = chat.Answer.push
    monkeypatch.setattr(chat.Answer, "push", push)
    ask: dict[str, Any] = {"model": model.name, "max_tokens": 50}
    with pytest.raises(openai.APIError, match="the engine broke"):
        list(client.chat.completions.create(messages=QUESTION, stream=True, **ask))
    taken.clear()
    kinds = [e.type for e in client.responses.create(model=model.name, input="x", stream=True, max_output_tokens=50)]
    assert kinds[-1] == "response.failed"
    taken.clear()
    with (
        pytest.raises(anthropic.APIStatusError, match="the engine broke"),
        claude.messages.stream(messages=QUESTION, **ask) as stream,
    ):
        list(stream)
