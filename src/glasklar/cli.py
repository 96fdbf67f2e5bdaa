"""The verbs. People read the terminal, programs JSON on stdout, logs go to stderr; exit code 2: the caller, 1: us."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import webbrowser
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from glasklar.errors import GlasklarError, RecordError, RequestError
from glasklar.runtime import Runtime, prepare, start
from glasklar.serve.limits import Limits

app = typer.Typer(
    name="glasklar",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)

Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all cores, or $GLASKLAR_THREADS")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout")]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run, a Hugging Face folder, a pulled hub id, or the name of a run")
]
DType = Annotated[str | None, typer.Option(help="Of the weights in memory: float32 or bfloat16 (default)")]
Quantize = Annotated[str | None, typer.Option(help="int8 or int4, while loading: less memory, faster answers")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port on the loopback address; 0 takes a free one")]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"glasklar {version('glasklar')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which one this is")
    ] = False,
) -> None:
    """An open, frugal and checkable language-model system: train, run and check on the machine you have."""


@app.command()
def up(
    port: Port = 8421,
    recipe: Annotated[str, typer.Option(help="What to make, if it is not there yet")] = "spark",
    threads: Threads = None,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser")] = True,
) -> None:
    """Make `spark` if it is not there yet, with its live page open, then serve it."""
    from glasklar.loading import open_folder
    from glasklar.recipe import load_recipe
    from glasklar.serve.live import LiveServer
    from glasklar.serve.server import Site

    runtime = _runtime(threads)
    loaded = load_recipe(recipe)
    folder = _home() / "runs" / loaded.name
    with LiveServer(folder, Site(home=_home(), port=port), tracing=_tracing(folder, runtime)) as server:
        out.print(f"[bold]glasklar[/] · {server.url}")
        if open_page and sys.stdout.isatty():
            webbrowser.open(server.url)
        if not (folder / "model" / "config.json").is_file():
            _train(recipe, folder, runtime)
        server.release(open_folder(folder / "model", runtime))
        out.print(f"[bold green]ready[/] · {server.url} · API: {server.url}/v1 · Ctrl-C stops")
        if not shutil.which("glasklar"):
            out.print(f"[dim]more: {Path(sys.argv[0]).absolute().parent / 'glasklar'} --help[/]", soft_wrap=True)
        server.wait()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe by name, or a TOML file by path")],
    run: Annotated[
        Path | None, typer.Option(help="Run folder; default: in $GLASKLAR_HOME, by the recipe's name")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="In place of the recipe's seed")] = None,
    threads: Threads = None,
) -> None:
    """Carry a recipe out, or go on with a run that was stopped."""
    _train(recipe, run, _runtime(threads), seed)


def _train(name: str, run: Path | None, runtime: Runtime, seed: int | None = None) -> None:
    from glasklar.api import train as carry_out
    from glasklar.display import TerminalReporter, stoppable
    from glasklar.pipeline import Stop

    stop = Stop()
    try:
        with stoppable(stop), TerminalReporter(err) as reporter:
            folder = carry_out(name, run=run, runtime=runtime, seed=seed, reporter=reporter, home=_home(), stop=stop)
    except KeyboardInterrupt:
        again = (
            f"glasklar train {name}"
            + (f" --run {run}" if run else "")
            + (f" --seed {seed}" if seed is not None else "")
        )
        kept = "nothing is lost" if stop.kept else "steps since the last checkpoint will be done again"
        err.print(f"\nstopped; {kept}. Go on with: [bold]{again}[/]", soft_wrap=True)
        raise typer.Exit(130) from None
    err.print(f"model: {folder / 'model'}\nreport: {folder / 'report.html'}")


@app.command()
def chat(model: ModelName = "spark", dtype: DType = None, quantize: Quantize = None, threads: Threads = None) -> None:
    """Talk to a model in the terminal."""
    from glasklar.terminal import converse

    converse(_load(model, _runtime(threads), dtype, quantize))


@app.command()
def serve(
    model: ModelName,
    port: Port = 8421,
    host: Annotated[str, typer.Option(help="Address; any other than this machine's own needs a key")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another name under which it may be called; repeatable")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Pages of another site that may call it; repeatable")
    ] = None,
    require_key: Annotated[bool, typer.Option("--require-key", help="Also from this machine")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM")] = None,
    access_log: Annotated[
        str | None, typer.Option(metavar="FILE", help="A line of JSON for every request; - is stderr")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Also what was sent")] = False,
    running: Annotated[int, typer.Option(min=1, help="Answers computed at once")] = Limits.running,
    queued: Annotated[int, typer.Option(min=0, help="Requests that may wait beside them")] = Limits.queued,
    cache_tokens: Annotated[int, typer.Option(min=16, help="Tokens that the cache holds")] = Limits.cache_tokens,
    cache_disk: Annotated[
        int, typer.Option(min=0, metavar="GB", help="Disk for what finds no room in the cache, kept for the next start")
    ] = 0,
    cache_type: Annotated[
        str | None, typer.Option(metavar="KIND", help="Of the cache in memory: int16, or int8 in half the memory")
    ] = None,
    dtype: DType = None,
    quantize: Quantize = None,
    mlock: Annotated[
        bool, typer.Option("--mlock", help="Keep quantized weights in memory, also while nobody asks")
    ] = False,
    threads: Threads = None,
) -> None:
    """Serve a model: OpenAI-compatible API and a page."""
    from glasklar.display import bytes_progress
    from glasklar.loading import find_model, open_folder, packed_under
    from glasklar.serve.server import Site
    from glasklar.serve.server import serve as run_server

    site = Site(
        home=_home(),
        host=host,
        port=port,
        names=tuple(allow_host or ()),
        origins=tuple(allow_origin or ()),
        certificate=tls_cert,
        private_key=tls_key,
        key_required=require_key,
        log=access_log,
        log_bodies=log_prompts,
        limits=Limits(running=running, queued=queued, cache_tokens=cache_tokens, disk_bytes=cache_disk * 10**9),
    )
    runtime = _runtime(threads)
    place = find_model(model, _home())
    found = open_folder(place, runtime, dtype, quantize, packed_under(_home()), cache_type, mlock)
    folder = found.folder.parent
    run = folder if (folder / "metrics.jsonl").is_file() else None
    run_server(
        found,
        site,
        run=run,
        tracing=_tracing(run, runtime),
        loading=lambda: bytes_progress(err, f"loading {found.name}"),
    )


keys = typer.Typer(help="Keys with which others may use a server, and what each has used.", no_args_is_help=True)
app.add_typer(keys, name="keys")


@keys.command("add")
def add_key(
    name: Annotated[str, typer.Argument(help="Whose it is")],
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Default: no limit")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(min=1, help="Of prompts and answers; default: no limit")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown now and never again: only its hash is kept."""
    with _access() as access:
        key, secret = access.add(name, requests_per_minute=requests_per_minute, tokens_per_day=tokens_per_day)
    _print({"id": key.id, "name": key.name, "key": secret}, as_json, secret)


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """Show all keys, the revoked ones too."""
    from glasklar.display import keys_table

    with _access() as access:
        rows = [{name: value for name, value in vars(key).items() if name != "digest"} for key in access.all_keys()]
    _print({"keys": rows}, as_json, keys_table(rows, "keys"))


@keys.command("revoke")
def revoke_key(name: Annotated[str, typer.Argument(help="Name or id")], as_json: AsJson = False) -> None:
    """Refuse a key from now on, also by servers that run already."""
    with _access() as access:
        key = access.revoke(name)
    _print({"id": key.id, "name": key.name}, as_json, f"{key.name} ({key.id}) is revoked")


@keys.command("usage")
def show_usage(
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values on stdout")] = False,
) -> None:
    """What each key has used: requests and tokens, by day (UTC)."""
    import csv

    from glasklar.display import keys_table

    with _access() as access:
        rows = access.usage()
    if as_csv:
        names = ["day", "name", "key", "requests", "prompt_tokens", "cached_tokens", "completion_tokens"]
        writer = csv.DictWriter(sys.stdout, names)
        writer.writeheader()
        writer.writerows(rows)
    else:
        _print({"usage": rows}, as_json, keys_table(rows, "usage"))


def _access() -> Any:
    from contextlib import closing

    from glasklar.serve.access import FILE, Access

    return closing(Access(_home() / FILE))


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str | None, typer.Option(help="A user's message")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids, comma-separated, instead of a message")] = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    receipt: Annotated[Path | None, typer.Option(help="Write a signed receipt here, for `glasklar verify`")] = None,
    dtype: DType = None,
    quantize: Quantize = None,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Answer one prompt, for scripts."""
    runtime = _runtime(threads)
    from glasklar.api import generate as answer
    from glasklar.provenance.rundir import write_json
    from glasklar.provenance.signing import Signer

    result = answer(
        _load(model, runtime, dtype, quantize),
        prompt,
        prompt_ids,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        signer=Signer.open(_home()) if receipt else None,
        runtime=runtime,
    )
    if receipt is not None:
        write_json(receipt, result["receipt"])
    _print(result, as_json, result["text"] if result["text"] is not None else str(result["ids"]))
    if result["finish"] == "length" and not as_json:
        err.print(f"[dim]cut off after {len(result['ids'])} tokens; see --max-tokens, and the model's context[/]")


@app.command(name="eval")
def evaluate(
    model: ModelName,
    split: Annotated[str | None, typer.Option(help="Of the problems: test (default), valid or train")] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Of each task; default: 128")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to each for pass@k; default: 16")] = None,
    dtype: DType = None,
    quantize: Quantize = None,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Measure a model on its own tasks, on problems it was not trained on, or on text kept from its training."""
    from glasklar.api import evaluate as measure
    from glasklar.api import recipe_of
    from glasklar.display import evaluation_table
    from glasklar.loading import find_model

    runtime = _runtime(threads)
    recipe_of(find_model(model, _home()))  # refused before anything large is loaded
    result = measure(_load(model, runtime, dtype, quantize), split=split, problems=problems, samples=samples)
    _print(result, as_json, evaluation_table(result))


@app.command()
def plan(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|SHAPE|MODEL", help="A recipe, a published shape, a model folder")
    ],
    hardware: Annotated[str, typer.Option(help="An entry of the hardware table")] = "cpu-2-cores",
    tokens: Annotated[float | None, typer.Option(help="Training tokens, for a shape")] = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, memory, hours, energy and cost before anything runs."""
    from glasklar.api import plan as make_plan
    from glasklar.display import plan_table

    result = make_plan(target, hardware=hardware, tokens=tokens, home=_home())
    _print(result.model_dump(mode="json"), as_json, plan_table(result))


@app.command()
def verify(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL|RECEIPT", help="A run or model by folder or name")],
    key: Annotated[
        str | None, typer.Option(help="Fingerprint that the signature must have, known from elsewhere")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Hash of the ledger's last line, as anchored elsewhere")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a receipt's model, if it is not one of your runs")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute every hash and signature again: what holds, what does not, what cannot be told. Exit code 0, 1."""
    from glasklar.audit.verify import locate
    from glasklar.audit.verify import verify as check

    _runtime(None)
    found = check(locate(target, _home()), home=_home(), key=key, head=head, model=model)
    _findings(found, as_json)


@app.command()
def abandon(
    run: Annotated[str, typer.Argument(metavar="RUN", help="An unfinished run by folder or name")],
    reason: Annotated[str, typer.Option(help="Why, for those who read its ledger")],
) -> None:
    """Record that nobody will go on with a run, and sign what there is: failed runs are part of the record."""
    from glasklar.audit.seal import abandon as give_up
    from glasklar.audit.verify import locate
    from glasklar.provenance.signing import Signer

    folder = locate(run, _home())
    give_up(folder, reason, Signer.open(_home()))
    out.print(f"{folder}: abandoned and signed; check it with: glasklar verify {run}")


@app.command()
def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run by folder or name")],
    segment: Annotated[str | None, typer.Option(help="Number of a segment, or the checkpoint that ends it")] = None,
    everything: Annotated[bool, typer.Option("--all", help="The whole training")] = False,
    beacon: Annotated[str | None, typer.Option(help="Public random value that draws what is replayed")] = None,
    count: Annotated[int, typer.Option("-n", help="How many stretches to draw")] = 5,
    rebuild_data: Annotated[
        bool, typer.Option("--rebuild-data", help="Make the data from their sources again")
    ] = False,
    tolerance: Annotated[
        float | None, typer.Option(help="On another class of machine: let losses differ so far")
    ] = None,
    sign: Annotated[
        bool, typer.Option("--sign/--no-sign", help="Add equal segments to the run's coverage table")
    ] = True,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: as recorded")] = None,
    as_json: AsJson = False,
) -> None:
    """Do a part of a run's training again and compare the states bit for bit. Exit code 0 equal, 1 not."""
    if (segment is not None) + everything + (beacon is not None) != 1:
        raise typer.BadParameter("give one of --segment, --all and --beacon")
    folder, count_of_threads = _recorded(run, threads)
    runtime = _runtime(count_of_threads)
    from glasklar.audit import replay as again
    from glasklar.display import steps_progress
    from glasklar.provenance.rundir import RunDir
    from glasklar.provenance.signing import Signer

    def choose(record: again.Record) -> list[again.Stretch]:
        if beacon is not None:
            return again.draw(record, beacon, count)
        return record.stretches() if segment is None else [record.leading_to(segment)]

    with steps_progress(err) as progress:
        found = again.replay(
            RunDir(folder),
            choose,
            runtime=runtime,
            home=_home(),
            signer=Signer.open(_home()) if sign else None,
            rebuild_data=rebuild_data,
            tolerance=tolerance,
            progress=progress,
        )
    _findings(found, as_json)


@app.command()
def trace(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run by folder or name")],
    text: Annotated[str | None, typer.Argument(help="The span in question")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids, comma-separated, instead of a text")] = None,
    shortest: Annotated[int, typer.Option(min=15, help="Least number of tokens in common")] = 15,
    states: Annotated[bool, typer.Option("--states", help="Also its log-probability at every kept checkpoint")] = False,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Find the training documents that hold a span verbatim, and the steps that showed them."""
    runtime = _runtime(threads)
    from glasklar.audit import trace as tracing
    from glasklar.audit.findings import plural
    from glasklar.audit.verify import locate
    from glasklar.provenance.rundir import RunDir

    tracer = tracing.Tracer(RunDir(locate(run, _home())), _home() / "cache" / "trace")
    query = tracing.parse_query(tracer.tokenizer, text, ids)
    if len(query) < shortest:
        raise RequestError(
            f"{plural(len(query), 'token')}: too few to have {shortest} in common with a document; give a longer text"
        )
    overlaps = tracer.find(query, shortest=shortest)
    result = tracing.as_json(overlaps, tracer.facts["root"])
    lines = [*map(str, overlaps), f"{plural(len(overlaps), 'overlap')}: {tracing.LABEL}"]
    if states and overlaps:
        [measured] = tracer.likelihoods(overlaps[:1], query, runtime)
        result["states"] = [asdict(state) for state in measured]
        lines += [f"    {s.checkpoint}, shown {s.shown} times: {s.logprob:.3f} nats a token" for s in measured]
    if as_json:
        _print(result, True, None)
    else:
        out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _recorded(name: str, threads: int | None) -> tuple[Path, int | None]:
    """The run's folder and how many threads it was made with. Read before torch is loaded, which fixes them."""
    folder = next((path for path in (Path(name), _home() / "runs" / name) if path.is_dir()), Path(name))
    try:
        with (folder / "ledger.jsonl").open(encoding="utf-8") as lines:
            return folder, threads or int(json.loads(next(lines))["data"]["machine"]["threads"])
    except (OSError, StopIteration, ValueError, LookupError, TypeError) as error:
        raise RecordError(f"{folder}: no ledger that begins with a run ({error}); name a run's folder") from None


def _findings(found: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        out.print(str(found), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(found.exit_code)


@app.command()
def convert(
    model: ModelName,
    out_path: Annotated[
        Path | None, typer.Option("--out", help="What to write; default: here, by the model's name and type")
    ] = None,
    to: Annotated[str, typer.Option(help="hf: a Hugging Face folder; gguf: a file for llama.cpp")] = "gguf",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, or q8_0 (gguf alone); default: as the model is stored")
    ] = None,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Give a model out, exactly, in a format that other engines read."""
    from glasklar.convert.export import convert as write
    from glasklar.convert.export import stored_type
    from glasklar.display import bytes_progress
    from glasklar.loading import find_model, name_of

    _runtime(threads)
    folder = find_model(model, _home())
    name, dtype = name_of(folder), dtype or stored_type(folder)
    path = out_path or Path(f"{name.replace('/', '--')}-{dtype}{'.gguf' if to == 'gguf' else ''}")
    with bytes_progress(err, f"writing {path}") as progress:
        made = write(folder, path, to=to, dtype=dtype, name=name, progress=progress)
    for note in made.notes:
        err.print(f"[bold]note[/] {note}", highlight=False, soft_wrap=True)
    result = {"path": str(made.path), "format": made.format, "dtype": made.dtype, "bytes": made.bytes}
    _print(result | {"notes": made.notes}, as_json, f"{made.path}: {made.bytes / 1e6:.1f} MB, {made.dtype}")


@app.command(name="list")
def list_models(as_json: AsJson = False) -> None:
    """Show what can be named here: runs, and models pulled from the hub."""
    from glasklar.display import models_table
    from glasklar.loading import models

    found = models(_home())
    _print({"models": found}, as_json, models_table(found))


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="ID", help="ORG/NAME on the Hugging Face hub")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: main as it is now")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a model from the hub, or the rest of it; the commit is recorded. The one verb that uses the network."""
    from glasklar.hub import RECORD
    from glasklar.hub import pull as fetch

    folder = fetch(name, _home(), revision=revision)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    _print({"path": str(folder), **record}, as_json, f"{name} at {record['revision']}: {folder}")


def _print(result: dict[str, Any], as_json: bool, human: Any) -> None:
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        out.print(human)


def _runtime(threads: int | None) -> Runtime:
    return start(prepare(threads))


def _home() -> Path:
    from glasklar.provenance.rundir import home

    return home(os.environ)


def _tracing(run: Path | None, runtime: Runtime) -> Any:
    """What a server traces answers with: the run that its model came from."""
    from glasklar.audit.trace import RunTracing
    from glasklar.provenance.rundir import RunDir

    return None if run is None else RunTracing(RunDir(run), _home() / "cache" / "trace", runtime)


def _load(name: str, runtime: Runtime, dtype: str | None = None, quantize: str | None = None) -> Any:
    from glasklar.display import bytes_progress
    from glasklar.loading import find_model, load, packed_under

    folder = find_model(name, _home())
    with bytes_progress(err, f"loading {name}") as progress:
        return load(folder, runtime, dtype, quantize=quantize, cache=packed_under(_home()), progress=progress)


def main() -> None:
    """Entry point: maps errors to exit codes."""
    logging.basicConfig(level=os.environ.get("GLASKLAR_LOG", "WARNING").upper(), stream=sys.stderr)
    try:
        code = app(standalone_mode=False)  # typer gives the code of an Exit back instead of raising it
        if code:
            sys.exit(code)
    except GlasklarError as error:
        err.print(f"[bold red]error[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:  # typer's usage errors carry their own text and exit code 2
        if hasattr(error, "format_message"):
            # Without arguments there is help in place of a message, and it is shown already.
            if said := error.format_message():
                err.print(f"[bold red]error[/] {escape(said)}", highlight=False)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
