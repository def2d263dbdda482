"""What is said of a network's zeros: density, dead channels, spectral gaps and neuron sharing."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import settings_of
from torch import nn

from conf import BadInput
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
from models import get_network
from models.weight_norm import set_mask
from studies.compress import load, save


def blocks(*shapes):
    """A weight (right, left) whose graph is complete bipartite graphs of (left, right) nodes, side by side."""
    return torch.block_diag(*(torch.ones(right, left) for left, right in shapes))


def test_topology_of_known_graphs():
    complete = topology(
        2 * torch.ones(8, 3, 2, 2)
    )  # 12 left nodes, 8 right ones: sigma_1 = sqrt(96), sigma_2 = 0
    assert complete['ramanujan_gap'] == pytest.approx(math.sqrt(7) + math.sqrt(11), abs=1e-9)
    assert complete['imdb'] == pytest.approx(complete['ramanujan_gap'], abs=1e-9)
    assert complete['weighted_gap'] == pytest.approx(2 * math.sqrt(96), abs=1e-9)
    matching = topology(torch.eye(9))  # degree 1
    assert (
        math.isnan(matching['ramanujan_gap'])
        and math.isnan(matching['imdb'])
        and matching['weighted_gap'] == 0
    )
    assert all(math.isnan(value) for value in topology(torch.zeros(4, 5)).values())
    assert topology(blocks((3, 3)))['ramanujan_gap'] == pytest.approx(2 * math.sqrt(2), abs=1e-9)
    assert all(
        math.isnan(topology(blocks(shape))['ramanujan_gap']) for shape in ((5, 2), (2, 5))
    )  # a degree of 2
    # One subgraph for each left degree: complete graphs of degrees 3 and 4; of 2 nodes or degree 1 it is undefined.
    parts = topology(blocks((5, 3), (6, 4), (2, 5), (3, 1)))
    expected = [math.sqrt(3 - 1) + math.sqrt(5 - 1), math.sqrt(4 - 1) + math.sqrt(6 - 1)]
    assert parts['imdb'] == pytest.approx(np.mean(expected), abs=1e-9)


def test_topology_against_the_adjacency_matrix():
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(10, 6, 2, 2)))
    weight[torch.from_numpy(np.random.default_rng(1).random(weight.shape) < 0.5)] = 0
    weight[3], weight[:, 1, 0, 1] = 0, 0  # nodes without an edge
    kernel = weight.numpy()
    edges = [
        (i * 4 + a * 2 + b, 24 + o, kernel[o, i, a, b])
        for o, i, a, b in np.ndindex(kernel.shape)
        if kernel[o, i, a, b]
    ]
    nodes = sorted({node for edge in edges for node in edge[:2]})
    plain, weighted = np.zeros((2, len(nodes), len(nodes)))
    for left, right, value in edges:
        at = nodes.index(left), nodes.index(right)
        plain[at] = plain[at[::-1]] = 1
        weighted[at] = weighted[at[::-1]] = abs(value)
    left = sum(node < 24 for node in nodes)
    sigma = sorted(abs(np.linalg.eigvalsh(plain)))[
        ::-2
    ]  # each singular value twice, with both signs
    gap = (
        math.sqrt(len(edges) / left - 1)
        + math.sqrt(len(edges) / (len(nodes) - left) - 1)
        - sigma[1]
    )
    measured = topology(weight)
    assert measured['ramanujan_gap'] == pytest.approx(gap, rel=1e-9)
    sigma = np.linalg.eigvalsh(weighted)[::-1]
    assert measured['weighted_gap'] == pytest.approx(sigma[0] - sigma[1], rel=1e-9)
    assert not math.isclose(measured['imdb'], gap)
    with pytest.raises(BadInput, match='finite'):
        topology(torch.full((3, 4), torch.nan))


def test_density_counts_masks(digits):
    net = get_network(settings_of(depth=2, width=4), digits.input_shape, 10)
    assert density(net) == masked_density(net) == 1 and weight_mask(net[0]) is None
    net = get_network(settings_of(depth=2, width=4, prune_rounds=1), digits.input_shape, 10)
    assert density(net) == 1 and weight_mask(net[0]).all()
    mask = torch.ones(4, 4, 2, 2, dtype=torch.bool)
    mask[:, 1] = False
    set_mask(net[2], mask)
    total = 16 + 64 + 10 * 4 * 36
    assert density(net) == (total - 16) / total
    mask[0, 1] = True  # they live, and start at 0
    set_mask(net[2], mask)
    assert net[2].weight[0, 1].eq(0).all() and density(net) == (total - 12) / total
    assert [entry['density'] for entry in measure_masks(net).values()] == [1, (64 - 12) / 64, 1]
    assert masked_density(net) == density(net)
    net = get_network(
        settings_of(depth=2, width=4, prune_rounds=1, prune_layers='conv'), digits.input_shape, 10
    )
    assert masked_density(net) == 1
    set_mask(net[2], mask)
    assert masked_density(net) == (16 + 64 - 12) / (16 + 64) < density(net)
    with pytest.raises(BadInput, match='weights'):
        density(nn.ReLU())


def test_dead_channels_of_a_chain():
    net = nn.Sequential(
        *(
            nn.Conv2d(1, 5, 2),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 6, 2, groups=1),
            nn.ReLU(),
        ),
        *(nn.Flatten(), nn.Linear(6 * 4, 7), nn.ReLU(), nn.Linear(7, 3)),
    )
    with torch.no_grad():
        net[0].weight[1], net[3].weight[:, 1] = 0, 0  # dead in both ways, counted once
        net[3].weight[:, 4] = 0  # feeds nothing
        net[3].weight[2] = 0
        net[6].weight[:, 5 * 4 : 6 * 4] = 0  # channel 5 feeds nothing
        net[6].weight[:, 2:19] = 0  # channels 1 to 3, and parts of 0 and 4
        net[6].weight[3] = 0
        net[8].weight[1] = 0
    assert [entry['dead_channels'] for entry in measure_masks(net).values()] == [2, 4, 1, 1]


def test_dead_channels_beside_skips_and_groups():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.last = (
                nn.Conv2d(3, 4, 1),
                nn.Conv2d(4, 4, 3, padding=1, groups=2),
                nn.Linear(4, 2),
            )

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.last((x + 0.5 * self.inner(x)).mean((2, 3)))

    net = Block()
    with torch.no_grad():
        net.inner.weight[2:, 1] = (
            0  # the second group's second channel: channel 3, which the skip still feeds
        )
    assert [entry['dead_channels'] for entry in measure_masks(net).values()] == [0, 0, 0]
    with torch.no_grad():
        net.last.weight[:, 3] = 0
    assert [entry['dead_channels'] for entry in measure_masks(net).values()] == [1, 1, 0]

    class Branching(Block):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    measured = measure_masks(Branching())
    assert len(measured) == 3
    assert all(
        math.isnan(entry['dead_channels']) and entry['density'] == 1 for entry in measured.values()
    )


def test_neuron_norms_by_loops(digits):
    net = get_network(settings_of(depth=2, width=3), digits.input_shape, 10)
    first, second, last = (net[index].weight.detach().double().numpy() for index in (0, 2, 5))
    norms = neuron_norms(net, digits.input_shape)
    assert len(norms) == 2
    for (inc, out, per), weight, following in zip(
        norms, (first, second), (second, last.reshape(10, 3, 6, 6))
    ):
        for k in range(3):
            assert inc[k].item() == pytest.approx(math.sqrt((weight[k] ** 2).sum()), rel=1e-12)
            assert out[k].item() == pytest.approx(
                math.sqrt((following[:, k] ** 2).sum()), rel=1e-12
            )
            for d in range(len(following)):
                assert per[d, k].item() == pytest.approx(
                    math.sqrt((following[d, k] ** 2).sum()), rel=1e-12
                )


def test_sharing_of_a_known_network():
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False)
    )
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 2.0], [-1.0, -1.0], [1e-4, 0.0]]))
        net[3].weight.copy_(
            torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 3.0, 0.0]])
        )
    images = torch.rand(450, 1, 1, 2)
    (layer,) = sharing(net, images)
    # inc * out: 4 sqrt(2), 2, 3 sqrt(2) and 1e-4 sqrt(2), the last one inactive; the third never fires on positive images
    assert (layer['K'], layer['active'], layer['dead']) == (4, 3, 1)
    assert layer['feeds'] == pytest.approx((2 + 1 + 1) / 3) and layer[
        'participation'
    ] == pytest.approx((2 + 1 + 1) / 3)
    assert layer['path'] == pytest.approx(7.0001 * math.sqrt(2) + 2)
    ratios = [math.log2(4 / math.sqrt(2)), 1, math.log2(math.sqrt(2) / 3)]
    assert layer['balance'] == pytest.approx((np.mean(ratios), np.std(ratios)))
    with torch.no_grad():
        net[3].weight[1, 0] = 0.5
    assert sharing(net, images)[0]['participation'] == pytest.approx(
        ((1.25**2) / (1 + 0.5**4) + 1 + 1) / 3
    )
    assert sharing(net, torch.zeros(2, 1, 1, 2))[0]['dead'] == 4
    with torch.no_grad():
        net[3].weight.zero_()
    layer = sharing(net, images)[0]
    assert layer['active'] == 0 and math.isnan(layer['participation'])


def test_sharing_counts_what_is_active_and_what_is_fed_by_thousandths():
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 4, bias=False)
    )
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1000.0, 0.0], [0.0, 0.0, 1.0]]))
        # Channels of inc * out = 1, 1.1e-3 and 0.9e-3: two are active. The second feeds three outputs, by its own largest.
        outgoing = torch.tensor(
            [[1.0, 1.1e-6, 0.9e-3], [1.1e-3, 1.2e-9, 0.0], [0.9e-3, 1.2e-9, 0.0], [0.0, 1e-9, 0.0]]
        )
        net[3].weight.copy_(outgoing)
    (layer,) = sharing(net, torch.rand(5, 1, 1, 3))
    assert (layer['active'], layer['feeds']) == (2, (2 + 3) / 2)


def test_a_convolution_that_is_0_everywhere_is_dead():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2, bias=False)
    )
    images = torch.zeros(4, 1, 3, 3)
    images[1, 0, 2, 1] = 1.0  # one position of one image is enough
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 0.0, -1.0])[:, None, None, None].expand(3, 1, 2, 2))
    assert sharing(net, images)[0]['dead'] == 2


def test_a_chain_is_known_from_its_readers():
    chain = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2), nn.ReLU(), nn.Linear(2, 2)
    )
    assert list(hidden_readers(chain).items()) == [(chain[0], chain[3]), (chain[3], chain[5])]
    for flags in ({'network': 'CONVRES'}, {'network': 'CONVBN'}):
        net = get_network(settings_of(normalization='batch', width=4, **flags), (1, 8, 8), 10)
        assert len(hidden_readers(net)) == (4 if flags['network'] == 'CONVBN' else 0) + (
            flags['network'] == 'CONVBN'
        )
    assert not hidden_readers(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2))
    )

    class Apart(nn.Module):
        """Two layers read the first, and their sum is the output."""

        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.left(x) + self.right(x)

    assert not hidden_readers(Apart())


def test_sharing_refuses_what_it_does_not_cover(digits):
    net = get_network(settings_of(depth=2, width=3), digits.input_shape, 10)
    with pytest.raises(BadInput, match='finite'):
        sharing(net, torch.full((2, *digits.input_shape), torch.nan))
    with pytest.raises(BadInput, match='height'):
        sharing(net, digits.train_images[0])
    with pytest.raises(BadInput, match='bias'):
        sharing(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), digits.train_images)
    fires = (net[0](digits.train_images) > 0).any(3).any(2).any(0)
    assert sharing(net, digits.train_images)[0]['dead'] == (~fires).sum()
    assert not net[0]._forward_hooks


def widths(net):
    return [len(module.weight) for module in net if hasattr(module, 'weight')]


def test_channels_that_only_a_dropped_channel_reads_go_too():
    """Nothing reads channel 1 of the third layer; it alone reads channels 2 and 3 of the second, these 0 and 4 of the first."""
    torch.manual_seed(0)
    sizes = (3, 5, 4, 3, 2)
    layers = [nn.Linear(*pair, bias=False) for pair in itertools.pairwise(sizes)]
    net = nn.Sequential(
        nn.Flatten(), *(module for layer in layers for module in (layer, nn.ReLU()))
    )[:-1].double()
    with torch.no_grad():
        layers[3].weight[:, 1] = 0
        layers[2].weight[[[0], [2]], [2, 3]] = 0
        layers[1].weight[:2, [0, 4]] = 0
        small, images = drop_dead(net), torch.rand(20, 1, 1, 3, dtype=torch.double)
        assert widths(small) == [3, 2, 2, 2] and small[1].weight.equal(layers[0].weight[1:4])
        assert torch.allclose(small(images), net(images), rtol=0, atol=1e-14)


def test_a_smaller_network_with_biases_and_padding_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    net = get_network(
        settings_of(network='CONVBN', depth=3, width=8, normalization='batch'), (1, 16, 16), 10
    ).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[::2] = 0
            elif isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2)
        small, images = drop_dead(net), torch.rand(50, 1, 16, 16)
        save(tmp_path / 'dead.pt', small, (1, 16, 16))
        loaded = load(tmp_path / 'dead.pt')
        assert torch.equal(loaded(images), small(images)) and torch.allclose(
            loaded(images), net(images), atol=1e-5
        )
    assert widths(loaded) == widths(small) and 4 <= min(widths(loaded)[:-1]) < max(
        widths(loaded)[:-1]
    )
    convolutions = [module for module in loaded if isinstance(module, nn.Conv2d)]
    assert all(module.bias is not None for module in convolutions) and {
        module.padding for module in convolutions
    } > {(0, 0)}
