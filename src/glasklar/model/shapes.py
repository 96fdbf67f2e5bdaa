"""What comes with the package by name: the shapes of published models, and devices to plan for."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from glasklar.config import read_toml
from glasklar.errors import RecipeError
from glasklar.model.config import ModelConfig
from glasklar.model.plan import Hardware


class Shape(NamedTuple):
    """A published network: its configuration and where the figures come from."""

    config: ModelConfig
    source: str


def shape_names() -> list[str]:
    return sorted(file.stem for file in (_recipes() / "shapes").glob("*.toml"))


def load_shape(name: str) -> Shape:
    """The shape of a published model. Raises RecipeError for an unknown name, with the nearest known one."""
    _check_known("shape", name, shape_names())
    path = _recipes() / "shapes" / f"{name}.toml"
    table = read_toml(path)
    source = table.pop("source")
    return Shape(ModelConfig.read(table, path.name), source)


def hardware_names() -> list[str]:
    return sorted(read_toml(_recipes() / "hardware.toml"))


def load_hardware(name: str) -> Hardware:
    """A device of recipes/hardware.toml. Raises RecipeError for an unknown name, with the nearest known one."""
    tables = read_toml(_recipes() / "hardware.toml")
    _check_known("hardware", name, sorted(tables))
    return Hardware.read({"name": name, **tables[name]}, f"hardware.toml: {name}")


def _recipes() -> Path:
    return Path(str(resources.files("glasklar") / "recipes"))


def _check_known(kind: str, name: str, known: list[str]) -> None:
    if name in known:
        return
    near = [k for k in known if name in k] if name else []
    near = near or difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise RecipeError(f"no {kind} {name!r}; {hint}there are {', '.join(known)}")
