"""Oracle: git itself on a repository made here; the machine's names must not show."""

import getpass
import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from glasklar.provenance.environment import code_identity, describe_environment, files_hash, installed_versions


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path):
    package = tmp_path / "repo" / "package"
    package.mkdir(parents=True)
    (package / "a.py").write_text("a = 1\n")
    return package


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_identity_against_git(package):
    assert code_identity(package)["git"] is None
    git(package.parent, "init", "-q")
    assert code_identity(package)["git"] is None, "inside somebody's checkout, but not tracked by it"
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "first")
    clean = code_identity(package)
    assert clean["git"] == {
        "commit": git(package, "rev-parse", "HEAD"),
        "tree": git(package, "rev-parse", "HEAD^{tree}"),
        "dirty": False,
    }
    (package / "b.py").write_text("")
    dirty = code_identity(package)
    assert dirty["git"] == {**clean["git"], "dirty": True}
    assert dirty["files"] != clean["files"]


def test_files_hash_sees_names_and_contents_only(package):
    first = files_hash(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_bytes(b"x")
    assert files_hash(package) == first
    (package / "a.py").rename(package / "b.py")
    assert files_hash(package) != first


def test_versions_follow_requirements():
    versions = installed_versions()
    assert {"torch", "safetensors", "numpy", "typing-extensions"} <= versions.keys()
    assert "pytest" not in versions, "an extra"


def test_nothing_of_the_machine_is_named():
    text = json.dumps(describe_environment({"MKL_CBWR": "COMPATIBLE", "HOME": "/home/x", "TOKEN": "secret"}))
    assert "COMPATIBLE" in text
    for private in ("secret", "/home", str(Path(__file__).parents[2]), socket.gethostname(), f'"{getpass.getuser()}"'):
        assert private not in text
