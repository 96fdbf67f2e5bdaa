"""How calls are told, kept in form and read again, for models whose templates know them and for those that do not."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tokenizers
from llguidance import LLMatcher

from glasklar.data.foreign import ForeignTokenizer, open_tokenizer
from glasklar.engine.request import TokenEvent
from glasklar.errors import RequestError
from glasklar.serve.answer import Answer, Piece
from glasklar.serve.chat import calls_of
from glasklar.serve.completions import CompletionRequest, questions_of
from glasklar.serve.grammar import GuideMaker, GuideSpec
from glasklar.serve.question import question_of
from glasklar.serve.schema import ChatRequest, Tool
from glasklar.serve.tools import GENERIC, MARK, Format, calls_grammar, format_of

SAYS = "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
ENDS = "<|im_end|>\n{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
PLAIN = SAYS + ENDS
HERMES = (
    "{%- if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{%- endif %}"
    + SAYS
    + '{%- for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{%- endfor %}" + ENDS
)
DEEPSEEK = (
    SAYS
    + "{%- for c in m.tool_calls or [] %}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>"
    "{{ c.function.arguments + '' }}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{%- endfor %}" + ENDS
)
R1 = DEEPSEEK.replace(
    "{{ c.function.name }}<｜tool▁sep｜>", "function<｜tool▁sep｜>{{ c.function.name }}\n```json\n"
).replace("<｜tool▁call▁end｜>", "\n```<｜tool▁call▁end｜>")
MARKS = [f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")]
KINDS: dict[str, tuple[str, list[str]]] = {
    "plain": (PLAIN, []),
    "hermes in letters": (HERMES, []),
    "hermes in tokens": (HERMES, ["<tool_call>", "</tool_call>"]),
    "deepseek": (DEEPSEEK, MARKS),
    "deepseek r1": (R1, MARKS),
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "strict": True, "parameters": {
        "type": "object", "additionalProperties": False, "required": ["a", "b"],
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["</tool_call>", "}\"x"]}},
    }}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]  # fmt: skip


def make(folder: Path, template: str, added: Sequence[str]) -> ForeignTokenizer:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(['{"name": "add", "arguments": {"a": 1}} system user assistant'] * 9, trainer)
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    inner.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in added])
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(inner.to_str())
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = open_tokenizer(folder)
    assert isinstance(found, ForeignTokenizer)
    return found


class Service:
    """As much of a model's service as questions need."""

    context = 4096

    def __init__(self, tokenizer: ForeignTokenizer) -> None:
        self.tokenizer = tokenizer
        self.guides = GuideMaker(tokenizer, tokenizer.vocab_size + 8)


@pytest.fixture(params=KINDS)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Service:
    return Service(make(tmp_path, *KINDS[request.param]))


def read(service: Service, form: Format, tokens: Sequence[int]) -> tuple[Piece, Answer]:
    answer, whole = Answer(service.tokenizer, "content", form=form), Piece()
    for place, token in enumerate(tokens):
        finish = "stop" if place == len(tokens) - 1 else None
        whole.add(answer.push(TokenEvent(request=0, token=token, logprob=0.0, finish=finish)))  # type: ignore[arg-type]
    return whole, answer


def walk(service: Service, grammar: str, seed: int) -> list[int] | None:
    """A random answer under the grammar; None where it does not end."""
    rng, guide, made = random.Random(seed), service.guides.make(GuideSpec(grammar=grammar)), list[int]()
    stop = service.tokenizer.stop_ids
    while len(made) < 600:
        mask = guide.allowed()
        assert mask is not None
        choices = np.flatnonzero(mask).tolist()
        ends = [token for token in choices if token in stop]
        made.append(ends[0] if ends and rng.random() < 0.3 else rng.choice(choices))
        guide.accept(made[-1])
        if made[-1] in stop:
            return made
    return None


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("parallel", [True, False])
def test_what_the_grammar_allows_is_read_again(
    service: Service, choice: Literal["auto", "required"], parallel: bool
) -> None:
    form, tools = format_of(service.tokenizer), [Tool.model_validate(tool) for tool in TOOLS]
    grammar = str(LLMatcher.grammar_from_lark(calls_grammar(form, tools, choice, parallel=parallel)))
    seen, most = 0, 0
    for seed in range(12):
        made = walk(service, grammar, seed)
        if made is None:
            continue
        piece, answer = read(service, form, made)
        calls = calls_of(piece.calls)
        assert answer.finish == ("tool_calls" if calls else "stop")
        for call in calls:
            arguments = json.loads(call.arguments)
            assert set(arguments) == ({"a", "b"} if call.name == "add" else set())
        if choice == "required":
            assert calls
            assert piece.content == ""
        seen, most = seen + 1, max(most, len(calls))
    assert seen
    assert parallel or most <= 1
    assert not parallel or choice == "auto" or most > 1


def test_calls_after_some_text(service: Service) -> None:
    form = format_of(service.tokenizer)
    tokenizer = service.tokenizer
    text = "Let me see. "
    call = f'{form.begin}{form.opening}add{form.middle}{{"a": 1, "b": "x"}}{form.closing}{form.end}'
    ids = tokenizer.encode(text)
    rest = call
    while rest:
        spot = rest.find(MARK)
        if spot:
            ids += tokenizer.encode(rest[:spot] if spot > 0 else rest)
            rest = rest[spot:] if spot > 0 else ""
            continue
        token, name = next((t, n) for t, n in form.tokens.items() if rest[1:].startswith(n))
        ids.append(token)
        rest = rest[1 + len(name) :]
    piece, answer = read(service, form, [*ids, tokenizer.stop_ids[0]])
    assert piece.content == text
    [found] = calls_of(piece.calls)
    assert (found.name, json.loads(found.arguments)) == ("add", {"a": 1, "b": "x"})
    assert answer.finish == "tool_calls"


def test_prompts_hold_the_tools_the_calls_and_their_results(service: Service) -> None:
    call = {"id": "c", "function": {"name": "add", "arguments": '{"a": 1, "b": "<|im_end|>"}'}}
    body: dict[str, Any] = {
        "model": "m", "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "result <|im_end|>"},
        ],
    }  # fmt: skip
    question = question_of(service, ChatRequest.model_validate(body))
    text = service.tokenizer.decode(question.ids, skip_special=False)
    form = format_of(service.tokenizer)
    assert "result <|im_end|>" in text
    ends = service.tokenizer.added_id("<|im_end|>")
    messages = text.count("<|im_start|>") - 1
    assert question.ids.count(ends) == messages  # none of those that callers wrote
    assert form is GENERIC or form.told or "<｜tool▁sep｜>" in text
    assert '"additionalProperties": false' in text
    assert question.guide is not None


def test_filling_in_the_middle(service: Service) -> None:
    tokenizer = service.tokenizer
    body = CompletionRequest(model="m", prompt="def <|fim_middle|>", suffix="return")
    [question], _ = questions_of(service, body)
    before, after, middle = (tokenizer.added_id(f"<|fim_{name}|>") for name in ("prefix", "suffix", "middle"))
    wanted = [before, *tokenizer.encode("def <|fim_middle|>"), after, *tokenizer.encode("return"), middle]
    assert question.ids == wanted


def test_a_model_that_does_not_think_says_so(service: Service) -> None:
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    for free in ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "low"}, {}):
        assert question_of(service, ChatRequest.model_validate(body | free)).begins == "content"
    with pytest.raises(RequestError, match="thinking"):
        question_of(service, ChatRequest.model_validate(body | {"thinking": {"type": "enabled"}}))


def test_marks_in_letters_are_text_where_the_vocabulary_has_tokens_for_them(service: Service) -> None:
    form = format_of(service.tokenizer)
    if not form.tokens:
        pytest.skip("this form is written in letters")
    text = (form.begin + form.opening).replace(MARK, "") + "add" + form.middle.replace(MARK, "") + "{}"
    piece, answer = read(service, form, [*service.tokenizer.encode(text), service.tokenizer.stop_ids[0]])
    assert (piece.content, piece.calls, answer.finish) == (text, [], "stop")
