"""A released model beside `transformers`: `python bench/oracle.py MODEL [--json]`.

Loads the same folder in both, in fp32, and compares logits on prompts of three lengths and 64 greedy tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from glasklar.runtime import prepare, start

THREADS = prepare()

import torch  # noqa: E402  the environment comes first
import transformers  # noqa: E402

from glasklar.engine.engine import Engine  # noqa: E402
from glasklar.engine.request import SamplingParams  # noqa: E402
from glasklar.loading import load  # noqa: E402

TOLERANCE, GREEDY = 1e-4, 64


@torch.inference_mode()
def compare(folder: Path) -> dict[str, Any]:
    """Largest difference of logits relative to the largest logit, and how many greedy tokens agree."""
    ours = load(folder, start(THREADS, device="cpu", compute="fp32"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for length in (1, 17, 100):
        ids_BT = torch.randint(0, ours.config.vocab_size, (3, length), generator=generator)
        expected = theirs(ids_BT).logits
        worst = max(worst, ((ours.logits(ids_BT) - expected).abs().max() / expected.abs().max()).item())
    prompt = [ours.tokenizer.bos_id if ours.tokenizer else 0, *range(20, 30)]
    [answer] = Engine(ours.network).generate([prompt], SamplingParams(max_tokens=GREEDY))
    theirs.generation_config.eos_token_id = None  # both go on to the full length
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=GREEDY, do_sample=False)
    reference = expected[0, len(prompt) :].tolist()
    same = next((i for i, (a, b) in enumerate(zip(answer.ids, reference, strict=True)) if a != b), GREEDY)
    return {
        "model": str(folder),
        "class": type(theirs).__name__,
        "relative_logit_difference": worst,
        "greedy_tokens_identical": same,
        "passed": worst <= TOLERANCE and same == GREEDY,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a released model's folder")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = compare(arguments.model)
    print(json.dumps(result) if arguments.json else "\n".join(f"{name:28} {value}" for name, value in result.items()))
    raise SystemExit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
