"""Passes over pages for the engine, in C++ on a CPU and in Triton on a GPU: what `runner.py` does over slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glasklar.engine.batch import Rows, distinct
from glasklar.engine.cpu import library
from glasklar.engine.cpu.library import CacheKind
from glasklar.engine.cuda_network import CudaNetwork, kernels
from glasklar.engine.native import NativeNetwork
from glasklar.engine.packed import KINDS, PackedModel, Packer, pack
from glasklar.engine.paged import PAGE, PageCache, new_pages
from glasklar.engine.runner import Result
from glasklar.engine.sampler import uniform
from glasklar.engine.spill import Spill, SpillConfig
from glasklar.errors import RequestError
from glasklar.model.config import ModelConfig
from glasklar.model.transformer import Transformer
from glasklar.runtime import cores

# Tokens of one pass: bounds the buffers of the pass.
PASS_TOKENS = 512


def lacking(model: Transformer | PackedModel) -> str | None:
    """What passes of our own (compiled C++, or Triton on a GPU; in fp32 or bf16) lack to run this network here, and how
    to mend it; None where they can."""
    if isinstance(model, PackedModel):
        return None
    weight = model.embed_tokens.weight
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ and Triton passes take weights in float32 or bfloat16, not in {weight.dtype}: load them so"
    match weight.device.type:
        case "cpu" if library.best() is None:
            return "the C++ pass is not compiled: install a compiler, then the package again (make setup)"
        case "cuda" if kernels() is None:
            return "passes of our own on a GPU need Triton: install it"
        case "cpu" | "cuda":
            return None
    return f"there are no passes of our own on {weight.device}"


def computed_by(network: Transformer | PackedModel, cache: CacheKind | None = None) -> dict[str, str]:
    """What computes a network here, for the record: the ops of PyTorch's passes, whose passes the engine runs, and what
    its cache holds if that was chosen."""
    chosen = {} if cache is None else {"cache": cache}
    if isinstance(network, PackedModel):
        return {"ops": f"none, packed as {network.precision}", "passes": "C++", "quantize": network.precision, **chosen}
    own = {"cpu": "C++", "cuda": "Triton"}.get(network.embed_tokens.weight.device.type, "")
    return {"ops": network.ops.name, "passes": own if lacking(network) is None else "torch", **chosen}


@dataclass
class _Ahead:
    """States of a row's latest tokens [n, D], from position `start` on, that the draft module has not joined yet."""

    start: int
    states_TD: Tensor


def logits_of(model: PackedModel, ids: Sequence[int]) -> torch.Tensor:
    """Logits [T, W] after each token of a sequence, in fp32."""
    runner = PagedRunner(model, max_slots=1, max_tokens=len(ids) + PAGE)
    runner.cache.begin(0, ids)
    runner.cache.reach(0, len(ids))
    parts = []
    for begin in range(0, len(ids), PASS_TOKENS):
        positions = np.arange(begin, min(begin + PASS_TOKENS, len(ids)), dtype=np.int32)
        tokens, count = np.array(ids[begin : begin + PASS_TOKENS], np.int32), len(positions)
        rows, outputs = np.zeros(count, np.int32), np.arange(count, dtype=np.int32)
        logits, _, _ = runner._run(tokens, positions, rows, outputs, np.zeros(count), np.zeros(count))
        parts.append(logits)
    return torch.cat(parts)


class PagedRunner:
    """Runs a network (packed here, and again at `refresh`) or weights that are packed already; `lacking` says where.

    max_slots      rows at most
    max_tokens     tokens that the cache has room for
    chunk_tokens   of a long prompt so many are read at a time; None: as many as a pass takes
    draft          with the model's module of multi-token prediction, if it has one
    cache          what the cache holds (`NativeNetwork`); None: float32 for weights that are, else int16
    spill          where on disk to keep pages that are given up

    While `following` is set, passes are followed by the module, so that it can guess; it costs about one layer more.
    """

    def __init__(
        self,
        model: Transformer | PackedModel,
        *,
        max_slots: int,
        max_tokens: int,
        chunk_tokens: int | None = None,
        draft: bool = False,
        cache: CacheKind | None = None,
        spill: SpillConfig | None = None,
    ) -> None:
        self.spare = max_slots  # where the cache keeps a prompt that is being read
        self._filled: int | None = None  # tokens of it that were read, and how many of them the cache had
        self._known = 0
        self.threads = torch.get_num_threads()
        self.model, self.draft_wanted, self.cache_kind = model, draft, cache
        self.network = self._network()
        # Tokens of one pass.
        self.most = self.network.max_tokens
        self.chunk_tokens = self.most if chunk_tokens is None else min(chunk_tokens, self.most)
        dtype, device = self.network.cache_dtype, self.network.device
        self.cache = PageCache(
            model.config,
            max_tokens=max_tokens,
            dtype=dtype,
            width=self.network.cache_width,
            spill=None if spill is None else Spill(spill, self._layout()),
            device=device,
        )
        self.following = False
        self._ahead: dict[int, _Ahead] = {}
        # The module's cache has the same pages. What it holds of a page may be missing, or stem from another text that
        # went on otherwise: then its guesses are worse, and no answer is different.
        pages = self.cache.data.shape[1] if self.has_module else 1
        self._module_cache = new_pages(1, pages, PAGE, self.network.cache_width, dtype, device)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def has_module(self) -> bool:
        return self.draft_wanted and self.network.has_module

    def _layout(self) -> str:
        """What determines the bytes of a cache page beside the weights themselves."""
        return f"{self.network.layout()} page {PAGE} {self.config.model_dump_json()}"

    def _network(self) -> NativeNetwork | CudaNetwork:
        model = self.model
        if isinstance(model, Transformer) and model.embed_tokens.weight.device.type == "cuda":
            return self._network_on_gpu(model)
        compiled = library.best()
        assert compiled is not None, "ask `lacking` first"
        if isinstance(model, Transformer):
            dtype = str(model.dtype).removeprefix("torch.")
            parameters = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
            packer = Packer(compiled, KINDS[dtype], self.threads)
            model = pack(model.config, parameters.__getitem__, packer, draft=self.draft_wanted)
        cache = self.cache_kind or ("float32" if model.precision == "float32" else "int16")
        return NativeNetwork(
            compiled, model, threads=self.threads, page=PAGE, max_tokens=PASS_TOKENS, cache=cache,
            cores=cores(self.threads),
        )  # fmt: skip

    def _network_on_gpu(self, model: Transformer) -> CudaNetwork:
        if self.cache_kind is not None:
            raise RequestError(
                f"cache = {self.cache_kind!r}: on a GPU the cache is as the model is loaded; leave `cache` out"
            )
        ops = kernels()
        assert ops is not None, "ask `lacking` first"
        return CudaNetwork(model, ops, page=PAGE)

    def fill(
        self, prompt: Sequence[int], row: int, temperature: NDArray[np.float64], uniform: NDArray[np.float64]
    ) -> Result | None:
        """Reads the next piece of a long prompt; after the last one it stands in `row`, and its logits and a token
        drawn from them are returned.

        Raises CapacityError where the cache has no room for the piece; nothing has changed then.
        """
        if self._filled is None:
            self._filled = self._known = self.cache.begin(self.spare, prompt)
        begin, end = self._filled, min(self._filled + self.chunk_tokens, len(prompt))
        self.cache.reach(self.spare, end)
        part = [(prompt[p], p, self.spare) for p in range(begin, end)]
        outputs = np.array([end - 1 - begin] if end == len(prompt) else [], np.int32)
        count = len(outputs)
        logits, tokens, logprobs = self._read(part, outputs, temperature[:count], uniform[:count], {self.spare: prompt})
        self._filled = end  # not before: what failed must not be found again
        if end < len(prompt):
            return None
        self.cache.publish(self.spare, prompt)
        self.move([(self.spare, row)])
        self._filled = None
        return Result(logits, tokens.astype(np.int64), logprobs, cached=[self._known])

    def abandon(self, prompt: Sequence[int]) -> None:
        """Drops the prompt that is being read; what was read of it can be found again."""
        if self._filled is not None:
            self.cache.publish(self.spare, prompt[: self._filled])
            self.cache.release(self.spare)
            self._ahead.pop(self.spare, None)
            self._filled = None

    def fit(self, rows: int, length: int, keep: int) -> None:
        """Nothing to do: rows take pages as they grow."""

    def reserve(self, lengths: Sequence[int]) -> None:
        """Gives each row pages for so many tokens. Raises CapacityError where they are used up."""
        for row, length in enumerate(lengths):
            self.cache.reach(row, length)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Rows change their numbers (from, to)."""
        self.cache.move(moves)
        for source, target in moves:
            self._ahead.pop(target, None)
            if (ahead := self._ahead.pop(source, None)) is not None:
                self._ahead[target] = ahead

    def release(self, row: int, tokens: Sequence[int]) -> None:
        """A request has ended; what the cache holds of it is `tokens`, for later prompts to find."""
        self.cache.publish(row, tokens)
        self.cache.release(row)
        self._ahead.pop(row, None)

    def clear_from(self, row: int) -> None:
        """Nothing to do: a position is written before it is read."""

    def refresh(self) -> None:
        """Takes over weights that changed in place. Refused where pages go to disk: they belong to these weights."""
        if self.cache.spill is not None:
            raise RequestError(
                "refresh: the cache is kept on disk for the weights as they were; make an engine without `spill`"
            )
        if isinstance(self.network, CudaNetwork):
            self.network.refresh()
        elif isinstance(self.model, Transformer):
            self.network = self._network()
        self.cache.forget()

    def close(self) -> None:
        """Writes what is worth keeping to disk, if that is wanted."""
        self.cache.keep()

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        start: int,
        temperature: NDArray[np.float64],
        uniform: NDArray[np.float64],
    ) -> Result:
        """Runs prompts into the rows from `start` on. Returns logits after each prompt [n, W], and tokens drawn from
        them. Equal prompts (several samples of one problem) are computed once."""
        once, places = distinct(prompts)
        tokens: list[tuple[int, int, int]] = []  # id, position, row
        cached = [0] * len(once)
        first = {place: start + row for row, place in reversed(list(enumerate(places)))}
        for place, prompt in enumerate(once):
            row = first[place]
            had = self.cache.begin(row, prompt)
            cached[place] = had
            self.cache.reach(row, len(prompt))
            tokens += [(prompt[p], p, row) for p in range(had, len(prompt))]
        texts = {first[place]: prompt for place, prompt in enumerate(once)}
        draws: dict[tuple[int, int], list[int]] = {}  # position and row of a prompt's end -> whose it is
        for i, place in enumerate(places):
            draws.setdefault((len(once[place]) - 1, first[place]), []).append(i)
        logits_BW = torch.empty(len(prompts), self.config.vocab_size, device=self.network.device)
        drawn, logprobs = np.zeros(len(prompts), np.int64), np.zeros(len(prompts), np.float32)
        for begin in range(0, len(tokens), self.most):
            part = tokens[begin : begin + self.most]
            wanted = [(i, whose) for i, (_, p, row) in enumerate(part) for whose in draws.get((p, row), ())]
            while part:
                now, wanted = wanted[: self.most], wanted[self.most :]
                who = [whose for _, whose in now]
                outputs = np.array([i for i, _ in now], np.int32)
                found, chosen, logprobs[who] = self._read(part, outputs, temperature[who], uniform[who], texts)
                logits_BW[who], drawn[who] = found, chosen
                # More draws than a pass has outputs: their tokens are run again, to the same bits.
                part = [part[i] for i, _ in wanted[: self.most]]
                wanted = [(i % self.most, whose) for i, (_, whose) in enumerate(wanted)]
        for place, prompt in enumerate(once):
            self.cache.publish(first[place], prompt)
        known = [cached[place] for place in places]
        for row, place in enumerate(places, start):
            if row != first[place]:
                self.cache.fork(first[place], row, len(once[place]))
                known[row - start] = len(once[place])
                if (ahead := self._ahead.get(first[place])) is not None:
                    self._ahead[row] = ahead
        return Result(logits_BW, drawn, logprobs, cached=known)

    def decode(
        self,
        rows: Rows,
        temperature: NDArray[np.float64],
        uniform: NDArray[np.float64],
        guesses: Sequence[Sequence[int]] = (),
    ) -> Result:
        """Runs the last token of every row, each followed by its guesses; `reserve` has made room for them. Returns
        logits of the next ones, and tokens drawn from them: an output for every token that is run, row by row."""
        n = rows.n
        counts = [1 + len(guess) for guess in guesses] or [1] * n
        sequences, ids = np.arange(n, dtype=np.int32), rows.last[:n].astype(np.int32)
        positions = (rows.length[:n] - 1).astype(np.int32)
        if guesses:
            ids = np.array(
                [t for last, guess in zip(ids.tolist(), guesses, strict=True) for t in (last, *guess)], np.int32
            )
            places = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
            sequences, positions = np.repeat(sequences, counts), np.repeat(positions, counts) + places
        hidden = self._states(len(ids)) if self.following else None
        parts = []
        for begin in range(0, len(ids), self.most):
            part = slice(begin, min(begin + self.most, len(ids)))
            outputs = np.arange(part.stop - begin, dtype=np.int32)
            states = None if hidden is None else hidden[part]
            parts.append(
                self._run(
                    ids[part], positions[part], sequences[part], outputs, temperature[part], uniform[part], states
                )
            )
        if hidden is not None:
            self._stand(rows, counts, hidden)
        else:
            self._ahead.clear()
        logits, tokens, logprobs = (list(column) for column in zip(*parts, strict=True))
        whole = logits[0] if len(logits) == 1 else torch.cat(logits)
        return Result(whole, np.concatenate(tokens).astype(np.int64), np.concatenate(logprobs))

    def _stand(self, rows: Rows, counts: Sequence[int], hidden_TD: Tensor) -> None:
        """Keeps the states of the tokens that were run; those of guesses that fall are left out when they are used."""
        ends = np.cumsum(counts).tolist()
        for row, (end, count) in enumerate(zip(ends, counts, strict=True)):
            self._ahead[row] = _Ahead(int(rows.length[row]) - 1, hidden_TD[end - count : end])

    def draft(self, rows: Rows, most: Sequence[int]) -> list[list[int]]:
        """Up to so many tokens for each row that the module thinks will come next, drawn with the numbers with which
        the model will draw. None for a row whose states are not at hand."""
        guesses: list[list[int]] = [[] for _ in range(rows.n)]
        ready = {row: ahead for row, ahead in self._ahead.items() if ahead.start < rows.length[row] - 1}
        self._ahead.clear()
        going = [row for row in range(rows.n) if most[row] > 0 and row in ready]
        if not going:
            return guesses
        ids: list[int] = []
        positions: list[int] = []
        owners: list[int] = []
        states = []
        for row in going:
            ahead = ready[row]
            count = int(rows.length[row]) - 1 - ahead.start  # states whose next token is known
            made = int(rows.made[row])
            ids += rows.tokens[row, made - count : made].tolist()
            positions += range(ahead.start, ahead.start + count)
            owners += [row] * count
            states.append(ahead.states_TD[:count])
        ends = np.array([i for i, row in enumerate(owners) if i + 1 == len(owners) or owners[i + 1] != row], np.int32)
        chosen, hidden = self._module(ids, positions, owners, torch.cat(states), ends, rows, depth=0)
        for depth in range(1, max(most) + 1):
            for row, token in zip(going, chosen, strict=True):
                guesses[row].append(token)
            again = [i for i, row in enumerate(going) if most[row] > depth]
            if not again:
                break
            going, states_TD = [going[i] for i in again], hidden[again]
            places = [int(rows.length[row]) - 2 + depth for row in going]
            last = np.arange(len(going), dtype=np.int32)
            tokens = [guesses[row][-1] for row in going]
            chosen, hidden = self._module(tokens, places, going, states_TD, last, rows, depth=depth)
        return guesses

    def _module(
        self, ids: Sequence[int], positions: Sequence[int], owners: Sequence[int], states_TD: Tensor,
        outputs: NDArray[np.int32], rows: Rows | None, depth: int,
    ) -> tuple[list[int], Tensor]:  # fmt: skip
        """A pass of the module: the tokens it draws at `outputs`, and its own states there."""
        count = len(outputs)
        heat, numbers = np.zeros(count, np.float32), np.zeros(count)
        if rows is not None and count:
            wanted = np.array(owners)[outputs]
            heat, numbers = (
                rows.temperature[wanted].astype(np.float32),
                uniform(rows.seed[wanted], rows.length[wanted] + depth),
            )
        hidden = torch.empty_like(states_TD)
        tokens, places, owned = (np.array(column, np.int32) for column in (ids, positions, owners))
        _, chosen, _ = self.network.run(
            self._module_cache, tokens, places, owned, self.cache.tables, outputs, heat, numbers,
            states=states_TD, hidden=hidden,
        )  # fmt: skip
        return chosen.tolist(), hidden[outputs.tolist()]

    def _read(
        self, part: Sequence[tuple[int, int, int]], outputs: NDArray[np.int32], temperature: NDArray[np.float64],
        uniform: NDArray[np.float64], texts: Mapping[int, Sequence[int]],
    ) -> tuple[Tensor, NDArray[np.int32], NDArray[np.float32]]:  # fmt: skip
        """Runs tokens (id, position, row) of the rows' `texts`; returns logits at `outputs`, tokens drawn from them and
        their log-probabilities. The module follows."""
        ids, positions, rows = (np.array(column, np.int32) for column in zip(*part, strict=True))
        hidden = self._states(len(ids)) if self.following else None
        result = self._run(ids, positions, rows, outputs, temperature, uniform, hidden)
        if hidden is None:
            return result
        known = [i for i, (_, p, row) in enumerate(part) if p + 1 < len(texts[row])]
        if known:
            nexts = [texts[rows[i]][positions[i] + 1] for i in known]
            nowhere = np.zeros(0, np.int32)
            self._module(nexts, positions[known].tolist(), rows[known].tolist(), hidden[known], nowhere, None, depth=0)
        for i in outputs.tolist():
            self._ahead[int(rows[i])] = _Ahead(int(positions[i]), hidden[i : i + 1])
        return result

    def _states(self, count: int) -> Tensor:
        return torch.empty(count, self.config.hidden_size, device=self.network.device)

    def _run(
        self,
        ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        rows: NDArray[np.int32],
        outputs: NDArray[np.int32],
        temperature: NDArray[np.float64],
        uniform: NDArray[np.float64],
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, NDArray[np.int32], NDArray[np.float32]]:
        return self.network.run(
            self.cache.data, ids, positions, rows, self.cache.tables, outputs, temperature.astype(np.float32), uniform,
            hidden=hidden,
        )  # fmt: skip
