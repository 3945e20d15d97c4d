"""Attack a tiny model and a tiny finished folder with mutated files, and count what each command makes of them.

    python tools/attack.py --attempts 1500 --out tools/results/robustness.md

Every attempt mutates one file (tests/support/mutations.py) and runs one command on it in a child of its own, for 10
seconds at most (tests/support/attacks.py). The seeds are fixed: attempt n does the same every time.

held: refused with a documented exit code and one line; or harmless, the result is that of the sound files; or, where a
user's input was mutated, taken as another input that is sound too. failed: a traceback, a hang, another exit code.
silent: exit code 0, and another result than that of the sound folder, or nothing found by `verify` in other bytes.
"""

import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support import attacks

VERDICTS = ("refused", "harmless", "other input", "failed", "silent")


def attack(
    ground: attacks.Ground, sound: dict[str, attacks.Outcome], attempt: tuple[attacks.Target, str, int]
) -> tuple[str, str]:
    """Try one mutation on one command; return the verdict, and a line about it."""
    target, command, seed = attempt
    scratch = Path(tempfile.mkdtemp(dir=ground.folder.parent))
    with attacks.attacked(ground, target, seed, scratch) as (copy, done):
        changed = (copy.folder / target.file).read_bytes() != (ground.folder / target.file).read_bytes()
        found = attacks.outcome(copy, command, scratch)
    verdict, reason = attacks.judge(target, command, found, sound[command], changed)
    return verdict, f"{target.name}, {command}, seed {seed}: {done!r}: {verdict}, {reason}"


def table(counts: dict[str, Counter[str]]) -> str:
    """Return the table in Markdown."""
    rows = ["| mutated file | tried | refused | harmless | other input | failed | silent |", "|---|" + "--:|" * 6]
    total: Counter[str] = Counter()
    for name, count in counts.items():
        rows.append(_row(name, count))
        total += count
    return "\n".join([*rows, _row("**all**", total)])


def _row(name: str, count: Counter[str]) -> str:
    return f"| {name} | {count.total()} | " + " | ".join(str(count[verdict]) for verdict in VERDICTS) + " |"


@click.command()
@click.option("--attempts", default=1500, show_default=True, help="Number of attempts, dealt to all pairs in turn.")
@click.option("--first-seed", default=0, show_default=True, help="Seed of the first round.")
@click.option("--only", default="", help="Only targets and commands whose names hold this.")
@click.option("--flips", is_flag=True, help="Flip one bit of each file of a finished folder in turn, and no more.")
@click.option("--jobs", default=2, show_default=True, help="Commands at a time.")
@click.option("--out", type=click.Path(path_type=Path), help="File for the table.")
@click.option("--details", type=click.Path(path_type=Path), help="File for a line an attempt.")
def main(
    attempts: int, first_seed: int, only: str, flips: bool, jobs: int, out: Path | None, details: Path | None
) -> None:
    pairs = [
        (target, command) for target in (attacks.FLIPS if flips else attacks.TARGETS) for command in target.commands
    ]
    pairs = [pair for pair in pairs if only in f"{pair[0].name}, {pair[1]}"]
    folder = Path(tempfile.mkdtemp(prefix="streamslr-attack-"))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    lines: list[str] = []
    try:
        ground = attacks.make_ground(folder / "ground")
        sound = {command: attacks.sound_outcome(ground, command, folder / "sound") for command in {c for _, c in pairs}}
        tried = [(*pairs[number % len(pairs)], first_seed + number // len(pairs)) for number in range(attempts)]
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            for (target, *_), (verdict, line) in zip(
                tried, pool.map(partial(attack, ground, sound), tried), strict=True
            ):
                counts[target.name][verdict] += 1
                lines.append(line)
                if verdict in ("failed", "silent"):
                    click.echo(line)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    click.echo(table(counts))
    if out:
        command_line = (
            f"python tools/attack.py{' --flips' if flips else ''} --attempts {attempts} --first-seed {first_seed}"
        )
        out.write_text(f"# Mutated files\n\n`{command_line}`\n\n{__doc__}\n{table(counts)}\n")
    if details:
        details.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
