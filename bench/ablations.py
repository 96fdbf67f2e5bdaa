"""Is the mixture of experts real? Two ablations on `spark`.

    python bench/ablations.py RUN [--steps 400]     # RUN: a finished run of spark; writes docs/lab/ablations.json

1. Pretraining with and without the bias update: load of the busiest expert over the mean, layer by layer.
2. The released model with its routed experts silenced: what it loses on held-out pages.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from glasklar.runtime import Runtime, prepare, start

THREADS = prepare()

import torch  # noqa: E402  the environment comes first

from glasklar.corpus import prepare as prepare_corpus  # noqa: E402
from glasklar.data.batches import PackedDocuments, Packer  # noqa: E402
from glasklar.data.procedural import Mixture, as_exchange  # noqa: E402
from glasklar.learn.objectives import LanguageConfig, language_loss  # noqa: E402
from glasklar.learn.optim import make_optimizer  # noqa: E402
from glasklar.loading import load  # noqa: E402
from glasklar.model.init import build, initialise  # noqa: E402
from glasklar.ops.select import select  # noqa: E402
from glasklar.recipe import PretrainStage, Recipe, load_recipe  # noqa: E402
from glasklar.stages import LanguageRunner  # noqa: E402

LAB = Path(__file__).parents[1] / "docs" / "lab"
LAST = 50  # steps whose mean load counts


def balance(recipe: Recipe, steps: int, speed: float, runtime: Runtime, folder: Path) -> list[float]:
    """Mean over the last steps of max/mean load in each layer, after pretraining with this speed of the bias update.
    The sequence-wise balance loss stays off in both, so that the bias alone is seen."""
    corpus = prepare_corpus(recipe, folder)
    stage = next(stage for stage in recipe.stages if isinstance(stage, PretrainStage))
    language = stage.language.replace(balance_speed=speed, balance_weight=0.0)
    stage = stage.replace(language=language, steps=steps)
    model = initialise(build(recipe.model, select(runtime), dtype=runtime.dtype), recipe.seed)
    packer = Packer(corpus.train, rows=stage.rows, length=stage.length, seed=recipe.seed)
    runner = LanguageRunner(stage, model, make_optimizer(model, stage.optimizer), packer, runtime.device)
    loads = [runner.step(k)["load_max_mean"] for k in range(steps)]
    return [round(fmean(layer), 3) for layer in zip(*loads[-LAST:], strict=True)]


@torch.inference_mode()
def silenced(run: Path, runtime: Runtime) -> dict[str, float]:
    """Loss (nats a token) of the released model on worked test problems: as it is, and without its routed experts."""
    model = load(run / "model", runtime)
    assert model.tokenizer is not None
    recipe = Recipe.read(json.loads((run / "recipe.json").read_text()), str(run))
    mixture = Mixture.of(recipe.tasks)
    texts = [as_exchange(mixture.draw("test", 5, i)[1], True) for i in range(512)]
    ids = model.tokenizer.encode_many(texts, trusted=True)
    sequences = [([model.tokenizer.bos_id, *one], [1.0] * (len(one) + 1)) for one in ids]
    packer = Packer(PackedDocuments.of(sequences), rows=32, length=128, seed=0)
    objective = LanguageConfig(mtp_weight=0.0, balance_weight=0.0)

    def loss() -> float:
        return fmean(language_loss(model.network, packer.batch(k), objective).parts["loss"] for k in range(6))

    whole = loss()
    for layer in model.network.moe_layers():
        layer.down_EDF.zero_()
    return {"as it is": whole, "routed experts silenced": loss()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=LAB)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    runtime = start(THREADS)
    recipe = load_recipe("spark")
    result: dict[str, Any] = {"steps": arguments.steps, "loss": silenced(arguments.run, runtime), "load_max_mean": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, speed in {"bias update": 2e-3, "no bias update": 0.0}.items():
            result["load_max_mean"][name] = balance(recipe, arguments.steps, speed, runtime, Path(folder))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "ablations.json").write_text(json.dumps(result, indent=1))
    if arguments.json:
        print(json.dumps(result))
        return
    for name, loads in result["load_max_mean"].items():
        print(f"{name:26} max/mean load by layer: {', '.join(f'{x:.2f}' for x in loads)}")
    for name, value in result["loss"].items():
        print(f"{name:26} {value:.3f} nats a token on worked test problems")


if __name__ == "__main__":
    main()
