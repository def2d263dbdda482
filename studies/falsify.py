"""Is the complexity estimate behind a bound true? Tries to refute it by networks of its class.

    python -m studies.falsify our_bound path_bound --dataset digits --depth 1 2 3

A bound of the form c (nu + 1) / gamma * complexity + tail, with a norm nu of the network, rests on
R({f: nu(f) <= 1}) <= complexity. R is the Rademacher complexity E sup_f sum_ir xi_ir f(x_i)_r / m,
with an independent sign xi_ir for each sample i and output r. Hold the hidden layers of a network,
with the features z(x): the supremum over the classifier is a dual norm of the sums S_r = sum_i
xi_ir z(x_i), and a lower bound on its mean is one on R. Above `complexity` it refutes the estimate.
The norms, the proofs and what has been found: docs/bounds.md.
"""

import argparse
import copy
import csv
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from conf import ROOT, BadInput
from datasets import load_dataset
from measures.norms import measure_data, measure_network, product
from utils import BOUNDS

# norm nu: (of a network, of its hidden layers), both from the table of `measure_network`
NORMS = {
    'Frobenius': (lambda net: product(net.F), lambda net: product(net.F[:-1])),
    'Toeplitz': (lambda net: product(net.T), lambda net: product(net.T[:-1])),
    'group': (lambda net: product(net.b[-1], net.F[:-1]), lambda net: product(net.F[:-1])),
    'path': (lambda net: net.path_norm, lambda net: 1.0),
}
# c of a bound: a bound on errors is c / gamma times R, by contraction of the margin loss
CONSTANTS = {
    'our_bound': 2 * math.sqrt(2),
    'golowich_bound': 2 * math.sqrt(2),
    'corrected_bound': 4,
    'path_bound': 4,
}
COVERING = 'it bounds covering numbers of the loss class, and no complexity of networks'
OTHER_FORMS = {
    'ledent_bound': COVERING,
    'graf_bound': COVERING,
    'graf_params_bound': COVERING,
    'bartlett_bound': COVERING,
    'sedghi_bound': 'its theorem leaves the constant open, which is set to 1 here',
    'neyshabur_bound': 'it is a PAC-Bayes bound, whose proof has no class of networks',
    'certified_error': 'it is the smaller of corrected_bound and path_bound, over several margins',
    'certified_margin': 'it is a margin, not a bound',
}
PROVEN, DRAWN, OPEN = (
    'refuted (proven)',
    'refuted (Monte Carlo, 3 standard errors)',
    'not refuted by these networks',
)
DRAWS = 20
MOST_FEATURES = 1000  # up to which inner products of features are taken: a matrix of that size


def plain(net):
    """A copy in float64 whose effective weights are its parameters."""
    net = copy.deepcopy(net).double()
    for module in net.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, 'weight')
    return net.requires_grad_(False)


def random_tables(net, data):
    """Tables of two random networks of this geometry, each with its classifier times 1, 2, 4."""
    tables = []
    for seed in (0, 1):
        net, generator = plain(net), torch.Generator().manual_seed(seed)
        for weight in net.parameters():
            weight.normal_(generator=generator)
        for _ in range(3):
            tables.append(measure_network(net, data.input_shape, torch.zeros(data.m)))
            net[-1].weight.mul_(2)
    return tables


def read_claim(bound, tables, data, constant):
    """(norm, complexity) of a bound of the form c (nu + 1) / gamma * complexity + tail.

    The difference of two margins has no tail, and that of two scales of the classifier no + 1: it
    is c * complexity * (change of nu). `tables` are those of `random_tables`.
    Raises:
        BadInput: for no norm of NORMS is this quotient the same, to 1e-6, wherever it is taken.
    """
    terms = []
    for table in tables:
        low, middle, high = (bound(table, data, 0.001, gamma) for gamma in (1, 2, 4))
        terms.append([2 * (low - middle), 4 * (middle - high)])
    terms, found = np.array(terms).reshape(2, 3, 2), {}
    for name, (whole, _) in NORMS.items():
        norms = np.array([whole(table) for table in tables]).reshape(2, 3, 1)
        quotients = np.diff(terms, axis=1) / np.diff(norms, axis=1)
        if 0 < quotients.max() < math.inf and np.ptp(quotients) <= 1e-6 * quotients.max():
            # Several norms fit where they are proportional: how far is each from having the + 1?
            offset = terms[0, 0, 0] - quotients[0, 0, 0] * norms[0, 0, 0]
            found[name] = quotients[0, 0, 0], abs(quotients[0, 0, 0] - offset)
    if not found:
        raise BadInput('it is not linear in a norm of NORMS over gamma, up to a tail')
    norm = min(found, key=lambda name: found[name][1])
    return norm, found[norm][0] / constant


@torch.no_grad()
def kernels_for(images, depth, size=2):
    """{name: a kernel of Frobenius norm 1 for each of `depth` layers with one channel}.

    `tap` picks one pixel of a patch, `box` averages them, and `leading` is, layer by layer, the
    leading eigenvector of the second moments of the patches, which makes the energy largest. They
    may depend on the images, as the estimates hold for all weights; on the signs they must not.
    """
    kernels = {'tap': [], 'box': [], 'leading': []}
    hidden, channels = nn.Sequential(), images.shape[1]
    for _ in range(depth):
        moments = 0.0
        for part in images.split(2048):
            patches = F.unfold(hidden(part.double()), size)
            moments = moments + (patches @ patches.mT).sum(0)
        leading = torch.linalg.eigh(moments).eigenvectors[:, -1]
        box = torch.full_like(leading, len(leading) ** -0.5)
        tap = torch.eye(len(leading)).double()[0]
        for name, kernel in ('tap', tap), ('box', box), ('leading', leading * leading.sum().sign()):
            kernels[name].append(kernel.view(1, channels, size, size))
        hidden.extend([convolution(kernels['leading'][-1]), nn.ReLU()])
        channels = 1
    return kernels


def convolution(kernel):
    layer = nn.Conv2d(kernel.shape[1], len(kernel), kernel.shape[2:], bias=False)
    layer.weight = nn.Parameter(kernel, requires_grad=False)
    return layer


def network_of(kernels, input_shape, classes):
    """The chain of these convolutions, each with a ReLU, and a classifier, whose weights are 1."""
    layers = [layer for kernel in kernels for layer in (convolution(kernel), nn.ReLU())]
    features = nn.Sequential(*layers)(torch.ones(1, *input_shape).double()).numel()
    classifier = nn.Linear(features, classes, bias=False)
    nn.init.ones_(classifier.weight)
    return nn.Sequential(*layers, nn.Flatten(), classifier)


@torch.no_grad()
def measure(net, images, classes):
    """What the lower bounds of all norms need of the features of a network: sums over the images.

    Returns:
        Namespace of network (its table), energy (channels, positions), path (the same: path-norm of
        each unit), r2, and sums (DRAWS, classes, channels, positions) of randomly signed features.
    """
    net = plain(net)
    hidden = net[:-1]
    generator = torch.Generator().manual_seed(0)
    energy = gram = fourth = sums = 0.0
    for part in images.split(2048):
        z = hidden(part.double())
        signs = torch.randint(0, 2, (DRAWS * classes, len(z)), generator=generator) * 2.0 - 1
        sums = sums + (signs @ z.float()).double()
        energy = energy + z.square().sum(0)
        if z.shape[1] <= MOST_FEATURES:
            gram = gram + z.T @ z
            fourth = fourth + z.square().sum(1).square().sum()
    # sum over pairs of images of <z_i, z_j>^2 / t^2, at most 1 by Cauchy-Schwarz
    r2 = 1.0
    if len(energy) <= MOST_FEATURES:
        r2 = ((gram.square().sum() - fourth) / energy.sum() ** 2).item()
    network = measure_network(net, images.shape[1:])
    absolute = copy.deepcopy(hidden)
    for weight in absolute.parameters():
        weight.abs_()
    path = absolute(torch.ones_like(images[:1]).double())
    units = -1, int(network.p[-2])
    return SimpleNamespace(
        network=network,
        r2=r2,
        energy=energy.view(units),
        path=path.view(units),
        sums=sums.view(DRAWS, classes, *energy.view(units).shape),
    )


def lower_bounds(measured, norm, m):
    """(proven, proven with one sign per sample, mean of the draws, their standard error) of R.

    With t the energy of the features and C classes: Hoelder's inequality gives
    E||S|| >= (E||S||^2)^(3/2) / (E||S||^4)^(1/2) = sqrt(C t / (1 + 2 r2 / C)), Kahane's with the
    constant of Latala and Oleszkiewicz sqrt(C t / 2).
    """
    sums, energy = measured.sums, measured.energy
    classes = sums.shape[1]
    if norm in ('Frobenius', 'Toeplitz'):
        draws = sums.flatten(1).norm(dim=1)
        t = energy.sum().item()
        proven, one_sign = (
            max(math.sqrt(C * t / 2), math.sqrt(C * t / (1 + 2 * measured.r2 / C)))
            for C in (classes, 1)
        )
    else:
        # The norm of the classifier is a sum, over positions or units, so its dual is a maximum.
        if norm == 'group':
            draws, largest = sums.norm(dim=2).flatten(1).amax(1), energy.sum(0).max()
        else:
            reached = measured.path > 0
            draws = (sums / measured.path)[..., reached].abs().flatten(1).amax(1)
            largest = (energy / measured.path.square())[reached].max()
        proven = one_sign = math.sqrt(largest.item() / 2)
    scale = m * NORMS[norm][1](measured.network)
    error = draws.std().item() / math.sqrt(len(draws))
    return [value / scale for value in (proven, one_sign, draws.mean().item(), error)]


def falsify(names, nets, images, classes, constant=4):
    """Compares the estimates behind bounds with lower bounds on what they estimate.

    Args:
        names: entries of BOUNDS; `constant` is the c of those that CONSTANTS does not have.
        nets: {name: network}, chains of one geometry: bias-free convolutions and ReLUs in an
            nn.Sequential that ends with a flattening and the classifier, whose weights have no
            influence.
        images: (m, channels, height, width), as the networks see them.
    Returns:
        A list of dicts, one for each bound of the form, and {name of another: why it is not}.
    """
    first = next(iter(nets.values()))
    data, claims = measure_data(first, images), {}
    others = {name: OTHER_FORMS[name] for name in names if name in OTHER_FORMS}
    tables = random_tables(first, data) if len(others) < len(names) else None
    for name in names:
        if name not in others:
            c = CONSTANTS.get(name, constant)
            try:
                claims[name] = *read_claim(BOUNDS[name], tables, data, c), c
            except BadInput as reason:
                others[name] = str(reason)
    measured = {name: measure(net, images, classes) for name, net in nets.items() if claims}
    rows = []
    for name, (norm, complexity, c) in claims.items():
        found = {net: lower_bounds(table, norm, data.m) for net, table in measured.items()}
        best = max(found, key=lambda net: found[net][0])
        proven, one_sign, _, _ = found[best]
        drawn = max(found, key=lambda net: found[net][2] - 3 * found[net][3])
        _, _, mean, error = found[drawn]
        verdict = OPEN
        if proven > complexity:
            verdict = PROVEN
        elif mean - 3 * error > complexity:
            verdict = DRAWN
        row = {'bound': name, 'norm': norm, 'c': c, 'complexity': complexity, 'network': best}
        row |= {'proven': proven, 'one_sign': one_sign, 'r2': measured[best].r2}
        row |= {'drawn_network': drawn, 'monte_carlo': mean, 'standard_error': error}
        rows.append(row | {'verdict': verdict})
    return rows, others


def draw(rows, path):
    """The estimate over the proven lower bound against the depth: false below 1."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6.5, 4), layout='constrained')
    panel = figure.subplots()
    bounds = dict.fromkeys(row['bound'] for row in rows)
    for name, marker in zip(bounds, 'osD^vPX*'):
        own = [row for row in rows if row['bound'] == name]
        ratios = [row['complexity'] / row['proven'] for row in own]
        panel.plot([row['depth'] for row in own], ratios, marker=marker, label=name)
        panel.annotate(
            name, (own[-1]['depth'], ratios[-1]), (6, 0), textcoords='offset points', va='center'
        )
    panel.axhline(1, color='black', linewidth=1)
    panel.axhspan(panel.get_ylim()[0], 1, color='C3', alpha=0.1)
    panel.set(yscale='log', xlabel='convolutions', ylabel='estimate / proven lower bound')
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog='python -m studies.falsify', description=__doc__)
    parser.add_argument('bounds', nargs='*', metavar='BOUND', help='entries of BOUNDS; all of them')
    parser.add_argument('--dataset', default='MNIST')
    parser.add_argument('--depth', type=int, nargs='+', default=[1, 2, 3], help='convolutions')
    parser.add_argument('--constant', type=float, default=4, help='c of a bound of your own')
    parser.add_argument('--out', type=Path, help='folder for falsify.csv and falsify.png')
    args = parser.parse_args(arguments)
    unknown = [name for name in args.bounds if name not in BOUNDS]
    if unknown:
        raise BadInput(f'{unknown[0]}: is not in BOUNDS of utils.py; it has {", ".join(BOUNDS)}')
    dataset = load_dataset(args.dataset, os.environ.get('DATA_DIR') or ROOT / 'data')
    table = []
    print('| bound | network | estimate | proven | one sign | Monte Carlo | verdict |')
    print('| --- ' * 7 + '|')
    images, classes = dataset.train_images, dataset.num_classes
    kernels = kernels_for(images, max(args.depth))
    for depth in args.depth:
        nets = {
            name: network_of(layers[:depth], dataset.input_shape, classes)
            for name, layers in kernels.items()
        }
        rows, others = falsify(args.bounds or BOUNDS, nets, images, classes, args.constant)
        for row in rows:
            numbers = [
                row[column] for column in ('complexity', 'proven', 'one_sign', 'monte_carlo')
            ]
            cells = [f'{number:.3g}' for number in numbers]
            print('|', ' | '.join([row['bound'], f'CONV-{depth}', *cells, row['verdict']]), '|')
            table.append(
                {'dataset': args.dataset, 'samples': len(dataset.train_images), 'depth': depth}
                | row
            )
    for name, reason in others.items():
        print(f'{name}: not of this form: {reason}')
    if args.out and table:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / 'falsify.csv').open('w', newline='') as file:
            writer = csv.DictWriter(file, table[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(table)
        draw(table, args.out / 'falsify.png')


if __name__ == '__main__':
    main()
