"""Path-norms, path-metrics and path-magnitudes are sums over all paths, counted here one by one."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import settings_of
from networks import (
    BATCH_NORMS,
    WEIGHTED,
    Beside,
    Forward,
    Residual,
    ResNet,
    UNet,
    conv,
    linear,
    randomized,
    weights_of,
)
from torch import nn
from torch.nn.utils import parametrize

import utils
from conf import BadInput
from measures.norms import measure_data, measure_network
from measures.paths import measure_paths, path_magnitude, path_metric, path_norm, rescale_neurons
from measures.trace import not_covered
from models import get_network

# ------------------------------------------------------------------------------------------------
# Path by path
# ------------------------------------------------------------------------------------------------


def matrix_of(module, size):
    """A linear map of inputs of this size as a matrix (outputs, inputs), and its outputs' size."""
    outputs = module(torch.eye(math.prod(size)).double().view(-1, *size))
    return outputs.flatten(1).T, tuple(outputs.shape[1:])


def gain_and_shift(norm):
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return gain, norm.bias - gain * norm.running_mean


def affine(layer, norm, size):
    """A layer with the batch norm after it as (matrix, which entries are weights, bias, size)."""
    bare, ones = copy.deepcopy(layer), copy.deepcopy(layer)
    for copied in (bare, ones):
        if copied.bias is not None:
            copied.bias.zero_()
    ones.weight.fill_(1)
    matrix, out = matrix_of(bare, size)
    bias = torch.zeros(out[0]).double() if layer.bias is None else layer.bias
    if norm is not None:
        gain, shift = gain_and_shift(norm)
        bias = gain * bias + shift
        matrix = gain.repeat_interleave(len(matrix) // len(gain))[:, None] * matrix
    return matrix, matrix_of(ones, size)[0] != 0, bias.repeat_interleave(len(matrix) // out[0]), out


def through(matrix, edges, bias, units):
    """The units after a linear map, each of its edges a factor of a path, each bias a path."""
    result = []
    for row, used, shift in zip(matrix.tolist(), edges.tolist(), bias.tolist()):
        sources = [(weight, *unit) for weight, use, unit in zip(row, used, units) if use]
        value = shift + sum(weight * value for weight, value, _ in sources)
        paths = [(w * phi, start, on) for w, _, before in sources for phi, start, on in before]
        result.append((value, paths + [(shift, 1.0, True)] * (shift != 0)))
    return result


def largest(matrix, units):
    """The units after a max pooling: the paths through the largest of a window are active."""
    result = []
    for row in matrix.tolist():
        window = [unit for used, unit in zip(row, units) if used]
        best = max(window, key=lambda unit: unit[0])
        paths = [(phi, start, on * (unit is best)) for unit in window for phi, start, on in unit[1]]
        result.append((best[0], paths))
    return result


def unrolled(module, units, size):
    """The units (value, paths) after a module and their size; a path is (weight, start, active)."""
    if isinstance(module, Residual):
        inner, size = unrolled(module.body, units, size)
        return [(a + b, paths + more) for (a, paths), (b, more) in zip(units, inner)], size
    if isinstance(module, Beside):
        inner, (more, *rest) = unrolled(module.body, units, size)
        return units + inner, (size[0] + more, *rest)
    if isinstance(module, nn.Sequential):
        folded = None
        for layer, following in itertools.pairwise([*module, None]):
            if isinstance(layer, WEIGHTED):
                folded = following if isinstance(following, BATCH_NORMS) else None
                *numbers, size = affine(layer, folded, size)
                units = through(*numbers, units)
            elif layer is not folded:
                units, size = unrolled(layer, units, size)
        return units, size
    if isinstance(module, (nn.ReLU, nn.LeakyReLU)):
        slope, result = getattr(module, 'negative_slope', 0), []
        for value, paths in units:
            factor = 1 if value > 0 else slope
            paths = [(phi, start, active * factor) for phi, start, active in paths]
            result.append((factor * value, paths))
        return result, size
    if isinstance(module, BATCH_NORMS):
        gain, shift = (
            part.repeat_interleave(math.prod(size[1:])) for part in gain_and_shift(module)
        )
        return through(gain.diag(), torch.eye(len(gain)) != 0, shift, units), size
    matrix, size = matrix_of(module, size)  # flattenings, poolings, upsamplings and nothing at all
    if isinstance(module, nn.MaxPool2d):
        return largest(matrix, units), size
    return through(matrix, matrix != 0, torch.zeros(len(matrix)), units), size


@torch.no_grad()
def outputs_of(net, image):
    """Per output, (its value, its paths), of a network on one image."""
    units = [(value, [(1.0, value, True)]) for value in image.flatten().tolist()]
    return unrolled(net, units, tuple(image.shape))[0]


NETWORKS = {
    'MLP': [
        *(nn.Flatten(), nn.Linear(18, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)),
        *(nn.ReLU(), nn.Linear(3, 2)),
    ],
    'chain': [
        *(conv(2, 3, 2), nn.ReLU(), conv(3, 2, 2), nn.ReLU(), nn.Flatten(), linear(2, 3)),
    ],
    'geometry': [
        *(conv(2, 4, 2, 2, 1, groups=2, bias=True), nn.ReLU(), nn.Identity(), conv(4, 2, (1, 2))),
        *(nn.Dropout(), nn.Flatten(), nn.Linear(4, 2)),
    ],
    'dilation': [
        *(conv(2, 2, 2, dilation=2, padding=(0, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2)),
    ],
    'max pooling': [
        *(conv(2, 2, 2, padding=1, bias=True), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.Flatten()),
        nn.Linear(8, 2),
    ],
    'dilated max pooling': [nn.MaxPool2d(2, 1, 1, dilation=2), nn.Flatten(), nn.Linear(18, 2)],
    'average pooling': [
        *(conv(2, 2, 2, padding=1), nn.ReLU(), nn.AvgPool2d(2, 1, 1), nn.Flatten()),
        nn.Linear(50, 2),
    ],
    'adaptive pooling': [
        *(conv(2, 2, 1, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((3, 1)), nn.Flatten()),
        nn.Linear(6, 2),
    ],
    'residual': [
        *(conv(2, 2, 2, bias=True), nn.BatchNorm2d(2), nn.ReLU()),
        Residual(conv(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), conv(2, 2, 1)),
        *(nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()),
        nn.Linear(2, 2),
    ],
    'U-net': [
        *(conv(2, 2, 2, padding=1, bias=True), nn.LeakyReLU(0.2)),
        Beside(
            *(nn.MaxPool2d(3, 2, ceil_mode=True), conv(2, 3, 1), nn.BatchNorm2d(3)),
            *(nn.LeakyReLU(0.7), nn.ConvTranspose2d(3, 2, 2, stride=2)),
        ),
        *(conv(4, 1, 2, bias=True), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)),
    ],
    'transposed': [
        nn.ConvTranspose2d(2, 4, (2, 3), (2, 1), (1, 2), (1, 0), groups=2),
        *(nn.BatchNorm2d(4), nn.ReLU()),
        nn.ConvTranspose2d(4, 2, 2, dilation=2, bias=False, groups=2),
        *(nn.Flatten(), nn.Linear(42, 2)),
    ],
    'upsampling': [
        *(conv(2, 2, 2), nn.LeakyReLU(0.5), nn.Upsample(scale_factor=2, mode='bilinear')),
        *(nn.ReLU(), nn.Upsample(size=(3, 5)), nn.AvgPool2d(2, 2, 1, True, False)),
        nn.Upsample(size=2, mode='bilinear', align_corners=True),
        *(nn.Flatten(), nn.Linear(8, 2)),
    ],
}
SHAPE = (2, 3, 3)


def network(name):
    return randomized(*copy.deepcopy(NETWORKS[name]))


@pytest.fixture(params=NETWORKS)
def net(request):
    return network(request.param)


def images_of(count, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def test_every_path_is_counted(net):
    image = images_of(1)[0]
    outputs = outputs_of(net, image)
    expected = net(image[None])[0].tolist()
    assert [value for value, _ in outputs] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    sums = [sum(phi * start * active for phi, start, active in paths) for _, paths in outputs]
    assert sums == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for q in (0.5, 1, 2, 4):
        each = [sum(abs(phi) ** q for phi, _, _ in paths) for _, paths in outputs]
        assert path_norm(net, SHAPE, q) == pytest.approx(sum(each) ** (1 / q), rel=1e-12)
        mixed = sum(value ** (3 / q) for value in each) ** (1 / 3)
        assert path_norm(net, SHAPE, q, 3) == pytest.approx(mixed, rel=1e-12)
        assert path_norm(net, SHAPE, q, math.inf) == pytest.approx(max(each) ** (1 / q), rel=1e-12)
    assert path_norm(net, SHAPE, 2) < path_norm(net, SHAPE, 1) < path_norm(net, SHAPE, 0.5)


def changed(net, change):
    """A copy of a network, each weight changed in place by a function of it and a generator."""
    generator, net = torch.Generator().manual_seed(1), copy.deepcopy(net)
    with torch.no_grad():
        for weight in weights_of(net):
            change(weight, generator)
    return net


def zeroed(weight, generator):
    weight[torch.rand(weight.shape, generator=generator) < 0.4] = 0


def scaled(weight, generator):
    weight.mul_((0.5 * torch.randn(weight.shape, generator=generator)).exp())


def flipped(weight, generator):
    weight[torch.rand(weight.shape, generator=generator) < 0.2] *= -1


def moves_by_at_most(net, other, images):
    """The outputs of two networks differ by at most the path-metric; images of any size."""
    value, _ = path_metric(net, other, images.shape[1:])
    each, _ = path_metric(net, other, images.shape[1:], outputs=True)
    assert each.dtype == torch.float64 and each.sum().item() == pytest.approx(value, rel=1e-12)
    moved = (net(images) - other(images)).abs().flatten(1)
    size = images.flatten(1).abs().amax(1).clamp(min=1)
    assert (moved.sum(1) <= value * size * (1 + 1e-12)).all() and moved.max() > 0
    assert (moved <= each * size[:, None] * (1 + 1e-12)).all()


@pytest.mark.parametrize('change, is_exact', [(zeroed, True), (scaled, False), (flipped, False)])
def test_the_metric_is_the_distance_of_paths_and_bounds_that_of_functions(net, change, is_exact):
    other = changed(net, change)
    pairs = zip(outputs_of(net, images_of(1)[0]), outputs_of(other, images_of(1)[0]))
    paths = [path for (_, ours), (_, theirs) in pairs for path in zip(ours, theirs)]
    distance = sum(abs(path[0] - twin[0]) for path, twin in paths)
    value, exact = path_metric(net, other, SHAPE)
    assert exact == is_exact
    assert path_metric(other, net, SHAPE) == (pytest.approx(value, rel=1e-12), exact)
    fall = path_norm(net, SHAPE) - path_norm(other, SHAPE)
    if exact:
        assert value == pytest.approx(distance, rel=1e-9) == pytest.approx(fall, rel=1e-9)
    elif change is scaled:
        assert value > distance >= abs(fall)
    moves_by_at_most(net, other, torch.cat([images_of(500), images_of(500).sign()]))
    assert path_metric(net, net, SHAPE) == (0, True)


def test_equal_paths_of_different_functions_are_not_at_distance_zero():
    one = nn.Sequential(nn.Flatten(), linear(1, 1), nn.ReLU(), linear(1, 1))
    other = changed(one, lambda weight, _: weight.fill_(-1))
    one = changed(one, lambda weight, _: weight.fill_(1))
    assert path_metric(one, other, (1, 1, 1)) == (2, False)
    with pytest.raises(BadInput, match='same structure'):
        path_metric(one, one[:2], (1, 1, 1))


def test_magnitude_is_the_cost_of_removal(net):
    scores, norm = path_magnitude(net, SHAPE), path_norm(net, SHAPE)
    names = [name for name, module in net.named_modules() if isinstance(module, WEIGHTED)]
    assert list(scores) == [f'{name}.weight' for name in names]
    for name, score in scores.items():
        weight = net.get_parameter(name)
        assert score.shape == weight.shape and score.dtype == torch.float64
        for index in range(0, weight.numel(), 7):
            removed = copy.deepcopy(net)
            removed.get_parameter(name).data.view(-1)[index] = 0
            fall = norm - path_norm(removed, SHAPE)
            assert score.flatten()[index].item() == pytest.approx(fall, rel=1e-9, abs=1e-12)
    # Of a set of weights it is at most the sum.
    pruned, total = copy.deepcopy(net), 0.0
    for name, score in scores.items():
        pruned.get_parameter(name).data[score < score.median()] = 0
        total += score[score < score.median()].sum().item()
    assert path_metric(net, pruned, SHAPE)[0] <= total * (1 + 1e-12)


def test_layer_sums_and_conservation_of_a_chain():
    net = network('chain')
    scores, norm = path_magnitude(net, SHAPE), path_norm(net, SHAPE)
    for score in scores.values():
        assert score.sum().item() == pytest.approx(norm, rel=1e-12)
    first, second, last = scores.values()
    torch.testing.assert_close(first.sum((1, 2, 3)), second.sum((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(second.sum((1, 2, 3)), last.view(3, 2).sum(0), rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------
# What changes nothing
# ------------------------------------------------------------------------------------------------


def powers(channels):
    return torch.tensor([4096.0, 1, 128]).repeat(channels)[:channels]


def rescaled_to_the_bit(net, images):
    """A network with neurons rescaled by powers of 2: the same outputs, norm and magnitudes."""
    shape, rescaled = tuple(images.shape[1:]), rescale_neurons(net, powers)
    assert torch.equal(net(images), rescaled(images))
    assert path_norm(net, shape) == path_norm(rescaled, shape)
    before, after = path_magnitude(net, shape), path_magnitude(rescaled, shape)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return rescaled


def are_changed(net, other):
    return [not torch.equal(*pair) for pair in zip(weights_of(net), weights_of(other))]


def test_rescaling_neurons_changes_neither_function_nor_paths_by_a_bit(net):
    images = images_of(50)
    moved = are_changed(net, rescaled_to_the_bit(net, images))
    skips = any(isinstance(module, (Residual, Beside)) for module in net)
    assert all(moved) or len(moved) == 1 or skips
    generator = torch.Generator().manual_seed(2)
    rescaled = rescale_neurons(net, lambda count: torch.rand(count, generator=generator) + 0.01)
    torch.testing.assert_close(net(images), rescaled(images), rtol=1e-9, atol=1e-9)
    assert path_norm(net, SHAPE) == pytest.approx(path_norm(rescaled, SHAPE), rel=1e-12)
    before = path_magnitude(net, SHAPE)
    for name, score in path_magnitude(rescaled, SHAPE).items():
        torch.testing.assert_close(score, before[name], rtol=1e-12, atol=1e-13)


def test_rescaling_inside_residual_blocks_and_parametrized_layers(digits):
    net = network('residual')
    rescaled = rescale_neurons(net, lambda channels: torch.full((channels,), 8.0))
    assert torch.equal(rescaled[3].body[0].weight, 8 * net[3].body[0].weight)
    assert torch.equal(rescaled[3].body[3].weight, net[3].body[3].weight / 8)
    assert torch.equal(rescaled[0].weight, net[0].weight)  # a skip connection carries its channels
    net = get_network(settings_of(depth=3, width=6), digits.input_shape, 10)
    rescaled = rescaled_to_the_bit(net, digits.test_images[:99])
    assert not any(parametrize.is_parametrized(module) for module in rescaled.modules())
    with pytest.raises(BadInput, match='positive'):
        rescale_neurons(net, lambda channels: -torch.ones(channels))


def test_signs_change_nothing(net):
    other = changed(net, lambda weight, _: weight[::2].neg_())
    folds_biases = any(isinstance(module, nn.BatchNorm1d) for module in net)
    assert folds_biases or path_norm(other, SHAPE) == path_norm(net, SHAPE)
    scores = path_magnitude(net, SHAPE)
    after = path_magnitude(other, SHAPE)
    assert all(torch.equal(scores[name], score) for name, score in after.items())


def test_homogeneity_and_permutations():
    net, order = network('chain'), torch.tensor([2, 0, 1])
    expected = [2.5 * path_norm(net, SHAPE, q) for q in (0.5, 1, 3)]
    with torch.no_grad():
        net[2].weight.mul_(-2.5)
        net[0].weight.copy_(net[0].weight[order])
        net[2].weight.copy_(net[2].weight[:, order])
    assert [path_norm(net, SHAPE, q) for q in (0.5, 1, 3)] == pytest.approx(expected, rel=1e-12)


def test_weights_of_one_count_the_paths():
    layers = conv(1, 2, 2), nn.ReLU(), conv(2, 3, 2), nn.ReLU(), nn.Flatten(), linear(108, 10)
    net = changed(nn.Sequential(*layers), lambda weight, _: weight.fill_(1))
    assert path_norm(net, (1, 8, 8)) == pytest.approx(34560, rel=1e-12)


def test_it_is_a_lipschitz_constant_and_attained(net):
    per_output, images = path_norm(net, SHAPE, 1, math.inf), images_of(300)
    size = images.flatten(1).abs().amax(1).clamp(min=1)
    assert (net(images).abs().amax(1) <= per_output * size).all()
    if any(isinstance(module, nn.MaxPool2d) for module in net.modules()):
        return
    for tensor in net.parameters():
        tensor.data.abs_()
    for module in net.modules():
        if isinstance(module, BATCH_NORMS):
            module.running_mean.zero_()
    ones = net(torch.ones(1, *SHAPE, dtype=torch.float64))
    assert ones.abs().sum().item() == pytest.approx(path_norm(net, SHAPE), rel=1e-12)


def test_a_residual_network_of_plain_modules():
    torch.manual_seed(0)
    net = ResNet(4, 4, 8, 8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    norm = path_norm(net.eval(), (3, 32, 32))
    positive = copy.deepcopy(net).double()  # the network of absolute values, on an image of ones
    for module in positive.modules():
        if isinstance(module, nn.BatchNorm2d):
            gain, shift = gain_and_shift(module)
            module.running_mean.zero_(), module.running_var.fill_(1 - module.eps)
            module.weight.data.copy_(gain.abs()), module.bias.data.copy_(shift.abs())
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            for parameter in module.parameters():
                parameter.data.abs_()
    positive.maxpool.forward = lambda x: 9 * F.avg_pool2d(x, 3, 2, 1)
    outputs = positive(torch.ones(1, 3, 32, 32, dtype=torch.float64))
    assert norm == pytest.approx(outputs.sum().item(), rel=1e-12)
    expected = {'path_norm': norm, 'path_depth': 11, 'pool': 9, 'biased': True, 'chain': False}
    assert vars(measure_paths(net, (3, 32, 32))) == expected | {'outputs': 5}
    rescaled = rescaled_to_the_bit(net, torch.randn(4, 3, 32, 32))
    assert not torch.equal(net.layers[0].conv1.weight, rescaled.layers[0].conv1.weight)
    assert len(path_magnitude(net, (3, 32, 32))) == 1 + 8 + 1 + 1


@pytest.mark.parametrize(
    'name, expected',
    [
        ('MLP', (3, 0, True, False)),
        ('chain', (3, 0, False, True)),
        ('max pooling', (3, 9, True, False)),
        ('dilation', (2, 0, True, False)),
        ('residual', (4, 0, True, False)),
        ('U-net', (5, 9, True, False)),
        ('transposed', (2, 0, True, False)),
    ],
)
def test_depth_and_kind_of_a_network(name, expected):
    paths = measure_paths(network(name), SHAPE)
    assert (paths.path_depth, paths.pool, paths.biased, paths.chain) == expected


def test_range():
    torch.manual_seed(0)
    layers = [conv(1, 8, 3, padding=1), *(conv(8, 8, 3, padding=1) for _ in range(49))]
    net = nn.Sequential(
        *(module for layer in layers for module in (layer, nn.ReLU())),
        nn.Flatten(),
        linear(512, 10),
    ).double()
    values, shape = torch.ones(1, 1, 8, 8, dtype=torch.float64), (1, 8, 8)
    powered = copy.deepcopy(net)
    with torch.no_grad():
        for weight, power in zip(weights_of(net), weights_of(powered)):
            nn.init.kaiming_normal_(weight)
            power.copy_((4 * weight.abs()) ** 16)  # times 4, so that no power underflows
        expected = powered(values).sum().log().item() / 16 - 51 * math.log(4)
        assert math.log(path_norm(net, shape, 16)) == pytest.approx(expected, rel=1e-12)
        for weight in weights_of(net):
            weight.mul_(1e-200)
        # Two convolutions and the classifier: below every float.
        assert path_norm(net[48 * 2 + 1 :], (8, 8, 8)) == 0
        for weight, scale in zip(weights_of(net), [1e300, 1e300] + [1e200] * 49):
            weight.mul_(scale)
        assert 0 < path_norm(net, shape) < math.inf
        for weight in weights_of(net):
            weight.mul_(1e200)
        assert path_norm(net, shape) == math.inf
        net[40].weight.zero_()
    assert path_norm(net, shape) == 0
    assert all((score == 0).all() for score in path_magnitude(net, shape).values())


# ------------------------------------------------------------------------------------------------
# Other networks, and what is refused
# ------------------------------------------------------------------------------------------------

TAIL = nn.Flatten(), nn.Linear(18, 2)
INFINITE = nn.Sequential(nn.Flatten(), nn.Linear(18, 2))
INFINITE[1].weight.data[0, 0] = math.inf


def calls(function, **modules):
    return Forward(lambda self, x: function(self, x), **modules)


class OwnUp(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x) ** 2


REFUSED = {
    'ReLU6': (nn.Sequential(nn.ReLU6(), *TAIL), '0 (ReLU6)'),
    'all of them': (
        nn.Sequential(nn.GELU(), nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2), nn.GELU(), *TAIL),
        '0 (GELU), 2 (GroupNorm), 3 (GELU): not covered',
    ),
    'no statistics': (
        nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), *TAIL),
        '0 (BatchNorm2d) keeps no running',
    ),
    'indices': (
        nn.Sequential(nn.MaxPool2d(2, return_indices=True), *TAIL),
        '0 (MaxPool2d): return_indices',
    ),
    'reflect': (
        nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode='reflect')),
        "padding_mode = 'reflect'",
    ),
    'reflection': (nn.Sequential(nn.ReflectionPad2d(1), *TAIL), '0 (ReflectionPad2d)'),
    'bicubic': (
        nn.Sequential(nn.Upsample(scale_factor=2, mode='bicubic')),
        "0 (Upsample): mode = 'bicubic'",
    ),
    'antialias': (
        calls(lambda self, x: F.interpolate(x, 2, mode='bilinear', antialias=True)),
        'interpolate: antia',
    ),
    'negative slope': (nn.Sequential(nn.LeakyReLU(-0.1), *TAIL), '0 (LeakyReLU): only slopes'),
    'slope above 1': (calls(lambda self, x: F.leaky_relu(x, 1.5)), 'leaky_relu: only slopes'),
    'cat of images': (calls(lambda self, x: torch.cat([x, x])), 'cat: concatenates images'),
    'part': (
        calls(lambda self, x: torch.cat([x, x[:, :1]], 1)),
        'getitem: a shape or a part of a value',
    ),
    'stack': (calls(lambda self, x: torch.stack([x, x], 1)), 'Forward: stack'),
    'mean of channels': (calls(lambda self, x: x.mean(1)), 'mean: only a mean over all positions'),
    'a computed size': (
        calls(lambda self, x: F.interpolate(x, x.shape[2:])),
        'write sizes as numbers',
    ),
    'output size': (
        calls(lambda self, x: self.up(x, output_size=6), up=nn.ConvTranspose2d(2, 2, 2)),
        'more than',
    ),
    'not used': (
        calls(lambda self, x: (x.flatten(1), x.relu())[0]),
        'relu: its output is not used',
    ),
    'features': (
        nn.Sequential(nn.Flatten(), nn.MaxPool2d(2)),
        '1: does not fit its input of shape (18,)',
    ),
    'softmax': (nn.Sequential(*TAIL, nn.Softmax(1)), '2 (Softmax)'),
    'product': (calls(lambda self, x: x * x), 'Forward: mul'),
    'constant': (calls(lambda self, x: x + 1), 'Forward: add'),
    'shape': (
        nn.Sequential(nn.Flatten(), nn.Linear(17, 2)),
        '1: does not fit its input of shape (18,)',
    ),
    'in place': (calls(lambda self, x: x + F.relu(x, inplace=True)), 'relu works in place'),
    'in place by name': (calls(lambda self, x: x + torch.relu_(x)), 'relu_ works in place'),
    'infinite': (INFINITE, '1 (Linear): its weights contain NaN'),
    'two outputs': (calls(lambda self, x: (x.relu(), x)), 'output is not the last'),
    'own forward': (nn.Sequential(OwnUp(2, 2, 2)), '0 (OwnUp) has a forward pass of its own'),
    'own forward, parametrized': (
        nn.Sequential(nn.utils.parametrizations.weight_norm(OwnUp(2, 2, 2))),
        '0 (ParametrizedOwnUp) has a forward pass of its own',
    ),
    'noise': (calls(lambda self, x: F.dropout(x, 0.5)), 'dropout'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_has_no_paths_is_refused_by_name(case):
    net, message = REFUSED[case]
    with pytest.raises(BadInput) as caught:
        path_norm(net, SHAPE)
    assert message in str(caught.value) and '\n' not in str(caught.value)


# By enumerating 94,968, 159,276, 48,168 and 120,864 paths: l1 norm, l2 norm, sum of outputs on
# ones.
UNETS = [
    (nn.ConvTranspose2d(2, 2, 2, stride=2), 5288.80984133, 31.5253561126, -2.50476689569),
    (nn.ConvTranspose2d(2, 2, 3, 2, 1, 1), 7429.33571655, 34.3863393021, 2.82447077281),
    (nn.Upsample(scale_factor=2), 3866.78548737, 28.9235017679, -2.28166663649),
    (
        nn.Upsample(scale_factor=2, mode='bilinear'),
        *(3866.78548737, 25.5510544742, -2.28166663649),
    ),
]


@pytest.mark.parametrize('up, l1, l2, total', UNETS)
def test_the_path_norms_of_u_nets(up, l1, l2, total):
    net = UNet(up)
    assert path_norm(net, (1, 4, 4)) == pytest.approx(l1, rel=5e-12)
    assert path_norm(net, (1, 4, 4), 2) == pytest.approx(l2, rel=5e-12)
    with torch.no_grad():
        outputs = net(torch.ones(1, 1, 4, 4).double())
    assert outputs.sum().item() == pytest.approx(total, rel=5e-12)
    paths = measure_paths(net, (1, 4, 4))
    assert (paths.path_depth, paths.biased, paths.chain, paths.outputs) == (3, True, False, 16)


def test_the_path_metric_of_a_u_net():
    net = UNet(UNETS[0][0])
    vector = net.numbers()
    third = torch.arange(1, len(vector) + 1) % 3 == 0
    rounded = vector.sign() * (8 * vector.abs()).floor() / 8
    for numbers, value in ((vector.masked_fill(third, 0), 3975.64166912), (rounded, 1601.48971193)):
        other = copy.deepcopy(net)
        other.set_numbers(numbers)
        assert path_metric(net, other, (1, 4, 4)) == (pytest.approx(value, rel=5e-12), True)
        moves_by_at_most(net, other, images_of(500, (1, 4, 4)))


def test_rescaling_a_u_net_leaves_what_reaches_the_cat():
    net = UNet(UNETS[1][0])
    rescaled = rescaled_to_the_bit(net, images_of(20, (1, 4, 4)))
    # enc and up reach the concatenation; mid is read by up, out by nothing.
    assert are_changed(net, rescaled) == [False, True, True, False]


def unet_of_functions(self, x):
    skip = F.leaky_relu(self.enc(x), 0.2)
    mid = F.leaky_relu(self.mid(F.avg_pool2d(skip, 2)), 0.2)
    up = F.interpolate(mid, scale_factor=2, mode='bilinear')
    return self.out(torch.concat((skip, up), dim=1))


def chain_of_functions(self, x):
    x = self.body(x) * self.body(x) if self.training else self.body(x)
    x = F.avg_pool2d(F.max_pool2d(torch.relu(x), 2, stride=1), 2)
    return self.fc(F.dropout(x, 0.5, self.training).reshape(x.shape[0], -1))


def test_functions_in_place_of_modules():
    net = UNet(nn.Upsample(scale_factor=2, mode='bilinear'))
    functions = Forward(unet_of_functions, enc=net.enc, mid=net.mid, out=net.out)
    for q in (1, 2):
        assert path_norm(functions, (1, 4, 4), q) == path_norm(net, (1, 4, 4), q)
    assert path_metric(functions, net, (1, 4, 4)) == (0, True)
    fc, body = nn.Linear(2, 2), conv(2, 2, 3, padding=1, bias=True)
    modules = nn.Sequential(body, nn.ReLU(), nn.MaxPool2d(2, 1), nn.AvgPool2d(2), nn.Flatten(), fc)
    net = Forward(chain_of_functions, fc=fc, body=body).train()
    assert path_norm(net, SHAPE) == path_norm(modules, SHAPE) and net.training


RELU = nn.ReLU()


@pytest.mark.parametrize('relu', [torch.relu_, F.relu_, lambda x: x.relu_(), RELU])
def test_each_way_to_write_a_relu(relu):
    body, again, fc = conv(2, 3, 2), conv(3, 3, 1), linear(12, 2)

    def forward(self, x):
        return self.fc(self.relu(self.again(self.relu(self.body(x)))).flatten(1))

    net = Forward(forward, body=body, again=again, fc=fc, relu=relu)
    plain = nn.Sequential(body, nn.ReLU(), again, nn.ReLU(), nn.Flatten(), fc)
    assert path_norm(net, SHAPE) == path_norm(plain, SHAPE) and not not_covered(net, SHAPE)
    assert measure_network(net, SHAPE).rho == measure_network(plain, SHAPE).rho


@pytest.mark.parametrize(
    'mean',
    [
        lambda x: x.mean([2, 3]),
        lambda x: torch.mean(x, dim=(-2, -1)),
        lambda x: x.mean((2, 3), keepdim=True).flatten(1),
    ],
)
def test_a_mean_over_positions_is_an_average_pooling(mean):
    body, fc = conv(2, 2, 2).double(), nn.Linear(2, 2).double()
    net = Forward(lambda self, x: self.fc(mean(self.body(x).relu())), body=body, fc=fc)
    pooled = nn.Sequential(body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc)
    for q in (1, 2):
        assert path_norm(net, SHAPE, q) == path_norm(pooled, SHAPE, q)
    assert not torch.equal(rescaled_to_the_bit(net, images_of(9)).fc.weight, fc.weight)


def test_values_used_twice():
    torch.manual_seed(0)
    body, norm, fc = conv(2, 2, 1), nn.BatchNorm2d(2), linear(18, 2)
    norm.running_mean.normal_()

    def doubled(self, x):
        x = self.body(x)
        return self.fc((x + x).flatten(1))

    def beside(self, x):  # what a batch norm reads is used beside it, so it is not folded
        x = self.body(x)
        return self.fc((self.norm(self.same(x)) + x).flatten(1))

    once = path_norm(nn.Sequential(body, nn.Flatten(), fc), SHAPE)
    assert path_norm(Forward(doubled, body=body, fc=fc), SHAPE) == 2 * once
    expected = once + path_norm(nn.Sequential(body, norm, nn.Flatten(), fc), SHAPE)
    for same in (nn.Identity(), nn.ReLU()):
        net = Forward(beside, body=body, norm=norm, fc=fc, same=same)
        assert path_norm(net, SHAPE) == pytest.approx(expected, rel=1e-12)


def test_linear_layers_of_maps():
    columns = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2))
    with pytest.raises(BadInput, match='linear layer of maps'):
        path_norm(columns, (3, 3))
    net = randomized(nn.Linear(3, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    gain, shift = (part.detach().abs()[:, None, None] for part in gain_and_shift(net[1]))
    with torch.no_grad():
        values = torch.ones(2, 3, 3).double() @ net[0].weight.abs().T + net[0].bias.abs()
        values = net[4].weight.abs() @ (values * gain + shift).flatten() + net[4].bias.abs()
    assert path_norm(net, SHAPE) == pytest.approx(values.sum().item(), rel=1e-6)
    body, images = conv(2, 2, 3, padding=1), torch.rand(5, *SHAPE)
    for layers in (
        [body, nn.ReLU(), nn.Flatten(2), nn.Linear(9, 4), nn.Flatten(), nn.Linear(8, 2)],
        [nn.Linear(3, 4), nn.AvgPool2d(2, 2, 1), nn.Linear(3, 1), nn.Flatten()],
    ):
        net = nn.Sequential(*layers)
        assert torch.equal(rescale_neurons(net, powers)(images), net(images))


def test_what_is_used_twice_has_paths_and_no_magnitudes():
    def forward(self, x):
        return self.fc(self.body(self.body(x).relu()).flatten(1))

    net = Forward(forward, body=conv(2, 2, 1), fc=nn.Linear(18, 2))
    twin = copy.deepcopy(net.body)
    twice = nn.Sequential(net.body, nn.ReLU(), twin, nn.Flatten(), net.fc)
    assert path_norm(net, SHAPE) == path_norm(twice, SHAPE)
    twin.weight = net.body.weight
    for other, message in ((net, 'body is used twice'), (twice, '0 and 2 share a parameter')):
        with pytest.raises(BadInput, match=message):
            path_magnitude(other, SHAPE)
        with pytest.raises(BadInput, match=message):
            rescale_neurons(other, powers)


def test_a_shared_parameter_is_on_a_path_twice():
    first, last = linear(2, 2), linear(2, 2)
    first.weight = last.weight = nn.Parameter(torch.tensor([[1.0, 2], [3, 4]]))
    net = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)
    norm = path_norm(net, (1, 1, 2))
    last.weight.data[0, 0] = 0
    assert norm == 54 and path_norm(net, (1, 1, 2)) == 54 - 6


@pytest.mark.filterwarnings('ignore:Initializing zero-element')
def test_a_layer_without_channels():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3))
    net[3].bias.data.fill_(1)
    assert path_norm(net, (1, 2, 2)) == 3
    assert path_norm(net, (1, 2, 2), 2) == pytest.approx(math.sqrt(3), rel=1e-12)
    assert path_metric(net, net, (1, 2, 2)) == (0, True)
    assert [score.numel() for score in path_magnitude(net, (1, 2, 2)).values()] == [0, 0]
    images = torch.rand(5, 1, 2, 2)
    assert torch.equal(rescale_neurons(net, powers)(images), net(images))


@pytest.mark.parametrize('q', [0, -1, math.inf, math.nan])
def test_orders_that_make_no_norm_are_refused(q):
    with pytest.raises(BadInput, match='q must be positive and finite'):
        path_norm(network('chain'), SHAPE, q)


# ------------------------------------------------------------------------------------------------
# The bound
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('channels', [1, 2, 3])
@pytest.mark.parametrize('depth', [1, 2, 3])
@pytest.mark.parametrize('width', [1, 4])
def test_the_path_bound_against_the_corrected_one(channels, depth, width):
    """r <= rho_21 sqrt(prod deg c_0): with one channel the path bound's complexity is no larger."""
    layers, side = [conv(channels, width, 2), nn.ReLU()], 8 - depth
    layers += [module for _ in range(depth - 1) for module in (conv(width, width, 2), nn.ReLU())]
    net = randomized(*layers, nn.Flatten(), linear(width * side**2, 10)).float()
    images = torch.rand(50, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    network, data = measure_network(net, (channels, 8, 8)), measure_data(net, images)
    rho_21 = network.b[-1] * network.F[:-1].prod()
    assert network.path_norm <= rho_21 * math.sqrt(network.deg[:-1].prod() * channels)
    assert data.E_coord <= data.E_max <= channels * data.E_coord * (1 + 1e-12)

    def complexity(
        bound, norm
    ):  # bounds are 4 (norm + 1) / gamma * complexity + a tail without gamma
        difference = bound(network, data, 0.001, 1.0) - bound(network, data, 0.001, 2.0)
        return 2 * difference / (norm + 1) * norm

    ours = complexity(utils.path_bound, network.path_norm)
    assert ours <= complexity(utils.corrected_bound, rho_21) * math.sqrt(channels)


SKIPPING = {
    'chain': ([], True),
    'mean': ([nn.AvgPool2d(3, 1, 1)], True),
    'transposed': ([nn.ConvTranspose2d(2, 2, 1, bias=False), nn.ReLU()], True),
    'addition': ([Residual(conv(2, 2, 1), nn.ReLU())], False),
    'concatenation': ([Beside(conv(2, 2, 1), nn.ReLU()), conv(4, 2, 1)], False),
    'LeakyReLU': ([conv(2, 2, 1), nn.LeakyReLU(0.1)], False),
    'max pooling': ([nn.MaxPool2d(3, 1, 1)], False),
}


@pytest.mark.parametrize('kind', SKIPPING)
@pytest.mark.filterwarnings('ignore:some bounds are nan')
def test_the_smaller_constant_is_for_chains_alone(kind):
    """Without biases; docs/bounds.md proves 2 per layer for ReLU chains and 3 or 5 K for others."""
    body, chain = SKIPPING[kind]
    torch.manual_seed(0)
    layers = conv(2, 2, 2, padding=1), nn.ReLU(), *body, nn.Flatten(), linear(32, 3)
    net, images, labels = nn.Sequential(*layers), torch.rand(40, *SHAPE), torch.arange(40) % 3
    paths = measure_paths(net, SHAPE)
    bound = utils.evaluate_bounds(net, images, labels, skip_uncovered=True)['path_bound']
    base, outside = (5 * 9, 2.5 * 19) if kind == 'max pooling' else (3, 3 * 19)
    log_N = paths.path_depth * math.log(base) + math.log(outside * 3)
    if chain:
        log_N = paths.path_depth * math.log(2) + math.log(18 * 3)
    energy = images.double().square().sum(0).max().item()
    complexity = 4 * (paths.path_norm + 1) / 40 * math.sqrt(2 * log_N * energy)
    assert bound == pytest.approx(complexity + utils.tail(paths.path_norm, 40, 0.001), rel=1e-9)
    assert (paths.chain, paths.biased) == (chain, False)


@pytest.mark.parametrize('name, lower, upper', [('digits', None, None), ('mnist', 0.0081, 0.0125)])
def test_complexity_is_above_that_of_the_linear_class(name, lower, upper, request):
    """(1/m) E max over outputs, coordinates of |sum_i xi_ir x_i[u]|: x -> W x with sum |W| <= 1."""
    dataset = request.getfixturevalue(name)
    net = nn.Sequential(nn.Flatten(), linear(math.prod(dataset.input_shape), 10))
    data = measure_data(net, dataset.train_images)
    term = math.sqrt(2 * math.log(2 * data.inputs * 10) * data.E_coord) / data.m
    flat, generator = dataset.train_images.flatten(1), torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, (len(flat), 10), generator=generator) * 2.0 - 1 for _ in range(5)]
    drawn = sum((flat.T @ sign).abs().max().item() / len(flat) for sign in signs) / 5
    assert drawn < term
    if upper:
        assert term == pytest.approx(upper, rel=0.01) and drawn == pytest.approx(lower, abs=0.001)
