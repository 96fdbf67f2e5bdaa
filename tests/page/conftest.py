"""A real browser before a real server. These tests run when they are asked for (`make test-page`); elsewhere they say
that they did not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glasklar.serve.live import LiveServer
from glasklar.serve.server import Site

CHROMIUM = Path("/usr/bin/chromium")
HERE = Path(__file__).parent
SHOTS = Path(os.environ.get("GLASKLAR_SHOTS", HERE.parents[1] / "build" / "page"))
WHY = "the page in a real browser is tested by `make test-page`, which needs Debian's chromium"

_left_out = 0


def asked(config: pytest.Config) -> bool:
    return "browser" in config.getoption("-m")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    global _left_out
    for item in items:
        if item.get_closest_marker("browser") and not asked(config):
            item.add_marker(pytest.mark.skip(reason=WHY))
            _left_out += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _left_out:
        terminalreporter.write_line(f"{_left_out} tests of the page were left out: {WHY}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if not CHROMIUM.is_file():
        pytest.fail(f"{CHROMIUM} is not there: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield launched
        launched.close()


class Window:
    """A page of its own browser context, in which everything that must not happen is written down."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url = url
        self.foreign: list[str] = []
        self.dialogs: list[str] = []
        self.errors: list[str] = []
        self.context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1180, "height": 800}, **options})
        self.context.route("**/*", self._route)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)

    def _route(self, route: Any) -> None:
        address = route.request.url
        if address.startswith((f"{self.url}/", "data:image/")):
            route.continue_()
        else:
            self.foreign.append(address)
            route.abort()

    def _console(self, message: Any) -> None:
        # A refusal by the policy means that something was tried; a refused request is what a test may have asked for.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def open(self, place: str = "#/") -> Any:
        self.page.goto(f"{self.url}/{place}")
        self.page.wait_for_selector("main:not([hidden])")
        return self.page

    def ask(self, text: str) -> None:
        """Asks and waits for the end of the answer."""
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")
        self.settled()

    def until(self, expression: str) -> None:
        """Waits for a JavaScript expression to hold. (Playwright's own way evaluates a string in the page, which the
        page's policy forbids.)"""
        deadline = time.monotonic() + 30
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"not within 30 s: {expression}"
            self.page.wait_for_timeout(40)

    def settled(self) -> None:
        self.page.wait_for_selector(".turn.last.answered:not(.running)")
        self.page.wait_for_selector("#send:not([hidden])")

    def shot(self, name: str) -> None:
        """An artefact of the run."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(SHOTS / f"{name}.png"))

    def clean(self) -> None:
        """Nothing that must not happen has happened."""
        assert (self.foreign, self.dialogs, self.errors) == ([], [], [])


@pytest.fixture
def window(browser: Any) -> Iterator[Callable[..., Window]]:
    opened: list[Window] = []

    def make(url: str, **options: Any) -> Window:
        opened.append(Window(browser, url, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.context.close()


@pytest.fixture(scope="session")
def parrot_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    from parrot import Parrot

    folder = tmp_path_factory.mktemp("parrot")
    with LiveServer(folder, Site(home=folder, port=0)) as live:
        live._backend.service = Parrot(folder)  # type: ignore[assignment]
        yield live
