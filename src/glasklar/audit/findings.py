"""What a check came to: findings in plain words, each a verdict on one thing."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from glasklar.errors import GlasklarError

Verdict = Literal["holds", "fails", "unchecked"]
EXIT = {"holds": 0, "fails": 1}
MARKS = {"holds": "holds     ", "fails": "FAILS     ", "unchecked": "unchecked "}
SUMMARY = {"holds": "HOLDS: nothing contradicts the record", "fails": "DOES NOT HOLD"}


def plural(count: int, noun: str) -> str:
    """1 claim, 2 claims."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


@dataclass(frozen=True)
class Finding:
    """subject: the file or claim in question; text: what was found, in a sentence."""

    verdict: Verdict
    subject: str
    text: str


@dataclass
class Findings:
    """All findings about one target. It holds if nothing fails; what could not be checked is said beside it."""

    target: str
    kind: Literal["run", "model", "receipt", "replay"]
    entries: list[Finding] = field(default_factory=list)

    def holds(self, subject: str, text: str) -> None:
        self.entries.append(Finding("holds", subject, text))

    def fails(self, subject: str, text: str) -> None:
        self.entries.append(Finding("fails", subject, text))

    def unchecked(self, subject: str, text: str) -> None:
        self.entries.append(Finding("unchecked", subject, text))

    def expect(self, true: bool, subject: str, good: str, bad: str) -> bool:
        """Records one of two sentences; returns `true`."""
        (self.holds if true else self.fails)(subject, good if true else bad)
        return true

    def guard(self, subject: str, check: Callable[[], None]) -> None:
        """Runs a check; what it cannot read is a finding, not the end of all checks."""
        try:
            check()
        except Exception as error:  # what hostile content makes a reader do cannot be listed
            what = str(error) if isinstance(error, GlasklarError) else f"{type(error).__name__}: {error}"
            self.fails(subject, f"cannot be read as what it should be ({what})")

    @property
    def verdict(self) -> Verdict:
        return "fails" if any(entry.verdict == "fails" for entry in self.entries) else "holds"

    @property
    def failures(self) -> list[Finding]:
        return [entry for entry in self.entries if entry.verdict == "fails"]

    @property
    def exit_code(self) -> int:
        """For scripts: 0 holds, 1 does not hold. (2, cannot be read at all, comes as an error.)"""
        return EXIT[self.verdict]

    def __str__(self) -> str:
        """For people: one line a finding, the verdict last, with what it leaves open."""
        lines = [f"{MARKS[entry.verdict]} {visible(f'{entry.subject}: {entry.text}')}" for entry in self.entries]
        bad, open_ = len(self.failures), sum(entry.verdict == "unchecked" for entry in self.entries)
        summary = SUMMARY[self.verdict] + (f" ({plural(bad, 'finding')})" if bad else "")
        summary += f"; {plural(open_, 'claim')} could not be checked"
        return "\n".join([*lines, "", f"{visible(self.target)}: {summary}"])

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "kind": self.kind,
            "verdict": self.verdict,
            "findings": [asdict(entry) for entry in self.entries],
        }


def visible(text: str) -> str:
    """A text in which nothing can move the cursor, colour, hide or reverse what stands around it: names and messages in
    a record are its maker's."""
    return "".join(c if unicodedata.category(c)[0] not in "CZ" or c == " " else f"\\u{ord(c):04x}" for c in text)
