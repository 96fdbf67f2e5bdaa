"""The compiled kernels: a build is what its name says, or it is not loaded."""

from __future__ import annotations

import importlib.util

import pytest

from glasklar.errors import CapacityError
from glasklar.ops.cpu.library import BY_TYPE, VARIANTS, Library, load

BUILT = [name for name in VARIANTS if load(name) is not None]


@pytest.mark.parametrize("name", BUILT)
def test_a_build_under_another_ones_name_is_refused(name: str) -> None:
    module, level = VARIANTS[name]
    spec = importlib.util.find_spec(f"glasklar.ops.cpu.{module}")
    assert spec is not None
    assert spec.origin is not None
    Library(spec.origin, level)
    with pytest.raises(CapacityError, match=r"compiled for another version.*install"):
        Library(spec.origin, level + 1)


def test_a_build_of_older_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lacks a function that this version calls."""
    spec = importlib.util.find_spec("glasklar.ops.cpu._plain")
    if spec is None or spec.origin is None:
        pytest.skip("no compiler at installation")
    monkeypatch.setitem(BY_TYPE, "not_yet_written", "pi")
    with pytest.raises(CapacityError, match=r"compiled for another version.*install"):
        Library(spec.origin, 0)
