"""Attacks: every command of streamslr on folders of which one file is mutated, each in a child with a time limit."""

import hashlib
import json
import resource
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.support.forkserver import call_in_child
from tests.support.mutations import mutate
from tests.support.tiny_models import TEXT, tiny_checkpoint

CPU_LIMIT, TIME_LIMIT = 10, 60.0
"""Seconds of CPU and on the clock after which a command hangs; other processes may want the machine too."""

EXIT_CODES = {0, 1, 2, 3, 4, 5}
"""Exit codes that `streamslr --help` documents, without the interruption."""

JSON, HEADER, WEIGHTS, TEXT_KIND, BIT = "json", "header", "weights", "text", "bit"

_RUN = ("--samples", "4", "--seq-len", "16", "--rank", "4", "--method", "eora-wanda", "--no-match", "--device", "cpu")


@dataclass(frozen=True)
class Ground:
    """Sound files that attacks start from."""

    folder: Path

    @property
    def dense(self) -> Path:
        return self.folder / "dense"

    @property
    def finished(self) -> Path:
        return self.folder / "finished"

    @property
    def text(self) -> Path:
        return self.folder / "text.jsonl"

    @property
    def allocation(self) -> Path:
        return self.folder / "allocation.json"


@dataclass(frozen=True)
class Target:
    """One kind of file that is mutated, and the commands that are tried on it.

    Attributes:
        name: Name in the table.
        file: Path of the file within the ground.
        mutation: Kind of mutation, as `mutate` takes it.
        commands: Names of the commands.
        input: True where changed bytes may be another sound input (another text, another model); False where they
            belong to a finished folder, in which every change of what is stored must be seen.
    """

    name: str
    file: str
    mutation: str
    commands: tuple[str, ...]
    input: bool


_ON_MODEL = ("plan", "run", "eval model")
_ON_FOLDER = ("inspect", "verify", "report", "export dense", "export peft", "finetune", "eval folder", "load", "resume")

_SHARD, _BLOCK = "model-00001-of-00002.safetensors", "model-block-00001.safetensors"

TARGETS = (
    Target("config.json of a model", "dense/config.json", JSON, _ON_MODEL, True),
    Target("index of a model", "dense/model.safetensors.index.json", JSON, _ON_MODEL, True),
    Target("header of a model's shard", f"dense/{_SHARD}", HEADER, _ON_MODEL, True),
    Target("weights of a model", f"dense/{_SHARD}", WEIGHTS, ("run", "eval model"), True),
    Target("tokenizer.json of a model", "dense/tokenizer.json", JSON, ("run", "eval model"), True),
    Target("tokenizer_config.json of a model", "dense/tokenizer_config.json", JSON, ("run", "eval model"), True),
    Target("auxiliary file of a model", "dense/generation_config.json", JSON, ("run",), True),
    Target("text", "text.jsonl", TEXT_KIND, ("run", "eval model", "finetune"), True),
    Target("allocation file", "allocation.json", JSON, ("plan", "run"), True),
    Target("journal", "finished/streamslr.json", JSON, _ON_FOLDER, False),
    Target("config.json of a folder", "finished/config.json", JSON, _ON_FOLDER, False),
    Target("index of a folder", "finished/model.safetensors.index.json", JSON, _ON_FOLDER, False),
    Target("header of a folder's shard", f"finished/{_BLOCK}", HEADER, _ON_FOLDER, False),
    Target("weights of a folder", f"finished/{_BLOCK}", WEIGHTS, _ON_FOLDER, False),
    Target("non-block tensors of a folder", "finished/model-outside.safetensors", WEIGHTS, _ON_FOLDER, False),
    Target("tokenizer.json of a folder", "finished/tokenizer.json", JSON, _ON_FOLDER, False),
    Target("auxiliary file of a folder", "finished/generation_config.json", JSON, _ON_FOLDER, False),
)

_FINISHED = (
    *("streamslr.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("model.safetensors.index.json", "model-outside.safetensors", "model-block-00000.safetensors", _BLOCK),
)

FLIPS = tuple(
    Target(f"one bit of {file}", f"finished/{file}", BIT, ("verify", "eval folder", "load"), False)
    for file in _FINISHED
)
"""A bit flipped by a disk or a copy in each file of a finished folder, and the commands that must see it."""


@dataclass(frozen=True)
class Outcome:
    """Result of a command: its exit code (None: it hung), what it printed, and a digest of its result."""

    code: int | None
    stdout: str
    stderr: str
    result: str

    @property
    def failure(self) -> str | None:
        """Fault of the behaviour itself, or None."""
        if self.code is None:
            return "hangs"
        if "Traceback" in self.stderr:
            return f"traceback: {self.stderr.strip().splitlines()[-1][:200]}"
        if self.code not in EXIT_CODES:
            return f"exit code {self.code}: {self.stderr.strip()[-200:]}"
        lines = [line for line in self.stderr.splitlines() if line.startswith("streamslr: ")]
        if self.code > 1 and len(lines) != 1:
            return f"{len(lines)} lines for exit code {self.code}: {self.stderr.strip()[-300:]!r}"
        if not self.stderr.replace("\n", "").isprintable():
            return f"prints what does not print: {self.stderr!r}"
        return None


def make_ground(folder: Path) -> Ground:
    """Make a tiny dense model, the folder that `run` makes of it, a text and an allocation file."""
    ground = Ground(folder)
    tiny_checkpoint(ground.dense, blocks=2)
    line = {"text": TEXT * 3}
    ground.text.write_text("".join(json.dumps(line) + "\n" for _ in range(6)))
    ground.allocation.write_text(json.dumps({"q_proj": {"pattern": "50%", "rank": 2}, "down_proj": {"rank": 8}}))
    done = call_in_child(_streamslr, _line("run", ground, ground.finished), timeout=120)
    assert done.returncode == 0, done.stderr
    return ground


def outcome(ground: Ground, command: str, scratch: Path) -> Outcome:
    """Run a command on the ground, its output in the empty folder `scratch`."""
    scratch.mkdir(exist_ok=True)
    out = ground.finished if command == "resume" else scratch / "out"
    target = _load if command == "load" else _streamslr
    try:
        done = call_in_child(target, _line(command, ground, out), timeout=TIME_LIMIT)
    except TimeoutError:
        return Outcome(None, "", "", "")
    if done.returncode == -signal.SIGXCPU:
        return Outcome(None, done.stdout, done.stderr, "")
    return Outcome(done.returncode, done.stdout, done.stderr, _result(command, done.stdout, out))


def sound_outcome(ground: Ground, command: str, scratch: Path) -> Outcome:
    """Run a command on a copy of the sound ground in the new folder `scratch`."""
    copy = Ground(Path(shutil.copytree(ground.folder, scratch / "ground")))
    sound = outcome(copy, command, scratch)
    shutil.rmtree(scratch)
    assert sound.code == 0, sound.stderr
    return sound


@contextmanager
def attacked(ground: Ground, target: Target, seed: int, scratch: Path) -> Iterator[tuple[Ground, str]]:
    """Copy the ground into `scratch`, mutate one file there, and yield it with what was done."""
    copy = Ground(Path(shutil.copytree(ground.folder, scratch / "ground")))
    path = copy.folder / target.file
    done, content = mutate(path.read_bytes(), target.mutation, Random(f"{target.file} {seed}"))
    path.write_bytes(content)
    try:
        yield copy, done
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def judge(target: Target, command: str, attack: Outcome, sound: Outcome, changed: bool) -> tuple[str, str]:
    """Return the verdict on an attack and a reason.

    A change of a finished folder that is not refused must not change a result, and what covers every byte must see it.

    Args:
        target: What was mutated.
        command: Command that ran.
        attack: Its outcome.
        sound: Outcome of the same command on sound files.
        changed: True where the mutation changed any byte.

    Returns:
        "refused", "harmless" (the same result), "other input", "failed" or "silent" (a wrong result, and no word).
    """
    if failure := attack.failure:
        return "failed", failure
    if attack.code != 0:
        return "refused", attack.stderr.strip()
    if not changed or attack.result == sound.result:
        unseen = command == "verify" and changed and target.file.endswith(".safetensors")
        return ("silent", "verify finds no problem") if unseen else ("harmless", "")
    if target.input:
        return "other input", ""
    if command == "report" and target.name != "journal":
        return "harmless", "the page shows the journal, and the architecture of config.json"
    if Path(target.file).name in attack.stderr:
        return "harmless", "warned about"
    return "silent", f"result {attack.result[:80]}, sound {sound.result[:80]}"


def _line(command: str, ground: Ground, out: Path) -> list[str]:
    """Return the arguments of a command on the ground."""
    folder, text = str(ground.finished), str(ground.text)
    on_text = ["--seq-len", "16", "--device", "cpu"]
    settings = ["--model", str(ground.dense), "--calibration", text, "--allocation", str(ground.allocation), *_RUN]
    lines: Mapping[str, list[str]] = {
        "plan": ["plan", *settings, "--json"],
        "run": ["run", *settings, "--out", str(out), "--quiet"],
        "resume": ["run", *settings, "--out", str(out), "--quiet"],
        "eval model": ["eval", str(ground.dense), "--text", text, *on_text, "--json", "--quiet"],
        "eval folder": ["eval", folder, "--text", text, *on_text, "--json", "--quiet"],
        "inspect": ["inspect", folder, "--json"],
        "verify": ["verify", folder, "--quiet"],
        "report": ["report", folder, "--out", str(out.with_name("report.html"))],
        "export dense": ["export", folder, str(out), "--to", "dense", "--quiet"],
        "export peft": ["export", folder, str(out), "--to", "peft", "--quiet"],
        "finetune": ["finetune", folder, "--data", text, "--out", str(out), "--steps", "1", "--quiet", *on_text],
        "load": [folder],
    }
    return lines[command]


def _result(command: str, stdout: str, out: Path) -> str:
    """Return a text that is the same for the same result."""
    keys = {"plan": ("blocks", "flops", "output_bytes"), "eval": ("nll", "windows"), "inspect": ("blocks", "totals")}
    if found := keys.get(command.partition(" ")[0]):
        try:
            shown = json.loads(stdout)
            return json.dumps([shown[key] for key in found])
        except (ValueError, KeyError):
            return stdout
    if command == "report":
        return hashlib.sha256(out.with_name("report.html").read_bytes()).hexdigest() if stdout else ""
    if command in ("verify", "load"):
        return stdout.rpartition(": ")[2]
    digests = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("streamslr.json", ".streamslr-export.json", "adapter_config.json")
    }
    return json.dumps(digests)


def _streamslr(arguments: list[str]) -> None:
    from streamslr.cli import main

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
    main(arguments, prog_name="streamslr")


def _load(arguments: list[str]) -> None:
    import torch

    import streamslr
    from streamslr.terminal import report_errors, silence_libraries

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
    with report_errors():
        silence_libraries()
        model = streamslr.load(arguments[0], device="cpu", dtype=torch.float32, verify=True)
        with torch.no_grad():
            logits = model(input_ids=torch.arange(32)[None]).logits
        print("load:", hashlib.sha256(logits.numpy().tobytes()).hexdigest())
