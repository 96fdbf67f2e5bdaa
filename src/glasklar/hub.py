"""Models from the Hugging Face hub: fetched when the user says `glasklar pull`, pinned to one revision, and recorded.

    home/hub/ORG--NAME/            config, tokenizer, safetensors
    home/hub/ORG--NAME/pulled.json what was fetched: id, revision (commit), size and SHA-256 of every file

Nothing else in the project reaches the network.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from glasklar.errors import CapacityError, CheckpointError, GlasklarError
from glasklar.provenance.files import write_atomic
from glasklar.provenance.hashing import sha256_file

RECORD = "pulled.json"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# Weights as safetensors alone: pickles run code when they are opened. No code of the repository either.
WANTED = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "LICENSE*", "README.md")
_FORBIDDEN = "--"  # stands for the slash in the folder's name


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """A model as it came. `files`: name -> [bytes, SHA-256]."""

    id: str
    revision: str
    files: dict[str, tuple[int, str]]


def is_id(name: str) -> bool:
    """Whether a name has the form ORG/NAME of the hub."""
    return _ID.fullmatch(name) is not None and ".." not in name and _FORBIDDEN not in name


def folder_of(name: str, home: Path) -> Path:
    """Where the model of a hub id lies, or would lie."""
    return home / "hub" / name.replace("/", _FORBIDDEN)


def pull(name: str, home: Path, *, revision: str | None = None, endpoint: str | None = None) -> Path:
    """Fetches a model, or the files of it that are still missing, and returns its folder. Progress goes to stderr.

    A broken connection is taken up again where it broke; a command that was ended begins anew with the file under way.

    revision   a branch, tag or commit; default: the main branch as it is now. The commit is recorded in pulled.json
    endpoint   another hub than huggingface.co

    Raises CheckpointError: no such id or revision, no safetensors, an incomplete copy of another revision;
    CapacityError: the hub cannot be reached, or the disk is full.
    """
    if not is_id(name):
        raise CheckpointError(f"{name!r}: no id of the hub; it has the form ORG/NAME")
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise CheckpointError("pull needs the package huggingface_hub: pip install 'glasklar[hub]'") from None
    folder = folder_of(name, home)
    try:
        info = hub.HfApi(endpoint=endpoint).model_info(name, revision=revision)
        commit = str(info.sha)
        _check(name, [sibling.rfilename for sibling in info.siblings or []])
        _check_pin(folder, name, commit)
        hub.snapshot_download(
            name,
            revision=commit,
            local_dir=folder,
            allow_patterns=list(WANTED),
            ignore_patterns=["*/*"],
            endpoint=endpoint,
            max_workers=2,
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        where = f"{name} at {revision}" if revision else name
        raise CheckpointError(f"{where}: the hub has no such model, or hides it ({error})") from None
    except HfHubHTTPError as error:
        raise CapacityError(f"{name}: the hub refuses ({error}); run the same command again to go on") from None
    except GlasklarError:
        raise
    except Exception as error:  # the library has changed its transport before (requests, httpx), and so the errors
        raise CapacityError(f"{name}: not fetched ({error}); run the same command again to go on") from None
    record = Pulled(id=name, revision=commit, files=_files(folder))
    write_atomic(folder / RECORD, json.dumps(asdict(record), indent=2, sort_keys=True).encode())
    return folder


def _check(name: str, files: list[str]) -> None:
    if not any(file.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"{name}: has no safetensors files, only {', '.join(sorted(files)[:6]) or 'nothing'}; pickles run code "
            "when they are opened and are not loaded: look for the model under another id"
        )


def _check_pin(folder: Path, name: str, commit: str) -> None:
    """One folder holds one revision: files of two would not fit each other."""
    path = folder / RECORD
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))["revision"]
        if there != commit:
            raise CheckpointError(
                f"{folder}: holds {name} at {there}, asked for is {commit}; keep it with --revision {there}, or remove "
                "the folder to fetch the other one"
            )


def _files(folder: Path) -> dict[str, tuple[int, str]]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and ".cache" not in path.parts]
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, sha256_file(path))
        for path in paths
        if path.name != RECORD
    }
