"""Output of the commands: tables, JSON, bars, log lines, and one message and exit code for each failure."""

import json
import logging
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress
from rich.table import Table
from safetensors import SafetensorError

from streamslr.config import RunConfig, format_bytes
from streamslr.errors import BudgetError, InputError, StreamslrError, first_line, says_disk_full, says_out_of_memory
from streamslr.printable import printable
from streamslr.streams import output_is_gone

_INTERRUPTED = 130  # the exit code that a shell reports for a process ended by Ctrl-C
_LONGEST_LINE = 4000
"""Characters of the longest message that is shown whole."""
_LEAST_ADDRESS_SPACE = 10**9
"""Bytes that Python, torch and transformers map before any work: 0.7 GB, and more for each thread."""
_NO_LOGS = (".json", ".safetensors", ".model", ".jinja", ".tiktoken", ".partial", "merges.txt", "vocab.txt")
"""Ends of names that files of a model or of a run have."""


def make_console(stderr: bool = False, width: int | None = None) -> Console:
    """Return the terminal, at its width; a file or pipe gets lines of 120 characters. Square brackets are text."""
    console = Console(stderr=stderr, width=width, markup=False, emoji=False)
    if console.is_terminal or width is not None:
        return console
    return make_console(stderr, width=120)


def say(message: str, err: bool = False) -> None:
    """Print one line; what does not print is escaped."""
    if len(message) > _LONGEST_LINE:
        message = f"{message[:_LONGEST_LINE]}… ({len(message):,} characters)"
    click.echo(printable(message), err=err)


def print_table(table: Table, full_width: bool = True) -> None:
    """Print a table, with what does not print escaped; a file or pipe gets its full width unless that is not asked."""
    _escape_table(table)
    console = make_console()
    if full_width and not console.is_terminal:
        console.width = max(console.width, make_console(width=1000).measure(table).maximum)
    console.print(table)


def _escape_table(table: Table) -> None:
    """Escape title, caption and cells; newlines stay where our own tables have them, in captions and headers."""
    if isinstance(table.title, str):
        table.title = printable(table.title)
    if isinstance(table.caption, str):
        table.caption = printable(table.caption, keep="\n")
    for column in table.columns:
        column._cells = [printable(cell) if isinstance(cell, str) else cell for cell in column._cells]


def print_json(value: Any) -> None:
    """Print JSON in ASCII; NaN and infinity, which JSON lacks, become null."""
    strict = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    click.echo(json.dumps(strict, indent=2))


@contextmanager
def show_bar(name: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, and yield the function that moves it: (done, total)."""
    console = make_console(stderr=True)  # where it is no terminal, a bar would leave an empty line
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def rank_and_world() -> tuple[int, int]:
    """Return the rank that torchrun gave this process, and the number of ranks; (0, 1) without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def report_errors(how_to_go_on: str | None = None, parts: str = "blocks") -> Iterator[None]:
    """Turn a user's mistake, memory or a disk that ends, or Ctrl-C into one message and an exit code.

    Args:
        how_to_go_on: Advice after an interruption; None where nothing can be continued.
        parts: Name of the finished parts that an interruption leaves.
    """
    if logging.lastResort:  # prints the warnings of commands without `send_log`
        logging.lastResort.setFormatter(_OneLine())
    number, world = rank_and_world()
    rank = f", rank {number}" if world > 1 else ""

    def tell(error: BaseException, message: str) -> None:
        if not getattr(error, "said_already", False):  # by another rank
            say(f"streamslr{rank}: {message}", err=True)

    try:
        with _stop_signals():
            yield
    except StreamslrError as error:
        tell(error, str(error))
        sys.exit(error.exit_code)
    except (MemoryError, ImportError, RuntimeError, OSError, SafetensorError) as error:
        if says_out_of_memory(error):
            tell(error, _explain_lack_of_memory(error))
            sys.exit(BudgetError.exit_code)
        if says_disk_full(error):
            advice = "free some space or give another folder, then start the same line again"
            tell(error, f"a file cannot be written: {first_line(error)}; {advice}")
            sys.exit(BudgetError.exit_code)
        if not isinstance(error, OSError) and "Too many open files" not in str(error):
            raise
        tell(error, str(error))
        sys.exit(StreamslrError.exit_code)
    except KeyboardInterrupt as interruption:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        message = f"; finished {parts} are kept, and {how_to_go_on}" if how_to_go_on else ""
        tell(interruption, f"interrupted{message}")
        sys.exit(_INTERRUPTED)


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, and SIGHUP, which a closed terminal sends, do what Ctrl-C does."""
    _, world = rank_and_world()
    numbers = (signal.SIGTERM, signal.SIGHUP, *([signal.SIGINT] if world > 1 else []))

    def interrupt(*_: object) -> None:
        if world > 1:  # torchrun sends more of them until its ranks have ended, and this one has a line to say
            restored.pop_all()
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with ExitStack() as restored:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                restored.callback(signal.signal, number, signal.signal(number, interrupt))
        yield


def require_address_space() -> None:
    """Raise BudgetError where `ulimit -v` is too low for the libraries; some of them end the process or hang there."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _LEAST_ADDRESS_SPACE:
        raise BudgetError(
            f"`ulimit -v` allows {format_bytes(limit)} of address space, and torch alone takes "
            f"{format_bytes(_LEAST_ADDRESS_SPACE)}; raise it, or unset it and give --host-mem"
        )


def _explain_lack_of_memory(error: Exception) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    limited = "" if limit == resource.RLIM_INFINITY else f" (ulimit -v allows {format_bytes(limit)} of address space)"
    return f"memory ran out: {first_line(error)}{limited}; free some, or raise the limit"


class _OneLine(logging.Formatter):
    """Formatter of log lines; what does not print is escaped, so that a name cannot forge a line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the name that logging gives it
        return printable(super().formatMessage(record))


def require_own_file(log_file: Path | None, config: RunConfig) -> None:
    """Raise InputError where log lines would be appended to a file of a model, of a run, or that the run reads."""
    if log_file is None:
        return
    inputs = [os.path.realpath(path) for path in (config.calibration, config.allocation, config.out) if path]
    if log_file.name.endswith(_NO_LOGS) or os.path.realpath(log_file) in inputs:
        raise InputError(
            f"--log-file {log_file} is the name of another file of the run; give one of its own, like run.log"
        )


@contextmanager
def send_log(quiet: bool, log_file: Path | None) -> Iterator[Console]:
    """Send log lines to the terminal and, with times, to the log file; yield the console of the command.

    Rank 0 speaks for all ranks that torchrun started: the others tell it what they would warn of.
    """
    console = make_console()
    logger = logging.getLogger("streamslr")
    logger.setLevel(logging.INFO)
    rank, _ = rank_and_world()
    if rank:
        logger.addHandler(logging.NullHandler())
        yield console
        return
    handlers: list[logging.Handler] = [_TerminalHandler(console, quiet)]
    logger.addHandler(handlers[0])
    if log_file:
        try:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666))  # waits for no pipe's reader
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
        self.setFormatter(_OneLine())
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
        self.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        error = sys.exception()
        logger = logging.getLogger("streamslr")
        logger.removeHandler(self)
        with suppress(OSError):
            self.close()
        reason = error.strerror if isinstance(error, OSError) else error
        logger.warning("--log-file %s cannot be written any more: %s; going on without it", self._path, reason)


def silence_libraries() -> None:
    """Turn off the bars and messages of the libraries, which would tear our display; their warnings take one line."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity(logging.ERROR)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    for handler in logging.getLogger("transformers").handlers:
        handler.setFormatter(_OneLine())
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    say(f"streamslr: warning: {message}", err=True)
