"""Child processes that start at once: forks of a server that has imported everything and computed nothing."""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "streamslr.cli",
        "streamslr.run.loop",
        "streamslr.run.context",
        "streamslr.results.export",
        "streamslr.finetune",
        "transformers.models.llama.modeling_llama",
    ]
)


class Child:
    """Child process that calls a function."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        self._process = _context.Process(target=_child, args=(target, *args))
        self._process.start()

    def join(self, seconds: float | None = None) -> int | None:
        """Return its exit code, negative for a signal; None where it still works after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self._process.kill()
        self._process.join()


def exit_code(target: Callable[..., None], *args: Any, timeout: float | None = None) -> int:
    """Call a function in a child and return its exit code, negative for a signal.

    Raises:
        TimeoutError: The child was killed after `timeout` seconds.
    """
    child = Child(target, *args)
    code = child.join(timeout)
    if code is None:
        child.kill()
        raise TimeoutError(f"{args} took more than {timeout} s")
    return code


def _child(target: Callable[..., None], *args: Any) -> None:
    gc.freeze()  # what the server imported is no garbage
    target(*args)


def streamslr_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command `streamslr` as a user does, in a child of its own."""
    return call_in_child(_streamslr, [str(argument) for argument in arguments])


def python_script(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a Python script as `python SCRIPT` does, in a child of its own."""
    return call_in_child(_script, [str(script), *map(str, arguments)])


def call_in_child(
    target: Callable[[list[str]], None], line: list[str], timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Call a function of a list of texts in a child, and return its exit code and what it printed.

    Raises:
        TimeoutError: As `exit_code`.
    """
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        code = exit_code(_redirected, target, line, stdout.name, stderr.name, dict(os.environ), timeout=timeout)
        return subprocess.CompletedProcess(line, code, stdout.read().decode(), stderr.read().decode())


def _redirected(
    target: Callable[[list[str]], None], line: list[str], stdout: str, stderr: str, environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    target(line)


def _streamslr(arguments: list[str]) -> None:
    from streamslr.cli import main

    main(arguments, prog_name="streamslr")


def _script(line: list[str]) -> None:
    sys.argv = line
    sys.path.insert(0, str(Path(line[0]).parent))
    runpy.run_path(line[0], run_name="__main__")
