"""Speed of the engine on this CPU beside llama.cpp, on the same random weights at equal bits.

    python bench/inference.py                                 # every row, whole networks: an hour, 40 GB of disk
    python bench/inference.py --layers 9                      # of the large shapes only that many layers
    python bench/inference.py --shape v2-lite --figure decode --json

llama.cpp comes from the package llama-cpp-python (compiled by pip, once); --peer DIR names a folder that it was
installed into. Both sides have all threads and take turns within each round, so that a busy machine slows both;
figures are medians, ratios medians of ratios within a round; of starts and memory, the best one of four processes.
llama.cpp runs with or without its fused attention, whichever is faster, and rearranges 4 bits while it loads, which is
its default. All layers of a kind hold the same random values, each a copy of its own: the traffic of a real model. A
file has the bits that we use: 4 (Q4_0) or 8 (Q8_0) with a scale for 32 values, 8 in the head and the absorbed
projections. --keep DIR keeps both sides' files for the next time.

Beside decoding and batches stands the share of the read bandwidth, measured in the same minute: bytes that a pass reads
(weights, of experts as many as are met at random, and the cache) over what the memory gives to the better one of a
plain sum and of reading eight streams (shared/read.c).
Beside prefill: its rate of products over that of a large one in torch, of bf16, fp32 or int8, whichever is fastest.
A long context of llama.cpp is a short one again and again (shared/peer_state.py).
Start and memory are those of a process of its own (shared/probe.py), with the files in the system's page cache.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# In place of this folder, in which a file called gguf hides the package of that name.
sys.path[0] = str(Path(__file__).parent / "shared")

from glasklar import runtime  # noqa: E402

THREADS = runtime.prepare()

import torch  # noqa: E402
from random_model import Files  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from sides import Figure, Ours, Peer, PeerWeights, open_llama  # noqa: E402

from glasklar.engine.cpu.library import VARIANTS, load  # noqa: E402


def decode(context: int, floor: float, goal: float) -> Figure:
    return Figure(f"decode, context {context}", 1, context, 1, floor, goal)


def batch(rows: int, floor: float, goal: float) -> Figure:
    return Figure(f"batch {rows}", rows, 0, 1, floor, goal)


def prefill(tokens: int, floor: float, goal: float) -> Figure:
    return Figure(f"prefill {tokens}", 1, 0, tokens, floor, goal)


CASES: dict[tuple[str, str], list[Figure]] = {
    ("v2-lite", "int4"): [
        *(decode(0, 1.5, 2), decode(1024, 1.7, 2.3), decode(4096, 2.2, 3.5), decode(16384, 3, 5)),
        *(batch(4, 2.5, 3.5), batch(8, 3, 4.5), batch(16, 2.5, 4), prefill(512, 3, 5), prefill(4096, 3, 6)),
    ],
    ("v2-lite", "int8"): [decode(0, 1.3, 1.8), prefill(512, 3, 5)],
    ("r1-distill-qwen-1.5b", "int4"): [decode(0, 1.1, 1.5), prefill(512, 1.5, 2.5), batch(8, 1.5, 2.5)],
    ("spark", "bfloat16"): [batch(1, 1, 2), batch(32, 2, 5)],
}

START, PROCESS, MEMORY = "start to first token", "whole process to first token", "peak memory"
ALONE, BUSY = "decode, context 0", "decode beside a busy process"


@dataclass
class Row:
    """A line of the table.

    ours, peer   tokens a second, seconds or GB, as `unit` says
    ratio        how many times better we are (peak memory: than weights and 1 GB)
    limit        our share of what the machine gives, or beside a busy process of our own speed without it
    """

    shape: str
    bits: str
    figure: str
    ours: float
    peer: float
    ratio: float
    floor: float
    goal: float
    limit: float | None = None
    unit: str = "tok/s"
    transformers: float | None = None


# Seconds before a turn: threads of the other side stay awake for a while after their work, and would take a core.
REST = 0.1

# --- measuring --------------------------------------------------------------------------------------------------------


def read_bandwidth() -> float:
    """Bytes a second that all threads read of 1 GB, the better one of two ways."""
    data = torch.ones(1 << 28)
    parts = data.chunk(THREADS)

    def streams() -> None:
        readers = [
            threading.Thread(target=reader().read_streams, args=(part.data_ptr(), part.nbytes // 8)) for part in parts
        ]
        for thread in readers:
            thread.start()
        for thread in readers:
            thread.join()

    return data.nbytes / min(_timed(way) for way in (data.sum, streams) for _ in range(4))


@functools.cache
def reader() -> ctypes.CDLL:
    """shared/read.c, compiled for this CPU."""
    with tempfile.TemporaryDirectory() as folder:
        library, source = Path(folder) / "read.so", Path(__file__).parent / "shared" / "read.c"
        subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True)
        found = ctypes.CDLL(str(library))
    found.read_streams.restype, found.read_streams.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_long]
    return found


def product_rate() -> float:
    """Operations a second of a large product, in whichever of three types torch's libraries are fastest (on some CPUs
    others take a hundred times as long: those that a small product shows are left out)."""

    def ways(rows: int) -> list[Callable[[], object]]:
        left, right = torch.ones(rows, 2048), torch.ones(2048, 4096)
        types = (torch.bfloat16, torch.float32)
        products = [functools.partial(torch.matmul, left.to(kind), right.to(kind)) for kind in types]
        return [*products, functools.partial(torch._int_mm, left.to(torch.int8), right.to(torch.int8))]

    small = [min(_timed(way) for _ in range(2)) for way in ways(32)]
    hopeful = [way for way, seconds in zip(ways(1024), small, strict=True) if seconds < 4 * min(small)]
    return 2 * 1024 * 2048 * 4096 / min(_timed(way) for way in hopeful for _ in range(4))


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(
    ours: Ours, peers: Mapping[str, Peer], figure: Figure, rounds: int
) -> tuple[tuple[float, float, float, float], str]:
    """Median tokens a second of both sides, of their ratio, and our share of the machine's limit; and which of the
    peer's variants it was: the best one in two or three turns. The sides take turns in beginning a round."""
    rounds = rounds if figure.tokens == 1 else max(2, rounds // 4)

    def timed(side: Ours | Peer, turn: int) -> float:
        time.sleep(REST)
        if figure.tokens == 1:
            side.run(figure, turn)  # wakes its threads, as the token before would
        return side.run(figure, turn)

    turns = range(3 if figure.tokens == 1 else 2)
    tried = [{name: timed(peer, turn) for name, peer in peers.items()} for turn in turns]
    best = min(peers, key=lambda name: min(turn[name] for turn in tried))
    sides = [ours, peers[best]]
    timed(ours, 0)
    pairs, shares = [], []
    for turn in range(2, rounds + 2):
        taken = [timed(side, turn) for side in (sides if turn % 2 else reversed(sides))]
        mine, theirs = taken if turn % 2 else reversed(taken)
        pairs.append((mine, theirs))
        if turn % 4 == 2:
            if figure.tokens == 1:
                shares.append(ours.bytes_of(figure.rows, figure.context) / mine / read_bandwidth())
            else:
                shares.append(figure.total * ours.products_per_token / mine / product_rate())
    median = statistics.median
    speeds = (figure.total / median(m for m, _ in pairs), figure.total / median(t for _, t in pairs))
    return (*speeds, median(t / m for m, t in pairs), median(shares)), best


def busy_row(ours: Ours, peer: Peer, alone: Row, figure: Figure, rounds: int) -> Row:
    """Decoding with another process that never sleeps: three threads want two cores, so two thirds are our share."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        (mine, theirs, ratio, _), _ = measure(ours, {"": peer}, figure, 2 * rounds)
    finally:
        other.kill()
        other.wait()
    return Row(alone.shape, alone.bits, BUSY, mine, theirs, ratio, 1, 1, mine / alone.ours)


def start_rows(shape: str, bits: str, layers: int | None, files: Files, peer: Path | None) -> Iterator[Row]:
    """Processes that load a model: seconds to the first token after the imports and in all, and the peak memory after a
    prompt of 512 tokens."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for side in 2 * [*found]:
        command = [sys.executable, files.probe, side, "--shape", shape, "--bits", bits, "--folder", files.folder]
        command += ["--layers", str(layers)] if layers else []
        command += ["--peer", peer] if peer else []
        for _ in range(2):  # after the other side's process the system may have put aside what this one reads
            begin = time.time()
            made = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
            if made.returncode:
                sys.exit(made.stderr)
            found_here = json.loads(made.stdout)
            found[side].append(found_here | {"process": found_here["clock"] - begin})
    best = {side: {key: min(r[key] for r in results) for key in results[0]} for side, results in found.items()}
    for key, name, unit in (("start", START, "s"), ("process", PROCESS, "s")):
        mine, theirs = best["ours"][key], best["peer"][key]
        yield Row(shape, bits, name, mine, theirs, theirs / mine, 5, 20, unit=unit)
    weights = best["ours"]["weights"]
    mine, theirs = best["ours"]["peak"], best["peer"]["peak"]
    yield Row(shape, bits, f"{MEMORY} (weights {weights:.2f} GB)", mine, theirs, (weights + 1) / mine, 1, 1, unit="GB")


def transformers_speeds(shape: str, layers: int | None) -> dict[str, float]:
    """Tokens a second of transformers in bf16, by figure."""
    command = [sys.executable, str(Files(Path(), shape, "bfloat16", layers).probe), "transformers", "--shape", shape]
    made = subprocess.run(
        command + (["--layers", str(layers)] if layers else []), capture_output=True, text=True, check=False
    )
    if made.returncode:
        sys.exit(made.stderr)
    return json.loads(made.stdout)


def rows_of(
    llama: Any, shape: str, bits: str, wanted: Callable[[str], bool], arguments: argparse.Namespace, folder: Path
) -> Iterator[Row]:
    layers, rounds = arguments.layers, arguments.rounds
    files = Files(folder, shape, bits, layers)
    files.make(THREADS)
    if shape != "spark" and any(wanted(name) for name in (START, PROCESS, MEMORY)):
        yield from (row for row in start_rows(shape, bits, layers, files, arguments.peer) if wanted(row.figure))
    figures = [
        figure for figure in CASES[shape, bits] if wanted(figure.name) or (figure.name == ALONE and wanted(BUSY))
    ]
    if not figures:
        return
    scale = transformers_speeds(shape, layers) if arguments.transformers else {}
    tokens = max(f.rows * (f.context + f.tokens + 2 * rounds + 80) for f in figures)
    tokens = -(-tokens // 256) * 256
    weights, ours = PeerWeights(llama, files, mapped=False), Ours(files, tokens, THREADS, arguments.cache)
    ours.fill()
    ours.lock()
    for rows in sorted({f.rows for f in figures}):
        # llama.cpp has small values in its cache only with its fused attention.
        ways = (1,) if arguments.cache == "int8" else (0, 1)
        peers = {f"flash {flash}": Peer(weights, tokens, rows, flash, THREADS, arguments.cache) for flash in ways}
        for figure in (f for f in figures if f.rows == rows):
            (mine, theirs, ratio, share), best = measure(ours, peers, figure, rounds)
            limit = share if shape != "spark" else None
            kept = bits if arguments.cache == "int16" else f"{bits}, cache {arguments.cache}"
            row = Row(shape, kept, figure.name, mine, theirs, ratio, figure.floor, figure.goal, limit)
            row.transformers = scale.get(figure.name)
            yield row
            if figure.name == ALONE and wanted(BUSY):
                yield busy_row(ours, peers[best], row, figure, rounds)
        for peer in peers.values():
            peer.close()
    weights.close()


def machine(described: dict[str, Any]) -> dict[str, Any]:
    """What the figures were measured on, and with."""
    build = next((name for name in VARIANTS if load(name) is not None), "none")
    versions = {name: version(name) for name in ("glasklar", "torch")}
    return {name: described[name] for name in ("cpu", "threads", "system")} | versions | {
        "build": build, "llama-cpp-python": sys.modules["llama_cpp"].__version__,
    }  # fmt: skip


def show(rows: list[Row]) -> None:
    table = Table("shape", "bits", "figure", "ours", "llama.cpp", "ratio", "asked", "goal", "share", "transformers")
    for r in rows:
        colour = "green" if r.ratio >= r.goal else "yellow" if r.ratio >= r.floor else "red"
        numbers = (
            f"{r.ours:.4g} {r.unit}",
            f"{r.peer:.4g}",
            f"[{colour}]{r.ratio:.2f}x",
            f"{r.floor:g}x",
            f"{r.goal:g}x",
        )
        share, scale = ("" if v is None else t.format(v) for v, t in ((r.limit, "{:.0%}"), (r.transformers, "{:.3g}")))
        table.add_row(r.shape, r.bits, r.figure, *numbers, share, scale)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="rows whose shape contains this")
    parser.add_argument("--bits", choices=["int4", "int8", "bfloat16"])
    parser.add_argument("--figure", help="rows whose figure contains this, or one of these: a,b")
    parser.add_argument("--layers", type=int, help="take only so many layers of large shapes")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--peer", type=Path, help="folder that llama-cpp-python was installed into")
    parser.add_argument("--keep", type=Path, help="folder for the models' files, which stay there")
    parser.add_argument("--cache", choices=["int16", "int8"], default="int16", help="the peer's: fp16, or Q8_0")
    parser.add_argument("--transformers", action="store_true", help="with the speed of transformers, for scale")
    parser.add_argument("--json", action="store_true", help="an object a row, with the machine it was measured on")
    arguments = parser.parse_args()

    def wanted(name: str) -> bool:
        return any(part in name for part in (arguments.figure or "").split(","))

    llama = open_llama(arguments.peer)
    described = runtime.start(THREADS).describe()
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    here, rows = machine(described), []
    with tempfile.TemporaryDirectory(prefix="glasklar-bench-") as temporary:
        for shape, bits in CASES:
            if (arguments.shape or "") not in shape or arguments.bits not in (None, bits):
                continue
            folder = arguments.keep or Path(temporary)
            for row in rows_of(llama, shape, bits, wanted, arguments, folder):
                rows.append(row)
                print(
                    json.dumps(asdict(row) | {"layers": arguments.layers, "machine": here}) if arguments.json else row,
                    file=sys.stdout if arguments.json else sys.stderr,
                )
                sys.stdout.flush()
    if not arguments.json:
        show(rows)


if __name__ == "__main__":
    main()
