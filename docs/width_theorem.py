"""How many neurons the exact multi-task lasso needs: solutions on random problems against the width bounds (docs/compress.md).

python docs/width_theorem.py   draws docs/width_theorem.png, in under a minute
"""

from pathlib import Path

import numpy as np


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
        if (move * np.linalg.norm(out, axis=1)).sum() < 0:  # 0 but for rounding; the objective must not rise
            move = -move
        shares = np.where(move > 0, t[used] / np.where(move > 0, move, 1), np.inf)
        t[used] = np.maximum(t[used] - shares.min() * move, 0)
        t[used[shares.argmin()]] = 0


def width_bound(r, q):
    """Neurons that suffice, of features of rank r and targets of rank q <= r: r q - q (q - 1) / 2."""
    return r * q - q * (q - 1) // 2


def main(draws=100):
    import matplotlib.figure

    N, D, Ks = 3, 2, range(7, 12)
    figure = matplotlib.figure.Figure(figsize=(13, 3.2), layout='constrained')
    for panel, K in zip(figure.subplots(1, len(Ks), sharey=True), Ks):
        rng, counts = np.random.default_rng(K), []
        for _ in range(draws):
            features, targets = rng.standard_normal((K, N)), rng.standard_normal((D, N))
            t, dual, _ = exact_lasso(features, targets)
            counts.append(np.count_nonzero(vertex(t, dual, features)))
        print(f'K = {K}: ', {n: counts.count(n) for n in sorted(set(counts))})
        panel.bar(*np.unique(counts, return_counts=True), color='#0072B2')
        for bound, style, words in (
            (N, ':', 'rank of the features'),
            (width_bound(N, D), '-', 'r q - q (q - 1) / 2'),
            (N * D, '--', 'r q'),
            (N * D + 1, '-.', 'N D + 1'),
        ):
            panel.axvline(bound, color='black', linestyle=style, linewidth=1, label=words)
        panel.set(title=f'K = {K}', xlabel='neurons in use', xticks=range(2, N * D + 2))
    figure.axes[0].set_ylabel(f'problems of {draws}')
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside right center', frameon=False)
    figure.savefig(Path(__file__).with_suffix('.png'), dpi=130)


if __name__ == '__main__':
    main()
