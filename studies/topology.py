"""What a mask's topology says of the network's error: seven ways to a mask of equal density (docs/sparse.md).

python docs/topology.py            in a few minutes of one core: results/topology, docs/topology.png and the tables
python docs/topology.py --tables   the tables, from results/topology

CONV-3-32 of stride 2 on 2,000 images of MNIST, a fifth of the weights alive. The coordinates are those that
Hoang et al. (NeurIPS 2023, "Don't just prune by magnitude!") name: means over layers of the ramanujan_gap,
imdb and weighted_gap of measures.masks.topology, and of weighted_gap over imdb's subgraphs. The distance is
the Euclidean one to the coordinates of the dense network at initialization.
"""

import copy
import csv
import sys

import numpy as np
import torch
import torch.nn.functional as F
from launch import get_dataset

import sparsify
from conf import ROOT, load_settings
from evaluation import learning_rate
from measures.masks import measure_masks, topology
from measures.norms import measure_network
from measures.paths import path_norm
from measures.trace import weight_layers
from models import get_network

PICTURE = ROOT / 'docs' / 'topology.png'
MEASURED = ROOT / 'results' / 'topology'
DENSITY, EPOCHS, SEEDS = 0.2, 6, range(3)
WAYS = {
    'magnitude': {
        'prune_rounds': 1,
        'prune_fraction': 1 - DENSITY,
    },  # after a dense training, rewound
    'SNIP': {'density': DENSITY, 'initial_mask': 'snip'},
    'SynFlow': {'density': DENSITY, 'initial_mask': 'synflow'},
    'ERK': {'density': DENSITY, 'initial_mask': 'erk'},
    'random': {'density': DENSITY, 'initial_mask': 'random'},
    'SET': {'density': DENSITY, 'initial_mask': 'erk', 'regrow': 'random', 'regrow_every': 25},
    'RigL': {'density': DENSITY, 'initial_mask': 'erk', 'regrow': 'gradient', 'regrow_every': 25},
}


def coordinates(net):
    """(4,) means over layers: ramanujan_gap, imdb, weighted_gap, and weighted_gap over imdb's subgraphs."""
    measured = []
    for layer in weight_layers(net).values():
        rows = layer.weight.detach().flatten(1)
        degrees = rows.ne(0).sum(0)
        parts = [topology(rows[:, degrees == degree]) for degree in degrees.unique()]
        gaps = [part['weighted_gap'] for part in parts if not np.isnan(part['ramanujan_gap'])]
        measured.append([*topology(rows).values(), np.mean(gaps) if gaps else np.nan])
    return np.nanmean(measured, axis=0)


def train(net, settings, dataset, targets):
    """The training of train.py, without its log."""
    rates = {
        'lr': settings.lr,
        'momentum': settings.momentum,
        'weight_decay': settings.weight_decay,
    }
    optimizer = torch.optim.SGD(net.parameters(), **rates)
    steps = -(-len(targets) // settings.batch_size)
    for epoch in range(1, EPOCHS + 1):
        optimizer.param_groups[0]['lr'] = learning_rate(settings, epoch)
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(targets))
        for step, chosen in enumerate(torch.from_numpy(order).split(settings.batch_size)):
            number = (epoch - 1) * steps + step
            due = sparsify.regrow_due(settings, number, EPOCHS * steps)

            def loss(chosen=chosen):
                return F.mse_loss(net(dataset.train_images[chosen]), targets[chosen])

            if not due or settings.regrow == 'random':
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            if due:
                sparsify.regrow(net, optimizer, settings, number, EPOCHS * steps, loss)
    return optimizer


@torch.no_grad()
def error(net, images, labels):
    return (net(images).argmax(1) != labels).double().mean().item()


def measure(way, seed, dataset):
    """One run: {measure: value}, 'at the start' under the first mask and 'at the end' after the training."""
    flags = {
        'width': 32,
        'stride': 2,
        'lr': 0.3,
        'weight_decay': 1e-4,
        'epochs': EPOCHS,
        'milestones': [4],
    }
    settings = load_settings(flags=flags | {'seed': seed} | WAYS[way])[1][0]
    shape = dataset.input_shape
    targets = F.one_hot(dataset.train_labels, 10).float()
    torch.manual_seed(seed)
    net = get_network(settings, shape, 10)
    origin = coordinates(net)
    saved = copy.deepcopy(net.state_dict())
    sparsify.initialize(net, settings, dataset.train_images, targets, F.mse_loss)
    if settings.prune_rounds:
        optimizer = train(net, settings, dataset, targets)
        sparsify.prune(net, settings, 1, shape)
        sparsify.rewind(net, optimizer, saved)
    found = {}
    for when in ('at the start', 'at the end'):
        if when == 'at the end':
            train(net, settings, dataset, targets)
        at = coordinates(net)
        names = ('ramanujan gap', 'imdb', 'weighted gap', 'weighted gap of subgraphs')
        found |= {f'{name} {when}': value for name, value in zip(names, at)}
        found |= {f'distance {when}': np.linalg.norm(at - origin)}
        found |= {f'relative distance {when}': np.linalg.norm((at - origin) / origin)}
        found |= {
            f'path norm {when}': path_norm(net, shape),
            f'rho {when}': measure_network(net, shape).rho,
        }
        layers = measure_masks(net).values()
        found |= {f'dead channels {when}': sum(layer['dead_channels'] for layer in layers)}
        found |= {
            f'density of layer {number} {when}': layer['density']
            for number, layer in enumerate(layers, 1)
        }
    found |= {'train error': error(net, dataset.train_images, dataset.train_labels)}
    return found | {'test error': error(net, dataset.test_images, dataset.test_labels)}


def spearman(first, second):
    """The correlation of ranks, ties at their mean rank; nan where one does not vary."""
    ranks = [
        [np.sum(values < value) + np.sum(values <= value) for value in values]
        for values in (first, second)
    ]
    return np.corrcoef(*ranks)[0, 1] if min(map(np.ptp, ranks)) > 0 else np.nan


def measure_all():
    """{measure: (ways, seeds)}."""
    torch.set_num_threads(1)
    dataset = get_dataset('MNIST', 'data', False, 'cpu', 2000)
    runs = [[measure(way, seed, dataset) for seed in SEEDS] for way in WAYS]
    return {name: np.array([[run[name] for run in way] for way in runs]) for name in runs[0][0]}


def correlations(values, errors):
    """Spearman's, over all networks, over the means of the ways, and over what is left when these are subtracted."""
    within = [part - part.mean(1, keepdims=True) for part in (values, errors)]
    pairs = (values, errors), (values.mean(1), errors.mean(1)), within
    return [f'{spearman(*map(np.ravel, pair)):+.2f}' for pair in pairs]


def write(tables):
    """The test error of each network, and the correlations of the other measures with it."""
    errors = tables['test error']
    rows = [
        (way, seed, f'{error:.4f}')
        for way, line in zip(WAYS, errors)
        for seed, error in zip(SEEDS, line)
    ]
    found = [
        (name, *correlations(values, errors))
        for name, values in tables.items()
        if name != 'test error'
    ]
    for name, content in (
        ('errors.csv', [('way', 'seed', 'test_error'), *rows]),
        ('correlations.csv', [('measure', 'all', 'means', 'within'), *found]),
    ):
        with (MEASURED / name).open('w', newline='') as file:
            csv.writer(file, lineterminator='\n').writerows(content)


def show():
    """Prints the tables from the files; a measure's correlation at the start comes before that at the end."""
    errors, found = {}, {}
    for row in csv.DictReader((MEASURED / 'errors.csv').open()):
        errors.setdefault(row['way'], []).append(float(row['test_error']))
    for row in csv.DictReader((MEASURED / 'correlations.csv').open()):
        name = row['measure'].removesuffix(' at the start').removesuffix(' at the end')
        found.setdefault(name, []).append([row['all'], row['means'], row['within']])
    print('| way to the mask | test error, mean (least to most of three seeds) |\n| --- | --- |')
    for way, values in sorted(errors.items(), key=lambda item: np.mean(item[1])):
        print(f'| {way} | {np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}) |')
    print(
        f'\n| measure | all {sum(map(len, errors.values()))} | {len(errors)} means | within a way |\n|{" --- |" * 4}'
    )
    for name, cells in found.items():
        print(f'| {name} | {" | ".join(map(", ".join, zip(*cells)))} |')


def draw(tables):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(14, 4), layout='constrained')
    shown = 'distance at the start', 'weighted gap at the end', 'train error'
    for panel, name in zip(figure.subplots(1, 3, sharey=True), shown):
        for way, x, y in zip(WAYS, tables[name], tables['test error']):
            panel.scatter(x, y, label=way)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel('test error')
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc='outside right center', frameon=False
    )
    figure.savefig(PICTURE, dpi=130)


if __name__ == '__main__':
    if '--tables' not in sys.argv:
        tables = measure_all()
        write(tables)
        draw(tables)
    show()
