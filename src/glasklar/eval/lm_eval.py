"""EleutherAI's lm-eval over our network and engine, in this process.

    python -m glasklar.eval.lm_eval --model glasklar --model_args model=runs/spark --tasks hellaswag

takes lm-eval's own options; `model` is what every verb takes, and `dtype=` and `quantize=` go beside it. Over the API,
lm-eval needs nothing from here:

    lm_eval --model local-chat-completions --apply_chat_template --tasks gsm8k \\
        --model_args model=spark,base_url=http://127.0.0.1:8421/v1/chat/completions

That way takes tasks that are answered in words. Those that compare the log-probabilities of given answers need them of
the prompt's own tokens, which the server does not give: they run in this process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  lm-eval registers its own models only while it knows none
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from glasklar.data.tokenizer import Decoder, Tokenizer
from glasklar.engine.engine import Engine
from glasklar.engine.packed import PackedModel
from glasklar.engine.request import SamplingParams
from glasklar.errors import CheckpointError, RequestError
from glasklar.loading import Model, find_model, load
from glasklar.model.attention import document_mask
from glasklar.provenance.rundir import home
from glasklar.runtime import prepare, start

DEFAULT_TOKENS = 256  # of an answer where a task sets no limit; lm-eval's own default
# What a task may ask of a generation; anything else is refused rather than ignored.
_KNOWN = {"until", "max_gen_toks", "max_tokens", "temperature", "top_p", "top_k", "do_sample", "seed"}

Scored = tuple[tuple[str, str], list[int], list[int]]  # texts, ids of the context, ids to score


@register_model("glasklar")
class GlasklarLM(TemplateLM):
    """lm-eval's model interface.

    model        a loaded model, or a run, folder, hub id or name; `dtype`, `quantize`: how to load it
    batch_size   sequences scored at once
    max_length   most tokens of a sequence; default: the model's context
    """

    def __init__(
        self,
        model: Model | str,
        *,
        dtype: str | None = None,
        quantize: str | None = None,
        batch_size: int | str = 8,
        max_length: int | str | None = None,
        threads: int | None = None,
        max_batch_size: None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if max_batch_size is not None or not str(batch_size).isdigit():
            raise RequestError(f"batch_size={batch_size}, max_batch_size={max_batch_size}: give a number as batch_size")
        if device not in (None, "cpu"):
            raise RequestError(f"device={device}: the runtime chooses the device; leave it out")
        if isinstance(model, str):
            folder = find_model(model, home(os.environ))
            model = load(folder, start(prepare(threads)), dtype, quantize=quantize)
        if model.tokenizer is None:
            raise CheckpointError(f"{model.folder}: has no tokenizer.json; lm-eval asks in words")
        self.model = model
        self.words: Tokenizer = model.tokenizer
        self.batch_size = int(batch_size)
        self.max_length = int(max_length or model.config.max_position_embeddings)

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before texts without a context."""
        return next(iter(self.words.begin_ids), self.words.eos_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begin = [] if add_special_tokens is False else list(self.words.begin_ids)
        return [*begin, *self.words.encode(string)]

    # --- scoring ---------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) and whether greedy decoding would give it; longest sequences first."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            for place, scored in zip(places, self._score([requests[i] for i in places]), strict=True):
                results[place] = scored
        return results

    @torch.inference_mode()
    def _score(self, requests: Sequence[Scored]) -> Iterator[tuple[float, bool]]:
        # The last token is only predicted; what does not fit into the context is cut off at the beginning.
        rows = [[*context, *rest][-(self.max_length + 1) :] for _, context, rest in requests]
        counts = [min(len(rest), len(row) - 1) for row, (_, _, rest) in zip(rows, requests, strict=True)]
        for row, count, logits_TW in zip(rows, counts, self._last_logits(rows, counts), strict=True):
            wanted_T = torch.tensor(row[len(row) - count :], device=logits_TW.device)
            logprob_TW = logits_TW.log_softmax(-1)
            total = logprob_TW.gather(-1, wanted_T[:, None]).double().sum().item()
            yield total, bool((logits_TW.argmax(-1) == wanted_T).all())

    def _last_logits(self, rows: Sequence[list[int]], counts: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits [count, W] of the last `count` tokens of each row."""
        if isinstance(self.model.network, PackedModel):
            for row, count in zip(rows, counts, strict=True):
                yield self.model.logits(row[:-1])[len(row) - 1 - count :]
            return
        network = self.model.network
        length = max(len(row) - 1 for row in rows)
        ids_BT = torch.zeros(len(rows), length, dtype=torch.long, device=network.head_WD.device)
        for i, row in enumerate(rows):
            ids_BT[i, : len(row) - 1] = torch.tensor(row[:-1])
        position_BT = torch.arange(length, device=ids_BT.device).expand_as(ids_BT)
        at = network.at(position_BT, document_mask(torch.zeros_like(ids_BT), network.dtype))
        hidden_BTD = network(ids_BT, at).hidden_BTD
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            yield network.logits(hidden_BTD[i, len(row) - 1 - count : len(row) - 1]).float()

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) of whole texts, in windows that do not overlap where they are longer than the context."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            pairs: list[Scored] = [(("", text), list(context), list(rest)) for context, rest in windows]
            totals.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(pairs)))
        return totals

    # --- generation ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of a request's stop texts, all requests in one continuous batch."""
        engine = Engine(self.model.network)
        answers = [_Answer(self.words, *request.args) for request in requests]
        open_answers = {engine.add(self._fitting(answer), answer.params): answer for answer in answers}
        while engine.has_work:
            for event in engine.step():
                answer = open_answers.get(event.request)
                if event.error is not None:
                    raise event.error
                if answer is not None and answer.push(event.token, event.finish is not None):
                    engine.cancel(event.request)
                    del open_answers[event.request]
        return [answer.text for answer in answers]

    def _fitting(self, answer: _Answer) -> list[int]:
        """The end of a prompt that leaves room for the answer."""
        room = self.max_length - min(answer.params.max_tokens, self.max_length // 2)
        return self.tok_encode(answer.prompt)[-room:]


class _Answer:
    """One text while it grows."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, settings: dict[str, Any]) -> None:
        unknown = sorted(settings.keys() - _KNOWN)
        if unknown:
            raise RequestError(f"generation setting {unknown[0]!r}: known are {', '.join(sorted(_KNOWN))}")
        until = settings.get("until") or []
        self.prompt, self.text = prompt, ""
        self.until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        greedy = settings.get("do_sample") is False or not settings.get("temperature")
        self.params = SamplingParams(
            max_tokens=int(settings.get("max_gen_toks") or settings.get("max_tokens") or DEFAULT_TOKENS),
            temperature=0.0 if greedy else float(settings["temperature"]),
            top_p=1.0 if greedy else float(settings.get("top_p", 1.0)),
            top_k=0 if greedy else int(settings.get("top_k", 0)),
            seed=int(settings.get("seed", 0)),
            stop_ids=tokenizer.stop_ids,
        )
        self._decoder = Decoder(tokenizer)

    def push(self, token: int, last: bool) -> bool:
        """Takes a token up; True when the answer is complete."""
        self.text += self._decoder.push(token)
        if last:
            self.text += self._decoder.flush()
        found = [place for stop in self.until if (place := self.text.find(stop)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        return last or bool(found)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
