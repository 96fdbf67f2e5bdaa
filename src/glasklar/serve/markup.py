"""Markdown to HTML that is safe to show: what a model or a person wrote never becomes script, request or style.

Three walls, each of which would do: raw HTML is not Markdown here, it is text; what the renderer makes passes nh3's
list of allowed elements and attributes; and the page, whose policy forbids foreign scripts, images and requests, builds
its elements from a list of its own (`page/dom.js`).

Pictures become links: a picture is a request, and its address can carry away what the conversation holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from html import escape, unescape
from xml.etree.ElementTree import tostring

import nh3
from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

# The renderer takes time in the square of a hostile text: it gets pieces, and what cannot be cut into pieces of this
# many characters is shown as it is.
PIECE, MOST_PIECE = 2_000, 8_000
MOST_CODE = 10_000
# A formula's characters and braces within braces: the converter calls itself for each of them.
MOST_MATH, DEEPEST_MATH = 2_000, 30

# Languages whose highlighting is known to take time in proportion to the text.
LANGUAGES = {
    "bash", "c", "cpp", "css", "diff", "go", "html", "ini", "java", "javascript", "json", "js", "kotlin", "lua",
    "python", "py", "rust", "sh", "sql", "toml", "ts", "typescript", "xml", "yaml", "yml",
}  # fmt: skip

_MATH_TAGS = {
    "math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup", "munder",
    "mover", "munderover", "mtable", "mtr", "mtd", "mstyle", "mpadded", "mphantom", "menclose",
}  # fmt: skip
_TAGS = _MATH_TAGS | {
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "code", "pre", "blockquote", "ul", "ol",
    "li", "table", "thead", "tbody", "tr", "th", "td", "a", "span",
}  # fmt: skip
_ATTRIBUTES = {
    "a": {"href", "title"},
    "code": {"class"},
    "span": {"class"},
    "th": {"class"},
    "td": {"class"},
    "ol": {"start"},
    "math": {"display"},
    "mi": {"mathvariant"},
    "mo": {"stretchy", "fence", "form", "separator", "largeop", "movablelimits"},
    "mfrac": {"linethickness"},
    "mstyle": {"displaystyle", "scriptlevel"},
    "mspace": {"width"},
    "mover": {"accent"},
    "munder": {"accentunder"},
    "menclose": {"notation"},
    "mtable": {"columnalign"},
}
_SCHEMES = {"http", "https", "mailto"}
_FENCE = re.compile(r"(`{3,}(?!.*`)|~{3,})(.*)")
_ADDRESS = re.compile(r"(https?://|mailto:)[^\s]+", re.IGNORECASE)
_FORMATTER = HtmlFormatter(nowrap=True, classprefix="hl-")


def render(text: str) -> str:
    """HTML of a text in Markdown with formulas ($…$, $$…$$, \\(…\\), \\[…\\]) and highlighted code."""
    return "".join(_piece(piece) for piece in pieces(text))


@lru_cache(maxsize=256)  # while an answer grows, all of it but its end stays as it was
def _piece(text: str) -> str:
    fenced = _FENCE.match(text) is not None
    return clean(_MARKDOWN.render(text) if fenced or len(text) <= MOST_PIECE else f"<pre>{escape(text)}</pre>")


def pieces(text: str) -> Iterator[str]:
    """A text cut at blank lines and around blocks of code, never within them."""
    held: list[str] = []
    size = 0
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        opens = not fence and mark is not None
        if held and (opens or (size >= PIECE and not fence and not line.strip())):
            yield "".join(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
        if opens and mark is not None:
            fence = mark[1]
        elif fence and mark is not None and mark[1].startswith(fence) and not mark[2].strip():
            fence = ""
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def clean(html: str) -> str:
    """Only what a text may hold, whatever was there; links open apart and tell nobody where they were followed."""
    return nh3.clean(
        html,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes=_SCHEMES,
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
        strip_comments=True,
    )


def formula(source: str, block: bool) -> str:
    """MathML, or the source where it is too long, too deep or not understood."""
    shown = f"<code>{escape(source)}</code>"
    if len(source) > MOST_MATH or _depth(source) > DEEPEST_MATH:
        return shown
    try:
        made = convert_to_element(source, display="block" if block else "inline")
    except Exception:  # the converter has no one error for what it cannot read, and half-written formulas are usual
        return shown
    for element in made.iter():
        element.text = element.text and unescape(element.text)  # it writes signs as entities
    return tostring(made, encoding="unicode")


def _depth(source: str) -> int:
    deepest = depth = 0
    for sign in source:
        depth += (sign == "{") - (sign == "}")
        deepest = max(deepest, depth)
    return deepest


def code(source: str, language: str) -> str:
    """A block of code; `language` as the text names it."""
    name = language.strip().split(maxsplit=1)[0].lower() if language.strip() else ""
    if name not in LANGUAGES or len(source) > MOST_CODE:
        return f"<pre><code>{escape(source)}</code></pre>\n"
    coloured = highlight(source, get_lexer_by_name(name, stripnl=False), _FORMATTER)
    return f'<pre><code class="language-{name}">{coloured}</code></pre>\n'


# --- rules of ours -------------------------------------------------------------------------------------------------


def _inline_math(state: StateInline, silent: bool) -> bool:
    """$$…$$, \\(…\\), \\[…\\]; $…$ without blanks at its ends or a digit after it, so that prices stay prices."""
    source, at = state.src, state.pos
    opening = next((sign for sign in ("$$", "$", "\\(", "\\[") if source.startswith(sign, at)), None)
    if opening is None:
        return False
    closing = {"\\(": "\\)", "\\[": "\\]"}.get(opening, opening)
    begin = at + len(opening)
    end = source.find(closing, begin, min(state.posMax, begin + MOST_MATH))
    if end <= begin or "\n\n" in source[begin:end]:
        return False
    after = source[end + 1 : end + 2]
    if opening == "$" and (source[begin].isspace() or source[end - 1].isspace() or after.isdigit() or after == "$"):
        return False
    if not silent:
        token = state.push("math", "math", 0)
        token.content, token.block = source[begin:end], opening in ("$$", "\\[")
    state.pos = end + len(closing)
    return True


def _block_math(state: StateBlock, start: int, end_line: int, silent: bool) -> bool:
    """$$ … $$ and \\[ … \\] over lines of their own, whatever Markdown would make of these lines."""
    first = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]].rstrip()
    opening = first[:2]
    if opening not in ("$$", "\\[") or state.is_code_block(start):
        return False
    closing = "$$" if opening == "$$" else "\\]"
    lines = [first[2:]]
    line = start
    while not lines[-1].endswith(closing):
        line += 1
        if line >= end_line or line - start > 200:
            return False
        lines.append(state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]].rstrip())
    if silent:
        return True
    token = state.push("math", "math", 0)
    token.content, token.block = "\n".join(lines)[: -len(closing)].strip(), True
    token.map = [start, line + 1]
    state.line = line + 1
    return True


def _plain_star(state: StateInline, silent: bool) -> bool:
    """A single * between letters or digits is a times sign, not emphasis: 3*4*5."""
    at = state.pos
    if state.src[at] != "*" or at == 0 or at + 1 >= state.posMax:
        return False
    if not (state.src[at - 1].isalnum() and state.src[at + 1].isalnum()):
        return False
    if not silent:
        state.pending += "*"
    state.pos += 1
    return True


class _Renderer(RendererHTML):
    """The tokens that are not rendered as CommonMark has it."""

    def math(self, tokens: Sequence[Token], at: int, _: OptionsDict, __: EnvType) -> str:
        return formula(tokens[at].content, tokens[at].block)

    def fence(self, tokens: Sequence[Token], at: int, _: OptionsDict, __: EnvType) -> str:
        return code(tokens[at].content, tokens[at].info)

    def image(self, tokens: Sequence[Token], at: int, options: OptionsDict, env: EnvType) -> str:
        address = str(tokens[at].attrs.get("src", ""))
        name = self.renderInlineAsText(tokens[at].children or [], options, env) or address
        if not _ADDRESS.fullmatch(address):
            return escape(name)
        return f'<a href="{escape(address)}">{escape(name)}</a>'

    def td_open(self, tokens: Sequence[Token], at: int, _: OptionsDict, __: EnvType) -> str:
        """The alignment of a cell as a class: the page has no inline styles."""
        token = tokens[at]
        align = str(token.attrs.get("style", "")).removeprefix("text-align:")
        return f'<{token.tag} class="{align}">' if align in ("left", "center", "right") else f"<{token.tag}>"

    th_open = td_open


def _markdown() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": 20}, renderer_cls=_Renderer)
    made.enable(["table", "strikethrough"])
    made.validateLink = lambda address: _ADDRESS.fullmatch(address) is not None  # type: ignore[method-assign,assignment]
    made.inline.ruler.before("escape", "math", _inline_math)
    made.inline.ruler.before("emphasis", "plain_star", _plain_star)
    made.block.ruler.before("fence", "math", _block_math, {"alt": ["paragraph", "blockquote", "list"]})
    return made


_MARKDOWN = _markdown()
