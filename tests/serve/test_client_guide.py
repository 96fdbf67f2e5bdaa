"""The guide for clients: its Python is run as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from glasklar.runtime import Runtime
from glasklar.serve.live import LiveServer
from glasklar.serve.server import Site

GUIDE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime, site: Site) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("run"), site) as live:
        live.release(tiny.make(tmp_path_factory.mktemp("models") / "spark", runtime))
        yield live


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 6


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # snippets leave their clients open, as short scripts do
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number: int, server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    code = SNIPPETS[number].replace("http://127.0.0.1:8421", server.url)
    assert server.url in code
    exec(compile(code, f"docs/clients.md, snippet {number}", "exec", dont_inherit=True), {"__name__": "snippet"})
    assert capsys.readouterr().out.strip()
