"""Command line: an option for each setting, a command for each job; terminal.py prints."""

import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_type_hints

import click

from streamslr.config import LARGEST, RunConfig, default_out, parse_bytes
from streamslr.errors import InputError
from streamslr.printable import printable
from streamslr.streams import make_streams_last
from streamslr.terminal import (
    print_json,
    print_table,
    rank_and_world,
    report_errors,
    require_address_space,
    require_own_file,
    say,
    send_log,
    show_bar,
    silence_libraries,
)

if TYPE_CHECKING:
    from streamslr.ranks import Ranks

# The libraries behind the commands take seconds to import, so each command imports its own: --help stays instant.

# OpenMP threads that spin while they wait slow each other down where other processes want the cores: a demo run beside
# two others took 69 s, and 22 s with short spins, which cost nothing on an idle machine. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class _Size(click.ParamType[int]):
    """Number of bytes, written like 45GB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


class _Path(click.Path):
    """Path whose refusal does not print what a hostile name holds."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def fail(self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None) -> NoReturn:
        super().fail(printable(message), param, ctx)


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every field of RunConfig: name, type, default and help come from there."""
    hints = get_type_hints(RunConfig)
    for field in reversed(dataclasses.fields(RunConfig)):
        flag = "--" + field.name.replace("_", "-")
        kinds = [kind for kind in (*get_args(hints[field.name]), hints[field.name]) if kind is not NoneType]
        settings: dict[str, Any] = {"help": field.metadata["help"]}
        if field.default is dataclasses.MISSING:
            settings["required"] = True
        else:
            settings |= {"default": field.default, "show_default": field.default is not None}
        if kinds[0] is bool:
            settings["is_flag"] = True
            flag += f"/--no-{flag[2:]}" if field.default else ""
        elif field.name.endswith("_mem"):
            settings["type"] = _Size()
        else:
            settings["type"] = _Path() if kinds[0] is Path else kinds[0]
        command = click.option(flag, field.name, **settings)(command)
    return command


@contextmanager
def _joined_ranks() -> "Iterator[Ranks | None]":
    """Join the ranks that torchrun started, before anything can fail on one of them alone; None without others."""
    if rank_and_world()[1] == 1:
        yield None
        return
    from streamslr.ranks import open_ranks

    with open_ranks() as ranks:
        yield ranks


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else, for programs.")
_quiet_option = click.option("--quiet", is_flag=True, help="Show no progress; warnings and errors stay.")
_device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Device to compute on [default: cuda where there is one]."
)
_seq_len_option = click.option(
    "--seq-len",
    type=click.IntRange(2, LARGEST),
    default=2048,
    show_default=True,
    help="Tokens in a window of the text.",
)
_bos_option = click.option(
    "--bos",
    type=click.Choice(["auto", "yes", "no"]),
    default="auto",
    show_default=True,
    help="First token of each window is the tokenizer's BOS; auto: where the tokenizer adds one by itself.",
)
_folder_argument = click.argument("folder", type=_Path(exists=True, file_okay=False))


class _Commands(click.Group):
    """Commands whose streams last from the start: click prints help, version and usage errors by itself."""

    def main(self, *args: Any, **settings: Any) -> Any:
        make_streams_last()
        return super().main(*args, **settings)


@click.group(cls=_Commands, context_settings={"max_content_width": 110})
@click.version_option(package_name="streamslr")
def main() -> None:
    """Compress a language model that does not fit your GPU, one block at a time.

    Every weight W of a block becomes S + U·V, S sparse and U·V of low rank.

    Exit codes: 0 done, 1 failed or verify found a problem, 2 wrong input, 3 does not fit memory or disk,
    4 the output folder belongs to another run, 5 the hub could not be reached, 130 interrupted.
    """
    with report_errors():
        require_address_space()
        command, (_, world) = click.get_current_context().invoked_subcommand, rank_and_world()
        if command not in ("run", "eval") and world > 1:
            raise InputError(f"{command} cannot be shared out over {world} ranks yet; start it without torchrun")


@main.command()
@_run_options
@_quiet_option
@click.option("--log-file", type=_Path(), help="Append a line a block, and every warning, to FILE.")
def run(quiet: bool, log_file: Path | None, **settings: Any) -> None:
    """Compress a model into a folder; the same line again goes on where it stopped.

    torchrun shares it out over GPUs: torchrun --standalone --nproc-per-node 4 -m streamslr run ...
    """
    out = settings["out"] or default_out(settings["model"])
    rank, _ = rank_and_world()
    quiet = quiet or rank > 0
    with report_errors(f"the same line goes on in {out}"), _joined_ranks() as joined:
        config = RunConfig(**settings)
        require_own_file(log_file, config)
        with send_log(quiet, log_file) as console:
            silence_libraries()
            from streamslr.ranks import ALONE
            from streamslr.results.inspect import run_table
            from streamslr.results.plan_table import plan_table
            from streamslr.run.context import open_run
            from streamslr.run.loop import run as compress
            from streamslr.run.progress import LiveDisplay

            context = open_run(config, ranks=joined or ALONE)
            if not quiet:
                print_table(plan_table(context.plan), full_width=False)
            live = not quiet and console.is_terminal
            with LiveDisplay(console, context.host_mem, context.plan.gpu_mem) if live else nullcontext() as display:
                state = compress(context, display)
            if not quiet:
                print_table(run_table(config.out, state))


@main.command()
@_run_options
@click.option(
    "--world",
    type=click.IntRange(1, LARGEST),
    default=1,
    show_default=True,
    help="Plan for so many ranks of torchrun, all on this machine; budgets and figures are those of one rank.",
)
@click.option(
    "--fit",
    type=_Size(),
    help="List the settings whose result runs on a card of this size, like 48GB, with a context of 8,192 tokens: "
    "dense, 4:8, 2:4 and 1:4, as stored, in int8 and in int4, at rank 64, or at 0 where only that fits; or those of "
    "--pattern, --values or --rank.",
)
@_json_option
def plan(world: int, fit: int | None, as_json: bool, **settings: Any) -> None:
    """Show what a run would need, phase by phase, from headers alone; exit code 3 where it does not fit.

    With --device cuda it plans for a GPU that this machine may lack; give --gpu-mem to hold the plan to a budget.
    """
    with report_errors():
        config = RunConfig(**settings)
        silence_libraries()
        from streamslr.ranks import Ranks
        from streamslr.results.plan_table import plan_table
        from streamslr.run.context import open_run, require_fit

        if fit is not None:
            _list_fitting(config, fit, world, as_json)
            return
        context = open_run(config, gpu_required=False, ranks=Ranks(world=world, local_world=world))
        if as_json:
            print_json(context.plan.as_dict())
        else:
            print_table(plan_table(context.plan), full_width=False)
        require_fit(context)


def _list_fitting(config: RunConfig, card: int, world: int, as_json: bool) -> None:
    """Print the settings whose result runs on a card of so many bytes."""
    from streamslr.model.context_size import context_bytes
    from streamslr.results.fit import CONTEXT_TOKENS, fit_table, settings_that_fit
    from streamslr.run.context import open_shape

    if world > 1:
        raise InputError(f"--fit is about one card: leave --world {world} out")
    for name in ("gpu_mem", "host_mem"):
        if getattr(config, name) is not None:
            message = "--%s has no effect: --fit is about the result, not its run"
            logging.getLogger("streamslr").warning(message, name.replace("_", "-"))
    checkpoint, shape = open_shape(config)
    cache = context_bytes(checkpoint, shape.value_bytes, CONTEXT_TOKENS)
    found = settings_that_fit(config, shape, cache, card)
    if as_json:
        print_json([dataclasses.asdict(setting) for setting in found])
    else:
        print_table(fit_table(found, card, cache))


@main.command()
@_json_option
def methods(as_json: bool) -> None:
    """List the methods of `run --method`.

    The table shows paper, patterns and ranks of each, and includes methods of other installed packages.
    """
    with report_errors():
        from streamslr.solvers.methods import all_methods, methods_table

        found = all_methods()
        if as_json:
            print_json([method.as_dict() for method in found])
        else:
            print_table(methods_table(found))


@main.command()
@_folder_argument
@click.option("--block", type=int, help="Show one block, counted from 0: a row per linear.")
@click.option(
    "--allocation", is_flag=True, help="Print pattern and rank of each linear, as `run --allocation` reads them."
)
@_json_option
def inspect(folder: Path, block: int | None, allocation: bool, as_json: bool) -> None:
    """Show errors, sizes and times of a compressed FOLDER.

    A table has a row per block or, with --block, a row per linear. FOLDER may be unfinished.
    """
    with report_errors():
        from streamslr.results import inspect as view

        state = view.read_run(folder)
        if allocation:
            print_json(view.get_allocation(state))
        elif block is None and as_json:
            print_json(view.summary(folder, state))
        elif block is None:
            print_table(view.run_table(folder, state))
        elif as_json:
            print_json(view.block_summary(folder, view.get_block(state, block)))
        else:
            print_table(view.block_table(folder, view.get_block(state, block)))


@main.command()
@_folder_argument
@_json_option
@_quiet_option
def verify(folder: Path, as_json: bool, quiet: bool) -> None:
    """Check all files and values of a compressed FOLDER.

    Digests, patterns, shapes and finite values are checked against the journal, tensors against config.json. Of an
    unfinished run only what is committed counts. The exit code is 1 when there is a problem.
    """
    with report_errors():
        silence_libraries()
        from streamslr.results.verify import verify as check

        with show_bar("verify", shown=not (quiet or as_json)) as step:
            result = check(folder, step)
        if as_json:
            print_json(dataclasses.asdict(result))
        else:
            for line in result.in_words():
                say(line)
        if result.problems:
            sys.exit(1)


@main.command()
@_folder_argument
@click.option("--out", type=_Path(dir_okay=False), help="HTML file to write [default: FOLDER/report.html].")
def report(folder: Path, out: Path | None) -> None:
    """Write an HTML page about a compressed FOLDER.

    The page shows errors, matching, time, memory and sizes, and opens without a network. FOLDER may be unfinished.
    The path of the page is printed.
    """
    with report_errors():
        from streamslr.results.report.page import write_report

        say(str(write_report(folder, out)))


@main.command()
@_folder_argument
@click.option("--model", help="Dense model, a folder or hub id [default: that of the run, where it is found].")
@click.option(
    "--text",
    type=_Path(exists=True),
    help="Text to check on: .txt, .jsonl with a `text` field, or .gz of either [default: the calibration text, where "
    "it is found].",
)
@click.option(
    "--windows", type=click.IntRange(1, LARGEST), help="Number of windows [default: as many as the run checked, or 4]."
)
@_device_option
@_json_option
@_quiet_option
def check(folder: Path, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Compare a finished FOLDER with its dense model: predictions, and hidden states behind each block.

    Both are streamed block by block over a few windows. The calibration text gives the windows, and so the figures, of
    the run's own check. A result that is far off is a warning; the exit code is 0 all the same.
    """
    with report_errors():
        silence_libraries()
        from streamslr.memory import free_host_memory
        from streamslr.results.check import check as compare
        from streamslr.results.check import check_table

        with show_bar("check", shown=not (quiet or as_json)) as step:
            checked = compare(folder, free_memory=free_host_memory(), step=step, **settings)
        if as_json:
            print_json(dataclasses.asdict(checked))
        else:
            print_table(check_table(checked))


@main.command()
@_folder_argument
@click.argument("out", type=_Path(file_okay=False))
@click.option(
    "--to",
    type=click.Choice(["dense", "peft"]),
    required=True,
    help="dense: one transformers folder with W = S + U·V. peft: S in OUT/base, and U·V as a LoRA in OUT/adapter.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Data type of every weight [default: as stored]. The default is exact for peft, unless values are codes: code "
    "times scale is rounded. For dense it rounds the sum S + U·V, which in bfloat16 can change generated text; float32 "
    "generates what FOLDER does, in twice the bytes.",
)
@_quiet_option
def export(folder: Path, out: Path, to: str, dtype: str | None, quiet: bool) -> None:
    """Write a compressed FOLDER in a format of other software.

    OUT is a new folder. After an interruption the same line goes on.
    """
    with report_errors(f"the same line goes on in {out}", parts="shards"):
        silence_libraries()
        import torch
        from transformers import AutoConfig

        from streamslr.model.meta_model import auto_class
        from streamslr.results import export as exporting

        with show_bar("export", shown=not quiet) as step:
            result = exporting.export(folder, out, to, getattr(torch, dtype) if dtype else None, step)
        already = f"; {result.shards - result.made} of them were there already" if result.made < result.shards else ""
        say(f"{out}: {result.shards} shards, {result.nbytes:,} bytes, read back and equal{already}")
        if to == "dense":
            say(f'load it: {auto_class(AutoConfig.from_pretrained(str(out))).__name__}.from_pretrained("{out}")')
        else:
            say(f'load it: peft.AutoPeftModelForCausalLM.from_pretrained("{out}/adapter")')
            rank = exporting.vllm_max_lora_rank(result.rank)
            base, adapter = (shlex.quote(f"{out}/{part}") for part in ("base", "adapter"))
            lora = f"--enable-lora --max-lora-rank {rank} --lora-modules slr={adapter}"
            too_large = f"rank {result.rank} is more than vLLM takes in a LoRA; for vLLM export it --to dense"
            say(f"serve it: vllm serve {base} {lora}" if rank else too_large)


@main.command()
@_folder_argument
@click.option(
    "--data",
    type=_Path(),
    required=True,
    help="Text to train on: .txt, .jsonl with a `text` field, or .gz of either.",
)
@click.option("--out", type=_Path(file_okay=False), required=True, help="New folder for the result.")
@_seq_len_option
@_bos_option
@click.option("--epochs", type=click.IntRange(1, LARGEST), default=1, show_default=True, help="Passes over the text.")
@click.option("--steps", type=click.IntRange(1, LARGEST), help="Number of optimizer steps, in place of --epochs.")
@click.option(
    "--batch", type=click.IntRange(1, LARGEST), default=8, show_default=True, help="Windows in an optimizer step."
)
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    default=2e-3,
    show_default=True,
    help="Learning rate, relative to the root mean square of each U and V.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, LARGEST),
    default=0,
    show_default=True,
    help="Seed of the order of the windows.",
)
@_device_option
@_quiet_option
def finetune(folder: Path, quiet: bool, **settings: Any) -> None:
    """Train U, V and the scales of S of a compressed FOLDER on a text.

    Values and codes of S stay as they are, packed. The result is a new compressed folder. After an interruption the
    same line goes on.
    """
    with report_errors(f"the same line goes on in {settings['out']}.partial", parts="checkpoints"):
        silence_libraries()
        from streamslr.finetune import finetune as train

        with send_log(quiet, None):
            record = train(folder, **settings)
        say(
            f"{settings['out']}: held-out loss {record.loss_before:.4f} before, {record.loss_after:.4f} after "
            f"{record.steps} steps on {record.data}"
        )


@main.command()
@click.argument("model")
@click.option(
    "--text",
    type=_Path(exists=True),
    help="Text to measure the perplexity on: .txt, .jsonl with a `text` field, or .gz of either.",
)
@_seq_len_option
@_bos_option
@click.option(
    "--windows", type=click.IntRange(1, LARGEST), help="Number of windows from the start of the text [default: all]."
)
@click.option(
    "--scratch",
    type=_Path(),
    help="Folder for hidden states that memory cannot hold [default: the system's temporary folder].",
)
@click.option(
    "--tasks", help="Tasks of lm-evaluation-harness, like arc_easy,piqa; `papers` stands for the papers' eight."
)
@click.option(
    "--num-fewshot", type=click.IntRange(0, LARGEST), help="Solved examples before each question [default: the task's]."
)
@click.option(
    "--limit", type=click.IntRange(1, LARGEST), help="Number of questions from the start of each task [default: all]."
)
@click.option(
    "--batch-size", type=click.IntRange(1, LARGEST), default=1, show_default=True, help="Questions evaluated together."
)
@click.option("--include-path", type=_Path(exists=True), help="Folder of more tasks, in the harness's YAML.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@_device_option
@_json_option
@_quiet_option
def eval(
    model: str,
    text: Path | None,
    seq_len: int,
    bos: str,
    windows: int | None,
    scratch: Path | None,
    tasks: str | None,
    as_json: bool,
    quiet: bool,
    revision: str | None,
    device: str | None,
    **settings: Any,
) -> None:
    """Measure MODEL: perplexity on a text, or scores on tasks.

    MODEL is a compressed folder, a dense checkpoint or a hub id. For --text it is streamed block by block. For --tasks
    it is loaded whole by lm-evaluation-harness, which `pip install 'streamslr[eval]'` installs.
    """
    with report_errors():
        if text is None and tasks is None:
            raise InputError("nothing to evaluate on: give --text FILE, --tasks NAME,…, or both")
        rank, world = rank_and_world()
        if tasks is not None and world > 1:
            raise InputError(f"--tasks cannot be shared out over {world} ranks; start it without torchrun")
        shown = rank == 0 and not (quiet or as_json)
        if not shown:
            os.environ["TQDM_DISABLE"] = "1"  # for the bars of the harness's libraries; read when tqdm is imported
        silence_libraries()
        found: dict[str, Any] = {}
        if tasks is not None:  # first, because an unknown name is refused before any work
            from streamslr.results.tasks import evaluate_tasks, task_table

            scores = evaluate_tasks(
                model, tasks.split(","), revision=revision, device=device, progress=shown, **settings
            )
            found |= dataclasses.asdict(scores)
            if not as_json:
                print_table(task_table(scores))
        if text is not None:
            from streamslr.memory import free_host_memory
            from streamslr.ranks import open_ranks
            from streamslr.results.evaluate import evaluate

            with open_ranks() as ranks, show_bar("eval", shown) as step:
                result = evaluate(
                    model,
                    text,
                    seq_len,
                    windows=windows,
                    bos=bos,
                    scratch=scratch,
                    revision=revision,
                    device=device,
                    free_memory=free_host_memory(),
                    ranks=ranks,
                    step=step,
                )
            if rank:  # the first one tells
                return
            found |= dataclasses.asdict(result)
            if not as_json:
                first = ", BOS first," if result.bos else ""
                say(
                    f"{model}: perplexity {result.perplexity:.4f} on {result.windows:,} windows of "
                    f"{result.seq_len:,} tokens{first} of {text} ({result.dtype} on {result.device})"
                )
        if as_json:
            print_json(found)
