"""Is the complexity estimate behind a bound true? Tries to refute it by networks of its class.

    python -m studies.falsify our_bound path_bound --dataset digits --depth 1 2 3

A bound of the form c (nu + 1) / gamma * complexity + tail, with a norm nu of the network, rests on
R({f: nu(f) <= 1}) <= complexity. R is the Rademacher complexity E sup_f sum_ir xi_ir f(x_i)_r / m,
with an independent sign xi_ir for each sample i and output r. Hold the hidden layers of a network,
with the features z(x): the supremum over the classifier is a dual norm of the sums S_r = sum_i
xi_ir z(x_i), and a lower bound on its mean is one on R. Above `complexity` it refutes the estimate.
The norms, the proofs and what has been found: docs/bounds.md.
"""

import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from conf import BadInput, load_settings, run_program
from measures.norms import measure_data, measure_network, product
from measures.trace import sequential, trace_layers
from records import load_data, write_table
from studies.report import study_parser
from utils import BOUNDS

# Norms nu of a network, from the table of `measure_network`.
NORMS = {
    'Frobenius': lambda net: product(net.F),
    'Toeplitz': lambda net: product(net.T),
    'group': lambda net: product(net.b[-1], net.F[:-1]),
    'path': lambda net: net.path_norm,
}
# Where R bounds errors with the factor c / gamma, by a contraction of the margin loss: c.
CONSTANTS = {'our_bound': 8**0.5, 'golowich_bound': 8**0.5, 'corrected_bound': 4, 'path_bound': 4}
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
PROVEN = 'refuted (proven)'
DRAWN = 'refuted (Monte Carlo, 3 standard errors)'
OPEN = 'not refuted by these networks'
CHUNK = 128  # images whose maps stay in a cache of the processor
DRAWS = 20  # of all signs
MOST_FEATURES = 1000  # up to which their matrix of second moments is computed


def double_copy(net, input_shape):
    """A copy in float64 as an nn.Sequential of plain layers, the classifier last."""
    return sequential(trace_layers(net, input_shape)).requires_grad_(False)


def random_tables(net, data):
    """Tables of two random networks of this geometry, each with its classifier times 1, 2, 4."""
    tables = []
    for seed in (0, 1):
        net, generator = double_copy(net, data.input_shape), torch.Generator().manual_seed(seed)
        for weight in net.parameters():
            weight.normal_(generator=generator)
        for _ in range(3):
            tables.append(measure_network(net, data.input_shape, torch.zeros(data.m)))
            net[-1].weight.mul_(2)
    return tables


def _geometry(net, data):
    """What decides an estimate besides the norms: the layers' taps, and the number of outputs."""
    layers = trace_layers(net, data.input_shape)
    taps = [axis.tolist() for layer in layers for axis in layer.taps]
    return *taps, len(layers[-1].weight)


def read_claim(bound, tables, data):
    """(norm, c * complexity) of a bound of the form c (nu + 1) / gamma * complexity + tail.

    The difference of two margins has no tail, and that of two scales of the classifier no + 1: it
    is c * complexity * (change of nu). `tables` are those of `random_tables`.
    Raises:
        BadInput: for no norm of NORMS is this quotient the same, to 1e-6, wherever it is taken.
    """
    terms = []
    for table in tables:
        low, middle, high = (bound(table, data, 0.001, gamma) for gamma in (1, 2, 4))
        terms.append([2 * (low - middle), 4 * (middle - high)])
    found, terms = {}, np.array(terms).reshape(2, 3, 2)
    for name, nu in NORMS.items():
        norms = np.reshape([nu(table) for table in tables], (2, 3, 1))
        quotients = np.diff(terms, axis=1) / np.diff(norms, axis=1)
        slope = quotients.max()
        if 0 < slope < math.inf and np.ptp(quotients) <= 1e-6 * slope:
            found[name] = slope
    if not found:
        norms = ', '.join(NORMS)
        raise BadInput(f'it is not linear in one of {norms} over gamma, up to a tail')
    # Without padding T is sqrt(p) F. Of norms that are proportional, the + 1 tells which is meant.
    offsets = {name: terms[0, 0, 0] - found[name] * NORMS[name](tables[0]) for name in found}
    norm = min(found, key=lambda name: abs(found[name] - offsets[name]))
    return norm, found[norm]


def network_of(kernels, input_shape, classes):
    """The chain of these convolutions, each with a ReLU, and a classifier of ones, in float64."""
    net = nn.Sequential()
    for kernel in kernels:
        layer = nn.Conv2d(kernel.shape[1], len(kernel), kernel.shape[2:], bias=False)
        layer.weight = nn.Parameter(kernel)
        net.extend([layer, nn.ReLU()])
    net.append(nn.Flatten())
    features = net(torch.ones(1, *input_shape).double()).numel()
    net.append(nn.Linear(features, classes, bias=False))
    nn.init.ones_(net[-1].weight)
    return double_copy(net, input_shape)


@torch.no_grad()
def kernels_for(images, depth, size=2):
    """{name: a kernel of Frobenius norm 1 for each of `depth` layers with one channel}.

    `tap` picks one pixel of a patch, `box` averages them, and `leading` is, layer by layer, the
    leading eigenvector of the second moments of the patches, which makes the energy largest. They
    may depend on the images, as the estimates hold for all weights; on the signs they must not.
    """
    kernels = {'tap': [], 'box': [], 'leading': []}
    maps = [part.double() for part in images.split(CHUNK)]
    for _ in range(depth):
        moments = 0.0
        for part in maps:
            patches = F.unfold(part, size)
            moments = moments + (patches @ patches.mT).sum(0)
        leading = torch.linalg.eigh(moments).eigenvectors[:, -1]
        shape = 1, -1, size, size
        kernels['tap'].append(torch.eye(len(leading)).double()[0].view(shape))
        kernels['box'].append(torch.full_like(leading, len(leading) ** -0.5).view(shape))
        kernels['leading'].append((leading * leading.sum().sign()).view(shape))
        maps = [F.conv2d(part, kernels['leading'][-1]).relu() for part in maps]
    return kernels


@torch.no_grad()
def lower_bounds(net, images, classes):
    """{norm: (proven, proven with one sign per sample, mean of random signs, its error)} of R.

    With t the energy of the features and C classes, E||S|| is at least sqrt(C t / 2) (Kahane, with
    the constant of Latala and Oleszkiewicz), and by Hoelder's inequality at least
    (E||S||^2)^(3/2) / (E||S||^4)^(1/2) = sqrt(C t / (1 + 2 r2 / C)).
    """
    input_shape, m = tuple(images.shape[1:]), len(images)
    net, table = double_copy(net, input_shape), measure_network(net, input_shape)
    generator = torch.Generator().manual_seed(0)
    energy = gram = fourth = sums = 0.0
    for part in images.split(CHUNK):
        z = net[:-1](part.double())
        signs = torch.randint(0, 2, (DRAWS * classes, len(z)), generator=generator) * 2.0 - 1
        sums = sums + signs @ z.float()
        energy = energy + z.square().sum(0)
        if z.shape[1] <= MOST_FEATURES:
            gram = gram + z.T @ z
            fourth = fourth + z.square().sum(1).square().sum()
    # r2: the sum over pairs of images of <z_i, z_j>^2, over t^2; at most 1 by Cauchy-Schwarz
    t, r2 = energy.sum().item(), 1.0
    if len(energy) <= MOST_FEATURES:
        r2 = (gram.square().sum() - fourth).item() / t**2

    # The path-norm of each unit: the network of absolute weights at an image of ones.
    for weight in net.parameters():
        weight.abs_()
    path = net[:-1](torch.ones_like(images[:1]).double())[0]
    positions = math.prod(trace_layers(net, input_shape)[-1].in_size)
    shape = -1, positions  # of channels
    energy, path = energy.view(shape), path.view(shape)
    sums = sums.view(DRAWS, classes, *energy.shape).double()

    def bounds(proven, one_sign, draws, hidden):
        error = draws.std() / DRAWS**0.5
        return np.array([proven, one_sign, draws.mean(), error]) / (m * hidden)

    # Frobenius norm of the classifier: its dual is that of the sums.
    norms = sums.flatten(1).norm(dim=1)
    many, one = (math.sqrt(C * t / min(2, 1 + 2 * r2 / C)) for C in (classes, 1))
    found = {'Frobenius': bounds(many, one, norms, product(table.F[:-1]))}
    found['Toeplitz'] = bounds(many, one, norms, product(table.T[:-1]))
    # A sum of norms over positions: the largest norm at a position.
    largest = sums.norm(dim=2).flatten(1).amax(1)
    proven = math.sqrt(energy.sum(0).max() / 2)
    found['group'] = bounds(proven, proven, largest, product(table.F[:-1]))
    # A sum of absolute values over units of path-norm 1: the largest unit; dead ones are left out.
    largest = (sums.abs() / path).nan_to_num().flatten(1).amax(1)
    proven = math.sqrt((energy / path.square()).nan_to_num().max() / 2)
    found['path'] = bounds(proven, proven, largest, 1)
    return found


def falsify(names, nets, images, classes, constant=4):
    """Compares the estimates behind bounds with lower bounds on what they estimate.

    Args:
        names: entries of BOUNDS; `constant` is the c of those that CONSTANTS does not have.
        nets: {name: network}, chains as `trace_layers` takes them, of one geometry; the weights of
            the classifier have no influence.
        images: (m, channels, height, width), as the networks see them.
    Returns:
        A list of dicts, one for each bound of the form, and {name of another: why it is not}.
    Raises:
        BadInput: a network is not covered, or of another geometry or number of classes.
    """
    first = next(iter(nets.values()))
    data = measure_data(first, images)
    geometry = _geometry(first, data)
    for name, net in nets.items():
        if _geometry(net, data) != geometry or geometry[-1] != classes:
            raise BadInput(f'{name}: must have {classes} outputs, and one geometry with the others')
    tables = random_tables(first, data)
    found = {name: lower_bounds(net, images, classes) for name, net in nets.items()}
    rows, others = [], {}
    for name in names:
        if name in OTHER_FORMS:
            others[name] = OTHER_FORMS[name]
            continue
        try:
            norm, slope = read_claim(BOUNDS[name], tables, data)
        except BadInput as reason:
            others[name] = str(reason)
            continue
        c = CONSTANTS.get(name, constant)
        best = max(nets, key=lambda net: found[net][norm][0])
        drawn = max(nets, key=lambda net: found[net][norm] @ [0, 0, 1, -3])
        row = {'bound': name, 'norm': norm, 'c': c, 'complexity': slope / c}
        row['network'], row['drawn_network'] = best, drawn
        row['proven'], row['one_sign'] = found[best][norm][:2]
        row['monte_carlo'], row['standard_error'] = found[drawn][norm][2:]
        row['verdict'] = OPEN
        if row['monte_carlo'] - 3 * row['standard_error'] > row['complexity']:
            row['verdict'] = DRAWN
        if row['proven'] > row['complexity']:
            row['verdict'] = PROVEN
        rows.append(row)
    return rows, others


def draw(rows, path):
    """The estimate over the best lower bound, against the depth; what is above 300 is left out."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6.5, 4), layout='constrained')
    panel = figure.subplots()
    for name, marker in zip(dict.fromkeys(row['bound'] for row in rows), 'osD^vPX*'):
        own = [row for row in rows if row['bound'] == name]
        ratios = []
        for row in own:
            drawn = row['monte_carlo'] - 3 * row['standard_error']
            ratios.append(row['complexity'] / max(row['proven'], drawn))
        panel.plot([row['depth'] for row in own], ratios, marker=marker, label=name)
    panel.set(xlabel='convolutions', ylabel='estimate / lower bound', yscale='log')
    low = min(0.03, panel.get_ylim()[0])
    panel.axhspan(low, 1, color='C3', alpha=0.12, label='estimate is false')
    panel.set_ylim(low, 300)
    panel.grid(alpha=0.3)
    panel.legend(ncols=2, loc='upper right')
    figure.savefig(path, dpi=130)


def main(arguments=None):
    parser = study_parser('falsify', __doc__, 'falsify.csv and falsify.png')
    parser.add_argument('bounds', nargs='*', metavar='BOUND', help='entry of BOUNDS; none: all')
    parser.add_argument('--dataset', default='MNIST', help='entry of DATASETS (MNIST)')
    parser.add_argument('--depth', type=int, nargs='+', default=[1, 2, 3], help='convolutions')
    parser.add_argument('--constant', type=float, metavar='C', help='c of a bound of your own')
    args = parser.parse_args(arguments)
    for name in args.bounds:
        if name not in BOUNDS:
            raise BadInput(f'{name}: not in BOUNDS of utils.py, which has {", ".join(BOUNDS)}')
    undeclared = set(args.bounds or BOUNDS) - {*CONSTANTS, *OTHER_FORMS}
    if undeclared and args.constant is None:
        claim = 'C (norm + 1) / gamma * complexity + tail'
        raise BadInput(f'{undeclared.pop()}: give --constant C, which the bound {claim} has')
    _, (settings, *_) = load_settings(flags={'dataset_name': args.dataset})
    dataset = load_data(settings, 'cpu')
    images, classes, table = dataset.train_images, dataset.num_classes, []
    kernels = kernels_for(images, max(args.depth))
    print('| bound | network | estimate | proven | one sign | Monte Carlo | verdict |')
    print('| --- ' * 7 + '|')
    for depth in args.depth:
        nets = {}
        for name, layers in kernels.items():
            nets[name] = network_of(layers[:depth], dataset.input_shape, classes)
        rows, others = falsify(args.bounds or BOUNDS, nets, images, classes, args.constant)
        for row in rows:
            table.append({'dataset': args.dataset, 'samples': len(images), 'depth': depth} | row)
            numbers = ('complexity', 'proven', 'one_sign', 'monte_carlo')
            cells = ' | '.join(f'{row[column]:.3g}' for column in numbers)
            print(f'| {row["bound"]} | CONV-{depth} | {cells} | {row["verdict"]} |', flush=True)
    for name, reason in others.items():
        print(f'{name}: not of this form: {reason}')
    if args.out and table:
        args.out.mkdir(parents=True, exist_ok=True)
        write_table(args.out / 'falsify.csv', list(table[0]), table)
        draw(table, args.out / 'falsify.png')


if __name__ == '__main__':
    sys.exit(run_program(main))
