"""The multi-task lasso (a group lasso whose groups are neurons or channels), by Gram matrices alone, and its refit.

A problem is a namespace of gram, the function V -> V G with G = Phi Phi' / N; cross, B = Psi Phi' / N (D, K, taps); and energy,
||Psi||^2 / N: V (D, K, taps) is to map the features Phi (K taps, N) to the targets Psi (D, N), and group k is V[:, k].
"""

import math
from types import SimpleNamespace

import torch


def group_lasso(problem, lam, start, tolerance=1e-4, steps=20_000):
    """The multi-task lasso, by accelerated proximal gradient steps (FISTA) with restarts, to a certified duality gap.

        min_V  1/2 (energy - 2 <V, B> + <V, V G>)  +  lam lam_max sum_k ||V_k||_F

    The residual, times an alpha that brings each channel's correlation ||(B - V G)_k|| below the penalty, is dual feasible.

    Args:
        problem: as above.
        lam: share of lam_max = max_k ||B_k||_F, from which on V = 0 is the solution.
        start: (D, K, taps) where to begin.
        tolerance: of the gap, relative to the objective.
        steps: at most so many, a multiple of 10.
    Returns:
        V, exactly 0 at the channels that are dropped, and a dict of penalty (lam lam_max), gap (relative) and steps.
    """
    penalty = lam * norms(problem.cross).max().item()
    vector = torch.ones_like(start[:1])
    for _ in range(
        50
    ):  # power iteration; of ReLU features the largest eigenvector has no negative entry either
        vector = problem.gram(vector / vector.norm())
    largest = 1.02 * vector.norm().item()
    if not penalty:
        return torch.zeros_like(start), {'penalty': 0.0, 'gap': 0.0, 'steps': 0}

    V = ahead = start
    VG = ahead_G = problem.gram(V)
    momentum = 1.0
    for step in range(steps + 1):
        if step % 10 == 0:
            residual, fit = (
                squared_residual(problem, V, VG),
                problem.energy - (V * problem.cross).sum().item(),
            )
            objective = residual / 2 + penalty * norms(V).sum().item()
            alpha = penalty / max(penalty, norms(problem.cross - VG).max().item())
            gap = (objective - alpha * fit + alpha**2 / 2 * residual) / objective
            if gap <= tolerance or step == steps:
                break
        new = ahead - (ahead_G - problem.cross) / largest
        sizes = norms(new)
        new = new * ((sizes - penalty / largest).clamp(min=0) / sizes.clamp(min=1e-300))[:, None]
        new_G = problem.gram(new)
        move = new - ahead
        curvature = ((new_G - ahead_G) * move).sum().item() / max(
            move.square().sum().item(), 1e-300
        )
        if (
            curvature > largest
        ):  # the power iteration missed the largest eigenvalue: this step was too long
            largest = 1.02 * curvature
            continue
        if ((ahead - new) * (new - V)).sum() > 0:  # the momentum points uphill
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        weight = (momentum - 1) / following
        ahead, ahead_G = new + weight * (new - V), new_G + weight * (new_G - VG)
        V, VG, momentum = new, new_G, following
    return V, {'penalty': penalty, 'gap': gap, 'steps': step}


def ridge(problem, decay, V, tolerance=1e-8, steps=5_000):
    """Solves V (G + diag(decay)) = B on the channels of finite decay, by conjugate gradients for each output, from V."""
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
        if step % 10 == 0:
            if square.sum() <= tolerance**2 * target.square().sum():
                break
        image = system(direction)
        size = square / dot(direction, image).clamp(min=1e-300)
        V, residual = V + size * direction, residual - size * image
        square, before = dot(residual, residual), square
        direction = residual + square / before.clamp(min=1e-300) * direction
    return V


def scaled(problem, scale):
    """The problem in U = V / scale."""
    return SimpleNamespace(
        gram=lambda U: problem.gram(U * scale) * scale,
        cross=problem.cross * scale,
        energy=problem.energy,
    )


def norms(V):
    """The Frobenius norm of each channel's group of weights, (K,) of V (D, K, taps)."""
    return torch.linalg.vector_norm(V, dim=(0, 2))


def squared_residual(problem, V, VG):
    """||V Phi - Psi||^2 / N."""
    return problem.energy - 2 * (V * problem.cross).sum().item() + (V * VG).sum().item()
