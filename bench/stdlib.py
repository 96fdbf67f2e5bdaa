"""Real text: the `stdlib` recipe's network beside `xz -9`, our dense one, and transformers' Llama in the same loop.

    python bench/stdlib.py                  # 10 minutes each; docs/lab/stdlib.json and docs/lab/stdlib.png
    python bench/stdlib.py --minutes 1      # a quick look

All networks read the same batches with the same tokenizer, optimiser and schedule for the same time, and have as many
parameters at work on a token. Bits per byte are over whole files that none of them saw; `xz` gets the same files: each
alone, one after the other in one stream, and, as the networks did, after all the training files.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

from glasklar.runtime import prepare, start

THREADS = prepare()

from race import equal_active, llama, ours, race  # noqa: E402  the environment comes first

from glasklar.corpus import prepare as prepare_corpus  # noqa: E402
from glasklar.corpus import split_documents  # noqa: E402
from glasklar.recipe import PretrainStage, load_recipe  # noqa: E402

LAB = Path(__file__).parents[1] / "docs" / "lab"
WATCHED = 120_000  # bytes of held-out text that the curves are measured on; the end is measured on all


def xz(texts: list[bytes], seen: bytes) -> dict[str, float]:
    """Bits per byte of `xz -9`, whose window of 64 MiB holds everything."""

    def packed(content: bytes) -> int:
        return len(lzma.compress(content, preset=9))

    size = sum(map(len, texts))
    whole = b"".join(texts)
    return {
        "file by file": 8 * sum(map(packed, texts)) / size,
        "one stream": 8 * packed(whole) / size,
        "after the training files": 8 * (packed(seen + whole) - packed(seen)) / size,
    }


def measure(minutes: float) -> dict[str, Any]:
    runtime = start(THREADS)
    recipe = load_recipe("stdlib")
    [stage] = recipe.stages
    assert isinstance(stage, PretrainStage)
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare_corpus(recipe, Path(folder))
        texts = [document.text.encode() for document in corpus.held_out]
        seen = b"".join(document.text.encode() for document in split_documents(recipe)[0])
        result: dict[str, Any] = {"minutes": minutes, "corpus": corpus.facts, "xz": xz(texts, seen), "networks": []}
        makers = {
            "ours": lambda: ours("ours, mixture of experts", recipe.model, stage, corpus, runtime),
            "dense": lambda: ours("ours, dense", equal_active(recipe.model), stage, corpus, runtime),
            "llama": lambda: llama(recipe.model, stage, corpus, runtime),
        }
        for make in makers.values():
            found = race(make(), stage, corpus, minutes * 60, WATCHED)
            print(
                f"{found['name']:28} {found['bits_per_byte']:.3f} bits/byte, {found['tokens']} tokens", file=sys.stderr
            )
            result["networks"].append(found)
    return result


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for network in result["networks"]:
        curve = network["curve"]
        x, y = [p["seconds"] / 60 for p in curve], [p["bits_per_byte"] for p in curve]
        label = f"{network['name']} ({network['active'] / 1e6:.1f} M at work a token)"
        axes.plot(x, y, marker="o", markersize=3, label=label)
    for kind, dashes in (("one stream", "--"), ("after the training files", ":")):
        axes.axhline(result["xz"][kind], color="grey", linestyle=dashes, label=f"xz -9, {kind}")
    axes.set(xlabel="minutes of training on two cores", ylabel="bits per byte, held-out files")
    axes.set_title("Python's standard library, learned from nothing")
    axes.set_ylim(top=min(axes.get_ylim()[1], 4))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def table(result: dict[str, Any]) -> str:
    rows = [(f"xz -9, {kind}", f"{value:.3f}", "") for kind, value in result["xz"].items()]
    rows += [
        (n["name"], f"{n['bits_per_byte']:.3f}", f"{n['tokens'] / n['seconds']:,.0f} tokens/s, {n['steps']} steps")
        for n in result["networks"]
    ]
    return "\n".join(f"{name:28} {bits:>7} bits/byte  {rest}" for name, bits, rest in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=LAB)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.minutes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "stdlib.json").write_text(json.dumps(result, indent=1))
    plot(result, arguments.out / "stdlib.png")
    print(json.dumps(result) if arguments.json else table(result))


if __name__ == "__main__":
    main()
