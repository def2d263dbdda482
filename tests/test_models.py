"""The networks: their modules, shapes and initialization, and what they refuse."""

import copy

import pytest
import torch
from conftest import ROOT, settings_of
from torch import nn
from torch.nn.utils import parametrize

from conf import BadInput, load_settings
from measures.representations import measure_representations
from measures.trace import trace_layers
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


def test_weight_normalized_conv_keeps_its_modules_and_draws():
    """Checkpoints and shipped results depend on the order of the modules, their keys and the random draws."""
    torch.manual_seed(0)
    first, second = weight_norm(nn.Conv2d(1, 5, 3, 2, 1, bias=False)), nn.ReLU()
    third, fourth = weight_norm(nn.Conv2d(5, 5, 3, 2, 1, bias=False)), nn.ReLU()
    expected = nn.Sequential(
        first, second, third, fourth, nn.Flatten(), nn.Linear(20, 10, bias=False)
    ).state_dict()
    built = build(depth=2, width=5, kernel_size=3, stride=2, padding=1).state_dict()
    assert list(built) == list(expected) and all(
        torch.equal(built[name], expected[name]) for name in built
    )


HIDDEN = {'weight': [], 'batch': ['BatchNorm'], 'none': []}


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('normalization', HIDDEN)
def test_conv_and_mlp(normalization, bias):
    flags = {'depth': 2, 'width': 6, 'normalization': normalization, 'bias': bias}
    batch_norm = HIDDEN[normalization]
    conv, mlp = build(MNIST, 7, **flags), build(MNIST, 7, network='MLP', **flags)
    assert names(conv) == 2 * ['Conv2d', *[f'{name}2d' for name in batch_norm], 'ReLU'] + [
        'Flatten',
        'Linear',
    ]
    assert names(mlp) == ['Flatten'] + 2 * [
        'Linear',
        *[f'{name}1d' for name in batch_norm],
        'ReLU',
    ] + ['Linear']
    for net in (conv, mlp):
        linear = [
            module
            for module in net
            if hasattr(module, 'weight') and not isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        assert net(torch.rand(3, *MNIST)).shape == (3, 7)
        assert [parametrize.is_parametrized(module) for module in linear] == 2 * [
            normalization == 'weight'
        ] + [False]
        assert all((module.bias is not None) == bias for module in linear)
    assert mlp[1].weight.shape == (6, 784) and mlp[-1].weight.shape == (7, 6)


@pytest.mark.parametrize(
    'name, children',
    [('CONVBN', 3 * ['Conv2d', 'BatchNorm2d', 'ReLU']), ('CONVRES', 3 * ['Block'])],
)
@pytest.mark.parametrize(
    'shape, side', [((1, 28, 28), 7), ((3, 32, 32), 8), ((1, 8, 8), 2), ((2, 7, 13), 1)]
)
def test_convbn_and_convres(name, children, shape, side):
    net = build(shape, 12, network=name, depth=3, width=4, **BATCH)
    assert names(net) == ['Stem', *children, 'Flatten', 'Linear']
    assert net(torch.rand(2, *shape)).shape == (2, 12)
    stem = net[0](torch.rand(2, *shape))
    assert stem.shape[:3] == (2, 4, side) and stem.min() == 0
    assert [
        (module.kernel_size, module.stride, module.padding)
        for module in net[0]
        if isinstance(module, nn.Conv2d)
    ] == 2 * [((2, 2), (2, 2), (0, 0))]
    assert names(net[0]) == ['Conv2d', 'BatchNorm2d', 'Conv2d', 'BatchNorm2d', 'ReLU']
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert all(
        (module.kernel_size, module.padding) == ((3, 3), (1, 1)) for module in convolutions[2:]
    )
    assert len(convolutions) == 2 + (3 if name == 'CONVBN' else 6)
    assert all(module.bias is not None for module in convolutions)
    free = build(shape, network=name, depth=3, width=4, normalization='batch')
    linear = [module for module in free.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert all(module.bias is None for module in linear)


def test_residual_blocks_have_a_skip_and_learn_in_both_convolutions():
    torch.manual_seed(0)
    block = Block(4, bias=True)
    x = torch.rand(5, 4, 3, 3)
    block(x).square().sum().backward()
    assert all(
        weight.grad.abs().max() > 0
        for name, weight in block.named_parameters()
        if name not in ('conv1.bias', 'conv2.bias')
    )
    block.eval()
    with torch.no_grad():
        inner = block.conv2(torch.relu(block.bn1(block.conv1(x))))
        torch.testing.assert_close(block(x), torch.relu(block.bn2(x + inner)))
        block.conv2.weight.zero_(), block.conv2.bias.zero_()
        torch.testing.assert_close(block(x), torch.relu(block.bn2(x)))  # what is left is the skip


@pytest.mark.parametrize('name', NETWORKS)
def test_evaluation_mode_treats_each_image_alone(name):
    net = build(network=name, depth=2, width=4, **BATCH)
    images = torch.rand(6, *DIGITS)
    net(images)
    net.eval()
    torch.testing.assert_close(net(images)[:1], net(images[:1]))
    before = copy.deepcopy(net.state_dict())
    net(images)
    assert all(torch.equal(entry, before[key]) for key, entry in net.state_dict().items())


@pytest.mark.parametrize('name', NETWORKS)
def test_layers_are_counted_without_stem_and_classifier(name):
    net = build(network=name, depth=3, width=4, **BATCH)
    images, labels = torch.rand(20, *DIGITS), torch.arange(20) % 10
    sizes = [
        layer['size'] for layer in measure_representations(net, images, labels, images, labels)
    ]
    expected = {'CONV': [64, 4 * 49, 4 * 36, 4 * 25], 'MLP': [64, 4, 4, 4]}
    assert sizes == expected.get(name, [64, 16, 16, 16])


def test_what_the_norm_based_bounds_cover():
    for flags in ({'normalization': 'weight'}, {'normalization': 'none'}):
        layers = trace_layers(build(network='MLP', depth=2, width=4, **flags), DIGITS)
        assert [tuple(layer.kernel.shape) for layer in layers] == [(4, 1, 8, 8), (4, 4, 1, 1), (10, 4, 1, 1)]
    for name, flags in (
        ('MLP', {'bias': True}),
        ('MLP', {'normalization': 'batch'}),
        ('CONVBN', BATCH),
        ('CONVRES', BATCH),
    ):
        with pytest.raises(BadInput):
            trace_layers(build(network=name, depth=2, width=4, **flags), DIGITS)


REFUSED = {
    'small image': ({'depth': 8}, 'depth = 8: an image of 8x8 allows at most 7 convolutions'),
    'stem': (
        {'network': 'CONVBN', 'normalization': 'batch'},
        'an image of 3x9 is too small for its stem',
    ),
    'CONVBN': (
        {'network': 'CONVBN'},
        "normalization = 'weight': CONVBN is made of batch norm.* set normalization = 'batch'",
    ),
    'CONVRES': ({'network': 'CONVRES', 'normalization': 'none'}, "normalization = 'none': CONVRES"),
    'unknown': (
        {'network': 'MPL'},
        r"network = 'MPL': must be one of CONV, MLP, .*did you mean MLP",
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused(case):
    flags, message = REFUSED[case]
    with pytest.raises(BadInput, match=message) as caught:
        build((1, 3, 9) if case == 'stem' else DIGITS, **flags)
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
def test_settings_files_of_this_subject(name, shape, runs):
    settings = load_settings(ROOT / 'conf' / f'{name}.py')[1]
    assert len(settings) == runs
    with torch.device('meta'):
        net = get_network(settings[-1], shape, 10)
    assert (
        sum(getattr(module, 'is_layer', isinstance(module, nn.ReLU)) for module in net)
        == settings[-1].depth
    )
