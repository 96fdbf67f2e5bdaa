"""Receipts: what makes one answer reproducible, signed by whoever gave it.

A receipt names the model by its root, the engine by version and machine, and holds the prompt's ids, the sampling
settings with the seed, the ids of the answer and a digest of their log-probabilities. It is enough to give the same
answer again.

On the engine's C++ passes the numbers of an answer do not depend on what else was computed: they come out again to the
bit, and `exact` says so. PyTorch's passes have products of other shapes in a batch, whose sums may round otherwise in
the last bit; unless such an answer was computed alone, `exact` is false and only its tokens are compared.

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
    guide             what else decided about the tokens, as plain data (`serve.grammar.GuideSpec`); None: nothing
    finish            "stop", "length", or "cancelled": the caller took no more tokens (a stop text, a lost connection)
    logprobs          digest of the log-probabilities, one an id
    exact             whether the log-probabilities must come out to the bit
    signer            fingerprint of the key
    """

    model: str
    engine: dict[str, Any]
    prompt: list[int]
    sampling: dict[str, Any]
    guide: dict[str, Any] | None
    ids: list[int]
    finish: str
    logprobs: str
    exact: bool
    signer: str


def model_root(folder: Path) -> str:
    """One hash for what a model's answers depend on: a Merkle root over names and SHA-256 of its files.

    Weights, configuration, tokenizer; the same for a copy anywhere. Hugging Face folders of others have one as well.
    Reads all weights: a server computes it once.
    """
    return merkle_root(leaf_hash({"name": path.name, "sha256": sha256_file(path)}) for path in _files(folder))


def model_stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time of change and inode of the files under `model_root`: what is changed is seen without reading it."""
    stats = {path.name: path.stat() for path in _files(folder)}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.suffix in _MODEL_FILES and p.name != ATTESTATION and p.is_file()]


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
    guide: Mapping[str, Any] | None,
    ids: Sequence[int],
    logprobs: Sequence[float],
    finish: str,
    exact: bool,
) -> dict[str, Any]:
    """The signed envelope, JSON values only. model: `model_root`; engine: `engine_identity`; sampling:
    `dataclasses.asdict` of the request's `SamplingParams`; the rest is the prompt and the answer (`Completion`)."""
    settings = json.loads(json.dumps(dict(sampling)))  # token ids of logit_bias become text, tuples lists
    answer = {"ids": list(ids), "finish": finish, "logprobs": logprob_digest(logprobs), "exact": exact}
    subjects = {"answer": _digest(answer), "model": model, "prompt": _digest(list(prompt))}
    body = {"engine": dict(engine), "prompt": list(prompt), "sampling": settings, "guide": guide, "answer": answer}
    return signer.sign(RECEIPT_KIND, subjects, body)


def open_receipt(envelope: Any, where: str) -> Receipt:
    """Raises RecordError where the envelope is no receipt or does not hold. `where` names it in messages."""
    statement = open_envelope(envelope, RECEIPT_KIND, where)
    subjects, body = statement.subjects, statement.predicate
    try:
        answer = body["answer"]
        if subjects["answer"] != _digest(answer) or subjects["prompt"] != _digest(body["prompt"]):
            raise RecordError(f"{where}: the digests of prompt and answer are not those of its ids")
        if not _whole(body["prompt"]) or not _whole(answer["ids"]):
            raise RecordError(f"{where}: prompt and answer must be lists of token ids")
        return Receipt(
            model=subjects["model"],
            engine=body["engine"],
            prompt=body["prompt"],
            sampling=body["sampling"],
            guide=body["guide"],
            ids=answer["ids"],
            finish=answer["finish"],
            logprobs=answer["logprobs"],
            exact=answer["exact"],
            signer=statement.signer,
        )
    except (LookupError, TypeError) as error:
        raise RecordError(f"{where}: a receipt without {error}") from None


def _whole(ids: Any) -> bool:
    """Whether these are token ids. JSON's `true` is no 1 and 1.0 is none either, though Python takes them for it."""
    return isinstance(ids, list) and bool(ids) and all(type(token) is int and token >= 0 for token in ids)


def logprob_digest(logprobs: Sequence[float]) -> str:
    """SHA-256 over exact values: equal digests mean equal bits."""
    return _digest([exact(value) for value in logprobs])


def _digest(value: Any) -> str:
    return sha256_hex(canonical_json(value))
