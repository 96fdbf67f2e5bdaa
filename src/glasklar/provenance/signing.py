"""Signatures: one Ed25519 key a user, and what it signs: in-toto statements in DSSE envelopes.

    {"payload": base64 of the statement, "payloadType": "application/vnd.in-toto+json",
     "signatures": [{"keyid": SHA-256 of the public key, "sig": base64}]}

A statement names its subjects by SHA-256 and says something of them (its predicate). The public key stands in the
predicate, under the signature, so that an envelope can be checked without asking anybody. That shows that nothing
changed since somebody signed; *who* that was only a fingerprint known from elsewhere can show.

Formats: DSSE v1.0.2 (protocol.md), in-toto Attestation Framework v1 (spec/v1/statement.md).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from glasklar.errors import RecordError
from glasklar.provenance.files import write_all, writing
from glasklar.provenance.hashing import canonical_json, sha256_hex, strict_json

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
KEY_FILE = "ed25519.pem"
_PUBLIC_MODE = 0o077  # permissions of anybody but the owner


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What was signed. subjects: name -> SHA-256. signer: fingerprint of the key."""

    kind: str
    subjects: dict[str, str]
    predicate: dict[str, Any]
    signer: str


class Signer:
    """Holds a private key. Its `fingerprint` is what others compare."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()

    @classmethod
    def open(cls, home: Path) -> Self:
        """The user's key in `home`/keys, made on first use; readable by its owner alone.

        Raises RecordError for a file that is no such key or that others may read.
        """
        path = home / "keys" / KEY_FILE
        if not path.exists():
            _make_key(path)
        try:
            if path.stat().st_mode & _PUBLIC_MODE:
                raise RecordError(f"{path}: others may read this private key; run: chmod 600 {path}")
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise RecordError(f"{path}: no readable key ({error}); restore it, or move it away to get a new") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise RecordError(f"{path}: not an Ed25519 key; move it away to get a new one")
        return cls(key)

    @property
    def fingerprint(self) -> str:
        return sha256_hex(self.public)

    def sign(self, kind: str, subjects: Mapping[str, str], predicate: Mapping[str, Any]) -> dict[str, Any]:
        """The envelope of a statement of `kind` (a URI) about `subjects` (name -> SHA-256). Same input, same bytes."""
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": subjects[name]}} for name in sorted(subjects)],
            "predicateType": kind,
            "predicate": {**predicate, "signer": _text(self.public)},
        }
        payload = canonical_json(statement)
        signature = self._key.sign(_encoded(payload))
        return {
            "payload": _text(payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": self.fingerprint, "sig": _text(signature)}],
        }


def own_fingerprint(home: Path) -> str | None:
    """Fingerprint of this user's key; None where there is none yet."""
    return Signer.open(home).fingerprint if (home / "keys" / KEY_FILE).exists() else None


def open_envelope(envelope: Any, kind: str, where: str) -> Statement:
    """The statement of an envelope, its signature checked. Raises RecordError saying what is wrong; `where` names it.

    Nothing but the exact form that `sign` gives is accepted.
    """
    try:
        [signature] = envelope["signatures"]
        payload = _bytes(envelope["payload"])
        statement = strict_json(payload)
        if canonical_json(statement) != payload:
            raise RecordError(f"{where}: what was signed is not canonical JSON, which readers might take differently")
        public = _bytes(statement["predicate"].pop("signer"))
        subjects = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
        Ed25519PublicKey.from_public_bytes(public).verify(_bytes(signature["sig"]), _encoded(payload))
        whole = {
            "payload": _text(payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"keyid": sha256_hex(public), "sig": signature["sig"]}],
        }
        if envelope != whole or statement["_type"] != STATEMENT_TYPE or len(subjects) != len(statement["subject"]):
            raise RecordError(f"{where}: the envelope was changed after it was signed")
        if statement["predicateType"] != kind:
            raise RecordError(f"{where}: a statement about something else ({statement['predicateType']!r})")
    except InvalidSignature:
        raise RecordError(f"{where}: the signature does not fit: content or signature was changed") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RecordError(f"{where}: not a signed statement ({type(error).__name__}: {error})") from None
    return Statement(kind=kind, subjects=subjects, predicate=statement["predicate"], signer=sha256_hex(public))


def read_envelope(path: Path, kind: str) -> Statement:
    """The statement of an envelope's file, which must be canonical JSON to the byte. Raises RecordError."""
    try:
        content = path.read_bytes()
        envelope = strict_json(content)
        if canonical_json(envelope) + b"\n" != content:
            raise RecordError(f"{path.name}: not in the form in which it was written: it was changed")
    except OSError as error:
        raise RecordError(f"{path.name}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise RecordError(f"{path.name}: not JSON: it was changed or cut off") from None
    return open_envelope(envelope, kind, path.name)


def _make_key(path: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            write_all(descriptor, pem)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(temporary, path)  # unlike a rename it replaces no key that another process has just made
        except FileExistsError:
            return
        finally:
            temporary.unlink()


def _encoded(payload: bytes) -> bytes:
    """Pre-authentication encoding: what is signed (DSSE, protocol.md)."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str) -> bytes:
    """Strict: exactly one text means some bytes."""
    content = base64.b64decode(text, validate=True)
    if _text(content) != text:
        raise ValueError("not canonical base64")
    return content
