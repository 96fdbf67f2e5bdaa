"""Renders one chat template in a process of its own. Started by `template.py`; imports nothing of the project.

A template is code by whoever published the model. Jinja's immutable sandbox keeps it from Python's objects; this
process keeps it from the machine: no files, no further processes, little memory and processor time. Even an escape
from the sandbox would find nothing to write to and no key to steal (the environment is empty).

Requests and replies are lines of JSON. The first request, {"source": TEMPLATE, "memory": BYTES, "seconds": OF PROCESSOR
TIME, "output": CHARACTERS}, is answered by {} once all is imported; each further one is the table of the template's
variables. Replies: {"text": …} or {"error": …}; a rendering that takes too long ends the process.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


def confine(memory: int) -> None:
    """Takes away what rendering a text does not need. Windows has no such limits; there the parent's clock remains."""
    try:
        import resource
    except ImportError:
        return
    for limit, value in (
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, memory),
    ):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value, value) if hard == resource.RLIM_INFINITY else (min(value, hard),) * 2)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as the templates of the hub expect it: transformers' settings and helpers."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    del made.globals["lipsum"]
    return made


def to_json(value: object, indent: int | None = None, ensure_ascii: bool = False, **_: object) -> str:
    """Jinja's own escapes for HTML, which no model has learned."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def warm_up() -> None:
    """Whatever Jinja imports when it is first used, errors included, must be imported while files can be opened."""
    render(environment().from_string("{% for x in [1] %}{{ x | tojson }}{% endfor %}"), {}, 9)
    render(environment().from_string("{{ raise_exception('x') }}{{ strftime_now('%Y') }}"), {}, 9)
    render(environment().from_string("{{ strftime_now('%d %b %Y') }}{{ ''.__class__ }}"), {}, 99)


def refuse(message: str) -> None:
    """`raise_exception` of the templates: they say that they do not take these messages."""
    raise TemplateError(message)


def main() -> None:
    start = json.loads(sys.stdin.readline())
    warm_up()
    confine(start["memory"])
    answer({})
    template, fault = None, None
    try:
        with stopwatch(start["seconds"]):
            template = environment().from_string(start["source"])
    except (TemplateError, MemoryError, RecursionError) as error:
        fault = f"{type(error).__name__}: {error}"
    for line in sys.stdin:
        variables = json.loads(line)
        with stopwatch(start["seconds"]):
            reply = {"error": fault} if template is None else render(template, variables, start["output"])
        answer(reply)


@contextlib.contextmanager
def stopwatch(seconds: float) -> Iterator[None]:
    """Ends the process, in the middle of whatever it computes, after so much processor time."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def answer(reply: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def render(template: object, variables: dict[str, object], most: int) -> dict[str, object]:
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(**variables):  # type: ignore[attr-defined]
            size += len(piece)
            if size > most:
                return {"error": f"it writes more than {most} characters"}
            pieces.append(piece)
    except MemoryError:
        return {"error": "it asks for more memory than a template may have"}
    except Exception as error:  # templates fail in as many ways as programs do; the caller learns which
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"text": "".join(pieces)}


if __name__ == "__main__":
    main()
