"""How many samples a sparse student needs to recover its teacher (docs/topology.md).

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
EVERY = 5, 10, 15, 20, 30, 40, 50  # r
RATIOS = np.arange(1.0, 1.75, 0.1)  # samples over K r, of students half a norm away
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


def samples_tried(r):
    return [round(ratio * K * r) for ratio in RATIOS]


def sample_sizes(number):
    """{label: samples for each r}: a fixed number, and one that grows with r."""
    growing = [10 * K * r for r in EVERY]
    return {f'N = {number:,}': [number] * len(EVERY), 'N = 10 K r': growing}


def measure_all():
    """{measure: its values for each r}."""
    table = {}
    for ratio in RATIOS:
        shares = [recovered(r, round(ratio * K * r), 0.5) for r in EVERY]
        table[f'recovered with {ratio:.1f} K r samples'] = shares
    for label, numbers in sample_sizes(1000).items():
        steps = [steps_per_factor(r, n) for r, n in zip(EVERY, numbers)]
        table[f'steps to fall by e, {label}'] = steps
    for label, numbers in sample_sizes(500).items():
        for radius in FAR:
            shares = [recovered(r, n, radius) for r, n in zip(EVERY, numbers)]
            table[f'recovered from {radius} norms away, {label}'] = shares
    return table


def read(path):
    """The file of `measure_all` as (table, shares).

    `shares` (ratios, r) are those that recovered from half a norm away; `table` has the rest.
    """
    rows = {row.pop('measure'): row for row in read_csv(path)}
    table = {name: [float(cell) for cell in row.values()] for name, row in rows.items()}
    shares = [table.pop(f'recovered with {ratio:.1f} K r samples') for ratio in RATIOS]
    return table, np.array(shares)


def show(table, halves):
    """Prints the table, and how the number of samples that suffice for half grows with r."""
    slope, offset = np.polyfit(EVERY, halves, 1)
    power = np.polyfit(np.log(EVERY), np.log(halves), 1)[0]
    print(f'N50 = {slope:.2f} r {offset:+.1f}, as a power r^{power:.2f}\n')
    needed = {
        'N50, the samples with which half recover': halves,
        'N50 / (K r)': [n50 / (K * r) for r, n50 in zip(EVERY, halves)],
    }
    rows = []
    for name, values in (needed | table).items():
        digits = 0 if name.startswith(('N50,', 'steps')) else 2
        cells = [f'{value:.{digits}f}' for value in values]
        rows.append((name, *cells))
    print_table(('r', *map(str, EVERY)), rows)


def draw(table, shares, halves):
    figure = new_figure(8.5, 7.5)
    mosaic = figure.subplot_mosaic([['needed', 'needed'], ['rate', 'far']])
    needed, rate, far = mosaic.values()
    colors = {'cmap': 'viridis', 'vmin': 0, 'vmax': 1}
    for r, column in zip(EVERY, shares.T):
        points = needed.scatter([r] * len(RATIOS), samples_tried(r), c=column, s=60, **colors)
    style = {'color': '#BB0022', 'marker': '_', 'markersize': 12}
    needed.plot(EVERY, halves, **style, label='half of the students recover')
    needed.plot(EVERY, [K * r for r in EVERY], 'k:', label='K r, the number of unknowns')
    needed.set(title='samples needed', ylabel='samples N')
    figure.colorbar(points, ax=needed, label='share that recovers')
    for name, values in table.items():
        kind, _, size = name.rpartition(', ')
        line, color = '-o', '#0072B2'
        if size == 'N = 10 K r':
            line, color = '--s', '#D55E00'
        if kind.startswith('steps'):
            rate.plot(EVERY, values, line, color=color, label=size)
        else:
            radius = int(kind.split()[2])
            label = f'from {radius} times the norm, {size}'
            far.plot(EVERY, values, line, color=FAR[radius], label=label)
    rate.set(title='rate, without momentum', ylabel='steps to fall by e', ylim=0)
    far.set(title='radius', ylabel='share that recovers')
    for panel in (needed, rate, far):
        panel.set_xlabel('inputs r of a neuron')
        panel.grid(alpha=0.3)
    legend = {'frameon': False, 'fontsize': 8, 'handlelength': 4}
    needed.legend(**legend)
    rate.legend(**legend)
    figure.legend(*far.get_legend_handles_labels(), loc='outside lower right', ncols=2, **legend)
    return figure


def main(arguments=None):
    parser = study_parser('lottery_theory', __doc__, 'lottery_theory.png')
    parser.add_argument('--measure', type=Path, metavar='FILE', help='measure, and write this file')
    options = parser.parse_args(arguments)
    if options.measure:
        options.measure.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
        rows = []
        for name, values in measure_all().items():
            rows.append({'measure': name} | dict(zip(EVERY, values)))
        write_table(options.measure, list(rows[0]), rows)
    table, shares = read(options.measure or SHIPPED)
    halves = [half(samples_tried(r), column) for r, column in zip(EVERY, shares.T)]
    show(table, halves)
    if options.out:
        save(draw(table, shares, halves), options.out / 'lottery_theory.png')


if __name__ == '__main__':
    sys.exit(run_program(main))
