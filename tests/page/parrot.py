"""A model that thinks and answers what it is told: its output is whatever a test wants, through all that a model's
output passes on its way to the page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from glasklar.data.chat import Message
from glasklar.data.tokenizer import SPECIAL, Tokenizer
from glasklar.engine.request import SamplingParams, TokenEvent

PAUSES = {"slow ": 0.05, "": 0.0}  # seconds a token, by how the question begins


class Parrot:
    """Stands where `ModelService` stands. "slow " at the beginning of a question makes it take its time; "at once "
    leaves the thought out."""

    name = "parrot"
    waiting = 1
    context = 4096

    def __init__(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({}))
        self.tokenizer = Tokenizer.train(["aa"], len(SPECIAL) + 256)
        self.model = SimpleNamespace(
            name="parrot", folder=folder, single_turn=False, config=SimpleNamespace(max_position_embeddings=4096)
        )
        self.running = 0

    def prompt(self, messages: list[Message], thinking: bool | None) -> list[int]:
        return self.tokenizer.encode(messages[-1].content)

    async def stream(self, prompt: list[int], params: SamplingParams, **_: Any) -> AsyncGenerator[TokenEvent, None]:
        text = self.tokenizer.decode(prompt)
        pause = next(seconds for beginning, seconds in PAUSES.items() if text.startswith(beginning))
        tokenizer = self.tokenizer
        thought = [tokenizer.end_think_id] if text.startswith("at once ") else [
            tokenizer.think_id, *prompt, tokenizer.end_think_id,
        ]  # fmt: skip
        mark = tokenizer.encode(f" ({params.seed})") if params.temperature else []
        ids = [*thought, *prompt, *mark, tokenizer.eos_id]
        self.running += 1
        try:
            for k, token in enumerate(ids):
                last = k + 1 == len(ids)
                yield TokenEvent(request=1, token=token, logprob=-0.1, finish="stop" if last else None, cached=3)
                await asyncio.sleep(pause)
        finally:
            self.running -= 1

    async def inspect(self, ids: list[int], first: int) -> dict[str, Any]:
        """Two layers with four experts, of which token t chooses t and t + 1 modulo 4."""
        tokens = [
            {"id": t, "logprob": -0.1, "alternatives": [[t, -0.1], [9, -3.0]],
             "experts": [[[t % 4, 0.7], [(t + 1) % 4, 0.3]]] * 2}
            for t in ids[first:]
        ]  # fmt: skip
        return {"layers": [1, 2], "experts": 4, "tokens": tokens}

    def close(self) -> None:
        """Nothing runs on."""
