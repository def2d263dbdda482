"""The networks: their modules, shapes and initialization, and what they refuse."""

import copy

import pytest
import torch
from conftest import ROOT, settings_of
from torch import nn
from torch.nn.utils import parametrize

from conf import BadInput, load_settings
from measures.representations import measure_representations
from models import NETWORKS, get_network
from models.convbn import Block
from models.weight_norm import weight_norm

BATCH = {'normalization': 'batch', 'bias': True}
DIGITS, MNIST = (1, 8, 8), (1, 28, 28)


def build(input_shape=DIGITS, classes=10, **flags):
    torch.manual_seed(0)
    return get_network(settings_of(**flags), input_shape, classes)


def names(net):
    return [type(module).__name__.removeprefix('Parametrized') for module in net]


def modules(net, *kinds):
    return [module for module in net.modules() if isinstance(module, kinds)]


def test_weight_normalized_conv_keeps_its_modules_and_draws():
    """Checkpoints and shipped results depend on the order of modules, their keys and the draws."""
    torch.manual_seed(0)
    first = nn.Conv2d(1, 5, 3, 2, 1, bias=False)
    second = nn.Conv2d(5, 5, 3, 2, 1, bias=False)
    last = nn.Linear(20, 10, bias=False)
    expected = {}
    for index, layer in ((0, first), (2, second)):
        key = f'{index}.parametrizations.weight.original'
        expected |= {f'{key}0': layer.weight.norm(), f'{key}1': layer.weight}
    expected['5.weight'] = last.weight
    built = build(depth=2, width=5, kernel_size=3, stride=2, padding=1).state_dict()
    assert list(built) == list(expected)
    assert all(torch.equal(built[name], expected[name]) for name in built)


def test_a_weight_normalized_layer_of_zeros_stays_zero_and_can_learn():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    weight_norm(layer)
    assert layer.weight.eq(0).all()
    layer(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert layer.weight.isfinite().all() and layer.weight.ne(0).all()
    layer.weight = torch.zeros(2, 3)
    assert layer.weight.eq(0).all()


HIDDEN = {'weight': [], 'batch': ['BatchNorm'], 'none': []}


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('normalization', HIDDEN)
def test_conv_and_mlp(normalization, bias):
    flags = {'depth': 2, 'width': 6, 'normalization': normalization, 'bias': bias}
    conv, mlp = build(MNIST, 7, **flags), build(MNIST, 7, network='MLP', **flags)
    norms = HIDDEN[normalization]
    layer_of_conv = ['Conv2d', *[f'{name}2d' for name in norms], 'ReLU']
    layer_of_mlp = ['Linear', *[f'{name}1d' for name in norms], 'ReLU']
    assert names(conv) == [*layer_of_conv, *layer_of_conv, 'Flatten', 'Linear']
    assert names(mlp) == ['Flatten', *layer_of_mlp, *layer_of_mlp, 'Linear']
    for net in (conv, mlp):
        assert net(torch.rand(3, *MNIST)).shape == (3, 7)
        layers = modules(net, nn.Conv2d, nn.Linear)
        normalized = [parametrize.is_parametrized(layer) for layer in layers]
        assert normalized == 2 * [normalization == 'weight'] + [False]
        assert all((layer.bias is not None) == bias for layer in layers)
    assert mlp[1].weight.shape == (6, 784) and mlp[-1].weight.shape == (7, 6)


@pytest.mark.parametrize(
    'name, children, count',
    [('CONVBN', 3 * ['Conv2d', 'BatchNorm2d', 'ReLU'], 5), ('CONVRES', 3 * ['Block'], 8)],
)
@pytest.mark.parametrize(
    'shape, side', [((1, 28, 28), 7), ((3, 32, 32), 8), ((1, 8, 8), 2), ((2, 7, 13), 1)]
)
def test_convbn_and_convres(name, children, count, shape, side):
    flags = {'network': name, 'depth': 3, 'width': 4, 'normalization': 'batch'}
    net = build(shape, 12, bias=True, **flags)
    assert names(net) == ['Stem', *children, 'Flatten', 'Linear']
    assert names(net[0]) == ['Conv2d', 'BatchNorm2d', 'Conv2d', 'BatchNorm2d', 'ReLU']
    assert net(torch.rand(2, *shape)).shape == (2, 12)
    stem = net[0](torch.rand(2, *shape))
    assert stem.shape[:3] == (2, 4, side) and stem.min() == 0
    convolutions = modules(net, nn.Conv2d)
    geometry = [(layer.kernel_size[0], layer.stride[0], layer.padding[0]) for layer in convolutions]
    assert geometry == 2 * [(2, 2, 0)] + (count - 2) * [(3, 1, 1)]
    assert all(layer.bias is not None for layer in convolutions)
    assert all(layer.bias is None for layer in modules(build(shape, **flags), nn.Conv2d, nn.Linear))


def test_residual_blocks_have_a_skip():
    torch.manual_seed(0)
    block = Block(4, bias=True)
    x = torch.rand(5, 4, 3, 3)
    block.eval()
    with torch.no_grad():
        inner = block.conv2(torch.relu(block.bn1(block.conv1(x))))
        torch.testing.assert_close(block(x), torch.relu(block.bn2(x + inner)))


@pytest.mark.parametrize('name', NETWORKS)
def test_evaluation_mode_treats_each_image_alone(name):
    net = build(network=name, depth=2, width=4, **BATCH)
    images = torch.rand(6, *DIGITS)
    net(images)
    net.eval()
    before = copy.deepcopy(net.state_dict())
    torch.testing.assert_close(net(images)[:1], net(images[:1]))
    assert all(torch.equal(entry, before[key]) for key, entry in net.state_dict().items())


@pytest.mark.parametrize('name', NETWORKS)
def test_layers_are_counted_without_stem_and_classifier(name):
    net = build(network=name, depth=3, width=4, **BATCH)
    images, labels = torch.rand(20, *DIGITS), torch.arange(20) % 10
    found = measure_representations(net, images, labels, images, labels)
    expected = {'CONV': [64, 4 * 49, 4 * 36, 4 * 25], 'MLP': [64, 4, 4, 4]}
    assert [layer['size'] for layer in found] == expected.get(name, [64, 16, 16, 16])


@pytest.mark.parametrize(
    'shape, flags, message',
    [
        (DIGITS, {'depth': 8}, 'depth = 8: an image of 8x8 allows at most 7 convolutions'),
        (DIGITS, {'padding': 2}, 'padding = 2: must be below kernel_size = 2'),
        ((1, 3, 9), {'network': 'CONVBN', **BATCH}, 'an image of 3x9 is too small for its stem'),
        (DIGITS, {'network': 'CONVBN'}, "CONVBN is .* batch norm.* set normalization = 'batch'"),
        (DIGITS, {'network': 'CONVRES', 'normalization': 'none'}, "= 'none': CONVRES is"),
        (DIGITS, {'network': 'MPL'}, "network = 'MPL': must be one of CONV, MLP, .*did you mean"),
    ],
)
def test_refused(shape, flags, message):
    with pytest.raises(BadInput, match=message) as caught:
        build(shape, **flags)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'name, shape, runs',
    [
        ('depth', DIGITS, 12),
        ('comparative', DIGITS, 40),
        ('depth_cifar10', (3, 32, 32), 6),
        ('depth_cifar10_small', (3, 32, 32), 4),
    ],
)
def test_settings_files_describe_networks_that_fit(name, shape, runs):
    settings = load_settings(ROOT / 'conf' / f'{name}.py')[1]
    assert len(settings) == runs
    with torch.device('meta'):
        for run in settings:
            get_network(run, shape, 10)
