"""Shared fixtures: one thread and fp32-exact settings, so that tests give the same bits wherever they run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from glasklar.runtime import Runtime, prepare, start
from smoke import SMOKE

# Before torch is loaded by any test.
prepare(int(os.environ.get("GLASKLAR_THREADS", "2")))

# Keys and runs of the commands under test; never the ones of whoever runs the tests.
os.environ["GLASKLAR_HOME"] = tempfile.mkdtemp(prefix="glasklar-test-home-")


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return start(int(os.environ["OMP_NUM_THREADS"]), device="cpu")


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime) -> Path:
    """A finished run of the smoke recipe, made once for all tests; read it, do not change it."""
    from glasklar import api

    home = tmp_path_factory.mktemp("home")
    return api.train(str(SMOKE), runtime=runtime, home=home)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory):
    """Where servers under test stand: free ports of the loopback address, keys and usage in a folder of their own."""
    from glasklar.serve.server import Site

    return Site(home=tmp_path_factory.mktemp("serve-home"), port=0)
