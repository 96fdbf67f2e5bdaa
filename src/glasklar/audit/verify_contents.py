"""What the files of a run say, held against what its ledger says: recipe, data, checkpoints, figures, weights."""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glasklar.audit.findings import Findings, plural
from glasklar.audit.verify_replays import checkpoint_events
from glasklar.corpus import REMOVED, TRAIN
from glasklar.data.tokenizer import Tokenizer
from glasklar.distil import read_traces, stages_taught, traces_name, wrong_lines
from glasklar.errors import CheckpointError
from glasklar.learn.state import load_state
from glasklar.model.checkpoint import hf_tensors, load_model
from glasklar.ops.select import select
from glasklar.provenance.hashing import canonical_json, merkle_root, sha256_file, tensor_hash
from glasklar.provenance.ledger import Event
from glasklar.provenance.metrics import read_metrics
from glasklar.provenance.rundir import RunDir
from glasklar.recipe import DistilStage, Recipe, load_recipe
from glasklar.runtime import Runtime
from glasklar.training import state_at

# What the checks read of an event's data.
FIELDS: dict[str, set[str]] = {
    "run": {"recipe", "seed", "code", "machine", "packages"},
    "data": {"documents", "root", "source_roots", "tokens", "train_file"},
    "tokenizer": {"hash"},
    "taught": {"seconds", "energy"},
    "checkpoint": {"name", "state_hash", "metrics"},
    "released": {"files"},
}


_NAME = re.compile(r"\d{2}-[a-z]+-\d{8}")


def unknown_form(events: list[Event]) -> str | None:
    """What keeps this version from reading a ledger whose chain holds; None for one that it can read."""
    if not events or events[0].event != "run":
        return "does not begin with the run"
    for event in events:
        if not isinstance(event.event, str) or not isinstance(event.data, dict):
            return f"line {event.index + 1} is no event with data"
        if missing := FIELDS.get(event.event, set()) - event.data.keys():
            return f"line {event.index + 1} ({event.event}) lacks {', '.join(sorted(missing))}"
        if event.event == "checkpoint" and not _NAME.fullmatch(str(event.data["name"])):
            return f"line {event.index + 1} ({event.event}) has the name {event.data['name']!r}"
    return None


def check_contents(run: RunDir, events: list[Event], found: Findings) -> None:
    """All checks, each of which is a finding of its own; `events` is the whole, verified ledger."""
    last = {event.event: event.data for event in events}
    checkpoints = checkpoint_events(events)
    found.guard("recipe", lambda: _recipe(run, last["run"], found))
    if "data" in last:
        found.guard("data", lambda: _data(run, last["data"], last["tokenizer"], found))
    found.guard("checkpoints", lambda: _checkpoints(run, checkpoints, last["run"]["recipe"], found))
    found.guard("metrics.jsonl", lambda: _metrics(run, events, checkpoints, found))
    if "released" in last:
        found.guard("model", lambda: _model(run, last["released"]["files"], checkpoints, last["tokenizer"], found))


def _recipe(run: RunDir, recorded: dict[str, Any], found: Findings) -> None:
    text = run.identity_file.read_bytes()
    recipe = Recipe.read(json.loads(text), run.identity_file.name)
    whole = recipe.canonical().encode() == text and recipe.hash == recorded["recipe"]
    found.expect(
        whole,
        run.identity_file.name,
        f"is the recipe that the ledger begins with, {recipe.hash}",
        f"is not the recipe that the ledger begins with, {recorded['recipe']}",
    )
    written = load_recipe(str(run.recipe_file)).replace(seed=recorded["seed"])
    found.expect(
        written.canonical().encode() == text,
        run.recipe_file.name,
        f"means the same (seed {recorded['seed']})",
        "means another recipe than recipe.json",
    )


def _data(run: RunDir, recorded: dict[str, Any], tokenizer: dict[str, Any], found: Findings) -> None:
    if not run.data.is_dir():
        found.unchecked("data", "the prepared data are not in the folder; `glasklar replay --rebuild-data` makes them")
        return
    found.expect(
        (run.data / "facts.json").read_bytes() == canonical_json(recorded),
        "data/facts.json",
        f"is what the ledger says of the data; Merkle root {recorded['root']}",
        "differs from what the ledger says of the data: another data root or other counts",
    )
    found.expect(
        sha256_file(run.data / TRAIN) == recorded["train_file"],
        f"data/{TRAIN}",
        f"{recorded['tokens']:,} training tokens, the recorded ones",
        "other training tokens than recorded",
    )
    sources = recorded["source_roots"].values()
    together = merkle_root(bytes.fromhex(source["root"]) for source in sources)
    found.expect(
        together == recorded["root"] and sum(source["documents"] for source in sources) == recorded["documents"],
        "source roots",
        f"the roots of {plural(len(sources), 'source')} give the root of the data",
        f"the roots of the sources give {together}, the ledger says {recorded['root']}; or their documents do not "
        "add up",
    )
    if "removed_file" in recorded:
        removed = sum(recorded["removed"].values())
        found.expect(
            sha256_file(run.data / REMOVED) == recorded["removed_file"],
            f"data/{REMOVED}",
            f"the recorded list of {removed} documents that were left out, with reasons",
            "another list of documents that were left out than recorded",
        )
    for index, stage in stages_taught(Recipe.read(run.recipe(), run.identity_file.name)):
        found.guard(f"data/{traces_name(index)}", partial(_traces, run, index, stage, recorded, found))
    _tokenizer(run.data, tokenizer["hash"], found)
    found.unchecked(
        "data root", "that the documents give this root: `glasklar replay --rebuild-data` makes them from their sources"
    )


def _traces(run: RunDir, index: int, stage: DistilStage, recorded: dict[str, Any], found: Findings) -> None:
    """A teacher's answers: the recorded ones, right ones, and to training problems, which no evaluation asks."""
    path = run.data / traces_name(index)
    facts = recorded["traces"][path.name]
    subject, recipe = f"data/{path.name}", Recipe.read(run.recipe(), run.identity_file.name)
    traces = read_traces(path)
    if not found.expect(
        sha256_file(path) == facts["file"] and len(set(traces)) == len(traces) == facts["kept"],
        subject,
        f"the recorded {len(traces):,} answers of the teacher with the root {facts['teacher_root']}",
        "other answers of a teacher than recorded",
    ):
        return
    found.expect(
        facts["kept"] <= facts["right"] <= facts["answers"] == stage.problems * stage.samples,
        f"{subject}, counts",
        f"{facts['right']:,} of {facts['answers']:,} answers were right",
        f"{facts['kept']} kept of {facts['right']} right of {facts['answers']} answers do not go with the recipe",
    )
    wrong = wrong_lines(recipe, index, traces)
    found.expect(
        not wrong,
        f"{subject}, answers",
        "each is right, by the task's checker, and answers a training problem",
        f"{len(wrong)} are wrong, or to no training problem of the stage, line {wrong[0] if wrong else 0} the first",
    )
    found.unchecked(
        f"{subject}, teacher",
        "that the teacher gave these answers: `glasklar replay --rebuild-data` asks it again, where it is at hand",
    )


def _tokenizer(folder: Path, recorded: str, found: Findings) -> None:
    loaded = Tokenizer.load(folder)
    same = all((folder / name).read_bytes() == content for name, content in loaded.files().items())
    found.expect(
        same and loaded.hash == recorded,
        f"{folder.name}/tokenizer.json",
        "is the recorded tokenizer",
        "is not the tokenizer that the ledger records",
    )


def _checkpoints(run: RunDir, recorded: dict[str, dict[str, Any]], recipe: str, found: Findings) -> None:
    folders = sorted(path for path in run.checkpoints.iterdir() if path.is_dir())
    for folder in folders:
        found.guard(f"checkpoints/{folder.name}", partial(_checkpoint, folder, recorded, recipe, found))
    gone = [name for name in recorded if not (run.checkpoints / name).is_dir()]
    if gone:
        found.unchecked(
            "checkpoints",
            f"{len(gone)} of {len(recorded)} recorded states are not kept; `glasklar replay` makes them again",
        )


def _checkpoint(folder: Path, recorded: dict[str, dict[str, Any]], recipe: str, found: Findings) -> None:
    subject = f"checkpoints/{folder.name}"
    if folder.name not in recorded:
        found.fails(subject, "the ledger knows no checkpoint of this name")
        return
    try:
        _, meta = load_state(folder)  # computes file and state hash anew
    except CheckpointError as error:
        found.fails(subject, str(error).split(";")[0])
        return
    state = json.loads((folder / "meta.json").read_bytes())["state_hash"]
    wanted = recorded[folder.name]["state_hash"]
    own = state == wanted and meta["recipe"] == recipe
    found.expect(
        own,
        subject,
        f"weights, optimiser and position hash to the recorded state {state}",
        f"is another state ({state[:16]}…) than the recorded {wanted[:16]}…: of another run, or trained otherwise",
    )


def _metrics(run: RunDir, events: list[Event], checkpoints: dict[str, dict[str, Any]], found: Findings) -> None:
    # A run that ended before its first step has no figures: nothing is bound then, and nothing may be missing.
    name, content = run.metrics_file.name, run.metrics_file.read_bytes() if run.metrics_file.exists() else b""
    lines = content.splitlines(keepends=True)
    wrong = [
        checkpoint
        for checkpoint, data in checkpoints.items()
        if hashlib.sha256(b"".join(lines[: data["metrics"]["lines"]])).hexdigest() != data["metrics"]["sha256"]
    ]
    found.expect(
        not wrong,
        name,
        f"the figures of all steps up to the last checkpoint are those that the ledger binds ({len(lines)} lines)",
        f"the figures before {wrong[0] if wrong else ''} are not those that the ledger binds",
    )
    known = [event.data for event in events if event.event == "evaluation"]
    stages, at, misplaced = Recipe.read(run.recipe(), run.identity_file.name).stages, -1, []
    for event in events:
        if event.event == "checkpoint":
            at = int(event.data["name"][:2])
        elif event.event == "evaluation" and (
            event.data.get("evaluation") != f"after {stages[at].kind}" or event.data.get("step") != stages[at].steps
        ):
            misplaced.append(f"line {event.index + 1}")
    if misplaced:
        found.fails("evaluations", f"{', '.join(misplaced)} of the ledger: not the evaluation that belongs there")
    shown = [line for line in read_metrics(run.metrics_file) if str(line.get("evaluation")).startswith("after ")]
    found.expect(
        all(line in known for line in shown) and (not content or content.endswith(b"\n")),
        "evaluations",
        f"{len(shown)} evaluations in the metrics are those in the ledger",
        "an evaluation in the metrics is not the one in the ledger",
    )


def _model(
    run: RunDir,
    released: dict[str, str],
    checkpoints: dict[str, dict[str, Any]],
    tokenizer: dict[str, Any],
    found: Findings,
) -> None:
    wrong = [name for name, digest in released.items() if not _is(run.model / name, digest)]
    for name in wrong:
        found.fails(f"model/{name}", "is not the file that the ledger says was released")
    if not wrong:
        found.holds("model", f"its {len(released)} files are those that the ledger says were released")
    _tokenizer(run.model, tokenizer["hash"], found)
    found.expect(
        (run.model / "recipe.json").read_bytes() == run.identity_file.read_bytes(),
        "model/recipe.json",
        "is the run's recipe",
        "is another recipe than the run's",
    )
    last = list(checkpoints)[-1]
    if (run.checkpoints / last).is_dir():
        found.guard("weights", lambda: _weights(run, last, found))
    else:
        found.unchecked("weights", f"that they are the last state: checkpoints/{last} is not there")


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_file(path) == digest


def _weights(run: RunDir, last: str, found: Findings) -> None:
    """The released weights must be the last state's, rounded as the recipe says."""
    recipe = Recipe.read(run.recipe(), "recipe.json")
    runtime = Runtime(device="cpu", compute=recipe.compute, threads=torch.get_num_threads())
    trained = state_at(recipe, run.checkpoints / last, runtime)
    there = load_model(run.model, dtype=runtime.dtype, ops=select(runtime), device="cpu")
    found.expect(
        tensor_hash(hf_tensors(there)) == tensor_hash(hf_tensors(trained)),
        "weights",
        f"the released weights are those of the last state, {last}",
        f"the released weights are not those of the last state, {last}: weights were swapped or patched",
    )
