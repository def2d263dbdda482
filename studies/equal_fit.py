"""Sparse networks at equal fit: their gaps, and which bounds and measures see them (docs/ranking.md).

    python train.py --settings conf/equal_fit.py --results-path results/7
    python train.py --settings conf/equal_fit.py --initial-mask none --density 1 --prune-rounds 3 --prune-fraction 0.5 \
        --results-path results/8
    python docs/equal_fit.py results/7 results/8   prints two tables and draws docs/equal_fit.png, in seconds
"""

import itertools
import math
import sys

import numpy as np

from conf import ROOT
from studies.ranking import (
    gap,
    map_errors,
    measures_of,
    name_measures,
    pair_weights,
    reached,
    read_rows,
    sign_errors,
)

DENSITIES = 1.0, 0.5, 0.25, 0.125
COLORS = {'random': '#0072B2', 'erk': '#E69F00', 'tickets': '#009E73'}
SAME = 'depth', 'train_samples', 'seed'
PICTURE = ROOT / 'docs' / 'equal_fit.png'


def read(folders):
    """[(way, density, the knobs in SAME, gap)] and {measure: values} of the networks in summary.csv, those of all rounds.

    A ticket's first round is the dense network, of which masks at random are compared with each density too.
    """
    networks, about = [], []
    for folder in folders:
        for settings, row in read_rows(folder):
            assert reached(settings, row), f'{settings.name} did not reach target_loss'
            density = min(DENSITIES, key=lambda value: abs(value - row['density']))
            ways = [settings.initial_mask] if settings.initial_mask != 'none' else ['tickets']
            for way in ways if density < 1 else COLORS:
                networks.append((settings, row))
                about.append(
                    (
                        way,
                        density,
                        tuple(getattr(settings, knob) for knob in SAME),
                        gap(settings, row),
                    )
                )
    return about, measures_of(networks)


def pairs(about, kind):
    """(i, j) of networks of one depth, training set and seed that differ in one thing alone.

    That is their density, where `kind` is a way to a mask; or, for 'mask', the way to a mask of the same density.
    """

    def differ(one, other):
        if kind == 'mask':
            return one[0] < other[0] and one[1] == other[1] < 1
        return one[0] == other[0] == kind and one[1] < other[1]

    every = itertools.product(range(len(about)), repeat=2)
    return np.array(
        [(i, j) for i, j in every if about[i][2] == about[j][2] and differ(about[i], about[j])]
    ).T


def main(folders):
    import matplotlib.figure

    about, measures = read(folders)
    gaps, excess, errors = np.array([entry[3] for entry in about]), {}, {}
    dense = {(way, same): value for way, density, same, value in about if density == 1}
    for way, density, same, value in about:
        excess.setdefault((way, density), []).append(value - dense[way, same])
    print(
        '| mask | density | gap, less that of the dense network: median (range) | larger |\n| --- | --- | --- | --- |'
    )
    for (way, density), values in sorted(
        excess.items(), key=lambda entry: (list(COLORS).index(entry[0][0]), -entry[0][1])
    ):
        if density < 1:
            cell = f'{np.median(values):+.4f} ({min(values):+.4f} to {max(values):+.4f})'
            print(
                f'| {way} | {density:g} | {cell} | {sum(value > 0 for value in values)} of {len(values)} |'
            )
    kinds = []
    for kind in (*COLORS, 'mask'):
        i, j = pairs(about, kind)
        weights = pair_weights(gaps[i] - gaps[j], 10000)
        print(f'{kind}: {len(i)} pairs, {(weights > 0).sum()} with weight')
        kinds += [kind] * bool(weights.any())
        for name, values in measures.items():
            wrong = sign_errors(values, gaps, i, j)
            w = np.where(np.isnan(wrong), 0, weights)
            errors[name, kind] = w @ np.nan_to_num(wrong) / w.sum() if w.any() else math.nan
    names = sorted(measures, key=lambda name: np.mean([errors[name, kind] for kind in kinds]))
    print(f'| sign error along | {" | ".join(kinds)} |\n| --- |{" --- |" * len(kinds)}')
    for name in names:
        print(f'| {name} | {" | ".join(f"{errors[name, kind]:.2f}" for kind in kinds)} |')

    figure = matplotlib.figure.Figure(figsize=(9.5, 0.2 * len(names) + 1.2), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.3))
    for way, color in COLORS.items():
        values = [excess[way, density] for density in DENSITIES]
        left.plot(
            DENSITIES, [np.median(group) for group in values], marker='o', color=color, label=way
        )
        left.fill_between(
            DENSITIES,
            *([f(group) for group in values] for f in (min, max)),
            color=color,
            alpha=0.15,
        )
    left.axhline(0, color='0.6', linewidth=0.8)
    left.set_xscale('log', base=2)
    left.set_xticks(DENSITIES, labels=[f'{density:g}' for density in DENSITIES])
    left.set(xlabel='density', ylabel="generalization gap, less the dense network's")
    left.legend(frameon=False)
    map_errors(right, np.array([[errors[name, kind] for kind in kinds] for name in names]))
    name_measures(right, names)
    right.set_xticks(
        range(len(kinds)),
        labels=[f'density,\n{kind}' if kind in COLORS else 'way to\nthe mask' for kind in kinds],
    )
    right.set_title('weighted sign error', fontsize='medium')
    figure.savefig(PICTURE, dpi=130)


if __name__ == '__main__':
    main(sys.argv[1:])
