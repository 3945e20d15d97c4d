"""Memory and floating point operations that a solve by 3BASiL takes, and the tiles that keep to a workspace."""

from streamslr.solvers.threebasil_fused import fits_fused, product_rows
from streamslr.solvers.threebasil_state import slice_elements

# Rows of the smallest tile, and the step between tile sizes.
SMALLEST_TILE = 64
# Bytes that MKL and oneDNN pack operands into, and that malloc leaves between buffers (measured, 1024 to 4096).
_LIBRARY_SCRATCH = 32 << 20


def solve_bytes(
    o: int,
    d: int,
    rank: int,
    tile_rows: int | None = None,
    *,
    by_row: bool = False,
    gpu: bool = False,
    fused: bool = False,
) -> int:
    """Return the peak bytes that one solve takes beside its weight and Gram matrix; S is among them.

    - State, all rows at once: 4 float32 copies of the weight. These are the scaled W, X, D, and the product with its
      input at bfloat16, or the product alone at float32.
    - State in tiles: 5 bytes a weight for what is held and the support, and of one tile 8 for X, the product and its
      input.
    - State of the fused step, where it takes no more than that: 6 bytes a weight for the sums and the input of the
      product, and 2 for the product of the rows that are multiplied at once.
    - The last projection of a pattern that couples rows (not `by_row`): 10 bytes a weight.
    - Besides: the inverse [d, d]; on a GPU three of its size while one is factored (the matrix, which the inverse
      overwrites, its factor, and cuSOLVER's copy of that), 2.1 while one grows from the last, and 1.5 in an iteration;
      the factors of U·V and products with them; the temporaries of a slice; the memory that libraries pack operands
      into.

    Args:
        o: Outputs of the linear.
        d: Inputs of the linear.
        rank: Rank of U·V.
        tile_rows: Rows of the weight worked on at a time; None for all.
        by_row: True where the pattern decides each row apart.
        gpu: True for a solve on a GPU.
        fused: True where the step is fused, tiles permitting (`threebasil_fused.may_fuse`).
    """
    t = o if tile_rows is None else min(tile_rows, o)
    if fused and fits_fused(o, tile_rows):
        state = 6 * o * d + 2 * product_rows(o, tile_rows) * d
    else:
        state = 16 * o * d if t == o else 5 * o * d + 8 * t * d
    inverse = 4 * d * d * (3 if gpu else 1)
    factors = 4 * 8 * (o + d) * max(rank, 1)
    temporaries = 5 * 4 * min(t * d, slice_elements(gpu))
    scratch = min(_LIBRARY_SCRATCH, 4 * d * (t + d))
    projecting = 0 if by_row else 10 * o * d
    return max(state + inverse + temporaries + factors, projecting + factors // 4) + scratch


def tile_rows_for(
    o: int,
    d: int,
    rank: int,
    workspace: int,
    *,
    by_row: bool = False,
    gpu: bool = False,
    fused: bool = False,
) -> int | None:
    """Return the most rows a tile with which one solve takes at most `workspace` bytes; None for all rows at once.

    A multiple of 64. It is 64 also where that still takes more than the workspace: compare with `solve_bytes`, whose
    other arguments these are.
    """

    def fits(tile_rows: int | None) -> bool:
        return solve_bytes(o, d, rank, tile_rows, by_row=by_row, gpu=gpu, fused=fused) <= workspace

    if fits(None) or o <= SMALLEST_TILE:
        return None
    low, high = 1, (o - 1) // SMALLEST_TILE  # in steps; a tile takes more with every row
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * SMALLEST_TILE) else (low, middle - 1)
    return low * SMALLEST_TILE


def solve_flops(
    o: int, d: int, rank: int, iterations: int, factored: int, grown: int = 0, *, gpu: bool = False, ranks: int = 1
) -> int:
    """Return the floating point operations of one solve: products, inverses, and the elementwise work.

    Args:
        o: Outputs of the linear.
        d: Inputs of the linear.
        rank: Rank of U·V.
        iterations: Iterations of ADMM.
        factored: Inverses [d, d] by Cholesky factors: d³/3 operations for the factor and on a CPU 2 d³/3 for its
            inverse (potri), on a GPU 2 d³ (two triangular solves).
        grown: Inverses that grow from the last (`grow_`): 0.56 of two products, 2.25 d³.
        gpu: True for a solve on a GPU.
        ranks: Ranks of one machine that solve the linear by rows and share the series of `grown` inverses. The
            operations are those of one of them.
    """
    o = -(-o // ranks)
    product = 2 * o * d * d
    low_rank = 6 * o * d * rank + 2 * d * d * rank + 8 * o * rank * rank
    inverses = factored * d**3 * (7 if gpu else 3) // 3 + grown * 9 * d**3 // (4 * ranks)
    return iterations * (product + low_rank + 20 * o * d) + inverses
