import hashlib
import json

import pytest

from glasklar.errors import CheckpointError
from glasklar.provenance.metrics import START, Metrics, read_metrics


@pytest.fixture
def metrics(tmp_path):
    return Metrics(tmp_path / "metrics.jsonl")


def test_mark_against_the_bytes_on_disk(metrics):
    assert metrics.mark() == START
    for step in range(3):
        metrics.append({"step": step, "loss": 1 / 3})
    content = metrics.path.read_bytes()
    assert metrics.mark() == {"lines": 3, "sha256": hashlib.sha256(content).hexdigest()}
    assert Metrics(metrics.path).mark() == metrics.mark()
    assert [line["loss"] for line in read_metrics(metrics.path)] == [1 / 3] * 3


def test_resumed_metrics_equal_uninterrupted_ones(metrics):
    for step in range(4):
        if step == 2:
            mark = metrics.mark()
        metrics.append({"step": step})
    whole = metrics.path.read_bytes()
    with metrics.path.open("ab") as file:
        file.write(b'{"step": 4, "lo')
    again = Metrics(metrics.path)
    again.cut(mark)
    assert [line["step"] for line in read_metrics(metrics.path)] == [0, 1]
    for step in (2, 3):
        again.append({"step": step})
    assert metrics.path.read_bytes() == whole
    again.cut(START)
    assert read_metrics(metrics.path) == []


def test_changed_metrics_are_not_cut(metrics):
    metrics.append({"loss": 1.5})
    mark = metrics.mark()
    metrics.append({"loss": 1.25})
    metrics.path.write_bytes(metrics.path.read_bytes().replace(b"1.5", b"1.4"))
    before = metrics.path.read_bytes()
    with pytest.raises(CheckpointError, match="first 1 lines"):
        Metrics(metrics.path).cut(mark)
    assert metrics.path.read_bytes() == before


def test_figures_that_are_not_numbers_are_refused(metrics):
    with pytest.raises(ValueError, match="Out of range"):
        metrics.append({"loss": float("nan")})
    assert not metrics.path.exists()


def test_broken_line_is_named(metrics):
    metrics.path.write_text(json.dumps({"step": 1}) + "\n{]\n")
    with pytest.raises(CheckpointError, match="line 2"):
        read_metrics(metrics.path)
