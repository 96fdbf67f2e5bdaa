"""The page as people use it, in headless Chromium."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from glasklar.loading import open_folder
from glasklar.serve.live import LiveServer
from glasklar.serve.server import Site

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]


def last(page: Any) -> str:
    return page.inner_text(".turn.last .answer")


def test_first_run_shows_the_training_then_turns_to_the_chat(window: Any, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "glasklar.cli",
        "up",
        "--recipe",
        str(ROOT / "tests" / "smoke.toml"),
        "--no-open",
        "--port",
        "0",
    ]
    environment = {**os.environ, "GLASKLAR_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as up:
        try:
            assert up.stdout is not None
            url = re.search(r"http://[0-9.:]+", up.stdout.readline())[0]
            watched = window(url)
            page = watched.open()
            assert page.is_visible("#training")
            assert not page.is_visible("#side")
            page.wait_for_selector("#charts figure", timeout=240_000)
            watched.shot("01-first-run")
            page.wait_for_selector("#chat:not([hidden])", timeout=240_000)
            assert "ready" in page.inner_text("#notice")
            assert page.evaluate("document.activeElement.id") == "question"
            watched.ask("What is 3+4?")
            watched.shot("02-first-answer")
            assert page.inner_text("#title") == "What is 3+4?"
            # What was said is still there when the server comes back.
            assert len(list((tmp_path / "conversations").glob("*.sqlite"))) == 1
            page.goto(f"{url}/#/training")
            page.wait_for_selector("#samples .sample")
            assert page.locator("#stages .past").count() == 3
            assert page.locator("#charts figure").count() >= 4
            for figure in ("Time", "Tokens", "Energy", "Electricity"):
                assert figure in page.inner_text("#figures")
            page.set_viewport_size({"width": 1180, "height": 1900})
            watched.shot("03-training-finished")
            watched.clean()
        finally:
            up.terminate()


def test_thinking_streams_into_a_fold(window: Any, parrot_server: LiveServer) -> None:
    watched = window(parrot_server.url)
    page = watched.open()
    page.fill("#question", "slow **thoughts** take their time, this one about a second or so")
    page.press("#question", "Enter")
    page.wait_for_selector(".thought.thinking[open]")
    summary = page.inner_text(".thought summary")
    assert re.search(r"Thinking · [\d.]+ s · \d+ tokens", summary), summary
    watched.shot("04-thinking")
    watched.settled()
    assert re.search(r"Thought for [\d.]+ s · \d+ tokens", page.inner_text(".thought summary"))
    assert page.inner_text(".turn.last .answer strong") == "thoughts"
    page.click(".thought summary")
    assert not page.is_visible(".thought .marked")
    watched.clean()


def test_stopping_keeps_what_was_said(window: Any, parrot_server: LiveServer) -> None:
    watched = window(parrot_server.url)
    page = watched.open()
    page.fill("#question", "slow " + "word " * 200)
    page.press("#question", "Enter")
    watched.until("document.querySelector('.thought .marked')?.textContent.length > 20")
    page.click("#stop")
    watched.settled()
    assert page.inner_text(".turn.last .note") == "Stopped"
    assert "word" in page.text_content(".thought .marked")
    deadline = time.monotonic() + 5
    while parrot_server._backend.service.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert parrot_server._backend.service.running == 0
    watched.clean()


def test_another_answer_and_another_question_are_branches(window: Any, parrot_server: LiveServer) -> None:
    watched = window(parrot_server.url)
    page = watched.open()
    watched.ask("at once first")
    assert last(page) == "at once first"
    page.click(".turn.last [aria-label^='Another answer']")
    page.wait_for_selector(".turn.last .versions")
    watched.settled()
    assert re.fullmatch(r"at once first \(\d+\)", last(page))
    assert page.inner_text(".turn.last .versions") == "2/2"
    page.click(".turn.last [aria-label='Previous version']")
    watched.until("document.querySelector('.turn.last .answer').textContent.trim() === 'at once first'")
    watched.ask("at once deeper")
    # Editing the first question leads away from all of it, and back.
    page.hover(".turn.asked >> nth=0")
    page.click(".turn.asked >> nth=0 >> [aria-label='Edit']")
    page.fill(".edit textarea", "at once other")
    page.click(".edit [type=submit]")
    watched.until("document.querySelector('.turn.last .answer')?.textContent.trim() === 'at once other'")
    watched.settled()
    assert page.locator(".turn").count() == 2
    watched.shot("05-branches")
    page.click(".turn.asked [aria-label='Previous version']")
    watched.until("document.querySelectorAll('.turn').length === 4")
    assert last(page) == "at once deeper"
    page.reload()
    page.wait_for_selector(".turn.last .answer")
    assert last(page) == "at once deeper"
    watched.clean()


def test_an_answer_goes_on_when_nobody_looks(window: Any, parrot_server: LiveServer) -> None:
    watched = window(parrot_server.url)
    page = watched.open()
    page.fill("#question", "slow but sure, " + "this takes a while " * 3)
    page.press("#question", "Enter")
    page.wait_for_selector(".thought.thinking")
    place = page.url
    page.close()
    time.sleep(0.5)
    watched.page = watched.context.new_page()
    watched.page.goto(place)
    watched.page.wait_for_selector(".turn.last.running")  # attached again, in the middle
    watched.settled()
    assert last(watched.page) == ("slow but sure, " + "this takes a while " * 3).strip()
    watched.clean()


def test_conversations_are_found_renamed_exported_deleted(window: Any, parrot_server: LiveServer) -> None:
    watched = window(parrot_server.url)
    page = watched.open()
    for text in ("at once aardvarks eat ants", "at once Bären mögen Honig"):
        page.goto(f"{parrot_server.url}/#/")
        page.wait_for_selector("#welcome:not([hidden])")
        watched.ask(text)
    page.fill("#search", "BÄREN")
    watched.until("document.querySelectorAll('#list li').length === 1")
    assert "Honig" in page.inner_text("#list")
    page.fill("#search", "")
    row = page.locator("#list li", has_text="aardvarks").first
    row.hover()
    row.locator(".tool").click()
    with page.expect_download() as download:
        page.click("text=Export as Markdown")
    assert "## User\n\nat once aardvarks eat ants" in Path(download.value.path()).read_text()
    row.hover()
    row.locator(".tool").click()
    watched.shot("06-menu")
    page.click("text=Rename")
    page.fill(".rename", "Ants")
    page.press(".rename", "Enter")
    page.wait_for_selector("#list a:text-is('Ants')")
    row = page.locator("#list li", has_text="Ants").first
    row.hover()
    row.locator(".tool").click()
    page.click(".menu >> text=Delete")
    page.click("#confirm [value=yes]")
    page.wait_for_selector("#list a:text-is('Ants')", state="detached")
    assert httpx.get(f"{parrot_server.url}/conversations", params={"q": "aardvarks"}).json()["conversations"] == []
    watched.clean()


def test_a_text_file_is_dropped_in(window: Any, parrot_server: LiveServer) -> None:
    watched = window(parrot_server.url)
    page = watched.open()
    page.evaluate(
        """() => { const data = new DataTransfer();
        data.items.add(new File(['forty-two'], 'note.txt', { type: 'text/plain' }));
        const chat = document.getElementById('chat');
        for (const type of ['dragenter', 'dragover', 'drop'])
          chat.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
        }"""
    )
    page.wait_for_selector("#files .file")
    watched.ask("at once?")
    assert "note.txt" in page.inner_text(".turn.asked .file")
    assert "forty-two" in last(page)
    watched.clean()


def test_settings_reach_the_model_and_stay(window: Any, parrot_server: LiveServer) -> None:
    watched = window(parrot_server.url)
    page = watched.open()
    page.click("#tune")
    page.fill("#temperature", "1")
    page.fill("#seed", "4711")
    watched.shot("07-settings")
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector("#question")
    watched.ask("at once seeded")
    assert last(page) == "at once seeded (4711)"
    watched.clean()


MARKED = """at once # Sorting

Quicksort takes $O(n \\log n)$ on average:

$$T(n) = 2\\,T\\left(\\frac{n}{2}\\right) + \\sum_{i=1}^{n} 1$$

```python
def quick(values: list[int]) -> list[int]:
    if len(values) < 2:
        return values  # nothing to do
    first, *rest = values
    return quick([v for v in rest if v < first]) + [first] + quick([v for v in rest if v >= first])
```

| case | steps | note |
|:-----|------:|------|
| best | 17 | **even** halves |
| worst | 120 | sorted already |

1. Choose a pivot, as in [the paper](https://example.org/paper).
2. Split, then sort `both` halves: 3*4*5 stays a product.

> Premature optimisation is the root of all evil.
"""


def test_markdown_formulas_code_and_tables(window: Any, parrot_server: LiveServer) -> None:
    watched = window(parrot_server.url, viewport={"width": 1180, "height": 1250})
    page = watched.open()
    watched.ask(MARKED)
    answer = page.locator(".turn.last .answer")
    assert answer.locator("math").count() == 2
    assert answer.locator("math[display=block] munderover").count() == 1
    assert answer.locator(".code .hl-k").count() >= 4
    assert answer.locator("table td.right").count() == 2
    assert answer.locator("ol li").count() == 2
    assert "3*4*5" in answer.inner_text()
    watched.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".code-head .tool")
    watched.until("document.getElementById('spoken').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()").startswith("def quick")
    page.evaluate("document.getElementById('scroll').scrollTop = 620")
    watched.shot("08-markdown")
    watched.clean()


def test_look_inside_a_real_answer(window: Any, smoke_run: Path, runtime: Any, tmp_path: Path) -> None:
    with LiveServer(smoke_run, Site(home=tmp_path, port=0)) as live:
        live.release(open_folder(smoke_run / "model", runtime))
        watched = window(live.url)
        page = watched.open()
        watched.ask("What is 3+4?")
        page.click(".turn.last .named")
        page.wait_for_selector(".alternatives li.taken")
        assert page.locator(".tokens .token").count() > 3
        shares = [float(text.strip("%< ")) for text in page.locator(".alternatives em").all_inner_texts()]
        assert shares == sorted(shares, reverse=True)
        assert page.locator(".strip").count() == 1  # the recipe has one layer of experts
        assert page.locator(".strip rect.own").count() == 4
        assert (
            sum(float(page.locator(".strip rect.own").nth(k).get_attribute("fill-opacity")) > 0 for k in range(4)) == 2
        )
        page.locator(".tokens .token[aria-pressed=true]").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator(".tokens .token[aria-pressed=true]").evaluate("e => e === document.activeElement")
        for name in ("Speed", "Prompt from the cache", "Drafted tokens that held", "Energy"):
            assert name in page.inner_text(".facts-grid")
        watched.shot("09-inside")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.classList.contains('named')")
        watched.clean()


def test_by_keyboard_alone_and_with_names_for_everything(window: Any, parrot_server: LiveServer) -> None:
    watched = window(parrot_server.url)
    page = watched.open()
    page.keyboard.type("at once with keys")
    page.keyboard.press("Enter")
    watched.settled()
    assert page.inner_text("#spoken") == "at once with keys"  # what a screen reader hears
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(({ ariaLabel, id, textContent }) => ariaLabel || id || textContent.trim())(document.activeElement)"
            )
        )
    for wanted in (
        "skip",
        "Hide conversations",
        "new",
        "Search",
        "Copy",
        "Edit",
        "Look inside",
        "Attach a text file",
        "thinking",
        "Settings for answers",
    ):
        assert wanted in reached, (wanted, reached)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, a, input, select, textarea')]
        .filter((e) => e.checkVisibility() && !(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.title))
        .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    page.locator("#list li .tool").first.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "Export as Markdown"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "false"
    watched.clean()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_german_on_a_phone(scheme: str, window: Any, parrot_server: LiveServer) -> None:
    phone = {
        "viewport": {"width": 390, "height": 780},
        "has_touch": True,
        "is_mobile": True,
        "locale": "de-DE",
        "color_scheme": scheme,
    }
    watched = window(parrot_server.url, **phone)
    page = watched.open()
    assert page.evaluate("document.documentElement.lang") == "de"
    assert page.get_attribute("#question", "placeholder") == "Frag etwas"
    watched.shot(f"10-phone-{scheme}")
    watched.ask("Wie lang ist " + "Donaudampfschifffahrtsgesellschaftskapitän" * 3 + "?\n\n```\n" + "x" * 200 + "\n```")
    assert "nachgedacht" in page.inner_text(".thought summary")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    watched.shot(f"11-phone-answer-{scheme}")
    assert not page.is_visible("#list")
    page.click("#menu")
    page.wait_for_selector("#list a")
    page.wait_for_timeout(300)
    watched.shot(f"12-phone-list-{scheme}")
    page.click("#fold")
    page.wait_for_selector("#list", state="hidden")
    page.click(".turn.last .named")
    page.wait_for_selector(".alternatives")
    assert page.evaluate("document.getElementById('inside-body').scrollWidth <= innerWidth")
    watched.shot(f"13-phone-inside-{scheme}")
    watched.clean()


def test_a_lost_server_is_said_and_found_again(window: Any, tmp_path: Path) -> None:
    from parrot import Parrot

    with LiveServer(tmp_path, Site(home=tmp_path, port=0)) as live:
        live._backend.service = Parrot(tmp_path)  # type: ignore[assignment]
        watched = window(live.url)
        page = watched.open()
        page.context.set_offline(True)
        page.wait_for_selector("#trouble:not([hidden])")
        page.context.set_offline(False)
        page.wait_for_selector("#trouble", state="hidden")
