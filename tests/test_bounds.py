"""Every measure and every bound is the quantity that its docstring says."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, refused, settings_of
from torch import nn
from torch.nn.utils import prune

import utils
from conf import BadInput
from evaluation import evaluate, evaluate_layers
from measures import trace as geometry
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
from measures.trace import trace_layers
from models import get_network
from utils import evaluate_bounds


def dense_matrix(weight, shape, stride, padding, dilation):
    """The matrix of x -> conv2d(x, weight), built column by column."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return F.conv2d(basis, weight, None, stride, padding, dilation).flatten(1).T


def network_of(*hidden, size=8, channels=3, classes=4, seed=0):
    """A random network of Conv2d(out, kernel, stride, padding, dilation) layers, each with its ReLU, and a classifier."""
    torch.manual_seed(seed)
    layers, shape = [], (channels, size, size)
    for out, *how in hidden:
        layers += [nn.Conv2d(shape[0], out, *how, bias=False), nn.ReLU()]
        shape = tuple(layers[-2](torch.zeros(1, *shape)).shape[1:])
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(math.prod(shape), classes, bias=False))
    return net, (channels, size, size)


GEOMETRIES = [
    (k, s, p, d)
    for k in (1, 2, 3)
    for s in (1, 2)
    for p in (0, 1)
    for d in (1, 2)
    if (k, d) != (1, 2)
]


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
        assert (
            measured.p[l] == shape[1] * shape[2]
            and measured.c[l] == shape[0]
            and measured.W[l] == weight.numel()
        )
    assert measured.s[-1] == pytest.approx(
        torch.linalg.matrix_norm(net[-1].weight.double(), 2).item(), rel=1e-12
    )
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
    assert operator_norm(torch.ones(1, 1, 1, 1, dtype=torch.float64), (6, 6)) == pytest.approx(
        1, rel=1e-12
    )


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
    """Channels apart: the iteration from the first start, orthogonal to the largest, converges to the second largest."""
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
            tuple(generator.integers(1, high, 2)) for high in (5, 5, 9, 3)
        )
        stride, dilation = generator.integers(1, 3, 2).tolist()
        kernel, size, padding = (tuple(map(int, values)) for values in (kernel, size, padding))
        padded = [
            max(n + 2 * pad, dilation * (k - 1) + 1) for n, pad, k in zip(size, padding, kernel)
        ]
        weight = torch.from_numpy(generator.standard_normal((*channels, *kernel)))
        written_out = torch.zeros(*channels, *padded, dtype=torch.float64)
        written_out[:, :, : dilation * kernel[0] : dilation, : dilation * kernel[1] : dilation] = (
            weight
        )
        circular = (
            torch.linalg.svdvals(torch.fft.fft2(written_out).permute(2, 3, 0, 1)).max().item()
        )
        bound = dft_norm(1e200 * weight, size, padding, dilation) / 1e200
        assert bound == pytest.approx(circular, rel=1e-12)
        if all(n + 2 * pad >= dilation * (k - 1) + 1 for n, pad, k in zip(size, padding, kernel)):
            matrix = dense_matrix(weight, (channels[1], *size), stride, padding, dilation)
            exact = torch.linalg.matrix_norm(matrix, 2).item()
            assert exact <= bound * (1 + 1e-12)
            tightness.append(exact / bound)
            assert operator_norm(weight, size, stride, padding, dilation) == pytest.approx(
                exact, rel=1e-4, abs=1e-12
            )
    assert max(tightness) > 0.99 and dft_norm(torch.zeros(2, 2, 2, 2), (4, 4)) == 0


# A network small enough for paper and pencil: 3x3 images, two filters that each pick one tap, two classes.
FILTERS = [[[[1.0, 0.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 2.0]]]]
ROWS = [[1.0, 1, 1, 1, 0, 0, 0, 0], [3.0, 0, 0, 0, 4, 0, 0, 0]]
IMAGES = [[[[1.0, 0, 0], [0, 2, 0], [0, 0, 0]]], [[[0.0, 0, 0], [0, 1, 0], [0, 0, 3]]]]
DELTA, GAMMA = 0.1, 0.5


@pytest.fixture
def tiny():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2, bias=False)
    )
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
        's': [
            math.sqrt(5),
            classifier_s,
        ],  # the centre pixel is read with weight 1 and with weight 2
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
        'path_norm': 1 * (4 + 3)
        + 2 * 4,  # each row's entries times the tap of the filter that they read
        'path_depth': 2,
        'outputs': 2,
    }
    for symbol, value in by_hand.items():
        np.testing.assert_allclose(getattr(network, symbol), value, rtol=1e-7, err_msg=symbol)
    assert network.chain and not network.biased and network.pool == 0
    assert (data.m, data.E_max, data.E_coord, data.E_tot, data.inputs) == (2, 9, 9, 15, 9)
    assert data.B == pytest.approx(math.sqrt(10))
    np.testing.assert_allclose(data.P, [math.sqrt(10), math.sqrt(10)])
    assert data.norm_ratio == math.sqrt(15 / 9)
    outputs = net(images)
    assert outputs.tolist() == [[3, 19], [1, 8]]  # features 1 0 0 2 | 4 0 0 0 and 0 0 0 1 | 2 0 0 6
    assert classification_margins(outputs, torch.tensor([1, 0])).tolist() == [16, -7]


@pytest.mark.parametrize(
    'scale', [1, 1e-9]
)  # with small filters the terms show that do not grow with the weights
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
    ours = 2 * sqrt(2) * (rho + 1) / (0.5 * 2) * (
        1 + sqrt(2 * (2 * log(2) + log(4) + log(2)))
    ) * sqrt(4 * 9) + tail(rho)
    golowich = 2 * sqrt(2) * (rho_T + 1) / (0.5 * 2) * (1 + sqrt(2 * (2 * log(2) + log(2)))) * sqrt(
        15
    ) + tail(rho_T)
    sedghi = 2 * sqrt(s_1 * s_2) * sqrt(24 / 2) + sqrt(log(10) / 2)
    C_1, C_2 = 8 * sqrt(7.5) * s_2 * 3 * scale, 8 * sqrt(7.5) * s_1 * 7
    R = (
        2
        + 12
        / sqrt(2)
        * sqrt(log(32))
        * (math.ceil(C_1 ** (2 / 3)) + math.ceil(C_2 ** (2 / 3))) ** 1.5
    )
    graf = 2 * R + 3 * sqrt(log(20) / 4)
    n_1, n_2 = math.ceil(4 * C_1**2), math.ceil(4 * C_2**2)
    R = 12 / sqrt(2) * sqrt(2 * 8 * (log(1 + n_1) + 2.7) + 2 * 16 * (log(1 + n_2) + 2.7))
    graf_params = 2 * R + 3 * sqrt(log(20) / 4)
    terms = (s_2 * 12 * scale) ** (2 / 3) + (s_1 * 7) ** (2 / 3)
    R = 2 + 12 * log(2) / 2 * 2 / 0.5 * sqrt(15 * log(2 * 9**2)) * terms**1.5
    bartlett = 2 * R + 3 * sqrt(log(20) / 4)
    beta = sqrt(s_1 * s_2)
    sigma = 0.5 / (42 * 2 * sqrt(10) * beta * sqrt(9 * log(4 * 2 * 9)))
    KL = ((scale * sqrt(20) * beta / s_1) ** 2 + (sqrt(29) * beta / s_2) ** 2) / (2 * sigma**2)
    neyshabur = 4 * sqrt(KL + log(6 * 2 / 0.1))  # over sqrt(m - 1) = 1
    r = scale * 15
    path = 4 * (r + 1) / (0.5 * 2) * sqrt(2 * log(2**2 * 9 * 2) * 9) + tail(r)
    q_1, q_2 = 2 * sqrt(10) * 5 * 3 * scale * 2, 2 * sqrt(10) * s_1 * sqrt(29)
    Q = (q_1 ** (2 / 3) + q_2 ** (2 / 3)) ** 1.5
    R = 2 + 768 * Q / sqrt(2) * sqrt(math.log2(32 * max(q_1 * 8, q_2 * 2) * 4 + 7 * 8 * 2)) * log(2)
    ledent = 2 * R + 3 * sqrt(log(20) / 4)

    def corrected(gamma, delta):
        N = 2 * 2 * 16
        return 4 * (rho_21 + 1) / (gamma * 2) * (1 + sqrt(2 * log(N))) * sqrt(4 * 9) + tail(
            rho_21, delta
        )

    expected = {
        'rho': rho,
        'prod_ratio': s_1 * s_2 / rho,
        'norm_ratio': sqrt(15 / 9),
        'path_norm': r,
        'our_bound': ours,
        'golowich_bound': golowich,
        'ledent_bound': ledent,
        'graf_bound': graf,
        'sedghi_bound': sedghi,
        'corrected_bound': corrected(0.5, 0.1),
        'certified_error': 1,
        'certified_margin': 4,
        'path_bound': path,
        'graf_params_bound': graf_params,
        'bartlett_bound': bartlett,
        'neyshabur_bound': neyshabur,
    }
    assert list(row) == list(expected)
    for column, value in expected.items():
        assert row[column] == pytest.approx(value, rel=1e-6), column


@pytest.mark.parametrize(
    'path_norm', [15.0, 150.0]
)  # the certificate's bound is that of the paths, or the corrected one
def test_certificate_below_one_by_hand(tiny, path_norm):
    net, _ = tiny
    network = measure_network(net, (1, 3, 3), torch.tensor([0.3, 0.7, 3.0, 30.0]))
    data = measure_data(net, torch.tensor(IMAGES))
    data.m, data.E_max, data.E_coord, network.path_norm = 10**8, 10**6, 10**6, path_norm
    rho_21, delta = 9 * math.sqrt(5), 0.1 / 26
    grid = [2 ** (k / 2) for k in range(-8, 5)]
    totals = []
    for gamma in grid:
        corrected = (
            4
            * (rho_21 + 1)
            / (gamma * 1e8)
            * (1 + math.sqrt(2 * math.log(64)))
            * math.sqrt(4 * 1e6)
        )
        corrected += 3 * math.sqrt(math.log(2 * (rho_21 + 2) ** 2 / delta) / 2e8)
        path = 4 * (path_norm + 1) / (gamma * 1e8) * math.sqrt(2 * math.log(72) * 1e6)
        path += 3 * math.sqrt(math.log(2 * (path_norm + 2) ** 2 / delta) / 2e8)
        assert (path < corrected) == (path_norm == 15)
        totals.append(
            sum(margin <= gamma for margin in (0.3, 0.7, 3.0, 30.0)) / 4 + min(path, corrected)
        )
    assert (
        utils.certified_error(network, data, 0.1, 1.0) == pytest.approx(min(totals), rel=1e-9)
        and min(totals) < 1
    )
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
        fields = [
            torch.autograd.grad(output, pixel, retain_graph=True)[0] != 0 for output in outputs
        ]
        expected.append(
            max((images * field).flatten(1).norm(dim=1).max().item() for field in fields)
        )
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
    network, data = (
        measure_network(net, dataset.input_shape),
        measure_data(net, dataset.train_images),
    )
    network.rho, network.F = 1.0, np.ones(depth + 1)
    network.b[-1] = math.sqrt(10 * network.deg[-1])

    def term(
        bound, factor
    ):  # the bounds are factor (norm + 1) / gamma * term + a confidence term without gamma
        return 2 * (bound(network, data, 0.001, 1.0) - bound(network, data, 0.001, 2.0)) / factor

    published = term(utils.our_bound, 2 * math.sqrt(2) * 2)
    corrected = term(utils.corrected_bound, 4 * (network.b[-1] + 1)) * network.b[-1]
    images = dataset.train_images
    crop = images[:, 0, : images.shape[2] - depth, : images.shape[3] - depth].flatten(1)
    generator = torch.Generator().manual_seed(0)
    signs = [
        torch.randint(0, 2, (len(crop), 100), generator=generator) * 2.0 - 1 for _ in range(20)
    ]
    draws = torch.stack(
        [draw.norm() for sign in signs for draw in (crop.T @ sign).split(10, dim=1)]
    ) / len(crop)
    lower, error = draws.mean().item(), draws.std().item() / math.sqrt(len(draws))
    assert lower - 3 * error < crop.double().square().sum().mul(10).sqrt().item() / len(
        crop
    )  # Jensen's inequality
    return published, corrected, lower


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
    assert (
        network.deg.tolist() == [9, 16, 1]
        and network.p.tolist() == [16, 1, 1]
        and network.W.tolist() == [36, 448, 70]
    )
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


class Shifted(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.roll(1, 2), weight, bias)


class Viewed(Functional):
    def __init__(self, flatten):
        super().__init__()
        self.flatten = flatten

    def forward(self, x):
        return self.last(self.hidden(self.flatten(self.first(x).relu())).relu())


with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # jit is deprecated
    JITTED = torch.jit.trace(Functional(), torch.zeros(1, 1, 8, 8))
HOOKED_NETWORK, PATCHED_RELU = nn.Sequential(conv(1, 2, 2)), nn.Sequential(conv(1, 2, 2), nn.ReLU())
HOOKED_NETWORK.register_forward_hook(lambda module, inputs, output: 100 * output)
PATCHED_RELU[1].forward = torch.abs
HOOKED, PATCHED = nn.Sequential(conv(1, 2, 2)), nn.Sequential(conv(1, 2, 2))
HOOKED[0].register_forward_hook(lambda module, inputs, output: 100 * output)
PATCHED[0].forward = lambda x: 0 * x
BIASED = nn.Conv2d(1, 2, 2)
REFUSED = {
    'biased': (
        nn.Sequential(BIASED, nn.ReLU(), nn.Flatten(), nn.Linear(98, 10, bias=False)),
        '0 (Conv2d) has a bias',
    ),
    'biased classifier': (
        nn.Sequential(conv(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(98, 10)),
        '3 (Linear) has a bias',
    ),
    'skip': (Skip(), 'skip connections'),
    'batch norm': (
        nn.Sequential(conv(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()),
        '1 (BatchNorm2d)',
    ),
    'pooling': (
        nn.Sequential(conv(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        '2 (MaxPool2d)',
    ),
    'groups': (
        nn.Sequential(conv(1, 2, 2), nn.ReLU(), conv(2, 2, 2, groups=2)),
        '2 (Conv2d): only ungrouped',
    ),
    'circular': (
        nn.Sequential(conv(1, 2, 3, padding=1, padding_mode='circular')),
        '0 (Conv2d): only ungrouped',
    ),
    'no relu': (
        nn.Sequential(conv(1, 2, 2), conv(2, 2, 2)),
        '1 (Conv2d) follows a layer without a ReLU',
    ),
    'no classifier': (
        nn.Sequential(conv(1, 2, 2), nn.ReLU()),
        'last layer is not a linear classifier',
    ),
    'hook': (HOOKED, '0 (Conv2d) has forward hooks'),
    'old spectral norm': (
        nn.Sequential(torch.nn.utils.spectral_norm(conv(1, 2, 2))),
        'prune.remove, ..., or use',
    ),
    'pruned': (
        nn.Sequential(prune.random_unstructured(conv(1, 2, 2), 'weight', 0.5)),
        'forward hooks of torch.nn.utils',
    ),
    'hook on the network': (HOOKED_NETWORK, 'Sequential has forward hooks, which'),
    'own convolution': (
        nn.Sequential(Shifted(1, 2, 2, bias=False)),
        '0 (Shifted) has a forward pass of its own',
    ),
    'patched relu': (PATCHED_RELU, '1 (ReLU) has a forward pass of its own'),
    'data parallel': (
        nn.DataParallel(Functional()),
        'DataParallel is a wrapper: pass the network in it, its .module',
    ),
    'compiled': (
        torch.compile(Functional(), backend='eager'),
        'OptimizedModule is a compiled network: pass the one',
    ),
    'jit': (JITTED, 'is a jit module: pass the nn.Module'),
    'view of sizes': (Viewed(lambda x: x.view(-1, 64)), 'Viewed: view: not covered'),
    'view of channels': (Viewed(lambda x: x.reshape(x.size(1), -1)), 'Viewed'),
    'patched': (PATCHED, '0 (Conv2d) has a forward pass of its own'),
    'two outputs': (Pair(), 'its output is not the last layer'),
    'only padding': (
        nn.Sequential(conv(1, 2, 1, stride=20, padding=5)),
        '0 (Conv2d): reads nothing but its padding',
    ),
    'own forward': (
        nn.Sequential(Scaled(1, 2, 2, bias=False)),
        '0 (Scaled) has a forward pass of its own',
    ),
    'relu first': (
        nn.Sequential(nn.ReLU(), conv(1, 2, 2)),
        '0 (ReLU) comes before the first layer',
    ),
    'relu last': (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False), nn.ReLU()),
        'last layer',
    ),
    'unflattened': (
        nn.Sequential(nn.Linear(8, 10, bias=False)),
        '0 (Linear): expected a linear layer on the flattened',
    ),
    'channels': (
        nn.Sequential(conv(3, 2, 2), nn.ReLU()),
        '0 (Conv2d): does not fit its input of 1 channels',
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_the_theory_does_not_cover_is_refused_by_name(case):
    net, message = REFUSED[case]
    with pytest.raises(BadInput) as caught:
        measure_network(net, (1, 8, 8))
    assert message in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('flatten', [
    lambda x: x.view(x.size(0), -1), lambda x: x.reshape(x.shape[0], -1), lambda x: torch.reshape(x, (x.size()[0], -1)),
    lambda x: x.view((x.size(0), -1)), lambda x: x.view(x.shape[0], -1),
])  # fmt: skip
def test_views_that_flatten(flatten, digits):
    torch.manual_seed(0)
    net, plain = Viewed(flatten), Viewed(nn.Flatten())
    plain.load_state_dict(net.state_dict())
    images, labels = digits.train_images.contiguous(), digits.train_labels
    assert bounds_of(net, images, labels) == bounds_of(plain, images, labels)


@pytest.mark.parametrize('module', [nn.Flatten(), nn.Identity()])
def test_a_module_named_flatten(module):
    net = Functional()
    net.flatten = module
    net.forward = lambda x: net.last(
        net.hidden(net.flatten(net.first(x).relu()).flatten(1, 3)).relu()
    )
    assert len(trace_layers(net, (1, 8, 8))) == 3


@pytest.mark.parametrize('options, message', [
    ({'margins': torch.zeros(3)}, 'margins of shape (3,) for 2 training samples'),
    ({'margins': torch.zeros(2, 10)}, 'margins of shape (2, 10)'),
    ({'delta': 2}, 'delta = 2'), ({'delta': 0}, 'delta = 0'), ({'delta': math.nan}, 'delta = nan'),
    ({'gamma': 0}, 'gamma = 0'), ({'gamma': -1}, 'gamma = -1'), ({'gamma': math.nan}, 'gamma = nan'),
])  # fmt: skip
def test_arguments_that_make_no_sense_are_named(tiny, options, message):
    net, images = tiny
    with pytest.raises(BadInput) as caught:
        evaluate_bounds(net, measure_data(net, images), **{'margins': torch.zeros(2)} | options)
    assert message in str(caught.value) and '\n' not in str(caught.value)


def test_wrong_images_labels_and_shapes_are_named(tiny):
    net, images = tiny
    with pytest.raises(BadInput, match='input_shape'):
        measure_network(net, (1, 9))
    with pytest.raises(BadInput, match='contain NaN'):
        measure_data(net, torch.where(images == 3, math.nan, images))
    for wrong in (images[0], images[:0]):
        with pytest.raises(BadInput, match='images of shape'):
            measure_data(net, wrong)
    for labels in ([0, 2], [-1, 0], [0.0, 1.0]):
        with pytest.raises(BadInput, match='labels out of range: 2 outputs'):
            classification_margins(net(images), torch.tensor(labels))
    for labels in (torch.zeros(2, 1), torch.zeros(3)):
        with pytest.raises(BadInput, match='must be'):
            classification_margins(net(images), labels.long())
    assert margin_error(torch.tensor([math.nan, math.inf, 1.0]), 0) == pytest.approx(1 / 3)


def test_networks_that_only_the_path_norm_covers(digits, monkeypatch):
    layers = (
        conv(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    net, images = nn.Sequential(*layers), digits.train_images
    net(images)
    margins = classification_margins(net.eval()(images), digits.train_labels)
    net.train()
    with pytest.raises(BadInput, match='1 .BatchNorm2d.: not covered'):
        measure_data(net, images)
    data = measure_data(net, images, skip_uncovered=True)
    with pytest.raises(BadInput, match='1 .BatchNorm2d.: not covered'):
        evaluate_bounds(net, data, margins)
    calls = {
        'added': lambda network, *_: 2 * network.path_norm,
        'missing': lambda network, *_: network.T.sum(),
    }
    monkeypatch.setattr(utils, 'BOUNDS', utils.BOUNDS | calls)
    row = evaluate_bounds(net, data, margins, 0.01, 0.5, skip_uncovered=True)
    assert net.training
    known = {column for column, value in row.items() if not math.isnan(value)}
    assert (
        known == {'norm_ratio', 'path_norm', 'path_bound', 'added'}
        and row['added'] == 2 * row['path_norm']
    )
    r, m = row['path_norm'], 1437  # D = 3, K = 4, P = 1, biases
    log_N = 3 * math.log(5 * 4) + math.log(5 / 2 * 65 * 10)
    tail = 3 * math.sqrt(math.log(2 * (r + 2) ** 2 / 0.01) / (2 * m))
    energy = max(m, images.double().square().sum(0).max().item())
    assert energy == m  # the bias's own
    assert row['path_bound'] == pytest.approx(
        4 * (r + 1) / (0.5 * m) * math.sqrt(2 * log_N * energy) + tail, rel=1e-9
    )
    net[2] = nn.GELU()
    row = evaluate_bounds(net, data, margins, skip_uncovered=True)
    assert {column for column, value in row.items() if not math.isnan(value)} == {'norm_ratio'}
    covered, shape = network_of((2, 2), channels=1, classes=10)
    assert set(vars(measure_network(covered, (1, 8, 8)))) == {
        'margins',
        'missing',
        *LAYER_MEASURES,
        *PATH_MEASURES,
    }
    monkeypatch.setattr(utils, 'BOUNDS', {'typo': lambda network, *_: network.rhoo})
    for either in (covered, net):
        with pytest.raises(AttributeError, match='rhoo'):  # a mistake of the bound, covered or not
            evaluate_bounds(
                either,
                measure_data(either, images, skip_uncovered=True),
                margins,
                skip_uncovered=True,
            )
    tables = (
        measure_network(net, (1, 8, 8), margins, skip_uncovered=True),
        measure_data(net, images, skip_uncovered=True),
    )
    for table, measure in ((tables[0], 'rho'), (tables[0], 'path_norm'), (tables[1], 'P')):
        with pytest.raises(NotCovered, match=rf'^{measure} is not measured: .*\(\w+\)'):
            getattr(table, measure)


def test_a_network_is_traced_once_per_evaluation(digits, monkeypatch):
    calls, trace = [], geometry._trace
    monkeypatch.setattr(geometry, '_trace', lambda net: calls.append(net) or trace(net))
    settings = settings_of(depth=1, width=2, certify_every=0)
    net = get_network(settings, digits.input_shape, 10)
    data = measure_data(net, digits.train_images)
    calls.clear()
    evaluate(net, settings, digits, data, 0, 1)
    assert calls == [net]
    evaluate_layers(net, digits, 0, 1)
    assert calls == [net, net]
    with geometry.traced_once(), torch.no_grad():
        rho = measure_network(net, digits.input_shape).rho
        net[-1].weight *= 2
        assert measure_network(net, digits.input_shape).rho == pytest.approx(2 * rho)
    net[1] = nn.GELU()  # outside, a change of the modules is seen
    assert 'GELU' in geometry.not_covered(net, digits.input_shape)


@pytest.mark.parametrize('name', ['round', 'density', 'rho', 'pac_bayes_error', 'width', 'name', 'absolute_gap', 'place',
                                  'channels', 'seed_setting', 'my, bound', 'my bound', ''])  # fmt: skip
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
    margins = classification_margins(net(images), torch.tensor([1, 0]))
    without = evaluate_bounds(net, measure_data(net, images), margins)
    monkeypatch.setattr(utils, 'BOUNDS', {'mine': mine, **utils.BOUNDS})
    data = measure_data(net, images)
    assert (
        evaluate_bounds(net, data, margins)
        == evaluate_bounds(net, data, margins)
        == {'mine': 1.0} | without
    )


@pytest.mark.parametrize('value', [None, 1j, np.ones(3), torch.ones(3), 'small'])
def test_a_bound_that_is_no_number_is_named(tiny, monkeypatch, value):
    net, images = tiny
    monkeypatch.setitem(utils.BOUNDS, 'mine', lambda *_: value)
    with pytest.raises(
        BadInput, match=f'mine of BOUNDS returns a {type(value).__name__}; it must return a number'
    ):
        evaluate_bounds(net, measure_data(net, images), torch.ones(2))


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
    covering = (
        12 * harmonic / math.sqrt(1437) * math.sqrt(math.log(1280)) * 13**1.5
    )  # each of 13 layers counts as 1
    graf = 2 * (4 / 1437 + covering) + 3 * math.sqrt(math.log(2000) / (2 * 1437))
    assert tiny['graf_bound'] == pytest.approx(graf, rel=1e-6)
    assert not any(math.isnan(value) for value in row(0 * images, *[1e30] * 12).values())


def test_nan_weights_are_an_error(tiny):
    net, _ = tiny
    net[3].weight.data[0, 0] = math.nan
    with pytest.raises(BadInput, match='3 .Linear.: its weights contain NaN'):
        measure_network(net, (1, 3, 3))


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
    'scales', [(1e30, 1e-30), (1e30, 1e30), (1e-30, 1e-30), (0, 1), (1, 0), (0, 1e30)]
)
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
    for images in (
        digits.train_images[:samples],
        torch.zeros(samples, 1, 8, 8),
        torch.ones(samples, 1, 8, 8),
    ):
        labels = torch.arange(samples) % 2
        row = bounds_of(net, images, labels)
        assert not any(math.isnan(value) for value in row.values()), row


def random_network(generator):
    """A random chain, its input's shape, and images: depths, geometries, classes, sizes of weights and ranks."""
    channels, size, layers = int(generator.integers(1, 4)), generator.integers(4, 9, 2).tolist(), []
    shape = (channels, *size)
    for _ in range(generator.integers(0, 4)):
        kernel, padding = (
            tuple(map(int, generator.integers(low, high, 2))) for low, high in ((1, 4), (0, 3))
        )
        stride, dilation = (tuple(map(int, generator.integers(1, 3, 2))) for _ in range(2))
        if any(n + 2 * p <= d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel)):
            continue
        out = int(generator.integers(1, 5))
        layer = conv(channels, out, kernel, stride=stride, padding=padding, dilation=dilation)
        map_size = list(layer(torch.zeros(1, channels, *size)).shape[2:])
        reads = dense_matrix(
            torch.ones(1, 1, *kernel).double(), (1, *size), stride, padding, dilation
        ).any()
        if reads:
            layers, channels, size = [*layers, layer, nn.ReLU()], out, map_size
    inputs = channels * size[0] * size[1]
    layers += [nn.Flatten()]
    if generator.random() < 0.3:
        layers += [nn.Linear(inputs, 5, bias=False), nn.ReLU()]
        inputs = 5
    net = nn.Sequential(
        *layers, nn.Linear(inputs, int(generator.integers(2, 13)), bias=False)
    ).double()
    for weight in net.parameters():
        values = generator.standard_normal(weight.shape)
        if generator.random() < 0.3:  # rank one
            values = np.multiply.outer(
                generator.standard_normal(len(weight)), generator.standard_normal(weight.shape[1:])
            )
        weight.data = torch.from_numpy(values * 10.0 ** generator.choice([-12, -1, 0, 1, 12]))
    return net, shape, torch.from_numpy(generator.standard_normal((7, *shape)))


def dense_row(net, shape, images, delta, gamma):
    """Every column from the dense matrices of the layers, by the formulas of docs/bounds.md; the certificates aside."""
    layers, size, matrices, masks = (
        [m for m in net if not isinstance(m, (nn.ReLU, nn.Flatten))],
        shape,
        [],
        [],
    )
    for layer in layers:
        weight, geometry = layer.weight.detach(), (1, 0, 1)
        if isinstance(layer, nn.Linear):
            weight = weight.view(len(weight), *(size if len(size) == 3 else (size[0], 1, 1)))
            size = size if len(size) == 3 else (*size, 1, 1)
        else:
            geometry = layer.stride, layer.padding, layer.dilation
        matrices.append(dense_matrix(weight, size, *geometry))
        masks.append(
            dense_matrix(torch.ones(1, 1, *weight.shape[2:]).double(), (1, *size[1:]), *geometry)
            != 0
        )
        size = (
            len(weight),
            *F.conv2d(torch.zeros(1, *size).double(), weight, None, *geometry).shape[2:],
        )
    weights = [layer.weight.detach().numpy() for layer in layers]
    D, m, C, last = len(layers), len(images), len(weights[-1]), weights[-1]
    F_ = [np.linalg.norm(weight) for weight in weights]
    T = [matrix.norm().item() for matrix in matrices]
    s = [torch.linalg.svdvals(matrix)[0].item() for matrix in matrices]
    A = [matrix.norm(dim=1).sum().item() for matrix in matrices]
    filters = [np.linalg.norm(weight.reshape(len(weight), -1), axis=1) for weight in weights]
    deg, p = [mask.sum(1).max().item() for mask in masks], [len(mask) for mask in masks]
    c, W = [len(weight) for weight in weights], [weight.size for weight in weights]
    taps = [
        np.sqrt((weight.reshape(len(weight), weight.shape[1], -1) ** 2).sum(1)).sum()
        for weight in weights
    ]
    N21 = np.sqrt((last.reshape(C, -1, deg[-1]) ** 2).sum(1)).sum()
    paths = torch.ones(1, images[0].numel()).double()
    for matrix in matrices:
        paths = paths @ matrix.abs().T
    r, units = paths.sum().item(), [images[0].numel(), *(matrix.shape[0] for matrix in matrices)]
    pixels = images.square().sum(1).flatten(1)
    E_max, E_tot, E_coord = (
        pixels.sum(0).max().item(),
        pixels.sum().item(),
        images.square().sum(0).max().item(),
    )
    sees, P = torch.eye(pixels.shape[1]).double(), []
    for mask in masks:
        sees = (mask.double() @ sees > 0).double()
        P.append((pixels @ sees.T).max().sqrt().item())
    P[-1] = B = pixels.sum(1).max().sqrt().item()
    prod, log, sqrt = math.prod, math.log, math.sqrt
    lip, rho, rho_T, rho_21 = prod(s), prod(F_), prod(T), N21 * prod(F_[:-1])

    def tail(norm):
        return 3 * sqrt(log(2 * (norm + 2) ** 2 / delta) / (2 * m))

    def ending(R):
        return 2 * R + 3 * sqrt(log(2 / delta) / (2 * m))

    def root(log_N):
        return 1 + sqrt(2 * log_N)

    others = [prod(s[:l] + s[l + 1 :]) for l in range(D)]
    log_deg, energy = sum(map(log, deg[:-1])), sqrt(prod(deg[:-1]) * E_max)
    ours = 2 * sqrt(2) * (rho + 1) / (gamma * m) * root(
        D * log(2) + log_deg + log(C)
    ) * energy + tail(rho)
    golowich = 2 * sqrt(2) * (rho_T + 1) / (gamma * m) * root(D * log(2) + log(C)) * sqrt(
        E_tot
    ) + tail(rho_T)
    log_N = log(C) + (D - 1) * log(2) + log_deg + log(deg[-1])
    corrected = 4 * (rho_21 + 1) / (gamma * m) * root(log_N) * energy + tail(rho_21)
    widest = filters[-1].max()
    q = [
        P[l] / gamma * others[l] / s[-1] * widest * filters[l].sum() * sqrt(p[l])
        for l in range(D - 1)
    ]
    q.append(P[-1] / gamma * others[-1] * F_[-1])
    spread = [pl * cl for pl, cl in zip(p, c)]
    Q, Gamma = sum(x ** (2 / 3) for x in q) ** 1.5, max(x * y for x, y in zip(q, spread))
    ledent = 4 / m + 768 * Q / sqrt(m) * sqrt(
        math.log2(32 * Gamma * m**2 + 7 * max(spread) * m)
    ) * log(m)
    b = [
        norms.sum() if isinstance(layer, nn.Linear) else tap
        for layer, norms, tap in zip(layers, filters, taps)
    ]
    Cs = [4 / gamma * sqrt(E_tot / m) * other * bl for other, bl in zip(others, b)]
    H = sum(1 / i for i in range(1, m))
    graf = (
        4 / m
        + 12 * H / sqrt(m) * sqrt(log(2 * max(W))) * sum(math.ceil(x ** (2 / 3)) for x in Cs) ** 1.5
    )
    params = sum(2 * w * (log(1 + math.ceil((D * x) ** 2)) + 2.7 * (x > 0)) for w, x in zip(W, Cs))
    bartlett = sum((a * other) ** (2 / 3) for a, other in zip(A, others)) ** 1.5
    bartlett *= 12 * log(m) / m * 2 / gamma * sqrt(E_tot * log(2 * max(units) ** 2))
    beta, h = lip ** (1 / D), max(units)
    sigma = gamma / (42 * D * B * beta ** (D - 1) * sqrt(h * log(4 * D * h)))
    KL = sum((t * beta / sl) ** 2 for t, sl in zip(T, s)) / (2 * sigma**2)
    return {
        'rho': rho,
        'prod_ratio': lip / rho,
        'norm_ratio': sqrt(E_tot / E_max),
        'path_norm': r,
        'our_bound': ours,
        'golowich_bound': golowich,
        'ledent_bound': ending(ledent),
        'graf_bound': ending(graf),
        'sedghi_bound': D * beta * sqrt(sum(W) / m) + sqrt(log(1 / delta) / m),
        'corrected_bound': corrected,
        'path_bound': 4 * (r + 1) / (gamma * m) * sqrt(2 * log(2**D * units[0] * C) * E_coord)
        + tail(r),
        'graf_params_bound': ending(12 / sqrt(m) * sqrt(params)),
        'bartlett_bound': ending(4 / m + bartlett),
        'neyshabur_bound': 4 * sqrt((KL + log(6 * m / delta)) / (m - 1)),
    }


@pytest.mark.parametrize('seed', range(10))
def test_every_bound_of_random_networks_from_dense_matrices(seed):
    generator = np.random.default_rng(seed)
    for _ in range(20):
        net, shape, images = random_network(generator)
        delta, gamma = generator.uniform(0.001, 0.2), 10.0 ** generator.integers(-1, 2)
        row = evaluate_bounds(
            net, measure_data(net, images), torch.zeros(len(images)), delta, gamma
        )
        expected = dense_row(net, shape, images, delta, gamma)
        assert set(row) - set(expected) == {'certified_error', 'certified_margin'}
        for column, value in expected.items():
            assert row[column] == pytest.approx(value, rel=5e-4, abs=0), (column, net)
