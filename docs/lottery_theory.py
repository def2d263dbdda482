"""How many samples a sparse student needs to recover its teacher, how fast and from how far (docs/sparse.md).

python docs/lottery_theory.py   draws docs/lottery_theory.png, in a quarter of an hour of one core

The setting of Zhang et al. (NeurIPS 2021, arXiv 2110.05667): a teacher f(x) = mean_j relu(w_j x) of K neurons
of unit norm, each of which reads r of the D inputs, x ~ N(0, I). The student knows which.
"""

from pathlib import Path

import numpy as np
import torch

D, K, TRIALS = 50, 5, 20
RECOVERED = 1e-3  # distance to the teacher, relative to its norm


def draw_problem(r, samples, radius, generator):
    """Teachers W, students at distance radius * ||W||, masks (TRIALS, D, K); inputs (TRIALS, samples, D)."""
    shape = TRIALS, D, K
    mask = torch.rand(shape, generator=generator).argsort(1).argsort(1) < r
    teacher, away = (torch.randn(shape, generator=generator, dtype=torch.double) * mask for _ in range(2))
    teacher /= teacher.norm(dim=1, keepdim=True)
    away *= radius * K**0.5 / away.norm(dim=(1, 2), keepdim=True)
    inputs = torch.randn(TRIALS, samples, D, generator=generator, dtype=torch.double)
    return teacher, teacher + away, mask, inputs


def learn(r, samples, radius, momentum, steps, seed=0):
    """Gradient descent with momentum on the mean of (f - y)^2 / 2, at rate K, until all have recovered.

    Returns:
        (steps, TRIALS) the relative distance to the teacher after each step.
    """
    teacher, student, mask, inputs = draw_problem(r, samples, radius, torch.Generator().manual_seed(seed))
    targets, before = (inputs @ teacher).relu_().mean(2), student
    distances = []
    for _ in range(steps):
        hidden = inputs @ student
        error = hidden.relu().mean(2) - targets
        gradient = mask * (inputs.transpose(1, 2) @ (error[..., None] * (hidden > 0))) / (K * samples)
        student, before = student - K * gradient + momentum * (student - before), student
        distances.append((student - teacher).norm(dim=(1, 2)) / K**0.5)
        if (distances[-1] <= RECOVERED).all():
            break
    return torch.stack(distances)


def recovered(r, samples, radius, steps=1500):
    """The share of the students that get back to their teacher, with momentum 0.8."""
    return (learn(r, samples, radius, 0.8, steps)[-1] <= RECOVERED).double().mean().item()


def half(samples, shares):
    """The number of samples at which half of the students recover, between those tried linearly."""
    above = next(index for index, share in enumerate(shares) if share >= 0.5)
    return float(np.interp(0.5, shares[above - 1 : above + 1], samples[above - 1 : above + 1]))


def samples_needed(r, ratios):
    """Numbers of samples, ratios times K r, the share of students that recover, and N50, where it is 1/2."""
    samples = [round(ratio * K * r) for ratio in ratios]
    shares = [recovered(r, n, 0.5) for n in samples]
    return samples, shares, half(samples, shares)


def steps_per_factor(r, samples):
    """Steps in which the distance falls by e, from 0.05 to RECOVERED, without momentum; a median."""
    distances = learn(r, samples, 0.1, 0.0, 3000)
    inside = (distances < 0.05) & (distances > RECOVERED)
    ends = [column[rows] for column, rows in zip(distances.T, inside.T) if rows.sum() > 1]
    return float(np.median([(len(end) - 1) / (end[0] / end[-1]).log().item() for end in ends]))


def main():
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(14, 4), layout='constrained')
    needed, rate, far = figure.subplots(1, 3)
    every = (5, 10, 15, 20, 30, 40, 50)

    half_of = []
    for r in every:
        samples, shares, n50 = samples_needed(r, np.arange(1.0, 1.75, 0.1))
        points = needed.scatter([r] * len(samples), samples, c=shares, cmap='viridis', vmin=0, vmax=1, s=60)
        half_of.append(n50)
        print(f'r = {r}: N50 = {n50:.0f} = {n50 / (K * r):.2f} K r', flush=True)
    slope, offset = np.polyfit(every, half_of, 1)
    power = np.polyfit(np.log(every), np.log(half_of), 1)[0]
    print(f'N50 = {slope:.2f} r {offset:+.1f}, as a power r^{power:.2f}')
    needed.plot(every, half_of, color='#BB0022', marker='_', markersize=12, label='half of the students recover')
    needed.plot(every, [K * r for r in every], 'k:', label='K r, the number of unknowns')
    needed.set(title='samples needed', xlabel='inputs r of a neuron', ylabel='samples N')
    figure.colorbar(points, ax=needed, label='share that recovers')

    for words, samples, style in (
        ('N = 1,000', [1000] * len(every), '-'),
        ('N = 10 K r', [10 * K * r for r in every], '--'),
    ):
        steps = [steps_per_factor(r, n) for r, n in zip(every, samples)]
        print(
            f'steps in which the distance falls by e, {words}:',
            *(f'{value:.0f}' for value in steps),
            flush=True,
        )
        rate.plot(every, steps, color='#0072B2', linestyle=style, marker='o', label=words)
    rate.set(title='rate, without momentum', xlabel='inputs r of a neuron', ylabel='steps to fall by e', ylim=0)

    for words, samples, style in (
        ('N = 500', [500] * len(every), '-'),
        ('N = 10 K r', [10 * K * r for r in every], '--'),
    ):
        for radius, color in ((1, '#009E73'), (2, '#E69F00'), (3, '#D55E00')):
            shares = [recovered(r, n, radius) for r, n in zip(every, samples)]
            print(f'recovered from {radius} ||W||, {words}:', *(f'{share:.2f}' for share in shares), flush=True)
            label = f'from {radius} times the norm, {words}'
            far.plot(every, shares, style, color=color, marker='o', label=label)
    far.set(title='radius', xlabel='inputs r of a neuron', ylabel='share that recovers')
    for panel in (needed, rate, far):
        panel.grid(alpha=0.3)
        below = {'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.14), 'ncols': 2} if panel is far else {}
        panel.legend(frameon=False, fontsize=8, **below)
    figure.savefig(Path(__file__).with_suffix('.png'), dpi=130)


if __name__ == '__main__':
    main()
