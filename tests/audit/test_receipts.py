"""Receipts: answers given under load come out the same alone; a receipt changed in one place does not verify."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from glasklar.audit.findings import Findings
from glasklar.audit.receipt import check_answer, find_by_root, sampling, verify_receipt
from glasklar.audit.verify import verify
from glasklar.engine.cpu.library import CacheKind
from glasklar.engine.engine import Engine
from glasklar.engine.paged_runner import computed_by
from glasklar.engine.request import Completion, SamplingParams
from glasklar.errors import RecordError
from glasklar.loading import Model, load
from glasklar.provenance.receipt import engine_identity, make_receipt, model_root, open_receipt
from glasklar.provenance.signing import Signer
from glasklar.runtime import Runtime

RECEIPTS, CONCURRENT = 200, 32


@pytest.fixture(scope="module")
def home(smoke_run: Path) -> Path:
    return smoke_run.parents[1]


@pytest.fixture(scope="module")
def model(smoke_run: Path, runtime: Runtime) -> Model:
    return load(smoke_run / "model", runtime)


@pytest.fixture(scope="module")
def facts(model: Model, runtime: Runtime) -> dict[str, Any]:
    machine = {**runtime.describe(), **computed_by(model.network)}
    return {"model": model_root(model.folder), "engine": engine_identity(machine)}


def receipt(
    home: Path, facts: dict[str, Any], prompt: list[int], params: SamplingParams, answer: Completion, exact: bool = True
) -> dict[str, Any]:
    return make_receipt(
        Signer.open(home),
        **facts,
        prompt=prompt,
        sampling=asdict(params),
        ids=answer.ids,
        logprobs=answer.logprobs,
        finish=answer.finish,
        guide=None,
        exact=exact,
    )


def under_load(model: Model, asked: list[tuple[list[int], SamplingParams]]) -> list[Completion]:
    """Answers while 32 requests run at a time; new ones come in whenever some have ended."""
    engine = Engine(model.network, max_slots=CONCURRENT)
    waiting, open_, done = list(range(len(asked))), {}, {}
    events: dict[int, list[Any]] = {}
    while len(done) < len(asked):
        while waiting and len(open_) < CONCURRENT:
            number = waiting.pop(0)
            open_[engine.add(*asked[number])] = number
        for event in engine.step():
            number = open_[event.request]
            events.setdefault(number, []).append(event)
            if event.finish is not None:
                del open_[event.request]
                ids = [e.token for e in events[number]]
                done[number] = Completion(ids=ids, logprobs=[e.logprob for e in events[number]], finish=event.finish)
    return [done[number] for number in range(len(asked))]


def questions(model: Model, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of many lengths, a third of them equal to others, under all kinds of settings."""
    rng = random.Random(8)
    prompts = [[rng.randrange(model.config.vocab_size) for _ in range(rng.randrange(2, 40))] for _ in range(count)]
    prompts = [rng.choice(prompts[:10]) if rng.random() < 0.3 else prompt for prompt in prompts]
    assert model.tokenizer is not None
    stop = (model.tokenizer.eos_id,)
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5},
        {"temperature": 1.3, "top_k": 20, "repetition_penalty": 1.1},
        {"logit_bias": {5: 2.5}, "min_p": 0.05, "temperature": 0.9, "logprobs": 3},
    ]
    return [
        (prompt, SamplingParams(max_tokens=rng.randrange(1, 24), seed=i, stop_ids=stop, **settings[i % len(settings)]))
        for i, prompt in enumerate(prompts)
    ]


def verdicts(model: Model, envelope: dict[str, Any]) -> list[str]:
    found = Findings("answer", "receipt")
    check_answer(open_receipt(json.loads(json.dumps(envelope)), "answer"), model, found)
    return [entry.verdict for entry in found.entries]


def test_answers_given_under_load_verify_to_the_bit(model: Model, home: Path, facts: dict[str, Any]) -> None:
    asked = questions(model, RECEIPTS)
    envelopes = [
        receipt(home, facts, *ask, answer) for ask, answer in zip(asked, under_load(model, asked), strict=True)
    ]
    assert [verdicts(model, envelope) for envelope in envelopes] == [["holds"] * 3] * RECEIPTS


def test_torch_passes_promise_tokens_alone(model: Model, home: Path, facts: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=8)
    [answer] = Engine(model.network, max_slots=1).generate([[1, 2, 3]], params)
    other = Completion(ids=answer.ids, logprobs=[0.0] * len(answer.ids), finish=answer.finish)
    assert verdicts(model, receipt(home, facts, [1, 2, 3], params, other, exact=False)) == [
        "holds",
        "holds",
        "unchecked",
    ]
    assert verdicts(model, receipt(home, facts, [1, 2, 3], params, other)) == ["holds", "holds", "fails"]


def test_answers_computed_alone_come_out_to_the_bit(model: Model, home: Path, facts: dict[str, Any]) -> None:
    for prompt, params in questions(model, 40):
        [answer] = Engine(model.network, max_slots=1).generate([prompt], params)
        assert verdicts(model, receipt(home, facts, prompt, params, answer)) == ["holds"] * 3


@pytest.fixture(scope="module")
def signed(model: Model, home: Path, facts: dict[str, Any]) -> dict[str, Any]:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    [answer] = Engine(model.network, max_slots=1).generate([[1, 2, 3]], params)
    return receipt(home, facts, [1, 2, 3], params, answer)


def test_receipt_finds_its_model_by_its_root(signed: dict[str, Any], home: Path, tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    path.write_text(json.dumps({"id": "chatcmpl-1", "receipt": signed}))
    found = verify(path, home=home)
    assert found.verdict == "holds", found
    assert "20 tokens come out the same" in str(found)
    said = {entry.subject: entry.text for entry in found.entries}
    assert "your own key" in said["signer"]
    assert "tokens under the signature" in said["question"]
    assert "max_tokens = 20" in said["settings"]
    assert find_by_root("00" * 32, home) is None
    elsewhere = verify_receipt(path, home=tmp_path)
    assert [entry.subject for entry in elsewhere.entries if entry.verdict == "unchecked"] == ["signer", "answer"]


def test_receipt_of_another_model(signed: dict[str, Any], home: Path, smoke_run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(smoke_run / "model", tmp_path / "model")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    (tmp_path / "answer.json").write_text(json.dumps(signed))
    found = verify_receipt(tmp_path / "answer.json", home=home, model=other)
    assert [entry.subject for entry in found.failures] == ["model"]


def resigned(home: Path, facts: dict[str, Any], signed: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A receipt that claims something else, signed by its own maker."""
    claim = open_receipt(signed, "answer")
    values = {
        "prompt": claim.prompt, "sampling": claim.sampling, "ids": claim.ids, "logprobs": [0.0], "finish": claim.finish,
        "exact": True, "guide": claim.guide,
    }  # fmt: skip
    return make_receipt(Signer.open(home), **{**facts, **values, **changes})


@pytest.mark.parametrize("what", ["one id", "an id less", "another seed", "another prompt", "another end", "logprobs"])
def test_false_claims_by_the_maker_do_not_verify(
    signed: dict[str, Any], home: Path, facts: dict[str, Any], tmp_path: Path, what: str
) -> None:
    claim = open_receipt(signed, "answer")
    changes: dict[str, Any] = {
        "one id": {"ids": [*claim.ids[:5], (claim.ids[5] + 1) % 300, *claim.ids[6:]]},
        "an id less": {"ids": claim.ids[:-1]},
        "another seed": {"sampling": {**claim.sampling, "seed": 4}},
        "another prompt": {"prompt": [1, 2, 4]},
        "another end": {"finish": "stop"},
        "logprobs": {},
    }
    path = tmp_path / "answer.json"
    path.write_text(json.dumps(resigned(home, facts, signed, **changes[what])))
    found = verify_receipt(path, home=home)
    wanted = {"another end": {"end", "log-probabilities"}, "logprobs": {"log-probabilities"}}
    assert {entry.subject for entry in found.failures} == wanted.get(what, {"answer"}), found
    if what == "one id":
        assert "from token 6 on" in str(found)


def test_one_changed_character_breaks_the_signature(signed: dict[str, Any], home: Path, tmp_path: Path) -> None:
    text = json.dumps(signed)
    path = tmp_path / "answer.json"
    rng = random.Random(2)
    for place in [rng.randrange(1, len(text) - 1) for _ in range(40)]:
        path.write_text(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :])
        try:
            found = verify_receipt(path, home=home)
        except RecordError:
            continue  # no JSON any more
        assert [entry.subject for entry in found.failures] == ["receipt"], (place, found)


def test_cut_off_answer_is_made_up_to_the_cut(
    signed: dict[str, Any], model: Model, home: Path, facts: dict[str, Any]
) -> None:
    claim = open_receipt(signed, "answer")
    cut = open_receipt(resigned(home, facts, signed, ids=claim.ids[:7], finish="cancelled"), "answer")
    found = Findings("answer", "receipt")
    check_answer(cut, model, found)
    assert found.entries[0].verdict == "holds"
    assert [entry.subject for entry in found.entries if entry.verdict == "unchecked"] == ["end"]


def test_setting_of_another_version_is_named(signed: dict[str, Any], home: Path, facts: dict[str, Any]) -> None:
    claim = open_receipt(signed, "answer")
    other = open_receipt(resigned(home, facts, signed, sampling={**claim.sampling, "mirostat": 2}), "answer")
    with pytest.raises(RecordError, match="mirostat"):
        sampling(other)


@pytest.mark.parametrize("beside", ["text", "message", "ids"])
def test_what_stands_beside_a_receipt_is_not_under_it(
    signed: dict[str, Any], home: Path, tmp_path: Path, beside: str
) -> None:
    """A true receipt lends nothing to a text that somebody writes beside it."""
    path = tmp_path / "answer.json"
    path.write_text(json.dumps({"receipt": signed, beside: "42"}))
    assert {entry.subject for entry in verify_receipt(path, home=home).failures} == {beside}


def test_receipt_that_is_there_twice(signed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "answer.json").write_text(f'{{"receipt": {json.dumps(signed)}, "receipt": {json.dumps(signed)}}}')
    with pytest.raises(RecordError, match="stands twice"):
        verify_receipt(tmp_path / "answer.json", home=tmp_path)


@pytest.mark.parametrize("ids", [[True, 2, 3], [1.0, 2, 3], [], "123", [-1]])
def test_tokens_are_whole_numbers(signed: dict[str, Any], home: Path, facts: dict[str, Any], ids: Any) -> None:
    with pytest.raises(RecordError, match="token ids"):
        open_receipt(resigned(home, facts, signed, ids=ids), "answer")


@pytest.mark.parametrize(
    ("machine", "verdict"),
    [({"threads": 10**9}, "fails"), ({"threads": True}, "fails"), ({"compute": "int1"}, "fails"),
     ({"cache": "int9"}, "fails"), ({"cache": []}, "fails"), ({"device": "cuda"}, "unchecked")],
)  # fmt: skip
def test_machine_that_a_verifier_should_not_become(
    signed: dict[str, Any], home: Path, facts: dict[str, Any], tmp_path: Path, machine: dict[str, Any], verdict: str
) -> None:
    engine = {**facts["engine"], "machine": {**facts["engine"]["machine"], **machine}}
    path = tmp_path / "answer.json"
    path.write_text(json.dumps(resigned(home, facts, signed, engine=engine)))
    found = verify_receipt(path, home=home)
    assert [e.verdict for e in found.entries if e.subject == "answer"] == [verdict], found


@pytest.mark.parametrize("cache", [None, "int8"])
def test_answers_of_packed_weights_are_packed_again(
    smoke_run: Path, home: Path, runtime: Runtime, facts: dict[str, Any], tmp_path: Path, cache: CacheKind | None
) -> None:
    packed = load(smoke_run / "model", runtime, quantize="int8")
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    [answer] = Engine(packed.network, cache=cache).generate([[1, 2, 3]], params)
    engine = engine_identity({**runtime.describe(), **computed_by(packed.network, cache)})
    path = tmp_path / "answer.json"
    path.write_text(json.dumps(receipt(home, {**facts, "engine": engine}, [1, 2, 3], params, answer)))
    found = verify(path, home=home)
    assert [e.verdict for e in found.entries if e.subject in ("answer", "end", "log-probabilities")] == ["holds"] * 3
