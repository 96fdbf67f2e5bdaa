"""What all configurations share: frozen sections, read from TOML or JSON, with errors that name the nearest known key.

A configuration class stands beside the code that it configures and derives from `Section`; `recipe.py` puts the
sections of a recipe together.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from glasklar.errors import RecipeError


class Section(BaseModel):
    """A frozen set of named values. Unknown keys are errors; numbers are finite; nothing is coerced from text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True, protected_namespaces=())

    @classmethod
    def read(cls, table: dict[str, Any], where: str) -> Self:
        """Validates a table that came from a file. `where` names the place for error messages ("spark.toml")."""
        try:
            # Lax only in what JSON and TOML cannot say: lists for tuples, whole numbers for floats.
            return cls.model_validate_json(json.dumps(table), strict=None)
        except ValidationError as error:
            raise RecipeError(explain(cls, error, where)) from None
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{where}: {error}") from None

    def canonical(self) -> str:
        """The one JSON text of this configuration: sorted keys, no blanks, defaults spelled out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some values changed."""
        return type(self).model_validate({**dict(self), **changes})


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file; raises RecipeError where it is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"no such recipe: {path}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None


def explain(cls: type[BaseModel], error: ValidationError, where: str) -> str:
    """One line a problem: place, what is wrong, the nearest known key."""
    lines = []
    found = error.errors()
    # Where an item of a list is wrong, that the list is too short without it says nothing.
    wrong = {item["loc"][:-1] for item in found if item["loc"]}
    for item in found:
        if item["type"] == "too_short" and item["loc"] in wrong:
            continue
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = sorted(_keys_at(cls, item["loc"][:-1]))
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known) or 'none'}"
            lines.append(f"{where}: unknown key {place!r}; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: {place!r} is missing; add it")
        elif item["type"] == "union_tag_invalid":
            tag, known = item["ctx"]["tag"], [word.strip("' ") for word in item["ctx"]["expected_tags"].split(",")]
            near = difflib.get_close_matches(tag, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "use another."
            lines.append(f"{where}: {place}.kind = {tag!r}: {hint} There are: {', '.join(known)}")
        else:
            # What does not fit together in a section names its values itself; the section has no room in a line.
            value = "" if isinstance(item["input"], dict) else f" = {json.dumps(item['input'], default=str)[:80]}"
            said = f"{place}{value}: " if place or value else ""
            lines.append(f"{where}: {said}{item['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def _keys_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> set[str]:
    """Names of the fields at a place of a nested configuration; discriminated unions add their tag to the place."""
    models: list[type[BaseModel]] = [cls]
    for part in loc:
        if isinstance(part, int):
            continue
        inner = [m for model in models if part in model.model_fields for m in _models_in(model.model_fields[part])]
        tagged = [m for m in models if any(part == getattr(f, "default", None) for f in m.model_fields.values())]
        models = inner or tagged or models
    return {name for model in models for name in model.model_fields}


def _models_in(field: Any) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        for argument in getattr(annotation, "__args__", ()):
            visit(argument)

    visit(field.annotation)
    return found
