"""Output of the commands: tables, JSON, bars, log lines, and one message and exit code for each failure."""

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress
from rich.table import Table

from streamslr.errors import StreamslrError

_INTERRUPTED = 130  # the exit code that a shell reports for a process ended by Ctrl-C


def make_console(stderr: bool = False) -> Console:
    """Return the terminal, at its width; a file or pipe gets lines of 120 characters."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=120)


def print_table(table: Table) -> None:
    """Print a table; a file or pipe gets its full width."""
    console = make_console()
    if not console.is_terminal:
        console.width = max(console.width, Console(width=1000).measure(table).maximum)
    console.print(table)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


@contextmanager
def show_bar(name: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, and yield the function that moves it: (done, total)."""
    console = Console(stderr=True)  # where it is no terminal, a bar would leave an empty line
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def report_errors(how_to_go_on: str | None = None, parts: str = "blocks") -> Iterator[None]:
    """Turn a user's mistake, a full disk or Ctrl-C into one message and an exit code, without a traceback.

    Args:
        how_to_go_on: Advice after an interruption; None where nothing can be continued.
        parts: Name of the finished parts that an interruption leaves.
    """

    def on_terminate(*_: object) -> None:  # batch systems send SIGTERM
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    except StreamslrError as error:
        click.echo(f"streamslr: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"streamslr: {error}", err=True)
        sys.exit(StreamslrError.exit_code)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        message = f"; finished {parts} are kept, and {how_to_go_on}" if how_to_go_on else ""
        click.echo(f"streamslr: interrupted{message}", err=True)
        sys.exit(_INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def send_log(quiet: bool, log_file: Path | None) -> Iterator[Console]:
    """Send log lines to the terminal and, with times, to the log file; yield the console of the command."""
    console = make_console()
    logger = logging.getLogger("streamslr")
    logger.setLevel(logging.INFO)
    shown = RichHandler(console=make_console(stderr=True) if quiet else console, show_path=False, markup=False)
    shown.setLevel(logging.WARNING if quiet else logging.INFO)
    handlers: list[logging.Handler] = [shown]
    if log_file:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield console
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def silence_libraries() -> None:
    """Turn off the bars and messages of the libraries, which would tear our display."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity(logging.ERROR)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
