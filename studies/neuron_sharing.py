"""Neuron sharing in two dimensions: a student network fits a small teacher, with and without weight decay (docs/compress.md).

python docs/neuron_sharing.py   draws docs/neuron_sharing.png, in about a minute

After the synthetic experiment of Shenouda et al. (arXiv 2305.16534), with a decay ten times theirs and a tenth of their steps.
"""

import numpy as np
import torch

from conf import ROOT

STEPS, RATE, DECAY = 100_000, 0.2, 5e-4
TEACHER, STUDENT = 5, 100


def draw_problem():
    """50 points x ~ N(0, I) (50, 3), the last entry 1 for the bias, a teacher's outputs (50, 2), and a student's W, V."""
    torch.manual_seed(43)
    inputs = torch.randn(50, 2)
    teacher, student = (
        torch.nn.Sequential(
            torch.nn.Linear(2, width), torch.nn.ReLU(), torch.nn.Linear(width, 2, bias=False)
        )
        for width in (TEACHER, STUDENT)
    )
    inputs, targets = torch.cat([inputs, torch.ones(50, 1)], 1), teacher(inputs).detach()
    W, V = torch.cat([student[0].weight, student[0].bias[:, None]], 1), student[2].weight
    return [tensor.detach().double().numpy() for tensor in (inputs, targets, W, V)]


def train(inputs, targets, W, V, decay):
    """Full-batch gradient descent on the mean squared error of V relu(W x).

    With `decay`, it minimizes the loss + decay * sum_k ||v_k|| over neurons whose w_k (rows of W, the bias in them) have norm
    1, which is weight decay up to rescalings: a step ends with the threshold of the v_k (columns of V) and w_k / ||w_k||.
    """
    if decay:
        norms = np.linalg.norm(W, axis=1)
        W, V = W / norms[:, None], V * norms
    for _ in range(STEPS):
        hidden = np.maximum(inputs @ W.T, 0)
        error = 2 * (hidden @ V.T - targets) / targets.size
        W, V = W - RATE * ((error @ V) * (hidden > 0)).T @ inputs, V - RATE * error.T @ hidden
        if decay:
            norms = np.linalg.norm(V, axis=0)
            V = V * np.maximum(1 - RATE * decay / np.maximum(norms, 1e-300), 0)
            W = W / np.linalg.norm(W, axis=1, keepdims=True)
    return W, V, np.mean((np.maximum(inputs @ W.T, 0) @ V.T - targets) ** 2)


def main():
    import matplotlib.figure

    inputs, targets, W0, V0 = draw_problem()
    figure = matplotlib.figure.Figure(figsize=(9, 6), layout='constrained')
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, (decay, words) in zip(
        panels, ((0, 'without weight decay'), (DECAY, 'with weight decay'))
    ):
        W, V, loss = train(inputs, targets, W0, V0, decay)
        lengths = np.linalg.norm(W, axis=1)
        through = np.abs(V) * lengths
        paths = np.linalg.norm(V, axis=0) * lengths
        active = paths > 1e-3
        shared = (through > 1e-3).all(0)[active].mean()
        print(
            f'{words}: {active.sum()} of {STUDENT} neurons active, {shared:.0%} of them feed both outputs, '
            f'mean squared error {loss:.2g}, sum of ||w_k|| ||v_k|| {paths.sum():.3f}'
        )
        angle = np.arctan2(W[:, 1], W[:, 0])
        for output, (panel, size) in enumerate(zip(row, through)):
            panel.scatter(
                angle[active],
                (W[:, 2] / lengths)[active],
                s=300 * size[active],
                alpha=0.6,
                color=f'C{output}',
            )
            panel.set(
                title=f'output {output + 1}, {words}: {active.sum()} active', xlim=(-np.pi, np.pi)
            )
            panel.grid(alpha=0.3)
        row[0].set_ylabel('bias / length')
    for panel in panels[1]:
        panel.set_xlabel('direction of the incoming weights')
    figure.savefig(ROOT / 'docs' / 'neuron_sharing.png', dpi=130)


if __name__ == '__main__':
    main()
