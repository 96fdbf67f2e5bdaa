"""Pulling from a hub of our own on the loopback address: pinned, resumed, recorded; and the names that models go by."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from glasklar.errors import CapacityError, CheckpointError
from glasklar.hub import RECORD, is_id, pull
from glasklar.loading import find_model, name_of

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.filterwarnings("ignore")

COMMIT, LATER = "a" * 40, "b" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * (96 << 10),  # the library keeps whole pieces of 10 MB
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"import os",
    "original/other.safetensors": b"x",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a download asks for. `broken`: connections end in the middle of a file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        state = self.server.state  # type: ignore[attr-defined]
        path = self.path.split("?")[0]
        state["asked"].append(f"{self.command} {path}")
        if path.startswith("/api/models/org/tiny/tree/"):
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in FILES.items()
            ]
            self.send(200, json.dumps(tree).encode(), {"content-type": "application/json"})
        elif path.startswith("/api/models/org/"):
            names = FILES if "/tiny" in path else {"pytorch_model.bin": b""}
            commit = path.rsplit("/", 1)[1] if "/revision/" in path else state["head"]
            body = {"id": "org/tiny", "sha": state["head"] if commit == "main" else commit}
            body["siblings"] = [{"rfilename": name} for name in names]  # type: ignore[assignment]
            self.send(200, json.dumps(body).encode(), {"content-type": "application/json"})
        elif path.startswith("/org/tiny/resolve/"):
            commit, name = path.removeprefix("/org/tiny/resolve/").split("/", 1)
            self.file(FILES[name], commit, state)
        else:
            self.send(404, b"{}", {"x-error-code": "RepoNotFound"})

    def file(self, content: bytes, commit: str, state: dict) -> None:
        headers = {
            "etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "x-repo-commit": commit,
            "accept-ranges": "bytes",
        }
        start = int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            state["resumed"].append(start)
        self.send(206 if start else 200, content[start:], headers, cut=state["broken"] and len(content) > 1000)

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut


@pytest.fixture
def hub() -> Iterator[tuple[str, dict]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = {"asked": [], "resumed": [], "broken": False, "head": COMMIT}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", server.state  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_pull_fetches_what_a_model_needs_and_records_the_commit(hub: tuple[str, dict], tmp_path: Path) -> None:
    endpoint, _ = hub
    folder = pull("org/tiny", tmp_path, endpoint=endpoint)
    there = {path.name for path in folder.iterdir() if path.is_file()}
    assert there == {"config.json", "model.safetensors", RECORD}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    record = json.loads((folder / RECORD).read_text())
    assert (record["id"], record["revision"]) == ("org/tiny", COMMIT)
    assert record["files"]["model.safetensors"] == [24 << 20, hashlib.sha256(FILES["model.safetensors"]).hexdigest()]
    assert find_model("org/tiny", tmp_path) == folder
    assert name_of(folder) == "org/tiny"


def test_another_revision_is_not_mixed_in(hub: tuple[str, dict], tmp_path: Path) -> None:
    endpoint, state = hub
    folder = pull("org/tiny", tmp_path, endpoint=endpoint)
    state["head"] = LATER
    with pytest.raises(CheckpointError, match=f"at {COMMIT}, asked for is {LATER}"):
        pull("org/tiny", tmp_path, endpoint=endpoint)
    assert pull("org/tiny", tmp_path, endpoint=endpoint, revision=COMMIT) == folder


def test_a_broken_download_goes_on_where_it_stopped(hub: tuple[str, dict], tmp_path: Path) -> None:
    endpoint, state = hub
    state["broken"] = True
    with pytest.raises(CapacityError, match="same command again"):
        pull("org/tiny", tmp_path, endpoint=endpoint)
    with pytest.raises(CheckpointError, match=r"only a part of it is here; fetch it with: glasklar pull org/tiny"):
        find_model("org/tiny", tmp_path)
    state["broken"] = False
    assert state["resumed"], "broken connections are taken up again within one command"
    state["asked"].clear()
    folder = pull("org/tiny", tmp_path, endpoint=endpoint)
    again = [asked for asked in state["asked"] if asked.startswith("GET") and "resolve" in asked]
    assert again == [f"GET /org/tiny/resolve/{COMMIT}/model.safetensors"], "files that are complete stay"
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_pickles_and_unknown_ids_are_refused(hub: tuple[str, dict], tmp_path: Path) -> None:
    endpoint, state = hub
    with pytest.raises(CheckpointError, match=r"has no safetensors files, only pytorch_model\.bin"):
        pull("org/pickled", tmp_path, endpoint=endpoint)
    with pytest.raises(CheckpointError, match="no such model"):
        pull("nobody/nothing", tmp_path, endpoint=endpoint)
    assert not [asked for asked in state["asked"] if "resolve" in asked]
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("name", ["../../etc", "org/../x", "org", "a/b/c", "org/--x", "/etc/passwd", "org/x\n"])
def test_names_that_are_no_ids(name: str, tmp_path: Path) -> None:
    assert not is_id(name)
    with pytest.raises(CheckpointError, match="no id of the hub"):
        pull(name, tmp_path)


def test_names_without_a_model_say_what_to_do_and_fetch_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="glasklar pull org/tiny"):
        find_model("org/tiny", tmp_path)
    (tmp_path / "runs" / "spark").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="did you mean 'spark'"):
        find_model("sparc", tmp_path)
