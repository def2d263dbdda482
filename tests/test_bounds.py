"""Every measure and every bound is the quantity that its docstring says."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import settings_of
from torch import nn

import utils
from conf import BadInput
from models import get_network
from utils import classification_margins, evaluate_bounds, margin_error, measure_data, measure_network, operator_norm


def dense_matrix(weight, shape, stride, padding, dilation):
    """The matrix of x -> conv2d(x, weight), built column by column."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return F.conv2d(basis, weight, None, stride, padding, dilation).flatten(1).T


def network_of(*hidden, size=8, channels=3, classes=4, seed=0):
    """A random network of Conv2d(out, kernel, stride, padding, dilation) layers, each with its ReLU, and a classifier."""
    torch.manual_seed(seed)
    layers, shape = [], (channels, size, size)
    for out, *geometry in hidden:
        layers += [nn.Conv2d(shape[0], out, *geometry, bias=False), nn.ReLU()]
        shape = tuple(layers[-2](torch.zeros(1, *shape)).shape[1:])
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(math.prod(shape), classes, bias=False))
    return net, (channels, size, size)


GEOMETRIES = [(k, s, p, d) for k in (1, 2, 3) for s in (1, 2) for p in (0, 1) for d in (1, 2) if (k, d) != (1, 2)]


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_norms_are_those_of_the_dense_matrix(geometry):
    net, shape = network_of((5, *geometry), (2, geometry[0], 1, 1))
    with torch.no_grad():
        net[0].weight.mul_(3.7)
    measured = measure_network(net, shape)
    for l, module in enumerate((net[0], net[2])):
        weight = module.weight.detach().double()
        matrix = dense_matrix(weight, shape, module.stride, module.padding, module.dilation)
        shape = tuple(module(torch.zeros(1, *shape)).shape[1:])
        assert measured.T[l] == pytest.approx(torch.linalg.matrix_norm(matrix).item(), rel=1e-12)
        assert measured.s[l] == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-4)
        rows = (dense_matrix(torch.ones_like(weight), tuple(net[:2 * l](torch.zeros(1, 3, 8, 8)).shape[1:]), module.stride,
                             module.padding, module.dilation) != 0).sum(1)  # fmt: skip
        assert measured.deg[l] == rows.max() / weight.shape[1]
        assert measured.p[l] == shape[1] * shape[2] and measured.c[l] == shape[0] and measured.W[l] == weight.numel()
    assert measured.s[-1] == pytest.approx(torch.linalg.matrix_norm(net[-1].weight.double(), 2).item(), rel=1e-12)
    assert measured.T[-1] == pytest.approx(net[-1].weight.double().norm().item(), rel=1e-12)


@pytest.mark.parametrize('channels, size, seed', [(1, 28, 0), (16, 10, 1), (4, 20, 2)])
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


def test_operator_norm_of_nearly_an_isometry():
    weight = torch.full((1000,), 0.999**0.5, dtype=torch.float64)
    weight[0] = 1
    assert operator_norm(torch.diag(weight)[:, :, None, None], (1, 1)) == pytest.approx(1, rel=1e-4)


def test_operator_norm_of_equal_singular_values():
    assert operator_norm(torch.ones(1, 1, 1, 1, dtype=torch.float64), (6, 6)) == pytest.approx(1, rel=1e-12)


# A network small enough for paper and pencil: 3x3 images, two filters that each pick one tap, two classes.
FILTERS = [[[[1.0, 0.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 2.0]]]]
ROWS = [[1.0, 1, 1, 1, 0, 0, 0, 0], [3.0, 0, 0, 0, 4, 0, 0, 0]]
IMAGES = [[[[1.0, 0, 0], [0, 2, 0], [0, 0, 0]]], [[[0.0, 0, 0], [0, 1, 0], [0, 0, 3]]]]
DELTA, GAMMA = 0.1, 0.5


@pytest.fixture
def tiny():
    net = nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(FILTERS))
        net[3].weight.copy_(torch.tensor(ROWS))
    return net, torch.tensor(IMAGES)


def test_measures_by_hand(tiny):
    net, images = tiny
    network, data = measure_network(net, (1, 3, 3)), measure_data(net, images)
    classifier_s = math.sqrt((29 + math.sqrt(477)) / 2)  # of the Gram matrix ((4, 3), (3, 25))
    by_hand = {
        'F': [math.sqrt(5), math.sqrt(29)],
        'T': [math.sqrt(20), math.sqrt(29)],
        's': [math.sqrt(5), classifier_s],  # the centre pixel is read with weight 1 and with weight 2
        'a': [3, math.sqrt(29)],
        'b': [3, 9],
        'deg': [4, 4],
        'p': [4, 1],
        'c': [2, 2],
        'W': [8, 16],
        'r': 5,
        'rho': math.sqrt(145),
        'lip': math.sqrt(5) * classifier_s,
    }
    for symbol, value in by_hand.items():
        np.testing.assert_allclose(getattr(network, symbol), value, rtol=1e-7, err_msg=symbol)
    assert (data.m, data.E_max, data.E_tot) == (2, 9, 15)
    np.testing.assert_allclose(data.P, [math.sqrt(10), math.sqrt(10)])
    assert data.norm_ratio == math.sqrt(15 / 9)
    outputs = net(images)
    assert outputs.tolist() == [[3, 19], [1, 8]]  # features 1 0 0 2 | 4 0 0 0 and 0 0 0 1 | 2 0 0 6
    assert classification_margins(outputs, torch.tensor([1, 0])).tolist() == [16, -7]


@pytest.mark.parametrize('scale', [1, 1e-9])  # with small filters the terms show that do not grow with the weights
def test_bounds_by_hand(tiny, scale):
    net, images = tiny
    with torch.no_grad():
        net[0].weight.mul_(scale)
    margins = classification_margins(net(images), torch.tensor([1, 0]))
    row = evaluate_bounds(net, measure_data(net, images), margins, DELTA, GAMMA)
    sqrt, log = math.sqrt, math.log

    def tail(r, delta=0.1):
        return 3 * sqrt(log(2 * (r + 2) ** 2 / delta) / 4)

    rho, rho_T, rho_21 = scale * sqrt(5 * 29), scale * sqrt(20 * 29), scale * 9 * sqrt(5)
    s_1, s_2 = scale * sqrt(5), sqrt((29 + sqrt(477)) / 2)
    ours = 2 * sqrt(2) * (rho + 1) / (0.5 * 2) * (1 + sqrt(2 * (2 * log(2) + log(4) + log(2)))) * sqrt(4 * 9) + tail(rho)
    golowich = 2 * sqrt(2) * (rho_T + 1) / (0.5 * 2) * (1 + sqrt(2 * (2 * log(2) + log(2)))) * sqrt(15) + tail(rho_T)
    sedghi = 2 * sqrt(s_1 * s_2) * sqrt(24 / 2) + sqrt(log(10) / 2)
    C_1, C_2 = 8 * sqrt(7.5) * s_2 * 3 * scale, 8 * sqrt(7.5) * s_1 * 9
    R = 2 + 12 / sqrt(2) * sqrt(log(32)) * (math.ceil(C_1 ** (2 / 3)) + math.ceil(C_2 ** (2 / 3))) ** 1.5
    graf = 2 * R + 3 * sqrt(log(20) / 4)
    q_1, q_2 = 2 * sqrt(10) * 5 * 3 * scale * 2, 2 * sqrt(10) * s_1 * sqrt(29)
    Q = (q_1 ** (2 / 3) + q_2 ** (2 / 3)) ** 1.5
    R = 2 + 768 * Q / sqrt(2) * sqrt(math.log2(32 * max(q_1 * 8, q_2 * 2) * 4 + 7 * 8 * 2)) * log(2)
    ledent = 2 * R + 3 * sqrt(log(20) / 4)

    def corrected(gamma, delta):
        N = 2 * 2 * 16
        return 4 * (rho_21 + 1) / (gamma * 2) * (1 + sqrt(2 * log(N))) * sqrt(4 * 9) + tail(rho_21, delta)

    expected = {
        'rho': rho,
        'prod_ratio': s_1 * s_2 / rho,
        'norm_ratio': sqrt(15 / 9),
        'our_bound': ours,
        'golowich_bound': golowich,
        'ledent_bound': ledent,
        'graf_bound': graf,
        'sedghi_bound': sedghi,
        'corrected_bound': corrected(0.5, 0.1),
        'certified_error': 1,
        'certified_margin': 4,
    }
    assert list(row) == list(expected)
    for column, value in expected.items():
        assert row[column] == pytest.approx(value, rel=1e-6), column


def test_certificate_below_one_by_hand(tiny):
    net, _ = tiny
    network = measure_network(net, (1, 3, 3), torch.tensor([0.3, 0.7, 3.0, 30.0]))
    data = measure_data(net, torch.tensor(IMAGES))
    data.m, data.E_max = 10**8, 10**6
    rho_21, N, delta = 9 * math.sqrt(5), 64, 0.1 / 13
    grid = [2 ** (k / 2) for k in range(-8, 5)]
    totals = []
    for gamma in grid:
        complexity = 4 * (rho_21 + 1) / (gamma * 1e8) * (1 + math.sqrt(2 * math.log(N))) * math.sqrt(4 * 1e6)
        confidence = 3 * math.sqrt(math.log(2 * (rho_21 + 2) ** 2 / delta) / 2e8)
        totals.append(sum(margin <= gamma for margin in (0.3, 0.7, 3.0, 30.0)) / 4 + complexity + confidence)
    assert utils.certified_error(network, data, 0.1, 1.0) == pytest.approx(min(totals), rel=1e-9) and min(totals) < 1
    assert utils.certified_margin(network, data, 0.1, 1.0) == grid[totals.index(min(totals))]


def test_margin_error_counts_ties():
    outputs = torch.tensor([[1.0, 1.0, 0.0], [3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [0.0, 1.0, 5.0]])
    margins = classification_margins(outputs, torch.tensor([0, 0, 1, 1]))
    assert margins.tolist() == [0, 1, 0, -4]
    assert [margin_error(margins, gamma) for gamma in (0, 0.5, 1, -4.5)] == [0.75, 0.75, 1, 0]


def bounds_of(net, images, labels, **options):
    margins = classification_margins(net(images), labels)
    return evaluate_bounds(net, measure_data(net, images), margins, **options)


def test_rescaling_two_layers_changes_nothing(digits):
    net = get_network(settings_of(depth=3, width=6), digits.input_shape, 10)
    before = bounds_of(net, digits.train_images, digits.train_labels)
    with torch.no_grad():
        net[2].parametrizations.weight.original0.mul_(8)
        net[-1].weight.div_(8)
    after = bounds_of(net, digits.train_images, digits.train_labels)
    for column, value in before.items():
        assert after[column] == pytest.approx(value, rel=1e-5), column


def test_permutations_change_nothing(digits):
    net, _ = network_of((6, 2), (5, 3, 1, 1), channels=1, classes=10)
    before = bounds_of(net, digits.train_images, digits.train_labels)
    order, samples = torch.randperm(6), torch.randperm(1437)
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight[order])
        net[2].weight.copy_(net[2].weight[:, order])
    after = bounds_of(net, digits.train_images[samples], digits.train_labels[samples])
    for column, value in before.items():
        assert after[column] == pytest.approx(value, rel=1e-5), column


def test_receptive_fields(digits):
    """P by brute force: which pixels move a layer's output, by gradients of a network of positive weights."""
    net, shape = network_of((1, 3, 2, 1), (1, 2, 1, 0), (1, 2, 1, 1), channels=1, classes=3)
    images = digits.train_images[:200]
    with torch.no_grad():
        for weight in net.parameters():
            weight.fill_(1)
    expected = []
    for layers in (1, 3, 5):
        pixel = torch.ones(1, *shape, requires_grad=True)
        outputs = net[:layers](pixel).flatten()
        fields = [torch.autograd.grad(output, pixel, retain_graph=True)[0] != 0 for output in outputs]
        expected.append(max((images * field).flatten(1).norm(dim=1).max().item() for field in fields))
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
    """Of CONV-`depth`: the published and the corrected complexity term for unit norms, and a lower bound on what they bound.

    The class contains x -> <u, crop(x)> for each classifier u of Frobenius norm 1: its filters pick one tap, and no ReLU
    is active on images without negative pixels. Its empirical Rademacher complexity is drawn by Monte Carlo. A classifier
    of Frobenius norm 1 has a group norm N21 of at most sqrt(C deg_D).
    """
    net = get_network(settings_of(depth=depth, width=1), dataset.input_shape, 10)
    network, data = measure_network(net, dataset.input_shape), measure_data(net, dataset.train_images)
    network.rho, network.F = 1.0, np.ones(depth + 1)
    network.b[-1] = math.sqrt(10 * network.deg[-1])

    def term(bound, factor):  # the bounds are factor (norm + 1) / gamma * term + a confidence term without gamma
        return 2 * (bound(network, data, 0.001, 1.0) - bound(network, data, 0.001, 2.0)) / factor

    published = term(utils.our_bound, 2 * math.sqrt(2) * 2)
    corrected = term(utils.corrected_bound, 4 * (network.b[-1] + 1)) * network.b[-1]
    images = dataset.train_images
    crop = images[:, 0, : images.shape[2] - depth, : images.shape[3] - depth].flatten(1)
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, (len(crop), 100), generator=generator) * 2.0 - 1 for _ in range(20)]
    draws = torch.stack([draw.norm() for sign in signs for draw in (crop.T @ sign).split(10, dim=1)]) / len(crop)
    lower, error = draws.mean().item(), draws.std().item() / math.sqrt(len(draws))
    assert lower - 3 * error < crop.double().square().sum().mul(10).sqrt().item() / len(crop)  # Jensen's inequality
    return published, corrected, lower


# The published term of CONV-3 lies within the Monte Carlo error of the lower bound, so neither order is asserted of it.
@pytest.mark.parametrize('depth, published', [(1, 0.0238), (2, 0.0542), (3, 0.1204)])
def test_complexity_is_above_that_of_the_class_on_mnist(mnist, depth, published):
    terms = complexity_terms(depth, mnist)
    assert terms[0] == pytest.approx(published, rel=0.01)
    assert terms[2] == pytest.approx(0.1205, rel=0.02)
    assert terms[1] > terms[2]
    assert depth == 3 or terms[0] < terms[2]


@pytest.mark.parametrize('depth', [1, 2, 3, 4])
def test_complexity_is_above_that_of_the_class_on_digits(digits, depth):
    published, corrected, lower = complexity_terms(depth, digits)
    assert corrected > lower
    assert (published < lower) == (depth == 1)


def test_our_bound_is_monotone(tiny):
    net, images = tiny
    network, data = measure_network(net, (1, 3, 3)), measure_data(net, images)
    values = []
    for m in (100, 1000, 10000):
        data.m, data.E_max, data.E_tot = m, 9 * m / 2, 15 * m / 2
        values.append(utils.our_bound(network, data, 0.001, 1.0))
    assert values == sorted(values, reverse=True) and len(set(values)) == 3
    for layer in (net[0], net[3]):
        before = utils.our_bound(measure_network(net, (1, 3, 3)), data, 0.001, 1.0)
        with torch.no_grad():
            layer.weight.mul_(1.1)
        assert utils.our_bound(measure_network(net, (1, 3, 3)), data, 0.001, 1.0) > before


class Functional(nn.Module):
    """A network of the user's own, written in another style."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        self.hidden = nn.Linear(4 * 4 * 4, 7, bias=False)
        self.last = nn.Linear(7, 10, bias=False)

    def forward(self, x):
        x = torch.flatten(F.relu(self.first(x)), 1)
        return self.last(self.hidden(x).relu())


def test_a_network_of_the_users_own(digits):
    net = Functional()
    row = bounds_of(net, digits.train_images, digits.train_labels, delta=0.01, gamma=2.0)
    network = measure_network(net, digits.input_shape)
    assert network.deg.tolist() == [9, 16, 1] and network.p.tolist() == [16, 1, 1] and network.W.tolist() == [36, 448, 70]
    assert all(math.isfinite(value) for value in row.values())


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        self.fc = nn.Linear(64, 10, bias=False)

    def forward(self, x):
        return self.fc((x + self.conv(x)).relu().flatten(1))


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def conv(*arguments, **options):
    return nn.Conv2d(*arguments, bias=False, **options)


class Pair(Functional):
    def forward(self, x):
        return super().forward(x), 1


HOOKED, PATCHED = nn.Sequential(conv(1, 2, 2)), nn.Sequential(conv(1, 2, 2))
HOOKED[0].register_forward_hook(lambda module, inputs, output: 100 * output)
PATCHED[0].forward = lambda x: 0 * x
BIASED = nn.Conv2d(1, 2, 2)
REFUSED = {
    'biased': (
        nn.Sequential(BIASED, nn.ReLU(), nn.Flatten(), nn.Linear(98, 10, bias=False)),
        '0 (Conv2d) has a bias',
    ),
    'biased classifier': (nn.Sequential(conv(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(98, 10)), '3 (Linear) has a bias'),
    'skip': (Skip(), 'skip connections'),
    'batch norm': (nn.Sequential(conv(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()), '1 (BatchNorm2d)'),
    'pooling': (nn.Sequential(conv(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()), '2 (MaxPool2d)'),
    'groups': (nn.Sequential(conv(1, 2, 2), nn.ReLU(), conv(2, 2, 2, groups=2)), '2 (Conv2d): only ungrouped'),
    'circular': (nn.Sequential(conv(1, 2, 3, padding=1, padding_mode='circular')), '0 (Conv2d): only ungrouped'),
    'no relu': (nn.Sequential(conv(1, 2, 2), conv(2, 2, 2)), '1 (Conv2d) follows a layer without a ReLU'),
    'no classifier': (nn.Sequential(conv(1, 2, 2), nn.ReLU()), 'last layer is not a linear classifier'),
    'hook': (HOOKED, '0 (Conv2d) has forward hooks'),
    'old weight norm': (nn.Sequential(torch.nn.utils.spectral_norm(conv(1, 2, 2))), 'has forward hooks'),
    'patched': (PATCHED, '0 (Conv2d) has a forward pass of its own'),
    'two outputs': (Pair(), 'its output is not the last layer'),
    'only padding': (nn.Sequential(conv(1, 2, 1, stride=20, padding=5)), '0 (Conv2d): reads nothing but its padding'),
    'own forward': (nn.Sequential(Scaled(1, 2, 2, bias=False)), '0 (Scaled) has a forward pass of its own'),
    'relu first': (nn.Sequential(nn.ReLU(), conv(1, 2, 2)), '0 (ReLU) comes before the first layer'),
    'relu last': (nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False), nn.ReLU()), 'last layer'),
    'unflattened': (nn.Sequential(nn.Linear(8, 10, bias=False)), '0 (Linear): expected a linear layer on the flattened'),
    'channels': (nn.Sequential(conv(3, 2, 2), nn.ReLU()), '0 (Conv2d): does not fit its input of 1 channels'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_the_theory_does_not_cover_is_refused_by_name(case):
    net, message = REFUSED[case]
    with pytest.raises(BadInput) as caught:
        measure_network(net, (1, 8, 8))
    assert message in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('module', [nn.Flatten(), nn.Identity()])
def test_a_module_named_flatten(module):
    net = Functional()
    net.flatten = module
    net.forward = lambda x: net.last(net.hidden(net.flatten(net.first(x).relu()).flatten(1, 3)).relu())
    assert len(utils.trace_layers(net, (1, 8, 8))) == 3


def test_wrong_arguments_are_named(tiny):
    net, images = tiny
    with pytest.raises(BadInput, match='input_shape'):
        measure_network(net, (1, 9))
    with pytest.raises(BadInput, match='3 margins for 2 training samples'):
        evaluate_bounds(net, measure_data(net, images), torch.zeros(3))
    assert margin_error(torch.tensor([math.nan, math.inf, 1.0]), 0) == pytest.approx(1 / 3)


def chain(*weights):
    """1x1 convolutions with these weights and a classifier of ones, on 8x8 images of one channel."""
    layers = [layer for _ in weights for layer in (conv(1, 1, 1), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10, bias=False)).double()
    with torch.no_grad():
        for layer, weight in zip(net[::2], weights):
            layer.weight.fill_(weight)
        net[-1].weight.fill_(1)
    return net


@pytest.mark.filterwarnings('error')
def test_no_partial_product_over_or_underflows(digits):
    def row(images, *weights):
        net = chain(*weights)
        return evaluate_bounds(net, measure_data(net, images), torch.zeros(1437))

    images = digits.train_images.double()
    expected = row(images, *[1.0] * 24)
    for weights in ([1e30] * 12 + [1e-30] * 12, [1e160, 1e-160] * 12):
        for column, value in row(images, *weights).items():
            assert value == pytest.approx(expected[column], rel=1e-4), column
    lip = math.sqrt(640)  # of the classifier of ones
    huge, tiny = row(images, *[1e30] * 12), row(images, *[1e-30] * 12)
    rest = math.sqrt(math.log(1000) / 1437)
    assert huge['our_bound'] == huge['golowich_bound'] == huge['corrected_bound'] == math.inf
    assert huge['sedghi_bound'] == pytest.approx(13 * 1e30 ** (12 / 13) * lip ** (1 / 13)
                                                 * math.sqrt(652 / 1437) + rest, rel=1e-6)  # fmt: skip
    harmonic = sum(1 / i for i in range(1, 1437))
    covering = 12 * harmonic / math.sqrt(1437) * math.sqrt(math.log(1280)) * 13**1.5  # each of 13 layers counts as 1
    graf = 2 * (4 / 1437 + covering) + 3 * math.sqrt(math.log(2000) / (2 * 1437))
    assert tiny['graf_bound'] == pytest.approx(graf, rel=1e-6)
    assert not any(math.isnan(value) for value in row(0 * images, *[1e30] * 12).values())


def test_nan_weights_are_an_error(tiny):
    net, _ = tiny
    net[3].weight.data[0, 0] = math.nan
    with pytest.raises(BadInput, match='3 contain NaN'):
        measure_network(net, (1, 3, 3))


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('scales', [(1e30, 1e-30), (1e30, 1e30), (1e-30, 1e-30), (0, 1), (1, 0), (0, 1e30)])
def test_extreme_weights_give_a_number_or_inf(digits, scales):
    net, _ = network_of((4, 2), (4, 2), channels=1, classes=10)
    with torch.no_grad():
        net[0].weight.mul_(scales[0])
        net[2].weight.mul_(scales[1])
    data = measure_data(net, digits.train_images)
    margins = torch.zeros(1437)
    row = evaluate_bounds(net, data, margins)
    assert not any(math.isnan(value) for value in row.values()), row
    assert (row['rho'] == 0) == (0 in scales)
    with torch.no_grad():
        for _ in range(9):  # deep enough for the products to overflow
            net.insert(0, nn.ReLU())
            net.insert(0, conv(1, 1, 1))
            net[0].weight.fill_(scales[1] * 1e8)
    row = evaluate_bounds(net, measure_data(net, digits.train_images), margins)
    assert not any(math.isnan(value) for value in row.values()), row


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('samples', [1, 2, 3])
def test_few_samples_and_constant_images(digits, samples):
    net, _ = network_of((1, 2), channels=1, classes=2)
    for images in (digits.train_images[:samples], torch.zeros(samples, 1, 8, 8), torch.ones(samples, 1, 8, 8)):
        labels = torch.arange(samples) % 2
        row = bounds_of(net, images, labels)
        assert not any(math.isnan(value) for value in row.values()), row
