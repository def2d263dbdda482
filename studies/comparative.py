"""The comparative bound, estimated from a sweep of conf/comparative.py (theorem: docs/depth.md).

    python train.py --settings conf/comparative.py --results-path results/7
    python -m studies.comparative results/7 [--eps 0.01] [--alpha 0.1]

prints, for each share p of wrong labels, the effective depths a and b of each draw, the share of
draws with a >= b, its 95 % limit, and the estimate share + (1 + alpha) p, which is no certificate.
"""

import sys
from pathlib import Path

import numpy as np

from conf import BadInput, load_launch, run_program
from measures.representations import comparative_estimate, effective_depth
from records import read_layers, read_metrics
from studies.report import study_parser

VARIED = {'name', 'train_samples', 'label_noise', 'data_seed', 'seed'}


def last_depth(folder, run, eps):
    """(effective depth, training error, test error) of a network at its last evaluation."""
    layers = read_layers(folder / run.name / 'layers.csv')
    metrics = read_metrics(folder / run.name / 'metrics.csv')
    last = (layers['epoch'] == run.epochs) & (layers['round'] == run.prune_rounds)
    last &= layers['layer'] > 0
    if not last.any():
        advice = 'finish it with --resume, and layers_every above 0'
        raise BadInput(f'{folder / run.name}: has no layers of epoch {run.epochs}; {advice}')
    depth = effective_depth(layers['train_ncc_error'][last], eps)
    return depth, metrics['train_error'][-1], metrics['test_error'][-1]


def read_draws(folder, eps):
    """{p: (on S1, on both)}, each {data_seed: [what `last_depth` returns] of its networks}.

    Those on both are trained on S1 and on S2, of whose labels the share p is wrong.
    """
    runs = load_launch(folder)[1]
    for knob in vars(runs[0]).keys() - VARIED:
        if any(getattr(run, knob) != getattr(runs[0], knob) for run in runs):
            raise BadInput(f'{folder}: also varies {knob}; train a sweep for each of its values')
    draws = {}
    for run in runs:
        sizes = run.clean_samples, 2 * run.clean_samples
        if not run.clean_samples or run.train_samples not in sizes:
            rule = 'train_samples must be clean_samples (S1) or twice that (S1 and S2)'
            raise BadInput(f'{run.name}: {rule}, as in conf/comparative.py')
        part = draws.setdefault(run.label_noise, ({}, {}))[sizes.index(run.train_samples)]
        part.setdefault(run.data_seed, []).append(last_depth(folder, run, eps))
    return draws


def show(p, on_first, on_both, eps, alpha):
    """Prints the estimate for one share p of wrong labels."""
    seeds = [seed for seed in on_first if seed in on_both]
    depths = [[depth for depth, _, _ in on_first[seed]] for seed in seeds]
    noisy_depths = [[depth for depth, _, _ in on_both[seed]] for seed in seeds]
    found = comparative_estimate(depths, noisy_depths, p, alpha)
    # The columns are depth, training error and test error.
    first, both = (np.concatenate(list(part.values())) for part in (on_first, on_both))
    lines = {
        'a, mean effective depth on S1': ' '.join(f'{a:g}' for a in found['a']),
        'b, least on S1 and S2 with wrong labels': ' '.join(f'{b:g}' for b in found['b']),
        'draws whose b is open (inf)': found['open'],
        'share of draws with a >= b': f'{found["share"]:.3f}, 95 % limit {found["limit"]:.3f}',
        'estimate, share + (1 + alpha) p': (
            f'{found["estimate"]:.3f}, with the limit {found["at_limit"]:.3f}'
        ),
        'mean test error of the networks on S1': f'{first[:, 2].mean():.3f}',
        'largest training error': (
            f'{first[:, 1].max():.3f} on S1, {both[:, 1].max():.3f} on both'
        ),
    }
    draws = f'{len(seeds)} draws of (S1, S2), {len(depths[0])} networks each'
    print(f'p = {p}, eps = {eps}, alpha = {alpha}: {draws}')
    for label, value in lines.items():
        print(f'  {label + ":":42}{value}')


def main(arguments=None):
    parser = study_parser('comparative', __doc__)
    parser.add_argument('folder', type=Path, help='results folder of the sweep')
    parser.add_argument(
        '--eps', type=float, default=0.01, help='NCC error that defines effective depth (0.01)'
    )
    parser.add_argument(
        '--alpha', type=float, default=0.1, help='slack of the theorem, in (0, 1) (0.1)'
    )
    options = parser.parse_args(arguments)
    for p, parts in read_draws(options.folder, options.eps).items():
        show(p, *parts, options.eps, options.alpha)
    print('An estimate, no certificate: b is the depth that SGD found, delta1 = delta2 = 0.')


if __name__ == '__main__':
    sys.exit(run_program(main))
