"""Narrower networks: the solver, balancing, chains, one layer, dead channels, the command."""

import copy
import csv
import itertools
import math
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refused, settings_of, train_small
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import evaluation
import models
from conf import BadInput
from measures.masks import neuron_norms
from measures.norms import classification_margins, measure_data, measure_network
from measures.tails import test_set_bound as set_bound
from measures.trace import trace_layers
from models import get_network
from models.weight_norm import weight_norm
from records import load_network
from studies import neuron_sharing, width_theorem
from studies.compress import __main__ as command
from studies.compress import (
    balance,
    compress,
    compress_layer,
    drop_dead,
    linear,
    load,
    narrow,
    save,
)
from studies.compress.lasso import Problem, group_lasso, norms, ridge, squared_residual
from utils import evaluate_bounds

DOUBLE = {'dtype': torch.float64}
IMAGES = torch.rand(40, 1, 7, 7, generator=torch.Generator().manual_seed(1), **DOUBLE)
PICTURES = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(2), **DOUBLE)
SHAPE = 1, 7, 7


def chain(widths=(4, 5), seed=0, wrap=lambda layer: layer):
    """A bias-free chain in float64: convolutions with strides and padding, then a classifier."""
    torch.manual_seed(seed)
    first = wrap(nn.Conv2d(1, widths[0], 3, stride=2, padding=1, bias=False))
    second = wrap(nn.Conv2d(*widths, 2, stride=2, padding=2, dilation=2, bias=False))
    last = nn.Linear(9 * widths[1], 3, bias=False)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), last).double()


def mlp(widths=(6, 5), seed=0):
    torch.manual_seed(seed)
    modules = [nn.Flatten()]
    for sizes in itertools.pairwise((49, *widths, 3)):
        modules += [nn.Linear(*sizes, bias=False), nn.ReLU()]
    return nn.Sequential(*modules[:-1]).double()


def difference(net, other, images=IMAGES):
    """The norm of the difference of two networks' outputs, relative to `other`'s."""
    with torch.no_grad():
        return ((net(images) - other(images)).norm() / other(images).norm()).item()


# The solver


def least_squares(phi, V0):
    """The problem of features (K taps, N) and the targets V0 Phi."""
    psi, N = V0.flatten(1) @ phi, phi.shape[1]

    def gram(V):
        return (V.flatten(1) @ phi @ phi.T / N).view(-1, *V0.shape[1:])

    return Problem(gram, (psi @ phi.T / N).view(V0.shape), (psi.square().sum() / N).item())


def random_problem(K=6, taps=3, D=4, N=30):
    """(problem, V0) of nonnegative features, with targets that V0 fits."""
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(K * taps, N, generator=generator, **DOUBLE).relu()
    V0 = torch.randn(D, K, taps, generator=generator, **DOUBLE)
    return least_squares(phi, V0), V0


@pytest.mark.parametrize('lam', [0.9, 0.3, 0.03, 0.003])
def test_solution_meets_the_optimality_conditions(lam):
    problem, start = random_problem()
    V, report = group_lasso(problem, lam, start, tolerance=1e-9)
    penalty = report['penalty']
    assert penalty == pytest.approx(lam * norms(problem.cross).max().item())
    assert -1e-12 <= report['gap'] <= 1e-9
    R, active = problem.cross - problem.gram(V), norms(V) > 0
    assert active.any() and (norms(R) <= penalty * (1 + 1e-4)).all()
    # On the active set R_k has the length of the penalty and the direction of V_k.
    error = R - penalty * V / norms(V)[:, None]
    assert error[:, active].abs().max() < 1e-3 * penalty
    assert norms(V).sum() <= norms(start).sum()  # the start fits exactly


@pytest.mark.parametrize('steps', [0, 10, 200])
def test_gap_bounds_the_distance_to_the_optimum_at_every_check(steps):
    problem, start = random_problem()

    def objective(V, penalty):
        return squared_residual(problem, V, problem.gram(V)) / 2 + penalty * norms(V).sum().item()

    best, report = group_lasso(problem, 0.05, start, tolerance=1e-11)
    V, early = group_lasso(problem, 0.05, start, tolerance=0, steps=steps)
    value, least = (objective(each, report['penalty']) for each in (V, best))
    assert value - least <= early['gap'] * value + 1e-10 * value
    assert early['gap'] >= -1e-12


def test_from_lam_max_on_no_channel_is_kept():
    problem, start = random_problem()
    assert norms(group_lasso(problem, 1.001, start)[0]).max() == 0
    assert norms(group_lasso(problem, 0.99, start, tolerance=1e-7)[0]).count_nonzero() == 1


def test_signed_features_whose_largest_eigenvector_is_orthogonal_to_the_start():
    """The power iteration begins at ones, and finds 0.5; the largest eigenvalue is 3.5."""
    top = torch.tensor([1.0, -1, 1, -1], **DOUBLE) / 2
    gram = 0.5 * torch.eye(4, **DOUBLE) + 3 * torch.outer(top, top)
    V0 = torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(0), **DOUBLE)
    problem = least_squares(2 * torch.linalg.cholesky(gram), V0)
    V, report = group_lasso(problem, 0.2, torch.ones_like(V0), tolerance=1e-8)
    assert 0 <= report['gap'] <= 1e-8 and report['steps'] < 1000
    assert (norms(problem.cross - problem.gram(V)) <= report['penalty'] * (1 + 1e-3)).all()


def test_ridge_solves_its_normal_equations():
    problem, start = random_problem()
    V, report = group_lasso(problem, 0.3, start, tolerance=1e-6)
    decay = 0.1 * report['penalty'] / norms(V)
    refitted = ridge(problem, decay, V)
    gradient = problem.cross - problem.gram(refitted) - decay[:, None] * refitted
    kept = norms(V) > 0
    assert gradient[:, kept].abs().max() < 1e-6 * problem.cross.abs().max()
    assert not kept.all() and norms(refitted)[~kept].max() == 0


# The problem of a layer


@pytest.mark.parametrize('limit', [{}, {'GRAM_COLUMNS': 1}, {'GRAM_COLUMNS': 1, 'CHUNK': 100}])
@pytest.mark.parametrize('index', [1, 2])
@pytest.mark.parametrize('net', [chain(), mlp()], ids=['conv', 'mlp'])
def test_residual_of_a_layer_is_that_of_its_pre_activations(net, index, limit, monkeypatch):
    for name, value in limit.items():
        monkeypatch.setattr(narrow, name, value)
    layers = trace_layers(net, SHAPE)[: index + 1]
    *before, last = [layer.kernel for layer in layers]
    problem = narrow._layer_problem(layers, before, [*before, last], IMAGES)
    cut = int(layers[-1].name)
    other = copy.deepcopy(net[cut])
    nn.init.normal_(other.weight)
    with torch.no_grad():
        maps = net[:cut](IMAGES)
        error = other(maps) - net[cut](maps)
        V = other.weight.reshape(problem.cross.shape)
    wanted = error.square().mean().item() * error.shape[1]
    found = squared_residual(problem, V, problem.gram(V))
    assert found == pytest.approx(wanted, rel=1e-10)


def test_few_images_are_taken_evenly(monkeypatch):
    monkeypatch.setattr(narrow, 'FIT_IMAGES', 10)
    assert torch.equal(narrow.subsample(IMAGES, 5, 1), IMAGES[::4])
    monkeypatch.setattr(narrow, 'GRAM_COLUMNS', 4)
    monkeypatch.setattr(narrow, 'FEATURE_BYTES', 5 * 2 * 8 * 4)
    assert torch.equal(narrow.subsample(IMAGES, 5, 2), IMAGES[::10])


# Balance


@pytest.mark.parametrize(
    'net', [chain(), mlp(), chain(wrap=weight_norm)], ids=['conv', 'mlp', 'weight norm']
)
def test_balanced_network_is_the_same_function_with_equal_norms(net):
    balanced = balance(net, SHAPE)
    assert difference(balanced, net) < 1e-12
    for incoming, outgoing, _ in neuron_norms(balanced, SHAPE):
        assert torch.allclose(incoming, outgoing, rtol=1e-10)
    assert measure_network(balanced, SHAPE).rho < measure_network(net, SHAPE).rho


def test_balance_of_one_hidden_layer_attains_the_sum_over_neurons():
    net = mlp((6,))
    ((incoming, outgoing, _),) = neuron_norms(net, SHAPE)
    table = measure_network(balance(net, SHAPE), SHAPE)
    assert table.rho == pytest.approx((incoming * outgoing).sum().item(), rel=1e-12)


def test_neuron_that_feeds_nothing_becomes_zero_on_both_sides():
    net = chain()
    with torch.no_grad():
        net[2].weight[:, 1] = 0
        net[2].weight[3] = 0
    balanced = balance(net, SHAPE)
    (first, second, _), (third, fourth, _) = neuron_norms(balanced, SHAPE)
    assert first[1] == second[1] == third[3] == fourth[3] == 0
    assert difference(balanced, net) < 1e-12


# compress


@pytest.mark.parametrize('net', [chain(wrap=weight_norm), mlp()], ids=['conv', 'mlp'])
def test_tiny_lam_keeps_the_function(net):
    small, report = compress(net, IMAGES, 1e-6)
    assert difference(small, net) < 1e-3
    assert max(layer['residual'] for layer in report) < 1e-3


@pytest.mark.parametrize('refit', ['none', 'ridge'])
def test_copies_of_a_channel_are_merged(refit):
    """A network with a channel three times is compressed to the function that one with it is."""
    net, copied = mlp((6, 5)), mlp((8, 5))
    channels, share = [0, 1, 2, 3, 4, 5, 0, 0], torch.ones(8, **DOUBLE)
    share[[0, 6, 7]] /= 3
    with torch.no_grad():
        copied[1].weight[:] = net[1].weight[channels]
        copied[3].weight[:] = net[3].weight[:, channels] * share
        copied[5].weight[:] = net[5].weight
    assert difference(copied, net) < 1e-14
    one, _ = compress(net, IMAGES, 0.02, refit, 1e-7)
    other, _ = compress(copied, IMAGES, 0.02, refit, 1e-7)
    assert difference(other, one) < 2e-3


def test_rescaling_changes_nothing():
    net, generator = chain((6, 7)), torch.Generator().manual_seed(3)
    small, report = compress(net, IMAGES, 0.1, 'ridge', 1e-5)
    # The targets of the last fit are the outputs of the original.
    assert report[-1]['residual'] == pytest.approx(difference(small, net), rel=1e-6)
    rescaled = balance(net, SHAPE)
    with torch.no_grad():
        for filters, readers in itertools.pairwise(rescaled.parameters()):
            factors = 2.0 ** torch.randint(-6, 7, (len(filters),), generator=generator)
            filters.mul_(factors[:, None, None, None])
            readers.view(len(readers), len(filters), -1).div_(factors[:, None])
    other, again = compress(rescaled, IMAGES, 0.1, 'ridge', 1e-5)
    kept = [row['channels'] for row in report]
    assert [row['channels'] for row in again] == kept != [6, 7]
    assert difference(other, small) < 1e-6


def test_costs_and_refit_are_those_of_the_statement():
    """With filters of norm 1, a kept channel's correlation is the gradient of its penalty."""
    net, sizes, shares = mlp((8,)), [], []
    with torch.no_grad():
        phi = (IMAGES.flatten(1) @ F.normalize(net[1].weight).T).relu()
        targets = net(IMAGES)
        for refit in ('none', 'ridge'):
            small, (report,) = compress(net, IMAGES, 0.1, refit, 1e-9)
            residual = targets - small(IMAGES)
            shares.append((residual.T @ phi).norm(dim=0) / (targets.T @ phi).norm(dim=0).max())
            ((incoming, outgoing, _),) = neuron_norms(small, SHAPE)
            sizes.append(incoming * outgoing)
    kept = shares[0] > 0.1 * (1 - 1e-3)  # lam lam_max on the kept channels, less on the others
    assert (shares[0] < 0.1 * (1 + 1e-3)).all() and report['channels'] == kept.sum() < 8
    assert torch.allclose(shares[1][kept], 0.01 * sizes[1] / sizes[0], rtol=1e-3)


def test_channels_that_never_fire_are_dropped():
    net = chain()
    with torch.no_grad():
        net[0].weight[2] = -net[0].weight[2].abs()  # images have no negative pixel
    small, report = compress(net, IMAGES, 1e-4, 'none')
    assert report[0]['channels'] == 3 and small[0].weight.shape == (3, 1, 3, 3)


BIASED = nn.Sequential(nn.Flatten(), nn.Linear(49, 4), nn.ReLU(), nn.Linear(4, 3)).double()
DYING = mlp()
DYING[1].weight.data.abs_().neg_()


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'lam': 0.0}, 'lam'),
        ({'lam': 1.0}, 'lam'),
        ({'lam': math.nan}, 'lam'),
        ({'refit': 'least squares'}, 'refit'),
        ({'images': IMAGES * math.nan}, 'images'),
        ({'images': IMAGES[:0]}, 'images'),
        ({'images': IMAGES[0]}, 'images'),
        ({'net': BIASED}, 'bias'),
        ({'net': DYING}, 'layer 1 loses all its channels'),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(BadInput, match=words):
        compress(**({'net': mlp(), 'images': IMAGES, 'lam': 0.1} | arguments))


# compress_layer


@torch.no_grad()
def scramble(norm):
    """Random parameters and statistics of a batch norm."""
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)


def alexnet(relu=nn.ReLU, channels=3, classes=4):
    """A small AlexNet with batch normalization before one ReLU and after another one."""
    torch.manual_seed(0)
    first = nn.Conv2d(channels, 8, 3, 2, 1), relu(), nn.MaxPool2d(2)
    second = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), relu(), nn.MaxPool2d(2)
    flat = nn.AdaptiveAvgPool2d((3, 3)), nn.Flatten(), nn.Dropout()
    third = nn.Linear(108, 20), relu(), nn.Dropout()
    fourth = nn.Linear(20, 16), nn.ReLU(inplace=True), nn.BatchNorm1d(16)
    net = nn.Sequential(*first, *second, *flat, *third, *fourth, nn.Linear(16, classes)).double()
    scramble(net[4])
    scramble(net[15])
    return net.eval()


def shift_of(norm):
    """The output of a batch norm for an input of zeros."""
    return norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()


def share_of_targets(net):
    """The norm of alexnet's outputs, relative to them without the constant that the fit holds."""
    with torch.no_grad():
        outputs = net(PICTURES)
        held = net[16](shift_of(net[15]))
        return (outputs.norm() / (outputs - held).norm()).item()


# Of alexnet: the channels that a layer reads, and the inputs of each.
LINEAR = {'10': (12, 9), '13': (20, 1), '16': (16, 1)}


@pytest.mark.parametrize('name', LINEAR)
@pytest.mark.parametrize('refit', ['none', 'ridge'])
def test_a_layer_of_alexnet_is_fitted_and_its_channels_are_removed(name, refit):
    """The whole network with zeros in the columns of the others is the same function."""
    net, (channels, taps) = alexnet().train(), LINEAR[name]
    small, report = compress_layer(net, PICTURES, name, 0.02, refit)
    assert net.training and small.training and report['removed']
    assert 0 < report['channels'] == report['kept'].sum() < channels == len(report['kept'])
    lost = difference(small.eval(), net.eval(), PICTURES)
    layer, zeroed = small.get_submodule(name), net.get_submodule(name)
    # Only the batch norm after the ReLU leaves a shift in the bias.
    assert torch.equal(layer.bias, zeroed.bias) == (name != '16')
    if name == '16':
        assert report['residual'] == pytest.approx(lost * share_of_targets(net), rel=1e-6)
    inputs = report['kept'].repeat_interleave(taps)
    assert lost < 0.5 and layer.in_features == inputs.sum()
    with torch.no_grad():
        zeroed.weight.zero_()[:, inputs] = layer.weight
        zeroed.bias.copy_(layer.bias)
    assert difference(small, net, PICTURES) < 1e-10


@pytest.mark.parametrize('name', LINEAR)
def test_tiny_lam_keeps_the_function_of_alexnet(name):
    net = alexnet()
    small, report = compress_layer(net, PICTURES, name, 1e-5, tolerance=1e-4)
    assert difference(small, net, PICTURES) < 2e-3 and report['residual'] < 5e-3


@pytest.mark.parametrize('name, scaled', [('10', 4), ('13', 10), ('16', 13)])
def test_rescaled_channels_of_alexnet_are_kept_or_removed_as_before(name, scaled):
    """A channel's filter and bias times a, what reads it divided by a."""
    net, other, (channels, taps) = alexnet(), alexnet(), LINEAR[name]
    exponents = torch.randint(-4, 5, (channels,), generator=torch.Generator().manual_seed(0))
    factors = 2.0 ** exponents.double()
    with torch.no_grad():
        other[scaled].bias.mul_(factors)
        other[scaled].weight.view(channels, -1).mul_(factors[:, None])
        if name == '16':  # a batch norm reads them
            other[15].running_mean.mul_(factors)
            other[15].weight.div_(factors)
        else:
            other.get_submodule(name).weight.div_(factors.repeat_interleave(taps))
    assert difference(other, net, PICTURES) < 1e-9
    one, report = compress_layer(net, PICTURES, name, 0.02, tolerance=1e-6)
    two, again = compress_layer(other, PICTURES, name, 0.02, tolerance=1e-6)
    assert torch.equal(report['kept'], again['kept'])
    assert difference(one, two, PICTURES) < 1e-5


def test_the_last_layer_of_a_chain_is_fitted_as_the_chain_is():
    net = mlp((8,))
    whole, (report,) = compress(net, IMAGES, 0.1, 'ridge', 1e-8)
    small, single = compress_layer(net, IMAGES, '3', 0.1, 'ridge', 1e-8)
    assert single['channels'] == report['channels'] < 8
    assert single['residual'] == pytest.approx(report['residual'], rel=1e-5)
    assert difference(small, whole) < 1e-4


def normalized(net):
    """In training mode, in which each reading of a spectrally normalized weight changes it."""
    for module in net:
        if isinstance(module, nn.Linear):
            spectral_norm(module)
    return net.train()


MAKERS = {
    'compress_layer': (alexnet, lambda net: compress_layer(net, PICTURES, '13', 0.03)[0]),
    'layers': (alexnet, lambda net: compress_layer(net, PICTURES, ['10', '16'], 0.03)[0]),
    'compress': (mlp, lambda net: compress(net, IMAGES, 0.1)[0]),
    'balance': (chain, lambda net: balance(net, SHAPE)),
    'drop_dead': (lambda: copy.deepcopy(BIASED), drop_dead),
}


@torch.no_grad()
@pytest.mark.parametrize('make, function', MAKERS.values(), ids=MAKERS)
def test_the_network_that_another_one_is_made_from_does_not_change(make, function):
    net = normalized(make())
    before = copy.deepcopy(net.state_dict())
    made, twin = function(net), function(copy.deepcopy(net).eval())
    for tensor, wanted in zip(made.parameters(), twin.parameters(), strict=True):
        assert torch.equal(tensor, wanted)
        tensor.add_(100)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_several_layers_are_fitted_from_the_input_on():
    """Each to the original pre-activations, from the features of the narrower layers before it."""
    net = alexnet()
    small, reports = compress_layer(net, PICTURES, ['16', '13', '10'], 0.02, tolerance=1e-4)
    assert list(reports) == ['10', '13', '16']
    for name, report in reports.items():
        inputs = report['channels'] * LINEAR[name][1]
        assert report['removed'] and small.get_submodule(name).in_features == inputs
    lost = difference(small, net, PICTURES)
    assert reports['16']['residual'] == pytest.approx(lost * share_of_targets(net), rel=1e-6)
    blind = net
    for name in LINEAR:  # each fitted to the network before it
        blind, _ = compress_layer(blind, PICTURES, name, 0.02, tolerance=1e-4)
        if name == '10':
            assert torch.equal(blind[3].weight, small[3].weight)
    assert lost < difference(blind, net, PICTURES)


def test_costs_of_one_and_columns_of_zeros():
    net = alexnet()
    with torch.no_grad():
        for tensor in (net[10].weight, net[10].bias):
            tensor[1] *= 100  # a loud channel, which is cheap if all cost one
        net[13].weight[:, 1] /= 100
    small, report = compress_layer(net, PICTURES, '13', 0.002)
    zeroed, same = compress_layer(net, PICTURES, '13', 0.002, remove=False)
    assert (same['removed'], same['why']) == (False, 'remove = False')
    assert torch.equal(zeroed[13].weight.ne(0).any(0), report['kept'])
    assert zeroed[10].weight.equal(net[10].weight)
    assert difference(zeroed, small, PICTURES) < 1e-10
    one, other = compress_layer(net, PICTURES, '13', 0.002, cost='one')
    assert other['kept'][1] and one[10].out_features == other['channels'] < report['channels']


def test_channels_are_removed_through_one_relu_module_that_is_called_several_times():
    """As through ReLUs of their own: a module without tensors has nothing to cut."""
    one, names = nn.ReLU(), ['10', '13']
    small, _ = compress_layer(alexnet(), PICTURES, names, 0.02)
    other, reports = compress_layer(alexnet(relu=lambda: one), PICTURES, names, 0.02)
    assert all(report['removed'] for report in reports.values())
    for weight, wanted in zip(other.parameters(), small.parameters(), strict=True):
        assert torch.equal(weight, wanted)


class Branch(nn.Module):
    """A convolution, a function or a module, and a classifier, in evaluation mode."""

    def __init__(self, between, inputs):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.between, self.last = nn.Conv2d(3, 6, 3, 2), between, nn.Linear(inputs, 4)
        self.double().eval()

    def forward(self, x):
        return self.last(self.between(self.conv(x)))


REMOVED = {
    'mean': (lambda x: F.relu(x).mean([2, 3]), 6),
    'mean, kept': (lambda x: torch.mean(x.relu(), (-2, -1), keepdim=True).flatten(1), 6),
    'gelu': (lambda x: F.gelu(x).flatten(1), 294),
    'tanh': (lambda x: F.avg_pool2d(torch.tanh(x), 2).flatten(1), 54),
    'sigmoid': (lambda x: x.sigmoid().flatten(1), 294),
    'silu': (lambda x: F.silu(x).flatten(1), 294),
}


@pytest.mark.parametrize('between, inputs', REMOVED.values(), ids=REMOVED)
def test_channels_are_removed_through_means_and_functions(between, inputs):
    net = Branch(between, inputs)
    small, report = compress_layer(net, PICTURES, 'last', 0.9, tolerance=1e-2)
    assert report['removed'] and len(small.conv.weight) == report['channels'] < 6
    zeroed, _ = compress_layer(net, PICTURES, 'last', 0.9, tolerance=1e-2, remove=False)
    assert difference(zeroed, small, PICTURES) < 1e-9


FIXED = {
    'size': (lambda x: (y := F.relu(x)).view(y.size(0), 6 * 7 * 7), 294),
    'shape': (lambda x: (y := F.relu(x)).reshape(y.shape[0], 6 * 7 * 7), 294),
    '-1': (lambda x: F.max_pool2d(F.relu(x), 2).view(-1, 54), 54),
    'a tuple': (lambda x: torch.reshape(F.relu(x), (-1, 294)), 294),
}


@pytest.mark.parametrize('between, inputs', FIXED.values(), ids=FIXED)
def test_channels_before_a_view_of_a_fixed_size_are_groups_that_stay(between, inputs):
    """Before a flattening they would be removed, for the same function; the view takes no fewer."""
    pool = nn.MaxPool2d(2) if inputs == 54 else nn.Identity()
    flat = Branch(nn.Sequential(nn.ReLU(), pool, nn.Flatten()), inputs)
    small, report = compress_layer(Branch(between, inputs), PICTURES, 'last', 0.5, tolerance=1e-4)
    cut, same = compress_layer(flat, PICTURES, 'last', 0.5, tolerance=1e-4)
    assert same['removed'] and torch.equal(report['kept'], same['kept'])
    assert 'takes a fixed number of channels' in report['why'] and len(small.conv.weight) == 6
    assert difference(small, cut, PICTURES) < 1e-9


POSITIONS = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(294), nn.ReLU())
GROUPS = nn.Sequential(nn.Conv2d(6, 6, 1, groups=2), nn.ReLU(), nn.Flatten())
NORM = nn.BatchNorm2d(6)
UNCUT = {
    'two readers': (lambda x: (x + F.relu(x)).flatten(1), 294, 'add'),
    'rows of no image': (lambda x: x.relu().view(-1, 49), 49, 'last: its input is not one row'),
    'other axes': (lambda x: F.relu(x).transpose(1, 2).flatten(1), 294, 'transpose'),
    'positions': (POSITIONS, 294, 'between.1 normalizes the positions'),
    'groups': (GROUPS, 294, 'between.0 (Conv2d) is grouped'),
    'twice': (nn.Sequential(NORM, nn.ReLU(), NORM, nn.Flatten()), 294, 'is used more than once'),
}


@pytest.mark.parametrize('between, inputs, why', UNCUT.values(), ids=UNCUT)
def test_the_report_says_why_channels_are_not_removed(between, inputs, why):
    net = Branch(between, inputs)
    small, report = compress_layer(net, PICTURES, 'last', 0.3, tolerance=1e-2)
    assert why in report['why'] and not report['removed']
    assert torch.equal(small.conv.weight, net.conv.weight)
    assert torch.equal(small.last.weight.ne(0).any(0), report['kept'])
    assert 0 < report['channels'] < inputs


def test_few_images_go_through_the_network_at_once(monkeypatch):
    sizes, net, inputs = [], alexnet(), linear._inputs

    def note(net, names, batches):
        sizes.extend(map(len, batches))
        return inputs(net, names, batches)

    one, _ = compress_layer(net, PICTURES, '13', 0.02)
    monkeypatch.setattr(linear, 'images_per_pass', lambda net, images: 7)
    monkeypatch.setattr(linear, '_inputs', note)
    two, _ = compress_layer(net, PICTURES, '13', 0.02)
    assert max(sizes) == 7 and sum(sizes) == 61
    assert difference(two, one, PICTURES) < 1e-6


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'name': '11'}, r"'11': not a linear layer of Sequential; it has 10, 13, 16"),
        ({'name': ['10', '12']}, "'12': not a linear layer"),
        ({'name': []}, 'name: at least one layer'),
        ({'lam': 1.5}, 'lam'),
        ({'refit': 'exact'}, 'refit'),
        ({'cost': 'two'}, "cost = 'two'"),
        ({'images': PICTURES / 0}, 'images'),
        ({'images': PICTURES[:, :2]}, r'does not take one of shape \(1, 2, 16, 16\)'),
        ({'images': PICTURES[:, :, :2]}, 'images: Sequential does not take one'),
    ],
)
def test_bad_arguments_of_a_layer_are_named(arguments, words):
    net = alexnet()
    with pytest.raises(BadInput, match=words):
        compress_layer(**({'net': net, 'images': PICTURES, 'name': '10', 'lam': 0.1} | arguments))
    assert not any(module._forward_hooks for module in net.modules())


# The network without its dead channels


def layer_widths(net):
    return [len(module.weight) for module in net if hasattr(module, 'weight')]


def test_the_shipped_pruned_network_is_exported(tmp_path):
    net, _ = load_network(ROOT / 'results' / 'sparse-certificate' / 'CONV-3-32')
    images = torch.rand(300, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    save(tmp_path / 'dead.pt', drop_dead(net), (1, 28, 28))
    small = load(tmp_path / 'dead.pt')
    assert layer_widths(small) == [4, 3, 13, 10]
    assert (tmp_path / 'dead.pt').stat().st_size < 330_000
    with torch.no_grad():
        assert torch.equal(small(images).argmax(1), net(images).argmax(1))
    net.double()
    assert difference(drop_dead(net), net, images.double()) < 1e-14


def test_constants_of_batch_normalized_channels_are_kept_if_padding_needs_them():
    """Of an empty filter the constant remains that batch normalization makes."""
    settings = settings_of(network='CONVBN', depth=3, width=16, normalization='batch')
    torch.manual_seed(0)
    net = get_network(settings, (1, 16, 16), 10).double().eval()
    wanted = []
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[::2] = 0
            elif isinstance(module, nn.BatchNorm2d):
                scramble(module)
                wanted.append(8 + int((shift_of(module)[::2] > 0).sum()))
    # The stem's second convolution and the classifier read without padding.
    wanted[0] = wanted[-1] = 8
    small = drop_dead(net)
    assert layer_widths(small) == [*wanted, 10] and 8 < max(wanted) < 16
    assert difference(small, net, torch.rand(50, 1, 16, 16, **DOUBLE)) < 1e-14


def test_a_network_that_is_dead_is_exported_too():
    net = chain()
    nn.init.zeros_(net[0].weight)
    nn.init.zeros_(net[2].weight)
    small = drop_dead(net)
    assert layer_widths(small) == [1, 1, 3] and small(IMAGES).abs().max() == 0


GROUPED = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3))
NO_CHAIN = {
    'add': lambda: get_network(
        settings_of(network='CONVRES', depth=1, width=4, normalization='batch'), (1, 16, 16), 10
    ),
    '0 .Conv2d.': lambda: GROUPED,
    '0 .Linear.': lambda: nn.Sequential(nn.Linear(7, 3), nn.ReLU()),
}


@pytest.mark.parametrize('words', NO_CHAIN)
def test_networks_that_are_no_chain_are_refused_by_name(words):
    with pytest.raises(BadInput, match=words):
        drop_dead(NO_CHAIN[words]().eval())


# The width theorem


def solved(features, targets):
    """t of the exact lasso, of its vertex, and the relative gap, the constraints checked."""
    t, dual, gap = width_theorem.exact_lasso(features, targets)
    sparse = width_theorem.vertex(t, dual, features)
    V = (dual @ features.T) * sparse
    assert gap < 1e-6
    assert np.linalg.norm(V @ features - targets) < 1e-6 * np.linalg.norm(targets)
    assert np.linalg.norm(V, axis=0).sum() == pytest.approx(t.sum(), rel=1e-6)
    return np.count_nonzero(sparse)


SIZES = [(9, 3, 2, 3), *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in (
    (30, 5, 5, 5), (40, 8, 3, 4), (20, 6, 5, 2)))]  # fmt: skip


@pytest.mark.parametrize('K, N, D, rank', SIZES)
def test_solutions_within_the_sharper_width_bound(K, N, D, rank):
    """A solution is found that meets its constraints, is optimal, and is as narrow as proved."""
    rng, counts, q = np.random.default_rng(0), [], min(D, rank)
    for _ in range(25):
        features = rng.standard_normal((K, rank)) @ rng.standard_normal((rank, N))
        counts.append(solved(features, rng.standard_normal((D, K)) @ features))
    assert max(counts) <= width_theorem.width_bound(rank, q) <= rank * (rank + 1) / 2
    if (N, D) == (3, 2):
        assert max(counts) == 5  # attained; rank times rank would be 6


@pytest.mark.parametrize('index, seed, count', [(0, 0, 2), (0, 1, 2), (1, 1, 8)])
def test_problems_of_figure_4_need_as_many_neurons_as_ever(index, seed, count):
    problem = width_theorem.FIGURES[4][index]
    assert solved(*width_theorem.draw_problem(np.random.default_rng(seed), **problem)) == count


RANKED = [{'K': 9, 'N': 4, 'D': 3, 'rY': 2}, {'K': 2, 'N': 3, 'D': 2, 'rX': 1}]


@pytest.mark.parametrize('problem', [*width_theorem.FIGURES[3], *width_theorem.FIGURES[4], *RANKED])
def test_problems_have_their_sizes_and_ranks_and_a_solution(problem):
    K, N, D = problem['K'], problem['N'], problem['D']
    features, targets = width_theorem.draw_problem(np.random.default_rng(0), **problem)
    assert features.shape == (K, N) and targets.shape == (D, N)
    r = problem.get('rX', min(K, N))
    both = np.concatenate([features, targets])
    assert np.linalg.matrix_rank(features) == np.linalg.matrix_rank(both) == r
    assert np.linalg.matrix_rank(targets) == min(D, r, problem.get('rY', r))


def test_command_line_of_the_width_theorem(capsys, tmp_path):
    figure = width_theorem.FIGURES[3]
    assert width_theorem.parse_arguments(['--figure', '3']) == (figure, 10, None)
    width_theorem.main(f'--K 2 --rY 1 --draws 2 --out {tmp_path / "p.png"}'.split())
    assert capsys.readouterr().out == 'K = 2, N = 3, D = 2, rY = 1: 2 to 2 neurons, median 2\n'
    assert (tmp_path / 'p.png').stat().st_size > 10_000


@pytest.mark.parametrize(
    'words, said',
    [
        ('--K 9 2', '--K 2: fewer neurons than the 3 samples'),
        ('--figure 4 --draws 0', '--draws 0'),
        ('--K 2 --rY 3', 'rY at most D'),
        ('--K 9 --rX 4', 'rX must be at most K and N'),
    ],
)
def test_bad_problems_of_the_width_theorem_are_one_line(words, said):
    assert said in refused(*words.split(), program=width_theorem.main)


def test_neuron_sharing_draws_its_picture(monkeypatch, tmp_path, capsys):
    """With weight decay some neurons become 0 and the sum of their norms falls."""
    monkeypatch.setattr(neuron_sharing, 'STEPS', 3000)
    monkeypatch.setattr(neuron_sharing, 'DECAY', 2e-2)
    neuron_sharing.main(['--out', str(tmp_path / 'p.png')])
    dense, sparse = capsys.readouterr().out.splitlines()
    assert 'without weight decay: 100 of 100 neurons active' in dense
    assert int(re.search(r': (\d+) of 100', sparse)[1]) < 50
    assert float(sparse.split()[-1]) < float(dense.split()[-1])
    assert (tmp_path / 'p.png').stat().st_size > 10_000


# Files and the command


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A results folder with CONV-2-8, trained on the digits."""
    folder = tmp_path_factory.mktemp('trained') / '1'
    flags = '--depth', 2, '--width', 8, '--epochs', 20, '--eval-every', 20
    train_small(folder, *flags, '--results-dir', folder.parent)
    return folder


def run(folder, *arguments):
    """The command's new results folder."""
    before = set(folder.parent.iterdir())
    command.main([str(folder), *map(str, arguments)])
    (new,) = set(folder.parent.iterdir()) - before
    return new


def rows_of(folder):
    (path,) = folder.glob('*/compress.csv')
    return list(csv.DictReader(path.open()))


def outputs_of(net, images):
    with torch.no_grad():
        return net(images)


def error_of(net, dataset):
    """The share of test images that a network classifies wrongly."""
    predicted = outputs_of(net, dataset.test_images).argmax(1)
    return (predicted != dataset.test_labels).double().mean().item()


def number_of_weights(net):
    return sum(weight.numel() for weight in net.parameters())


def change_settings(source, folder, **knobs):
    """Copies a results folder and changes its settings."""
    shutil.copytree(source, folder)
    path = folder / 'global_settings.py'
    text = path.read_text()
    for name, value in knobs.items():
        text = re.sub(rf'(?m)^{name} = \S+', f'{name} = {value!r}', text)
    path.write_text(text)


@pytest.fixture(scope='module')
def narrowed(trained):
    """The results folder of the command at two lams, and its rows."""
    folder = run(trained, '--lam', '1e-2', '0.1', '--refit', 'none')
    return folder, rows_of(folder)


def test_digits_within_one_image_at_three_quarters_of_the_weights(digits, trained):
    net, _ = load_network(trained / 'CONV-2-8')
    small, _ = compress(net, digits.train_images, 1e-3)
    assert error_of(small, digits) <= error_of(net, digits) + 1.01 / len(digits.test_labels)
    assert number_of_weights(small) < 0.75 * number_of_weights(balance(net, digits.input_shape))
    rho = [measure_network(each, digits.input_shape).rho for each in (small, net)]
    assert rho[0] < 0.6 * rho[1]


def test_command_makes_a_folder_of_its_own(trained, narrowed, digits):
    folder, rows = narrowed
    first = (folder / 'global_settings.py').read_text().splitlines()[0]
    assert 'python -m studies.compress' in first and '--lam 1e-2 0.1 --refit none' in first
    assert [float(row['lam']) for row in rows] == [0, 0.01, 0.1] and rows[0]['channels'] == '8|8'
    for row in rows:
        path = folder / 'CONV-2-8' / f'lam-{row["lam"]}.pt'
        net = load(path)
        table = measure_network(net, digits.input_shape)
        outputs = outputs_of(net, digits.test_images)
        loss = F.mse_loss(outputs, F.one_hot(digits.test_labels, 10)).item()
        assert (row['round'], row['epoch']) == ('0', '20') and float(row['speed_up']) > 0
        assert error_of(net, digits) == float(row['test_error'])
        assert loss == pytest.approx(float(row['test_loss']), rel=1e-5)
        assert table.rho == pytest.approx(float(row['rho']))
        assert table.W.sum() == int(row['weights']) and path.stat().st_size == int(row['bytes'])
    source, _ = load_network(trained / 'CONV-2-8')
    whole = load(folder / 'CONV-2-8' / 'lam-0.pt')
    assert difference(whole, source, digits.test_images) < 1e-5


def test_bounds_hold_for_all_narrower_networks_at_once(narrowed, digits):
    """The data chose one of 8 * 8 pairs of widths: delta / 64. The test set chose nothing."""
    folder, rows = narrowed
    delta, gamma = (getattr(settings_of(), name) for name in ('delta', 'gamma'))
    for row in rows:
        net = load(folder / 'CONV-2-8' / f'lam-{row["lam"]}.pt')
        outputs = outputs_of(net, digits.train_images)
        margins = classification_margins(outputs, digits.train_labels)
        data = measure_data(net, digits.train_images)
        united = evaluate_bounds(net, data, margins, delta / 64, gamma)
        single = evaluate_bounds(net, data, margins, delta, gamma)
        for column in ('our_bound', 'corrected_bound', 'path_bound', 'sedghi_bound'):
            assert float(row[column]) == pytest.approx(united[column], rel=1e-6)
            assert float(row[column]) > single[column] * (1 + 1e-5)
        bound = set_bound(float(row['test_error']), len(digits.test_images), delta)
        assert float(row['test_set_bound']) == pytest.approx(bound, rel=1e-9)


def test_certificates_hold_for_all_narrower_networks_at_once(digits, monkeypatch, tmp_path):
    deltas = []

    def certify(net, images, labels, delta, *_):
        deltas.append(delta)
        return {}

    monkeypatch.setattr(evaluation, 'certify', certify)
    settings = settings_of(dataset_name='digits', depth=2, width=4, certify_every=1, epochs=1)
    net = get_network(settings, digits.input_shape, 10).eval()
    options = SimpleNamespace(lam=[], layer=[])
    command.compress_run(net, settings, (0, 1), options, tmp_path / 'run')
    assert deltas == [settings.delta / 16] * 2


def family(settings, input_shape, num_classes):
    """A family of a user's own."""
    return alexnet(channels=input_shape[0], classes=num_classes).float()


def test_layers_of_an_alexnet_of_the_users_own(tmp_path, digits, monkeypatch):
    """Pooling, dropout and batch normalization stay as they are, in the file too."""
    monkeypatch.setitem(models.NETWORKS, 'ALEX', family)
    flags = '--network ALEX --normalization none --bias True --epochs 2 --results-dir'
    train_small(tmp_path / '1', *flags.split(), tmp_path)
    folder = run(tmp_path / '1', *'--layer 16 --layer 10 --layer 13 --lam 0.05'.split())
    (path,) = folder.glob('ALEX*')
    net, _ = load_network(tmp_path / '1' / path.name)
    whole, row = rows_of(folder)
    small = load(path / 'lam-0.05.pt')
    made, reports = compress_layer(net, digits.train_images, [*LINEAR], 0.05)
    assert difference(load(path / 'lam-0.pt'), net, digits.test_images) == 0
    assert difference(small, made, digits.test_images) < 1e-4
    assert isinstance(small[4], nn.BatchNorm2d) and not small.training
    widths = [reports[name]['channels'] for name in LINEAR]
    assert (whole['layer'], whole['channels']) == ('16|10|13', '8|12|20|16')
    assert (row['layer'], row['channels']) == ('16|10|13', '8|{}|{}|{}'.format(*widths))
    residuals = [reports[name]['residual'] for name in ('16', '10', '13')]
    found = [float(cell) for cell in row['residual'].split('|')]
    assert found == pytest.approx(residuals, rel=2e-2)
    assert number_of_weights(small) == int(row['weights']) < int(whole['weights'])
    assert error_of(small, digits) == float(row['test_error'])
    monkeypatch.delitem(models.NETWORKS, 'ALEX')
    with pytest.raises(BadInput, match="network = 'ALEX'"):
        load(path / 'lam-0.05.pt')


def test_one_layer_of_a_trained_network(trained, digits):
    folder = run(trained, '--layer', 5, '--lam', '1e-2')
    whole, row = rows_of(folder)
    net, _ = load_network(trained / 'CONV-2-8')
    small, report = compress_layer(net, digits.train_images, '5', 1e-2)
    assert row['channels'] == f'8|{report["channels"]}' and report['channels'] < 8
    path = folder / 'CONV-2-8'
    assert difference(load(path / 'lam-0.01.pt'), small, digits.test_images) < 1e-4
    assert difference(load(path / 'lam-0.pt'), net, digits.test_images) < 1e-5
    assert 0 < float(whole['train_loss']) != float(row['train_loss'])


def test_pruned_network_is_made_smaller_by_the_command(tmp_path, digits, capsys):
    # Distances from the start are measured in training, and do not exist for other widths.
    flags = '--density 0.1 --initial-mask random --width 16 --epochs 2 --measures-every 2'
    train_small(tmp_path / '1', *flags.split(), '--results-dir', tmp_path)
    folder = run(tmp_path / '1')
    printed = capsys.readouterr().out
    assert 'not finished' not in printed and 'lam' not in printed
    assert 'CONV-3-16 source: ' in printed and 'CONV-3-16 without dead channels: ' in printed
    whole, row = rows_of(folder)
    net, _ = load_network(tmp_path / '1' / 'CONV-3-16')
    small = load(folder / 'CONV-3-16' / 'dead.pt')
    assert (whole['lam'], row['lam'], row['epoch']) == ('0', '', '2')
    assert number_of_weights(small) == int(row['weights']) < int(whole['weights'])
    assert int(row['bytes']) < int(whole['bytes']) and row['test_error'] == whole['test_error']
    assert difference(small, net, digits.test_images) < 1e-5


def test_a_training_that_is_not_finished_is_said(tmp_path, trained, capsys):
    change_settings(trained, tmp_path / '1', epochs=50, results_dir=str(tmp_path))
    folder, said = run(tmp_path / '1'), 'its training is not finished'
    assert said in capsys.readouterr().out
    assert said in (folder / 'global_settings.py').read_text()


@pytest.mark.process
def test_ctrl_c_leaves_the_rows_that_are_done(trained):
    words = [sys.executable, '-m', 'studies.compress', str(trained), '--lam']
    words += [f'{0.001 * k}' for k in range(1, 200)]
    before = set(trained.parent.iterdir())
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True, 'cwd': ROOT}
    with subprocess.Popen(words, **pipes) as process:
        while 'lam 0.001' not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors) == (130, 'studies.compress: stopped\n')
    (folder,) = set(trained.parent.iterdir()) - before
    rows = rows_of(folder)
    assert 2 <= len(rows) < 200 and all(row['test_set_bound'] for row in rows)
    files = {path.name for path in folder.rglob('*.pt')}
    assert files >= {f'lam-{row["lam"]}.pt' for row in rows} and not list(folder.rglob('*.tmp'))


@pytest.mark.parametrize(
    'words, said',
    [
        ('--lam 2', 'lam'),
        ('--lam small', 'lam'),
        ('--lam 0.1 --run 2', '--run 2'),
        ('--lam 0.1 --refit exact', 'refit'),
        ('--layer 5', '--layer 5'),
        ('--layer 0 --lam 0.1', "'0': not a linear layer"),
        ('--layer 7 --layer 7 --lam 0.1', '--layer 7 7: a layer is listed twice'),
    ],
)
def test_bad_command_lines_write_nothing(trained, words, said):
    before = set(trained.parent.iterdir())
    assert said in refused(trained, *words.split(), program=command.main)
    assert set(trained.parent.iterdir()) == before


def test_a_lam_at_which_a_layer_dies_leaves_the_other_rows(trained, monkeypatch):
    def dies(net, images, lam, refit):
        if lam == 0.01:
            raise BadInput('lam = 0.01: layer 0 loses all its channels')
        return compress(net, images, lam, refit)

    monkeypatch.setattr(command, 'compress', dies)
    before = set(trained.parent.iterdir())
    said = refused(trained, '--lam', 0.01, 0.1, program=command.main)
    assert 'CONV-2-8: lam = 0.01: layer 0 loses all its channels' in said
    (folder,) = set(trained.parent.iterdir()) - before
    assert [row['lam'] for row in rows_of(folder)] == ['0', '0.1']


def test_folders_without_networks_are_refused(tmp_path, trained):
    assert 'not a results folder' in refused(tmp_path, program=command.main)
    shutil.copy(trained / 'global_settings.py', tmp_path)
    assert 'CONV-2-8' in refused(tmp_path, program=command.main)


@pytest.mark.parametrize('knob, value', [('label_noise', 0.5), ('normalize', True)])
def test_other_settings_than_those_of_the_training_are_refused(tmp_path, trained, knob, value):
    change_settings(trained, tmp_path / '1', results_dir=str(tmp_path), **{knob: value})
    with pytest.raises(BadInput, match=f'was trained with {knob} = '):
        command.main([str(tmp_path / '1')])
    assert [path.name for path in tmp_path.iterdir()] == ['1']


def test_other_data_than_those_of_the_training_are_refused(trained, monkeypatch):
    monkeypatch.setattr(command, 'fingerprint', lambda dataset: 'other')
    assert 'was trained on other data' in refused(trained, program=command.main)


def test_files_that_hold_no_network_are_refused(trained):
    with pytest.raises(BadInput, match='does not hold'):
        load(trained / 'CONV-2-8' / 'model.pt')
