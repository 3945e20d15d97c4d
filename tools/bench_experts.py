"""Measure how much weight the own Gram matrix of an expert with few tokens should get: `calibration/expert_grams.py`.

    python tools/bench_experts.py MODEL TEXT

Eight clusters of a dense model's tokens, found by k-means of what enters an MLP, stand for experts. For each of the
three largest, a linear is solved at 2:4 + 16 in the Gram matrix w · H_e / n + (1 - w) · H / N: H_e of n tokens of the
cluster, H of all N tokens. Printed is the loss on the other tokens of the cluster, a line for each ratio n / d and a
column for each weight w.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamslr.calibration.tokens import calibration_windows
from streamslr.solvers import find_method, parse_pattern
from streamslr.solvers.base import LinearProblem, relative_error

LINEARS = [(2, "up_proj"), (5, "up_proj"), (2, "down_proj"), (5, "down_proj")]
RATIOS = (0.125, 0.25, 0.5, 1, 2, 4)
WEIGHTS = (0, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
CLUSTERS, LARGEST = 8, 3


def clusters(x: Tensor, draw: torch.Generator) -> Tensor:
    """Return the cluster [n] of each row of x [n, d], by ten rounds of k-means."""
    centres = x[torch.randperm(len(x), generator=draw)[:CLUSTERS]]
    for _ in range(10):
        nearest = torch.cdist(x, centres).argmin(1)
        centres = torch.stack([x[nearest == j].mean(0) for j in range(CLUSTERS)])
    return nearest


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    args = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.eval()
    ids = calibration_windows(AutoTokenizer.from_pretrained(args.model), args.text, 320, 256, 0).ids
    solver, pattern = find_method("3basil").solver, parse_pattern("2:4")
    for layer, name in LINEARS:
        mlp = model.model.layers[layer].mlp
        linear = mlp.get_submodule(name)
        entering: list[Tensor] = []
        inputs: list[Tensor] = []
        hooks = [
            mlp.register_forward_pre_hook(lambda _, x, to=entering: to.append(x[0].flatten(0, 1))),
            linear.register_forward_pre_hook(lambda _, x, to=inputs: to.append(x[0].flatten(0, 1))),
        ]
        for start in range(0, len(ids), 16):
            model.model(ids[start : start + 16])
        for hook in hooks:
            hook.remove()
        x, d = torch.cat(inputs), linear.in_features
        draw = torch.Generator().manual_seed(0)
        cluster = clusters(torch.cat(entering), draw)
        largest = cluster.bincount().argsort(descending=True)[:LARGEST]
        of_all = x.T @ x / len(x)
        print(f"block {layer} {name}, d = {d}; w = {WEIGHTS}", flush=True)
        for ratio in RATIOS:
            n, losses = round(ratio * d), torch.zeros(len(WEIGHTS))
            for number in largest:
                mine = x[cluster == number]
                mine = mine[torch.randperm(len(mine), generator=draw)]
                own, other = mine[:n].T @ mine[:n] / n, mine[n:].T @ mine[n:]
                for column, w in enumerate(WEIGHTS):
                    problem = LinearProblem(name, linear.weight, w * own + (1 - w) * of_all, pattern, rank=16)
                    losses[column] += relative_error(linear.weight, other, solver.solve(problem).dense()) / LARGEST
            print(f"  n / d = {ratio:<6}" + "  ".join(f"{loss:.5f}" for loss in losses), flush=True)


if __name__ == "__main__":
    main()
