"""The pass on a GPU: the counterpart of `native.py`, over the model's own weights and a paged cache.

Steps of few tokens are recorded once for each size as a CUDA graph and played again: hundreds of kernels for the price
of one call. Longer ones (prompts) are launched kernel by kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from glasklar.engine.paged import new_pages
from glasklar.engine.sampler import COLDEST
from glasklar.engine.shapes import rounded_rows
from glasklar.model.attention import LATENT_EPS, GroupedQueryAttention, LatentAttention, inverse_frequencies
from glasklar.model.moe import FeedForward, MixtureOfExperts
from glasklar.model.transformer import Block, PredictionModule, Transformer
from glasklar.ops.paged import PagedOps, Parts

# Passes of up to so many tokens that all draw are recorded; of how many pages a recorded one can reach: 4^n times 32.
RECORDED_TOKENS, SHORTEST_TABLE = 512, 32
# Queries times heads that one program of attention takes when prompts are read: in fp32 there is room for fewer.
TILE_ROWS = {torch.bfloat16: 64, torch.float32: 16}


@dataclass(frozen=True)
class _Inputs:
    """What a pass reads, on the device; all but `states` are views of one buffer that one copy fills.

    tiles     tokens that follow each other in a sequence (`paged.attend`)
    longest   tokens that the tables reach
    """

    ids: Tensor
    where: tuple[Tensor, Tensor, Tensor]
    tiles: tuple[Tensor, Tensor, int]
    outputs: Tensor
    temperatures: Tensor
    uniforms: Tensor
    longest: int
    buffer: Tensor
    states: Tensor | None = None


@dataclass(frozen=True)
class _Outputs:
    """`drawn` [2, O] fp32: bits of the tokens, then log-probabilities."""

    logits: Tensor
    drawn: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: _Inputs
    outputs: _Outputs


class CudaNetwork:
    """One network ready for passes of up to `max_tokens` tokens over cache pages of `page` tokens.

    ops   the kernels, or their reference (on any device, for tests)
    """

    def __init__(self, model: Transformer, ops: PagedOps, *, page: int = 16, max_tokens: int = 2048) -> None:
        c = model.config
        self.model, self.config, self.ops = model, c, ops
        self.page, self.max_tokens = page, max_tokens
        self.device, self.cache_dtype = model.embed_tokens.weight.device, model.dtype
        # Whole units of 16 bytes: Triton takes rows of pages to begin at them.
        self.cache_width = -(-c.cache_width // 8) * 8
        inverse, self._factor = inverse_frequencies(c)
        self._inverse = inverse.to(self.device)
        self._angles = (torch.empty(0, device=self.device), torch.empty(0, device=self.device))
        self._graphs: dict[object, _Recorded] = {}
        self._met: set[object] = set()
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = None  # while a pass is recorded
        self._pointers = self._addresses()
        self._reach(256)

    @property
    def has_module(self) -> bool:
        return len(self.model.mtp) > 0

    def layout(self) -> str:
        """What determines the bytes of a cache page beside the weights and the config."""
        return f"{self.ops.name} {self.cache_dtype}"

    def refresh(self) -> None:
        """The weights have changed. In place is fine; if they lie elsewhere now, records of passes are worthless."""
        if (pointers := self._addresses()) != self._pointers:
            self._pointers = pointers
            self._forget()

    def new_cache(self, pages: int) -> Tensor:
        """[layers, pages, page, cache width]"""
        return new_pages(
            self.config.num_hidden_layers, pages, self.page, self.cache_width, self.cache_dtype, self.device
        )

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())]

    def _forget(self) -> None:
        self._graphs.clear()
        self._met.clear()

    def _reach(self, length: int) -> None:
        """Rotary angles up to a position."""
        if length > len(self._angles[0]):
            places = torch.arange(1 << (length - 1).bit_length(), device=self.device)
            angles = places[:, None].float() * self._inverse
            self._angles = ((angles.cos() * self._factor).contiguous(), (angles.sin() * self._factor).contiguous())
            self._forget()  # they read the old ones

    @torch.inference_mode()
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
        """As `NativeNetwork.run`; logits, states and hidden are on the device."""
        longest = int(positions.max()) + 1
        self._reach(longest)
        T, drawn_rows = len(ids), len(outputs)
        rows, own = np.unique(sequences, return_inverse=True)
        pages = -(-longest // self.page)
        recorded = drawn_rows == T <= RECORDED_TOKENS and self.device.type == "cuda"
        if recorded:
            T = drawn_rows = rounded_rows(T)
            width = SHORTEST_TABLE
            while width < pages:
                width *= 4
            firsts, counts, most = np.arange(T), np.arange(T) < len(ids), 1
        else:
            width = pages
            firsts, counts, most = self._tiles(positions, own)
        short = np.zeros((T if recorded else len(rows), width), np.int32)
        short[: len(rows), :pages] = tables[rows, :pages]
        columns = [
            _filled(uniforms, drawn_rows, np.float64), _filled(temperatures, drawn_rows, np.float32), _filled(ids, T),
            _filled(positions, T, empty=-1), _filled(own, T), firsts.astype(np.int32), counts.astype(np.int32),
            np.arange(drawn_rows, dtype=np.int32) if recorded else outputs, short.reshape(-1),
        ]  # fmt: skip
        host = torch.from_numpy(np.concatenate([column.view(np.int32) for column in columns]))
        sizes = [len(column) * column.itemsize // 4 for column in columns]
        padded = states if states is None or len(states) == T else F.pad(states, (0, 0, 0, T - len(states)))

        key = (T, width, states is not None, hidden is not None, cache.data_ptr())
        if recorded and key in self._met:
            record = self._graphs.get(key)
            if record is None:
                held = self._inputs(torch.empty_like(host, device=self.device), sizes, most, width, padded)
                record = self._graphs[key] = self._record(cache, held, hidden is not None)
            record.inputs.buffer.copy_(host.pin_memory(), non_blocking=True)
            if padded is not None:
                assert record.inputs.states is not None
                record.inputs.states.copy_(padded)
            record.graph.replay()
            found = record.outputs
        else:
            inputs = self._inputs(host.to(self.device), sizes, most, width, padded)
            found = self._pass(cache, inputs, hidden is not None)
            if recorded:
                self._met.add(key)
        count = len(outputs)
        if hidden is not None:
            assert found.hidden is not None
            hidden.copy_(found.hidden[: len(ids)])
        drawn = found.drawn[:, :count].cpu().numpy()
        # What a graph wrote is overwritten when it is played again.
        return found.logits[:count].clone(), drawn[0].view(np.int32).copy(), drawn[1].copy()

    def _tiles(self, positions: NDArray[np.int32], own: NDArray[np.int64]) -> tuple[NDArray, NDArray, int]:
        """Stretches of tokens that follow each other in a sequence: where they begin, how many, how many at most."""
        T, c = len(positions), self.config
        group = c.num_attention_heads // (1 if c.is_mla else c.kv_heads)
        most = max(1, TILE_ROWS[self.cache_dtype] // min(16, 1 << (group - 1).bit_length())) if T > 16 else 1
        follows = np.zeros(T, np.bool_)
        follows[1:] = (own[1:] == own[:-1]) & (positions[1:] == positions[:-1] + 1)
        starts = np.flatnonzero(~follows)
        lengths = np.diff(np.append(starts, T))
        tiles = -(-lengths // most)
        inside = np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        firsts = np.repeat(starts, tiles) + inside * most
        return firsts, np.minimum(most, np.repeat(starts + lengths, tiles) - firsts), most

    def _inputs(self, buffer: Tensor, sizes: Sequence[int], most: int, width: int, states: Tensor | None) -> _Inputs:
        uniforms, temperatures, ids, positions, own, firsts, counts, outputs, tables = buffer.split(list(sizes))
        return _Inputs(
            ids, (positions, own, tables.view(-1, width)), (firsts, counts, most), outputs,
            temperatures.view(torch.float32), uniforms.view(torch.float64), width * self.page, buffer, states,
        )  # fmt: skip

    def _record(self, cache: Tensor, inputs: _Inputs, hidden: bool) -> _Recorded:
        """Everything has run once: nothing is compiled or loaded while a graph is recorded."""
        graph = torch.cuda.CUDAGraph()
        self._side = torch.cuda.Stream()
        try:
            # Of what runs side by side, that comes first on which more waits.
            with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.Stream(priority=-1)):
                outputs = self._pass(cache, inputs, hidden)
        finally:
            self._side = None
        self._pool = graph.pool()
        return _Recorded(graph, inputs, outputs)

    def _pass(self, cache: Tensor, p: _Inputs, hidden: bool) -> _Outputs:
        ops, model, eps = self.ops, self.model, self.config.rms_norm_eps
        dtype = self.cache_dtype
        x_TD = F.embedding(p.ids, model.embed_tokens.weight).float()
        if p.states is None:
            blocks: Sequence[Block] = list(model.layers)  # type: ignore[arg-type]
            norm = model.norm
        else:
            module = model.mtp[0]
            assert isinstance(module, PredictionModule)
            joined = torch.cat(
                (
                    ops.add_norm(x_TD, None, module.enorm.weight, eps, dtype)[1],
                    ops.add_norm(p.states, None, module.hnorm.weight, eps, dtype)[1],
                ),
                -1,
            )
            x_TD = ops.product(joined, module.eh_proj.weight)
            blocks, norm = [module.block], module.norm
        added: Tensor | Parts | None = None
        for layer, block in enumerate(blocks):
            x_TD, normed = ops.add_norm(x_TD, added, block.input_layernorm.weight, eps, dtype)
            attention = block.self_attn
            assert isinstance(attention, LatentAttention | GroupedQueryAttention)
            by_kind = self._latent if isinstance(attention, LatentAttention) else self._grouped
            mixed_TX = by_kind(attention, normed, cache[layer], p).flatten(1)  # type: ignore[arg-type]
            added = ops.product(mixed_TX, attention.o_proj.weight, attention.o_proj.bias)
            x_TD, normed = ops.add_norm(x_TD, added, block.post_attention_layernorm.weight, eps, dtype)
            added = self._feed(block.mlp, normed)
        every = None
        if hidden:
            _, every = ops.add_norm(x_TD, added, norm.weight, eps, torch.float32)
        last = added.rows(p.outputs) if isinstance(added, Parts) else None if added is None else added[p.outputs]
        _, normed = ops.add_norm(x_TD[p.outputs], last, norm.weight, eps, dtype)
        if not len(p.outputs):
            nothing = torch.zeros(2, 0, device=self.device)
            return _Outputs(torch.zeros(0, self.config.vocab_size, device=self.device), nothing, every)
        logits_OW = ops.product(normed, model.head_WD)
        tokens, logprobs = ops.draw(logits_OW, p.temperatures, p.uniforms, COLDEST)
        return _Outputs(logits_OW, torch.stack((tokens.view(torch.float32), logprobs)), every)

    def _latent(self, a: LatentAttention, x_TD: Tensor, cache: Tensor, p: _Inputs) -> Tensor:
        """MLA, absorbed: queries move into the space of the latents, and what is mixed there moves out again."""
        ops, c, dtype = self.ops, self.config, self.cache_dtype
        first, second = a.q_proj if c.q_lora_rank is None else a.q_a_proj, a.kv_a_proj_with_mqa
        q, kv = ops.products(x_TD, (first.weight, second.weight), (first.bias, second.bias))
        if c.q_lora_rank is not None:
            _, low = ops.add_norm(q, None, a.q_a_layernorm.weight, LATENT_EPS, dtype)
            q = ops.product(low, a.q_b_proj.weight)
        nope, tail = ops.turn_latent(
            q.unflatten(-1, (-1, a.N + a.R)), kv, a.kv_a_layernorm.weight, LATENT_EPS, self._angles, c.rope_interleave,
            p.where, cache, dtype,
        )  # fmt: skip
        up_HXC = a.kv_b_proj.weight.view(-1, a.N + a.V, a.C)
        main = ops.product(nope, up_HXC[:, : a.N].mT, dtype=dtype)
        mixed = ops.attend(
            main, tail, cache, p.where, p.tiles, kv_heads=1, value=a.C, scale=c.softmax_scale, longest=p.longest
        )
        return ops.product(mixed, up_HXC[:, a.N :], dtype=dtype)

    def _grouped(self, a: GroupedQueryAttention, x_TD: Tensor, cache: Tensor, p: _Inputs) -> Tensor:
        ops, c = self.ops, self.config
        three = (a.q_proj, a.k_proj, a.v_proj)
        made = ops.products(x_TD, [linear.weight for linear in three], [linear.bias for linear in three])
        q, k, v = (x.unflatten(-1, (-1, c.qk_head_dim)) for x in made)
        norms = None if a.q_norm is None or a.k_norm is None else (a.q_norm.weight, a.k_norm.weight)
        main = ops.turn_heads(
            q, k, v, norms, c.rms_norm_eps, self._angles, c.rope_interleave, p.where, cache, self.cache_dtype
        )
        return ops.attend(
            main, None, cache, p.where, p.tiles, kv_heads=c.kv_heads, value=c.value_head_dim, scale=c.softmax_scale,
            longest=p.longest, window=a.window or 0, sinks_H=a.sinks,
        )  # fmt: skip

    def _feed(self, mlp: FeedForward | MixtureOfExperts, x_TD: Tensor) -> Tensor | Parts:
        ops, c = self.ops, self.config
        if isinstance(mlp, FeedForward):
            return ops.product(ops.gated_product(x_TD, mlp.gate_up_proj.weight), mlp.down_proj.weight)
        logits = ops.gate(x_TD, mlp.gate.weight)
        shared = None
        if mlp.shared_experts is not None:
            with self._beside():
                shared = self._feed(mlp.shared_experts, x_TD)
        ids, weights = ops.route(
            logits, mlp.gate.bias, mlp.gate.e_score_correction_bias, active=c.num_experts_per_tok, groups=c.n_group,
            groups_kept=c.topk_group, scoring=c.scoring_func, normalise=c.norm_topk_prob,
            scaling=c.routed_scaling_factor,
        )  # fmt: skip
        clamp = None if c.swiglu_limit is None else (c.swiglu_alpha, c.swiglu_limit)
        parts = ops.experts(
            x_TD, ids, weights, (mlp.gate_up_EFD, mlp.gate_up_bias_EF), (mlp.down_EDF, mlp.down_bias_ED), shared, clamp
        )
        if self._side is not None and shared is not None:
            torch.cuda.current_stream().wait_stream(self._side)
        return parts

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """In a recorded pass, what is done here goes on beside what follows: until `_side` is waited for."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield


def _filled(values: NDArray, count: int, dtype: type = np.int32, empty: int = 0) -> NDArray:
    """`values` and, behind them, `empty` up to `count`."""
    column: NDArray = np.full(count, empty, dtype)
    column[: len(values)] = values
    return column


@functools.cache
def kernels() -> PagedOps | None:
    """The GPU's ops; None where no Triton is installed."""
    try:
        from glasklar.ops.cuda.table import TRITON
    except ImportError:
        return None
    return TRITON
