"""The C++ pass over packed weights and a paged cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasklar.engine.cpu.library import CACHES, VERSION, CacheKind, Draft, Embedding, Layer, Pass, Shape
from glasklar.engine.packed import PackedLayer, PackedModel
from glasklar.engine.paged import new_pages
from glasklar.errors import CapacityError
from glasklar.model.attention import LATENT_EPS, inverse_frequencies


class NativeNetwork:
    """One network ready for passes of the build `library`, by `threads` threads, of up to `max_tokens` tokens over
    cache pages of `page` tokens (a multiple of 16). Raises CapacityError where the system gives no memory or threads.

    cache   what it holds: "int16", integers with a scale for a row, in the room of bf16; "int8", with a scale for a row
            and a shift for 32 values, half as large; "float32", then attention is computed in it as well, for exact
            comparisons
    cores   a CPU for each thread to stay on (`runtime.cores`), or none
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        model: PackedModel,
        *,
        threads: int,
        page: int = 16,
        max_tokens: int = 512,
        cache: CacheKind = "int16",
        cores: Sequence[int] = (),
    ) -> None:
        c = model.config
        assert page % 16 == 0, "rows are read in sixteens"
        assert len(cores) in (0, threads), "a CPU for each thread, or none"
        self.library, self.model, self.config = library, model, c
        self.page, self.max_tokens = page, max_tokens
        self.cache_kind, self.device = cache, torch.device("cpu")
        self.cache_dtype = {"int16": torch.int16, "float32": torch.float32, "int8": torch.uint8}[cache]
        shape = Shape(
            layers=c.num_hidden_layers, width=c.hidden_size, heads=c.num_attention_heads, kv_heads=c.kv_heads,
            latent=c.kv_lora_rank or 0, q_latent=c.q_lora_rank or 0, nope=c.qk_nope_head_dim or 0, rope=c.rope_dim,
            value=c.value_head_dim, vocabulary=c.vocab_size, experts=c.n_routed_experts or 0,
            active=c.num_experts_per_tok or 0, groups=c.n_group, groups_kept=c.topk_group,
            sigmoid=c.scoring_func == "sigmoid", normalise=c.norm_topk_prob, interleave=c.rope_interleave, page=page,
            cache=CACHES.index(cache), max_tokens=max_tokens, scaling=c.routed_scaling_factor, eps=c.rms_norm_eps,
            latent_eps=LATENT_EPS, softmax_scale=c.softmax_scale, swiglu_alpha=c.swiglu_alpha,
            swiglu_limit=c.swiglu_limit or 0.0,
        )  # fmt: skip
        blocks = [*model.layers, *([model.draft.block] if model.draft is not None else [])]
        layers = (Layer * len(blocks))(*map(_layer, blocks))
        draft = None
        if model.draft is not None:
            norms = {name: vector.data_ptr() for name, vector in model.draft.vectors.items()}
            draft = ctypes.byref(Draft(join=model.draft.join.struct(), **norms))
        embedding = Embedding(rows=model.embedding.data_ptr(), narrow=model.embedding.dtype == torch.bfloat16)
        self._handle = library.glasklar_network(
            ctypes.byref(shape), layers, ctypes.byref(embedding), model.final_norm.data_ptr(),
            ctypes.byref(model.head.struct()), draft, threads,
            (ctypes.c_int32 * threads)(*cores) if cores else None,
        )  # fmt: skip
        if not self._handle:
            raise CapacityError(
                f"the system gives no memory or no threads for passes of {max_tokens} tokens by {threads} threads;"
                " close other programs, or take fewer threads"
            )
        self.cache_width = library.glasklar_row_bytes(self._handle) // self.cache_dtype.itemsize
        self.vocabulary = c.vocab_size
        self.padded_vocabulary = -(-c.vocab_size // 16) * 16
        self._inverse, self._factor = inverse_frequencies(c)
        self._cosine = self._sine = np.zeros((0, 0), np.float32)
        self._reach(256)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.library.glasklar_free(self._handle)

    def _reach(self, length: int) -> None:
        """Rotary angles up to a position."""
        if length > len(self._cosine):
            angles = torch.arange(1 << (length - 1).bit_length())[:, None].float() * self._inverse
            self._cosine = (angles.cos() * self._factor).numpy()
            self._sine = (angles.sin() * self._factor).numpy()

    @property
    def has_module(self) -> bool:
        return self.model.draft is not None

    def layout(self) -> str:
        """What determines the bytes of a cache page beside the weights and the config."""
        kinds = sorted({matrix.kind for layer in self.model.layers for matrix in layer.matrices.values()})
        return f"engine {VERSION} kinds {kinds} cache {self.cache_kind}"

    def new_cache(self, pages: int) -> Tensor:
        """[layers, pages, page, cache width]"""
        return new_pages(self.config.num_hidden_layers, pages, self.page, self.cache_width, self.cache_dtype)

    def run(
        self,
        cache: Tensor,
        ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        tables: NDArray[np.int32],
        outputs: NDArray[np.int32],
        temperatures: NDArray[np.float32],
        uniforms: NDArray[np.float64],
        states: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, NDArray[np.int32], NDArray[np.float32]]:
        """A pass over tokens (ids, positions, sequences: [T]), whose latents or keys are written to the cache; token
        t's sequence has the pages tables[sequences[t]].

        outputs        places of the tokens whose logits are wanted [O]
        temperatures   and uniform numbers [O]: how the next tokens are drawn
        states         normalised hidden states [T, D] of the tokens before: the pass is one of the draft module, over a
                       cache [1, pages, page, cache width] of its own; token and state at p predict the token at p + 2
        hidden         takes the normalised hidden states of all tokens [T, D]
        Returns logits [O, W], the tokens drawn [O] and their log-probabilities [O].
        """
        count = len(outputs)
        # C++ takes these as they are: what does not fit would be written beside its memory.
        assert 0 < len(ids) == len(positions) == len(sequences) <= self.max_tokens
        assert count == len(temperatures) == len(uniforms) <= self.max_tokens
        states = None if states is None else states.contiguous()
        self._reach(int(positions.max()) + 1)
        logits = np.empty((count, self.padded_vocabulary), np.float32)
        chosen, logprobs = np.empty(count, np.int32), np.empty(count, np.float32)
        pointers = np.arange(len(tables), dtype=np.uintp) * tables.strides[0] + tables.ctypes.data
        arguments = Pass(
            tokens=len(ids), outputs=count, ids=ids.ctypes.data, positions=positions.ctypes.data,
            sequences=sequences.ctypes.data, tables=pointers.ctypes.data, cache=cache.data_ptr(),
            layer_stride=cache.stride(0) * cache.element_size(), cosine=self._cosine.ctypes.data,
            sine=self._sine.ctypes.data, output_tokens=outputs.ctypes.data, logits=logits.ctypes.data,
            temperatures=temperatures.ctypes.data, uniforms=uniforms.ctypes.data, chosen=chosen.ctypes.data,
            logprobs=logprobs.ctypes.data, states=None if states is None else states.data_ptr(),
            hidden=None if hidden is None else hidden.data_ptr(),
        )  # fmt: skip
        self.library.glasklar_pass(self._handle, ctypes.byref(arguments))
        return torch.from_numpy(logits)[:, : self.vocabulary], chosen, logprobs


def _layer(packed: PackedLayer) -> Layer:
    layer = Layer(window=packed.window, hidden=packed.hidden, expert_hidden=packed.expert_hidden)
    for name, vector in packed.vectors.items():
        setattr(layer, name, vector.data_ptr())
    for name, matrix in packed.matrices.items():
        setattr(layer, name, matrix.struct())
    return layer
