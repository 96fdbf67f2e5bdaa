"""Where the recipe of seconds lies that many tests carry out."""

from __future__ import annotations

from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.toml")
