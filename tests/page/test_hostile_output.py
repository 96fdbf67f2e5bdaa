"""Hostile strings as model output and as titles, in real Chromium: no script runs, no request leaves the origin."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hostile import ALL, LEAKS, SCRIPTS
from playwright.sync_api import Error

from glasklar.serve.live import LiveServer

pytestmark = pytest.mark.browser
CHUNK = 8


def hit(page: Any) -> Any:
    return page.evaluate("window.hit")


def test_there_are_enough() -> None:
    assert len(set(SCRIPTS)) >= 40
    assert len(set(LEAKS)) >= 25


def test_the_watch_sees_what_it_must(window: Any, parrot_server: LiveServer) -> None:
    """The same strings in a page without our walls: scripts run and requests go out, and both are noticed."""
    bare = window(parrot_server.url)
    ran, left = 0, 0
    for text in ALL[::3]:
        before = len(bare.foreign)
        bare.page.goto("about:blank")
        bare.page.set_content(text, wait_until="commit")
        bare.page.wait_for_timeout(30)
        with contextlib.suppress(Error):  # one of them leads the page away
            ran += bool(hit(bare.page)) or bool(bare.dialogs)
        left += len(bare.foreign) > before
    assert ran >= 6
    assert left >= 4


@pytest.mark.parametrize("start", range(0, len(ALL), CHUNK))
def test_as_thought_answer_question_and_title(start: int, window: Any, parrot_server: LiveServer) -> None:
    watched = window(parrot_server.url)
    page = watched.open()
    for text in ALL[start : start + CHUNK]:
        # A new conversation, whose title is the question; the parrot thinks and answers the same.
        page.goto(f"{parrot_server.url}/#/")
        page.wait_for_selector("#welcome:not([hidden])")
        watched.ask(text)
        answer = page.locator(".turn.last .answer")
        for link in answer.locator("a").all():
            assert link.get_attribute("href").startswith(("https://", "http://", "mailto:"))
        assert (
            answer.locator("img, script, iframe, style, svg:not(.icon), form, object, embed, link, input").count() == 0
        )
        for element in answer.locator("*").all()[:200]:
            names = element.evaluate("e => e.getAttributeNames()")
            assert not [name for name in names if name.startswith("on") or name == "style"]
        # Look inside shows the same as tokens.
        page.click(".turn.last .named")
        page.wait_for_selector(".alternatives")
        page.keyboard.press("Escape")
        assert hit(page) is None, text
    # Again from what was stored, with the list and its menus.
    page.reload()
    page.wait_for_selector(".turn.last .answer")
    page.click("#list li:has([aria-current]) .tool")
    page.wait_for_selector(".menu")
    page.click(".menu [role=menuitem] >> nth=3")
    page.wait_for_selector("#confirm[open]")
    page.keyboard.press("Escape")
    page.mouse.move(500, 400)
    page.wait_for_timeout(200)
    assert hit(page) is None
    watched.clean()


def test_in_names_of_files_and_in_the_tree_itself(window: Any, parrot_server: LiveServer) -> None:
    watched = window(parrot_server.url)
    page = watched.open()
    name, text = "<img src=x onerror=window.hit=1>.txt", b"<script>window.hit=1</script>"
    files = [
        {"name": name, "mimeType": "text/plain", "buffer": text},
        {"name": "pic.png", "mimeType": "image/png", "buffer": b"\x89PNG\xff\xfe\x00"},
    ]
    page.set_input_files("#picker", files)
    page.wait_for_selector("#files .file")
    assert page.locator("#files .file").count() == 1
    assert "pic.png" in page.inner_text("#notice")
    watched.ask("what is in it?")
    assert "<script>window.hit=1</script>" in page.inner_text(".turn.last .answer")
    assert hit(page) is None
    watched.clean()


def test_the_policy_is_the_last_wall(window: Any, parrot_server: LiveServer) -> None:
    """What would get through the others still does not run: inline scripts, styles and foreign requests are refused."""
    watched = window(parrot_server.url)
    page = watched.open()
    page.evaluate(
        """() => { const tried = (act) => { try { act(); } catch { /* refused, which is the point */ } };
        tried(() => { document.body.innerHTML = '<img src=x onerror="window.hit=1">'; });
        tried(() => { trustedTypes.createPolicy('other', {}); });
        const put = (tag) => document.body.appendChild(document.createElement(tag));
        tried(() => { put('script').textContent = 'window.hit=1'; });
        tried(() => { put('img').src = 'https://evil.example/y'; });
        tried(() => { const b = put('b'); b.setAttribute('onclick', 'window.hit=1'); b.click(); });
        return fetch('https://evil.example/z').catch(() => null); }"""
    )
    page.wait_for_timeout(200)
    assert hit(page) is None
    assert watched.foreign == []
    assert len(watched.errors) >= 4


def test_a_copied_page_of_another_site_cannot_ask(parrot_server: LiveServer) -> None:
    import httpx

    for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
        reply = httpx.get(f"{parrot_server.url}/conversations", headers=headers)
        assert reply.status_code == 403
