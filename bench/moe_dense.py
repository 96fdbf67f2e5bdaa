"""Does a mixture of experts pay against a dense network? Per FLOP, and per second on this machine; two sizes.

    python bench/moe_dense.py                 # 3 minutes a network; docs/lab/moe-dense.json and .png

Same text (the `stdlib` recipe), batches, optimiser and schedule; the dense network has as many parameters as the other
one has at work on a token. It learns twice: once for as many seconds as the mixture, once for as many FLOPs, each time
with a whole decay of the rate.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from glasklar.runtime import prepare, start

THREADS = prepare()

from race import equal_active, ours, race  # noqa: E402  the environment comes first

from glasklar.corpus import prepare as prepare_corpus  # noqa: E402
from glasklar.recipe import PretrainStage, load_recipe  # noqa: E402

LAB = Path(__file__).parents[1] / "docs" / "lab"
WATCHED = 120_000
LARGE = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "q_lora_rank": 96, "kv_lora_rank": 64,
         "intermediate_size": 512, "moe_intermediate_size": 128}  # fmt: skip


def measure(minutes: float) -> dict[str, Any]:
    runtime = start(THREADS)
    recipe = load_recipe("stdlib")
    [stage] = recipe.stages
    assert isinstance(stage, PretrainStage)
    result: dict[str, Any] = {"minutes": minutes, "sizes": {}}
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare_corpus(recipe, Path(folder))
        for size, config in {"small": recipe.model, "large": recipe.model.replace(**LARGE)}.items():
            dense = equal_active(config)
            mixture = race(
                ours("mixture of experts", config, stage, corpus, runtime), stage, corpus, minutes * 60, WATCHED
            )
            found = [mixture]
            for name, flops in (("dense, equal seconds", None), ("dense, equal FLOPs", mixture["flops"])):
                runner = ours(name, dense, stage, corpus, runtime)
                found.append(race(runner, stage, corpus, minutes * 60, WATCHED, flops))
            for each in found:
                print(f"{size} {each['name']:20} {each['bits_per_byte']:.3f} bits/byte", file=sys.stderr)
            result["sizes"][size] = found
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(9, 7), layout="constrained", sharey="row")
    for row, (size, networks) in zip(grid, result["sizes"].items(), strict=True):
        mixture, seconds, flops = networks
        for axes, key, label, dense in zip(
            row, ("flops", "seconds"), ("training FLOPs", "seconds"), (flops, seconds), strict=True
        ):
            for network in (mixture, dense):
                curve = network["curve"]
                axes.plot([p[key] for p in curve], [p["bits_per_byte"] for p in curve], marker="o", markersize=3,
                          label=f"{network['name']}, {network['parameters'] / 1e6:.1f} M")  # fmt: skip
            active = networks[0]["active"] / 1e6
            axes.set(xlabel=label, title=f"{size}: {active:.1f} M parameters at work on a token")
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
        row[0].set_ylabel("bits per byte, held-out files")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--out", type=Path, default=LAB)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.minutes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "moe-dense.json").write_text(json.dumps(result, indent=1))
    plot(result, arguments.out / "moe-dense.png")
    if arguments.json:
        print(json.dumps(result))
        return
    for size, networks in result["sizes"].items():
        for n in networks:
            tokens = n["tokens"] / n["seconds"]
            print(f"{size:6} {n['name']:20} {n['bits_per_byte']:.3f} bits/byte  {tokens:,.0f} tokens/s")


if __name__ == "__main__":
    main()
