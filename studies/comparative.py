"""The comparative bound, estimated from a sweep of conf/comparative.py; docs/depth.md has the theorem and what the number is.

    python train.py --settings conf/comparative.py
    python docs/comparative.py results/7 [--eps 0.01] [--alpha 0.1]

prints, for each share p of wrong labels, the effective depths a and b of each draw, the share of draws with a >= b, its 95 %
limit, and the estimate share + (1 + alpha) p, which is no certificate.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from conf import BadInput
from measures.representations import comparative_estimate, effective_depth
from records import folder_settings, read_layers, read_metrics


def last_depth(folder, run, eps):
    """The effective depth of a network of the sweep at its last evaluation, its training error and its test error."""
    layers, metrics = (
        read_layers(folder / run.name / 'layers.csv'),
        read_metrics(folder / run.name / 'metrics.csv'),
    )
    last = (
        (layers['epoch'] == run.epochs)
        & (layers['round'] == run.prune_rounds)
        & (layers['layer'] > 0)
    )
    if not last.any():
        raise BadInput(
            f'{folder / run.name}: has no layers of epoch {run.epochs}; finish it with --resume, layers_every above 0'
        )
    return (
        effective_depth(layers['train_ncc_error'][last], eps),
        metrics['train_error'][-1],
        metrics['test_error'][-1],
    )


def read_draws(folder, eps):
    """{p: ({data_seed: [(depth, train error, test error)]} of networks trained on S1, the same on S1 and mislabelled S2)}."""
    draws, runs = {}, folder_settings(folder)[1]
    varied = {
        knob for run in runs for knob, value in vars(run).items() if value != getattr(runs[0], knob)
    }
    if other := varied - {'name', 'train_samples', 'label_noise', 'data_seed', 'seed'}:
        raise BadInput(
            f'{folder}: also varies {", ".join(sorted(other))}; give each value a sweep of its own'
        )
    for run in runs:
        sets = {run.clean_samples: 0, 2 * run.clean_samples: 1}
        if not run.clean_samples or run.train_samples not in sets:
            raise BadInput(
                f'{run.name}: train_samples must be clean_samples (S1) or twice that (S1 and S2), as in conf/comparative.py'
            )
        part = draws.setdefault(run.label_noise, ({}, {}))[sets[run.train_samples]]
        part.setdefault(run.data_seed, []).append(last_depth(folder, run, eps))
    return draws


def main(folder, eps, alpha):
    for noise, parts in read_draws(folder, eps).items():
        depths, noisy_depths = (
            [[found[0] for found in part[seed]] for seed in parts[0] if seed in part]
            for part in parts
        )
        found = comparative_estimate(depths, noisy_depths, noise, alpha)
        errors, noisy_errors = (
            np.array([row[1:] for rows in part.values() for row in rows]) for part in parts
        )
        lines = {
            'a, mean effective depth on S1': ' '.join(f'{a:g}' for a in found['a']),
            'b, least on S1 and S2 with wrong labels': ' '.join(f'{b:g}' for b in found['b']),
            'draws whose b is open (inf)': found['open'],
            'share of draws with a >= b': f'{found["share"]:.3f}, 95 % limit {found["limit"]:.3f}',
            'estimate, share + (1 + alpha) p': f'{found["estimate"]:.3f}, with the limit {found["at_limit"]:.3f}',
            'mean test error of the networks on S1': f'{errors[:, 1].mean():.3f}',
            'largest training error': f'{errors[:, 0].max():.3f} on S1, {noisy_errors[:, 0].max():.3f} on both',
        }
        print(
            f'p = {noise}, eps = {eps}, alpha = {alpha}: {len(depths)} draws of (S1, S2), {len(depths[0])} networks each'
        )
        print(*(f'  {name + ":":42}{value}' for name, value in lines.items()), sep='\n')
    print(
        'An estimate, no certificate: b is the depth that SGD found, delta1 and delta2 are taken as 0.'
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path, help='results folder of the sweep')
    parser.add_argument(
        '--eps',
        type=float,
        default=0.01,
        help='NCC error that defines effective depth (default: 0.01)',
    )
    parser.add_argument(
        '--alpha',
        type=float,
        default=0.1,
        help='slack of the theorem, between 0 and 1 (default: 0.1)',
    )
    try:
        main(**vars(parser.parse_args()))
    except (BadInput, OSError) as error:
        sys.exit(f'error: {error}')
