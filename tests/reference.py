"""Reference implementations in float64, as the papers write them: slow, explicit, independent of the package."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reference:
    """S [o, d] and U·V [o, d] in float64, and the number of iterations."""

    S: Tensor
    UV: Tensor
    iterations: int


def damped(gram: Tensor, ratio: float = 0.005) -> Tensor:
    """Return H [d, d] as the official code damps it: 1 for dead inputs, plus `ratio` of its diagonal and mean."""
    H = gram.double().clone()
    diagonal = torch.diagonal(H)
    live = diagonal > 0
    extra = ratio * diagonal + ratio * diagonal[live].mean() if live.any() else torch.zeros_like(diagonal)
    H += torch.diag(torch.where(live, extra, 1.0 - diagonal))
    return H


def loss(weight: Tensor, gram: Tensor, approximation: Tensor) -> float:
    """Return tr(R H Rᵀ) / tr(W H Wᵀ) in float64, without the columns of dead inputs."""
    live = torch.diagonal(gram) > 0
    H = damped(gram)[live][:, live]
    W = weight.double()[:, live]
    R = W - approximation.double()[:, live]
    return (torch.trace(R @ H @ R.T) / torch.trace(W @ H @ W.T)).item()


def project(scores: Tensor, pattern: str) -> Tensor:
    """Return a mask [o, d] of the largest magnitudes: n of every m, or all but p % (of each row, for "p%/row")."""
    o, d = scores.shape
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        groups = scores.abs().reshape(o, d // m, m)
        chosen = groups.topk(n, dim=2).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter(2, chosen, True).reshape(o, d)
    density = 1 - float(pattern.removesuffix("/row").rstrip("%")) / 100
    if pattern.endswith("/row"):
        chosen = scores.abs().topk(round(d * density), dim=1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
    num_kept = round(o * d * density)
    chosen = scores.abs().flatten().topk(num_kept).indices
    return torch.zeros(o * d, dtype=torch.bool).scatter(0, chosen, True).reshape(o, d)


def root(G: Tensor) -> Tensor:
    """Return the symmetric root of G."""
    values, vectors = torch.linalg.eigh(G)
    result: Tensor = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    return result


def best_low_rank(E: Tensor, G: Tensor, rank: int) -> Tensor:
    """Return the U·V [o, d] of least ‖(E − UV) G^½‖_F at a rank: the truncated SVD of E G^½, times G^−½."""
    half = root(G)
    u, values, vt = torch.linalg.svd(E @ half, full_matrices=False)
    result: Tensor = (u[:, :rank] * values[:rank]) @ vt[:rank] @ torch.linalg.inv(half)
    return result


def sparse_step(W: Tensor, UV: Tensor, D: Tensor, Y: Tensor, G: Tensor, rho: float) -> Tensor:
    """Return the S of least augmented Lagrangian, [(W − UV) G + ρ (D − Y)] (G + ρI)⁻¹, with the scaled dual Y."""
    identity = torch.eye(len(G), dtype=G.dtype)
    S: Tensor = ((W - UV) @ G + rho * (D - Y)) @ torch.linalg.inv(G + rho * identity)
    return S


def solve(weight: Tensor, gram: Tensor, pattern: str, rank: int, rho: float = 0.1) -> Reference:
    """Solve as 3BASiL's paper iterates, with the schedule of ρ of its official code."""
    H = damped(gram)
    scale = torch.diagonal(H).sqrt()
    G = H / scale[:, None] / scale[None, :]
    W = weight.double() * scale
    W[:, torch.diagonal(gram) <= 0] = 0
    D = W * project(W, pattern)
    Y, UV = torch.zeros_like(W), torch.zeros_like(W)
    support, iterations, moved = D != 0, 0, math.inf
    while moved > 0 and not (iterations >= 100 and moved < 3e-4):
        for _ in range(10):
            S = sparse_step(W, UV, D, Y, G, rho)
            D = (S + Y) * project(S + Y, pattern)
            Y = S + Y - D
            UV = best_low_rank(W - S, G, rank)
            iterations += 1
        now = D != 0
        moved = ((now != support).sum() / now.sum()).item()
        support = now
        growth = 1.1 if moved > 0.1 else 1.05 if moved > 0.005 else 1.02
        rho, Y = rho * growth, Y / growth
    return Reference(D / scale, UV / scale, iterations)


# S on a grid


def grid_step(Z: Tensor, scales: Tensor, support: Tensor, largest: float) -> Tensor:
    """Return the nearest of Z [o, d] whose values are whole numbers up to `largest` times scales [o, d]."""
    return (Z / scales).round().clamp(-largest, largest) * scales * support


def on_grid(W: Tensor, H: Tensor, support: Tensor, scales: Tensor, largest: float, rank: int) -> tuple[Tensor, Tensor]:
    """Solve by ADMM for S on a support and a grid with fixed scales [o, d], as `grid_step` has it, and U·V.

    W and the damped H in float64; the fit of U·V is exact in each iteration.
    """
    s = torch.linalg.inv(H).diagonal().rsqrt()
    G, T, grid = H / s[:, None] / s, W * s, scales * s
    UV = best_low_rank(T - T * support, G, rank)
    D = grid_step(T - UV, grid, support, largest)
    Y, rho = torch.zeros_like(D), 1.0
    for i in range(120):
        if i and i % 8 == 0:
            rho, Y = 1.25 * rho, Y / 1.25
        S = sparse_step(T, UV, D, Y, G, rho)
        D = grid_step(S + Y, grid, support, largest)
        Y = S + Y - D
        UV = best_low_rank(T - S, G, rank)
    return D / s, best_low_rank(T - D, G, rank) / s


# Pure sparsity: W and the damped H -> S [o, d] float64


def magnitude(W: Tensor, H: Tensor, pattern: str) -> Tensor:
    return W * project(W, pattern)


def wanda(W: Tensor, H: Tensor, pattern: str) -> Tensor:
    return W * project(W * torch.diagonal(H).sqrt(), pattern)


def sparsegpt(W: Tensor, H: Tensor, pattern: str, block: int = 128) -> Tensor:
    """Solve equations 3 to 5 of arXiv 2301.00774, with a new inverse of the remaining H for each column."""
    W = W.clone()
    d = W.shape[1]
    remaining = [torch.linalg.inv(H[j:, j:]) for j in range(d)]
    saliency = torch.stack([inverse[0, 0] for inverse in remaining])
    mask = torch.zeros_like(W, dtype=torch.bool)
    decided = int(pattern.split(":")[1]) if ":" in pattern else block
    for j in range(d):
        if j % decided == 0:
            at = slice(j, min(j + decided, d))
            mask[:, at] = project(W[:, at] / saliency[at].sqrt(), pattern)
        error = torch.where(mask[:, j], 0, W[:, j]) / remaining[j][0, 0]
        W[:, j:] -= error[:, None] * remaining[j][0]
        W[:, j] *= mask[:, j]
    return W


def refitted(W: Tensor, H: Tensor, support: Tensor) -> Tensor:
    """Return the S of least loss within a support [o, d], row by row from the normal equations."""
    S = torch.zeros_like(W)
    for i, mask in enumerate(support):
        S[i, mask] = torch.linalg.solve(H[mask][:, mask], H[mask] @ W[i])
    return S


def alps(W: Tensor, H: Tensor, pattern: str) -> Tensor:
    """Solve as arXiv 2406.07831: ADMM as in `solve` without U·V, then the exact values for the support it found."""
    scale = torch.diagonal(H).sqrt()
    G = H / scale[:, None] / scale[None, :]
    T = W * scale
    D, Y, rho, support = T * project(T, pattern), torch.zeros_like(T), 0.1, None
    for i in range(1, 400):
        S = sparse_step(T, torch.zeros_like(T), D, Y, G, rho)
        D = (S + Y) * project(S + Y, pattern)
        Y = S + Y - D
        if i % 3 == 0:  # the paper looks at the support every 3 iterations
            if support is not None:
                moved = ((D != 0) != support).sum().item()
                if moved == 0:
                    break
                growth = 1.3 if moved >= 0.1 * D.numel() else 1.2 if moved >= 0.005 * D.numel() else 1.1
                rho, Y = rho * growth, Y / growth
            support = D != 0
    return refitted(T, G, D != 0) / scale


def best_support(W: Tensor, H: Tensor, n: int, m: int) -> float:
    """Return the least tr(R H Rᵀ) of one row W [d] over all n:m supports, by trying each."""
    d = len(W)
    groups = list(itertools.combinations(range(m), n))
    least = math.inf
    for choice in itertools.product(groups, repeat=d // m):
        support = torch.zeros(1, d, dtype=torch.bool)
        support[0, [m * g + i for g, chosen in enumerate(choice) for i in chosen]] = True
        R = W[None] - refitted(W[None], H, support)
        least = min(least, (R @ H @ R.T).item())
    return least


# Sparse plus low rank: W and the damped H -> S, U·V [o, d] float64

Prune = Callable[[Tensor, Tensor, str], Tensor]


def eora(W: Tensor, H: Tensor, pattern: str, rank: int, prune: Prune) -> tuple[Tensor, Tensor]:
    S = prune(W, H, pattern)
    return S, best_low_rank(W - S, H, rank)


def hassle_free(W: Tensor, H: Tensor, pattern: str, rank: int, prune: Prune, turns: int) -> tuple[Tensor, Tensor]:
    S, UV = torch.zeros_like(W), torch.zeros_like(W)
    for _ in range(turns):
        S = prune(W - UV, H, pattern)
        UV = best_low_rank(W - S, H, rank)
    return S, UV


def oats(W: Tensor, H: Tensor, pattern: str, rank: int, turns: int) -> tuple[Tensor, Tensor]:
    """Solve by algorithm 2 of arXiv 2409.13652: plain SVDs of the scaled weight."""
    scale = torch.diagonal(H).sqrt()
    A = W * scale
    S, L = torch.zeros_like(A), torch.zeros_like(A)
    for _ in range(turns):
        u, values, vt = torch.linalg.svd(A - S, full_matrices=False)
        L = (u[:, :rank] * values[:rank]) @ vt[:rank]
        S = (A - L) * project(A - L, pattern)
    return S / scale, L / scale


# Transformer matching


def cosine(done: float, final: float) -> float:
    """Return the factor of a learning rate, from 1 to `final`, after the fraction `done` of the steps."""
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


class Adam:
    """Adam for one tensor: Kingma & Ba, arXiv 1412.6980, algorithm 1, with its defaults."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.steps = parameter, 0
        self.m, self.v = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def step(self, gradient: Tensor, lr: Tensor) -> None:
        self.steps += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m, v = self.m / (1 - 0.9**self.steps), self.v / (1 - 0.999**self.steps)
        self.parameter -= lr * m / (v.sqrt() + 1e-8)


def match(
    block: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    X: Tensor,
    T: Tensor,
    epochs: Sequence[Sequence[slice]],
    lr: float,
    low_rank_lr: float,
    vector_lr: float,
    final: float,
) -> tuple[dict[str, Tensor], list[float]]:
    """Minimise ‖f(X) − T‖² by Adam over all parts of the block at once.

    Learning rates are relative to sizes. With `values` the kept values of a linear:

        S               lr · rms(values) / √(kept values per row)
        U, V            low_rank_lr · the rate of S
        bias            lr · vector_lr · rms(values) · √(kept values per row)
        norms           lr · vector_lr · rms(weight of the norm)

    All are multiplied by √(steps / 100) where fewer than 100 steps are taken.

    Args:
        block: The block f.
        factors: Linear -> its S, U, V, dense; S trains where it is not 0.
        X: What enters the block, [windows, tokens, h].
        T: What the block should output, [windows, tokens, h].
        epochs: The windows of each step, epoch by epoch.
        lr: Learning rate, relative as above.
        low_rank_lr: Factor for U and V.
        vector_lr: Factor for biases and norms.
        final: Factor of all learning rates after the last step, reached by cosine.

    Returns:
        The parts of the block after training, and the relative loss before training and in each epoch.
    """
    block, X, T = copy.deepcopy(block).double(), X.double(), T.double()
    taken, total = 0, sum(map(len, epochs))
    lr *= math.sqrt(min(total, 100) / 100)
    leaves: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    rates: dict[str, Tensor] = {}
    for name, (S, U, V) in factors.items():
        mask = masks[name] = S != 0
        values = S[mask].double()
        size, per_row = values.square().mean().sqrt(), len(values) / len(S)
        leaves |= {f"{name}.S": S.double(), f"{name}.U": U.double(), f"{name}.V": V.double()}
        rates[f"{name}.S"] = lr * size / math.sqrt(per_row)
        rates |= dict.fromkeys((f"{name}.U", f"{name}.V"), low_rank_lr * lr * size / math.sqrt(per_row))
        rates[f"{name}.bias"] = lr * vector_lr * size * math.sqrt(per_row)
    for name, parameter in block.named_parameters():
        module = name.rpartition(".")[0]
        if name.removesuffix(".weight") not in factors:
            leaves[name] = parameter.detach().clone()
            if module not in factors:
                rates[name] = lr * vector_lr * block.get_parameter(f"{module}.weight").square().mean().sqrt()

    def error(windows: slice) -> Tensor:
        weights = {
            f"{name}.weight": leaves[f"{name}.S"] * mask + leaves[f"{name}.U"] @ leaves[f"{name}.V"]
            for name, mask in masks.items()
        }
        others = {name: leaf for name, leaf in leaves.items() if name[-2:] not in (".S", ".U", ".V")}
        output: Tensor = torch.func.functional_call(block, weights | others, X[windows])
        return ((output - T[windows]).square().sum(-1) / T[windows].square().sum(-1)).sum()

    optimizers = {name: Adam(leaf) for name, leaf in leaves.items()}
    tokens = T.shape[:-1].numel()
    curve = [error(slice(None)).item() / tokens]
    for steps in epochs:
        lost = 0.0
        for windows in steps:
            for leaf in leaves.values():
                leaf.requires_grad_()
            loss = error(windows)
            gradients = dict(zip(leaves, torch.autograd.grad(loss * T.shape[-1], list(leaves.values())), strict=True))
            lost += loss.item()
            for name, leaf in leaves.items():
                leaf.requires_grad_(False)
                optimizers[name].step(gradients[name], rates[name] * cosine(taken / total, final))
            taken += 1
        curve.append(lost / tokens)
    return leaves, curve


# How sparse each block may be


def outlier_ratio(linears: Sequence[tuple[Tensor, Tensor]], times: float) -> float:
    """Return OWL's ratio of outliers (arXiv 2310.05175): how many of A_ij = ‖X_j‖·|W_ij| exceed `times` their mean.

    Args:
        linears: W [o, d] and the inputs X [n, d] of each linear of a block.
        times: The factor of the mean.
    """
    scores = torch.cat([(W.double().abs() * X.double().norm(dim=0)).flatten() for W, X in linears])
    return (scores > times * scores.mean()).double().mean().item()
