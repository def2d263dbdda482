"""What is said of a network's zeros: density, dead channels, spectral gaps and neuron sharing."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import settings_of
from networks import Beside, Forward, Residual, conv, linear, randomized
from torch import nn

from conf import BadInput
from evaluation import evaluate
from measures.masks import (
    density,
    drop_dead,
    hidden_readers,
    masked_density,
    measure_masks,
    neuron_norms,
    sharing,
    topology,
    weight_mask,
)
from measures.norms import measure_data
from measures.trace import folded, folded_layers, not_counted
from models import get_network
from models.weight_norm import set_mask

# ------------------------------------------------------------------------------------------------
# Gaps
# ------------------------------------------------------------------------------------------------


def blocks(*shapes):
    """A weight (right, left) whose graph is complete bipartite graphs of (left, right) nodes."""
    return torch.block_diag(*(torch.ones(right, left) for left, right in shapes))


def complete(left, right):
    """The Ramanujan gap of a complete bipartite graph, whose second singular value is 0."""
    return math.sqrt(left - 1) + math.sqrt(right - 1)


@pytest.mark.parametrize(
    'weight, ramanujan, imdb, weighted',
    [
        # 12 left nodes, 8 right ones: sigma_1 = sqrt(96).
        (2 * torch.ones(8, 3, 2, 2), complete(12, 8), complete(12, 8), 2 * math.sqrt(96)),
        (torch.eye(9), math.nan, math.nan, 0),  # degree 1
        (torch.zeros(4, 5), math.nan, math.nan, math.nan),
        (torch.zeros(0, 5), math.nan, math.nan, math.nan),
        (blocks((3, 3)), complete(3, 3), complete(3, 3), 3),
        (blocks((5, 2)), math.nan, math.nan, math.sqrt(10)),  # a degree of 2
        (blocks((2, 5)), math.nan, math.nan, math.sqrt(10)),
        # A subgraph for each left degree: of 2 nodes or degree 1 it is undefined.
        (
            blocks((5, 3), (6, 4), (2, 5), (3, 1)),
            complete(52 / 16, 52 / 13) - math.sqrt(15),
            (complete(5, 3) + complete(6, 4)) / 2,
            math.sqrt(24) - math.sqrt(15),
        ),
    ],
)
def test_topology_of_known_graphs(weight, ramanujan, imdb, weighted):
    expected = {'ramanujan_gap': ramanujan, 'imdb': imdb, 'weighted_gap': weighted}
    assert topology(weight) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_topology_against_the_adjacency_matrix():
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(10, 6, 2, 2)))
    weight[torch.from_numpy(np.random.default_rng(1).random(weight.shape) < 0.5)] = 0
    weight[3], weight[:, 1, 0, 1] = 0, 0  # nodes without an edge
    edges = [
        (i * 4 + a * 2 + b, 24 + o, weight[o, i, a, b].item())
        for o, i, a, b in weight.nonzero().tolist()
    ]
    nodes = sorted({node for edge in edges for node in edge[:2]})
    plain, weighted = np.zeros((2, len(nodes), len(nodes)))
    for left, right, value in edges:
        at = nodes.index(left), nodes.index(right)
        plain[at] = plain[at[::-1]] = 1
        weighted[at] = weighted[at[::-1]] = abs(value)
    left = sum(node < 24 for node in nodes)
    # Each singular value twice, with both signs.
    sigma = sorted(abs(np.linalg.eigvalsh(plain)))[::-2]
    gap = complete(len(edges) / left, len(edges) / (len(nodes) - left)) - sigma[1]
    measured = topology(weight)
    assert measured['ramanujan_gap'] == pytest.approx(gap, rel=1e-9)
    sigma = np.linalg.eigvalsh(weighted)[::-1]
    assert measured['weighted_gap'] == pytest.approx(sigma[0] - sigma[1], rel=1e-9)
    assert not math.isclose(measured['imdb'], gap)
    with pytest.raises(BadInput, match='finite'):
        topology(torch.full((3, 4), torch.nan))


# ------------------------------------------------------------------------------------------------
# Density and dead channels
# ------------------------------------------------------------------------------------------------


def test_density_counts_masks(digits):
    net = get_network(settings_of(depth=2, width=4), digits.input_shape, 10)
    assert density(net) == masked_density(net) == 1 and weight_mask(net[0]) is None
    net = get_network(settings_of(depth=2, width=4, prune_rounds=1), digits.input_shape, 10)
    assert density(net) == 1 and weight_mask(net[0]).all()
    mask, total = torch.ones(4, 4, 2, 2, dtype=torch.bool), 16 + 64 + 10 * 4 * 36
    mask[:, 1] = False
    set_mask(net[2], mask)
    assert density(net) == (total - 16) / total
    mask[0, 1] = True  # kept, but they start at 0
    set_mask(net[2], mask)
    assert net[2].weight[0, 1].eq(0).all()
    assert density(net) == masked_density(net) == (total - 12) / total
    assert [entry['density'] for entry in measure_masks(net).values()] == [1, (64 - 12) / 64, 1]
    settings = settings_of(depth=2, width=4, prune_rounds=1, prune_layers='conv')
    net = get_network(settings, digits.input_shape, 10)
    assert masked_density(net) == 1
    set_mask(net[2], mask)
    assert masked_density(net) == (16 + 64 - 12) / (16 + 64) < density(net)
    with pytest.raises(BadInput, match='weights'):
        density(nn.ReLU())


def dead_channels(net):
    return [entry['dead_channels'] for entry in measure_masks(net).values()]


def test_dead_channels_of_a_chain():
    layers = [nn.Conv2d(1, 5, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 2), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(6 * 4, 7), nn.ReLU(), nn.Linear(7, 3)]
    net = nn.Sequential(*layers)
    with torch.no_grad():
        net[0].weight[1], net[3].weight[:, 1] = 0, 0  # dead in both ways, counted once
        net[3].weight[:, 4] = 0  # feeds nothing
        net[3].weight[2] = 0
        net[6].weight[:, 5 * 4 : 6 * 4] = 0  # channel 5 feeds nothing
        net[6].weight[:, 2:19] = 0  # channels 1 to 3, and parts of 0 and 4
        net[6].weight[3] = 0
        net[8].weight[1] = 0
    assert dead_channels(net) == [2, 4, 1, 1]


def test_dead_channels_beside_skips_and_groups():
    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.last((x + 0.5 * self.inner(x)).mean((2, 3)))

    layers = {'stem': nn.Conv2d(3, 4, 1), 'inner': nn.Conv2d(4, 4, 3, padding=1, groups=2)}
    net = Forward(forward, **layers, last=nn.Linear(4, 2))
    with torch.no_grad():
        # The second group's second channel: channel 3, which the skip still feeds.
        net.inner.weight[2:, 1] = 0
        assert dead_channels(net) == [0, 0, 0]
        net.last.weight[:, 3] = 0
    assert dead_channels(net) == [1, 1, 0]
    net.function = lambda self, x: forward(self, x if x.sum() > 0 else -x)
    assert all(math.isnan(dead) for dead in dead_channels(net))
    assert [entry['density'] for entry in measure_masks(net).values()] == [1, 1, 1]


def test_dead_channels_of_transposed_convolutions():
    up = nn.ConvTranspose2d(4, 6, 2, groups=2)
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), up, nn.ReLU(), nn.Conv2d(6, 1, 1))
    with torch.no_grad():
        up.weight[1] = 0  # channel 1 is not read
        up.weight[2:, 2] = 0  # the second group's last filter
        net[4].weight[:, 0] = 0
    assert dead_channels(net) == [1, 2, 0]
    weight = torch.zeros(6, 2, 2, 2)
    for channel in range(6):
        for c in range(2):
            weight[channel, c] = up.weight[channel // 3 * 2 + c, channel % 3]
    expected = {'density': 1, 'dead_channels': 2} | topology(weight)
    assert measure_masks(net)['2'] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    'forward',
    [
        lambda self, x: self.last(torch.cat([x, self.a(x)], 1).flatten(1)),
        lambda self, x: self.last(torch.stack([x, self.a(x)], 1).flatten(1)),
        lambda self, x: self.last(self.a(x).roll(1, 1).flatten(1)),
        lambda self, x: self.last(self.a(x).flatten(2)),
        lambda self, x: self.last(self.a(x)),
    ],
    ids=['cat', 'stack', 'roll', 'positions', 'columns'],
)
def test_where_channels_lose_their_order_none_is_called_dead(forward):
    net = Forward(forward, a=nn.Conv2d(2, 2, 1), last=nn.Linear(16, 3))
    dead, last = dead_channels(net)
    assert math.isnan(dead) and last == 0 and not hidden_readers(net)


def test_weights_that_are_not_counted_are_refused_by_name():
    others = nn.Sequential(nn.Linear(3, 3), nn.Embedding(4, 3), nn.MultiheadAttention(4, 1))
    for function in (density, measure_masks):
        with pytest.raises(BadInput, match=r'1 \(Embedding\), 2 \(MultiheadAttention\) holds'):
            function(others)
    shared = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    shared[2].weight = shared[0].weight
    with pytest.raises(BadInput, match='0 and 2 share a parameter'):
        density(shared)
    shared[2] = shared[0]  # a module is counted once
    assert density(shared) == 1 and len(measure_masks(shared)) == 1


def test_a_chain_is_known_from_its_readers():
    layers = [nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2), nn.GELU()]
    chain = nn.Sequential(*layers, nn.Linear(2, 2))
    assert list(hidden_readers(chain).items()) == [(chain[0], chain[3]), (chain[3], chain[5])]
    for name, count in (('CONVRES', 0), ('CONVBN', 5)):
        settings = settings_of(normalization='batch', width=4, network=name)
        assert len(hidden_readers(get_network(settings, (1, 8, 8), 10))) == count
    groups = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2))

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.left(x) + self.right(x)

    apart = Forward(forward, first=nn.Linear(3, 4), left=nn.Linear(4, 2), right=nn.Linear(4, 2))
    for net in (groups, apart, nn.Sequential(Beside(conv(2, 2, 1)), conv(4, 2, 1))):
        assert not hidden_readers(net)


# ------------------------------------------------------------------------------------------------
# Neurons that are shared
# ------------------------------------------------------------------------------------------------


def test_neuron_norms_by_loops(digits):
    net = get_network(settings_of(depth=2, width=3), digits.input_shape, 10)
    first, second, last = (net[index].weight.detach().double() for index in (0, 2, 5))
    norms = neuron_norms(net, digits.input_shape)
    pairs = (first, second), (second, last.reshape(10, 3, 6, 6))
    assert len(norms) == 2
    for (inc, out, per), (weight, following) in zip(norms, pairs):
        for k in range(3):
            assert inc[k].item() == pytest.approx(weight[k].norm().item(), rel=1e-12)
            assert out[k].item() == pytest.approx(following[:, k].norm().item(), rel=1e-12)
            norms_of = [following[d, k].norm().item() for d in range(len(following))]
            assert per[:, k].tolist() == pytest.approx(norms_of, rel=1e-12)


def two_layers(incoming, outgoing):
    """A linear network of two layers with these weights."""
    incoming, outgoing = torch.tensor(incoming), torch.tensor(outgoing)
    layers = linear(*incoming.shape[::-1]), nn.ReLU(), linear(*outgoing.shape[::-1])
    net = nn.Sequential(nn.Flatten(), *layers)
    with torch.no_grad():
        net[1].weight.copy_(incoming)
        net[3].weight.copy_(outgoing)
    return net


def test_sharing_of_a_known_network():
    incoming = [[4.0, 0.0], [0.0, 2.0], [-1.0, -1.0], [1e-4, 0.0]]
    net = two_layers(incoming, [[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 3.0, 0.0]])
    # inc * out: 4 sqrt(2), 2, 3 sqrt(2) and 1e-4 sqrt(2), the last one inactive.
    expected = {'active': 3, 'participation': (2 + 1 + 1) / 3}
    assert sharing(net, (1, 1, 2)) == [pytest.approx(expected)]
    with torch.no_grad():
        net[3].weight[1, 0] = 0.5
    expected['participation'] = (1.25**2 / (1 + 0.5**4) + 1 + 1) / 3
    assert sharing(net, (1, 1, 2)) == [pytest.approx(expected)]
    with torch.no_grad():
        net[3].weight.zero_()
    (layer,) = sharing(net, (1, 1, 2))
    assert layer['active'] == 0 and math.isnan(layer['participation'])
    # Channels of inc * out = 1, 1.1e-3 and 0.9e-3: two are above a thousandth.
    net = two_layers([[1.0, 0.0], [0.0, 1.1], [0.9, 0.0]], [[1.0, 1e-3, 1e-3]])
    assert sharing(net, (1, 1, 2))[0]['active'] == 2
    with pytest.raises(BadInput, match='bias'):
        sharing(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (1, 8, 8))


# ------------------------------------------------------------------------------------------------
# Without dead channels
# ------------------------------------------------------------------------------------------------


def widths(net):
    return [len(module.weight) for module in net if hasattr(module, 'weight')]


def test_channels_that_only_a_dropped_channel_reads_go_too():
    """Nothing reads channel 1 of the third layer; it alone reads channels 2 and 3 of the second.

    These alone read channels 0 and 4 of the first.
    """
    layers = [linear(*pair) for pair in itertools.pairwise((3, 5, 4, 3, 2))]
    modules = [module for layer in layers for module in (layer, nn.ReLU())]
    net, images = randomized(nn.Flatten(), *modules[:-1]), torch.rand(20, 1, 1, 3).double()
    with torch.no_grad():
        layers[3].weight[:, 1] = 0
        layers[2].weight[[[0], [2]], [2, 3]] = 0
        layers[1].weight[:2, [0, 4]] = 0
        small = drop_dead(net)
        assert widths(small) == [3, 2, 2, 2] and small[1].weight.equal(layers[0].weight[1:4])
        assert torch.allclose(small(images), net(images), rtol=0, atol=1e-14)


def test_a_smaller_network_with_biases_and_padding():
    settings = settings_of(network='CONVBN', depth=3, width=8, normalization='batch')
    net = randomized(*get_network(settings, (1, 16, 16), 10))
    images = torch.rand(50, 1, 16, 16).double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[::2] = 0
        small = drop_dead(net)
        assert torch.allclose(small(images), net(images), atol=1e-12)
    assert 4 <= min(widths(small)[:-1]) < max(widths(small)[:-1])
    convolutions = [module for module in small if isinstance(module, nn.Conv2d)]
    assert all(module.bias is not None for module in convolutions)
    assert {module.padding for module in convolutions} > {(0, 0)}


@pytest.mark.filterwarnings('ignore:Initializing zero-element')
def test_conversions_copy_and_refuse_what_is_no_chain():
    """Zeroing what they return changes nothing, of a float64 network either."""
    layers = conv(1, 4, 3, bias=True), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    net = randomized(*layers)
    before = [tensor.clone() for tensor in net.state_dict().values()]
    for result in (drop_dead(net), folded(net)):
        for parameter in result.parameters():
            parameter.data.zero_()
    for layer in folded_layers(net):
        layer.weight.zero_(), layer.bias.zero_()
    assert all(map(torch.equal, before, net.state_dict().values()))
    empty = nn.Sequential(nn.Flatten(), nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3))
    for net, message in (
        (nn.Sequential(Residual(conv(1, 1, 1)), conv(1, 1, 1)), 'add: does not read'),
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 3), nn.LeakyReLU(0.1)), r'2 \(LeakyReLU\)'),
        (nn.Sequential(nn.ReLU()), 'no Conv2d or Linear'),
        (empty, r'1 \(Linear\), 3 \(Linear\) has no weights'),
    ):
        with pytest.raises(BadInput, match=message):
            drop_dead(net)


def test_a_network_whose_weights_are_not_counted_has_no_density(digits):
    def forward(self, x):
        return self.fc(x.flatten(1))

    net = Forward(forward, fc=linear(64, 10), table=nn.Embedding(3, 2))
    data = measure_data(net, digits.train_images)
    row = evaluate(net, settings_of(certify_every=0), digits, data, 0, 0)
    assert 'density' not in row and row['test_error'] > 0 and 'Embedding' in not_counted(net)
    del net.table
    assert evaluate(net, settings_of(certify_every=0), digits, data, 0, 0)['density'] == 1
    assert not_counted(net) is None
