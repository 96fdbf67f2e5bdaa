"""Guides from plain data: what they allow always parses, thinking keeps its budget, hostile grammars are refused."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from glasklar.data.tokenizer import END_THINK, THINK, Tokenizer
from glasklar.errors import RequestError
from glasklar.serve.grammar import GuideMaker, GuideSpec

VOCABULARY = 300  # more than the tokenizer has, as in many models


@pytest.fixture(scope="module")
def maker() -> GuideMaker:
    texts = [f'{{"name": "what", "a": {a}, "größe": {b}}}' for a in range(9) for b in range(9)]
    return GuideMaker(Tokenizer.train(texts, 275), VOCABULARY)


def grammar(schema: dict[str, Any]) -> str:
    return str(LLMatcher.grammar_from_json_schema(schema, {"whitespace_flexible": False}))


def walk(maker: GuideMaker, spec: GuideSpec, seed: int, most: int = 400) -> list[int]:
    """An answer of random tokens among those allowed, ended by a stop token."""
    rng, guide, made = random.Random(seed), maker.make(spec), list[int]()
    for _ in range(most):
        mask = guide.allowed()
        token = rng.choice(range(VOCABULARY) if mask is None else np.flatnonzero(mask).tolist())
        made.append(token)
        guide.accept(token)
        if token in maker.tokenizer.stop_ids:
            return made
    raise AssertionError(f"no end after {most} tokens")


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["größe", 'q"', None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("begins", ["content", "choice", "thinking"])
def test_random_tokens_under_a_grammar_always_parse(maker: GuideMaker, begins: Any) -> None:
    spec = GuideSpec(grammar=grammar(SCHEMA), budget=5, begins=begins)
    thought = 0
    for seed in range(30):
        made = walk(maker, spec, seed)
        text = maker.tokenizer.decode(made[:-1], skip_special=False)
        if begins == "choice":
            assert text.startswith((THINK, END_THINK))
        content = text.rpartition(END_THINK)[2]
        found = json.loads(content)
        assert set(found) == {"a", "b"}
        assert 0 <= found["a"] <= 99
        thought += THINK in text
    assert begins != "choice" or 0 < thought < 30


def test_a_budget_alone_ends_the_thinking_and_nothing_else(maker: GuideMaker) -> None:
    close = maker.tokenizer.end_think_id
    guide = maker.make(GuideSpec(budget=2, begins="thinking"))
    for token in (50, 51):
        assert guide.allowed() is None
        guide.accept(token)
    mask = guide.allowed()
    assert mask is not None
    assert np.flatnonzero(mask).tolist() == [close]
    guide.accept(close)
    assert guide.allowed() is None


def test_where_content_must_follow_the_thinking_cannot_be_the_end(maker: GuideMaker) -> None:
    mask = maker.make(GuideSpec(grammar=grammar(SCHEMA), begins="thinking")).allowed()
    assert mask is not None
    assert not mask[list(maker.tokenizer.stop_ids)].any()
    assert mask[maker.tokenizer.end_think_id]
    assert maker.make(GuideSpec(begins="thinking")).allowed() is None


def test_guides_of_one_grammar_do_not_share_their_place(maker: GuideMaker) -> None:
    spec = GuideSpec(grammar=grammar({"enum": ["ab"]}))
    one, two = maker.make(spec), maker.make(spec)
    one.accept(maker.tokenizer.encode('"')[0])
    masks = one.allowed(), two.allowed()
    assert masks[0] is not None
    assert masks[1] is not None
    assert not np.array_equal(*masks)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "too large": {"enum": [f"value {i}" for i in range(20_000)]},
    "too deep": nested(500),
    "another resource": {"$ref": "http://example.org/schema"},
    "only itself": {"$ref": "#"},
    "all of everything": {"allOf": [{"properties": {f"a{i}": {"pattern": f"^{i}.*"}}} for i in range(300)]},
    "unknown keyword": {"type": "array", "contains": {}},
    "unknown type": {"type": "wizard"},
    "pattern": {"type": "string", "pattern": "(["},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused_in_bounded_time(maker: GuideMaker, name: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(RequestError, match="grammar"):
        maker.make(GuideSpec(grammar=grammar(HOSTILE[name])))
    assert time.perf_counter() - begin < 2


HEAVY: dict[str, dict[str, Any]] = {
    "repeated patterns": {"anyOf": [{"type": "string", "pattern": f"(x{{1,{i}}}y|[a-z]{{2,99}}z){{1,90}}"}
                                    for i in range(1, 300)]},
    "nested repetition": {"type": "string", "pattern": "((((a{1,100}){1,100}){1,100}){1,100})"},
    "long array": {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}},
    "many properties": {"type": "object",
                        "properties": {f"p{i}": {"type": "string", "pattern": "a{1,500}b"} for i in range(500)}},
}  # fmt: skip


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_schemas_take_bounded_time_a_step(maker: GuideMaker, name: str) -> None:
    rng, spec = random.Random(1), GuideSpec(grammar=grammar(HEAVY[name]))
    begin = time.perf_counter()
    guide = maker.make(spec)
    for _ in range(50):
        mask = guide.allowed()
        assert time.perf_counter() - begin < 2
        if mask is None or not mask.any():  # more than a step may cost: the engine ends the answer with an error
            break
        begin = time.perf_counter()
        guide.accept(rng.choice(np.flatnonzero(mask).tolist()))
