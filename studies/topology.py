"""What a mask's topology says of the network's error: seven ways to a mask (docs/topology.md).

    python -m studies.topology                      prints the tables of results/topology
    python -m studies.topology --train results/9    trains the 21 networks there (a minute);
                                                    prints and draws what they give

CONV-3-32 of stride 2 on 2,000 images of MNIST, with a fifth of the weights. The coordinates are
those of Hoang et al. (NeurIPS 2023, "Don't just prune by magnitude!"): means over layers of
ramanujan_gap, imdb and weighted_gap of measures.masks.topology, and of weighted_gap over imdb's
subgraphs. The distance is the Euclidean one to the coordinates of the dense network at
initialization.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import sparsify
import train
from conf import ROOT, load_settings, run_program
from measures.masks import measure_masks, topology
from measures.norms import measure_network
from measures.paths import path_norm
from measures.trace import weight_layers
from models import get_network
from records import load_checkpoint, load_data, lock, read_metrics, write_table
from studies.report import new_figure, print_table, read_csv, save, study_parser

SHIPPED = ROOT / 'results' / 'topology'
COORDINATES = 'ramanujan gap', 'imdb', 'weighted gap', 'weighted gap of subgraphs'
EPOCHS, SEEDS = 6, range(3)
KNOBS = {
    'train_samples': 2000,
    'width': 32,
    'stride': 2,
    'lr': 0.3,
    'weight_decay': 1e-4,
    'epochs': EPOCHS,
    'milestones': [4],
    'eval_every': EPOCHS,
    'snapshot_every': EPOCHS,
    'certify_every': 0,
    'threads': 1,
}
# A marker and a color of each way; the colors differ without red and green.
MARKERS = tuple(
    zip('osD^vPX', '#0072B2 #E69F00 #009E73 #D55E00 #000000 #56B4E9 #CC79A7'.split(), strict=True)
)
WAYS = {
    'magnitude': {'density': 1.0, 'prune_rounds': 1, 'prune_fraction': 0.8},  # rewound
    'SNIP': {'initial_mask': 'snip'},
    'SynFlow': {'initial_mask': 'synflow'},
    'ERK': {'initial_mask': 'erk'},
    'random': {'initial_mask': 'random'},
    'SET': {'initial_mask': 'erk', 'regrow': 'random', 'regrow_every': 25},
    'RigL': {'initial_mask': 'erk', 'regrow': 'gradient', 'regrow_every': 25},
}


def coordinates(net):
    """(4,) means over layers of COORDINATES."""
    measured = []
    for layer in weight_layers(net).values():
        rows = layer.weight.detach().flatten(1)
        # imdb's subgraphs: the inputs that equally many outputs read.
        degrees = rows.ne(0).sum(0)
        gaps = []
        for degree in degrees.unique():
            part = topology(rows[:, degrees == degree])
            if not np.isnan(part['ramanujan_gap']):
                gaps.append(part['weighted_gap'])
        measured.append([*topology(rows).values(), np.mean(gaps) if gaps else np.nan])
    return np.nanmean(measured, axis=0)


def measure(net, shape, origin):
    """{measure: value} of a network; `origin` (4,) are the coordinates to take distances from."""
    at = coordinates(net)
    found = dict(zip(COORDINATES, at))
    found['distance'] = np.linalg.norm(at - origin)
    found['relative distance'] = np.linalg.norm((at - origin) / origin)
    found['path norm'] = path_norm(net, shape)
    found['rho'] = measure_network(net, shape).rho
    layers = measure_masks(net).values()
    found['dead channels'] = sum(layer['dead_channels'] for layer in layers)
    for number, layer in enumerate(layers, 1):
        found[f'density of layer {number}'] = layer['density']
    return found


def measure_run(settings, dataset, folder):
    """Trains one network in `folder`. Returns {measure: value}, under its first and last mask."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        train.train(settings, dataset, folder)
    torch.manual_seed(settings.seed)
    net = get_network(settings, dataset.input_shape, dataset.num_classes)
    origin = coordinates(net)
    dense = {name: value.clone() for name, value in net.state_dict().items()}
    found, round_ = {}, settings.prune_rounds
    for when, epoch in (('start', 0), ('end', EPOCHS)):
        snapshot = folder / 'snapshots' / f'{round_}-{epoch}.pt'
        net.load_state_dict(load_checkpoint(snapshot)['network'])
        if round_ and epoch == 0:
            # The snapshot has the pruned weights, and training starts with the rewound ones.
            sparsify.rewind(net, torch.optim.SGD(net.parameters()), dense)
        for name, value in measure(net, dataset.input_shape, origin).items():
            found[f'{name} at the {when}'] = value
    metrics = read_metrics(folder / 'metrics.csv')
    found['train error'] = metrics['train_error'][-1]
    found['test error'] = metrics['test_error'][-1]
    return found


def measure_all(folder):
    """{measure: (ways, seeds)}."""
    rows = []
    for way, knobs in WAYS.items():
        for seed in SEEDS:
            flags = KNOBS | {'density': 0.2, 'seed': seed} | knobs
            settings = load_settings(flags=flags)[1][0]
            settings.name = f'{way}-{seed}'
            rows.append(measure_run(settings, load_data(settings), folder / settings.name))
    shape = len(WAYS), len(SEEDS)
    return {name: np.array([row[name] for row in rows]).reshape(shape) for name in rows[0]}


def spearman(first, second):
    """The correlation of ranks, ties at their mean rank; nan if one side is constant."""
    ranks = []
    for values in (first, second):
        rank = np.less.outer(values, values).sum(0) + np.less_equal.outer(values, values).sum(0)
        if np.ptp(rank) == 0:
            return np.nan
        ranks.append(rank)
    return np.corrcoef(*ranks)[0, 1]


def correlations(values, errors):
    """Spearman's of (ways, seeds), as text: over all networks, over means of ways, within ways."""
    within = [part - part.mean(1, keepdims=True) for part in (values, errors)]
    return {
        'all': f'{spearman(values.ravel(), errors.ravel()):+.2f}',
        'means': f'{spearman(values.mean(1), errors.mean(1)):+.2f}',
        'within': f'{spearman(within[0].ravel(), within[1].ravel()):+.2f}',
    }


def write(tables, folder):
    """Writes each network's test error, and the other measures' correlations with it."""
    errors, rows = tables['test error'], []
    for way, line in zip(WAYS, errors):
        for seed, error in zip(SEEDS, line):
            rows.append({'way': way, 'seed': seed, 'test_error': error})
    write_table(folder / 'errors.csv', list(rows[0]), rows)
    rows = []
    for name, values in tables.items():
        if name != 'test error':
            rows.append({'measure': name} | correlations(values, errors))
    write_table(folder / 'correlations.csv', list(rows[0]), rows)


def show(folder):
    """Prints the tables of the files; in a cell the correlation at the start comes first."""
    errors, found = {}, {}
    for row in read_csv(folder / 'errors.csv'):
        errors.setdefault(row['way'], []).append(float(row['test_error']))
    for row in read_csv(folder / 'correlations.csv'):
        name = row['measure'].removesuffix(' at the start').removesuffix(' at the end')
        found.setdefault(name, []).append([row['all'], row['means'], row['within']])
    rows = []
    for way, values in sorted(errors.items(), key=lambda item: np.mean(item[1])):
        rows.append((way, f'{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})'))
    print_table(('way to the mask', 'test error, mean (least to most of three seeds)'), rows)
    print()
    rows = [(name, *map(', '.join, zip(*cells))) for name, cells in found.items()]
    count = sum(len(values) for values in errors.values())
    print_table(('measure', f'all {count}', f'{len(errors)} means', 'within a way'), rows)


def draw(tables):
    figure = new_figure(8.5, 4.4)
    panels = figure.subplots(1, 3, sharey=True)
    shown = 'distance at the start', 'weighted gap at the end', 'train error'
    for panel, name in zip(panels, shown):
        ways = zip(WAYS, MARKERS, tables[name], tables['test error'])
        for way, (marker, color), x, y in ways:
            panel.scatter(x, y, marker=marker, color=color, label=way)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('test error')
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc='outside lower center', ncols=7, frameon=False)
    return figure


def main(arguments=None):
    parser = study_parser('topology', __doc__)
    parser.add_argument(
        '--train',
        type=Path,
        metavar='DIR',
        help='train the networks in this folder, and write errors.csv, correlations.csv and '
        'topology.png there',
    )
    options = parser.parse_args(arguments)
    if options.train:
        tables = measure_all(options.train)
        write(tables, options.train)
        save(draw(tables), options.train / 'topology.png')
    show(options.train or SHIPPED)


if __name__ == '__main__':
    sys.exit(run_program(main))
