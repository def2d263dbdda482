"""Path-norms, path-metrics and path-magnitudes are sums over all paths, counted here one by one."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import settings_of
from torch import nn
from torch.nn.utils import parametrize

import utils
from conf import BadInput
from measures.norms import classification_margins, measure_data, measure_network
from measures.paths import measure_paths, path_magnitude, path_metric, path_norm, rescale_neurons
from measures.trace import not_covered
from models import get_network


class Residual(nn.Module):
    def __init__(self, *body):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        return x + self.body(x)


class Beside(nn.Module):
    """What a module reads, and beside it what it makes, as at the way up of a U-net."""

    def __init__(self, *body):
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x):
        return torch.cat([x, self.body(x)], 1)


SKIPS = (Residual, Beside)
WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def unrolled(module, units):
    """The units {index: (value, paths)} behind a module, by loops; a path is (product of its weights, start, active)."""
    if isinstance(module, Residual):
        behind = unrolled(module.body, units)
        return {
            at: (value + behind[at][0], paths + behind[at][1])
            for at, (value, paths) in units.items()
        }
    if isinstance(module, Beside):
        behind, before = unrolled(module.body, units), 1 + max(at[0] for at in units)
        return units | {(before + at[0], *at[1:]): unit for at, unit in behind.items()}
    if isinstance(module, nn.Sequential):
        modules, folded = [*module], False
        for first, second in zip(modules, [*modules[1:], None]):
            if isinstance(first, (nn.BatchNorm1d, nn.BatchNorm2d)) and folded:
                folded = False
                continue
            folded = isinstance(first, WEIGHTED) and isinstance(
                second, (nn.BatchNorm1d, nn.BatchNorm2d)
            )
            units = unrolled(fold(first, second) if folded else first, units)
        return units

    def unit(edges, bias=0.0):
        edges = [(weight, units[at]) for weight, at in edges if at in units]
        value = bias + sum(weight * value for weight, (value, _) in edges)
        paths = [
            (weight * phi, start, active)
            for weight, (_, paths) in edges
            for phi, start, active in paths
        ]
        return value, paths + ([(bias, 1.0, True)] if bias else [])

    def windows(kernel, stride, padding, dilation, sizes):
        """Each output position with the input positions that its window holds."""
        spans = [sizes[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1 for i in (0, 1)]
        up = getattr(module, 'ceil_mode', False)
        counts = [(-(-spans[i] // stride[i]) if up else spans[i] // stride[i]) + 1 for i in (0, 1)]
        for out in itertools.product(*map(range, counts)):
            taps = itertools.product(*map(range, kernel))
            yield (
                out,
                [
                    (
                        tap,
                        tuple(
                            out[i] * stride[i] - padding[i] + tap[i] * dilation[i] for i in (0, 1)
                        ),
                    )
                    for tap in taps
                ],
            )

    indices = list(units)
    sizes = [max(axis) + 1 for axis in zip(*indices)]
    result = {}
    if isinstance(module, (nn.Identity, nn.Dropout)):
        result = units
    elif isinstance(module, (nn.ReLU, nn.LeakyReLU)):
        for at, (value, paths) in units.items():
            slope = 1 if value > 0 else getattr(module, 'negative_slope', 0)
            result[at] = (
                slope * value,
                [(phi, start, active * slope) for phi, start, active in paths],
            )
    elif isinstance(module, nn.Flatten):
        result = {(number,): units[at] for number, at in enumerate(sorted(indices))}
    elif isinstance(module, nn.Linear):
        for o, row in enumerate(module.weight.tolist()):
            bias = 0.0 if module.bias is None else module.bias[o].item()
            result[(o,)] = unit([(weight, (i,)) for i, weight in enumerate(row)], bias)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        gain, shift = gain_and_shift(module)
        result = {at: unit([(gain[at[0]].item(), at)], shift[at[0]].item()) for at in indices}
    elif isinstance(module, nn.Conv2d):
        per, per_out = module.weight.shape[1], module.out_channels // module.groups
        for o, (out, taps) in itertools.product(
            range(module.out_channels),
            windows(module.kernel_size, module.stride, module.padding, module.dilation, sizes[1:]),
        ):
            edges = [
                (module.weight[o, c][tap].item(), (o // per_out * per + c, *at))
                for c in range(per)
                for tap, at in taps
            ]
            result[(o, *out)] = unit(edges, 0.0 if module.bias is None else module.bias[o].item())
    elif isinstance(module, nn.Upsample) or (isinstance(module, nn.AvgPool2d) and module.ceil_mode):
        basis = torch.eye(math.prod(sizes[1:])).double().view(-1, 1, *sizes[1:])
        entries = module(basis).flatten(1).T.tolist()  # a row per output position
        outs = itertools.product(*map(range, module(basis).shape[2:]))
        for out, row in zip(outs, entries):
            edges = [
                edge for edge in zip(row, itertools.product(*map(range, sizes[1:]))) if edge[0]
            ]
            result |= {
                (c, *out): unit([(weight, (c, *at)) for weight, at in edges])
                for c in range(sizes[0])
            }
    elif isinstance(module, nn.ConvTranspose2d):
        per_in, per_out = module.in_channels // module.groups, module.weight.shape[1]
        size = [
            (sizes[i + 1] - 1) * module.stride[i] - 2 * module.padding[i]
            + module.dilation[i] * (module.kernel_size[i] - 1) + module.output_padding[i] + 1 for i in (0, 1)
        ]  # fmt: skip
        edges = {at: [] for at in itertools.product(range(module.out_channels), *map(range, size))}
        for (c, *at), o, tap in itertools.product(
            indices, range(per_out), itertools.product(*map(range, module.kernel_size))
        ):
            out = (
                at[i] * module.stride[i] - module.padding[i] + tap[i] * module.dilation[i]
                for i in (0, 1)
            )
            out = (c // per_in * per_out + o, *out)
            if out in edges:
                edges[out].append((module.weight[c, o][tap].item(), (c, *at)))
        for out in edges:
            result[out] = unit(
                edges[out], 0.0 if module.bias is None else module.bias[out[0]].item()
            )
    elif isinstance(module, nn.AdaptiveAvgPool2d):
        for c, *out in itertools.product(range(sizes[0]), *map(range, module.output_size)):
            axes = [
                range(i * size // outs, math.ceil((i + 1) * size / outs))
                for i, size, outs in zip(out, sizes[1:], module.output_size)
            ]
            window = list(itertools.product(*axes))
            result[(c, *out)] = unit([(1 / len(window), (c, *at)) for at in window])
    elif isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        kernel, stride, padding = (
            (value, value) for value in (module.kernel_size, module.stride, module.padding)
        )
        dilation = getattr(module, 'dilation', 1)
        for c, (out, taps) in itertools.product(
            range(sizes[0]), windows(kernel, stride, padding, (dilation, dilation), sizes[1:])
        ):
            inside = [(c, *at) for _, at in taps if (c, *at) in units]
            if isinstance(module, nn.AvgPool2d):
                result[(c, *out)] = unit([(1 / module.kernel_size**2, at) for at in inside])
                continue
            best = max(inside, key=lambda at: units[at][0])
            paths = [
                (phi, start, on * (at == best)) for at in inside for phi, start, on in units[at][1]
            ]
            result[(c, *out)] = units[best][0], paths
    return result


def gain_and_shift(norm):
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return gain, norm.bias - gain * norm.running_mean


def fold(layer, norm):
    layer, (gain, shift) = copy.deepcopy(layer), gain_and_shift(norm)
    before = torch.zeros_like(shift) if layer.bias is None else layer.bias
    layer.bias = nn.Parameter(gain * before + shift)
    if isinstance(layer, nn.ConvTranspose2d):  # (in, out of a group, kernel)
        per_in, per_out = layer.in_channels // layer.groups, layer.weight.shape[1]
        gains = torch.stack(
            [gain[i // per_in * per_out :][:per_out] for i in range(layer.in_channels)]
        )
        layer.weight = nn.Parameter(layer.weight * gains[:, :, None, None])
        return layer
    layer.weight = nn.Parameter(layer.weight * gain.view(-1, *[1] * (layer.weight.dim() - 1)))
    return layer


@torch.no_grad()
def outputs_of(net, x):
    """Per output, (its value, its paths), of a network on one image."""
    units = {
        at: (x[at].item(), [(1.0, x[at].item(), True)])
        for at in itertools.product(*map(range, x.shape))
    }
    return list(unrolled(net, units).values())


def randomized(*layers):
    net = nn.Sequential(*layers).double().eval()
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(len(tensor), generator=generator))
            module.running_var.uniform_(0.1, 3, generator=generator)
        elif isinstance(module, WEIGHTED):
            for parameter in module.parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return net


def conv(*arguments, bias=False, **options):
    return nn.Conv2d(*arguments, bias=bias, **options)


NETWORKS = {
    'MLP': lambda: randomized(nn.Flatten(), nn.Linear(18, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(),
                              nn.Linear(3, 2)),
    'chain': lambda: randomized(conv(2, 3, 2), nn.ReLU(), conv(3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3, bias=False)),
    'geometry': lambda: randomized(conv(2, 4, 2, stride=2, padding=1, groups=2, bias=True), nn.ReLU(), nn.Identity(),
                                   conv(4, 2, (1, 2), dilation=1), nn.Dropout(), nn.Flatten(), nn.Linear(4, 2)),
    'dilation': lambda: randomized(conv(2, 2, 2, dilation=2, padding=(0, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2)),
    'max pooling': lambda: randomized(conv(2, 2, 2, padding=1, bias=True), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.Flatten(),
                                      nn.Linear(8, 2)),
    'dilated max pooling': lambda: randomized(nn.MaxPool2d(2, 1, 1, dilation=2), nn.Flatten(), nn.Linear(18, 2)),
    'average pooling': lambda: randomized(conv(2, 2, 2, padding=1), nn.ReLU(), nn.AvgPool2d(2, 1, 1), nn.Flatten(),
                                          nn.Linear(50, 2)),
    'adaptive pooling': lambda: randomized(conv(2, 2, 1, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((3, 1)), nn.Flatten(),
                                           nn.Linear(6, 2)),
    'residual': lambda: randomized(conv(2, 2, 2, bias=True), nn.BatchNorm2d(2), nn.ReLU(),
                                   Residual(conv(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), conv(2, 2, 1)),
                                   nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(2, 2)),
    'U-net': lambda: randomized(conv(2, 2, 2, padding=1, bias=True), nn.LeakyReLU(0.2),
                                Beside(nn.MaxPool2d(3, 2, ceil_mode=True), conv(2, 3, 1), nn.BatchNorm2d(3),
                                       nn.LeakyReLU(0.7), nn.ConvTranspose2d(3, 2, 2, stride=2)),
                                conv(4, 1, 2, bias=True), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)),
    'transposed': lambda: randomized(nn.ConvTranspose2d(2, 4, (2, 3), (2, 1), (1, 2), (1, 0), groups=2),
                                     nn.BatchNorm2d(4), nn.ReLU(),
                                     nn.ConvTranspose2d(4, 2, 2, dilation=2, bias=False, groups=2),
                                     nn.Flatten(), nn.Linear(42, 2)),
    'upsampling': lambda: randomized(conv(2, 2, 2), nn.LeakyReLU(0.5), nn.Upsample(scale_factor=2, mode='bilinear'),
                                     nn.ReLU(), nn.Upsample(size=(3, 5)),
                                     nn.AvgPool2d(2, 2, 1, True, count_include_pad=False),
                                     nn.Upsample(size=2, mode='bilinear', align_corners=True),
                                     nn.Flatten(), nn.Linear(8, 2)),
}  # fmt: skip
SHAPE = (2, 3, 3)


@pytest.fixture(params=NETWORKS)
def net(request):
    return NETWORKS[request.param]()


def images_of(count, shape=SHAPE, seed=0):
    return torch.randn(
        count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


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
        assert path_norm(net, SHAPE, q, 3) == pytest.approx(
            sum(value ** (3 / q) for value in each) ** (1 / 3), rel=1e-12
        )
        assert path_norm(net, SHAPE, q, math.inf) == pytest.approx(max(each) ** (1 / q), rel=1e-12)
    assert path_norm(net, SHAPE, 2) < path_norm(net, SHAPE, 1) < path_norm(net, SHAPE, 0.5)


def weights_of(net):
    return [module.weight for module in net.modules() if isinstance(module, WEIGHTED)]


def test_the_metric_is_the_distance_of_the_paths_and_bounds_that_of_the_functions(net):
    generator = torch.Generator().manual_seed(1)
    zeroed, shrunk_and_grown, flipped = (copy.deepcopy(net) for _ in range(3))
    with torch.no_grad():
        for weight in weights_of(zeroed):
            weight[torch.rand(weight.shape, generator=generator) < 0.4] = 0
        for weight in weights_of(shrunk_and_grown):
            weight.mul_((0.5 * torch.randn(weight.shape, generator=generator)).exp())
        for weight in weights_of(flipped):
            weight[torch.rand(weight.shape, generator=generator) < 0.2] *= -1
    paths = [phi for _, paths in outputs_of(net, images_of(1)[0]) for phi, _, _ in paths]
    for other, is_exact in ((zeroed, True), (shrunk_and_grown, False), (flipped, False)):
        others = [phi for _, paths in outputs_of(other, images_of(1)[0]) for phi, _, _ in paths]
        distance = sum(abs(phi - theirs) for phi, theirs in zip(paths, others))
        value, exact = path_metric(net, other, SHAPE)
        each, _ = path_metric(net, other, SHAPE, outputs=True)
        assert each.dtype == torch.float64 and each.sum().item() == pytest.approx(value, rel=1e-12)
        assert exact == is_exact and path_metric(other, net, SHAPE) == (
            pytest.approx(value, rel=1e-12),
            exact,
        )
        if exact:
            assert value == pytest.approx(distance, rel=1e-9)
            assert value == pytest.approx(path_norm(net, SHAPE) - path_norm(other, SHAPE), rel=1e-9)
        elif other is shrunk_and_grown:
            assert value > distance >= abs(path_norm(net, SHAPE) - path_norm(other, SHAPE))
        images = torch.cat([images_of(500), images_of(500).sign()])
        moved, size = (
            (net(images) - other(images)).abs(),
            images.flatten(1).abs().amax(1).clamp(min=1),
        )
        assert (moved.sum(1) <= value * size * (1 + 1e-12)).all() and moved.max() > 0
        assert (moved <= each * size[:, None] * (1 + 1e-12)).all()
    assert path_metric(net, net, SHAPE) == (0, True)


def test_equal_paths_of_different_functions_are_not_at_distance_zero():
    def product(w, u):
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)
        )
        net[1].weight.data.fill_(w)
        net[3].weight.data.fill_(u)
        return net

    assert path_metric(product(1, 1), product(-1, -1), (1, 1, 1)) == (2, False)
    with pytest.raises(BadInput, match='same structure'):
        path_metric(
            product(1, 1), nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False)), (1, 1, 1)
        )


def test_magnitude_is_the_cost_of_removal(net):
    scores, norm = path_magnitude(net, SHAPE), path_norm(net, SHAPE)
    layers = {name: module for name, module in net.named_modules() if isinstance(module, WEIGHTED)}
    assert list(scores) == [f'{name}.weight' for name in layers]
    for name, layer in layers.items():
        score = scores[f'{name}.weight']
        assert score.shape == layer.weight.shape and score.dtype == torch.float64
        for at in itertools.islice(itertools.product(*map(range, layer.weight.shape)), 0, None, 7):
            removed = copy.deepcopy(net)
            removed.get_submodule(name).weight.data[at] = 0
            assert score[at].item() == pytest.approx(
                norm - path_norm(removed, SHAPE), rel=1e-9, abs=1e-12
            )
    pruned = copy.deepcopy(net)  # and of a set at most the sum
    for name in layers:
        pruned.get_submodule(name).weight.data[scores[f'{name}.weight'] < score.median()] = 0
    total = sum(value[value < score.median()].sum().item() for value in scores.values())
    assert path_metric(net, pruned, SHAPE)[0] <= total * (1 + 1e-12)


def test_layer_sums_and_conservation_of_a_chain():
    net = NETWORKS['chain']()
    scores, norm = path_magnitude(net, SHAPE), path_norm(net, SHAPE)
    for score in scores.values():
        assert score.sum().item() == pytest.approx(norm, rel=1e-12)
    first, second, last = scores.values()
    torch.testing.assert_close(first.sum((1, 2, 3)), second.sum((0, 2, 3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(second.sum((1, 2, 3)), last.view(3, 2).sum(0), rtol=1e-12, atol=0)


def powers(channels):
    return torch.tensor([4096.0, 1, 128]).repeat(channels)[:channels]


def test_rescaling_neurons_changes_neither_function_nor_paths_by_a_bit(net):
    rescaled = rescale_neurons(net, powers)
    images = images_of(50)
    assert torch.equal(net(images), rescaled(images))
    assert path_norm(net, SHAPE) == path_norm(rescaled, SHAPE)
    before, after = path_magnitude(net, SHAPE), path_magnitude(rescaled, SHAPE)
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed = [not torch.equal(*pair) for pair in zip(weights_of(net), weights_of(rescaled))]
    assert all(changed) or len(changed) == 1 or any(isinstance(module, SKIPS) for module in net)
    generator = torch.Generator().manual_seed(2)
    rescaled = rescale_neurons(
        net, lambda channels: torch.rand(channels, generator=generator) + 0.01
    )
    torch.testing.assert_close(net(images), rescaled(images), rtol=1e-9, atol=1e-9)
    assert path_norm(net, SHAPE) == pytest.approx(path_norm(rescaled, SHAPE), rel=1e-12)
    for name, score in path_magnitude(rescaled, SHAPE).items():
        torch.testing.assert_close(score, before[name], rtol=1e-12, atol=1e-13)


def test_rescaling_inside_residual_blocks_and_parametrized_layers(digits):
    net = NETWORKS['residual']()
    rescaled = rescale_neurons(net, lambda channels: torch.full((channels,), 8.0))
    assert torch.equal(rescaled[3].body[0].weight, 8 * net[3].body[0].weight)
    assert torch.equal(rescaled[3].body[3].weight, net[3].body[3].weight / 8)
    assert torch.equal(rescaled[0].weight, net[0].weight)  # a skip connection carries its channels
    net = get_network(settings_of(depth=3, width=6), digits.input_shape, 10)
    weights = [weight.clone() for weight in weights_of(net)]
    rescaled = rescale_neurons(net, powers)
    assert not any(parametrize.is_parametrized(module) for module in rescaled.modules())
    assert all(torch.equal(*pair) for pair in zip(weights, weights_of(net)))
    assert torch.equal(net(digits.test_images[:99]), rescaled(digits.test_images[:99]))
    before, after = (path_magnitude(one, digits.input_shape) for one in (net, rescaled))
    assert all(torch.equal(before[name], after[name]) for name in before) and list(before) == list(
        after
    )
    with pytest.raises(BadInput, match='positive'):
        rescale_neurons(net, lambda channels: -torch.ones(channels))


def test_invariances(net):
    norm, scores = path_norm(net, SHAPE), path_magnitude(net, SHAPE)
    flipped = copy.deepcopy(net)
    for weight in weights_of(flipped):
        weight.data[::2].neg_()
    assert path_norm(flipped, SHAPE) == norm or any(
        isinstance(module, nn.BatchNorm1d) for module in net
    )
    assert all(
        torch.equal(scores[name], score) for name, score in path_magnitude(flipped, SHAPE).items()
    )


def test_homogeneity_and_permutations():
    net = NETWORKS['chain']()
    norms = [path_norm(net, SHAPE, q) for q in (0.5, 1, 3)]
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        net[2].weight.mul_(-2.5)
        net[0].weight.copy_(net[0].weight[order])
        net[2].weight.copy_(net[2].weight[:, order])
    assert [path_norm(net, SHAPE, q) for q in (0.5, 1, 3)] == pytest.approx(
        [2.5 * norm for norm in norms], rel=1e-12
    )


def test_weights_of_one_count_the_paths():
    net = nn.Sequential(
        conv(1, 2, 2),
        nn.ReLU(),
        conv(2, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(108, 10, bias=False),
    )
    for weight in net.parameters():
        weight.data.fill_(1)
    assert path_norm(net, (1, 8, 8)) == pytest.approx(34560, rel=1e-12)


def test_it_is_a_lipschitz_constant_and_attained(net):
    per_output = path_norm(net, SHAPE, 1, math.inf)
    images = images_of(300)
    assert (
        net(images).abs().amax(1) <= per_output * images.flatten(1).abs().amax(1).clamp(min=1)
    ).all()
    if not any(isinstance(module, nn.MaxPool2d) for module in net.modules()):
        for tensor in [*net.parameters()]:
            tensor.data.abs_()
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.zero_()
        ones = net(torch.ones(1, *SHAPE, dtype=torch.float64))
        assert ones.abs().sum().item() == pytest.approx(path_norm(net, SHAPE), rel=1e-12)


class Block(nn.Module):
    """The basic block of a residual network, as torchvision writes it."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(channels, out, 3, stride, 1), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(out, out, 3, 1, 1), nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(conv(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.conv1, self.bn1, self.relu = (
            conv(3, widths[0], 7, 2, 3),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks = [
            Block(before, width, 1 + (before != width))
            for before, width in zip((widths[0], *widths), widths)
        ]
        self.layers = nn.Sequential(*blocks)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(widths[-1], 5)

    def forward(self, x):
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def test_a_residual_network_of_plain_modules():
    torch.manual_seed(0)
    net = ResNet(4, 4, 8, 8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    norm = path_norm(net, (3, 32, 32))
    assert net.training and all(
        torch.equal(value, state[name]) for name, value in net.state_dict().items()
    )
    assert norm == path_norm(net.eval(), (3, 32, 32))
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
    paths = measure_paths(net, (3, 32, 32))
    assert (paths.path_depth, paths.pool, paths.biased, paths.chain, paths.outputs) == (
        11,
        9,
        True,
        False,
        5,
    )
    assert paths.path_norm == norm
    rescaled = rescale_neurons(net, powers)
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(net(images), rescaled(images))
    assert not torch.equal(net.layers[0].conv1.weight, rescaled.layers[0].conv1.weight)
    assert len(path_magnitude(net, (3, 32, 32))) == 1 + 8 + 1 + 1


@pytest.mark.parametrize('name, expected', [('MLP', (3, 0, True, False)), ('chain', (3, 0, False, True)),
                                            ('max pooling', (3, 9, True, False)), ('dilation', (2, 0, True, False)),
                                            ('residual', (4, 0, True, False)), ('U-net', (5, 9, True, False)),
                                            ('transposed', (2, 0, True, False))])  # fmt: skip
def test_depth_and_kind_of_a_network(name, expected):
    paths = measure_paths(NETWORKS[name](), SHAPE)
    assert (paths.path_depth, paths.pool, paths.biased, paths.chain) == expected


def test_range():
    net = nn.Sequential(*(layer for l in range(50) for layer in (conv(1 if l == 0 else 8, 8, 3, padding=1), nn.ReLU())),
                        nn.Flatten(), nn.Linear(512, 10, bias=False)).double()  # fmt: skip
    torch.manual_seed(0)
    for weight in weights_of(net):
        nn.init.kaiming_normal_(weight)
    values = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    for module in net:  # weights times 4, so that no power underflows
        values = values if isinstance(module, nn.ReLU) else module(values) if isinstance(module, nn.Flatten) else (
            F.conv2d(values, (4 * module.weight.abs()) ** 16, padding=1) if values.dim() == 4 else
            values @ ((4 * module.weight.abs()) ** 16).T)  # fmt: skip
    expected = values.sum().log().item() / 16 - 51 * math.log(4)
    assert math.log(path_norm(net, (1, 8, 8), 16)) == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():
        for weight in weights_of(net):
            weight.mul_(1e-200)
        tiny = path_norm(net[48 * 2 + 1 :], (8, 8, 8))  # two convolutions and the classifier
        assert tiny == 0  # below every float
        net[0].weight.mul_(1e300)
        net[2].weight.mul_(1e300)
        for weight in weights_of(net)[2:]:
            weight.mul_(1e200)
        norm = path_norm(net, (1, 8, 8))
        assert 0 < norm < math.inf
        for weight in weights_of(net):
            weight.mul_(1e200)
        assert path_norm(net, (1, 8, 8)) == math.inf
        net[40].weight.zero_()
        assert path_norm(net, (1, 8, 8)) == 0
        assert all((score == 0).all() for score in path_magnitude(net, (1, 8, 8)).values())


class Forward(nn.Module):
    """A network whose forward pass is the function given."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


TAIL = nn.Flatten(), nn.Linear(18, 2)
REFUSED = {
    'ReLU6': (nn.Sequential(nn.ReLU6(), *TAIL), '0 (ReLU6)'),
    'GELU': (nn.Sequential(nn.GELU(), *TAIL), '0 (GELU)'),
    'group norm': (nn.Sequential(nn.GroupNorm(1, 2), *TAIL), '0 (GroupNorm)'),
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
        Forward(lambda self, x: F.interpolate(x, 2, mode='bilinear', antialias=True)),
        'interpolate: antia',
    ),
    'negative slope': (nn.Sequential(nn.LeakyReLU(-0.1), *TAIL), '0 (LeakyReLU): only slopes'),
    'slope above 1': (Forward(lambda self, x: F.leaky_relu(x, 1.5)), 'leaky_relu: only slopes'),
    'PReLU': (nn.Sequential(nn.PReLU(), *TAIL), '0 (PReLU)'),
    'cat of images': (Forward(lambda self, x: torch.cat([x, x])), 'cat: concatenates images'),
    'part': (
        Forward(lambda self, x: torch.cat([x, x[:, :1]], 1)),
        'getitem: a shape or a part of a value',
    ),
    'stack': (Forward(lambda self, x: torch.stack([x, x], 1)), 'Forward: stack'),
    'mean of channels': (
        Forward(lambda self, x: x.mean(1)),
        'mean: only a mean over all positions',
    ),
    'a computed size': (
        Forward(lambda self, x: F.interpolate(x, x.shape[2:])),
        'write sizes as numbers',
    ),
    'output size': (
        Forward(lambda self, x: self.up(x, output_size=6), up=nn.ConvTranspose2d(2, 2, 2)),
        'more than',
    ),
    'not used': (
        Forward(lambda self, x: (x.flatten(1), x.relu())[0]),
        'relu: its output is not used',
    ),
    'features': (
        nn.Sequential(nn.Flatten(), nn.MaxPool2d(2)),
        '1: does not fit its input of shape (18,)',
    ),
    'softmax': (nn.Sequential(*TAIL, nn.Softmax(1)), '2 (Softmax)'),
    'product': (
        Forward(lambda self, x: self.fc((x * x).flatten(1)), fc=nn.Linear(18, 2)),
        'Forward: mul',
    ),
    'constant': (
        Forward(lambda self, x: self.fc((x + 1).flatten(1)), fc=nn.Linear(18, 2)),
        'Forward: add',
    ),
    'shape': (
        nn.Sequential(nn.Flatten(), nn.Linear(17, 2)),
        '1: does not fit its input of shape (18,)',
    ),
    'in place': (
        Forward(
            lambda self, x: self.fc((x + F.relu(x, inplace=True)).flatten(1)), fc=nn.Linear(18, 2)
        ),
        'relu works',
    ),
    'infinite': (
        nn.Sequential(nn.Flatten(), nn.Linear(18, 2)),
        '1 (Linear): its weights contain NaN',
    ),
    'two outputs': (
        Forward(lambda self, x: (self.fc(x.flatten(1)), x), fc=nn.Linear(18, 2)),
        'output is not the last',
    ),
}
REFUSED['infinite'][0][1].weight.data[0, 0] = math.inf


@pytest.mark.parametrize('case', REFUSED)
def test_what_has_no_paths_is_refused_by_name(case):
    net, message = REFUSED[case]
    with pytest.raises(BadInput) as caught:
        path_norm(net, SHAPE)
    assert message in str(caught.value) and '\n' not in str(caught.value)


class OwnUp(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x) ** 2


def test_a_transposed_convolution_with_a_forward_pass_of_its_own_is_refused():
    own = OwnUp(2, 2, 2)
    with pytest.raises(BadInput, match=r'0 \(OwnUp\) has a forward pass of its own'):
        path_norm(nn.Sequential(own), SHAPE)
    nn.utils.parametrizations.weight_norm(own)
    with pytest.raises(BadInput, match=r'0 \(ParametrizedOwnUp\) has a forward pass of its own'):
        path_norm(nn.Sequential(own), SHAPE)


class UNet(nn.Module):
    """A U-net of the smallest kind, its k-th parameter sin(k)."""

    def __init__(self, up):
        super().__init__()
        self.enc, self.mid, self.up = (
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Conv2d(2, 2, 3, padding=1),
            up,
        )
        self.act, self.pool, self.out = (
            nn.LeakyReLU(0.2),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 1, 3, padding=1),
        )
        self.double()
        vector = torch.nn.utils.parameters_to_vector(self.numbers())
        torch.nn.utils.vector_to_parameters(
            torch.arange(1, len(vector) + 1).double().sin(), self.numbers()
        )

    def numbers(self):
        return [
            number
            for layer in (self.enc, self.mid, self.up, self.out)
            for number in layer.parameters()
        ]

    def forward(self, x):
        skip = self.act(self.enc(x))
        return self.out(torch.cat([skip, self.up(self.act(self.mid(self.pool(skip))))], 1))


# Enumerated over all paths (94,968, 159,276, 48,168, 120,864): l1 norm, l2 norm; and the sum of the outputs on ones.
UNETS = [
    (lambda: nn.ConvTranspose2d(2, 2, 2, stride=2), 5288.80984133, 31.5253561126, -2.50476689569),
    (lambda: nn.ConvTranspose2d(2, 2, 3, 2, 1, 1), 7429.33571655, 34.3863393021, 2.82447077281),
    (lambda: nn.Upsample(scale_factor=2), 3866.78548737, 28.9235017679, -2.28166663649),
    (
        lambda: nn.Upsample(scale_factor=2, mode='bilinear'),
        3866.78548737,
        25.5510544742,
        -2.28166663649,
    ),
]


@pytest.mark.parametrize('up, l1, l2, total', UNETS)
def test_the_path_norms_of_u_nets(up, l1, l2, total):
    net = UNet(up())
    assert path_norm(net, (1, 4, 4)) == pytest.approx(l1, rel=5e-12)
    assert path_norm(net, (1, 4, 4), 2) == pytest.approx(l2, rel=5e-12)
    with torch.no_grad():
        assert net(torch.ones(1, 1, 4, 4).double()).sum().item() == pytest.approx(total, rel=5e-12)
    paths = measure_paths(net, (1, 4, 4))
    assert (paths.path_depth, paths.biased, paths.chain, paths.outputs) == (3, True, False, 16)


def test_the_path_metric_of_a_u_net():
    net = UNet(UNETS[0][0]())
    zeroed, rounded = copy.deepcopy(net), copy.deepcopy(net)
    vector = torch.nn.utils.parameters_to_vector(net.numbers()).detach()
    third = torch.arange(1, len(vector) + 1) % 3 == 0
    torch.nn.utils.vector_to_parameters(vector.masked_fill(third, 0), zeroed.numbers())
    torch.nn.utils.vector_to_parameters(
        vector.sign() * (8 * vector.abs()).floor() / 8, rounded.numbers()
    )
    images = images_of(500, (1, 4, 4))
    for other, expected in ((zeroed, 3975.64166912), (rounded, 1601.48971193)):
        assert path_metric(net, other, (1, 4, 4)) == (pytest.approx(expected, rel=5e-12), True)
        each, _ = path_metric(net, other, (1, 4, 4), outputs=True)
        moved = (net(images) - other(images)).abs().flatten(1)
        size = images.flatten(1).abs().amax(1, keepdim=True).clamp(min=1)
        assert (moved <= each * size).all() and moved.max() > 1


def test_rescaling_a_u_net_leaves_what_reaches_the_cat():
    net = UNet(UNETS[1][0]())
    rescaled = rescale_neurons(net, powers)
    images = images_of(20, (1, 4, 4))
    assert torch.equal(net(images), rescaled(images))
    assert path_norm(net, (1, 4, 4)) == path_norm(rescaled, (1, 4, 4))
    changed = [not torch.equal(*pair) for pair in zip(weights_of(net), weights_of(rescaled))]
    assert changed == [
        False,
        True,
        True,
        False,
    ]  # enc and up reach the cat; mid is read by up, out by nothing


def test_functions_of_a_u_net_in_place_of_modules():
    def forward(self, x):
        skip = F.leaky_relu(self.enc(x), 0.2)
        mid = F.leaky_relu(self.mid(F.avg_pool2d(skip, 2)), 0.2)
        up = F.interpolate(mid, scale_factor=2, mode='bilinear')
        return self.out(torch.concat((skip, up), dim=1))

    net = UNet(nn.Upsample(scale_factor=2, mode='bilinear'))
    functions = Forward(forward, enc=net.enc, mid=net.mid, out=net.out)
    for q in (1, 2):
        assert path_norm(functions, (1, 4, 4), q) == path_norm(net, (1, 4, 4), q)
    assert path_metric(functions, net, (1, 4, 4)) == (0, True)


@pytest.mark.parametrize('mean', [lambda x: x.mean([2, 3]), lambda x: torch.mean(x, dim=(-2, -1)),
                                  lambda x: x.mean((2, 3), keepdim=True).flatten(1)])  # fmt: skip
def test_a_mean_over_positions_is_an_average_pooling(mean):
    body, fc = conv(2, 2, 2), nn.Linear(2, 2)
    net = Forward(lambda self, x: self.fc(mean(self.body(x).relu())), body=body, fc=fc).double()
    pooled = nn.Sequential(body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc)
    for q in (1, 2):
        assert path_norm(net, SHAPE, q) == path_norm(pooled, SHAPE, q)
    rescaled = rescale_neurons(net, powers)
    assert torch.equal(net(images_of(9)), rescaled(images_of(9)))
    assert not torch.equal(rescaled.fc.weight, fc.weight)


def test_functions_in_place_of_modules():
    fc, body = nn.Linear(2, 2), conv(2, 2, 3, padding=1, bias=True)
    modules = nn.Sequential(body, nn.ReLU(), nn.MaxPool2d(2, 1), nn.AvgPool2d(2), nn.Flatten(), fc)

    def forward(self, x):
        x = self.body(x) * self.body(x) if self.training else self.body(x)
        x = F.avg_pool2d(F.max_pool2d(torch.relu(x), 2, stride=1), 2)
        return self.fc(F.dropout(x, 0.5, self.training).reshape(x.shape[0], -1))

    net = Forward(forward, fc=fc, body=body).train()
    assert path_norm(net, SHAPE) == path_norm(modules, SHAPE) and net.training


def test_values_used_twice():
    torch.manual_seed(0)
    body, norm, fc = conv(2, 2, 1), nn.BatchNorm2d(2), nn.Linear(18, 2, bias=False)
    norm.running_mean.normal_()
    doubled = Forward(
        lambda self, x: (lambda y: self.fc((y + y).flatten(1)))(self.body(x)), body=body, fc=fc
    )
    assert path_norm(doubled, SHAPE) == 2 * path_norm(nn.Sequential(body, nn.Flatten(), fc), SHAPE)

    def beside(self, x):  # what a batch norm reads is used beside it, so it is not folded
        x = self.body(x)
        return self.fc((self.norm(self.same(x)) + x).flatten(1))

    expected = path_norm(nn.Sequential(body, nn.Flatten(), fc), SHAPE)
    expected += path_norm(nn.Sequential(body, norm, nn.Flatten(), fc), SHAPE)
    for same in (nn.Identity(), nn.ReLU()):
        assert path_norm(
            Forward(beside, body=body, norm=norm, fc=fc, same=same), SHAPE
        ) == pytest.approx(expected, rel=1e-12)


def test_what_only_looks_covered_is_refused():
    body = conv(2, 2, 3, padding=1)
    noisy = Forward(
        lambda self, x: self.fc(F.dropout(self.body(x), 0.5).flatten(1)),
        fc=nn.Linear(18, 2),
        body=body,
    )
    with pytest.raises(BadInput, match='dropout'):
        path_norm(noisy, SHAPE)
    columns = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2))
    with pytest.raises(BadInput, match='linear layer of maps'):
        path_norm(columns, (3, 3))
    torch.manual_seed(0)
    norm = randomized(nn.Linear(3, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    diagonal = norm[1].weight * (norm[1].running_var + norm[1].eps).rsqrt()
    expected = torch.ones(2, 3, 3).double() @ norm[0].weight.abs().T + norm[0].bias.abs()
    expected = (
        expected * diagonal.abs()[:, None, None]
        + (norm[1].bias - diagonal * norm[1].running_mean).abs()[:, None, None]
    )
    expected = norm[4].weight.abs() @ expected.flatten() + norm[4].bias.abs()
    assert path_norm(norm, SHAPE) == pytest.approx(expected.sum().item(), rel=1e-6)

    positions = nn.Sequential(
        body, nn.ReLU(), nn.Flatten(2), nn.Linear(9, 4), nn.Flatten(), nn.Linear(8, 2)
    )
    x = torch.rand(5, *SHAPE)
    assert torch.equal(rescale_neurons(positions, powers)(x), positions(x))
    positions = nn.Sequential(nn.Linear(3, 4), nn.AvgPool2d(2, 2, 1), nn.Linear(3, 1), nn.Flatten())
    assert torch.equal(rescale_neurons(positions, powers)(x), positions(x))


def test_a_module_used_twice_has_paths_and_no_magnitudes():
    net = Forward(
        lambda self, x: self.fc(self.body(self.body(x).relu()).flatten(1)),
        body=conv(2, 2, 1),
        fc=nn.Linear(18, 2),
    )
    twice = nn.Sequential(net.body, nn.ReLU(), copy.deepcopy(net.body), nn.Flatten(), net.fc)
    assert path_norm(net, SHAPE) == path_norm(twice, SHAPE)
    for function in (lambda: path_magnitude(net, SHAPE), lambda: rescale_neurons(net, powers)):
        with pytest.raises(BadInput, match='body is used twice'):
            function()


@pytest.mark.parametrize('q', [0, -1, math.inf, math.nan])
def test_orders_that_make_no_norm_are_refused(q):
    with pytest.raises(BadInput, match='path-norm wants a positive'):
        path_norm(NETWORKS['chain'](), SHAPE, q)


def test_the_path_bound_against_the_corrected_one():
    """r <= rho_21 sqrt(prod deg c_0), so with one channel the path bound's complexity is at most the corrected bound's."""
    generator = torch.Generator().manual_seed(0)
    for channels, depth, width in itertools.product((1, 2, 3), (1, 2, 3), (1, 4)):
        layers = [conv(channels if l == 0 else width, width, 2) for l in range(depth)]
        side = 8 - depth
        net = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())), nn.Flatten(),
                            nn.Linear(width * side**2, 10, bias=False))  # fmt: skip
        for weight in net.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
        images = torch.rand(50, channels, 8, 8, generator=generator)
        network, data = measure_network(net, (channels, 8, 8)), measure_data(net, images)
        rho_21 = network.b[-1] * network.F[:-1].prod()
        assert network.path_norm <= rho_21 * math.sqrt(network.deg[:-1].prod() * channels)
        assert data.E_coord <= data.E_max <= channels * data.E_coord * (1 + 1e-12)

        complexity = []  # both bounds are 4 (norm + 1) / gamma * complexity and a tail without gamma
        for bound, norm in ((utils.path_bound, network.path_norm), (utils.corrected_bound, rho_21)):
            difference = bound(network, data, 0.001, 1.0) - bound(network, data, 0.001, 2.0)
            complexity.append(2 * difference / (norm + 1) * norm)
        assert complexity[0] <= complexity[1] * math.sqrt(channels)


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
def test_the_smaller_constant_is_for_chains_alone(kind):
    """Without biases; docs/bounds.md proves 2 per layer for chains of ReLU layers and 3 or 5 K for anything else."""
    body, chain = SKIPPING[kind]
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(2, 2, 2, padding=1), nn.ReLU(), *body, nn.Flatten(), nn.Linear(32, 3, bias=False)
    )
    images, labels = torch.rand(40, *SHAPE), torch.arange(40) % 3
    data, paths = measure_data(net, images, skip_uncovered=True), measure_paths(net, SHAPE)
    margins = classification_margins(net(images).detach(), labels)
    bound = utils.evaluate_bounds(net, data, margins, skip_uncovered=True)['path_bound']
    depth, pool = paths.path_depth, kind == 'max pooling'
    if chain:
        log_N = depth * math.log(2) + math.log(18 * 3)
    else:
        log_N = depth * math.log(5 * 9 if pool else 3) + math.log((2.5 if pool else 3) * 19 * 3)
    complexity = 4 * (paths.path_norm + 1) / 40 * math.sqrt(2 * log_N * data.E_coord)
    assert bound == pytest.approx(complexity + utils.tail(paths.path_norm, 40, 0.001), rel=1e-9)
    assert (paths.chain, paths.biased) == (chain, False)


def linear_class(images, generator, draws=5):
    """(1/m) E max over outputs and coordinates of |sum_i xi_ir x_i[u]|: the complexity of x -> W x with sum |W| <= 1."""
    flat, total = images.flatten(1), 0.0
    for _ in range(draws):
        signs = torch.randint(0, 2, (len(flat), 10), generator=generator) * 2.0 - 1
        total += (flat.T @ signs).abs().max().item() / len(flat)
    return total / draws


@pytest.mark.parametrize('name, lower, upper', [('digits', None, None), ('mnist', 0.0081, 0.0125)])
def test_complexity_is_above_that_of_the_linear_class(name, lower, upper, request):
    dataset = request.getfixturevalue(name)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(dataset.input_shape), 10, bias=False))
    data = measure_data(net, dataset.train_images)
    term = math.sqrt(2 * math.log(2 * data.inputs * 10) * data.E_coord) / data.m
    drawn = linear_class(dataset.train_images, torch.Generator().manual_seed(0))
    assert drawn < term
    if upper:
        assert term == pytest.approx(upper, rel=0.01) and drawn == pytest.approx(lower, abs=0.001)


def test_the_reason_why_bounds_do_not_cover_a_network():
    assert not_covered(NETWORKS['chain'](), SHAPE) is None
    assert not_covered(NETWORKS['residual'](), SHAPE).startswith(
        'Sequential: 0 (Conv2d) has a bias'
    )
