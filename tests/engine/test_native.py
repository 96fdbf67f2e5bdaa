"""The C++ pass. Oracles: the PyTorch network in fp32; itself alone, in other company, in other builds."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from glasklar.engine.cpu import library
from glasklar.engine.cpu.library import CacheKind
from glasklar.engine.native import NativeNetwork
from glasklar.engine.packed import KINDS, Packer, pack
from glasklar.errors import CapacityError, CheckpointError
from glasklar.model.attention import document_mask
from glasklar.model.config import ModelConfig
from glasklar.model.transformer import Transformer

MLA = {
    "vocab_size": 97, "hidden_size": 72, "num_hidden_layers": 3, "num_attention_heads": 5, "kv_lora_rank": 40,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20, "intermediate_size": 100, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_shared_experts": 1, "moe_intermediate_size": 52, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2,
}  # fmt: skip
GQA = {
    "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 12, "num_key_value_heads": 1,
    "head_dim": 16, "intermediate_size": 100, "rope_interleave": False, "attention_bias": True,
    "tie_word_embeddings": True,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.7}
SHAPES = {
    "mla": MLA,
    "query latents, biases": {**MLA, "q_lora_rank": 36, "attention_bias": True},
    "softmax gate": {**MLA, "scoring_func": "softmax", "norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    "yarn": {**MLA, "rope_scaling": YARN},
    "gqa": GQA,
    "norms, windows": {
        **GQA,
        "qk_norm": True,
        "num_hidden_layers": 3,
        "sliding_window": 37,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    },
    "sinks, clamped experts": {
        **GQA,
        "output_bias": True,
        "attention_sinks": True,
        "sliding_window": 130,
        "num_key_value_heads": 3,
        "layer_types": ("sliding_attention", "full_attention"),
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 33,
        "scoring_func": "softmax",
        "swiglu_limit": 0.4,
    },
    "more experts than heads": {**MLA, "num_attention_heads": 2, "n_routed_experts": 16, "num_experts_per_tok": 8},
    "wide heads": {**MLA, "num_hidden_layers": 1, "num_attention_heads": 2, "qk_nope_head_dim": 1500},
    "thousands of experts": {
        **MLA,
        "num_hidden_layers": 2,
        "n_routed_experts": 5000,
        "n_group": 2500,
        "topk_group": 20,
        "moe_intermediate_size": 8,
    },
    "gqa, experts": {**GQA, "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 33},
}
LENGTHS = (3, 40, 300)  # the last reaches into a second span of keys
BUILDS = [name for name in library.VARIANTS if library.load(name) is not None]
pytestmark = pytest.mark.skipif(not BUILDS, reason="the C++ pass is not compiled (no compiler at installation)")


def network(shape: str, **more: int) -> Transformer:
    torch.manual_seed(3)
    model = Transformer(ModelConfig(**{**SHAPES[shape], **more})).requires_grad_(False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        torch.nn.init.uniform_(tensor, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(tensor, std=0.1)
    return model


def native(
    model: Transformer,
    build: str,
    kind: str = "float32",
    threads: int = 2,
    cache: CacheKind | None = None,
    cores: Sequence[int] = (),
) -> NativeNetwork:
    compiled = library.load(build)
    assert compiled is not None
    parameters = dict(model.state_dict())
    packed = pack(model.config, parameters.__getitem__, Packer(compiled, KINDS[kind], threads), draft=True)
    return NativeNetwork(
        compiled,
        packed,
        threads=threads,
        max_tokens=512,
        cache=cache or ("float32" if kind == "float32" else "int16"),
        cores=cores,
    )


def prompts(model: Transformer) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, model.config.vocab_size, length).tolist() for length in LENGTHS]


def logits_of(net: NativeNetwork, sequences: Sequence[Sequence[int]], chunk: int) -> list[NDArray[np.float32]]:
    """Logits of every token; all sequences advance together by `chunk` tokens a pass, over scattered cache pages."""
    cache = net.new_cache(96)
    tables = np.random.default_rng(chunk).permutation(96).astype(np.int32).reshape(len(sequences), -1)
    found: list[list[NDArray[np.float32]]] = [[] for _ in sequences]
    for start in range(0, max(map(len, sequences)), chunk):
        tokens = [(s[p], p, i) for i, s in enumerate(sequences) for p in range(start, min(start + chunk, len(s)))]
        ids, positions, owners = (np.array(column, np.int32) for column in zip(*tokens, strict=True))
        count = len(tokens)
        logits, _, _ = net.run(
            cache, ids, positions, owners, tables, np.arange(count, dtype=np.int32),
            np.zeros(count, np.float32), np.zeros(count),
        )  # fmt: skip
        for row, owner in zip(logits.numpy(), owners, strict=True):
            found[owner].append(row.copy())
    return [np.array(rows) for rows in found]


@pytest.mark.parametrize("shape", SHAPES)
def test_float_logits_are_those_of_the_network(shape: str) -> None:
    model = network(shape)
    found = logits_of(native(model, BUILDS[0]), prompts(model), 512)
    for prompt, logits in zip(prompts(model), found, strict=True):
        ids_BT = torch.tensor([prompt])
        at = model.at(torch.arange(len(prompt))[None], document_mask(torch.zeros_like(ids_BT), torch.float32))
        wanted = model.logits(model(ids_BT, at).hidden_BTD)[0].numpy()
        assert np.abs(logits - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_what_the_system_cannot_give_is_an_error() -> None:
    resource = pytest.importorskip("resource")
    fine = native(network("mla"), BUILDS[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 36, before[1]))  # whatever the machine has or would promise
    try:
        with pytest.raises(CapacityError, match="1073741824 tokens by 2 threads"):
            NativeNetwork(library.load(BUILDS[0]), fine.model, threads=2, max_tokens=1 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(("cache", "most"), [("int16", 0.001), ("int8", 0.03)])
@pytest.mark.parametrize("shape", ["dense mla", "gqa", "norms, windows"])
def test_smaller_caches_change_logits_little(shape: str, cache: CacheKind, most: float) -> None:
    """Of dense networks: near ties of a router would hide what the cache does."""
    model = network("mla", first_k_dense_replace=9, q_lora_rank=36) if shape == "dense mla" else network(shape)
    sizes = []
    for wanted, found in zip(
        *(logits_of(native(model, BUILDS[0], cache=kind), prompts(model), 512) for kind in ("float32", cache)),
        strict=True,
    ):
        sizes.append(float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean())))
    assert 0 < max(sizes) < most, sizes


@pytest.mark.parametrize(("kind", "cache"), [*((kind, None) for kind in KINDS), ("int4", "int8")])
@pytest.mark.parametrize("shape", ["query latents, biases", "gqa, experts", "sinks, clamped experts"])
def test_same_bits_alone_in_company_in_any_chunks_threads_and_builds(
    shape: str, kind: str, cache: CacheKind | None
) -> None:
    model = network(shape)
    together = logits_of(native(model, BUILDS[0], kind, cache=cache), prompts(model), 512)
    assert all(np.isfinite(logits).all() for logits in together)
    for build in BUILDS:
        net = native(model, build, kind, threads=1, cache=cache)
        for wanted, prompt in zip(together, prompts(model), strict=True):
            for chunk in (1, 7) if build == BUILDS[0] else (64,):
                [alone] = logits_of(net, [prompt], chunk)
                assert np.array_equal(alone, wanted), (build, chunk, len(prompt))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not tell where threads run")
def test_threads_stay_on_their_cores_and_the_caller_is_let_go() -> None:
    model, allowed = network("mla"), os.sched_getaffinity(0)
    core = max(allowed)
    before = set(os.listdir("/proc/self/task"))
    kept = native(model, BUILDS[0], cores=[core, core])
    found = logits_of(kept, prompts(model), 64)  # by then the threads are gone that helped to pack
    own = set(os.listdir("/proc/self/task")) - before
    assert [os.sched_getaffinity(int(thread)) for thread in own] == [{core}]
    assert os.sched_getaffinity(0) == allowed
    for logits, wanted in zip(found, logits_of(native(model, BUILDS[0]), prompts(model), 64), strict=True):
        assert np.array_equal(logits, wanted)


def test_a_long_context_has_the_same_bits_however_its_spans_are_shared_out() -> None:
    model = network("mla", num_attention_heads=12, max_position_embeddings=4096)
    prompt = np.random.default_rng(7).integers(0, model.config.vocab_size, 2100).astype(np.int32)
    tables, temperature, uniform = np.arange(132, dtype=np.int32)[None], np.zeros(1, np.float32), np.zeros(1)
    # The last token in a chunk, then alone: then its spans are tasks, in which one thread takes all heads together.
    pieces = [(first, min(first + 512, len(prompt))) for first in range(0, len(prompt), 512)]
    pieces.append((len(prompt) - 1, len(prompt)))
    found = []
    for threads in (1, 2, 4):
        net = native(model, BUILDS[0], "int8", threads)
        cache = net.new_cache(132)
        for begin, end in pieces:
            at, last = np.arange(begin, end, dtype=np.int32), np.array([end - begin - 1], np.int32)
            logits, _, _ = net.run(cache, prompt[at], at, np.zeros_like(at), tables, last, temperature, uniform)
            if end == len(prompt):
                found.append(logits[0].numpy())
    assert len(found) == 6
    assert all(np.array_equal(logits, found[0]) for logits in found)


@pytest.mark.parametrize("shape", ["mla", "gqa, experts"])
def test_draft_module_is_that_of_the_network_in_any_pieces(shape: str) -> None:
    """States of the main pass, and the module's logits over a cache of its own; beside other sequences."""
    model = network(shape, num_nextn_predict_layers=1)
    net, prompt = native(model, BUILDS[0]), np.array(prompts(model)[2], np.int32)
    ids_BT = torch.tensor(prompt[None])
    at = model.at(torch.arange(len(prompt))[None], document_mask(torch.zeros_like(ids_BT), torch.float32))
    states_BTD = model(ids_BT, at).hidden_BTD
    shifted_BT = torch.cat((ids_BT[:, 1:], ids_BT[:, :1]), dim=1)
    further_BTD, _ = model.mtp[0](states_BTD, model.embed_tokens(shifted_BT), at)
    wanted = model.logits(further_BTD)[0]
    pages, count = -(-len(prompt) // 16), len(prompt)
    tables, outputs = np.arange(2 * pages, dtype=np.int32).reshape(2, -1), np.arange(count, dtype=np.int32)
    zeros, rows = np.zeros(count), np.ones(count, np.int32)
    hidden = torch.empty(count, model.config.hidden_size)
    arguments = (outputs, rows, tables, outputs, zeros.astype(np.float32), zeros)
    net.run(net.new_cache(2 * pages), prompt, *arguments, hidden=hidden)
    assert (hidden - states_BTD[0]).abs().max() < 1e-4
    shifted, cache, further, found = shifted_BT[0].numpy().astype(np.int32), net.new_cache(2 * pages)[:1], [], []
    for first, last in ((0, 1), (1, 140), (140, count)):
        part = slice(first, last)
        after = torch.empty(last - first, model.config.hidden_size)
        logits, chosen, _ = net.run(
            cache, shifted[part], outputs[part], rows[part], tables, outputs[: last - first],
            zeros[part].astype(np.float32), zeros[part], states=hidden[part], hidden=after,
        )  # fmt: skip
        assert chosen.tolist() == logits.argmax(-1).tolist()
        found.append(logits)
        further.append(after)
    assert (torch.cat(found) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (torch.cat(further) - further_BTD[0]).abs().max() < 1e-4


def as_multiplied(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Activations as a product sees them: rounded to bf16, or to 8 bits with a scale for each 32."""
    if kind == "float32":
        return x
    if kind == "bfloat16":
        return x.bfloat16().float()
    groups = x.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale.clamp(min=1e-30)).round() * scale).flatten(-2)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("kind", "rounding", "most"),
    [("float32", 0, 0), ("bfloat16", 0.004, 0.004), ("int8", 0.006, 0.005), ("int4", 0.085, 0.09)],
)
def test_products_of_odd_shapes(build: str, kind: str, rounding: float, most: float) -> None:
    compiled = library.load(build)
    assert compiled is not None
    for outputs, inputs, rows in ((1, 1, 1), (37, 70, 19), (16, 32, 64), (100, 33, 7)):
        torch.manual_seed(rows)
        weight, x = torch.randn(outputs, inputs), torch.zeros(rows, -(-inputs // 32) * 32)
        x[:, :inputs] = torch.randn(rows, inputs)
        packed = Packer(compiled, KINDS[kind], 1).matrix(weight)
        matrix = packed.struct()
        seen, y = torch.empty_like(weight), torch.empty(rows, -(-outputs // 16) * 16)
        compiled.glasklar_unpack(ctypes.byref(matrix), 0, seen.data_ptr())
        compiled.glasklar_multiply(ctypes.byref(matrix), 0, rows % 2, x.data_ptr(), rows, y.data_ptr())
        assert (seen - weight).square().mean().sqrt() <= rounding * weight.square().mean().sqrt()
        assert (seen - weight).abs().max() <= most * weight.abs().max()
        exact = as_multiplied(x, kind)[:, :inputs].double() @ seen.double().T
        assert (y[:, :outputs] - exact).abs().max() <= 2e-6 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_products_of_the_largest_values_stay_within_their_integers(build: str, kind: str) -> None:
    compiled = library.load(build)
    assert compiled is not None
    weight = torch.full((32, 64), 7.0)
    weight[:, ::32] = -8.0 if kind == "int4" else -7.0  # four bits hold -8 to 7
    weight[16:] *= -1
    x = torch.ones(5, 64)
    x[1], x[2, ::2], x[3, 1::4], x[4, :32] = -1, -1, -1, -1
    packed = Packer(compiled, KINDS[kind], 1).matrix(weight)
    matrix = packed.struct()
    seen, y = torch.empty_like(weight), torch.empty(5, 32)
    compiled.glasklar_unpack(ctypes.byref(matrix), 0, seen.data_ptr())
    compiled.glasklar_multiply(ctypes.byref(matrix), 0, False, x.data_ptr(), 5, y.data_ptr())
    exact = as_multiplied(x, kind).double() @ seen.double().T
    assert (y - exact).abs().max() <= 2e-6 * exact.abs().max()
    assert exact.abs().max() > 60 * 7 * 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_the_same_bits_for_any_number_of_rows_in_every_build(kind: str) -> None:
    torch.manual_seed(1)
    weights = torch.randn(2, 160, 230).mT[:, :, ::2][..., :70]  # strided: [2, 230, 70]
    x = torch.zeros(64, 96)
    x[:, :70] = torch.randn(64, 70) * torch.logspace(-3, 3, 64)[:, None]

    def product(build: str, far: bool, rows: int) -> torch.Tensor:
        compiled = library.load(build)
        assert compiled is not None
        packed = Packer(compiled, KINDS[kind], 1).matrix(weights)
        y, some = torch.empty(rows, 240), x[:rows].clone()
        compiled.glasklar_multiply(ctypes.byref(packed.struct()), 1, far, some.data_ptr(), rows, y.data_ptr())
        return y[:, :230]

    wanted = product(BUILDS[0], False, 64)
    exact = x[:, :70].double() @ weights[1].double().T
    assert (wanted - exact).abs().amax(1).div(exact.abs().amax(1)).max() < {"int4": 0.2, "int8": 0.02}.get(kind, 0.01)
    for build in BUILDS:
        for rows in range(1, 65):
            for far in (False, True):
                assert torch.equal(product(build, far, rows), wanted[:rows]), (build, far, rows)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_where_rounding_would_hide_them(kind: str, bad: float) -> None:
    model = network("mla")
    model.layers[1].mlp.down_EDF[3, 5, 7] = bad
    with pytest.raises(CheckpointError, match=r"\[72, 52\] holds values that are not finite"):
        native(model, BUILDS[0], kind)


def test_builds_for_lesser_cpus_are_chosen_where_features_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for tier in (3, 2, 1, 0):
        plain = type("Plain", (), {"glasklar_tier": staticmethod(lambda tier=tier: tier)})()
        monkeypatch.setattr(library, "_open", lambda name, plain=plain: plain if name == "plain" else name)
        library.load.cache_clear()
        chosen.append(library.best() if tier else library.best() is plain)
    library.load.cache_clear()
    assert chosen == ["avx512", "vnni", "avx2", True]


def test_a_library_of_another_version_is_refused() -> None:
    class Older:
        """As compiled before the layout could be asked for."""

    class Newer:
        @staticmethod
        def glasklar_layout(found: ctypes.Array[ctypes.c_int32]) -> None:
            found[:] = [library.VERSION + 1, library.VARIANTS["vnni"], *library.SIZES]

    class OfAnotherCpu:
        @staticmethod
        def glasklar_layout(found: ctypes.Array[ctypes.c_int32]) -> None:
            found[:] = [library.VERSION, library.VARIANTS["avx2"], *library.SIZES]

    for other in (Older(), Newer(), OfAnotherCpu()):
        with pytest.raises(CapacityError, match=r"_vnni\.so: compiled for another version.*install"):
            library.check_layout(other, "vnni", "_vnni.so")  # type: ignore[arg-type]


def test_tokens_are_drawn_from_the_logits() -> None:
    model = network("mla")
    net = native(model, BUILDS[0])
    prompt = np.array(prompts(model)[1], np.int32)
    count = len(prompt)
    uniforms = np.random.default_rng(0).random(count)
    temperatures = np.where(np.arange(count) % 2, 0.7, 0.0).astype(np.float32)
    logits, chosen, logprobs = net.run(
        net.new_cache(8), prompt, np.arange(count, dtype=np.int32), np.zeros(count, np.int32),
        np.arange(8, dtype=np.int32)[None], np.arange(count, dtype=np.int32), temperatures, uniforms,
    )  # fmt: skip
    exact = logits.double()
    for row in range(count):
        if temperatures[row] == 0:
            assert chosen[row] == exact[row].argmax()
        else:
            cumulative = (exact[row] / 0.7).softmax(-1).cumsum(-1).numpy()
            before = cumulative[chosen[row] - 1] if chosen[row] else 0.0
            assert before - 1e-6 <= uniforms[row] <= cumulative[chosen[row]] + 1e-6
    assert np.allclose(logprobs, exact.log_softmax(-1)[np.arange(count), chosen], atol=1e-5)


def test_a_row_that_is_not_finite_stays_with_itself() -> None:
    model = network("mla")
    clean = logits_of(native(model, BUILDS[0], "int4"), prompts(model)[:2], 64)
    bad = prompts(model)[0]
    model.embed_tokens.weight[bad[0]] = float("nan")
    other = [[token for token in prompts(model)[1] if token != bad[0]]]
    [wanted] = logits_of(native(model, BUILDS[0], "int4"), other, 64)
    damaged, beside = logits_of(native(model, BUILDS[0], "int4"), [bad, *other], 64)
    assert np.isnan(damaged).any()
    assert np.array_equal(beside, wanted)
    assert all(np.isfinite(logits).all() for logits in clean)
