"""The C++ pass under the sanitizers, a program for every kind of CPU. Oracles: the sanitizers; sums in double."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from glasklar.engine.cpu import library

FLAGS = {
    "avx512": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
    "vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx2": ["-march=x86-64-v3"],
    "plain": [],
}
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("build", [name for name in library.VARIANTS if library.load(name) is not None])
@pytest.mark.parametrize("checked", ["address,undefined", "thread"])
def test_no_access_out_of_bounds_no_undefined_behaviour_no_race(build: str, checked: str, tmp_path: Path) -> None:
    program = tmp_path / "sanitized"
    common = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wno-psabi", "-pthread"]
    checks = [f"-fsanitize={checked}", "-fno-sanitize-recover=all"]
    source = Path(__file__).with_name("sanitized.cpp")
    command = [str(COMPILER), *common, *checks, *FLAGS[build], str(source), "-o", str(program)]
    subprocess.run(command, check=True, timeout=900)
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    assert ran.stdout == "sound\n"
