"""Receipts: what makes one answer reproducible, signed by whoever gave it.

A receipt names the model by its root, the engine by version and machine, and holds the prompt's ids, the sampling
settings with the seed, the ids of the answer and a digest of their log-probabilities. It is enough to give the same
answer again.

An answer that an engine computed alone (a fresh `Engine(model, max_slots=1)`) comes out again to the bit. One that was
computed in a batch with others has products of other shapes, whose sums may round otherwise in the last bit. Receipts
hold the log-probabilities of the answer computed alone (`audit.receipt.Attestor` does that for a server); `alone` says
that they do. Where it is false they are those of a batch, and only the tokens are compared.

A receipt holds the prompt: it is as confidential as the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasklar.errors import RecordError
from glasklar.provenance.environment import PACKAGE, code_identity
from glasklar.provenance.hashing import canonical_json, leaf_hash, merkle_root, sha256_file, sha256_hex
from glasklar.provenance.ledger import exact
from glasklar.provenance.rundir import ATTESTATION
from glasklar.provenance.signing import Signer, open_envelope

RECEIPT_KIND = "urn:x-glasklar:receipt:v1"
# What determines answers; a card beside the weights does not.
_MODEL_FILES = (".json", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """An opened receipt.

    engine            version, hash of the code, machine (`Runtime.describe`, name of the ops)
    sampling          all fields of `SamplingParams`
    finish            "stop", "length", or "cancelled": the caller took no more tokens (a stop text, a lost connection)
    logprobs          digest of the log-probabilities, one an id
    alone             computed alone, so that it must come out to the bit
    signer            fingerprint of the key
    """

    model: str
    engine: dict[str, Any]
    prompt: list[int]
    sampling: dict[str, Any]
    ids: list[int]
    finish: str
    logprobs: str
    alone: bool
    signer: str


def model_root(folder: Path) -> str:
    """One hash for what a model's answers depend on: a Merkle root over names and SHA-256 of its files.

    Weights, configuration, tokenizer; the same for a copy anywhere. Hugging Face folders of others have one as well.
    Reads all weights: a server computes it once.
    """
    files = [p for p in folder.iterdir() if p.suffix in _MODEL_FILES and p.name != ATTESTATION and p.is_file()]
    return merkle_root(leaf_hash({"name": path.name, "sha256": sha256_file(path)}) for path in files)


def engine_identity(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Which engine answers, for `make_receipt`. Reads the package's files: a server computes it once."""
    code = code_identity()
    return {"name": PACKAGE, "version": code["version"], "code": code["files"], "machine": dict(machine)}


def make_receipt(
    signer: Signer,
    *,
    model: str,
    engine: Mapping[str, Any],
    prompt: Sequence[int],
    sampling: Mapping[str, Any],
    ids: Sequence[int],
    logprobs: Sequence[float],
    finish: str,
    alone: bool,
) -> dict[str, Any]:
    """The signed envelope, JSON values only. model: `model_root`; engine: `engine_identity`; sampling:
    `dataclasses.asdict` of the request's `SamplingParams`; the rest is the prompt and the answer (`Completion`)."""
    settings = json.loads(json.dumps(dict(sampling)))  # token ids of logit_bias become text, tuples lists
    answer = {"ids": list(ids), "finish": finish, "logprobs": logprob_digest(logprobs), "alone": alone}
    subjects = {"answer": _digest(answer), "model": model, "prompt": _digest(list(prompt))}
    body = {"engine": dict(engine), "prompt": list(prompt), "sampling": settings, "answer": answer}
    return signer.sign(RECEIPT_KIND, subjects, body)


def open_receipt(envelope: Any, where: str) -> Receipt:
    """Raises RecordError where the envelope is no receipt or does not hold. `where` names it in messages."""
    statement = open_envelope(envelope, RECEIPT_KIND, where)
    subjects, body = statement.subjects, statement.predicate
    try:
        answer = body["answer"]
        if subjects["answer"] != _digest(answer) or subjects["prompt"] != _digest(body["prompt"]):
            raise RecordError(f"{where}: the digests of prompt and answer are not those of its ids")
        return Receipt(
            model=subjects["model"],
            engine=body["engine"],
            prompt=body["prompt"],
            sampling=body["sampling"],
            ids=answer["ids"],
            finish=answer["finish"],
            logprobs=answer["logprobs"],
            alone=answer["alone"],
            signer=statement.signer,
        )
    except (LookupError, TypeError) as error:
        raise RecordError(f"{where}: a receipt without {error}") from None


def logprob_digest(logprobs: Sequence[float]) -> str:
    """SHA-256 over exact values: equal digests mean equal bits."""
    return _digest([exact(value) for value in logprobs])


def _digest(value: Any) -> str:
    return sha256_hex(canonical_json(value))
