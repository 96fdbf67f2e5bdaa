"""Chat templates of foreign models: Jinja, which is code, so that it is rendered in a sandbox in a confined process."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glasklar.data import template_worker
from glasklar.errors import CapacityError, CheckpointError, RequestError
from glasklar.provenance.hashing import sha256_hex

CPU_SECONDS = 2.0  # of processor time for one rendering
WALL_SECONDS = 30.0  # for one rendering where the machine is busy, or does not measure processor time
START_SECONDS = 60.0  # for the process to begin
MEMORY = 1 << 29  # bytes of address space
MAX_OUTPUT = 1 << 22  # characters
MAX_SOURCE = 1 << 20  # bytes; the longest published templates have some 20,000
_HEADER = "tokenizer_config.json"
# How the worker's accounts of a failure begin for which no message can be blamed.
_MALICE = (
    *("SecurityError", "OverflowError", "RecursionError", "MemoryError", "TemplateSyntaxError"),
    *("it writes more", "it asks for more"),
)


def find_template(folder: Path) -> str | None:
    """The source of a folder's chat template, None where there is none. Raises CheckpointError for a damaged one."""
    own = folder / "chat_template.jinja"
    config = folder / _HEADER
    try:
        if own.is_file():
            return _checked(own.read_text(encoding="utf-8"), own)
        if not config.is_file():
            return None
        table = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: the chat template cannot be read ({error}); fetch the model again") from None
    found = table.get("chat_template") if isinstance(table, dict) else None
    if isinstance(found, list):  # several by name
        named = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return None if found is None else _checked(found, config)


def _checked(source: Any, path: Path) -> str:
    if not isinstance(source, str):
        raise CheckpointError(f"{path}: chat_template is no text; fetch the model again")
    if len(source.encode()) > MAX_SOURCE:
        raise CheckpointError(f"{path}: a chat template of more than {MAX_SOURCE:,} bytes is not accepted")
    return source


class ChatTemplate:
    """One template, ready to render from any thread; the process starts with the first rendering.

    origin   the folder it came from, for messages
    """

    def __init__(self, source: str, origin: str) -> None:
        self.source, self.origin = source, origin
        self.hash = sha256_hex(source.encode())
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, **variables: Any) -> str:
        """The text for `messages`, `add_generation_prompt` and whatever else the template knows.

        Raises RequestError where the template refuses the messages or fails over them, CheckpointError where it is no
        template, tries what none may, or takes more than `CPU_SECONDS`, `MEMORY` or `MAX_OUTPUT`: then do not use it.
        """
        with self._lock:
            try:
                reply = self._ask(variables)
            except BaseException:
                self._stop()
                raise
        if "text" in reply:
            return str(reply["text"])
        fault = str(reply.get("error"))
        said = f"the chat template of {self.origin} (sha256 {self.hash[:12]}) fails: {fault}"
        if fault.startswith(_MALICE):
            raise CheckpointError(f"{said}; do not use it")
        raise RequestError(said)

    def close(self) -> None:
        """Ends the process. Rendering again starts a new one."""
        with self._lock:
            self._stop()

    def __del__(self) -> None:
        self._stop()

    def _ask(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = _start()
            header = {"source": self.source, "memory": MEMORY, "seconds": CPU_SECONDS, "output": MAX_OUTPUT}
            if _exchange(self._process, header, START_SECONDS) is None:
                raise CapacityError("the process that renders chat templates does not start; try again, or free memory")
        answer = _exchange(self._process, variables, WALL_SECONDS)
        if answer is None:
            raise CheckpointError(
                f"the chat template of {self.origin} (sha256 {self.hash[:12]}) takes over {CPU_SECONDS:g} seconds, "
                f"{MEMORY >> 20} MiB or {MAX_OUTPUT >> 20} Mi characters for one rendering; do not use it"
            )
        return dict(json.loads(answer))

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def _start() -> subprocess.Popen[bytes]:
    # -I and no environment: nothing from outside decides what is imported, no secret is at hand. A session of its own:
    # Ctrl-C stops an answer, not this process.
    return subprocess.Popen(
        [sys.executable, "-I", template_worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        bufsize=0,
        start_new_session=True,
    )


def _exchange(process: subprocess.Popen[bytes], request: Mapping[str, Any], seconds: float) -> bytes | None:
    """The line that answers a request, None where the process ends, says nothing in time, or too much."""
    deadline = time.monotonic() + seconds
    line = json.dumps(request).encode() + b"\n"
    # What does not fit into the pipe waits for a reader who may hang: another thread waits in our place.
    threading.Thread(target=_feed, args=(process.stdin, line), daemon=True).start()
    return _read_line(process, deadline)


def _feed(pipe: Any, line: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # the process was ended meanwhile; the reader notices
        view = memoryview(line)
        while view:
            view = view[pipe.write(view) :]


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    assert process.stdout is not None
    line = bytearray()
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        piece = process.stdout.read(1 << 16) if ready else b""
        if not piece or len(line) > 8 * MAX_OUTPUT:
            return None
        line += piece
    return bytes(line)
