"""The C++ libraries; everything else is in pyproject.toml.

Each library has one source and several builds, of which the fastest that the CPU can run is loaded. All are optional: a
machine without a compiler trains and serves with plain PyTorch. They are compiled side by side and kept under
build/native by the hash of all that goes into them, so that installing again (other extras, another checkout) costs
seconds, and a changed source is never missed.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
KEPT = ROOT / "build" / "native"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Python's own flags let whole numbers wrap around, which keeps compilers from simplifying addresses: a tenth of the
# speed at which prompts are read.
COMMON = ["-std=c++17", "-fvisibility=hidden", "-fno-wrapv"]

# Training. OpenMP is not linked: the kernels use the runtime that torch loads, so that there is one pool of threads.
TRAINING = [*COMMON, "-O3", "-fopenmp"]
TRAINING_BUILDS = {
    "_avx512": ["-march=x86-64-v4", "-mavx512bf16"],
    "_avx512_fp32": ["-march=x86-64-v4"],
    "_avx2": ["-march=x86-64-v3"],
    "_plain": [],
}
# The engine's pass. No fused or reordered arithmetic but what is written: its numbers are the same in all builds.
# Vectors wider than the CPU's become many instructions, which -O3 unrolls further: minutes of compiling for nothing.
ENGINE = [*COMMON, "-ffp-contract=off", "-Wno-psabi", "-pthread"]
ENGINE_BUILDS = {
    "_avx512": ["-O3", "-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
    "_vnni": ["-O3", "-march=x86-64-v4", "-mavx512vnni"],
    "_avx2": ["-O3", "-march=x86-64-v3"],
    "_plain": ["-O2"],
}


def library(package: str, source: str, name: str, flags: list[str], link: list[str]) -> Extension:
    folder = f"src/glasklar/{package.replace('.', '/')}"
    return Extension(
        f"glasklar.{package}.{name}",
        [f"{folder}/{source}"],
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.hpp")),
        extra_compile_args=flags,
        extra_link_args=link,
        optional=True,
    )


class Build(build_ext):
    """Side by side, the longest first, and nothing twice."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or CORES

    def build_extension(self, ext: Extension) -> None:
        """Raises what the standard build raises, which leaves an optional library out; an older one never stays."""
        kept, target = KEPT / self.fingerprint(ext), Path(self.get_ext_fullpath(ext.name))
        if self.inplace or self.editable_mode:
            (ROOT / "src" / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        if not kept.exists():
            self.apart(ext).build_extension(ext)
            kept.parent.mkdir(parents=True, exist_ok=True)
            unfinished = kept.with_suffix(f".{os.getpid()}")
            shutil.copyfile(target, unfinished)
            unfinished.replace(kept)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, target)

    def apart(self, ext: Extension) -> build_ext:
        """The standard build with a folder of objects for this library alone: builds of one source, side by side, would
        write over each other's object files."""
        alone = build_ext(self.distribution)
        alone.__dict__.update(self.__dict__, build_temp=os.path.join(self.build_temp, ext.name))
        return alone

    def fingerprint(self, ext: Extension) -> str:
        """Compiler, flags, and every byte of source."""
        compiler = self.compiler.compiler_so
        try:
            version = subprocess.run([compiler[0], "-v"], capture_output=True, text=True, check=False).stderr
        except OSError:  # no compiler: building will say so
            version = ""
        parts = [version, *compiler, *ext.extra_compile_args, *ext.extra_link_args]
        digest = hashlib.sha256("\0".join(parts).encode())
        for name in (*ext.sources, *ext.depends):
            digest.update(b"\0" + (ROOT / name).read_bytes())
        return f"{ext.name}-{digest.hexdigest()[:32]}"


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        *(library("engine.cpu", "network.cpp", n, [*ENGINE, *f], ["-pthread"]) for n, f in ENGINE_BUILDS.items()),
        *(library("ops.cpu", "kernels.cpp", n, [*TRAINING, *f], []) for n, f in TRAINING_BUILDS.items()),
    ],
)
