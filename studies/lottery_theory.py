"""How many samples a sparse student needs to recover its teacher, how fast and from how far (docs/sparse.md).

python docs/lottery_theory.py          in three and a half minutes of one core: results/lottery_theory.csv and the rest
python docs/lottery_theory.py --draw   the table and docs/lottery_theory.png, from the file

The setting of Zhang et al. (NeurIPS 2021, arXiv 2110.05667): a teacher f(x) = mean_j relu(w_j x) of K neurons
of unit norm, each of which reads r of the D inputs, x ~ N(0, I). The student knows which.
"""

import csv
import sys

import numpy as np
import torch

from conf import ROOT

PICTURE = ROOT / 'docs' / 'lottery_theory.png'
MEASURED = ROOT / 'results' / 'lottery_theory.csv'
D, K, TRIALS = 50, 5, 20
HEADER = 'measure', 'r', 'samples', 'distance', 'value'
EVERY = 5, 10, 15, 20, 30, 40, 50  # r
RECOVERED = 1e-3  # distance to the teacher, relative to its norm


def draw_problem(r, samples, radius, generator):
    """Teachers W, students at distance radius * ||W||, masks (TRIALS, D, K); inputs (TRIALS, samples, D)."""
    shape = TRIALS, D, K
    mask = torch.rand(shape, generator=generator).argsort(1).argsort(1) < r
    teacher, away = (
        torch.randn(shape, generator=generator, dtype=torch.double) * mask for _ in range(2)
    )
    teacher /= teacher.norm(dim=1, keepdim=True)
    away *= radius * K**0.5 / away.norm(dim=(1, 2), keepdim=True)
    inputs = torch.randn(TRIALS, samples, D, generator=generator, dtype=torch.double)
    return teacher, teacher + away, mask, inputs


def learn(r, samples, radius, momentum, steps, seed=0):
    """Gradient descent with momentum on the mean of (f - y)^2 / 2, at rate K, until all have recovered.

    Returns:
        (steps, TRIALS) the relative distance to the teacher after each step.
    """
    teacher, student, mask, inputs = draw_problem(
        r, samples, radius, torch.Generator().manual_seed(seed)
    )
    targets, before = (inputs @ teacher).relu_().mean(2), student
    distances = []
    for _ in range(steps):
        hidden = inputs @ student
        error = hidden.relu().mean(2) - targets
        gradient = (
            mask * (inputs.transpose(1, 2) @ (error[..., None] * (hidden > 0))) / (K * samples)
        )
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


def steps_per_factor(r, samples):
    """Steps in which the distance falls by e, from 0.05 to RECOVERED, without momentum; a median."""
    distances = learn(r, samples, 0.1, 0.0, 3000)
    inside = (distances < 0.05) & (distances > RECOVERED)
    ends = [column[rows] for column, rows in zip(distances.T, inside.T) if rows.sum() > 1]
    return float(np.median([(len(end) - 1) / (end[0] / end[-1]).log().item() for end in ends]))


def fixed_and_growing(number):
    """{label: samples for each r}."""
    return {f'N = {number:,}': [number] * len(EVERY), 'N = 10 K r': [10 * K * r for r in EVERY]}


def measure_all():
    """Writes the file: {(measure, r, samples, distance of the student): value} as rows."""
    found = {}
    for r in EVERY:
        for n in (round(ratio * K * r) for ratio in np.arange(1.0, 1.75, 0.1)):
            found['recovered', r, n, 0.5] = f'{recovered(r, n, 0.5):.2f}'
    for numbers in fixed_and_growing(1000).values():
        found |= {
            ('steps', r, n, 0.1): f'{steps_per_factor(r, n):.0f}' for r, n in zip(EVERY, numbers)
        }
    for numbers in fixed_and_growing(500).values():
        for radius in (1, 2, 3):
            found |= {
                ('recovered', r, n, radius): f'{recovered(r, n, radius):.2f}'
                for r, n in zip(EVERY, numbers)
            }
    with MEASURED.open('w', newline='') as file:
        csv.writer(file, lineterminator='\n').writerows(
            [HEADER, *((*place, value) for place, value in found.items())]
        )


def read():
    """{(measure, r, samples, distance): value} of the file."""
    rows = csv.DictReader(MEASURED.open())
    return {
        (row['measure'], int(row['r']), int(row['samples']), float(row['distance'])): float(
            row['value']
        )
        for row in rows
    }


def main():
    import matplotlib.figure

    figure, found = matplotlib.figure.Figure(figsize=(14, 4), layout='constrained'), read()
    needed, rate, far = figure.subplots(1, 3)

    half_of = []
    for r in EVERY:
        tried = [
            (n, share)
            for (_, size, n, distance), share in found.items()
            if (size, distance) == (r, 0.5)
        ]
        samples, shares = zip(*tried)
        points = needed.scatter(
            [r] * len(samples), samples, c=shares, cmap='viridis', vmin=0, vmax=1, s=60
        )
        half_of.append(half(samples, shares))
    slope, offset = np.polyfit(EVERY, half_of, 1)
    power = np.polyfit(np.log(EVERY), np.log(half_of), 1)[0]
    print(f'N50 = {slope:.2f} r {offset:+.1f}, as a power r^{power:.2f}\n')
    print_row('r', EVERY, 'd')
    print(f'|{" --- |" * (len(EVERY) + 1)}')
    print_row('N50, the samples with which half recover', half_of, '.0f')
    print_row('N50 / (K r)', [n50 / (K * r) for r, n50 in zip(EVERY, half_of)], '.2f')
    needed.plot(
        EVERY,
        half_of,
        color='#BB0022',
        marker='_',
        markersize=12,
        label='half of the students recover',
    )
    needed.plot(EVERY, [K * r for r in EVERY], 'k:', label='K r, the number of unknowns')
    needed.set(title='samples needed', xlabel='inputs r of a neuron', ylabel='samples N')
    figure.colorbar(points, ax=needed, label='share that recovers')

    for (words, numbers), style, color in zip(
        fixed_and_growing(1000).items(), ('-o', '--s'), ('#0072B2', '#D55E00')
    ):
        steps = [found['steps', r, n, 0.1] for r, n in zip(EVERY, numbers)]
        print_row(f'steps to fall by e, {words}', steps, '.0f')
        rate.plot(EVERY, steps, style, color=color, label=words)
    rate.set(
        title='rate, without momentum',
        xlabel='inputs r of a neuron',
        ylabel='steps to fall by e',
        ylim=0,
    )

    for (words, numbers), style in zip(fixed_and_growing(500).items(), ('-o', '--s')):
        for radius, color in ((1, '#009E73'), (2, '#E69F00'), (3, '#D55E00')):
            shares = [found['recovered', r, n, radius] for r, n in zip(EVERY, numbers)]
            print_row(f'recovered from {radius} norms away, {words}', shares, '.2f')
            far.plot(
                EVERY, shares, style, color=color, label=f'from {radius} times the norm, {words}'
            )
    far.set(title='radius', xlabel='inputs r of a neuron', ylabel='share that recovers')
    for panel in (needed, rate, far):
        panel.grid(alpha=0.3)
        below = (
            {'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.14), 'ncols': 2}
            if panel is far
            else {}
        )
        panel.legend(frameon=False, fontsize=8, handlelength=4, **below)
    figure.savefig(PICTURE, dpi=130)


def print_row(words, values, form):
    print(f'| {words} | {" | ".join(format(value, form) for value in values)} |')


if __name__ == '__main__':
    if '--draw' not in sys.argv:
        measure_all()
    main()
