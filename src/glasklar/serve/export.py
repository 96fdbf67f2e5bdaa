"""A branch of a conversation as a Markdown file for people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from glasklar.serve.conversations import Entry


def as_markdown(head: dict[str, Any], branch: Sequence[Entry]) -> str:
    """Title, then questions and answers in order; thoughts stand quoted before their answers."""
    made = datetime.fromtimestamp(head["created"], UTC).isoformat(timespec="minutes")
    parts = [f"# {head['title']}", f"*{made}*", *(part for entry in branch for part in _parts(entry))]
    return "\n\n".join(parts) + "\n"


def _parts(entry: Entry) -> list[str]:
    who = "User" if entry.role == "user" else str(entry.settings.get("model", "Assistant"))
    parts = [f"## {who}"]
    for file in entry.files:
        fence = "`" * (3 + max((len(line) - len(line.lstrip("`")) for line in file["text"].splitlines()), default=0))
        parts.append(f"{file['name']}:\n{fence}\n{file['text']}\n{fence}")
    if entry.reasoning:
        parts.append("\n".join(f"> {line}".rstrip() for line in entry.reasoning.splitlines()))
    parts.append(entry.content)
    if entry.state != "done":
        parts.append(f"*({entry.state}{': ' + entry.error if entry.error else ''})*")
    return [part for part in parts if part]
