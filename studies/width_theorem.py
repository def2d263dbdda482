"""How many neurons the exact multi-task lasso needs: random problems against the width bounds.

python -m studies.width_theorem                           Figure 5 of Shenouda et al., a minute
python -m studies.width_theorem --figure 3                Figure 3 (arXiv 2305.16534), or 4; minutes
python -m studies.width_theorem --N 4 --D 3 --K 9 --rY 2  other problems
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from conf import Parser, run_program

FIGURES = {
    3: [{'K': 500, 'N': N, 'D': 10} for N in (10, 20, 30, 40)],
    4: [{'K': 200, 'N': 20, 'D': r, 'rX': r} for r in (2, 5, 10, 20)],
}


def exact_lasso(features, targets, steps=20_000, tolerance=1e-12):
    """Solves min sum_k ||v_k|| subject to V Phi = Psi, by its dual form v_k = t_k Lambda phi_k.

    Iteratively reweighted least squares: t_k <- t_k ||Lambda phi_k|| for t >= 0, with
    Lambda = Psi (sum_k t_k phi_k phi_k')^-1. Every iterate is feasible, the objective never rises.

    Args:
        features: (K, N) Phi, a row per neuron; its row space contains the targets'.
        targets: (D, N) Psi.
        tolerance: of the duality gap, relative to the objective.
    Returns:
        t (K,), Lambda (D, N) and the relative gap.
    """
    t = np.ones(len(features))
    for _ in range(steps):
        dual = targets @ np.linalg.pinv((features.T * t) @ features, rcond=1e-11, hermitian=True)
        norms = np.linalg.norm(dual @ features.T, axis=0)
        t = t * norms
        # Lambda / max_k ||Lambda phi_k|| is dual feasible: its value bounds the sum of t_k.
        gap = 1 - (dual * targets).sum() / norms.max() / t.sum()
        if gap < tolerance:
            break
        t[t < 1e-14 * t.max()] = 0
    return t, dual, gap


def vertex(t, dual, features, tolerance=1e-7):
    """Another solution t with few neurons, a basic feasible one of the same linear equations.

    Every t >= 0 on the active set with Lambda (sum_k t_k phi_k phi_k') = Psi is a solution. While
    the matrices Lambda phi_k phi_k' of the neurons in use are linearly dependent, t moves along a
    dependency until one of its entries is 0.
    """
    t = np.where(t > tolerance * t.max(), t, 0)
    while True:
        used = np.flatnonzero(t)
        out = features[used] @ dual.T
        matrices = np.einsum('kd,kn->dnk', out, features[used]).reshape(-1, len(used))
        sizes = np.linalg.norm(matrices, axis=0)
        _, sigma, rows = np.linalg.svd(matrices / sizes)
        if len(used) <= len(sigma) and sigma[-1] > 1e-7 * sigma[0]:  # independent
            return t
        move = rows[-1] / sizes
        # The objective changes by this sum, 0 but for rounding; it must not rise.
        if (move * np.linalg.norm(out, axis=1)).sum() < 0:
            move = -move
        lengths = np.where(move > 0, t[used] / np.where(move > 0, move, 1), np.inf)
        t[used] = np.maximum(t[used] - lengths.min() * move, 0)
        t[used[lengths.argmin()]] = 0


def width_bound(r, q):
    """Neurons that suffice for features of rank r and targets of rank q <= r: docs/compress.md."""
    return r * q - q * (q - 1) // 2


def draw_problem(rng, K, N, D, rX=0, rY=0):
    """Gaussian features Phi (K, N) and targets (D, N).

    With a rank, features of rank rX are a product of Gaussian matrices, and targets V Phi with a
    Gaussian V (D, K), of rank rY if that is given, so that V is a solution.
    """
    normal = rng.standard_normal
    features = normal((K, rX)) @ normal((rX, N)) if rX else normal((K, N))
    if rX or rY:
        V = normal((D, rY)) @ normal((rY, K)) if rY else normal((D, K))
        return features, V @ features
    return features, normal((D, N))


def count_neurons(problem, draws):
    """The numbers of neurons that the solutions of `draws` random problems use."""
    rng, counts = np.random.default_rng(0), []
    for _ in range(draws):
        features, targets = draw_problem(rng, **problem)
        t, dual, _ = exact_lasso(features, targets)
        counts.append(np.count_nonzero(vertex(t, dual, features)))
    return counts


def title(problem):
    return ', '.join(f'{name} = {value}' for name, value in problem.items() if value)


def draw(problems, counts, path):
    """Draws a histogram of the counts of each problem, with the width bounds."""
    import matplotlib.figure

    rows = math.ceil(len(problems) / 2)
    figure = matplotlib.figure.Figure(figsize=(8.5, 0.6 + 2.4 * rows), layout='constrained')
    panels = figure.subplots(rows, min(2, len(problems)), sharey=True, squeeze=False)
    for panel in panels.flat[len(problems) :]:
        panel.remove()
    first, panels = panels[:, 0], panels.flat[: len(problems)]
    for panel, problem, numbers in zip(panels, problems, counts):
        r = problem.get('rX') or min(problem['K'], problem['N'])
        q = problem.get('rY') or min(problem['D'], r)
        bar = max(1, r * q // 50)  # wide enough to be seen
        edges = np.arange(min(numbers), max(numbers) + bar + 1, bar) - 0.5
        panel.hist(numbers, edges, rwidth=0.8, color='#0072B2')
        bounds = [
            (r, ':', 'r, rank of the features'),
            (width_bound(r, q), '-', 'r q - q (q - 1) / 2'),
            (r * q, '--', 'r q, q rank of the targets'),
        ]
        if not problem.get('rX'):
            bounds.append((problem['N'] * problem['D'] + 1, '-.', 'N D + 1'))
        for bound, style, label in bounds:
            panel.axvline(bound, color='black', linestyle=style, linewidth=1, label=label)
        panel.set(title=title(problem), xlabel='neurons in use')
        panel.title.set_size(9)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in first:
        panel.set_ylabel(f'problems of {len(counts[0])}')
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc='outside lower center', ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def parse_arguments(argv=None):
    """The command line as (problems, draws, path of the picture or None)."""
    parser = Parser('python -m studies.width_theorem', __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    K = [7, 8, 9, 10, 11]
    add('--K', type=int, nargs='+', default=K, help='neurons, a panel each (7 8 9 10 11)')
    add('--N', type=int, default=3, help='samples (3)')
    add('--D', type=int, default=2, help='outputs (2)')
    add('--rX', type=int, default=0, help='rank of the features (0: full)')
    add('--rY', type=int, default=0, help='rank of the targets (0: full)')
    add('--draws', type=int, help='problems in a panel (100, or 10 with --figure)')
    add('--figure', type=int, choices=FIGURES, help='the problems of a figure of the paper')
    add('--out', type=Path, metavar='FILE', help='draw a picture, as docs/width_theorem.png')
    options = parser.parse_args(argv)
    draws = options.draws
    if draws is None:
        draws = 10 if options.figure else 100
    if draws < 1:
        parser.error(f'--draws {draws}: must be at least 1')
    if options.figure:
        return FIGURES[options.figure], draws, options.out
    N, D, rX, rY = options.N, options.D, options.rX, options.rY
    for K in options.K:
        r = rX or min(K, N)
        if not (1 <= r <= min(K, N) and 0 <= rY <= min(D, r)):
            ranks = 'rX must be at most K and N, rY at most D and the rank of the features'
            parser.error(f'--K {K} --N {N} --D {D} --rX {rX} --rY {rY}: {ranks}')
        if K < N and not (rX or rY):
            reason = f'fewer neurons than the {N} samples fit no Gaussian targets'
            parser.error(f'--K {K}: {reason}; give a rank, --rX or --rY')
    return [{'K': K, 'N': N, 'D': D, 'rX': rX, 'rY': rY} for K in options.K], draws, options.out


def main(argv=None):
    problems, draws, path = parse_arguments(argv)
    counts = []
    for problem in problems:
        numbers = count_neurons(problem, draws)
        counts.append(numbers)
        spread = f'{min(numbers)} to {max(numbers)} neurons, median {np.median(numbers):g}'
        print(f'{title(problem)}: {spread}', flush=True)
    if path:
        draw(problems, counts, path)


if __name__ == '__main__':
    sys.exit(run_program(main))
