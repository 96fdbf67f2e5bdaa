"""Pages on disk: found after a restart, never trusted, bounded; a disk that is full changes no answer."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glasklar.engine.cpu import library
from glasklar.engine.engine import Engine
from glasklar.engine.paged_runner import PagedRunner
from glasklar.engine.request import Completion, SamplingParams
from glasklar.engine.spill import MARK, Spill, SpillConfig
from glasklar.errors import CapacityError, RequestError
from glasklar.model.config import ModelConfig
from glasklar.model.init import build, initialise
from glasklar.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=192,
    intermediate_size=48, initializer_range=0.3, num_key_value_heads=2, head_dim=8,
)  # fmt: skip
A, B, C = (bytes([i]) * 16 for i in (1, 2, 3))
PROMPT = [i * 7 % 61 for i in range(70)]
PARAMS = SamplingParams(max_tokens=8, temperature=0.7, seed=3)

needs_compiler = pytest.mark.skipif(library.best() is None, reason="the C++ pass is not compiled here")


def spill(folder: Path, model: str = "m", max_bytes: int = 1 << 20, layout: str = "x") -> Spill:
    return Spill(SpillConfig(folder=folder, model=model, max_bytes=max_bytes), layout)


@pytest.fixture(scope="module")
def network() -> Transformer:
    return initialise(build(CONFIG, dtype=torch.bfloat16), 3)


def engine(network: Transformer, folder: Path, **settings: int) -> tuple[Engine, Spill]:
    made = Engine(network, native=True, spill=SpillConfig(folder=folder, model="m"), **settings)
    assert isinstance(made.runner, PagedRunner)
    assert made.runner.cache.spill is not None
    return made, made.runner.cache.spill


def asked(made: Engine) -> tuple[Completion, int]:
    """The answer to the prompt, and how much of it the cache had."""
    made.add(PROMPT, PARAMS)
    events = []
    while made.has_work:
        events += made.step()
    return Completion(
        ids=[e.token for e in events], logprobs=[e.logprob for e in events], finish=events[-1].finish or "error"
    ), events[0].cached


def test_pages_are_found_by_key_model_and_layout_also_later(tmp_path: Path) -> None:
    first = spill(tmp_path)
    first.write(A, b"abcd")
    first.write(B, b"efgh")
    again = spill(tmp_path)
    assert (again.read(A, 4), again.read(B, 4), again.read(C, 4)) == (b"abcd", b"efgh", None)
    assert spill(tmp_path, model="n").read(A, 4) is None
    assert spill(tmp_path, layout="y").read(A, 4) is None
    assert oct(first.folder.stat().st_mode & 0o777) == "0o700"
    assert {oct(path.stat().st_mode & 0o777) for path in first.folder.iterdir()} == {"0o600"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": flip,
    "shorter": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "another page": lambda path: path.write_bytes((path.parent / (B.hex() + ".page")).read_bytes()),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_pages_are_not_returned_nor_kept(tmp_path: Path, damage: str) -> None:
    pages = spill(tmp_path)
    pages.write(A, b"abcd")
    pages.write(B, b"efgh")
    DAMAGES[damage](pages.folder / (A.hex() + ".page"))
    assert pages.read(A, 4) is None
    assert pages.damaged == (damage != "gone")
    assert A not in pages
    assert pages.read(B, 4) == b"efgh"
    assert pages.bytes_used == 4 + MARK


def test_engines_that_share_a_folder_leave_each_other_s_pages_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = spill(tmp_path)
    replace = Path.replace

    def late(path: Path, target: Path) -> Path:
        spill(tmp_path)  # another one starts while a page is written
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", late)
    first.write(A, b"abcd")
    monkeypatch.undo()
    assert first.failure is None
    second = spill(tmp_path)
    assert second.read(A, 4) == b"abcd"
    next(first.folder.glob("*.page")).unlink()  # the first one needed the room
    assert second.read(A, 4) is None
    assert not second.damaged
    assert not caplog.records
    old = first.folder / "ended.tmp"
    old.write_bytes(b"half")
    os.utime(old, (1, 1))
    spill(tmp_path)
    assert not old.exists()


def test_the_longest_unused_goes_first_also_after_a_restart(tmp_path: Path) -> None:
    two = 2 * (4 + MARK)
    pages = spill(tmp_path, max_bytes=two)
    for age, key in ((20, A), (10, B)):
        pages.write(key, b"abcd")
        os.utime(pages.folder / (key.hex() + ".page"), (1e9 - age, 1e9 - age))
    pages = spill(tmp_path, max_bytes=two)
    assert pages.read(A, 4) is not None  # now the youngest
    pages.write(C, b"abcd")
    assert [key in pages for key in (A, B, C)] == [True, False, True]
    assert pages.bytes_used == two
    assert len(list(pages.folder.iterdir())) == 2
    pages.write(B, b"x" * 2 * two)  # never fits
    assert B not in pages
    assert A not in spill(tmp_path, max_bytes=4 + MARK)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CapacityError, match=r"file.*another folder"):
        spill(tmp_path / "file")
    with pytest.raises(RequestError, match="hash"):
        SpillConfig(folder=tmp_path, model="")


@needs_compiler
def test_a_new_engine_finds_what_an_earlier_one_left(network: Transformer, tmp_path: Path) -> None:
    wanted, none = asked(Engine(network, native=True))
    first, _ = engine(network, tmp_path)
    assert asked(first) == (wanted, none) == (wanted, 0)
    first.close()
    second, pages = engine(network, tmp_path)
    assert asked(second) == (wanted, 64)
    assert pages.found == 4
    assert second.runner.cache.pages_used  # type: ignore[union-attr]


@needs_compiler
def test_pages_that_memory_has_no_room_for_are_found_again(network: Transformer, tmp_path: Path) -> None:
    small, pages = engine(network, tmp_path, max_tokens=96)
    wanted, _ = asked(small)
    small.generate([[60 - i for i in PROMPT]], PARAMS)  # takes all pages
    assert pages.written >= 3
    answer, known = asked(small)
    assert answer == wanted
    assert known >= 48
    assert pages.found >= 3


@needs_compiler
def test_damage_is_computed_again(network: Transformer, tmp_path: Path) -> None:
    first, _ = engine(network, tmp_path)
    wanted, _ = asked(first)
    first.close()
    for path in sorted(tmp_path.rglob("*.page")):
        flip(path)
    second, pages = engine(network, tmp_path)
    assert asked(second) == (wanted, 0)
    assert pages.damaged == 1  # the first page; what follows it is not looked for
    second.close()
    third, _ = engine(network, tmp_path)
    assert asked(third)[1] == 16


@needs_compiler
def test_a_full_disk_stops_spilling_and_nothing_else(
    network: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small, pages = engine(network, tmp_path, max_tokens=96)
    wanted, _ = asked(small)
    kept = set(tmp_path.rglob("*.page"))

    def full(path: Path, flags: int, mode: int) -> int:
        descriptor = real(path, flags, mode)
        os.write(descriptor, b"part of")
        os.close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = os.open
    with monkeypatch.context() as patch:
        patch.setattr("glasklar.engine.spill.os.open", full)
        [beside] = small.generate([[60 - i for i in PROMPT]], PARAMS)
    assert pages.failure is not None
    assert "No space left on device" in pages.failure
    assert caplog.text.count("No space left") == 1
    assert [beside] == Engine(network, native=True).generate([[60 - i for i in PROMPT]], PARAMS)
    assert asked(small)[0] == wanted
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == kept  # nothing half written


@needs_compiler
def test_pages_are_not_kept_for_weights_that_change(network: Transformer, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="spill"):
        engine(network, tmp_path)[0].refresh()
    with pytest.raises(RequestError, match="spill"):
        Engine(network, native=False, spill=SpillConfig(folder=tmp_path, model="m"))
