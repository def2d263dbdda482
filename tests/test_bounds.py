"""Every measure and every bound is the quantity that its docstring says."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, refused, settings_of
from networks import Forward, Functional, conv, linear, weights_of
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

import utils
from conf import BadInput
from measures import masks, paths, steps, trace
from measures.norms import (
    LAYER_MEASURES,
    PATH_MEASURES,
    NotCovered,
    classification_margins,
    dft_norm,
    margin_error,
    measure_data,
    measure_network,
    operator_norm,
)
from measures.trace import not_covered, outputs, trace_layers
from models import get_network
from utils import evaluate_bounds

# ------------------------------------------------------------------------------------------------
# Measures
# ------------------------------------------------------------------------------------------------


def dense_matrix(weight, shape, stride, padding, dilation):
    """The matrix of x -> conv2d(x, weight), built column by column."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return F.conv2d(basis, weight, None, stride, padding, dilation).flatten(1).T


def network_of(*hidden, size=8, channels=3, classes=4):
    """A random network of (out, kernel, stride, ...) layers, and the shape of its input."""
    torch.manual_seed(0)
    layers, shape = [], (channels, size, size)
    for out, *how in hidden:
        layers += [conv(shape[0], out, *how), nn.ReLU()]
        shape = tuple(layers[-2](torch.zeros(1, *shape)).shape[1:])
    net = nn.Sequential(*layers, nn.Flatten(), linear(math.prod(shape), classes))
    return net, (channels, size, size)


@pytest.mark.parametrize('kernel, dilation', [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('padding', [0, 1])
def test_norms_are_those_of_the_dense_matrix(kernel, dilation, stride, padding):
    net, shape = network_of((5, kernel, stride, padding, dilation), (2, kernel, 1, 1))
    with torch.no_grad():
        net[0].weight.mul_(3.7)
    measured = measure_network(net, shape)
    for l, module in enumerate((net[0], net[2])):
        weight, how = (
            module.weight.detach().double(),
            (module.stride, module.padding, module.dilation),
        )
        matrix = dense_matrix(weight, shape, *how)
        reads = dense_matrix(torch.ones_like(weight), shape, *how).ne(0).sum(1).max()
        assert measured.T[l] == pytest.approx(matrix.norm().item(), rel=1e-12)
        assert measured.s[l] == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-4)
        assert measured.deg[l] == reads / weight.shape[1]
        shape = tuple(module(torch.zeros(1, *shape)).shape[1:])
        assert measured.p[l] == shape[1] * shape[2] and measured.c[l] == shape[0]
        assert measured.W[l] == weight.numel()
    weight = net[-1].weight.double()
    spectral = torch.linalg.matrix_norm(weight, 2).item()
    assert measured.s[-1] == pytest.approx(spectral, rel=1e-12)
    assert measured.T[-1] == pytest.approx(weight.norm().item(), rel=1e-12)


@pytest.mark.parametrize(
    'channels, size, seed',
    [(1, 28, 0), (4, 15, 2), pytest.param(16, 10, 1, marks=pytest.mark.long)],
)
def test_operator_norm_is_exact_where_singular_values_crowd(channels, size, seed):
    torch.manual_seed(seed)
    weight = torch.randn(channels, channels, 2, 2, dtype=torch.float64)
    exact = torch.linalg.svdvals(dense_matrix(weight, (channels, size, size), 1, 0, 1))[0].item()
    assert operator_norm(weight, (size, size)) == pytest.approx(exact, rel=1e-4)
    # It is not the norm of the reshaped kernel, which is smaller.
    assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() < 0.99 * exact


@pytest.mark.parametrize('seed', [109, 188, 365])
def test_operator_norm_where_the_two_largest_nearly_agree(seed):
    torch.manual_seed(seed)
    weight = torch.randn(3, 5, 2, 2, dtype=torch.float64)
    exact = torch.linalg.svdvals(dense_matrix(weight, (5, 11, 11), 1, 0, 1))[0].item()
    assert operator_norm(weight, (11, 11)) == pytest.approx(exact, rel=1e-4)


def test_operator_norm_of_isometries():
    weight = torch.full((1000,), 0.999**0.5, dtype=torch.float64)
    weight[0] = 1
    assert operator_norm(torch.diag(weight)[:, :, None, None], (1, 1)) == pytest.approx(1, rel=1e-4)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert operator_norm(one, (6, 6)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize('start', range(4))
def test_operator_norm_of_a_kernel_that_the_start_does_not_see(start):
    """A kernel that covers its map and is orthogonal to the random starts up to this one."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(4, 36, generator=generator, dtype=torch.float64)[:start]
    kernel = torch.randn(36, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):  # once is not enough
        kernel = kernel - torch.linalg.lstsq(seen.T, kernel).solution @ seen if start else kernel
    kernel = kernel.view(1, 1, 6, 6)
    assert operator_norm(kernel, (6, 6)) == pytest.approx(kernel.norm().item(), rel=1e-9)
    assert operator_norm(0 * kernel, (6, 6)) == 0
    assert kernel.norm().item() <= dft_norm(kernel, (6, 6)) * (1 + 1e-12)


def test_operator_norm_where_the_largest_singular_vector_is_not_in_the_start():
    """Channels apart: an iteration from the first start converges to the second largest value."""
    start = torch.randn(40 * 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[
        :36
    ]
    kernel = torch.zeros(40, 40, 6, 6, dtype=torch.float64)
    rows = torch.randn(40, 36, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows[0] -= (rows[0] @ start) * start / start.square().sum()
    rows /= rows.norm(dim=1, keepdim=True)
    for channel, size in enumerate([1.05, 1.0, *np.linspace(0.1, 0.9, 38)]):
        kernel[channel, channel] = size * rows[channel].view(6, 6)
    assert operator_norm(kernel, (6, 6)) == pytest.approx(1.05, rel=1e-4)


def test_dft_norm_is_an_upper_bound_and_a_circular_norm():
    generator, tightness = np.random.default_rng(0), []
    for _ in range(100):
        channels, kernel, size, padding = (
            tuple(map(int, generator.integers(1, high, 2))) for high in (5, 5, 9, 3)
        )
        stride, dilation = generator.integers(1, 3, 2).tolist()
        spans = [dilation * (taps - 1) + 1 for taps in kernel]
        maps = [n + 2 * pad for n, pad in zip(size, padding)]
        weight = torch.from_numpy(generator.standard_normal((*channels, *kernel)))
        padded = torch.zeros(*channels, *map(max, maps, spans), dtype=torch.float64)
        padded[:, :, : spans[0] : dilation, : spans[1] : dilation] = weight
        blocks = torch.fft.fft2(padded).permute(2, 3, 0, 1)
        circular = torch.linalg.svdvals(blocks).max().item()
        bound = dft_norm(1e200 * weight, size, padding, dilation) / 1e200
        assert bound == pytest.approx(circular, rel=1e-12)
        if maps[0] >= spans[0] and maps[1] >= spans[1]:
            matrix = dense_matrix(weight, (channels[1], *size), stride, padding, dilation)
            exact = torch.linalg.matrix_norm(matrix, 2).item()
            assert exact <= bound * (1 + 1e-12)
            tightness.append(exact / bound)
            found = operator_norm(weight, size, stride, padding, dilation)
            assert found == pytest.approx(exact, rel=1e-4, abs=1e-12)
    assert max(tightness) > 0.99 and dft_norm(torch.zeros(2, 2, 2, 2), (4, 4)) == 0


# A network small enough for paper and pencil: 3x3 images, two filters that each pick one tap, two
# classes.
FILTERS = [[[[1.0, 0.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 2.0]]]]
ROWS = [[1.0, 1, 1, 1, 0, 0, 0, 0], [3.0, 0, 0, 0, 4, 0, 0, 0]]
IMAGES = [[[[1.0, 0, 0], [0, 2, 0], [0, 0, 0]]], [[[0.0, 0, 0], [0, 1, 0], [0, 0, 3]]]]
DELTA, GAMMA = 0.1, 0.5


@pytest.fixture
def tiny():
    net = nn.Sequential(conv(1, 2, 2), nn.ReLU(), nn.Flatten(), linear(8, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(FILTERS))
        net[3].weight.copy_(torch.tensor(ROWS))
    return net, torch.tensor(IMAGES)


def test_measures_by_hand(tiny):
    net, images = tiny
    network, data = measure_network(net, (1, 3, 3)), measure_data(net, images)
    by_hand = {
        'F': [math.sqrt(5), math.sqrt(29)],
        'T': [math.sqrt(20), math.sqrt(29)],
        # The centre pixel is read with weight 1 and with weight 2; the Gram matrix of the
        # classifier's rows is ((4, 3), (3, 25)).
        's': [math.sqrt(5), math.sqrt((29 + math.sqrt(477)) / 2)],
        'a': [3, math.sqrt(29)],
        'b': [3, 9],
        'deg': [4, 4],
        'A': [12, 7],  # 4 positions of filters of norms 1 and 2; rows of norms 2 and 5
        'u': [9, 8, 2],
        'p': [4, 1],
        'c': [2, 2],
        'W': [8, 16],
        'r': 5,
        'R': [3, 7],
        'rho': math.sqrt(145),
        'D': 2,
        'path_norm': 1 * (4 + 3) + 2 * 4,  # entries of rows times the tap of the filter they read
        'path_depth': 2,
        'outputs': 2,
        'chain': True,
        'biased': False,
        'pool': 0,
    }
    for symbol, value in by_hand.items():
        np.testing.assert_allclose(getattr(network, symbol), value, rtol=1e-7, err_msg=symbol)
    by_hand = {'m': 2, 'E_max': 9, 'E_coord': 9, 'E_tot': 15, 'inputs': 9, 'B': math.sqrt(10)}
    by_hand |= {'P': [math.sqrt(10), math.sqrt(10)], 'norm_ratio': math.sqrt(15 / 9)}
    for symbol, value in by_hand.items():
        np.testing.assert_allclose(getattr(data, symbol), value, rtol=1e-7, err_msg=symbol)
    scores = net(images)  # features 1 0 0 2 | 4 0 0 0 and 0 0 0 1 | 2 0 0 6
    assert scores.tolist() == [[3, 19], [1, 8]]
    assert classification_margins(scores, torch.tensor([1, 0])).tolist() == [16, -7]


def test_bounds_by_hand(tiny):
    net, images = tiny
    row = evaluate_bounds(net, images, torch.tensor([1, 0]), DELTA, GAMMA)
    sqrt, log = math.sqrt, math.log
    rho, rho_21, r, energy = sqrt(5 * 29), 9 * sqrt(5), 15, sqrt(4 * 9)

    def tail(norm):
        return 3 * sqrt(log(2 * (norm + 2) ** 2 / 0.1) / 4)

    by_hand = {
        'rho': rho,
        'path_norm': r,
        'certified_error': 1,
        'certified_margin': 4,
        'our_bound': 2 * sqrt(2) * (rho + 1) * (1 + sqrt(2 * log(4 * 4 * 2))) * energy + tail(rho),
        'corrected_bound': 4 * (rho_21 + 1) * (1 + sqrt(2 * log(2 * 2 * 16))) * energy
        + tail(rho_21),
        'path_bound': 4 * (r + 1) * sqrt(2 * log(2**2 * 9 * 2) * 9) + tail(r),
    }
    assert {column: row[column] for column in by_hand} == pytest.approx(by_hand, rel=1e-6)
    assert list(row)[4:] == list(utils.BOUNDS)


@pytest.mark.parametrize('scale', [1, 1e-9])
def test_bounds_of_a_small_network(tiny, scale):
    """With small filters the terms show that do not grow with the weights."""
    net, images = tiny
    net = net.double()
    with torch.no_grad():
        net[0].weight.mul_(scale)
    row = evaluate_bounds(net, images.double(), torch.tensor([1, 0]), DELTA, GAMMA)
    for column, value in dense_row(net, (1, 3, 3), images.double(), DELTA, GAMMA).items():
        assert row[column] == pytest.approx(value, rel=1e-6), column


@pytest.mark.parametrize('path_norm', [15.0, 150.0])
def test_certificate_below_one_by_hand(tiny, path_norm):
    """The bound in the certificate is that of the paths, or the corrected one."""
    margins, sqrt, log = torch.tensor([0.3, 0.7, 3.0, 30.0]), math.sqrt, math.log
    network = measure_network(tiny[0], (1, 3, 3), margins)
    data = measure_data(*tiny)
    data.m, data.E_max, data.E_coord, network.path_norm = 10**8, 10**6, 10**6, path_norm
    rho_21, grid = 9 * sqrt(5), [2 ** (k / 2) for k in range(-8, 5)]

    def tail(norm):
        return 3 * sqrt(log(2 * (norm + 2) ** 2 / (0.1 / 26)) / 2e8)

    totals = []
    for gamma in grid:
        corrected = 4 * (rho_21 + 1) / gamma / 1e8 * (1 + sqrt(2 * log(64))) * sqrt(4e6)
        path = 4 * (path_norm + 1) / gamma / 1e8 * sqrt(2 * log(72) * 1e6)
        bounds = path + tail(path_norm), corrected + tail(rho_21)
        assert (bounds[0] < bounds[1]) == (path_norm == 15)
        totals.append((margins <= gamma).double().mean().item() + min(bounds))
    found = utils.certified_error(network, data, 0.1, 1.0)
    assert found == pytest.approx(min(totals), rel=1e-9) and min(totals) < 1
    assert utils.certified_margin(network, data, 0.1, 1.0) == grid[totals.index(min(totals))]


def test_margin_error_counts_ties():
    outputs = torch.tensor([[1.0, 1.0, 0.0], [3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [0.0, 1.0, 5.0]])
    margins = classification_margins(outputs, torch.tensor([0, 0, 1, 1]))
    assert margins.tolist() == [0, 1, 0, -4]
    assert [margin_error(margins, gamma) for gamma in (0, 0.5, 1, -4.5)] == [0.75, 0.75, 1, 0]


@pytest.mark.parametrize('change', ['rescaling', 'permutation'])
def test_what_changes_no_bound(digits, change):
    net, _ = network_of((6, 2), (5, 3, 1, 1), channels=1, classes=10)
    images, labels, order = digits.train_images, digits.train_labels, torch.randperm(6)
    before, samples = evaluate_bounds(net, images, labels), torch.randperm(1437)
    with torch.no_grad():
        if change == 'rescaling':
            net[2].weight.mul_(8)
            net[-1].weight.div_(8)
        else:
            net[0].weight.copy_(net[0].weight[order])
            net[2].weight.copy_(net[2].weight[:, order])
            images, labels = images[samples], labels[samples]
    after = evaluate_bounds(net, images, labels)
    assert after == pytest.approx(before, rel=1e-5)


def test_receptive_fields(digits):
    """P by brute force: which pixels move an output, by gradients of a network of ones."""
    net, shape = network_of((1, 3, 2, 1), (1, 2, 1, 0), (1, 2, 1, 1), channels=1, classes=3)
    images, expected = digits.train_images[:200], []
    for weight in weights_of(net):
        nn.init.ones_(weight)
    for layers in (1, 3, 5):
        pixel = torch.ones(1, *shape, requires_grad=True)
        norms = []
        for output in net[:layers](pixel).flatten():
            (seen,) = torch.autograd.grad(output, pixel, retain_graph=True)
            norms.append((images * (seen != 0)).flatten(1).norm(dim=1).max().item())
        expected.append(max(norms))
    expected.append(images.flatten(1).norm(dim=1).max().item())
    np.testing.assert_allclose(measure_data(net, images).P, expected, rtol=1e-6)


def test_data_measures_of_mnist(mnist):
    net = get_network(settings_of(depth=2, width=1), mnist.input_shape, 10)
    data = measure_data(net, mnist.train_images)
    assert data.m == 60000
    assert data.E_max == pytest.approx(29038.2855, rel=1e-6)
    assert data.E_tot == pytest.approx(5268601.309, rel=1e-6)
    assert data.P[0] == pytest.approx(2.0, rel=1e-6)
    assert data.P[-1] == pytest.approx(17.1790, rel=1e-5)


def complexity_terms(depth, dataset):
    """The published and the corrected complexity term of CONV-`depth`, and a lower bound on both.

    For unit norms the class contains x -> <u, crop(x)> for each classifier u of Frobenius norm 1:
    its filters pick one tap, and no ReLU is active on images without negative pixels. Its empirical
    Rademacher complexity is drawn by Monte Carlo. A classifier of Frobenius norm 1 has a group norm
    N21 of at most sqrt(C deg_D).
    """
    images = dataset.train_images
    net = get_network(settings_of(depth=depth, width=1), dataset.input_shape, 10)
    network, data = measure_network(net, dataset.input_shape), measure_data(net, images)
    network.rho, network.F = 1.0, np.ones(depth + 1)
    network.b[-1] = math.sqrt(10 * network.deg[-1])

    def term(bound, factor):
        # The bounds are factor (norm + 1) / gamma * term + a confidence term without gamma.
        return 2 * (bound(network, data, 0.001, 1.0) - bound(network, data, 0.001, 2.0)) / factor

    published = term(utils.our_bound, 2 * math.sqrt(2) * 2)
    corrected = term(utils.corrected_bound, 4 * (network.b[-1] + 1)) * network.b[-1]
    crop = images[:, 0, : images.shape[2] - depth, : images.shape[3] - depth].flatten(1)
    generator, norms = torch.Generator().manual_seed(0), []
    for _ in range(20):
        signs = torch.randint(0, 2, (len(crop), 100), generator=generator) * 2.0 - 1
        norms += [draw.norm() for draw in (crop.T @ signs).split(10, dim=1)]
    draws = torch.stack(norms) / len(crop)
    lower, error = draws.mean().item(), draws.std().item() / math.sqrt(len(draws))
    jensen = crop.double().square().sum().mul(10).sqrt().item() / len(crop)
    assert lower - 3 * error < jensen
    return published, corrected, lower


@pytest.mark.parametrize('depth', [1, 2, 3, 4])
def test_complexity_is_above_that_of_the_class_on_digits(digits, depth):
    published, corrected, lower = complexity_terms(depth, digits)
    assert corrected > lower
    assert (published < lower) == (depth == 1)


# ------------------------------------------------------------------------------------------------
# Users' own networks
# ------------------------------------------------------------------------------------------------


def test_a_network_of_the_users_own(digits):
    net = Functional()
    row = evaluate_bounds(net, digits.train_images, digits.train_labels, delta=0.01, gamma=2.0)
    network = measure_network(net, digits.input_shape)
    assert network.deg.tolist() == [9, 16, 1] and network.p.tolist() == [16, 1, 1]
    assert network.W.tolist() == [36, 448, 70]
    assert all(math.isfinite(value) for value in row.values())


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.roll(1, 2), weight, bias)


class Viewed(Functional):
    def __init__(self, flatten):
        super().__init__()
        self.flatten = flatten

    def forward(self, x):
        return self.last(self.hidden(self.flatten(self.first(x).relu())).relu())


def skip(self, x):
    return self.fc((x + self.conv(x)).relu().flatten(1))


HOOKED, HOOKED_NETWORK, PATCHED, PATCHED_RELU = (
    nn.Sequential(conv(1, 2, 2), nn.ReLU()) for _ in range(4)
)
for module in (HOOKED[0], HOOKED_NETWORK):
    module.register_forward_hook(lambda module, inputs, output: 100 * output)
PATCHED[0].forward = lambda x: 0 * x
PATCHED_RELU[1].forward = torch.abs
PATCHED_NETWORK = Functional()
PATCHED_NETWORK.forward = torch.abs
REFUSED = {
    'biased': (
        [conv(1, 2, 2, bias=True), nn.ReLU(), nn.Flatten(), nn.Linear(98, 10)],
        'Sequential: 0 (Conv2d), 3 (Linear) has a bias; the theorems are about bias-free networks',
    ),
    'all of them': (
        [conv(1, 2, 2, bias=True), nn.GELU(), conv(2, 2, 2), nn.MaxPool2d(2), nn.GELU()],
        '0 (Conv2d) has a bias; 1 (GELU), 3 (MaxPool2d), 4 (GELU): not covered; 2 (Conv2d) follows',
    ),
    'skip': (Forward(skip, conv=conv(1, 1, 3, padding=1), fc=linear(64, 10)), 'skip connections'),
    'batch norm': ([conv(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU()], '1 (BatchNorm2d): not covered'),
    'groups': (
        [conv(1, 2, 2), nn.ReLU(), conv(2, 2, 2, groups=2, bias=True)],
        'number of zeros, are covered; 2 (Conv2d) has a bias; its last layer is not a linear',
    ),
    'circular': (
        [conv(1, 2, 3, padding=1, padding_mode='circular')],
        "0 (Conv2d): padding_mode = 'circular'",
    ),
    'no relu': ([conv(1, 2, 2), conv(2, 2, 2)], '1 (Conv2d) follows a layer without a ReLU'),
    'no classifier': ([conv(1, 2, 2), nn.ReLU()], 'last layer is not a linear classifier'),
    'no layer': ([nn.Flatten()], 'no Conv2d or Linear'),
    'hook': (HOOKED, '0 (Conv2d) has forward hooks'),
    'hook on the network': (HOOKED_NETWORK, 'Sequential has forward hooks, which'),
    'old spectral norm': (
        [nn.utils.spectral_norm(conv(1, 2, 2))],
        'prune.remove, ..., or use',
    ),
    'pruned': (
        [prune.random_unstructured(conv(1, 2, 2), 'weight', 0.5)],
        'forward hooks of torch.nn.utils',
    ),
    'own forwards': (
        [Scaled(1, 2, 2, bias=False), nn.ReLU(), Shifted(2, 2, 2, bias=False)],
        '0 (Scaled), 2 (Shifted) has a forward pass of its own',
    ),
    'patched': (PATCHED, '0 (Conv2d) has a forward pass of its own'),
    'patched relu': (PATCHED_RELU, '1 (ReLU) has a forward pass of its own'),
    'patched network': (PATCHED_NETWORK, 'Functional has a forward pass of its own'),
    'data parallel': (
        nn.DataParallel(Functional()),
        'DataParallel is a wrapper: pass the network in it, its .module',
    ),
    'view of sizes': (Viewed(lambda x: x.view(-1, 64)), 'Viewed: view: not covered'),
    'view of channels': (Viewed(lambda x: x.reshape(x.size(1), -1)), 'Viewed'),
    'two outputs': (
        Forward(lambda self, x: (self.fc(x.flatten(1)), x), fc=linear(64, 10)),
        'output is not the last layer',
    ),
    'only padding': ([conv(1, 2, 1, stride=20, padding=5)], '0: reads nothing but its padding'),
    'relu first': ([nn.ReLU(), conv(1, 2, 2)], '0 (ReLU) comes before the first layer'),
    'relu last': ([nn.Flatten(), linear(64, 10), nn.ReLU()], 'last layer'),
    'unflattened': ([linear(8, 10)], '0 (Linear): expected a linear layer on the flattened'),
    'channels': ([conv(3, 2, 2), nn.ReLU()], '0: does not fit its input of 1 channels of 8x8'),
    'inputs': ([nn.Flatten(), linear(63, 2)], '1: does not fit its input of 1 channels of 8x8'),
}
for case in ('only padding', 'channels'):
    REFUSED[case][0].extend([nn.ReLU(), nn.Flatten(), linear(98, 10)])


@pytest.mark.long
@pytest.mark.filterwarnings('ignore')  # jit is deprecated
def test_compiled_networks_are_refused():
    compiled = torch.compile(Functional(), backend='eager')
    with pytest.raises(NotCovered, match='OptimizedModule is a compiled network: pass the one'):
        measure_network(compiled, (1, 8, 8))
    traced = torch.jit.trace(Functional(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(NotCovered, match='is a jit module: pass the nn.Module'):
        measure_network(traced, (1, 8, 8))


@pytest.mark.parametrize('case', REFUSED)
def test_what_the_theory_does_not_cover_is_refused_by_name(case):
    net, message = REFUSED[case]
    if isinstance(net, list):
        net = nn.Sequential(*net)
    with pytest.raises(NotCovered) as caught:
        measure_network(net, (1, 8, 8))
    assert message in str(caught.value) and '\n' not in str(caught.value)
    assert not_covered(net, (1, 8, 8)) == str(caught.value)


def test_global_hooks_are_refused():
    net, _ = network_of((2, 2), channels=1)
    norm = paths.path_norm(net, (1, 8, 8))
    hook = nn.modules.module.register_module_forward_hook(lambda *_: 2 * _[2])
    try:
        with pytest.raises(BadInput, match='global forward hooks'):
            paths.path_norm(net, (1, 8, 8))
    finally:
        hook.remove()
    assert paths.path_norm(net, (1, 8, 8)) == norm


def measuring(net, images, labels):
    """Every public function of a network in these files, as {name: function without arguments}."""
    shape = tuple(images.shape[1:])
    return {
        'trace_layers': lambda: trace_layers(net, shape),
        'not_covered': lambda: not_covered(net, shape),
        'folded': lambda: trace.folded(net),
        'outputs': lambda: outputs(net, images),
        'plain_copy': lambda: trace.plain_copy(net),
        'measure_network': lambda: measure_network(net, shape),
        'measure_data': lambda: measure_data(net, images),
        'evaluate_bounds': lambda: evaluate_bounds(net, images, labels),
        'path_norm': lambda: paths.path_norm(net, shape),
        'path_metric': lambda: paths.path_metric(net, net, shape),
        'path_magnitude': lambda: paths.path_magnitude(net, shape),
        'rescale_neurons': lambda: paths.rescale_neurons(net, torch.ones),
        'density': lambda: masks.density(net),
        'masked_density': lambda: masks.masked_density(net),
        'measure_masks': lambda: masks.measure_masks(net),
        'hidden_readers': lambda: masks.hidden_readers(net),
        'neuron_norms': lambda: masks.neuron_norms(net, shape),
        'sharing': lambda: masks.sharing(net, shape),
        'drop_dead': lambda: masks.drop_dead(net),
    }


def spectrally_normalized():
    """A network in training mode, whose weights move whenever they are read."""
    torch.manual_seed(0)
    layers = spectral_norm(conv(1, 4, 3)), nn.ReLU(), nn.Flatten(), spectral_norm(linear(16, 3))
    return nn.Sequential(*layers).train(), torch.rand(6, 1, 4, 4), torch.arange(6) % 3


@pytest.mark.parametrize('name', measuring(None, torch.zeros(1, 1), None))
def test_measuring_changes_nothing_and_does_not_depend_on_the_mode(name):
    net, images, labels = spectrally_normalized()
    before = copy.deepcopy(net.state_dict())
    results = [measuring(net, images, labels)[name]() for _ in range(4)]
    assert all(module.training for module in net.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    results.append(measuring(net.eval(), images, labels)[name]())
    for index, result in enumerate(results):
        if isinstance(result, nn.Module):
            results[index] = outputs(result, images)
    assert len({str(result) for result in results}) == 1


@pytest.mark.parametrize(
    'flatten',
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: torch.reshape(x, (x.size()[0], -1)),
        lambda x: x.view((x.size(0), -1)),
        lambda x: x.view(x.shape[0], -1),
    ],
)
def test_views_that_flatten(flatten, digits):
    torch.manual_seed(0)
    net, plain = Viewed(flatten), Viewed(nn.Flatten())
    plain.load_state_dict(net.state_dict())
    data = digits.train_images.contiguous(), digits.train_labels
    assert evaluate_bounds(net, *data) == evaluate_bounds(plain, *data)


@pytest.mark.parametrize('module', [nn.Flatten(), nn.Identity()])
def test_a_module_named_flatten(module):
    def forward(self, x):
        x = self.flatten(self.first(x).relu()).flatten(1, 3)
        return self.last(self.hidden(x).relu())

    net = Functional()
    layers = {'first': net.first, 'hidden': net.hidden, 'last': net.last}
    assert len(trace_layers(Forward(forward, flatten=module, **layers), (1, 8, 8))) == 3


# ------------------------------------------------------------------------------------------------
# The call
# ------------------------------------------------------------------------------------------------


def test_evaluate_bounds_in_one_call(tiny):
    """Tables and margins, or images and labels: the same numbers, in evaluation mode."""
    net, images = tiny
    margins = classification_margins(net(images), torch.tensor([1, 0]))
    expected = evaluate_bounds(net, measure_data(net, images), margins, DELTA, GAMMA)
    for labels in ([1, 0], torch.tensor([1, 0], dtype=torch.uint8)):
        assert evaluate_bounds(net, images, labels, DELTA, GAMMA) == expected
    data = measure_data(net, images)
    assert evaluate_bounds(net, data, margins.tolist(), DELTA, GAMMA) == expected
    net = nn.Sequential(conv(1, 2, 2), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), linear(8, 2))
    state = copy.deepcopy(net.train().state_dict())
    with pytest.warns(UserWarning, match=r'1 \(BatchNorm2d\): not covered'):
        row = evaluate_bounds(net, images, [1, 0], skip_uncovered=True)
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert net.training and net[1].training and math.isnan(row['rho'])
    margins = classification_margins(net.eval()(images), torch.tensor([1, 0]))
    data = measure_data(net, images, skip_uncovered=True)
    again = evaluate_bounds(net, data, margins, skip_uncovered=True)
    assert row == pytest.approx(again, nan_ok=True, rel=1e-12)


def test_outputs_of_a_whole_set(digits):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten())
    found, images = outputs(net, digits.test_images), digits.test_images
    assert found.dtype == torch.float64 and not found.requires_grad and net.training
    with torch.no_grad():
        expected = torch.cat([net.eval()(batch) for batch in images.split(32)])
    assert torch.equal(found, expected.double())
    assert outputs(net[:1], images).shape == (len(images), 3, 6, 6)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'margins': torch.zeros(3)}, 'margins of shape (3,) for 2 training samples'),
        ({'margins': torch.zeros(2, 10)}, 'margins of shape (2, 10)'),
        ({'delta': 2}, 'delta = 2'),
        ({'delta': 0}, 'delta = 0'),
        ({'delta': math.nan}, 'delta = nan'),
        ({'gamma': 0}, 'gamma = 0'),
        ({'gamma': -1}, 'gamma = -1'),
        ({'gamma': math.nan}, 'gamma = nan'),
    ],
)
def test_arguments_that_make_no_sense_are_named(tiny, options, message):
    net, images = tiny
    with pytest.raises(BadInput) as caught:
        evaluate_bounds(net, measure_data(net, images), **{'margins': torch.zeros(2)} | options)
    assert message in str(caught.value) and '\n' not in str(caught.value)


def test_wrong_images_labels_and_shapes_are_named(tiny):
    net, images = tiny
    for shape in ((1, 9), 16, images):
        with pytest.raises(BadInput, match=r'input_shape = .*: must be .channels, height, width'):
            measure_network(net, shape)
    for wrong, message in (
        (images / 0, 'contain NaN'),
        (images[0], 'images of shape'),
        (images[:0], 'images of shape'),
    ):
        with pytest.raises(BadInput, match=message):
            measure_data(net, wrong)
    for labels, message in (
        (torch.tensor([0, 2]), 'labels out of range: 2 outputs'),
        (torch.tensor([-1, 0]), 'labels out of range: 2 outputs'),
        (torch.zeros(2), 'labels out of range: 2 outputs'),
        (torch.zeros(2, 1).long(), 'must be'),
        (torch.zeros(3).long(), 'must be'),
    ):
        with pytest.raises(BadInput, match=message):
            classification_margins(net(images), labels)
    assert margin_error(torch.tensor([math.nan, math.inf, 1.0]), 0) == pytest.approx(1 / 3)
    nn.init.constant_(net[3].weight, math.nan)
    with pytest.raises(BadInput, match='3 .Linear.: its weights contain NaN'):
        measure_network(net, (1, 3, 3), skip_uncovered=True)


def known(row):
    return {column for column, value in row.items() if not math.isnan(value)}


def test_networks_that_only_the_path_norm_covers(digits, monkeypatch):
    layers = [conv(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    net, images = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10)), digits.train_images
    net(images)
    margins = classification_margins(outputs(net, images), digits.train_labels)
    message = '1 .BatchNorm2d., 3 .MaxPool2d.: not covered; 5 .Linear. has a bias'
    with pytest.raises(NotCovered, match=message):
        measure_data(net, images)
    data = measure_data(net, images, skip_uncovered=True)
    with pytest.raises(NotCovered, match=message):
        evaluate_bounds(net, data, margins)
    monkeypatch.setitem(utils.BOUNDS, 'added', lambda network, *_: 2 * network.path_norm)
    monkeypatch.setitem(utils.BOUNDS, 'missing', lambda network, *_: network.T.sum())
    row = evaluate_bounds(net, data, margins, 0.01, 0.5, skip_uncovered=True)
    assert known(row) == {'norm_ratio', 'path_norm', 'path_bound', 'added'}
    assert row['added'] == 2 * row['path_norm']
    r, m = row['path_norm'], 1437  # D = 3, K = 4, P = 1, biases; the energy is the bias's own, m
    log_N = 3 * math.log(5 * 4) + math.log(5 / 2 * 65 * 10)
    tail = 3 * math.sqrt(math.log(2 * (r + 2) ** 2 / 0.01) / (2 * m))
    assert images.double().square().sum(0).max().item() < m
    bound = 4 * (r + 1) / (0.5 * m) * math.sqrt(2 * log_N * m) + tail
    assert row['path_bound'] == pytest.approx(bound, rel=1e-9)
    net[2] = nn.GELU()
    row = evaluate_bounds(net, data, margins, skip_uncovered=True)
    assert known(row) == {'norm_ratio'}


def test_a_measure_that_is_missing_is_told_from_a_mistake(digits, monkeypatch):
    covered, shape = network_of((2, 2), channels=1, classes=10)
    uncovered = nn.Sequential(nn.GELU(), *covered)
    images, margins = digits.train_images, torch.zeros(1437)
    names = {'margins', 'missing', *LAYER_MEASURES, *PATH_MEASURES}
    assert set(vars(measure_network(covered, shape))) == names
    network = measure_network(uncovered, shape, margins, skip_uncovered=True)
    data = measure_data(uncovered, images, skip_uncovered=True)
    for table, measure in ((network, 'rho'), (network, 'path_norm'), (data, 'P')):
        assert not hasattr(table, measure)
        with pytest.raises(NotCovered, match=rf'^{measure} is not measured: .*0 \(GELU\)'):
            getattr(table, measure)
    monkeypatch.setattr(utils, 'BOUNDS', {'typo': lambda network, *_: network.rhoo})
    for net in (covered, uncovered):
        data = measure_data(net, images, skip_uncovered=True)
        with pytest.raises(BadInput, match='typo of BOUNDS: no measure rhoo; there are '):
            evaluate_bounds(net, data, margins, skip_uncovered=True)


def test_a_network_is_traced_once_per_evaluation(digits, monkeypatch):
    calls, traced = [], steps._trace
    monkeypatch.setattr(steps, '_trace', lambda net: calls.append(net) or traced(net))
    net, shape = network_of((2, 2), channels=1, classes=10)
    with steps.traced_once(), torch.no_grad():
        evaluate_bounds(net, digits.train_images, digits.train_labels)
        rho = measure_network(net, shape).rho
        net[-1].weight *= 2
        assert measure_network(net, shape).rho == pytest.approx(2 * rho)
    assert calls == [net]
    net[1] = nn.GELU()  # outside, a change of the modules is seen
    assert 'GELU' in not_covered(net, shape)


@pytest.mark.parametrize(
    'name',
    [
        *('round', 'density', 'rho', 'pac_bayes_error', 'width', 'name', 'absolute_gap', 'place'),
        *('channels', 'seed_setting', 'my, bound', 'my bound', ''),
    ],
)
def test_a_bounds_name_is_a_column_of_its_own(tmp_path, monkeypatch, name):
    monkeypatch.setitem(utils.BOUNDS, name, lambda network, *_: 1.0)
    assert f'BOUNDS of utils.py: {name!r}' in refused(*SMALL, '--results-path', tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_bound_that_changes_its_tables_changes_no_other(tiny, monkeypatch):
    def mine(network, data, delta, gamma):
        network.F *= 0.5
        network.margins.clamp_(max=0)
        network.rho = data.E_max = data.m = 0
        data.P *= 10
        return 1.0

    net, images = tiny
    margins, data = torch.tensor([16.0, -7.0]), measure_data(net, images)
    without = evaluate_bounds(net, data, margins)
    monkeypatch.setattr(utils, 'BOUNDS', {'mine': mine, **utils.BOUNDS})
    for _ in range(2):
        assert evaluate_bounds(net, data, margins) == {'mine': 1.0} | without


@pytest.mark.parametrize('value', [None, 1j, np.ones(3), torch.ones(3), 'small'])
def test_a_bound_that_is_no_number_is_named(tiny, monkeypatch, value):
    monkeypatch.setitem(utils.BOUNDS, 'mine', lambda *_: value)
    message = f'mine of BOUNDS returns a {type(value).__name__}; it must return a number'
    with pytest.raises(BadInput, match=message):
        evaluate_bounds(*tiny, [0, 1])


# ------------------------------------------------------------------------------------------------
# Extreme numbers
# ------------------------------------------------------------------------------------------------


def chain(*weights):
    """1x1 convolutions with these weights and a classifier of ones, on images (1, 8, 8)."""
    layers = [layer for _ in weights for layer in (conv(1, 1, 1), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Flatten(), linear(64, 10)).double()
    for weight, value in zip(weights_of(net), [*weights, 1]):
        nn.init.constant_(weight, value)
    return net


@pytest.mark.filterwarnings('error')
def test_no_partial_product_over_or_underflows(digits):
    images, m = digits.train_images.double(), 1437

    def row(images, *weights):
        net = chain(*weights)
        return evaluate_bounds(net, measure_data(net, images), torch.zeros(m))

    expected = row(images, *[1.0] * 24)
    for weights in ([1e30] * 12 + [1e-30] * 12, [1e160, 1e-160] * 12):
        assert row(images, *weights) == pytest.approx(expected, rel=1e-4)
    lip = math.sqrt(640)  # of the classifier of ones
    huge, tiny = row(images, *[1e30] * 12), row(images, *[1e-30] * 12)
    assert huge['our_bound'] == huge['golowich_bound'] == huge['corrected_bound'] == math.inf
    beta = 13 * 1e30 ** (12 / 13) * lip ** (1 / 13)
    sedghi = beta * math.sqrt(652 / m) + math.sqrt(math.log(1000) / m)
    assert huge['sedghi_bound'] == pytest.approx(sedghi, rel=1e-6)
    harmonic = sum(1 / i for i in range(1, m))
    # Each of the 13 layers counts as 1.
    covering = 12 * harmonic / math.sqrt(m) * math.sqrt(math.log(1280)) * 13**1.5
    graf = 2 * (4 / m + covering) + 3 * math.sqrt(math.log(2000) / (2 * m))
    assert tiny['graf_bound'] == pytest.approx(graf, rel=1e-6)
    assert not any(math.isnan(value) for value in row(0 * images, *[1e30] * 12).values())


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
    'scales', [(1e30, 1e-30), (1e30, 1e30), (1e-30, 1e-30), (0, 1), (1, 0), (0, 1e30)]
)
def test_extreme_weights_give_a_number_or_inf(digits, scales):
    net, _ = network_of((4, 2), (4, 2), channels=1, classes=10)
    # Nine more layers: deep enough for the products to overflow.
    more = [layer for _ in range(9) for layer in (conv(1, 1, 1), nn.ReLU())]
    deep = nn.Sequential(*more, *net)
    with torch.no_grad():
        for weight, scale in zip(weights_of(net), scales):
            weight.mul_(scale)
        for layer in more[::2]:
            layer.weight.fill_(scales[1] * 1e8)
    for each in (net, deep):
        row = evaluate_bounds(each, measure_data(each, digits.train_images), torch.zeros(1437))
        assert not any(math.isnan(value) for value in row.values()), row
    row = evaluate_bounds(net, measure_data(net, digits.train_images), torch.zeros(1437))
    assert (row['rho'] == 0) == (0 in scales)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('samples', [1, 2, 3])
def test_few_samples_and_constant_images(digits, samples):
    net, _ = network_of((1, 2), channels=1, classes=2)
    ones = torch.ones(samples, 1, 8, 8)
    for images in (digits.train_images[:samples], 0 * ones, ones):
        row = evaluate_bounds(net, images, torch.arange(samples) % 2)
        assert not any(math.isnan(value) for value in row.values()), row


# ------------------------------------------------------------------------------------------------
# Random networks
# ------------------------------------------------------------------------------------------------


def random_network(generator):
    """A random chain, its input's shape, and images."""

    def pair(low, high):
        return tuple(map(int, generator.integers(low, high, 2)))

    channels, size, layers = int(generator.integers(1, 4)), pair(4, 9), []
    shape = (channels, *size)
    for _ in range(generator.integers(0, 4)):
        kernel, padding, stride, dilation = pair(1, 4), pair(0, 3), pair(1, 3), pair(1, 3)
        if any(n + 2 * p <= d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel)):
            continue
        layer = conv(channels, int(generator.integers(1, 5)), kernel, stride, padding, dilation)
        ones = torch.ones(1, 1, *kernel).double()
        if dense_matrix(ones, (1, *size), stride, padding, dilation).any():
            size = tuple(layer(torch.zeros(1, channels, *size)).shape[2:])
            layers, channels = [*layers, layer, nn.ReLU()], layer.out_channels
    inputs = channels * size[0] * size[1]
    layers += [nn.Flatten()]
    if generator.random() < 0.3:
        layers += [linear(inputs, 5), nn.ReLU()]
        inputs = 5
    net = nn.Sequential(*layers, linear(inputs, int(generator.integers(2, 13)))).double()
    for weight in net.parameters():
        values = generator.standard_normal(weight.shape)
        if generator.random() < 0.3:  # rank one
            factors = generator.standard_normal(len(weight)), values[0]
            values = np.multiply.outer(*factors)
        weight.data = torch.from_numpy(values * 10.0 ** generator.choice([-12, -1, 0, 1, 12]))
    return net, shape, torch.from_numpy(generator.standard_normal((7, *shape)))


def dense_layers(net, size):
    """Per layer (weight, matrix, mask); the mask says which output position reads which input's."""
    for layer in net:
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        weight, how = layer.weight.detach(), (1, 0, 1)
        if isinstance(layer, nn.Conv2d):
            how = layer.stride, layer.padding, layer.dilation
        elif weight.shape[1] != math.prod(size):  # not the first linear layer
            size = (weight.shape[1], 1, 1)
        kernel = weight.view(len(weight), size[0], *(weight.shape[2:] or size[1:]))
        ones = torch.ones(1, 1, *kernel.shape[2:]).double()
        mask = dense_matrix(ones, (1, *size[1:]), *how) != 0
        yield weight.numpy(), dense_matrix(kernel, size, *how), mask
        maps = F.conv2d(torch.zeros(1, *size).double(), kernel, None, *how)
        size = tuple(maps.shape[1:])


def dense_row(net, shape, images, delta, gamma):
    """Every column but the certificates, from the layers' matrices, by docs/bounds.md."""
    weights, matrices, masks = zip(*dense_layers(net, shape))
    prod, log, sqrt = math.prod, math.log, math.sqrt
    D, m, last = len(weights), len(images), weights[-1]
    F_ = [np.linalg.norm(weight) for weight in weights]
    T = [matrix.norm().item() for matrix in matrices]
    s = [torch.linalg.svdvals(matrix)[0].item() for matrix in matrices]
    A = [matrix.norm(dim=1).sum().item() for matrix in matrices]
    filters = [np.linalg.norm(weight.reshape(len(weight), -1), axis=1) for weight in weights]
    deg, p = [mask.sum(1).max().item() for mask in masks], [len(mask) for mask in masks]
    c, W = [len(weight) for weight in weights], [weight.size for weight in weights]
    C, N21 = c[-1], np.sqrt((last.reshape(c[-1], -1, deg[-1]) ** 2).sum(1)).sum()
    b = []  # of a convolution over taps, of a linear layer over filters
    for weight, norms in zip(weights, filters):
        taps = np.sqrt((weight.reshape(*weight.shape[:2], -1) ** 2).sum(1)).sum()
        b.append(taps if weight.ndim == 4 else norms.sum())
    paths = torch.ones(images[0].numel()).double()
    for matrix in matrices:
        paths = matrix.abs() @ paths
    r, units = paths.sum().item(), [images[0].numel(), *map(len, matrices)]
    pixels = images.square().sum(1).flatten(1)
    E_max, E_tot = pixels.sum(0).max().item(), pixels.sum().item()
    E_coord = images.square().sum(0).max().item()
    sees, P = torch.eye(pixels.shape[1]).double(), []
    for mask in masks:
        sees = (mask.double() @ sees > 0).double()
        P.append((pixels @ sees.T).max().sqrt().item())
    P[-1] = B = pixels.sum(1).max().sqrt().item()
    lip, rho, rho_T, rho_21 = prod(s), prod(F_), prod(T), N21 * prod(F_[:-1])
    others = [prod(s[:l] + s[l + 1 :]) for l in range(D)]

    def tail(norm):
        return 3 * sqrt(log(2 * (norm + 2) ** 2 / delta) / (2 * m))

    def rademacher(R):
        return 2 * R + 3 * sqrt(log(2 / delta) / (2 * m))

    def peeled(factor, norm, log_N, energy):
        root = 1 + sqrt(2 * log_N)
        return factor * (norm + 1) / (gamma * m) * root * sqrt(energy) + tail(norm)

    log_deg, energy = sum(map(log, deg[:-1])), prod(deg[:-1]) * E_max
    q = [
        P[l] / gamma * others[l] / s[-1] * filters[-1].max() * filters[l].sum() * sqrt(p[l])
        for l in range(D - 1)
    ]
    q.append(P[-1] / gamma * others[-1] * F_[-1])
    spread = [pl * cl for pl, cl in zip(p, c)]
    Q, Gamma = sum(x ** (2 / 3) for x in q) ** 1.5, max(x * y for x, y in zip(q, spread))
    ledent = sqrt(math.log2(32 * Gamma * m**2 + 7 * max(spread) * m)) * log(m)
    Cs = [4 / gamma * sqrt(E_tot / m) * other * bl for other, bl in zip(others, b)]
    H, ceilings = sum(1 / i for i in range(1, m)), sum(math.ceil(x ** (2 / 3)) for x in Cs)
    graf = 12 * H / sqrt(m) * sqrt(log(2 * max(W))) * ceilings**1.5
    params = sum(2 * w * (log(1 + math.ceil((D * x) ** 2)) + 2.7 * (x > 0)) for w, x in zip(W, Cs))
    bartlett = sum((a * other) ** (2 / 3) for a, other in zip(A, others)) ** 1.5
    bartlett *= 12 * log(m) / m * 2 / gamma * sqrt(E_tot * log(2 * max(units) ** 2))
    beta, h = lip ** (1 / D), max(units)
    sigma = gamma / (42 * D * B * beta ** (D - 1) * sqrt(h * log(4 * D * h)))
    KL = sum((t * beta / sl) ** 2 for t, sl in zip(T, s)) / (2 * sigma**2)
    path = 4 * (r + 1) / (gamma * m) * sqrt(2 * log(2**D * units[0] * C) * E_coord) + tail(r)
    return {
        'rho': rho,
        'prod_ratio': lip / rho,
        'norm_ratio': sqrt(E_tot / E_max),
        'path_norm': r,
        'our_bound': peeled(2 * sqrt(2), rho, D * log(2) + log_deg + log(C), energy),
        'golowich_bound': peeled(2 * sqrt(2), rho_T, D * log(2) + log(C), E_tot),
        'ledent_bound': rademacher(4 / m + 768 * Q / sqrt(m) * ledent),
        'graf_bound': rademacher(4 / m + graf),
        'sedghi_bound': D * beta * sqrt(sum(W) / m) + sqrt(log(1 / delta) / m),
        'corrected_bound': peeled(
            4, rho_21, log(C) + (D - 1) * log(2) + log_deg + log(deg[-1]), energy
        ),
        'path_bound': path,
        'graf_params_bound': rademacher(12 / sqrt(m) * sqrt(params)),
        'bartlett_bound': rademacher(4 / m + bartlett),
        'neyshabur_bound': 4 * sqrt((KL + log(6 * m / delta)) / (m - 1)),
    }


LONG = [pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 10)]


@pytest.mark.parametrize('seed', [0, 1, 2, *LONG])
def test_every_bound_of_random_networks_from_dense_matrices(seed):
    generator = np.random.default_rng(seed)
    for _ in range(20):
        net, shape, images = random_network(generator)
        delta, gamma = generator.uniform(0.001, 0.2), 10.0 ** generator.integers(-1, 2)
        data = measure_data(net, images)
        row = evaluate_bounds(net, data, torch.zeros(len(images)), delta, gamma)
        expected = dense_row(net, shape, images, delta, gamma)
        assert set(row) >= {*expected, 'certified_error', 'certified_margin'}
        for column, value in expected.items():
            assert row[column] == pytest.approx(value, rel=5e-4, abs=0), (column, net)
