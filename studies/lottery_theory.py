"""How many samples a sparse student needs to recover its teacher (docs/sparse.md).

    python -m studies.lottery_theory [--out DIR]           the table of results/lottery_theory.csv
    python -m studies.lottery_theory --measure FILE.csv    measures it first: 3.5 minutes of a core

The setting of Zhang et al. (NeurIPS 2021, arXiv 2110.05667): a teacher f(x) = mean_j relu(w_j x)
of K neurons of unit norm, each of which reads r of the D inputs, with x ~ N(0, I). The student
knows which inputs its teacher reads. Measured are the samples that it needs, how fast it gets
there, and from how far away.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from conf import ROOT, run_program
from records import write_table
from studies.report import new_figure, print_table, read_csv, save, study_parser

SHIPPED = ROOT / 'results' / 'lottery_theory.csv'
D, K, TRIALS = 50, 5, 20
HEADER = 'measure', 'r', 'samples', 'distance', 'value'
EVERY = 5, 10, 15, 20, 30, 40, 50  # r
RECOVERED = 1e-3  # distance to the teacher, relative to its norm
FAR = {1: '#009E73', 2: '#E69F00', 3: '#D55E00'}  # distances at the start, and their colours


def draw_problem(r, samples, radius, generator):
    """Random problems, one per trial.

    Returns:
        Teachers W, students at distance radius * ||W||, and their masks, each (TRIALS, D, K);
        inputs (TRIALS, samples, D).
    """
    shape = TRIALS, D, K
    mask = torch.rand(shape, generator=generator).argsort(1).argsort(1) < r
    teacher = torch.randn(shape, generator=generator, dtype=torch.double) * mask
    away = torch.randn(shape, generator=generator, dtype=torch.double) * mask
    teacher /= teacher.norm(dim=1, keepdim=True)
    away *= radius * K**0.5 / away.norm(dim=(1, 2), keepdim=True)
    inputs = torch.randn(TRIALS, samples, D, generator=generator, dtype=torch.double)
    return teacher, teacher + away, mask, inputs


def learn(r, samples, radius, momentum, steps):
    """Gradient descent with momentum on the mean of (f - y)^2 / 2, until all have recovered.

    The step size is K.

    Returns:
        (steps, TRIALS) relative distances to the teacher after each step.
    """
    generator = torch.Generator().manual_seed(0)
    teacher, student, mask, inputs = draw_problem(r, samples, radius, generator)
    targets = (inputs @ teacher).relu().mean(2)
    previous, distances = student, []
    for _ in range(steps):
        hidden = inputs @ student
        error = hidden.relu().mean(2) - targets
        active = error[..., None] * (hidden > 0)
        gradient = mask * (inputs.transpose(1, 2) @ active) / (K * samples)
        velocity = student - previous
        previous, student = student, student - K * gradient + momentum * velocity
        distances.append((student - teacher).norm(dim=(1, 2)) / K**0.5)
        if (distances[-1] <= RECOVERED).all():
            break
    return torch.stack(distances)


def recovered(r, samples, radius):
    """The share of students that recover their teacher, with momentum 0.8."""
    return (learn(r, samples, radius, 0.8, 1500)[-1] <= RECOVERED).double().mean().item()


def half(samples, shares):
    """The number of samples at which half of the students recover, interpolated linearly."""
    above = next(index for index, share in enumerate(shares) if share >= 0.5)
    return np.interp(0.5, shares[above - 1 : above + 1], samples[above - 1 : above + 1])


def steps_per_factor(r, samples):
    """Median of the steps in which the distance falls by e, from 0.05 on, without momentum."""
    distances = learn(r, samples, 0.1, 0.0, 3000)
    steps = []
    for trial in distances.T:
        inside = trial[(trial < 0.05) & (trial > RECOVERED)]
        if len(inside) > 1:
            steps.append((len(inside) - 1) / (inside[0] / inside[-1]).log().item())
    return np.median(steps)


def sample_sizes(number):
    """{label: samples for each r}: a fixed number, and one that grows with r."""
    return {f'N = {number:,}': [number] * len(EVERY), 'N = 10 K r': [10 * K * r for r in EVERY]}


def measure_all():
    """{(measure, r, samples, distance of the student at the start): value}."""
    found = {}
    for r in EVERY:
        for ratio in np.arange(1.0, 1.75, 0.1):
            n = round(ratio * K * r)
            found['recovered', r, n, 0.5] = recovered(r, n, 0.5)
        for n in (1000, 10 * K * r):
            found['steps', r, n, 0.1] = round(steps_per_factor(r, n))
        for n in (500, 10 * K * r):
            for radius in FAR:
                found['recovered', r, n, radius] = recovered(r, n, radius)
    return found


def read(path):
    """{(measure, r, samples, distance): value} of a file that --measure wrote."""
    found = {}
    for row in read_csv(path):
        r, samples, distance, value = (float(row[name]) for name in HEADER[1:])
        found[row['measure'], r, samples, distance] = value
    return found


def tried(found, r):
    """The numbers of samples tried at a distance of 0.5, and the shares that recovered."""
    samples, shares = [], []
    for (_, size, number, distance), share in found.items():
        if (size, distance) == (r, 0.5):
            samples.append(number)
            shares.append(share)
    return samples, shares


def curve(found, measure, numbers, distance):
    """The values for each r, with its number of samples."""
    return [found[measure, r, n, distance] for r, n in zip(EVERY, numbers)]


def show(found, halves):
    """Prints the table, and how the number of samples that suffice for half grows with r."""
    slope, offset = np.polyfit(EVERY, halves, 1)
    power = np.polyfit(np.log(EVERY), np.log(halves), 1)[0]
    print(f'N50 = {slope:.2f} r {offset:+.1f}, as a power r^{power:.2f}\n')
    rows = []

    def add(label, values, digits):
        rows.append((label, *(f'{value:.{digits}f}' for value in values)))

    add('N50, the samples with which half recover', halves, 0)
    add('N50 / (K r)', [n50 / (K * r) for r, n50 in zip(EVERY, halves)], 2)
    for label, numbers in sample_sizes(1000).items():
        add(f'steps to fall by e, {label}', curve(found, 'steps', numbers, 0.1), 0)
    for label, numbers in sample_sizes(500).items():
        for radius in FAR:
            values = curve(found, 'recovered', numbers, radius)
            add(f'recovered from {radius} norms away, {label}', values, 2)
    print_table(('r', *map(str, EVERY)), rows)


def draw(found, halves):
    figure = new_figure(14, 4)
    needed, rate, far = figure.subplots(1, 3)
    colors = {'cmap': 'viridis', 'vmin': 0, 'vmax': 1}
    for r in EVERY:
        samples, shares = tried(found, r)
        points = needed.scatter([r] * len(samples), samples, c=shares, s=60, **colors)
    style = {'color': '#BB0022', 'marker': '_', 'markersize': 12}
    needed.plot(EVERY, halves, **style, label='half of the students recover')
    needed.plot(EVERY, [K * r for r in EVERY], 'k:', label='K r, the number of unknowns')
    needed.set(title='samples needed', ylabel='samples N')
    figure.colorbar(points, ax=needed, label='share that recovers')

    styles = ('-o', '#0072B2'), ('--s', '#D55E00')
    for (label, numbers), (line, color) in zip(sample_sizes(1000).items(), styles):
        rate.plot(EVERY, curve(found, 'steps', numbers, 0.1), line, color=color, label=label)
    rate.set(title='rate, without momentum', ylabel='steps to fall by e', ylim=0)

    for (label, numbers), line in zip(sample_sizes(500).items(), ('-o', '--s')):
        for radius, color in FAR.items():
            shares = curve(found, 'recovered', numbers, radius)
            name = f'from {radius} times the norm, {label}'
            far.plot(EVERY, shares, line, color=color, label=name)
    far.set(title='radius', ylabel='share that recovers')
    for panel in (needed, rate, far):
        panel.set_xlabel('inputs r of a neuron')
        panel.grid(alpha=0.3)
    legend = {'frameon': False, 'fontsize': 8, 'handlelength': 4}
    needed.legend(**legend)
    rate.legend(**legend)
    far.legend(**legend, loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=2)
    return figure


def main(arguments=None):
    parser = study_parser('lottery_theory', __doc__, 'lottery_theory.png')
    parser.add_argument('--measure', type=Path, metavar='FILE', help='measure, and write this file')
    options = parser.parse_args(arguments)
    if options.measure:
        options.measure.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
        rows = [dict(zip(HEADER, (*place, value))) for place, value in measure_all().items()]
        write_table(options.measure, HEADER, rows)
    found = read(options.measure or SHIPPED)
    halves = [half(*tried(found, r)) for r in EVERY]
    show(found, halves)
    if options.out:
        save(draw(found, halves), options.out / 'lottery_theory.png')


if __name__ == '__main__':
    sys.exit(run_program(main))
