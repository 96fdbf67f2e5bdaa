"""A finished run with figures made up here, in the formats that the pipeline writes."""

import json
import math
import random
from pathlib import Path

from glasklar.provenance.ledger import checkpoint_data
from glasklar.provenance.rundir import RunDir

MODEL = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "q_lora_rank": 64,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32, "intermediate_size": 256,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
ADAM = {"kind": "adamw", "lr": 2e-4}
RECIPE = {
    "name": "tiny",
    "description": "Sums and <letters> that learn to think",
    "seed": 0,
    "compute": "bf16",
    "model": MODEL,
    "tokenizer": {"vocab_size": 512},
    "tasks": [{"name": name, "reason": name != "scope"} for name in ("sum", "letters", "equation", "scope")],
    "sources": [{"kind": "tasks", "documents": 120_000, "thoughts": 0.5}, {"kind": "text"}],
    "stages": [
        {"kind": "pretrain", "steps": 400, "rows": 64, "length": 128, "optimizer": {"kind": "muon", "lr": 4e-3}},
        {"kind": "sft", "steps": 60, "demonstrations": 3000, "thoughts": 0.3, "optimizer": ADAM},
        {"kind": "rl", "steps": 50, "rollout": {"method": "grpo", "prompts": 32, "samples": 16}, "optimizer": ADAM},
    ],
}
ENERGY = {"source": "estimate", "coverage": 0.0, "boundary": "CPU seconds of this process x 10 W"}


class Writer:
    """Writes the lines of a run one after the other, counting tokens and seconds."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.tokens, self.seconds, self.draw = run, 0, 0.0, random.Random(0)

    def step(self, stage: str, step: int, of: int, tokens: int, seconds: float, **figures: object) -> None:
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        spread = [1 + 3 * math.exp(-self.tokens / 4e5) + 0.2 * layer + 0.1 * self.draw.random() for layer in range(3)]
        line = {"stage": stage, "step": step, "of": of, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
        self.run.metrics.append({**line, "load_max_mean": spread, "gradient_norm": 0.5, "lr": 1e-3, **figures})

    def evaluation(self, name: str, step: int, tasks: dict, **more: object) -> None:
        self.seconds += 5
        self.run.metrics.append({"evaluation": name, "step": step, "tasks": tasks, "seconds": self.seconds, **more})

    def checkpoint(self, stage: str, step: int, seconds: float, flops: float) -> None:
        data = checkpoint_data(
            stage=stage, step=step, state_hash=f"{step:064x}", loss=1.0, gradient_norm=0.5, flops=flops,
            seconds=seconds, energy={"joules": 10 * seconds, **ENERGY},
            cost={"usd": 10 * seconds / 3.6e6 * 0.3, "usd_per_kwh": 0.3}, metrics=self.run.metrics.mark(),
        )  # fmt: skip
        self.run.ledger.append("checkpoint", data)


def scores(greedy: float, length: float, **more: float) -> dict:
    return {"n": 128, "greedy": greedy, "length": length, **more}


BEFORE = {
    "sum": scores(0.55, 14, thinking=0.93, direct=0.40, **{"pass@1": 0.52, "pass@16": 0.97}),
    "letters": scores(0.70, 16, thinking=0.95, direct=0.55, **{"pass@1": 0.66, "pass@16": 0.99}),
    "equation": scores(0.61, 12, thinking=0.90, direct=0.50, **{"pass@1": 0.60, "pass@16": 0.95}),
    "scope": scores(0.99, 20),
}
AFTER = {
    "sum": scores(0.96, 41, thinking=0.96, direct=0.41, **{"pass@1": 0.95, "pass@16": 0.99}),
    "letters": scores(0.97, 38, thinking=0.98, direct=0.54, **{"pass@1": 0.96, "pass@16": 1.0}),
    "equation": scores(0.90, 33, thinking=0.92, direct=0.50, **{"pass@1": 0.90, "pass@16": 0.97}),
    "scope": scores(0.98, 21),
}


def write_run(folder: Path, *, rl: bool = True, baselines: bool = True) -> RunDir:
    """A finished run in `folder`, its lock given back."""
    canonical = json.dumps(RECIPE, sort_keys=True, separators=(",", ":"))
    with RunDir.create_or_open(folder, canonical, "") as run:
        code = {"version": "0.1.0", "files": "ab" * 32, "git": None}
        machine = {"cpu": "Two Core", "threads": 2, "torch": "2.13.0"}
        run.ledger.append("run", {"code": code, "machine": machine})
        run.ledger.append("data", {"documents": 120_000, "tokens": 9_000_000, "root": "cd" * 32})
        run.ledger.append("tokenizer", {"hash": "ef" * 32})
        writer = Writer(run)
        for stage, steps, start, end in (("pretrain", 400, 6.2, 0.9), ("sft", 60, 0.5, 0.2)):
            for step in range(1, steps + 1):
                loss = end + (start - end) * math.exp(-6 * step / steps) + 0.05 * writer.draw.random()
                writer.step(stage, step, steps, 8192, 0.4, loss=loss)
            writer.checkpoint(stage, steps, 0.4 * steps, 3e10 * steps)
        writer.evaluation("after pretrain", 400, {}, bits_per_byte=1.234)
        writer.evaluation(
            "after sft",
            60,
            BEFORE,
            second_token_acceptance=0.71,
            load_max_mean=[1.1, 1.2],
            hard={name: {"greedy": 0.2} for name in BEFORE},
        )
        if rl:
            _reinforcement(writer)
        run.ledger.append("released", {"files": {}})
    if baselines:
        entries = [
            {"name": "more SFT, same demonstrations", "seconds": 130.0, "steps": 150, "tasks": BEFORE},
            {"name": "rejection sampling", "seconds": 128.0, "steps": 50, "tasks": AFTER},
        ]
        (folder / "baselines.json").write_text(json.dumps(entries))
    return run


def _reinforcement(writer: Writer) -> None:
    for step in range(1, 51):
        done = 1 / (1 + math.exp(-(step - 18) / 5))
        noise = 0.03 * writer.draw.random()
        warnings = ["60 % of the groups are all alike: problems are too easy"] if step in (40, 44, 45) else []
        writer.step(
            "rl", step, 50, 9000, 2.4, loss=0.001 * noise, reward=0.6 + 0.33 * done + noise,
            thinking_share=0.3 + 0.65 * done, length=15 + 24 * done + 30 * noise, zero_variance=0.2 + 0.4 * done,
            truncated=0.02, entropy=0.4 - 0.2 * done, kl=0.1 * done, **({"warnings": warnings} if warnings else {}),
        )  # fmt: skip
        if step % 5 == 0:
            between = {
                name: scores(min(1.0, (1 - done) * BEFORE[name]["greedy"] + done * AFTER[name]["greedy"] + noise), 30)
                for name in ("sum", "letters", "equation")
            }
            writer.evaluation("rl step", step, between)
        if step % 25 == 0:
            writer.checkpoint("rl", step, 60.0, 4e11)
    writer.evaluation("after rl", 50, AFTER, hard={name: {"greedy": 0.45} for name in AFTER})
