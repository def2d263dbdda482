"""studies/falsify.py: what it refutes and what not, on the digits, on MNIST, and by enumeration."""

import csv
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import utils
from conf import BadInput
from measures.norms import measure_data, measure_network
from studies import falsify as study

OURS = 'our_bound'
OF_THE_FORM = {
    'our_bound': 'Frobenius',
    'golowich_bound': 'Toeplitz',
    'corrected_bound': 'group',
    'path_bound': 'path',
}


def shipped():
    with (ROOT / 'results' / 'falsify' / 'falsify.csv').open() as file:
        return list(csv.DictReader(file))


def estimate(depth, m, E_max, classes=10):
    """The right side that Figure 1 evaluates for CONV-`depth` at rho = 1, with deg = 4."""
    logs = (depth + 1) * math.log(2) + depth * math.log(4) + math.log(classes)
    return (1 + math.sqrt(2 * logs)) * math.sqrt(4**depth * E_max) / m


def box_bound(images, depth, classes=10):
    """The proven lower bound of a box filter in each layer, straight from its formula."""
    maps = images.double()
    for _ in range(depth):
        maps = 2 * F.avg_pool2d(maps, 2, stride=1)  # a 2 x 2 filter of four 1/2
    z = maps.flatten(1)
    t, gram = z.square().sum(), z.T @ z
    r2 = (gram.square().sum() - z.square().sum(1).square().sum()) / t**2
    assert r2 <= 1
    return (classes * t / (1 + 2 * r2 / classes)).sqrt().item() / len(images)


def networks(images, depth, classes=10):
    kernels = study.kernels_for(images, depth)
    return {
        name: study.network_of(layers, images.shape[1:], classes)
        for name, layers in kernels.items()
    }


@pytest.mark.long
def test_figure_1s_estimate_is_false_on_mnist(mnist):
    """CONV-3, the depth of the shipped Figure 1."""
    images = mnist.train_images
    net = networks(images, 3)['box']
    (row,), _ = study.falsify([OURS], {'box': net}, images, 10)
    lower = box_bound(images, 3)
    assert lower >= 0.789 and row['proven'] == pytest.approx(lower, rel=1e-9)
    E_max = images.double().square().sum((0, 1)).max().item()
    right = estimate(3, 60000, E_max)
    assert right <= 0.1204 and row['complexity'] == pytest.approx(right, rel=1e-9)
    assert row['verdict'] == 'refuted (proven)'
    (quoted,) = (line for line in shipped() if (line['bound'], line['depth']) == (OURS, '3'))
    assert float(quoted['proven']) >= lower
    assert float(quoted['complexity']) == pytest.approx(right, rel=1e-9)


def test_the_shipped_table_refutes_figure_1s_estimate_at_every_depth():
    rows = {(row['bound'], int(row['depth'])): row for row in shipped()}
    assert set(rows) == set(itertools.product(OF_THE_FORM, range(1, 13)))
    for (name, depth), row in rows.items():
        assert row['norm'] == OF_THE_FORM[name]
        complexity, proven = float(row['complexity']), float(row['proven'])
        if name == OURS:
            assert complexity == pytest.approx(estimate(depth, 60000, 29038.2855), rel=1e-6)
            assert complexity < proven and row['verdict'] == study.PROVEN
        else:
            drawn = float(row['monte_carlo']) - 3 * float(row['standard_error'])
            assert complexity > max(proven, drawn) and row['verdict'] == study.OPEN


@pytest.mark.parametrize('depth', [1, 2, 4])
def test_verdicts_on_the_digits(digits, depth):
    images = digits.train_images
    names = [*OF_THE_FORM, *study.OTHER_FORMS]
    rows, others = study.falsify(names, networks(images, depth), images, 10)
    assert {row['bound']: row['norm'] for row in rows} == OF_THE_FORM
    assert others == study.OTHER_FORMS
    for row in rows:
        is_ours = row['bound'] == OURS
        assert row['verdict'] == (study.PROVEN if is_ours else study.OPEN)
        if is_ours:
            assert row['proven'] >= box_bound(images, depth)
            E_max = measure_data(networks(images, 1)['tap'], images).E_max
            assert row['complexity'] == pytest.approx(estimate(depth, len(images), E_max))


def enumerated(norm, net, images, classes):
    """R for this network's hidden layers: the mean over all signs of the best classifier's sum."""
    network = measure_network(net, images.shape[1:])
    z = net[:-1](images.double()).view(len(images), -1, int(network.p[-2]))
    absolute = [layer.weight.abs() for layer in net if isinstance(layer, nn.Conv2d)]
    path = torch.ones_like(images[:1]).double()
    for weight in absolute:
        path = F.conv2d(path, weight)
    path = path.view(z.shape[1:])
    hidden = {'Toeplitz': np.prod(network.T[:-1]), 'path': 1}.get(norm, np.prod(network.F[:-1]))
    total = []
    for signs in itertools.product((-1.0, 1.0), repeat=len(images) * classes):
        sums = torch.einsum('ci,ikp->ckp', torch.tensor(signs).view(classes, -1).double(), z)
        if norm == 'group':
            total.append(sums.norm(dim=1).max().item())
        elif norm == 'path':
            total.append((sums.abs() / path).max().item())
        else:
            total.append(sums.norm().item())
    return np.mean(total) / len(images) / hidden


@pytest.mark.parametrize('norm', study.NORMS)
@torch.no_grad()
def test_lower_bounds_are_below_the_enumerated_complexity(digits, norm):
    images, classes = digits.train_images[:4], 2
    generator = torch.Generator().manual_seed(0)
    kernels = [torch.randn(1, 1, 2, 2, generator=generator).double().abs() for _ in range(2)]
    net = study.network_of(kernels, images.shape[1:], classes)
    proven, _, mean, error = study.lower_bounds(net, images, classes)[norm]
    exact = enumerated(norm, net, images, classes)
    assert proven < exact and (norm in ('group', 'path') or proven > 0.7 * exact)
    assert abs(mean - exact) < 4 * error


def scaled(bound, factor):
    return lambda network, data, delta, gamma: factor * bound(network, data, delta, gamma)


def test_a_bound_of_the_users_own(digits, monkeypatch, capsys, tmp_path):
    """A true bound is not refuted; a thousandth of it is, and a third by random signs alone."""
    for name, factor in {'true': 1, 'thousandth': 0.001, 'third': 1 / 3}.items():
        monkeypatch.setitem(utils.BOUNDS, f'{name}_bound', scaled(utils.path_bound, factor))
    monkeypatch.setitem(
        utils.BOUNDS, 'square_bound', lambda network, data, *_: network.rho**2 / data.m
    )
    names = ['true_bound', 'thousandth_bound', 'third_bound', 'square_bound']
    words = [*names, '--dataset', 'digits', '--depth', '1', '2', '--out', str(tmp_path)]
    with pytest.raises(
        BadInput, match='_bound: give --constant C'
    ):  # a wrong c gives a wrong verdict
        study.main(words)
    study.main([*words, '--constant', '4'])
    output = capsys.readouterr().out
    assert re.findall(r'^\| (\w+) \| CONV-\d .* \| (.*) \|$', output, re.M) == 2 * [
        ('true_bound', 'not refuted by these networks'),
        ('thousandth_bound', 'refuted (proven)'),
        ('third_bound', 'refuted (Monte Carlo, 3 standard errors)'),
    ]
    assert 'square_bound: not of this form: ' in output
    assert len((tmp_path / 'falsify.csv').read_text().splitlines()) == 7
    assert (tmp_path / 'falsify.png').stat().st_size > 10000


def test_a_bound_without_the_1_is_read_too(digits, monkeypatch):
    """Slopes are read, so that a bound at the network's own norm is of the form."""

    def own(network, data, delta, gamma):
        return 5 * network.rho / gamma / data.m + utils.tail(1, data.m, delta)

    monkeypatch.setitem(utils.BOUNDS, 'own_bound', own)
    images = digits.train_images
    rows, _ = study.falsify(['own_bound', OURS], networks(images, 1), images, 10, constant=5)
    # Without padding all T are sqrt(p) F: the two norms differ by a factor, which cancels.
    own_ratio, our_ratio = (row['proven'] / row['complexity'] for row in rows)
    own_complexity = our_ratio * rows[1]['complexity'] / own_ratio
    assert own_complexity == pytest.approx(1 / len(images), rel=1e-9)


def test_a_trained_network_is_a_candidate(digits):
    """Its hidden layers are divided by their norm: several channels, effective weights."""
    images = digits.train_images
    net = nn.Sequential(
        nn.Conv2d(1, 3, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(147, 10, bias=False)
    )
    rows, _ = study.falsify(OF_THE_FORM, {'trained': net}, images, 10)
    before = {row['bound']: row['proven'] for row in rows}
    with torch.no_grad():
        net[0].weight.mul_(7)
    rows, _ = study.falsify(OF_THE_FORM, {'trained': net}, images, 10)
    for row in rows:
        assert row['network'] == 'trained'
        assert row['proven'] == pytest.approx(before[row['bound']], rel=1e-5)


def test_an_unknown_bound_is_refused():
    with pytest.raises(BadInput, match='nothing_bound: not in BOUNDS'):
        study.main(['nothing_bound'])
