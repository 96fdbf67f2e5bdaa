"""What the server makes of Markdown: what it should, in bounded time, and nothing that could run or load."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import pytest

from glasklar.serve.markup import MOST_PIECE, clean, pieces, render

ALLOWED = re.compile(r"(https?://|mailto:)", re.IGNORECASE)


class Found(HTMLParser):
    """Tags and attributes of what was made, by a parser that is not the sanitiser's."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("**a** *b* ~~c~~", "<strong>a</strong> <em>b</em> <s>c</s>"),
        ("3*4*5 and 2*x*y", "<p>3*4*5 and 2*x*y</p>"),
        ("a\nb", "<p>a<br>\nb</p>"),
        ("|a|b|\n|-|-:|\n|1|2|", '<td class="right">2</td>'),
        ("$x^2$", '<math display="inline"><mrow><msup><mi>x</mi><mn>2</mn></msup></mrow></math>'),
        ("\\(\\alpha\\) and \\[\\frac{1}{2}\\]", "<mi>α</mi>"),
        ("$$\na = b\n= c\n$$", '<math display="block">'),
        ("it costs $5 and $6", "<p>it costs $5 and $6</p>"),
        ("$\\frac{1}{$", "<code>\\frac{1}{</code>"),
        ("```python\ndef f(): ...\n```", '<span class="hl-k">def</span>'),
        ("```klingon\nx < y\n```", "<pre><code>x &lt; y\n</code></pre>"),
        ("![a cat](https://a.b/c.png)", '<a href="https://a.b/c.png"'),
        ("[x](https://a.b)", 'rel="noopener noreferrer nofollow"'),
        ("a & b < c", "a &amp; b &lt; c"),
    ],
)
def test_what_is_made(text: str, wanted: str) -> None:
    assert wanted in render(text)


HOSTILE = [
    "<script>x</script>", "<img src=x onerror=y>", "<svg/onload=x>", "[a](javascript:x)", "[a](JAVASCRIPT:x)",
    "[a](data:text/html,x)", "[a](&#106;avascript:x)", "[a](//evil.example)", "[a](/conversations)",
    "![a](javascript:x)", "<javascript:x>", "[a]: javascript:x\n\n[a]",
    "`<b onclick=x>`", "```\"><script>x</script>\n```",
    "$\\text{<img src=x onerror=y>}$", "$\\href{javascript:x}{y}$", "$\\text{</math><script>x</script>}$",
    '[a](https://a.b "onclick=x")', "[a](https://a.b/\"onclick='x')", "<a href=javascript:x>a</a>",
    "<math><annotation-xml encoding='text/html'><img src=x onerror=y></annotation-xml></math>",
    "<style>*{background:url(//evil.example)}</style>", "<iframe srcdoc=x>", "<!-- --><form action=//evil.example>",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("raw", [False, True], ids=["markdown", "html"])
def test_nothing_that_runs_or_loads(text: str, raw: bool) -> None:
    """Also where the renderer would let HTML through: the sanitiser alone has to hold."""
    found = Found(clean(text) if raw else render(text))
    assert not found.tags & {
        "script",
        "img",
        "svg",
        "style",
        "iframe",
        "form",
        "object",
        "embed",
        "link",
        "meta",
        "base",
    }
    for name, value in found.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "style", "srcset", "action", "ping", "id")
        assert name != "href" or ALLOWED.match(value or "")


def test_pieces_are_the_text_and_never_cut_code() -> None:
    code = "```python\n" + "x = 1\n\n" * 600 + "```\n"
    text = ("word " * 90 + "\n\n") * 30 + code + "after\n\n" + "~~~\n```\n\nstill\n~~~\nend"
    made = list(pieces(text))
    assert "".join(made) == text
    assert code in made
    assert "~~~\n```\n\nstill\n~~~\n" in made
    assert render(text).count("<pre>") == 2


@pytest.mark.parametrize(
    "unit",
    ["![[", "[a](b ", "*_", "*a **b ", "<", "$a$ ", "`a", "[", "> ", "- ", "|a", "&", "\\(", "[a]: <b\n", "$\\frac{"],
)
def test_hostile_text_takes_no_more_time_than_it_is_long(unit: str) -> None:
    """As much as a piece may hold, many times over: seconds, where the renderer alone would take minutes."""
    piece = unit * (MOST_PIECE // len(unit) - 1)
    begin = time.process_time()
    render(f"{piece}\n\n" * 3)
    render(unit * 20_000)
    assert time.process_time() - begin < 5
