"""The command line: arguments -> RunConfig, tables and bars; the only place that prints."""

import dataclasses
import json
import logging
import os
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import NoneType
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from streamslr.config import RunConfig, parse_bytes
from streamslr.errors import InputError, StreamslrError

# The libraries behind the commands take seconds to import, so each command imports its own: --help stays instant.

# OpenMP threads that only spin while they wait slow each other where other processes want the cores (demo run beside
# two of them: 69 s, and 22 s where they do not spin). Short spins keep the speed alone. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_INTERRUPTED = 130  # as a shell reports a process ended by Ctrl-C


class _Size(click.ParamType[int]):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


def _run_options(optional: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option for every field of RunConfig: name, type, default and help come from there."""
    hints = typing.get_type_hints(RunConfig)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for field in reversed(dataclasses.fields(RunConfig)):
            flag = "--" + field.name.replace("_", "-")
            kinds = [kind for kind in (*typing.get_args(hints[field.name]), hints[field.name]) if kind is not NoneType]
            settings: dict[str, Any] = {"help": field.metadata["help"]}
            if field.default is dataclasses.MISSING:
                settings["required"] = field.name != optional
            else:
                settings |= {"default": field.default, "show_default": field.default is not None}
            if kinds[0] is bool:
                settings["is_flag"] = True
                flag += f"/--no-{flag[2:]}" if field.default else ""
            elif field.name.endswith("_mem"):
                settings["type"] = _Size()
            else:
                settings["type"] = click.Path(path_type=Path) if kinds[0] is Path else kinds[0]
            command = click.option(flag, field.name, **settings)(command)
        return command

    return decorate


_json_option = click.option("--json", "as_json", is_flag=True, help="Only JSON on stdout, for programs.")
_quiet_option = click.option("--quiet", is_flag=True, help="No progress on the terminal; warnings and errors stay.")
_folder_argument = click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))


@click.group(context_settings={"max_content_width": 110})
@click.version_option(package_name="streamslr")
def main() -> None:
    """Make a language model that is bigger than your GPU smaller, one block at a time: W ≈ S + U·V.

    Exit codes: 0 done, 1 failed or verify found something, 2 wrong input, 3 does not fit memory or disk,
    4 the output folder belongs to another run, 5 the hub could not be reached, 130 interrupted.
    """


@main.command()
@_run_options()
@_quiet_option
@click.option("--log-file", type=click.Path(path_type=Path), help="Append a line a block, and every warning, to FILE.")
def run(quiet: bool, log_file: Path | None, **settings: Any) -> None:
    """Compress a model into --out; the same line again goes on where it stopped."""
    with _errors_and_interrupts(f"the same line goes on in {settings['out']}"):
        config = RunConfig(**settings)
        with _logging(quiet, log_file) as console:
            _quiet_libraries()
            from streamslr.results.inspect import run_table
            from streamslr.run.context import open_run
            from streamslr.run.loop import run as compress
            from streamslr.run.progress import LiveDisplay

            context = open_run(config)
            if not quiet:
                console.print(context.plan.table(context.host_mem, context.gpu_mem))
            live = not quiet and console.is_terminal
            with LiveDisplay(console, context.host_mem) if live else nullcontext() as display:
                state = compress(context, display)
            if not quiet:
                console.print(run_table(config.out, state))


@main.command()
@_run_options(optional="out")
@_json_option
def plan(as_json: bool, **settings: Any) -> None:
    """What a run would take, phase by phase, from headers alone; exit code 3 when it does not fit."""
    with _errors_and_interrupts():
        # without --out it plans for a new folder here
        out = settings["out"] or Path(f"{Path(settings['model']).name}-slr")
        config = RunConfig(**settings | {"out": out})
        _quiet_libraries()
        from streamslr.run.context import open_run

        context = open_run(config)
        if as_json:
            _print_json(
                context.plan.as_dict() | {"host_budget_bytes": context.host_mem, "gpu_budget_bytes": context.gpu_mem}
            )
        else:
            _console().print(context.plan.table(context.host_mem, context.gpu_mem))
        context.require_fit()


@main.command()
@_json_option
def methods(as_json: bool) -> None:
    """The methods that --method takes, those of other packages too: paper, needs, what they allow."""
    with _errors_and_interrupts():
        from streamslr.solvers.methods import all_methods, methods_table

        found = all_methods()
        if as_json:
            _print_json([method.as_dict() for method in found])
        else:
            _console().print(methods_table(found))


@main.command()
@_folder_argument
@click.option("--block", type=int, help="Show the linears of this block, counted from 0.")
@click.option("--allocation", is_flag=True, help="Pattern and rank of each linear, as `run --allocation` reads them.")
@_json_option
def inspect(folder: Path, block: int | None, allocation: bool, as_json: bool) -> None:
    """What each block's shard holds, and how good it is; finished or not."""
    with _errors_and_interrupts():
        from streamslr.results import inspect as view

        state = view.read_run(folder)
        if allocation:
            _print_json(view.get_allocation(state))
            return
        if block is None:
            shown = view.summary(folder, state) if as_json else view.run_table(folder, state)
        else:
            one = view.get_block(state, block)
            shown = view.block_summary(folder, one) if as_json else view.block_table(folder, one)
        if as_json:
            _print_json(shown)
        else:
            _console().print(shown)


@main.command()
@_folder_argument
@_json_option
@_quiet_option
def verify(folder: Path, as_json: bool, quiet: bool) -> None:
    """Check every digest, pattern, value and file again; exit code 1 when anything is off."""
    with _errors_and_interrupts():
        _quiet_libraries()
        from streamslr.results.verify import verify as check

        with _bar("verify", shown=not (quiet or as_json)) as step:
            result = check(folder, step)
        if as_json:
            _print_json(dataclasses.asdict(result))
        else:
            for file, problem in result.problems:
                click.echo(f"{file}: {problem}")
            advice = "; delete what is damaged and start the same run again to make it anew"
            verdict = f"{len(result.problems)} problems{advice}" if result.problems else "all sound"
            unfinished = "" if result.complete else " (an unfinished run: what is there was checked)"
            click.echo(f"{folder}: {result.files} shards, {result.tensors} tensors, {verdict}{unfinished}")
        if result.problems:
            sys.exit(1)


@main.command()
@_folder_argument
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="HTML file [default: FOLDER/report.html].")
def report(folder: Path, out: Path | None) -> None:
    """One HTML page of what was compressed and how well, finished or not; prints its path."""
    with _errors_and_interrupts():
        from streamslr.results.report.page import write_report

        click.echo(str(write_report(folder, out)))


@main.command()
@_folder_argument
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--to",
    type=click.Choice(["dense", "peft"]),
    required=True,
    help="dense: W = S + U·V, one transformers folder. peft: OUT/base holds S, OUT/adapter U·V as a LoRA.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of every weight [default: as it is stored: exact for peft; for dense the sum S + U·V is rounded to it, which "
    "in bfloat16 can change generated text; with float32 dense generates what FOLDER does, in twice the bytes].",
)
@_quiet_option
def export(folder: Path, out: Path, to: str, dtype: str | None, quiet: bool) -> None:
    """Write a compressed FOLDER into OUT for software that does not know the format; the same line goes on."""
    with _errors_and_interrupts(f"the same line goes on in {out}", kept="shards"):
        _quiet_libraries()
        import torch

        from streamslr.results import export as exporting

        with _bar("export", shown=not quiet) as step:
            result = exporting.export(folder, out, to, getattr(torch, dtype) if dtype else None, step)
        already = f", {result.shards - result.made} of them were there" if result.made < result.shards else ""
        click.echo(f"{out}: {result.shards} shards, {result.nbytes:,} bytes, read back and equal{already}")
        if to == "dense":
            click.echo(f'load it: AutoModelForCausalLM.from_pretrained("{out}")')
        else:
            click.echo(f'load it: peft.AutoPeftModelForCausalLM.from_pretrained("{out}/adapter")')
            rank = exporting.vllm_max_lora_rank(result.rank)
            base, adapter = (shlex.quote(f"{out}/{part}") for part in ("base", "adapter"))
            lora = f"--enable-lora --max-lora-rank {rank} --lora-modules slr={adapter}"
            too_large = f"rank {result.rank} is more than vLLM takes in a LoRA; for vLLM export it --to dense"
            click.echo(f"serve it: vllm serve {base} {lora}" if rank else too_large)


@main.command()
@_folder_argument
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Text: .txt, .jsonl, .gz of either.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="New folder.")
@click.option("--seq-len", type=click.IntRange(2), default=2048, show_default=True, help="Tokens in a window.")
@click.option("--epochs", type=click.IntRange(1), default=1, show_default=True, help="Passes over the text.")
@click.option("--steps", type=click.IntRange(1), help="Only so many steps, instead of --epochs.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Windows in a step.")
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=2e-3, show_default=True, help="Relative to U, V."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the windows.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@_quiet_option
def finetune(folder: Path, quiet: bool, **settings: Any) -> None:
    """Train U and V of a compressed FOLDER on text, S frozen and packed, and write the result into --out."""
    with _errors_and_interrupts(f"the same line goes on in {settings['out']}.partial", kept="checkpoints"):
        _quiet_libraries()
        from streamslr.finetune import finetune as train

        with _logging(quiet, None):
            record = train(folder, **settings)
        click.echo(
            f"{settings['out']}: held-out loss {record.loss_before:.4f} before, {record.loss_after:.4f} after "
            f"{record.steps} steps on {record.data}"
        )


@main.command()
@click.argument("model")
@click.option(
    "--text", type=click.Path(path_type=Path, exists=True), help="Perplexity on this: .txt, .jsonl, .gz of either."
)
@click.option("--seq-len", type=click.IntRange(2), default=2048, show_default=True, help="Tokens in a window of it.")
@click.option("--windows", type=click.IntRange(1), help="Only the first so many of these windows [default: all].")
@click.option("--scratch", type=click.Path(path_type=Path), help="Folder for hidden states that memory cannot hold.")
@click.option("--tasks", help="Tasks of lm-evaluation-harness, like arc_easy,piqa; `papers` is the papers' eight.")
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples before each question [default: the task's own].")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many questions of each task.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Questions at a time.")
@click.option("--include-path", type=click.Path(path_type=Path, exists=True), help="Folder of more tasks, in YAML.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@_json_option
@_quiet_option
def eval(
    model: str,
    text: Path | None,
    seq_len: int,
    windows: int | None,
    scratch: Path | None,
    tasks: str | None,
    as_json: bool,
    quiet: bool,
    revision: str | None,
    device: str | None,
    **settings: Any,
) -> None:
    """Perplexity (--text) or scores (--tasks) of MODEL, a compressed folder or a dense checkpoint.

    For --text the model is streamed block by block; for --tasks it is loaded whole, and `pip install
    'streamslr[eval]'` brings the harness.
    """
    with _errors_and_interrupts():
        if text is None and tasks is None:
            raise InputError("nothing to evaluate on: give --text FILE, --tasks NAME,…, or both")
        shown = not (quiet or as_json)
        if not shown:
            os.environ["TQDM_DISABLE"] = "1"  # the bars of the harness's libraries; read when tqdm is imported
        _quiet_libraries()
        found: dict[str, Any] = {}
        if tasks is not None:  # first: their names are checked before any work
            from streamslr.results.tasks import evaluate_tasks, task_table

            scores = evaluate_tasks(
                model, tasks.split(","), revision=revision, device=device, progress=shown, **settings
            )
            found |= dataclasses.asdict(scores)
            if not as_json:
                _console().print(task_table(scores))
        if text is not None:
            from streamslr.memory import free_host_memory
            from streamslr.results.evaluate import evaluate

            with _bar("eval", shown) as step:
                result = evaluate(
                    model,
                    text,
                    seq_len,
                    windows=windows,
                    scratch=scratch,
                    revision=revision,
                    device=device,
                    free_memory=free_host_memory(),
                    step=step,
                )
            found |= dataclasses.asdict(result)
            if not as_json:
                click.echo(
                    f"{model}: perplexity {result.perplexity:.4f} on {result.windows:,} windows of "
                    f"{result.seq_len:,} tokens of {text} ({result.dtype} on {result.device})"
                )
        if as_json:
            _print_json(found)


def _console(stderr: bool = False) -> Console:
    """The terminal, at its width; a file or pipe gets lines wide enough for the tables."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=120)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


@contextmanager
def _bar(name: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)  # where it is no terminal, a bar would leave an empty line
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _errors_and_interrupts(how_to_go_on: str | None = None, kept: str = "blocks") -> Iterator[None]:
    """A user's mistake, a full disk, Ctrl-C: one message and an exit code, no traceback."""

    def on_terminate(*_: object) -> None:  # what batch systems send; a process that must end says so once
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
        message = f"; finished {kept} are kept, and {how_to_go_on}" if how_to_go_on else ""
        click.echo(f"streamslr: interrupted{message}", err=True)
        sys.exit(_INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _logging(quiet: bool, log_file: Path | None) -> Iterator[Console]:
    """Log lines on the terminal (a line a block where it is no terminal) and, with times, in the log file."""
    from rich.logging import RichHandler

    console = _console()
    logger = logging.getLogger("streamslr")
    logger.setLevel(logging.INFO)
    shown = RichHandler(console=_console(stderr=True) if quiet else console, show_path=False, markup=False)
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


def _quiet_libraries() -> None:
    """Our own progress and messages say it; the libraries' bars would tear the display."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.ERROR)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
