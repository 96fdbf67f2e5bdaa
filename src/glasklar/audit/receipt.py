"""Receipts on both sides: signed for answers that a server gave, and verified by giving the answer again.

An engine that answers many at once forms other products than one that answers alone, and floating-point sums come out
otherwise in their last bits (measured: the log-probabilities of one answer in six, the tokens of none in 1,500). So
both sides compute the answer once more in the one form that does not depend on company: alone, in a fresh engine. What
the receipt holds are the log-probabilities of that form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from glasklar.audit.findings import Findings
from glasklar.engine.engine import Engine
from glasklar.engine.native_runner import computed_by
from glasklar.engine.packed import PackedModel
from glasklar.engine.request import Completion, SamplingParams
from glasklar.errors import RecordError
from glasklar.loading import Model, load
from glasklar.model.transformer import Transformer
from glasklar.provenance.environment import code_identity
from glasklar.provenance.receipt import (
    Receipt,
    engine_identity,
    logprob_digest,
    make_receipt,
    model_root,
    open_receipt,
)
from glasklar.provenance.signing import Signer
from glasklar.runtime import Runtime, start


class Attestor:
    """Signs receipts for answers of one model. Made once a server: it reads all weights for their hash."""

    def __init__(self, model: Model, runtime: Runtime, signer: Signer) -> None:
        self.model, self.signer = model, signer
        self.root = model_root(model.folder)
        self.engine = engine_identity({**runtime.describe(), **computed_by(model.network)})

    def receipt(self, prompt: Sequence[int], params: SamplingParams, ids: Sequence[int], finish: str) -> dict[str, Any]:
        """The envelope for an answer, however it was computed: given once more, alone, which takes as long as it did.

        finish   "stop", "length", or "cancelled" for an answer that the caller cut off

        Raises RecordError where the answer comes out otherwise alone: within a near tie, which the company in a batch
        decided, or because it is none of this model's. What nobody could verify is not signed.
        """
        again = answer_alone(self.model.network, prompt, params, ids, finish)
        if again.ids != list(ids) or finish not in ("cancelled", again.finish):
            raise RecordError(
                f"the answer comes out otherwise alone, from token {_first_difference(again.ids, ids) + 1} on: a near "
                "tie that company in the batch decided; ask again, and again for the receipt"
            )
        return make_receipt(
            self.signer,
            model=self.root,
            engine=self.engine,
            prompt=prompt,
            sampling=asdict(params),
            ids=again.ids,
            logprobs=again.logprobs,
            finish=finish,
            alone=True,
        )


def answer_alone(
    network: Transformer | PackedModel, prompt: Sequence[int], params: SamplingParams, ids: Sequence[int], finish: str
) -> Completion:
    """The answer once more, in a fresh engine with nobody beside it; one that was cut off is made up to the cut."""
    if finish == "cancelled":
        params = replace(params, max_tokens=len(ids))
    [again] = Engine(network, max_slots=1).generate([list(prompt)], params)
    return again


def verify_receipt(path: Path, *, home: Path, model: Path | None = None, key: str | None = None) -> Findings:
    """Checks signature and digests of a receipt and gives its answer again.

    path    the envelope, or a JSON object that holds it under "receipt"
    home    where runs lie, to find the model by its root
    model   its folder, if it lies elsewhere

    Raises RecordError where the file is no JSON.
    """
    found = Findings(str(path), "receipt")
    envelope = _read(path)
    try:
        receipt = open_receipt(envelope, path.name)
    except RecordError as error:
        found.fails("receipt", str(error))
        return found
    found.holds("signature", f"valid, made with the Ed25519 key {receipt.signer}")
    if key is not None:
        good, bad = "the key is the one that was asked for", f"signed with {receipt.signer}, not with {key}"
        found.expect(receipt.signer == key.lower(), "signer", good, bad)
    folder = find_by_root(receipt.model, home) if model is None else model
    if folder is None:
        found.unchecked("answer", f"the model {receipt.model} is not among this machine's runs; give --model FOLDER")
    elif model_root(folder) != receipt.model:
        found.fails("model", f"{folder} is another model than the receipt's, {receipt.model}")
    else:
        found.holds("model", f"{folder} is the model of the receipt, {receipt.model}")
        found.guard("answer", lambda: check_answer(receipt, load(folder, _runtime(receipt)), found))
    return found


def check_answer(receipt: Receipt, model: Model, found: Findings) -> None:
    """Gives the answer again and compares ids, end and log-probabilities."""
    again = answer_alone(model.network, receipt.prompt, sampling(receipt), receipt.ids, receipt.finish)
    ids = len(receipt.ids)
    if again.ids != receipt.ids:
        place = _first_difference(again.ids, receipt.ids)
        longer = place == min(ids, len(again.ids))
        where = f"the length, {len(again.ids)} here and {ids} there" if longer else f"token {place + 1}"
        hint = "" if receipt.alone else "; it was computed in a batch, where a near tie may round the other way"
        found.fails("answer", f"this machine answers otherwise from {where} on{_circumstances(receipt, model)}{hint}")
        return
    found.holds("answer", f"all {ids} tokens come out the same")
    if receipt.finish != "cancelled":
        good, bad = f"ends the same way ({again.finish})", f"ends with {again.finish}, there with {receipt.finish}"
        found.expect(again.finish == receipt.finish, "end", good, bad)
    _logprobs(receipt, again, model, found)


def sampling(receipt: Receipt) -> SamplingParams:
    """The settings of a receipt. Raises RecordError for one that this version does not know."""
    given = dict(receipt.sampling)
    unknown = set(given) - {field.name for field in fields(SamplingParams)}
    if unknown:
        raise RecordError(f"sampling setting {min(unknown)!r}: not one of this version's; use the receipt's version")
    given["stop_ids"] = tuple(given["stop_ids"])
    given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    return SamplingParams(**given)


def find_by_root(root: str, home: Path) -> Path | None:
    """The released model with this root among the runs under `home`."""
    models = (run / "model" for run in sorted((home / "runs").glob("*")))
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
    elif other or not receipt.alone:
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
    """This machine with the threads and the precision of the receipt."""
    machine = receipt.engine["machine"]
    return start(machine["threads"], machine["device"], machine["compute"])


def _read(path: Path) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: no JSON file that could be read ({error})") from None
    return value["receipt"] if isinstance(value, dict) and "receipt" in value else value
