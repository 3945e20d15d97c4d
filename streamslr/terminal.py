"""Output of the commands: tables, JSON, bars, log lines, and one message and exit code for each failure."""

import json
import logging
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress
from rich.table import Table

from streamslr.config import format_bytes
from streamslr.errors import BudgetError, StreamslrError, first_line, says_out_of_memory
from streamslr.streams import output_is_gone

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
    """Turn a user's mistake, memory or a disk that ends, or Ctrl-C into one message and an exit code.

    Args:
        how_to_go_on: Advice after an interruption; None where nothing can be continued.
        parts: Name of the finished parts that an interruption leaves.
    """
    try:
        with _stop_signals():
            yield
    except StreamslrError as error:
        click.echo(f"streamslr: {error}", err=True)
        sys.exit(error.exit_code)
    except (MemoryError, ImportError, RuntimeError, OSError) as error:
        if says_out_of_memory(error):
            click.echo(f"streamslr: {_explain_lack_of_memory(error)}", err=True)
            sys.exit(BudgetError.exit_code)
        if not isinstance(error, OSError):
            raise
        click.echo(f"streamslr: {error}", err=True)
        sys.exit(StreamslrError.exit_code)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        message = f"; finished {parts} are kept, and {how_to_go_on}" if how_to_go_on else ""
        click.echo(f"streamslr: interrupted{message}", err=True)
        sys.exit(_INTERRUPTED)


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, and SIGHUP, which a closed terminal sends, do what Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with ExitStack() as restored:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                restored.callback(signal.signal, number, signal.signal(number, interrupt))
        yield


def _explain_lack_of_memory(error: Exception) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    limited = "" if limit == resource.RLIM_INFINITY else f" (ulimit -v allows {format_bytes(limit)} of address space)"
    return f"memory ran out: {first_line(error)}{limited}; free some, or raise the limit"


@contextmanager
def send_log(quiet: bool, log_file: Path | None) -> Iterator[Console]:
    """Send log lines to the terminal and, with times, to the log file; yield the console of the command."""
    console = make_console()
    logger = logging.getLogger("streamslr")
    logger.setLevel(logging.INFO)
    handlers: list[logging.Handler] = [_TerminalHandler(console, quiet)]
    logger.addHandler(handlers[0])
    if log_file:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(log_file))
            logger.addHandler(handlers[1])
        except OSError as error:
            logger.warning("--log-file %s cannot be written: %s; going on without it", log_file, error.strerror)
    try:
        yield console
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


class _TerminalHandler(RichHandler):
    """Log lines on the terminal; with --quiet, or once standard output is gone, only warnings, on standard error."""

    def __init__(self, console: Console, quiet: bool) -> None:
        super().__init__(logging.INFO, console, show_path=False, markup=False)
        if quiet:
            self._turn_quiet()

    def _turn_quiet(self) -> None:
        self.console = make_console(stderr=True)
        self.setLevel(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        if self.level < logging.WARNING and output_is_gone():
            self._turn_quiet()
            logging.getLogger("streamslr").warning("nobody reads standard output any more: going on as with --quiet")
        if record.levelno >= self.level:
            super().emit(record)


class _LogFile(logging.FileHandler):
    """Log file with times. It ends with one warning where it cannot be written any more."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._path = path
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        error = sys.exception()
        logger = logging.getLogger("streamslr")
        logger.removeHandler(self)
        with suppress(OSError):
            self.close()
        reason = error.strerror if isinstance(error, OSError) else error
        logger.warning("--log-file %s cannot be written any more: %s; going on without it", self._path, reason)


def silence_libraries() -> None:
    """Turn off the bars and messages of the libraries, which would tear our display."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity(logging.ERROR)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
