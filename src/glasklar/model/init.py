"""All initialisation rules in one place: normal(0, initializer_range) for every matrix, ones for norms, zeros for
biases (DeepSeek-V2 section 3.1.2, V3 section 4.2). Numbers are drawn on the CPU in fp32, parameter by parameter in the
order of their names, so that they depend neither on the device nor on how the model is split."""

from __future__ import annotations

import torch

from glasklar.model.config import ModelConfig
from glasklar.model.transformer import Transformer
from glasklar.ops.select import REFERENCE, Ops


def kept_wide(name: str) -> bool:
    """Whether a parameter or buffer stays in fp32 whatever the type of the others: gates, which decide."""
    return name.endswith(("gate.weight", "gate.bias", "e_score_correction_bias"))


def build(
    config: ModelConfig, ops: Ops = REFERENCE, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """An uninitialised model with storage on `device`; gate weights and biases stay in fp32 whatever `dtype`."""
    with torch.device("meta"):
        model = Transformer(config, ops)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept_wide(name) else dtype)
    model = model.to_empty(device=device)
    for buffer in model.buffers():
        if buffer is not None:
            buffer.zero_()
    # Built on meta, the frequencies have no values yet.
    from glasklar.model.attention import inverse_frequencies

    model.frequencies = inverse_frequencies(config)
    return model


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> Transformer:
    """Fills all parameters; the same seed gives the same bits on every machine."""
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith((".bias", "_bias_EF", "_bias_ED")):
            parameter.zero_()
        else:
            parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
    return model
