"""`glasklar verify answer.json`: the answer of a receipt given again on this machine, token for token.

The verifier's engine answers alone, without drafts and with an empty cache; whoever gave the answer had company, cached
prefixes and drafts. On the C++ passes none of that changes a bit, so even the log-probabilities must come out equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

from glasklar.audit.findings import Findings, plural
from glasklar.engine.engine import Engine
from glasklar.engine.paged_runner import computed_by
from glasklar.engine.request import Completion, SamplingParams, TokenEvent
from glasklar.errors import CapacityError, RecipeError, RecordError
from glasklar.hub import RECORD
from glasklar.loading import Model, load
from glasklar.provenance.environment import code_identity
from glasklar.provenance.hashing import strict_json
from glasklar.provenance.receipt import Receipt, logprob_digest, model_root, open_receipt
from glasklar.provenance.signing import own_fingerprint
from glasklar.runtime import Precision, Runtime, start
from glasklar.serve.grammar import GuideMaker, GuideSpec

MOST_THREADS = 1024
# What may stand beside a receipt in a file: what the server's and `generate`'s replies have.
# Beside it nothing can be said that a reader might take for the answer.
BESIDE: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: value == "receipt",
    "id": lambda value: isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value) is not None,
    "choice": lambda value: type(value) is int,
    "choices": lambda value: type(value) is int,
    "receipt": lambda value: True,
}


def answer_again(model: Model, receipt: Receipt) -> Completion:
    """The answer once more, in a fresh engine with nobody beside it; one that was cut off is made up to the cut.

    Raises GlasklarError where the engine cannot give it, RecordError for settings of another version.
    """
    params = sampling(receipt)
    if receipt.finish == "cancelled":
        params = replace(params, max_tokens=len(receipt.ids))
    guide = None
    if receipt.guide is not None:
        if model.tokenizer is None:
            raise RecordError("the answer was guided, which needs the model's tokenizer")
        guide = GuideMaker(model.tokenizer, model.config.vocab_size).make(_guide(receipt.guide))
    engine = Engine(model.network, max_slots=1, draft_tokens=0, cache=receipt.engine["machine"].get("cache"))
    engine.add(receipt.prompt, params, guide=guide)
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    if error := events[-1].error:
        raise error
    ids, logprobs = [event.token for event in events], [event.logprob for event in events]
    return Completion(ids=ids, logprobs=logprobs, finish=events[-1].finish or "cancelled")


def verify_receipt(path: Path, *, home: Path, model: Path | None = None, key: str | None = None) -> Findings:
    """Checks signature and digests of a receipt and gives its answer again.

    path    the envelope, or a JSON object that holds it under "receipt"
    home    where runs lie, to find the model by its root
    model   its folder, if it lies elsewhere

    Raises RecordError where the file is no JSON, or says something twice.
    """
    found = Findings(str(path), "receipt")
    content = _read(path)
    if isinstance(content, dict) and isinstance(content.get("error"), dict):
        raise RecordError(f"{path}: no receipt but a server's refusal: {content['error'].get('message')}")
    within = isinstance(content, dict) and "receipt" in content
    try:
        receipt = open_receipt(content["receipt"] if within else content, path.name)
    except RecordError as error:
        found.fails("receipt", str(error))
        return found
    found.holds("signature", f"valid, made with the Ed25519 key {receipt.signer}")
    check_signer(receipt.signer, found, home, key)
    if within and (strange := sorted(name for name in content if not BESIDE.get(name, lambda _: False)(content[name]))):
        found.fails(", ".join(strange), "stands beside the receipt, where nobody signed it: leave it out")
    folder = find_by_root(receipt.model, home) if model is None else model
    if folder is None:
        found.unchecked(
            "answer",
            f"the model {receipt.model} is not among this machine's runs and pulled models; give --model FOLDER",
        )
    elif model_root(folder) != receipt.model:
        found.fails("model", f"{folder} is another model than the receipt's, {receipt.model}")
    else:
        found.holds("model", f"{folder} is the model of the receipt, {receipt.model}")
        found.guard("answer", lambda: _again(receipt, folder, found))
    return found


def check_signer(signer: str, found: Findings, home: Path, key: str | None) -> None:
    """Whose signature it is, as far as that can be known here; `key`: the fingerprint that it should be."""
    if key is not None:
        found.expect(
            signer == key.lower(),
            "signer",
            "the key is the one that was asked for",
            f"signed with {signer}, not with the key asked for, {key}",
        )
    elif signer == own_fingerprint(home):
        found.holds("signer", "your own key")
    else:
        found.unchecked(
            "signer", "whose key it is: compare its fingerprint with what its owner publishes, or give --key"
        )


def _again(receipt: Receipt, folder: Path, found: Findings) -> None:
    try:
        runtime = _runtime(receipt)
    except RecipeError as error:
        found.unchecked("answer", f"cannot be given again here: {error}")
        return
    model = load(folder, runtime, quantize=receipt.engine["machine"].get("quantize"))
    if model.tokenizer is not None:
        asked = model.tokenizer.decode(receipt.prompt, skip_special=False)
        found.holds("question", f"{plural(len(receipt.prompt), 'token')} under the signature: {asked!r}")
    found.holds("settings", _settings(receipt))
    check_answer(receipt, model, found)


def check_answer(receipt: Receipt, model: Model, found: Findings) -> None:
    """Gives the answer again and compares ids, end and log-probabilities."""
    try:
        again = answer_again(model, receipt)
    except CapacityError as error:
        found.unchecked("answer", f"cannot be given again here: {error}")
        return
    ids = len(receipt.ids)
    if again.ids != receipt.ids:
        place = _first_difference(again.ids, receipt.ids)
        longer = place == min(ids, len(again.ids))
        where = f"the length, {len(again.ids)} here and {ids} there" if longer else f"token {place + 1}"
        hint = "" if receipt.exact else "; it was computed in a batch, where a near tie may round the other way"
        found.fails("answer", f"this machine answers otherwise from {where} on{_circumstances(receipt, model)}{hint}")
        return
    found.holds("answer", f"all {ids} tokens come out the same{_words(receipt, model)}")
    if receipt.finish == "cancelled":
        found.unchecked(
            "end", f"how it would have gone on: it was cut off after {plural(ids, 'token')}, no whole answer"
        )
    else:
        good, bad = f"ends the same way ({again.finish})", f"ends with {again.finish}, there with {receipt.finish}"
        found.expect(again.finish == receipt.finish, "end", good, bad)
    _logprobs(receipt, again, model, found)


def _words(receipt: Receipt, model: Model) -> str:
    """What the tokens say: a text shown elsewhere as this answer can be compared with it."""
    return "" if model.tokenizer is None else f": {model.tokenizer.decode(receipt.ids, skip_special=False)!r}"


def _settings(receipt: Receipt) -> str:
    """How the answer was asked for: what is not as it is by default, and what guided it."""
    usual = json.loads(json.dumps(asdict(SamplingParams())))
    given = [f"{name} = {value}" for name, value in receipt.sampling.items() if value != usual.get(name)]
    guided = [
        f"{name} = {json.dumps(value)}" for name, value in (receipt.guide or {}).items() if value not in (None, "")
    ]
    return f"asked for with {', '.join(given) or 'the usual ones'}" + (
        f"; kept to {', '.join(guided)}" if guided else "; guided by nothing"
    )


def sampling(receipt: Receipt) -> SamplingParams:
    """The settings of a receipt. Raises RecordError for one that this version does not know."""
    given = dict(receipt.sampling)
    unknown = set(given) - {field.name for field in fields(SamplingParams)}
    if unknown:
        raise RecordError(f"sampling setting {min(unknown)!r}: not one of this version's; use the receipt's version")
    given["stop_ids"] = tuple(given["stop_ids"])
    given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    return SamplingParams(**given)


def _guide(given: dict[str, Any]) -> GuideSpec:
    """What guided an answer. Raises RecordError for what this version does not know."""
    unknown = set(given) - {field.name for field in fields(GuideSpec)}
    if unknown:
        raise RecordError(f"guide setting {min(unknown)!r}: not one of this version's; use the receipt's version")
    return GuideSpec(**given)


def find_by_root(root: str, home: Path) -> Path | None:
    """The model with this root among the released and the pulled ones under `home`."""
    runs, pulled = sorted((home / "runs").glob("*")), sorted((home / "hub").glob("*"))
    models = [run / "model" for run in runs] + [folder for folder in pulled if (folder / RECORD).is_file()]
    return next(
        (folder for folder in models if (folder / "config.json").is_file() and model_root(folder) == root), None
    )


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """The first place in which two sequences differ; the length of the shorter where one continues the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _logprobs(receipt: Receipt, again: Completion, model: Model, found: Findings) -> None:
    other = _circumstances(receipt, model)
    if logprob_digest(again.logprobs) == receipt.logprobs:
        found.holds("log-probabilities", "the same bits")
    elif other or not receipt.exact:
        why = other or " (computed in a batch with others)"
        found.unchecked("log-probabilities", f"other bits, which may come from rounding{why}")
    else:
        found.fails("log-probabilities", "other bits on the same class of machine and code: another computation")


def _circumstances(receipt: Receipt, model: Model) -> str:
    there = receipt.engine["machine"]
    here = _runtime(receipt).describe() | computed_by(model.network)
    names = ("device", "compute", "threads", "cpu", "cpu_capability", "gpu", "torch", "ops", "passes")
    other = [f"{name} {there.get(name)} there, {here[name]} here" for name in names if there.get(name) != here[name]]
    if receipt.engine["code"] != code_identity()["files"]:
        other.append(f"other code than glasklar {receipt.engine['version']} there")
    return f" ({'; '.join(other)})" if other else ""


def _runtime(receipt: Receipt) -> Runtime:
    """This machine with the threads and the precision of the receipt. Raises RecordError for what no machine has, and
    RecipeError for a device that this one has not."""
    machine = receipt.engine["machine"]
    threads, compute = machine["threads"], machine["compute"]
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS or compute not in get_args(Precision):
        raise RecordError(f"threads = {threads!r}, compute = {compute!r}: no machine of this version answers so")
    return start(threads, machine["device"], compute)


def _read(path: Path) -> Any:
    try:
        return strict_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{path}: no receipt, which would be a JSON file that can be read in one way only ({error}); "
            "a run or a model is named by its folder"
        ) from None
