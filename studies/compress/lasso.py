"""The multi-task lasso, a group lasso whose groups are neurons or channels, and its ridge refit.

V (D, K, taps) is fitted so that V Phi is near Psi, for features Phi (K taps, N) and targets
Psi (D, N); group k is V[:, k]. The solvers read Gram matrices only, so N may be large.
"""

import math
from collections import namedtuple

import torch

# What the least-squares error depends on: `gram`, the function V -> V Phi Phi' / N on tensors
# (., K, taps); `cross`, Psi Phi' / N (D, K, taps); `energy`, ||Psi||^2 / N.
Problem = namedtuple('Problem', 'gram cross energy')


def group_lasso(problem, lam, start, tolerance=1e-4, steps=20_000):
    """The multi-task lasso, solved to a certified duality gap.

        min_V  1/(2N) ||V Phi - Psi||_F^2  +  lam lam_max sum_k ||V_k||_F

    Args:
        problem: a Problem.
        lam: share of lam_max = max_k ||cross_k||_F, the smallest penalty with solution V = 0.
        start: (D, K, taps), the first iterate.
        tolerance: of the duality gap, relative to the objective.
        steps: maximal number of steps, a multiple of 10.
    Returns:
        V, exactly 0 at the channels that are dropped, and a dict of penalty (lam lam_max), gap
        (relative to the objective) and steps.
    """
    penalty = lam * norms(problem.cross).max().item()
    if not penalty:
        return torch.zeros_like(start), {'penalty': 0.0, 'gap': 0.0, 'steps': 0}
    largest = 1.02 * _largest_eigenvalue(problem, start)
    V = ahead = start
    VG = ahead_G = problem.gram(V)
    momentum = 1.0
    # FISTA (Beck and Teboulle 2009) with adaptive restarts (O'Donoghue and Candes 2015). `ahead` is
    # the extrapolated point; V G is linear in V, so a step takes one product with the Gram matrix.
    for step in range(steps + 1):
        if step % 10 == 0:
            gap = _relative_gap(problem, V, VG, penalty)
            if gap <= tolerance or step == steps:
                break
        # A gradient step of length 1 / largest, then the proximal map, which shrinks each group.
        new = ahead - (ahead_G - problem.cross) / largest
        sizes = norms(new)
        shrunk = (sizes - penalty / largest).clamp(min=0) / sizes.clamp(min=1e-300)
        new = new * shrunk[:, None]
        new_G = problem.gram(new)
        # If the curvature along it exceeds `largest`, the step was too long: repeat it. (The power
        # iteration misses the largest eigenvalue if its start is orthogonal to the eigenvector.)
        move = new - ahead
        square = move.square().sum().item()
        curvature = ((new_G - ahead_G) * move).sum().item() / max(square, 1e-300)
        if curvature > largest:
            largest = 1.02 * curvature
            continue
        if ((ahead - new) * (new - V)).sum() > 0:  # the momentum points uphill: restart it
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        weight = (momentum - 1) / following
        ahead = new + weight * (new - V)
        ahead_G = new_G + weight * (new_G - VG)
        V, VG, momentum = new, new_G, following
    return V, {'penalty': penalty, 'gap': gap, 'steps': step}


def _largest_eigenvalue(problem, start):
    """The largest eigenvalue of the Gram matrix, approached from below by power iteration.

    It starts at ones: of ReLU features the largest eigenvector has no negative entry either.
    """
    vector = torch.ones_like(start[:1])
    for _ in range(50):
        vector = problem.gram(vector / vector.norm())
    return vector.norm().item()


def _relative_gap(problem, V, VG, penalty):
    """The duality gap of V, relative to the objective.

    The dual point is the residual times the largest alpha <= 1 that brings the correlation
    ||(cross - V G)_k|| of every channel below the penalty.
    """
    residual = squared_residual(problem, V, VG)
    objective = residual / 2 + penalty * norms(V).sum().item()
    alpha = penalty / max(penalty, norms(problem.cross - VG).max().item())
    fit = problem.energy - (V * problem.cross).sum().item()
    return (objective - alpha * fit + alpha**2 / 2 * residual) / objective


def ridge(problem, decay, V, tolerance=1e-8, steps=5_000):
    """Solves V (Phi Phi' / N + diag(decay)) = cross on the channels of finite decay, others are 0.

    Conjugate gradients from V, for all outputs at once with a step length for each, until the
    residual is below `tolerance`, relative to `cross`; decay is (K,).
    """
    kept = decay.isfinite()[:, None]
    decay = torch.where(kept, decay[:, None], 0)

    def system(V):
        return torch.where(kept, problem.gram(V) + decay * V, 0)

    def dot(a, b):
        return (a * b).sum((1, 2), keepdim=True)

    target = torch.where(kept, problem.cross, 0)
    residual = target - system(V)
    direction, square = residual, dot(residual, residual)
    for step in range(steps):
        if step % 10 == 0 and square.sum() <= tolerance**2 * target.square().sum():
            break
        image = system(direction)
        size = square / dot(direction, image).clamp(min=1e-300)
        V = V + size * direction
        residual = residual - size * image
        square, before = dot(residual, residual), square
        direction = residual + square / before.clamp(min=1e-300) * direction
    return V


def scaled(problem, scale):
    """The problem in U = V / scale, for a scale (K, 1) of each channel."""

    def gram(U):
        return problem.gram(U * scale) * scale

    return Problem(gram, problem.cross * scale, problem.energy)


def norms(V):
    """The Frobenius norm of each channel's group of weights, (K,) of V (D, K, taps)."""
    return torch.linalg.vector_norm(V, dim=(0, 2))


def squared_residual(problem, V, VG):
    """||V Phi - Psi||^2 / N."""
    return problem.energy - 2 * (V * problem.cross).sum().item() + (V * VG).sum().item()
