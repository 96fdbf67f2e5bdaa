"""What `import glasklar` offers, as its first lines say it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import glasklar

model = glasklar.load(sys.argv[1])
assert callable(glasklar.train) and callable(glasklar.evaluate), "the room of training hides the verb"
[completion] = glasklar.Engine(model).generate([[1, 2, 3]], glasklar.SamplingParams(max_tokens=4))
[same] = glasklar.Engine(model.network, max_slots=1).generate([[1, 2, 3]], glasklar.SamplingParams(max_tokens=4))
assert completion.ids == same.ids
scores = glasklar.evaluate(sys.argv[1], problems=4, samples=2)
assert scores == glasklar.evaluate(model, problems=4, samples=2) and scores["tasks"]
assert glasklar.train(sys.argv[2], run=sys.argv[1]).is_dir()  # finished: nothing is left to do
assert callable(glasklar.train)
assert glasklar.verify(sys.argv[1]).verdict == "holds"
for name in glasklar.__all__:
    assert getattr(glasklar, name) is not None
"""


def test_the_names_of_the_first_page(smoke_run: Path, tmp_path: Path) -> None:
    environ = {**os.environ, "GLASKLAR_HOME": str(tmp_path)}
    recipe = str(smoke_run / "recipe.toml")
    command = [sys.executable, "-c", PROGRAM, str(smoke_run), recipe]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
