"""streamslr: language models made sparse plus low-rank, W ≈ S + U·V, one block at a time, out of core.

`compress(model=…, out=…)` is `streamslr run`; `load(folder)` makes a model of transformers of what came out. The rooms,
in the order that data walks them:

    memory.py              what the process holds and may hold; giving freed memory back
    config.py              RunConfig: every setting, its help, whether it may change on resume
    errors.py              what can go wrong, by what the user does next; exit codes
    source/                a checkpoint (folder or hub id) -> one live block
        places.py              where files are: a folder, or a hub repository fetched file by file
        checkpoint.py          tensors known from headers, read when asked for, dense or packed
        blockwise.py            the model on the meta device; its blocks, their call, one materialised at a time
        experts.py             fused experts taken apart into linears, named as on disk
    calibrate/             text -> hidden states -> Gram matrices
        tokens.py              seeded, hashed windows of token ids
        hidden_states.py       one generation a block boundary: zarr on disk, memory, or both
        gram.py                inputs of each linear -> H, one per distinct input; experts with few tokens lean on all
    solve/                 (W, H) -> S, U, V
        problem.py             the seam: LinearProblem, SparseLowRank, Solver, and their errors
        pattern.py             n:m and unstructured sparsity: projection, validation, size
        threebasil.py          3BASiL in its fast form
        low_rank.py            U·V: the best fit of given rank in the metric, by subspace iteration
        scaled.py              a layer in units of its inputs' energy, where the other methods work; what a pruner is
        pruning.py             magnitude and Wanda; any pruner as a method of its own
        sparsegpt.py           SparseGPT, a pruner
        alps.py                ALPS, a pruner: ADMM for the support, conjugate gradients for its values
        oats.py                OATS: alternating thresholding
        hassle_free.py         HASSLE-free: any pruner and the low-rank fit in turns
        eora.py                EoRA: any pruner, then the low-rank fit
        methods.py             every method by name, those of other packages too
    match/                 a whole block refined against its dense self
        matching.py            Adam on what a packed block may still change, supports fixed
    store/                 S, U, V -> bytes that last
        pack.py                pattern-packed tensors <-> dense
        shards.py              one durable file: our safetensors writer, the format's names
        folder.py              the output folder: config, outside tensors, a shard a block, index
    allocate.py            what each linear is to become: pattern and rank for all, by share, by outliers, by name
    plan.py                bytes and FLOPs of each phase before any work; refuses what cannot fit
    prepare.py             all that is known before work begins, from headers alone
    journal.py             what is durably done: the one truth that resume believes
    progress.py            clock and memory of each phase, ETA, the live display
    solve_linear.py             one linear: solve, pack, put S + U·V in its place, say how good it is
    passes.py              the windows on their way through the blocks: embed, dense pass, matching, compressed pass
    run.py                 the block loop; reads as the algorithm
    results/               reads only what landed on disk
        inspect.py             what each block's shard holds, and how good it is
        verify.py              every digest, pattern, value and file checked again
        evaluate.py            perplexity, streamed block by block
        report.py              one HTML page of a run: errors, matching, time, memory, sizes
        tasks.py               tasks of lm-evaluation-harness, the model loaded whole
        export.py              S + U·V as a dense model, or S as a model with U·V as its PEFT adapter
    runtime/               a compressed folder as a model that runs
        linear.py              SparseLowRankLinear: packed in memory; sparse tensor cores, or unpacked tile by tile
        loader.py              load, and what transformers' from_pretrained needs to read the format
        register.py            tells transformers of it without importing transformers
    finetune.py            U and V trained on text, S frozen and packed; the same format again
    cli.py                 arguments -> RunConfig; the only place that prints
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamslr.runtime.register import register_with_transformers
from streamslr.version import __version__

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from streamslr.run.journal import JournalState

__all__ = ["__version__", "compress", "load"]

# torch and transformers take seconds to import: whatever needs them is imported when it is called
register_with_transformers()


def compress(model: str | Path, out: str | Path, **settings: Any) -> "JournalState":
    """Compress `model` (a folder or a hub id) into the folder `out`; called again, go on where it stopped.

    The same as `streamslr run`: settings are the fields of `streamslr.config.RunConfig`, so the command's
    options with underscores (`seq_len=2048`, `pattern="2:4"`, `rank=64`, `calibration="text.txt"`); sizes may be
    written like "45GB". Returns the journal, with a record a block (`.blocks[0].linears[0].error`).
    Raises a streamslr.errors.StreamslrError for whatever a user can mend. Messages go to the logger "streamslr".
    """
    from streamslr.config import RunConfig
    from streamslr.run.context import open_run
    from streamslr.run.loop import run

    return run(open_run(RunConfig.of(model=model, out=out, **settings)))


def load(
    folder: str | Path,
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
    device_map: Any = None,
    keep_dense: bool = False,
) -> "PreTrainedModel":
    """The model of a compressed folder or hub id, packed in memory: `streamslr.runtime.loader.load`."""
    from streamslr.runtime.loader import load

    return load(folder, device, dtype, device_map, keep_dense)
