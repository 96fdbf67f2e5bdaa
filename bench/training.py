"""Training speed on this CPU beside its peers: `python bench/training.py [--figure steps|grpo|all] [--json]`.

One run, one machine, same shape, batch and optimiser (AdamW): our mixture of experts and our dense network, and
`transformers`' DeepseekV3 and Llama, in bf16 autocast and in fp32 (faster for torch where the CPU has no bf16
instruction), each at the best of its variants: eager or compiled, attention by SDPA or by plain products. What is asked
for is asked of bf16; the rows of fp32 stand beside it. First every variant is tried for a few steps, then the best of
each side take turns, step by step, so that a busy machine slows all alike; figures are medians, ratios are medians of
ratios within a round. `--figure grpo` is in grpo.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glasklar import runtime

THREADS = runtime.prepare()

import torch  # noqa: E402  the environment comes first

from glasklar.data.batches import Batch  # noqa: E402
from glasklar.learn.loop import train_step  # noqa: E402
from glasklar.learn.objectives import LanguageConfig, language_loss  # noqa: E402
from glasklar.learn.optim import OptimizerConfig, make_optimizer  # noqa: E402
from glasklar.model.config import ModelConfig  # noqa: E402
from glasklar.model.init import build, initialise  # noqa: E402
from glasklar.ops.select import Ops, select  # noqa: E402

VOCAB = 512
# Rows and their length, then the network: "spark" is the recipe's (0.6M active of 1.1M parameters), "S" has 2.2M active
# of 5.8M, "M" 11M of 31M.
BATCH = {"spark": (32, 128), "S": (32, 256), "M": (16, 256)}
MLA = {
    "spark": dict(q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32),
    "S": dict(q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32),
    "M": dict(q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64),
}
TRUNK = {
    "spark": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256),
    "S": dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=384),
    "M": dict(hidden_size=384, num_hidden_layers=8, num_attention_heads=6, intermediate_size=768),
}
EXPERTS = {
    "spark": dict(n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1),
    "S": dict(n_routed_experts=16, num_experts_per_tok=3, n_shared_experts=1, first_k_dense_replace=1),
    "M": dict(n_routed_experts=16, num_experts_per_tok=3, n_shared_experts=1, first_k_dense_replace=1),
}

# (row, over row): what the project asks for, and what it aims at; None: reported.
FLOORS: dict[tuple[str, str], tuple[float, float] | None] = {
    ("ours MoE", "HF DeepseekV3 bf16"): (1.8, 3.0),
    ("ours MoE", "HF Llama bf16"): (1.0, 1.5),
    ("ours dense", "HF Llama bf16"): (1.4, 2.0),
    ("ours MoE", "HF DeepseekV3 fp32"): None,
    ("ours MoE", "HF Llama fp32"): None,
    ("ours dense", "HF Llama fp32"): None,
    ("ours MoE", "ours dense"): (1 / 1.25, 1 / 1.25),
}

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}

Step = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One side of the comparison: `make(precision, variant)` builds one training step."""

    name: str
    make: Callable[[str, str], Step]
    precisions: list[str]
    variants: list[str]


def shape(name: str, moe: bool) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_position_embeddings": BATCH[name][1],
        **TRUNK[name],
        **MLA[name],
    }
    if moe:
        fields |= {**EXPERTS[name], "moe_intermediate_size": TRUNK[name]["intermediate_size"] // 4}
    return ModelConfig(**fields)


def ids(name: str) -> torch.Tensor:
    return torch.randint(0, VOCAB, BATCH[name], generator=torch.Generator().manual_seed(0))


def ours(name: str, config: ModelConfig, ops: Ops, precision: str = "bf16") -> Step:
    """The step that `glasklar train` takes: packed rows, here of one document each, so that the work is the same."""
    model = initialise(build(config, ops, dtype=PRECISIONS[precision]), seed=0)
    optimizer = make_optimizer(model, OptimizerConfig(clip_norm=None))
    rows = ids(name)
    batch = Batch(
        ids_BT=rows,
        segments_BT=torch.zeros_like(rows),
        position_BT=torch.arange(rows.shape[1]).expand_as(rows).contiguous(),
        weight_BT=torch.ones(rows.shape),
    )
    objective = LanguageConfig(mtp_weight=0.0)
    return lambda: train_step(
        model, optimizer, [batch], lambda m, b: language_loss(m, b, objective), rate=1.0, balance_speed=1e-3
    )


def hugging_face(name: str, kind: str, precision: str, variant: str) -> Step:
    """`precision` "bf16": autocast over fp32 weights."""
    import transformers

    mode, attention = variant.split()

    trunk: dict[str, Any] = {
        "vocab_size": VOCAB, "max_position_embeddings": BATCH[name][1], "attn_implementation": attention,
        "use_cache": False,
    }  # fmt: skip
    if kind == "DeepseekV3":
        wanted = {*TRUNK[name], *MLA[name], *EXPERTS[name], "moe_intermediate_size"}
        fields = shape(name, moe=True).model_dump(include=wanted)
        fields |= {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
        fields["num_key_value_heads"] = fields["num_attention_heads"]
        model: Any = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**trunk, **fields))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**trunk, **llama_fields(name)))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = ids(name)
    forward = torch.compile(model, dynamic=False) if mode == "compiled" else model

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def llama_fields(name: str) -> dict[str, Any]:
    """A Llama with as many parameters as the mixture of experts has active ones; heads of equal width."""
    width, layers = TRUNK[name]["hidden_size"], TRUNK[name]["num_hidden_layers"]
    rest = active_parameters(shape(name, moe=True)) - 2 * VOCAB * width - layers * 4 * width * width
    hidden = round(rest / (layers * 3 * width) / 4) * 4
    return {**TRUNK[name], "num_key_value_heads": TRUNK[name]["num_attention_heads"], "intermediate_size": hidden}


def active_parameters(config: ModelConfig) -> int:
    """Matrices that one token meets, embedding and head included."""
    total = 0
    for key, parameter in build(config, device="meta").named_parameters():
        if parameter.ndim == 3:
            assert config.num_experts_per_tok is not None
            total += parameter.numel() * config.num_experts_per_tok // len(parameter)
        elif parameter.ndim == 2 and not key.endswith("gate.weight"):
            total += parameter.numel()
    return total


def contenders(name: str, compiled: bool, tables: list[str], precisions: list[str]) -> list[Contender]:
    here = runtime.Runtime(threads=THREADS)
    sides = []
    for label, moe in (("ours MoE", True), ("ours dense", False)):
        config = shape(name, moe)

        def mine(precision: str, table: str, config: ModelConfig = config) -> Step:
            return ours(name, config, select(here, table), precision)

        sides.append(Contender(label, mine, precisions, tables))
    modes = ["eager", *(["compiled"] if compiled else [])]
    variants = [f"{mode} {attention}" for mode in modes for attention in ("sdpa", "eager")]
    for kind in ("DeepseekV3", "Llama"):

        def theirs(precision: str, variant: str, kind: str = kind) -> Step:
            return hugging_face(name, kind, precision, variant)

        sides += [Contender(f"HF {kind} {precision}", theirs, [precision], variants) for precision in precisions]
    return sides


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def best_variant(side: Contender, tries: int) -> tuple[str, Step]:
    """Builds every variant and keeps the fastest; the others are dropped before the next one is built."""
    best: tuple[float, str, Step] | None = None
    for precision in side.precisions:
        for variant in side.variants:
            step = side.make(precision, variant)
            first = seconds(step)
            step()
            time_ = min(seconds(step) for _ in range(tries))
            label = f"{precision} {variant}"
            print(f"  {side.name:18} {label:22} {time_ * 1e3:7.0f} ms (first step {first:.1f} s)", file=sys.stderr)
            if best is None or time_ < best[0]:
                best = (time_, label, step)
    assert best is not None
    return best[1:]


def measure(name: str, rounds: int, tries: int, sides: list[Contender]) -> dict[str, Any]:
    chosen = {side.name: best_variant(side, tries) for side in sides}
    times: dict[str, list[float]] = {key: [] for key in chosen}
    for _ in range(rounds):
        for key, (_, step) in chosen.items():
            step()  # not timed: the one before it left the caches and the allocator to somebody else
            times[key].append(seconds(step))
    tokens = BATCH[name][0] * BATCH[name][1]
    rows = {
        key: {
            "variant": chosen[key][0],
            "ms": round(statistics.median(t) * 1e3, 1),
            "tokens_per_second": round(tokens / statistics.median(t)),
            "tokens_per_step": tokens,
        }
        for key, t in times.items()
    }
    ratios = []
    for (a, b), asked in FLOORS.items():
        if a in times and b in times:
            ratio = statistics.median(y / x for x, y in zip(times[a], times[b], strict=True))
            wanted = {} if asked is None else {"required": asked[0], "goal": asked[1]}
            ratios.append({"speed": a, "over": b, "ratio": round(ratio, 3), **wanted})
    return {"shape": f"shape {name}", "threads": THREADS, "rows": rows, "ratios": ratios}


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['shape']}, {result['threads']} threads"]
    for key, row in result["rows"].items():
        speed = f"{row['tokens_per_step']:6d} tokens in {row['ms']:8.1f} ms {row['tokens_per_second']:8d} tok/s"
        lines.append(f"  {key:18} {row['variant']:22} {speed}")
    for r in result["ratios"]:
        said = f"  {r['speed'] + ' / ' + r['over']:32} {r['ratio']:5.2f}x"
        if "required" in r:
            verdict = "goal" if r["ratio"] >= r["goal"] else "required" if r["ratio"] >= r["required"] else "MISSED"
            said += f"  required {r['required']:.2f}, goal {r['goal']:.2f}: {verdict}"
        lines.append(said)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", choices=("steps", "grpo", "all"), default="all")
    parser.add_argument("--shape", choices=sorted(BATCH), nargs="+", default=["spark", "S"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tries", type=int, default=3, help="timed steps of each variant before the best is chosen")
    parser.add_argument("--only", help="sides to measure, by a part of their name, separated by commas")
    parser.add_argument("--ops", help="our tables of operations to try, separated by commas; default: the best one")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--no-compile", action="store_true", help="leave the peers' compiled variants out (faster)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    # Every compiled variant counts as a recompilation of the same code; past the limit peers silently run eagerly.
    torch._dynamo.config.recompile_limit = 64
    here = runtime.start(THREADS, device="cpu")
    ops = args.ops.split(",") if args.ops else [select(here).name]
    results = []
    with contextlib.redirect_stdout(sys.stderr):
        if args.figure in ("steps", "all"):
            for shape_name in args.shape:
                sides = contenders(shape_name, not args.no_compile, ops, args.precision)
                if args.only:
                    sides = [side for side in sides if any(part in side.name for part in args.only.split(","))]
                results.append(measure(shape_name, args.rounds, args.tries, sides))
        if args.figure in ("grpo", "all"):
            import grpo

            results.append(grpo.measure(here))
    print(json.dumps(results, indent=1) if args.json else "\n\n".join(table(result) for result in results))


if __name__ == "__main__":
    main()
