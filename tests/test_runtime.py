"""What is decided of the machine."""

import os

import pytest
import torch

from glasklar import runtime
from glasklar.errors import RecipeError


def allow(monkeypatch: pytest.MonkeyPatch, cores: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)


def test_threads_are_given_cores_where_there_is_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLASKLAR_PIN", raising=False)
    allow(monkeypatch, {7, 2, 5})
    assert runtime.cores(3) == [2, 5, 7]
    assert runtime.cores(2) == runtime.cores(4) == []
    allow(monkeypatch, {4})
    assert runtime.cores(1) == []


def test_the_system_places_threads_if_told_to_or_if_it_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, {0, 1})
    monkeypatch.setenv("GLASKLAR_PIN", "0")
    assert runtime.cores(2) == []
    monkeypatch.setenv("GLASKLAR_PIN", "1")
    assert runtime.cores(2) == [0, 1]
    monkeypatch.delattr(os, "sched_getaffinity")
    assert runtime.cores(2) == []


def test_threads_are_a_number_from_one_on() -> None:
    environ = {"GLASKLAR_THREADS": "3"}
    assert runtime.prepare(None, environ) == 3
    assert runtime.prepare(2, environ) == 2
    wrong = ((0, "3", "threads = 0"), (None, "many", "GLASKLAR_THREADS = many"), (None, "0", "GLASKLAR_THREADS = 0"))
    for threads, value, named in wrong:
        with pytest.raises(RecipeError, match=named):
            runtime.prepare(threads, {"GLASKLAR_THREADS": value})


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASKLAR_PIN", "yes")
    with pytest.raises(RecipeError, match="GLASKLAR_PIN = 'yes': 1 keeps"):
        runtime.cores(2)


def test_the_device_is_that_of_the_environment_if_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("GLASKLAR_DEVICE", raising=False)
    assert runtime.start(threads).device == "cuda"
    monkeypatch.setenv("GLASKLAR_DEVICE", "cpu")
    assert runtime.start(threads).device == "cpu"
    assert runtime.start(threads, device="cuda").device == "cuda"
    monkeypatch.setenv("GLASKLAR_DEVICE", "gpu")
    with pytest.raises(RecipeError, match="GLASKLAR_DEVICE = 'gpu': use one of cpu, cuda"):
        runtime.start(threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("GLASKLAR_DEVICE", "cuda")
    with pytest.raises(RecipeError, match="sees no GPU"):
        runtime.start(threads)
