"""A conversation in the terminal: the thought in grey while it is thought, then the answer."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console

from glasklar.api import speaking
from glasklar.data.chat import Channel, Message, Splitter, render
from glasklar.engine.engine import Engine
from glasklar.engine.request import SamplingParams
from glasklar.errors import GlasklarError, RequestError
from glasklar.loading import Model

HELP = """\
/think on|off|auto   whether the model thinks before it answers; auto: it decides
/temperature X       0 answers with the most probable tokens, 1 draws as the model would
/new                 forget the conversation
/quit                leave (Ctrl-D does too); Ctrl-C stops an answer"""
MODES = {"on": True, "off": False, "auto": None}


class Conversation:
    """What was said so far, and the settings."""

    def __init__(self, model: Model) -> None:
        self.model, self.tokenizer = model, speaking(model)
        self.engine = Engine(model.network)
        self.thinking: bool | None = None
        self.temperature = 0.0
        self.messages: list[Message] = []
        self.turns, self.cut = 0, False

    def ask(self, question: str) -> Iterator[tuple[Channel, str]]:
        """The answer to a question as it is made. An answer left early is forgotten together with its question; `cut`
        says whether the context ended it."""
        said = [] if self.model.single_turn else self.messages
        messages = [*said, Message(role="user", content=question)]
        prompt = render(self.tokenizer, messages, self.thinking)
        if len(prompt) >= (context := self.model.config.max_position_embeddings):
            raise RequestError(
                f"what was said so far is {len(prompt)} tokens, the model's context {context}; /new begins a new "
                "conversation"
            )
        params = SamplingParams(
            max_tokens=self.model.config.max_position_embeddings,
            temperature=self.temperature,
            seed=self.turns,
            stop_ids=self.tokenizer.stop_ids,
        )
        splitter, content = Splitter(self.tokenizer, self.thinking), ""
        request = self.engine.add(prompt, params)
        try:
            while self.engine.has_work:
                for event in self.engine.step():
                    if event.error is not None:
                        raise event.error
                    self.cut = event.finish == "length"
                    for channel, text in splitter.push(event.token):
                        content += text if channel == "content" else ""
                        yield channel, text
        finally:
            self.engine.cancel(request)
        yield from splitter.flush()
        self.messages = [*messages, Message(role="assistant", content=content)]
        self.turns += 1

    def command(self, line: str) -> str:
        """Carries out a line that begins with "/" and returns what to say."""
        name, _, value = line[1:].partition(" ")
        if name == "think" and value in MODES:
            self.thinking = MODES[value]
            return f"thinking: {value}"
        if name == "temperature":
            try:
                self.temperature = SamplingParams(temperature=float(value)).temperature
            except ValueError:
                return f"temperature {value!r}: a number, please"
            return f"temperature: {self.temperature:g}"
        if name == "new":
            self.messages = []
            return "forgotten"
        return HELP


def converse(model: Model) -> None:
    """Reads questions until the end of input."""
    console = Console(highlight=False)
    conversation = Conversation(model)
    console.print(f"[bold]{model.name}[/] · /help for settings, Ctrl-D to leave")
    while True:
        try:
            line = console.input("[bold cyan]›[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                console.print(conversation.command(line))
            elif line:
                answer(console, conversation, line)
        except GlasklarError as error:
            console.print(f"[bold red]error[/] {error}")


def answer(console: Console, conversation: Conversation, question: str) -> None:
    """Prints the answer while it is made; Ctrl-C stops it."""
    began, last = time.monotonic(), None
    try:
        for channel, text in conversation.ask(question):
            if last == "reasoning" and channel == "content":
                console.print(f"\n[dim]— thought for {time.monotonic() - began:.1f} s[/]")
            last = channel
            console.print(text, end="", style="dim" if channel == "reasoning" else None, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [dim]stopped[/]", end="")
    else:
        if conversation.cut:
            console.print(" [dim]cut off: the model's context is full; /new begins a new conversation[/]", end="")
    console.print()
