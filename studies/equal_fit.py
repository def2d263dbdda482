"""Sparse networks at equal fit: their gaps, and which measures see them (docs/ranking.md).

    python train.py --settings conf/equal_fit.py --results-path results/7
    python train.py --settings conf/equal_fit.py --initial-mask none --density 1 --prune-rounds 3 \\
        --prune-fraction 0.5 --results-path results/8
    python -m studies.equal_fit results/7 results/8 [--out DIR]

Prints the gaps of sparse networks less those of their dense ones, and the sign errors of every
measure along the density of each kind of mask and between masks of equal density.
"""

import sys
from pathlib import Path

import numpy as np

from conf import BadInput, run_program
from studies.ranking import (
    Pairs,
    gap,
    map_errors,
    measures_of,
    name_measures,
    reached,
    read_rows,
    sign_errors,
    weighted_mean,
)
from studies.report import new_figure, plot_range, print_table, save, study_parser

DENSITIES = 1.0, 0.5, 0.25, 0.125
COLORS = {'random': '#0072B2', 'erk': '#E69F00', 'tickets': '#009E73'}
SAME = 'depth', 'train_samples', 'seed'
TEST_SIZE = 10000


def read(folders):
    """The networks of summary.csv, those of every round.

    The first round of a ticket is the dense network, which stands for all kinds of masks.

    Returns:
        {'mask': kinds, 'density': values, 'group': values of the knobs in SAME}, gaps (N,), and
        {measure: (N,)}.
    """
    masks, densities, groups, networks = [], [], [], []
    for folder in folders:
        for settings, row in read_rows(folder):
            if not reached(settings, row):
                raise BadInput(f'{folder}/{settings.name}: did not reach target_loss')
            density = min(DENSITIES, key=lambda value: abs(value - row['density']))
            kinds = [settings.initial_mask]
            if density == 1:
                kinds = list(COLORS)
            elif settings.initial_mask == 'none':
                kinds = ['tickets']
            if kinds[0] not in COLORS:
                rule = 'initial_mask must be random, erk or none, as in conf/equal_fit.py'
                raise BadInput(f'{folder}/{settings.name}: {rule}')
            for mask in kinds:
                masks.append(mask)
                densities.append(density)
                groups.append([getattr(settings, knob) for knob in SAME])
                networks.append((settings, row))
    gaps = np.array([gap(*network) for network in networks])
    knobs = {'mask': np.array(masks), 'density': np.array(densities), 'group': groups}
    return knobs, gaps, measures_of(networks)


def excess_gaps(knobs, gaps):
    """{(mask, density): gaps, each less that of the dense network of its group}."""
    dense, excess = {}, {(mask, density): [] for mask in COLORS for density in DENSITIES}
    networks = list(zip(knobs['mask'], knobs['density'], map(str, knobs['group']), gaps))
    for mask, density, group, value in networks:
        if density == 1:
            dense[mask, group] = value
    for mask, density, group, value in networks:
        if (mask, group) not in dense:
            raise BadInput(f'no dense network has {", ".join(SAME)} = {group}; name its sweep too')
        excess[mask, density].append(value - dense[mask, group])
    for (mask, density), values in excess.items():
        if not values:
            raise BadInput(f'no network has mask {mask} at density {density}; name its sweep too')
    return excess


def errors_along(knobs, gaps, measures):
    """{kind: {measure: weighted sign error}} of the kinds of pairs of which some have weight.

    Both networks of a pair are of one group. They differ in density alone, for a kind named after
    their mask, or in the mask alone, for the kind 'mask'.
    """
    pairs, errors = Pairs(knobs, gaps, TEST_SIZE), {}
    mask, density = knobs['mask'][pairs.i], knobs['density'][pairs.i]
    for kind in (*COLORS, 'mask'):
        if kind == 'mask':
            chosen = (pairs.knob == 'mask') & (density < 1)
        else:
            chosen = (pairs.knob == 'density') & (mask == kind)
        i, j, weights = pairs.i[chosen], pairs.j[chosen], pairs.weights[chosen]
        print(f'{kind}: {len(weights)} pairs, {(weights > 0).sum()} with weight')
        if weights.any():
            errors[kind] = {}
            for name, values in measures.items():
                errors[kind][name] = weighted_mean(sign_errors(values, gaps, i, j), weights)
    return errors


def draw(excess, errors, names):
    figure = new_figure(9.5, 0.2 * len(names) + 1.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.3))
    for mask, color in COLORS.items():
        groups = [excess[mask, density] for density in DENSITIES]
        plot_range(left, DENSITIES, groups, np.median, alpha=0.15, color=color, label=mask)
    left.axhline(0, color='0.6', linewidth=0.8)
    left.set_xscale('log', base=2)
    left.set_xticks(DENSITIES, labels=[f'{density:g}' for density in DENSITIES])
    left.set(xlabel='density', ylabel="generalization gap, less the dense network's")
    left.legend(frameon=False)
    map_errors(right, np.array([[column[name] for column in errors.values()] for name in names]))
    name_measures(right, names)
    labels = ['way to\nthe mask' if kind == 'mask' else f'density,\n{kind}' for kind in errors]
    right.set_xticks(range(len(errors)), labels=labels)
    right.set_title('weighted sign error', fontsize='medium')
    return figure


def main(arguments=None):
    parser = study_parser('equal_fit', __doc__, 'equal_fit.png')
    parser.add_argument('folders', nargs='+', type=Path, help='results folders of the sweeps')
    options = parser.parse_args(arguments)
    knobs, gaps, measures = read(options.folders)
    excess = excess_gaps(knobs, gaps)
    rows = []
    for (mask, density), values in excess.items():
        if density < 1:
            cell = f'{np.median(values):+.4f} ({min(values):+.4f} to {max(values):+.4f})'
            larger = sum(value > 0 for value in values)
            rows.append((mask, f'{density:g}', cell, f'{larger} of {len(values)}'))
    gap_column = 'gap, less that of the dense network: median (range)'
    print_table(('mask', 'density', gap_column, 'larger'), rows)
    errors = errors_along(knobs, gaps, measures)
    names = sorted(measures, key=lambda name: np.mean([errors[kind][name] for kind in errors]))
    rows = [(name, *(f'{errors[kind][name]:.2f}' for kind in errors)) for name in names]
    print_table(('sign error along', *errors), rows)
    if options.out:
        save(draw(excess, errors, names), options.out / 'equal_fit.png')


if __name__ == '__main__':
    sys.exit(run_program(main))
