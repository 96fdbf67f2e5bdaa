"""The engine against a loop that computes every token from the whole text with no cache."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from glasklar.engine.cpu import library
from glasklar.engine.engine import Engine
from glasklar.engine.paged_runner import PagedRunner
from glasklar.engine.request import SamplingParams, TokenEvent
from glasklar.engine.runner import Result
from glasklar.engine.sampler import draw, uniform
from glasklar.errors import CapacityError, GlasklarError, RequestError
from glasklar.model.attention import document_mask
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise
from glasklar.model.transformer import Transformer
from glasklar.ops.select import tables

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 96, "intermediate_size": 48, "initializer_range": 0.3}  # fmt: skip
MLA = ModelConfig(
    **SIZES, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
)  # fmt: skip
GQA = ModelConfig(**SIZES, num_key_value_heads=2, head_dim=8)
CONFIGS = {"mla": MLA, "gqa": GQA}


def make(config: ModelConfig, ops: str = "reference", dtype: torch.dtype = torch.float32) -> Transformer:
    return initialise(build(config, tables()[ops], dtype=dtype), 3)


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return make(CONFIGS[request.param])


@pytest.fixture(autouse=True, params=["C++", "torch"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs over both kinds of passes."""
    if request.param == "torch":
        monkeypatch.setattr("glasklar.engine.engine.lacking", lambda model: "a test lacks them")
    elif library.best() is None:
        pytest.skip("the C++ pass is not compiled here")
    return request.param


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(61) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@torch.inference_mode()
def full_logits(model: Transformer, ids: list[int]) -> Tensor:
    """[T, W] from the whole text."""
    tokens = torch.tensor([ids])
    mask = document_mask(torch.zeros_like(tokens), model.dtype)
    at = model.at(torch.arange(len(ids))[None], mask)
    return model.logits(model(tokens, at).hidden_BTD)[0].float()


def oracle(model: Transformer, prompt: list[int], params: SamplingParams) -> list[int]:
    """Token by token, each from a pass over the whole text."""
    made: list[int] = []
    while len(made) < params.max_tokens and not (made and made[-1] in params.stop_ids):
        logits = full_logits(model, prompt + made)[-1:]
        if params.temperature == 0:
            made.append(int(logits.argmax()))
        else:
            number = uniform(np.array([params.seed], np.uint64), np.array([len(prompt) + len(made)]))
            made.append(int(draw(logits / params.temperature, torch.from_numpy(number))))
    return made


def collect(engine: Engine) -> dict[int, list[TokenEvent]]:
    """Steps until nothing is left."""
    events: dict[int, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request, []).append(event)
    return events


def assert_idle(engine: Engine) -> None:
    assert not engine.has_work
    assert engine.rows.n == 0
    assert engine.scheduler.running == []
    assert not engine._alternatives


def test_greedy_mix_of_arrivals_and_cancellations_against_full_recomputation(model: Transformer) -> None:
    engine, rng = Engine(model, max_slots=7), random.Random(5)
    asked = [(p, SamplingParams(max_tokens=rng.randint(1, 20), stop_ids=(7,))) for p in prompts(32)]
    events: dict[int, list[TokenEvent]] = {}
    ids: list[int] = []
    while engine.has_work or len(ids) < len(asked):
        ids += [engine.add(*asked[len(ids) + i]) for i in range(min(rng.randrange(4), len(asked) - len(ids)))]
        for event in engine.step():
            events.setdefault(event.request, []).append(event)
        if rng.random() < 0.2 and ids:
            engine.cancel(rng.choice(ids))
    finished = 0
    for number, (prompt, params) in zip(ids, asked, strict=True):
        wanted = oracle(model, prompt, params)
        made = [event.token for event in events.get(number, [])]
        assert made == wanted[: len(made)]
        if made and events[number][-1].finish:
            assert made == wanted
            assert events[number][-1].finish == ("stop" if wanted[-1] == 7 else "length")
            finished += 1
    assert finished > 20
    assert_idle(engine)


@pytest.mark.parametrize("ops", tables())
def test_sampled_answers_are_the_same_alone_and_in_a_batch(model: Transformer, ops: str) -> None:
    model = make(model.config, ops)
    asked = prompts(20)
    params = [SamplingParams(max_tokens=12, temperature=0.5 + i % 3 / 2, seed=i) for i in range(20)]
    together = Engine(model).generate(asked, params)
    for i in (0, 7, 19):
        assert Engine(model).generate([asked[i]], params[i])[0].ids == together[i].ids
        assert oracle(model, asked[i], params[i]) == together[i].ids


def test_special_neighbours_do_not_change_a_plain_answer(model: Transformer) -> None:
    asked = prompts(4)
    plain = SamplingParams(max_tokens=10, temperature=0.8, seed=11)
    special = SamplingParams(max_tokens=10, temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.2, logprobs=3)
    alone = Engine(model).generate([asked[0]], plain)[0]
    mixed = Engine(model).generate(asked, [plain, special, special, special])[0]
    assert mixed.ids == alone.ids


def test_logprobs_against_full_pass(model: Transformer) -> None:
    params = SamplingParams(max_tokens=9, temperature=1.3, top_k=4, seed=2, logprobs=3)
    for prompt, answer in zip(prompts(5), Engine(model).generate(prompts(5), params), strict=True):
        wanted = full_logits(model, prompt + answer.ids)[len(prompt) - 1 : -1].log_softmax(-1)
        np.testing.assert_allclose(
            answer.logprobs, wanted.gather(-1, torch.tensor(answer.ids)[:, None])[:, 0], atol=1e-4
        )
        best = wanted.topk(3)
        assert [[i for i, _ in row] for row in answer.alternatives] == best.indices.tolist()
        np.testing.assert_allclose([[p for _, p in row] for row in answer.alternatives], best.values, atol=1e-4)


@pytest.mark.parametrize("ops", tables())
def test_bf16_logprobs_near_full_pass(ops: str) -> None:
    model = make(MLA.replace(initializer_range=0.1), ops, torch.bfloat16)
    answers = Engine(model).generate(prompts(6), SamplingParams(max_tokens=9, temperature=1.0))
    for prompt, answer in zip(prompts(6), answers, strict=True):
        wanted = full_logits(model, prompt + answer.ids)[len(prompt) - 1 : -1].log_softmax(-1)
        np.testing.assert_allclose(
            answer.logprobs, wanted.gather(-1, torch.tensor(answer.ids)[:, None])[:, 0], atol=0.05
        )


def test_answers_keep_the_order_of_prompts_and_progress_is_told(model: Transformer) -> None:
    told: list[tuple[int, int]] = []
    params = [SamplingParams(max_tokens=1 + i % 5) for i in range(12)]
    answers = Engine(model, max_slots=3).generate(prompts(12), params, lambda *figures: told.append(figures))
    assert [len(a.ids) for a in answers] == [p.max_tokens for p in params]
    assert told[-1] == (12, 12)
    assert told == sorted(told)


def test_context_ends_the_answer(model: Transformer) -> None:
    (answer,) = Engine(model).generate([[1] * 90], SamplingParams(max_tokens=50))
    assert (len(answer.ids), answer.finish) == (6, "length")


def test_cancelled_request_makes_no_more_tokens(model: Transformer) -> None:
    engine = Engine(model)
    first, second = (engine.add(p, SamplingParams(max_tokens=5)) for p in prompts(2))
    engine.step()
    engine.cancel(first)
    assert set(collect(engine)) == {second}
    assert_idle(engine)


def test_nan_ends_its_request_and_no_other() -> None:
    model = make(MLA)
    clean = Engine(model).generate([[1, 2], [3, 4]], SamplingParams(max_tokens=6))
    with torch.no_grad():
        model.embed_tokens.weight[60] = float("nan")
    engine = Engine(model)
    first, bad, last = (engine.add(p, SamplingParams(max_tokens=6)) for p in ([1, 2], [5, 60, 5], [3, 4]))
    events = collect(engine)
    assert [e.finish for e in events[bad]] == ["error"]
    assert isinstance(events[bad][0].error, GlasklarError)
    assert [[e.token for e in events[i]] for i in (first, last)] == [answer.ids for answer in clean]
    again = engine.generate([[1, 2], [3, 4]], SamplingParams(max_tokens=6))  # in slots that held NaN
    assert [a.ids for a in again] == [a.ids for a in clean]
    with pytest.raises(GlasklarError, match="NaN"):
        engine.generate([[1, 2], [60]], SamplingParams(max_tokens=6))
    assert_idle(engine)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1, 61], "61.* 0 to 60"), ([-1], "-1"), ([1] * 96, "96 tokens.*96"), ([1] * 200, "200.*96")],
)
def test_impossible_prompts_are_refused_with_numbers(model: Transformer, prompt: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Engine(model).add(prompt, SamplingParams())


def test_request_larger_than_the_cache_is_refused(model: Transformer) -> None:
    engine = Engine(model, max_tokens=64)
    engine.add([1] * 30, SamplingParams(max_tokens=34))
    with pytest.raises(CapacityError, match=r"30 .*36 .*64"):
        engine.add([1] * 30, SamplingParams(max_tokens=36))


def test_small_cache_gives_the_same_answers(model: Transformer) -> None:
    params = SamplingParams(max_tokens=10)
    small = Engine(model, max_tokens=256)
    wanted = [a.ids for a in Engine(model).generate(prompts(24), params)]
    assert [a.ids for a in small.generate(prompts(24), params)] == wanted
    cache = small.runner.cache
    assert cache.bytes_allocated <= 256 * cache.bytes_per_token


def test_memory_that_runs_out_ends_the_requests_of_the_pass_and_no_other(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    (wanted,) = engine.generate([[1, 2]], SamplingParams(max_tokens=8))
    first = engine.add([1, 2], SamplingParams(max_tokens=8))
    events = engine.step()
    second = engine.add([3] * 40, SamplingParams(max_tokens=8))
    with monkeypatch.context() as patch:  # as if there were less memory than was promised
        patch.setattr(engine.runner, "prefill", out_of_room)
        events += engine.step()
    for later in collect(engine).values():
        events += later
    assert [e.token for e in events if e.request == first] == wanted.ids
    assert [(e.finish, type(e.error)) for e in events if e.request == second] == [("error", CapacityError)]
    assert_idle(engine)


def out_of_room(*_: object) -> Result:
    raise CapacityError("no room")


def test_a_pass_that_breaks_leaves_nothing_behind(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate(prompts(5), SamplingParams(max_tokens=4))
    assert_idle(engine)
    assert engine.generate(prompts(5), SamplingParams(max_tokens=4)) == Engine(model).generate(
        prompts(5), SamplingParams(max_tokens=4)
    )


def test_equal_prompts_are_computed_once_and_answered_each(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [prompt for prompt in prompts(4) for _ in range(6)]
    params = [SamplingParams(max_tokens=8, temperature=1.0, seed=i) for i in range(24)]
    engine, seen = Engine(model), []
    if isinstance(engine.runner, PagedRunner):
        native = engine.runner._run
        monkeypatch.setattr(engine.runner, "_run", lambda ids, *rest: seen.append(len(ids)) or native(ids, *rest))
        once = sum(map(len, prompts(4)))
    else:
        run = engine.runner._prefill
        monkeypatch.setattr(engine.runner, "_prefill", lambda group, at: seen.append(len(group)) or run(group, at))
        once = 4
    for prompt, settings in zip(asked, params, strict=True):
        engine.add(prompt, settings)
    engine._advance()
    computed = sum(seen) - (len(asked) if isinstance(engine.runner, PagedRunner) else 0)  # the first decoding
    assert computed == once
    engine = Engine(model)
    answers = engine.generate(asked, params)
    assert [a.ids for a in answers] == [oracle(model, p, s) for p, s in zip(asked, params, strict=True)]


def test_weights_changed_in_place_are_used_and_refused_while_running() -> None:
    model = make(MLA)
    engine = Engine(model)
    engine.generate(prompts(3), SamplingParams(max_tokens=4))
    model.load_state_dict(initialise(build(MLA), 8).state_dict())
    engine.refresh()
    answers = engine.generate(prompts(3), SamplingParams(max_tokens=4))
    assert [a.ids for a in answers] == [oracle(model, p, SamplingParams(max_tokens=4)) for p in prompts(3)]
    engine.add([1], SamplingParams())
    with pytest.raises(RequestError, match="running"):
        engine.refresh()


def test_statistics_count_tokens(model: Transformer) -> None:
    engine = Engine(model)
    engine.generate([[1] * 5, [2] * 7], SamplingParams(max_tokens=4))
    assert (engine.stats.prompt_tokens, engine.stats.tokens, engine.stats.steps) == (12, 8, 3)


def test_the_only_answer_may_give_way_to_a_prompt_that_is_being_read(
    model: Transformer, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if passes == "torch":
        pytest.skip("slots know no pieces")
    monkeypatch.setattr("glasklar.engine.paged.AHEAD", 1)
    long, params = (prompts(1, seed=5)[0] * 40)[:64], SamplingParams(max_tokens=32, temperature=0.0)
    for length in range(60, 65):  # the prompt has its pages, and reads on, when the answer beside it wants a third one
        engine = Engine(model, max_tokens=96, chunk_tokens=2, draft_tokens=0)
        asked = [long[:length], long[:2]]
        ids = [engine.add(prompt, params) for prompt in asked]
        events = []
        while engine.has_work:
            events += engine.step()
        assert engine.stats.preempted
        for request, prompt in zip(ids, asked, strict=True):
            assert [e.token for e in events if e.request == request] == oracle(model, prompt, params)


def test_a_fault_at_the_first_token_of_a_long_prompt_leaves_no_row(
    model: Transformer, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if passes == "torch":
        pytest.skip("slots know no pieces")
    engine = Engine(model, chunk_tokens=16)
    engine.add([1] * 50, SamplingParams(max_tokens=3))
    for _ in range(3):
        assert engine.step() == []
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_choose", lambda result, places: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert not engine.has_work
    assert engine.step() == []


@pytest.mark.parametrize("name", ["max_slots", "max_tokens", "prefill_tokens", "chunk_tokens", "draft_tokens"])
def test_settings_out_of_bounds_are_refused(model: Transformer, name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} = -5: must be"):
        Engine(model, **{name: -5})


def test_settings_that_passes_do_not_have_are_refused(
    model: Transformer, passes: str, caplog: pytest.LogCaptureFixture
) -> None:
    for setting in ({"chunk_tokens": 8}, {"draft_tokens": 2}, {"cache": "int8"}):
        with pytest.raises(RequestError, match=r"only passes of our own.* or `native`"):
            Engine(model, native=False, **setting)
    Engine(model, native=False, draft_tokens=0)
    assert not caplog.records
    half = make(CONFIGS["gqa"], dtype=torch.float16)
    if passes == "C++":
        with pytest.raises(RequestError, match=r"native = True: .*not in torch.float16: load them so"):
            Engine(half, native=True)
    Engine(half)
    assert "PyTorch makes the passes" in caplog.text


def test_a_long_prompt_for_which_memory_lacks_fails_alone(
    model: Transformer, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. Nothing of the piece that failed is found again."""
    if passes == "torch":
        pytest.skip("slots know no pieces")
    engine, params = Engine(model, chunk_tokens=16, draft_tokens=0), SamplingParams(max_tokens=6, temperature=0.0)
    assert isinstance(engine.runner, PagedRunner)
    short, long = prompts(1, longest=9)[0], prompts(1, seed=5)[0] * 40
    read, calls = engine.runner._read, 0

    def failing(part: list[tuple[int, int, int]], *rest: object) -> object:
        nonlocal calls
        calls += part[0][2] == engine.runner.spare  # type: ignore[union-attr]
        if calls == 3:
            raise torch.OutOfMemoryError("no room")
        return read(part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.runner, "_read", failing)
    first, second = engine.add(short, params), engine.add(long[:60], params)
    events = []
    while engine.has_work:
        events += engine.step()
    assert [str(e.error) for e in events if e.request == second] == ["out of memory: no room"]
    assert [e.token for e in events if e.request == first] == oracle(model, short, params)
    [answer] = engine.generate([long[:60]], params)
    assert answer.ids == oracle(model, long[:60], params)
    engine.runner.cache.check()
