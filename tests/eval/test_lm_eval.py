"""The lm-eval adapter against log-probabilities computed one text at a time, and against the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

VOCAB = 288
FIELDS = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 64, "max_position_embeddings": 48, "rope_interleave": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory, runtime):
    from glasklar.data.tokenizer import Tokenizer
    from glasklar.eval.lm_eval import GlasklarLM
    from glasklar.loading import load
    from glasklar.model.checkpoint import save_model
    from glasklar.model.config import ModelConfig
    from glasklar.model.init import build, initialise

    texts = [f"What is {a} + {b}? It is {a + b}, größer" for a in range(20) for b in range(20)]
    tokenizer = Tokenizer.train(texts, vocab_size=270)
    folder: Path = tmp_path_factory.mktemp("lm") / "tiny"
    config = ModelConfig.read({**FIELDS, "initializer_range": 0.2}, "tiny")
    save_model(initialise(build(config), 1), folder, extra=tokenizer.files())
    return GlasklarLM(load(folder, runtime, "float32"), batch_size=3)


def instances(kind: str, *args: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(args)]


def alone(lm, context: list[int], rest: list[int]) -> tuple[float, bool]:
    logits = lm.model.logits([*context, *rest])[len(context) - 1 : -1]
    wanted = torch.tensor(rest)
    return logits.log_softmax(-1).gather(-1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())


def test_log_likelihoods_in_batches_against_one_at_a_time(lm) -> None:
    pairs = [("What is", " 3 + 4?"), ("It", " is 7"), ("", "größer"), ("What is 1 + 2? It ", "is 3"), ("a", "b")]
    found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for (context, rest), (logprob, greedy) in zip(pairs, found, strict=True):
        ids, start = [lm.words.bos_id, *lm.words.encode(context + rest)], 1 + len(lm.words.encode(context.rstrip()))
        expected, first = alone(lm, ids[:start], ids[start:])
        assert (logprob, greedy) == (pytest.approx(expected, abs=1e-4), first)


def test_quantised_models_are_scored_by_the_same_pass_that_answers(lm) -> None:
    from glasklar.engine.cpu import library
    from glasklar.eval.lm_eval import GlasklarLM

    if library.best() is None:
        pytest.skip("the C++ pass is not compiled")
    small = GlasklarLM(str(lm.model.folder), quantize="int8", batch_size=2)
    pairs = [("What is", " 3 + 4?"), ("It", " is 7"), ("", "größer")]
    found = small.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    close = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for (logprob, _), (exact, _) in zip(found, close, strict=True):
        assert logprob != exact
        assert logprob == pytest.approx(exact, rel=0.05)


def test_greedy_continuations_are_called_greedy(lm) -> None:
    from glasklar.engine.engine import Engine
    from glasklar.engine.request import SamplingParams

    prompt = [lm.words.bos_id, *lm.words.encode("What is")]
    [answer] = Engine(lm.model.network).generate([prompt], SamplingParams(max_tokens=5, temperature=0.0))
    assert lm._loglikelihood_tokens([(("", ""), prompt, answer.ids)])[0][1]
    other = [*answer.ids[:-1], (answer.ids[-1] + 1) % 270]
    assert not lm._loglikelihood_tokens([(("", ""), prompt, other)])[0][1]


def test_texts_longer_than_the_context_are_scored_in_windows(lm) -> None:
    text = "What is 3 + 4? It is 7, größer " * 6
    [total] = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    ids, size = lm.words.encode(text), lm.max_length
    assert len(ids) > 2 * size
    expected = alone(lm, [lm.words.bos_id], ids[:size])[0]
    place = size
    while place < len(ids):
        end = min(place + size, len(ids))
        # lm-eval's windows: the last one is filled up with context.
        expected += alone(lm, ids[max(0, end - size - 1) : place], ids[place:end])[0]
        place = end
    assert total == pytest.approx(expected, abs=1e-3)


def test_generation_stops_before_the_first_stop_text(lm) -> None:
    free = lm.generate_until(
        instances("generate_until", ("What is", {"until": [], "max_gen_toks": 20})), disable_tqdm=True
    )[0]
    stop = free[4:6]
    pieces = lm.generate_until(
        instances("generate_until", ("What is", {"until": [stop], "max_gen_toks": 20}), ("It", {"max_gen_toks": 3})),
        disable_tqdm=True,
    )
    assert pieces[0] == free[: free.index(stop)]
    assert pieces[1]


def test_unknown_settings_are_refused(lm) -> None:
    from glasklar.errors import RequestError

    with pytest.raises(RequestError, match="'num_beams'"):
        lm.generate_until(instances("generate_until", ("What", {"num_beams": 4})), disable_tqdm=True)


def test_lm_eval_itself_runs_a_task_over_it(lm, tmp_path: Path) -> None:
    """A task of two questions from a local file, scored by lm-eval's own evaluator."""
    import json

    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    lines = [{"q": "What is 3 + 4?", "a": ["7", "größer"], "gold": 0}, {"q": "It is", "a": ["x", "9"], "gold": 1}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        f"  cache_dir: {tmp_path / 'cache'}\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{a}}'\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = simple_evaluate(lm, tasks=["tiny"], task_manager=manager, bootstrap_iters=0)
    right = 0
    for line in lines:
        scores = [alone(lm, [0, *lm.words.encode(line["q"])], lm.words.encode(f" {a}"))[0] for a in line["a"]]
        right += scores.index(max(scores)) == line["gold"]
    assert result["results"]["tiny"]["acc,none"] == right / 2


def test_lm_eval_itself_runs_a_task_over_the_api(smoke_run: Path, runtime, site, tmp_path: Path) -> None:
    """`--model local-chat-completions`, as the module's own text says: its answers are the engine's."""
    import json

    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from glasklar.data.chat import Message, parse, render
    from glasklar.engine.engine import Engine
    from glasklar.engine.request import SamplingParams
    from glasklar.loading import load
    from glasklar.serve.live import LiveServer

    model = load(smoke_run / "model", runtime)
    questions = ["What is 3+4?", "hello"]
    prompts = [render(model.tokenizer, [Message(role="user", content=text)], None) for text in questions]
    settings = SamplingParams(max_tokens=12, temperature=0.0, stop_ids=model.tokenizer.stop_ids)
    wanted = [
        parse(model.tokenizer, answer.ids, None).content for answer in Engine(model.network).generate(prompts, settings)
    ]
    lines = [{"q": question, "a": answer} for question, answer in zip(questions, wanted, strict=True)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "said.yaml").write_text(
        f"task: said\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        f"  cache_dir: {tmp_path / 'cache'}\noutput_type: generate_until\ntest_split: test\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_target: '{{a}}'\ngeneration_kwargs:\n  max_gen_toks: 12\n  until: ['@@']\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    with LiveServer(smoke_run, site) as live:
        live.release(model)
        result = simple_evaluate(
            "local-chat-completions",
            model_args={"model": model.name, "base_url": f"{live.url}/v1/chat/completions"},
            tasks=["said"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            apply_chat_template=True,
            bootstrap_iters=0,
            log_samples=True,
        )
    said = {sample["doc"]["q"]: sample["resps"][0][0] for sample in result["samples"]["said"]}
    assert said == dict(zip(questions, wanted, strict=True))
    assert result["results"]["said"]["exact_match,none"] == 1
