"""Neuron sharing: a student network fits a small teacher, with and without weight decay.

python -m studies.neuron_sharing --out docs/neuron_sharing.png

In two dimensions, after the synthetic experiment of Shenouda et al. (arXiv 2305.16534), with ten
times their decay and a tenth of their steps; docs/compress.md. It takes about a minute.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from conf import Parser, run_program

STEPS, RATE, DECAY = 100_000, 0.2, 5e-4
TEACHER, STUDENT = 5, 100


def draw_problem():
    """Inputs (50, 3), a teacher's outputs (50, 2), and a student's initial W (100, 3), V (2, 100).

    Inputs are N(0, I) in two dimensions, with a third entry 1 for the bias.
    """
    torch.manual_seed(43)
    inputs = torch.randn(50, 2)

    def network(width):
        return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2, bias=False))

    teacher, student = network(TEACHER), network(STUDENT)
    targets = teacher(inputs)
    inputs = torch.cat([inputs, torch.ones(50, 1)], 1)
    W = torch.cat([student[0].weight, student[0].bias[:, None]], 1)
    return [tensor.detach().double().numpy() for tensor in (inputs, targets, W, student[2].weight)]


def train(inputs, targets, W, V, decay):
    """Full-batch gradient descent on the mean squared error of V relu(W x).

    With decay > 0 it minimizes the error + decay * sum_k ||v_k|| over neurons whose w_k (rows of W)
    have norm 1, which is weight decay up to rescalings of neurons (v_k are the columns of V).

    Returns:
        W, V and the mean squared error.
    """
    if decay:
        norms = np.linalg.norm(W, axis=1)
        W, V = W / norms[:, None], V * norms
    for _ in range(STEPS):
        hidden = np.maximum(inputs @ W.T, 0)
        error = 2 * (hidden @ V.T - targets) / targets.size
        back = (error @ V) * (hidden > 0)
        W, V = W - RATE * back.T @ inputs, V - RATE * error.T @ hidden
        if decay:
            # The proximal map of decay * sum_k ||v_k|| shrinks each v_k; w_k returns to the sphere.
            norms = np.linalg.norm(V, axis=0)
            V = V * np.maximum(1 - RATE * decay / np.maximum(norms, 1e-300), 0)
            W = W / np.linalg.norm(W, axis=1, keepdims=True)
    return W, V, np.mean((np.maximum(inputs @ W.T, 0) @ V.T - targets) ** 2)


def show(panels, name, W, V, loss):
    """Prints how many neurons of a student are active; draws them, a panel per output."""
    lengths = np.linalg.norm(W, axis=1)
    through = np.abs(V) * lengths
    norms = np.linalg.norm(V, axis=0) * lengths
    active = norms > 1e-3
    both = (through > 1e-3).all(0)[active].mean()
    print(
        f'{name}: {active.sum()} of {STUDENT} neurons active, {both:.0%} of them feed both '
        f'outputs, mean squared error {loss:.2g}, sum of ||w_k|| ||v_k|| {norms.sum():.3f}'
    )
    angle, bias = np.arctan2(W[:, 1], W[:, 0]), W[:, 2] / lengths
    for output, panel in enumerate(panels):
        area = 300 * through[output, active]
        panel.scatter(angle[active], bias[active], s=area, alpha=0.6, color=f'C{output}')
        panel.set(title=f'output {output + 1}, {name}: {active.sum()} active')
        panel.set_xlim(-np.pi, np.pi)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('bias / length')


def main(argv=None):
    parser = Parser('python -m studies.neuron_sharing', __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument('--out', type=Path, metavar='FILE', help='draw a picture')
    path = parser.parse_args(argv).out
    import matplotlib.figure

    inputs, targets, W, V = draw_problem()
    figure = matplotlib.figure.Figure(figsize=(9, 6), layout='constrained')
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    show(panels[0], 'without weight decay', *train(inputs, targets, W, V, decay=0))
    show(panels[1], 'with weight decay', *train(inputs, targets, W, V, decay=DECAY))
    for panel in panels[1]:
        panel.set_xlabel('direction of the incoming weights')
    if path:
        figure.savefig(path, dpi=130)


if __name__ == '__main__':
    sys.exit(run_program(main))
