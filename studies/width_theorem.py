"""How many neurons the exact multi-task lasso needs: solutions on random problems against the width bounds (docs/compress.md).

    python docs/width_theorem.py                           draws docs/width_theorem.png, in a minute
    python docs/width_theorem.py --figure 3                draws docs/width_theorem_3.png, in minutes; or 4
    python docs/width_theorem.py --N 4 --D 3 --K 9 --rY 2  other problems: into the current directory, my_width_theorem.png

They are Figures 5, 3 and 4 of Shenouda et al. (arXiv 2305.16534).
"""

import argparse
from pathlib import Path

import numpy as np

from conf import ROOT


def exact_lasso(features, targets, steps=20_000, tolerance=1e-12):
    """Solves min sum_k ||v_k|| subject to V Phi = Psi, by its dual form: v_k = t_k Lambda phi_k with t >= 0.

    Iterates t_k <- t_k ||Lambda phi_k|| with Lambda = Psi (sum_k t_k phi_k phi_k')^-1, which is iteratively reweighted least
    squares: every iterate is feasible, and the objective never rises.

    Args:
        features: (K, N) Phi, a row per neuron, whose row space holds that of the targets.
        targets: (D, N) Psi.
        tolerance: of the duality gap, relative to the objective.
    Returns:
        t (K,) and Lambda (D, N), and the relative gap.
    """
    t = np.ones(len(features))
    for _ in range(steps):
        dual = targets @ np.linalg.pinv((features.T * t) @ features, rcond=1e-11, hermitian=True)
        norms = np.linalg.norm(dual @ features.T, axis=0)
        t = t * norms
        gap = 1 - (dual * targets).sum() / norms.max() / t.sum()
        if gap < tolerance:
            break
        t[t < 1e-14 * t.max()] = 0
    return t, dual, gap


def vertex(t, dual, features, tolerance=1e-7):
    """Another solution, with as few neurons as a basic feasible solution of the same linear equations has.

    Every t >= 0 on the active set with Lambda (sum_k t_k phi_k phi_k') = Psi is a solution. As long as the matrices
    Lambda phi_k phi_k' of the neurons in use are dependent, t moves along a dependency until one of them is 0.
    """
    t = np.where(t > tolerance * t.max(), t, 0)
    while True:
        used = np.flatnonzero(t)
        out = features[used] @ dual.T
        matrices = np.einsum('kd,kn->dnk', out, features[used]).reshape(-1, len(used))
        sizes = np.linalg.norm(matrices, axis=0)
        _, sigma, rows = np.linalg.svd(matrices / sizes)
        if len(used) <= len(sigma) and sigma[-1] > 1e-7 * sigma[0]:
            return t
        move = rows[-1] / sizes
        if (
            move * np.linalg.norm(out, axis=1)
        ).sum() < 0:  # 0 but for rounding; the objective must not rise
            move = -move
        shares = np.where(move > 0, t[used] / np.where(move > 0, move, 1), np.inf)
        t[used] = np.maximum(t[used] - shares.min() * move, 0)
        t[used[shares.argmin()]] = 0


def width_bound(r, q):
    """Neurons that suffice, of features of rank r and targets of rank q <= r: r q - q (q - 1) / 2."""
    return r * q - q * (q - 1) // 2


def draw_problem(rng, K, N, D, rX=0, rY=0):
    """Gaussian features (K, N) and targets (D, N), or, where a rank is given, products of Gaussian matrices.

    Targets then are V Phi with a Gaussian V (D, K), of rank rY if that is given, so that V is a solution.
    """
    normal = rng.standard_normal
    features = normal((K, rX)) @ normal((rX, N)) if rX else normal((K, N))
    if rX or rY:
        return features, (normal((D, rY)) @ normal((rY, K)) if rY else normal((D, K))) @ features
    return features, normal((D, N))


FIGURES = {
    3: [{'K': 500, 'N': N, 'D': 10} for N in (10, 20, 30, 40)],
    4: [{'K': 200, 'N': 20, 'D': r, 'rX': r} for r in (2, 5, 10, 20)],
}


def main(problems, draws, path):
    """Draws how many neurons are used in so many random problems, a panel per problem."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(13, 3.2), layout='constrained')
    panels = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    for panel, problem in zip(panels, problems):
        rng, counts = np.random.default_rng(0), []
        for _ in range(draws):
            features, targets = draw_problem(rng, **problem)
            t, dual, _ = exact_lasso(features, targets)
            counts.append(np.count_nonzero(vertex(t, dual, features)))
        words = ', '.join(f'{name} = {value}' for name, value in problem.items() if value)
        least, median, most = min(counts), np.median(counts), max(counts)
        print(f'{words}: {least} to {most} neurons, median {median:g}', flush=True)
        r = problem.get('rX') or min(problem['K'], problem['N'])
        q = problem.get('rY') or min(problem['D'], r)
        width = max(1, r * q // 50)  # of a bar, so that it can be seen
        panel.hist(
            counts, np.arange(least, most + width + 1, width) - 0.5, rwidth=0.8, color='#0072B2'
        )
        bounds = [
            (r, ':', 'r, rank of the features'),
            (width_bound(r, q), '-', 'r q - q (q - 1) / 2'),
            (r * q, '--', 'r q, q rank of the targets'),
            (problem['N'] * problem['D'] + 1, '-.', 'N D + 1'),
        ]
        for bound, style, label in bounds[:3] if problem.get('rX') else bounds:
            panel.axvline(bound, color='black', linestyle=style, linewidth=1, label=label)
        panel.set(title=words, xlabel='neurons in use')
        panel.title.set_size(9)
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].set_ylabel(f'problems of {draws}')
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc='outside right center', frameon=False
    )
    figure.savefig(path, dpi=110)


def arguments(words=None):
    """What the command line asks for, as the arguments of `main`."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument(
        '--K',
        type=int,
        nargs='+',
        default=[7, 8, 9, 10, 11],
        help='neurons, a panel each (7 8 9 10 11)',
    )
    parser.add_argument('--N', type=int, default=3, help='samples (3)')
    parser.add_argument('--D', type=int, default=2, help='outputs (2)')
    parser.add_argument('--rX', type=int, default=0, help='rank of the features (0: full)')
    parser.add_argument('--rY', type=int, default=0, help='rank of the targets (0: full)')
    parser.add_argument('--draws', type=int, help='problems in a panel (100, or 10 with --figure)')
    parser.add_argument(
        '--figure',
        type=int,
        choices=FIGURES,
        help='its problems, in place of --K, --N, --D, --rX, --rY',
    )
    given = parser.parse_args(words)
    shipped = parser.parse_args([] if given.figure is None else ['--figure', str(given.figure)])
    folder, prefix = (ROOT / 'docs', '') if given == shipped else (Path(), 'my_')
    draws = given.draws if given.draws is not None else 10 if given.figure else 100
    if draws < 1:
        parser.error(f'--draws {draws}: must be at least 1')
    if given.figure:
        return FIGURES[given.figure], draws, folder / f'{prefix}width_theorem_{given.figure}.png'
    for K in given.K:
        rank = given.rX or min(K, given.N)
        if min(K, given.N, given.D) < 1 or not 0 <= given.rX <= min(K, given.N):
            parser.error(
                '--K, --N and --D must be positive, and --rX between 0 and the least of K and N'
            )
        if K < given.N and not (given.rX or given.rY):
            parser.error(
                f'--K {K}: fewer neurons than the {given.N} samples fit no Gaussian targets; give a rank, --rX or --rY'
            )
        if not 0 <= given.rY <= min(given.D, rank):
            parser.error(
                f'--rY must lie between 0 and {min(given.D, rank)}, which D and the features allow'
            )
    problems = [
        {'K': K, 'N': given.N, 'D': given.D, 'rX': given.rX, 'rY': given.rY} for K in given.K
    ]
    return problems, draws, folder / f'{prefix}width_theorem.png'


if __name__ == '__main__':
    main(*arguments())
