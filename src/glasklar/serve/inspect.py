"""A look inside an answer that was given: what else each token could have been, and which experts made it.

The answer is run through the network once more, all its tokens in one pass. So nobody pays for it who does not look,
and the answer itself could be drafted and batched freely. The pass is PyTorch's: its numbers differ from the engine's
in the last bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glasklar.errors import RequestError
from glasklar.loading import Model
from glasklar.model.attention import document_mask

# Attention over all tokens at once takes memory in the square of their number.
MOST_TOKENS = 4096
ALTERNATIVES = 10
CHUNK = 256  # tokens whose logits are held at once


@torch.inference_mode()
def look(model: Model, ids: list[int], first: int) -> dict[str, Any]:
    """What stood behind each of the tokens ids[first:].

    {"layers": numbers of the layers with experts, "experts": how many each has,
     "tokens": [{"id", "logprob", "alternatives": [[id, logprob], …], best first,
                 "experts": one list a layer of [expert, share of the gate's weight], the strongest first}]}

    A token comes from the pass over the one before it; so do its experts. Raises RequestError for what cannot be
    looked into.
    """
    if not 1 <= first < len(ids):
        raise RequestError(f"first = {first} of {len(ids)} tokens: a token needs one before it and must be there")
    if len(ids) > MOST_TOKENS:
        raise RequestError(f"{len(ids)} tokens: a look inside takes up to {MOST_TOKENS}, prompt and answer together")
    network = model.transformer
    ids_T = torch.tensor(ids, device=network.head_WD.device)
    position_BT = torch.arange(len(ids) - 1, device=ids_T.device)[None]
    at = network.at(position_BT, document_mask(torch.zeros_like(position_BT), network.dtype))
    output = network(ids_T[None, :-1], at)
    chosen = [(k, routing) for k, routing in enumerate(output.routings) if routing is not None]
    shares = [_shares(routing.ids_TA[first - 1 :], routing.scores_TE[first - 1 :]) for _, routing in chosen]
    tokens = []
    for begin in range(first, len(ids), CHUNK):
        end = min(begin + CHUNK, len(ids))
        logprobs_TW = network.logits(output.hidden_BTD[0, begin - 1 : end - 1]).float().log_softmax(-1)
        own_T = logprobs_TW.gather(1, ids_T[begin:end, None])[:, 0].tolist()
        best = logprobs_TW.topk(min(ALTERNATIVES, logprobs_TW.shape[1]))
        for k, (values, places) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            tokens.append(
                {
                    "id": ids[begin + k],
                    "logprob": own_T[k],
                    "alternatives": [[place, value] for place, value in zip(places, values, strict=True)],
                    "experts": [layer[begin - first + k] for layer in shares],
                }
            )
    return {"layers": [k for k, _ in chosen], "experts": model.config.n_routed_experts or 0, "tokens": tokens}


def _shares(ids_TA: Tensor, scores_TE: Tensor) -> list[list[list[float]]]:
    """For each token its experts with their shares of the scores of all that were chosen, the strongest first."""
    scores_TA = scores_TE.gather(-1, ids_TA).float()
    shares_TA, order_TA = (scores_TA / scores_TA.sum(-1, keepdim=True)).sort(-1, descending=True)
    ids, shares = ids_TA.gather(-1, order_TA).tolist(), shares_TA.tolist()
    return [
        [[expert, round(share, 4)] for expert, share in zip(*row, strict=True)] for row in zip(ids, shares, strict=True)
    ]
