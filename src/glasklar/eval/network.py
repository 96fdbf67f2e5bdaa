"""What the network itself does on its answers: drafts of the prediction module, load of the experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from glasklar.data.batches import pack_rows
from glasklar.data.tokenizer import Tokenizer
from glasklar.eval.answers import Answer
from glasklar.learn.objectives import forward, targets
from glasklar.model.transformer import Transformer


@torch.inference_mode()
def second_token_acceptance(
    model: Transformer, tokenizer: Tokenizer, answers: Sequence[Answer], *, length: int
) -> float:
    """Acceptance of the MTP head's greedy draft on greedily made answers (thoughts included).

    At each position the main head gives the next token and the first prediction module, told of it, drafts the one
    after; the draft is accepted where it is what the model itself went on with (DeepSeek-V3 section 5.4.3: 85-90 %).
    """
    sequences = [(a.prompt + a.completion.ids, [0.0] * len(a.prompt) + [1.0] * len(a.completion.ids)) for a in answers]
    batch = pack_rows(sequences, length=length, rows_multiple=1, pad_id=tokenizer.pad_id).batch
    output, at = forward(model, batch)
    known_BT, _ = targets(batch, 1)
    wanted_BT, counted_BT = targets(batch, 2)
    hidden_BTD, _ = model.mtp[0](output.hidden_BTD, model.embed_tokens(known_BT), at)
    draft_BT = model.logits(hidden_BTD).argmax(-1)
    return ((draft_BT == wanted_BT) * counted_BT).sum().item() / counted_BT.sum().item()


@torch.inference_mode()
def expert_load(model: Transformer, tokenizer: Tokenizer, answers: Sequence[Answer], *, length: int) -> list[float]:
    """Busiest expert over mean expert in each MoE layer, on prompts and answers as they were served."""
    sequences = [(a.prompt + a.completion.ids, [1.0] * (len(a.prompt) + len(a.completion.ids))) for a in answers]
    batch = pack_rows(sequences, length=length, rows_multiple=1, pad_id=tokenizer.pad_id).batch
    output, _ = forward(model, batch)
    real_T = (batch.segments_BT >= 0).flatten()
    loads = [routing.load(real_T) for routing in output.routings if routing is not None]
    return [(load_E.max() / load_E.mean()).item() for load_E in loads]
