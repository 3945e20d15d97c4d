"""Round S of a finished folder to the nearest numbers of a grid: `compare.py` measures what that costs."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from streamslr.io.durable import copy_file
from streamslr.io.folder import copy_auxiliary_file, write_block, write_index
from streamslr.io.packed_layout import number_dtype, packed_linears, stored_parts
from streamslr.io.packing import pack_on_grid, unpack
from streamslr.io.safetensors_file import shard_header
from streamslr.results.inspect import read_run
from streamslr.solvers.base import LinearProblem, SparseLowRank
from streamslr.solvers.rounding import nearest_on_grid
from streamslr.spec.values import ValueFormat


def write_rounded(folder: Path, values: ValueFormat, out: Path) -> int:
    """Write a finished folder again with S on a grid, all else as it is; return the bytes of its linears.

    Args:
        folder: Compressed folder whose values are as stored.
        values: Format of the values. The scale of a group is the one that changes its values least (squared error).
        out: New folder. It has no journal, so `evaluate` reads it with a warning and `verify` does not.
    """
    state = read_run(folder)
    state.require_complete(folder)
    assert state.non_block is not None
    out.mkdir()
    for name in state.auxiliary_files:
        copy_auxiliary_file(folder / name, out)
    copy_file(folder / state.non_block.file, out / state.non_block.file)
    shards, linear_bytes = [state.non_block], 0
    for block in state.blocks:
        tensors, linears = load_file(folder / block.shard.file), {}
        for name, (pattern, shape) in packed_linears(shard_header(folder / block.shard.file).metadata).items():
            parts = {part: tensors.pop(stored) for part, stored in stored_parts(name, tensors).items()}
            o, d = shape
            S, dtype = unpack(parts, pattern, shape).float(), number_dtype(parts)
            problem = LinearProblem(name, S, torch.eye(d), pattern, rank=0)
            solution = SparseLowRank(S, torch.zeros(o, 0), torch.zeros(0, d), iterations=0)
            found = nearest_on_grid(problem, solution, values, dtype)
            rounded = pack_on_grid(found.codes, found.scales, pattern, dtype, values)
            rounded |= {part: parts[part] for part in ("U", "V") if part in parts}
            linears[name] = rounded, pattern, shape
            linear_bytes += sum(tensor.nbytes for tensor in rounded.values())
        shards.append(write_block(out, block.index, linears, tensors))
    write_index(out, shards)
    return linear_bytes
