"""What a run releases is a model that others can open: `transformers` reads the folder and computes the same."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from glasklar.data.chat import Message, render
from glasklar.engine.engine import Engine
from glasklar.engine.request import SamplingParams
from glasklar.loading import load
from glasklar.runtime import Runtime

logging.set_verbosity_error()


@torch.inference_mode()
def test_transformers_computes_the_same(smoke_run: Path, runtime: Runtime) -> None:
    ours = load(smoke_run / "model", runtime, "float32")
    theirs = AutoModelForCausalLM.from_pretrained(smoke_run / "model", dtype=torch.float32).eval()
    ids_BT = torch.randint(0, ours.config.vocab_size, (3, 50), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids_BT).logits
    assert (ours.logits(ids_BT) - expected).abs().max() <= 1e-4 * expected.abs().max()
    prompt = ids_BT[0, :9].tolist()
    [answer] = Engine(ours.network).generate([prompt], SamplingParams(max_tokens=64))
    theirs.generation_config.eos_token_id = None  # both go on to the full length
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, 9:]
    assert answer.ids == expected.tolist()


def test_transformers_renders_the_same_prompt(smoke_run: Path, runtime: Runtime) -> None:
    ours = load(smoke_run / "model", runtime)
    theirs = AutoTokenizer.from_pretrained(smoke_run / "model")
    said = [("system", "Be brief."), ("user", "1+2"), ("assistant", "3"), ("user", "Und 3+4?")]
    for thinking in (None, True, False):
        expected = theirs.apply_chat_template(
            [{"role": role, "content": text} for role, text in said], thinking=thinking, return_dict=False
        )
        assert render(ours.tokenizer, [Message(role=role, content=text) for role, text in said], thinking) == expected
