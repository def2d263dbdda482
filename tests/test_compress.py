"""Narrower networks: the multi-task lasso, its solver, balancing, the width theorem, and the command."""

import copy
import csv
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DIGITS, ROOT, refused, run, settings_of, train_small
from torch import nn

import evaluation
import models
from conf import BadInput
from measures.masks import neuron_norms
from measures.norms import classification_margins, measure_data, measure_network
from measures.pac_bayes import test_set_bound as set_bound
from measures.trace import trace_layers
from models import get_network
from models.weight_norm import weight_norm
from records import load_network
from studies.compress import linear
from studies.compress import narrow as room
from studies.compress.__main__ import (
    balance,
    compress,
    compress_layer,
    compress_run,
    drop_dead,
    load,
    load_source,
    save,
)
from studies.compress.__main__ import main as compress_main
from studies.compress.lasso import group_lasso, norms, ridge, scaled
from studies.width_theorem import (
    FIGURES,
    arguments,
    draw_problem,
    exact_lasso,
    main,
    vertex,
    width_bound,
)
from utils import evaluate_bounds

IMAGES = torch.rand(40, 1, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def chain(widths=(4, 5), seed=0, wrap=lambda layer: layer):
    """A small bias-free chain in float64: convolutions with strides and padding, then a classifier."""
    torch.manual_seed(seed)
    first = wrap(nn.Conv2d(1, widths[0], 3, stride=2, padding=1, bias=False))
    second = wrap(nn.Conv2d(widths[0], widths[1], 2, stride=2, padding=2, dilation=2, bias=False))
    net = nn.Sequential(
        first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(9 * widths[1], 3, bias=False)
    )
    return net.double()


def mlp(widths=(6, 5), seed=0):
    torch.manual_seed(seed)
    sizes = (49, *widths, 3)
    layers = [nn.Linear(*pair, bias=False) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(
        nn.Flatten(), *(module for layer in layers for module in (layer, nn.ReLU()))
    )[:-1].double()


def rescaled(net, layer, factors):
    """The same function: channel k of a hidden layer (by its place) times factors[k], taken back by the next layer."""
    net = balance(net, (1, 7, 7))  # a copy of plain layers; of one scale
    weights = [module.weight.data for module in net if hasattr(module, 'weight')]
    weights[layer].mul_(factors.view(-1, *(1,) * (weights[layer].ndim - 1)))
    outgoing = weights[layer + 1].view(len(weights[layer + 1]), len(factors), -1)
    outgoing.div_(factors[:, None])
    return net


def random_problem(K=6, taps=3, D=4, N=30, seed=0):
    """(problem, start) of nonnegative features Phi (K taps, N) and targets V0 Phi, and V0."""
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(K * taps, N, generator=generator, dtype=torch.float64).relu()
    V0 = torch.randn(D, K, taps, generator=generator, dtype=torch.float64)
    psi = V0.flatten(1) @ phi
    gram = phi @ phi.T / N
    cross, energy = (psi @ phi.T / N).view(V0.shape), (psi.square().sum() / N).item()
    return SimpleNamespace(
        gram=lambda V: (V.flatten(1) @ gram).view(-1, K, taps), cross=cross, energy=energy
    ), V0


# The solver


@pytest.mark.parametrize('lam', [0.9, 0.3, 0.03, 0.003])
def test_solution_meets_the_optimality_conditions(lam):
    problem, start = random_problem()
    V, report = group_lasso(problem, lam, start, tolerance=1e-9)
    assert report['penalty'] == pytest.approx(lam * norms(problem.cross).max().item())
    assert -1e-12 <= report['gap'] <= 1e-9
    R, active = problem.cross - problem.gram(V), norms(V) > 0
    assert active.any()
    assert (norms(R) <= report['penalty'] * (1 + 1e-4)).all()
    wanted = (
        report['penalty'] * V / norms(V)[:, None]
    )  # on the active set R_k is the penalty in the direction of V_k
    assert torch.allclose(R[:, active], wanted[:, active], atol=1e-3 * report['penalty'])
    assert (
        norms(V).sum() <= norms(start).sum()
    )  # the start fits exactly, so the penalty can only fall


@pytest.mark.parametrize('steps', [0, 10, 50, 200])
def test_gap_bounds_the_distance_to_the_optimum_at_every_check(steps):
    problem, start = random_problem()

    def objective(V, penalty):
        fit = problem.energy - 2 * (V * problem.cross).sum() + (V * problem.gram(V)).sum()
        return (fit / 2 + penalty * norms(V).sum()).item()

    best, report = group_lasso(problem, 0.05, start, tolerance=1e-11)
    V, early = group_lasso(problem, 0.05, start, tolerance=0, steps=steps)
    value, least = objective(V, report['penalty']), objective(best, report['penalty'])
    assert value - least <= early['gap'] * value + 1e-10 * value
    assert early['gap'] >= -1e-12


def test_from_lam_max_on_nothing_is_left():
    problem, start = random_problem()
    assert norms(group_lasso(problem, 1.001, start)[0]).max() == 0
    assert norms(group_lasso(problem, 0.99, start, tolerance=1e-7)[0]).count_nonzero() == 1


def test_small_lam_gives_the_targets_back():
    problem, start = random_problem()
    V, _ = group_lasso(problem, 1e-7, start, tolerance=1e-4)
    residual = problem.energy - 2 * (V * problem.cross).sum() + (V * problem.gram(V)).sum()
    assert residual <= 1e-6 * problem.energy


def test_orthonormal_features_have_a_closed_form():
    cross = torch.randn(3, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = SimpleNamespace(gram=lambda V: V, cross=cross, energy=cross.square().sum().item())
    V, report = group_lasso(problem, 0.6, torch.ones_like(cross), tolerance=1e-12)
    assert torch.allclose(
        V, cross * (1 - report['penalty'] / norms(cross)).clamp(min=0)[:, None], atol=1e-6
    )


def test_signed_features_whose_largest_eigenvector_is_orthogonal_to_the_start():
    """The power iteration begins at ones, and finds 0.5 here, where the largest eigenvalue is 3.5."""
    top = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64) / 2
    gram = 0.5 * torch.eye(4, dtype=torch.float64) + 3 * torch.outer(top, top)
    V0 = torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cross = (V0.flatten(1) @ gram).unflatten(1, (4, 1))
    energy = (V0 * cross).sum().item()
    problem = SimpleNamespace(
        gram=lambda V: (V.flatten(1) @ gram).unflatten(1, (4, 1)), cross=cross, energy=energy
    )
    V, report = group_lasso(problem, 0.2, torch.ones_like(V0), tolerance=1e-8)
    assert 0 <= report['gap'] <= 1e-8 and report['steps'] < 1000
    assert (norms(cross - problem.gram(V)) <= report['penalty'] * (1 + 1e-3)).all()


def test_ridge_solves_its_normal_equations():
    problem, start = random_problem()
    V, report = group_lasso(problem, 0.3, start, tolerance=1e-6)
    kept = norms(V) > 0
    assert not kept.all()
    decay = 0.1 * report['penalty'] / norms(V)
    refitted = ridge(problem, decay, V)
    gradient = (
        problem.cross - problem.gram(refitted) - torch.where(kept, decay, 0)[:, None] * refitted
    )
    assert (
        gradient[:, kept].abs().max() < 1e-6 * problem.cross.abs().max()
        and refitted[:, ~kept].abs().max() == 0
    )


# The problem of a layer


@pytest.mark.parametrize('net', [chain(), mlp()], ids=['conv', 'mlp'])
@pytest.mark.parametrize('index', [1, 2])
def test_gram_is_that_of_explicit_toeplitz_rows(net, index, monkeypatch):
    layers, weights = room._tensors(net, (1, 7, 7))
    made = room._layer_problem(layers[: index + 1], weights[:index], weights[: index + 1], IMAGES)
    monkeypatch.setattr(room, 'GRAM_COLUMNS', 1)
    kept = room._layer_problem(layers[: index + 1], weights[:index], weights[: index + 1], IMAGES)
    monkeypatch.setattr(room, 'CHUNK', 100)
    chunks = room._layer_problem(layers[: index + 1], weights[:index], weights[: index + 1], IMAGES)

    modules = list(net)
    layer = net.get_submodule(layers[index].name)
    cut = modules.index(layer)
    maps = nn.Sequential(*modules[:cut])(IMAGES).detach()
    targets = layer(maps).detach()
    shape = layers[index].kernel.shape
    rows, columns = (torch.from_numpy(axis).double() for axis in layers[index].taps)
    maps = maps.view(len(maps), shape[1], rows.shape[2], columns.shape[2])
    phi = torch.einsum('nchw,aph,bqw->cabnpq', maps, rows, columns).flatten(3).flatten(0, 2)
    gram, psi = (
        phi @ phi.T / phi.shape[1],
        targets.reshape(len(maps), shape[0], -1).transpose(0, 1).flatten(1),
    )
    V = torch.randn(2, shape[1], shape[2] * shape[3], dtype=torch.float64)
    for problem in (made, kept, chunks):
        assert torch.allclose(problem.gram(V).flatten(1), V.flatten(1) @ gram)
        assert torch.allclose(problem.cross.flatten(1), psi @ phi.T / phi.shape[1])
        assert problem.energy == pytest.approx((psi.square().sum() / phi.shape[1]).item())


def test_few_images_are_taken_evenly(monkeypatch):
    monkeypatch.setattr(room, 'FIT_IMAGES', 10)
    layers, weights = room._tensors(chain(), (1, 7, 7))
    few = room._layer_problem(layers[:2], weights[:1], weights[:2], IMAGES)
    assert few.energy == pytest.approx(
        room._layer_problem(layers[:2], weights[:1], weights[:2], IMAGES[::4]).energy
    )


# Balance


@pytest.mark.parametrize(
    'net', [chain(), mlp(), chain(wrap=weight_norm)], ids=['conv', 'mlp', 'weight norm']
)
def test_balanced_network_is_the_same_function_with_equal_norms(net):
    balanced = balance(net, (1, 7, 7))
    assert torch.allclose(balanced(IMAGES), net(IMAGES), rtol=1e-12, atol=1e-14)
    for incoming, outgoing, _ in neuron_norms(balanced, (1, 7, 7)):
        assert torch.allclose(incoming, outgoing, rtol=1e-10)
    assert measure_network(balanced, (1, 7, 7)).rho < measure_network(net, (1, 7, 7)).rho


def test_balance_of_one_hidden_layer_attains_the_sum_over_neurons():
    net = mlp((6,))
    ((incoming, outgoing, _),) = neuron_norms(net, (1, 7, 7))
    table = measure_network(balance(net, (1, 7, 7)), (1, 7, 7))
    assert table.rho == pytest.approx((incoming * outgoing).sum().item(), rel=1e-12)


def test_neuron_that_feeds_nothing_becomes_zero_on_both_sides():
    net = chain()
    with torch.no_grad():
        net[2].weight[:, 1] = 0
        net[2].weight[3] = 0
    balanced = balance(net, (1, 7, 7))
    (first, second, _), (third, fourth, _) = neuron_norms(balanced, (1, 7, 7))
    assert first[1] == second[1] == third[3] == fourth[3] == 0
    assert torch.allclose(balanced(IMAGES), net(IMAGES), rtol=1e-12, atol=1e-14)


# compress


@pytest.mark.parametrize('net', [chain(wrap=weight_norm), mlp()], ids=['conv', 'mlp'])
def test_tiny_lam_keeps_the_function(net):
    narrow, report = compress(net, IMAGES, 1e-7)
    assert (narrow(IMAGES) - net(IMAGES)).norm() < 1e-3 * net(IMAGES).norm()
    assert [layer['residual'] < 1e-3 for layer in report] == [True, True]


@pytest.mark.parametrize('refit', ['none', 'ridge'])
def test_copies_of_a_channel_are_merged(refit):
    """A network with a channel copied thrice is compressed to the function that the network without copies is."""
    net, copied = mlp((6, 5)), mlp((8, 5))
    with torch.no_grad():
        copied[1].weight[:6], copied[1].weight[6:] = net[1].weight, net[1].weight[:1]
        copied[3].weight[:, :6], copied[5].weight[:] = net[3].weight, net[5].weight
        copied[3].weight[:, 6:] = net[3].weight[:, :1] / 3
        copied[3].weight[:, 0] /= 3
    assert torch.allclose(net(IMAGES), copied(IMAGES))
    one, _ = compress(net, IMAGES, 0.02, refit, 1e-7)
    other, _ = compress(copied, IMAGES, 0.02, refit, 1e-7)
    assert torch.allclose(
        one(IMAGES), other(IMAGES), rtol=0, atol=2e-3 * one(IMAGES).abs().max().item()
    )


def test_rescaling_and_permuting_change_nothing():
    net, generator = chain((6, 7)), torch.Generator().manual_seed(3)
    narrow, report = compress(net, IMAGES, 0.1, 'ridge', 1e-5)
    lost = (narrow(IMAGES) - net(IMAGES)).norm() / net(
        IMAGES
    ).norm()  # the last fit's targets are the original's outputs
    assert report[-1]['residual'] == pytest.approx(lost.item(), rel=1e-6)
    assert 0 < report[0]['channels'] < 6 or 0 < report[1]['channels'] < 7
    for layer, width in ((0, 6), (1, 7)):
        factors = 2.0 ** torch.randint(-6, 7, (width,), generator=generator)
        other, again = compress(rescaled(net, layer, factors), IMAGES, 0.1, 'ridge', 1e-5)
        assert [row['channels'] for row in again] == [row['channels'] for row in report]
        assert torch.allclose(other(IMAGES), narrow(IMAGES), rtol=1e-6, atol=1e-9)
    order = torch.randperm(6, generator=generator)
    permuted = balance(net, (1, 7, 7))
    with torch.no_grad():
        permuted[0].weight.copy_(permuted[0].weight[order].clone())
        permuted[2].weight.copy_(permuted[2].weight[:, order].clone())
    other, again = compress(
        permuted, IMAGES[torch.randperm(40, generator=generator)], 0.1, 'ridge', 1e-5
    )
    assert [row['channels'] for row in again] == [row['channels'] for row in report]
    assert torch.allclose(other(IMAGES), narrow(IMAGES), rtol=1e-4, atol=1e-6)


def test_costs_and_refit_are_those_of_the_statement():
    """In features of filters of norm 1, the residual's correlation with a kept channel is the gradient of its penalty."""
    net = mlp((8,))
    with torch.no_grad():
        phi = (IMAGES.flatten(1) @ F.normalize(net[1].weight).T).relu()
        largest, sizes = (net(IMAGES).T @ phi).norm(dim=0).max(), {}
        for refit in ('none', 'ridge'):
            narrow, (report,) = compress(net, IMAGES, 0.1, refit, 1e-9)
            shares = ((net(IMAGES) - narrow(IMAGES)).T @ phi).norm(dim=0) / largest
            ((incoming, outgoing, _),) = neuron_norms(narrow, (1, 7, 7))
            sizes[refit] = incoming * outgoing
            if refit == 'none':  # lam lam_max on the kept channels, less on the others
                kept = shares > 0.1 * (1 - 1e-3)
                assert (shares < 0.1 * (1 + 1e-3)).all() and report['channels'] == kept.sum() < 8
    assert torch.allclose(shares[kept], 0.01 * sizes['ridge'] / sizes['none'], rtol=1e-3)


def test_equal_costs_would_not_be_invariant():
    """Why a channel costs the norm of its filter: with equal costs the solution hangs on the scale of the channels."""
    problem, start = random_problem()
    scale = 2.0 ** torch.arange(-3, 3, dtype=torch.float64)[:, None]
    V, _ = group_lasso(problem, 0.3, start, 1e-6)
    U, _ = group_lasso(scaled(problem, scale), 0.3, start / scale, 1e-6)
    assert ((norms(V) > 0) != (norms(U) > 0)).any()


def test_dead_channels_are_dropped():
    net = chain()
    with torch.no_grad():
        net[0].weight[2] = -net[0].weight[2].abs()  # never fires on images of positive pixels
    narrow, report = compress(net, IMAGES, 1e-6, 'none')
    assert report[0]['channels'] == 3
    assert trace_layers(narrow, (1, 7, 7))[0].weight.shape == (3, 1, 3, 3)


def test_digits_within_one_image_at_two_thirds_of_the_weights(digits, trained):
    net, _ = load_network(trained / 'CONV-2-16')
    narrow, _ = compress(net, digits.train_images, 1e-3)

    def error(net):
        return (net(digits.test_images).argmax(1) != digits.test_labels).sum().item()

    with torch.no_grad():
        assert error(narrow) <= error(net) + 1
    before, after = (
        measure_network(each, digits.input_shape)
        for each in (balance(net, digits.input_shape), narrow)
    )
    assert after.W.sum() < 0.65 * before.W.sum()
    assert after.rho <= before.rho
    plain, _ = compress(net, digits.train_images, 1e-3, 'none')
    assert measure_network(plain, digits.input_shape).rho < after.rho


@pytest.mark.parametrize(
    'arguments, words',
    [
        ({'lam': 0.0}, 'lam'),
        ({'lam': 1.0}, 'lam'),
        ({'lam': math.nan}, 'lam'),
        ({'refit': 'least squares'}, 'refit'),
        ({'images': IMAGES * math.nan}, 'images'),
        ({'images': IMAGES[:0]}, 'images'),
        (
            {
                'net': nn.Sequential(
                    nn.Flatten(), nn.Linear(49, 4), nn.ReLU(), nn.Linear(4, 3)
                ).double()
            },
            'bias',
        ),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(BadInput, match=words):
        compress(**({'net': mlp(), 'images': IMAGES, 'lam': 0.1} | arguments))


def test_a_layer_that_dies_is_named():
    net = mlp()
    with torch.no_grad():
        net[1].weight.copy_(-net[1].weight.abs())
    with pytest.raises(BadInput, match='layer 1 loses all its channels'):
        compress(net, IMAGES, 0.1)


# compress_layer


def alexnet(seed=0):
    """AlexNet in small, with batch normalization in front of a ReLU and behind one; images of 3 x 16 x 16."""
    torch.manual_seed(seed)
    features = (
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12),
    )
    pooled = nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((3, 3)), nn.Flatten(), nn.Dropout()
    first = nn.Linear(108, 20), nn.ReLU(), nn.Dropout()
    last = nn.Linear(20, 16), nn.ReLU(inplace=True), nn.BatchNorm1d(16), nn.Linear(16, 4)
    net = nn.Sequential(*features, *pooled, *first, *last).double()
    with torch.no_grad():
        for norm in (net[4], net[15]):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                tensor.normal_()
            norm.running_var.uniform_(0.5, 2)
    return net.eval()


PICTURES = torch.randn(
    60, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64
)
LINEAR = {
    '10': (12, 9),
    '13': (20, 1),
    '16': (16, 1),
}  # of alexnet: channels that the layer reads, and inputs of each


@pytest.mark.parametrize('name', LINEAR)
@pytest.mark.parametrize('refit', ['none', 'ridge'])
def test_a_layer_of_alexnet_is_fitted_and_its_channels_are_cut(name, refit):
    """What is left is the function of the whole network with zeros in the layer's columns of the others."""
    net, (channels, taps) = alexnet().train(), LINEAR[name]
    narrow, report = compress_layer(net, PICTURES, name, 0.02, refit)
    assert net.training and narrow.training
    assert (
        0 < report['channels'] == report['kept'].sum() < channels == len(report['kept'])
        and report['removed']
    )
    layer, zeroed = narrow.get_submodule(name), net.eval().get_submodule(name)
    wanted = net(PICTURES)
    inputs = report['kept'].repeat_interleave(taps)
    assert (
        layer.weight.shape == (zeroed.out_features, inputs.sum())
        and layer.in_features == inputs.sum()
    )
    assert torch.equal(layer.bias, zeroed.bias) == (
        name != '16'
    )  # a batch norm behind the ReLU leaves its shift
    with torch.no_grad():
        zeroed.weight.zero_()[:, inputs] = layer.weight
        zeroed.bias.copy_(layer.bias)
    found = narrow.eval()(PICTURES)
    assert torch.allclose(found, net(PICTURES), rtol=1e-10, atol=1e-12)
    assert (found - wanted).norm() < 0.5 * wanted.norm()
    if name == '16':  # the classifier, whose fit is that of the outputs less what is held
        shift = (
            net[15].bias
            - net[15].running_mean * net[15].weight / (net[15].running_var + net[15].eps).sqrt()
        )
        held = alexnet().get_submodule(name)
        targets = wanted - held(shift)
        assert report['residual'] == pytest.approx(
            ((found - wanted).norm() / targets.norm()).item(), rel=1e-6
        )


@pytest.mark.parametrize('name', LINEAR)
def test_tiny_lam_keeps_the_function_of_alexnet(name):
    net = alexnet()
    narrow, report = compress_layer(net, PICTURES, name, 1e-6, tolerance=1e-5)
    assert (narrow(PICTURES) - net(PICTURES)).norm() < 2e-3 * net(PICTURES).norm() and report[
        'residual'
    ] < 5e-3


@pytest.mark.parametrize('name, producer, norm', [('10', 3, 4), ('13', 10, None), ('16', 13, 15)])
def test_rescaled_channels_of_alexnet_stay_or_go_all_the_same(name, producer, norm):
    """A channel's filter and bias times a, what reads it divided by a; batch norms move what they take over."""
    net, (channels, taps) = alexnet(), LINEAR[name]
    factors = (
        2.0
        ** torch.randint(-4, 5, (channels,), generator=torch.Generator().manual_seed(0)).double()
    )
    other = alexnet()
    with torch.no_grad():
        layer = other[producer]
        moved = [layer.weight, layer.bias] if norm != 4 else [other[4].weight, other[4].bias]
        for tensor in moved:
            tensor.mul_(factors.view(-1, *[1] * (tensor.ndim - 1)))
        if norm == 15:
            other[15].running_mean.mul_(factors)
            other[15].weight.div_(factors)
        else:
            other.get_submodule(name).weight.div_(factors.repeat_interleave(taps))
    assert torch.allclose(other(PICTURES), net(PICTURES), rtol=1e-9)
    one, report = compress_layer(net, PICTURES, name, 0.02, tolerance=1e-6)
    two, again = compress_layer(other, PICTURES, name, 0.02, tolerance=1e-6)
    assert torch.equal(report['kept'], again['kept'])
    assert torch.allclose(one(PICTURES), two(PICTURES), rtol=1e-5, atol=1e-7)


def test_the_last_layer_of_a_chain_is_fitted_as_the_chain_is():
    net = mlp((8,))
    chain_, (report,) = compress(net, IMAGES, 0.1, 'ridge', 1e-8)
    narrow, alone = compress_layer(net, IMAGES, '3', 0.1, 'ridge', 1e-8)
    assert alone['channels'] == report['channels'] < 8 and alone['residual'] == pytest.approx(
        report['residual'], rel=1e-5
    )
    assert torch.allclose(narrow(IMAGES), chain_(IMAGES), rtol=1e-4, atol=1e-7)


class Residual(nn.Module):
    """Its channels have two readers, the last layer and the sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = nn.Linear(49, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x.flatten(1)))
        return self.last(x + F.relu(self.inner(x)))


def test_columns_stay_as_zeros_where_the_channels_cannot_be_cut():
    torch.manual_seed(0)
    net = Residual().double()
    narrow, report = compress_layer(net, IMAGES, 'last', 0.2)
    assert not report['removed'] and 0 < report['channels'] < 6
    assert torch.equal(narrow.last.weight.ne(0).any(0), report['kept']) and torch.equal(
        narrow.last.bias, net.last.bias
    )
    assert torch.equal(narrow.stem.weight, net.stem.weight)


def test_what_is_made_shares_nothing_with_the_network_that_it_is_made_from():
    net = alexnet()
    before = copy.deepcopy(net.state_dict())
    for name in ('13', ['10', '16']):
        narrow, _ = compress_layer(net, PICTURES, name, 0.03, tolerance=1e-2)
        with torch.no_grad():
            for tensor in narrow.state_dict().values():
                tensor.add_(100)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_several_layers_are_fitted_from_the_input_on():
    """Each to the original pre-activations, from the features of what is narrower in front of it; in any order of names."""
    net = alexnet()
    narrow, reports = compress_layer(net, PICTURES, ['16', '13', '10'], 0.02, tolerance=1e-4)
    assert list(reports) == ['10', '13', '16'] and all(
        report['removed'] for report in reports.values()
    )
    for (name, report), widths in zip(reports.items(), (9, 1, 1)):
        assert narrow.get_submodule(name).in_features == report['channels'] * widths
    first, alone = compress_layer(net, PICTURES, '10', 0.02, tolerance=1e-4)
    assert torch.equal(reports['10']['kept'], alone['kept']) and torch.equal(
        first[3].weight, narrow[3].weight
    )
    with (
        torch.no_grad()
    ):  # the residual of the last layer is that of the outputs, less what is held
        held = net[16](
            net[15].bias
            - net[15].running_mean * net[15].weight / (net[15].running_var + net[15].eps).sqrt()
        )
        lost = (narrow(PICTURES) - net(PICTURES)).norm() / (net(PICTURES) - held).norm()
    assert reports['16']['residual'] == pytest.approx(lost.item(), rel=1e-6)
    second, _ = compress_layer(first, PICTURES, '13', 0.02, tolerance=1e-4)
    blind, _ = compress_layer(second, PICTURES, '16', 0.02, tolerance=1e-4)
    assert lost < (blind(PICTURES) - net(PICTURES)).norm() / (net(PICTURES) - held).norm()


def test_costs_of_one_and_zeros_that_stay():
    net = alexnet()
    with torch.no_grad():
        net[10].weight[1] *= 100  # a loud channel, which is cheap where all cost one
        net[10].bias[1] *= 100
        net[13].weight[:, 1] /= 100
    narrow, report = compress_layer(net, PICTURES, '13', 0.002)
    zeroed, same = compress_layer(net, PICTURES, '13', 0.002, remove=False)
    assert torch.equal(report['kept'], same['kept']) and (same['removed'], same['why']) == (
        False,
        'remove = False',
    )
    assert zeroed[10].weight.equal(net[10].weight) and torch.equal(
        zeroed[13].weight.ne(0).any(0), report['kept']
    )
    assert torch.allclose(zeroed(PICTURES), narrow(PICTURES), rtol=1e-10)
    one, other = compress_layer(net, PICTURES, '13', 0.002, cost='one')
    assert (
        other['channels'] < report['channels']
        and other['kept'][1]
        and one[10].out_features == other['channels']
    )


def test_copies_of_a_channel_are_not_merged():
    """Their weights add up, whatever the shares, and the objective does not tell: where one stays, all do."""
    net = alexnet()
    with torch.no_grad():
        net[10].weight[:3], net[10].bias[:3] = (
            net[10].weight[1:2].clone(),
            net[10].bias[1:2].clone(),
        )
    _, report = compress_layer(net, PICTURES, '13', 0.002)
    assert report['kept'][:3].all() and report['channels'] < 20


class Branch(nn.Module):
    """A convolution, what the tests put between its ReLU and the classifier, and the classifier."""

    def __init__(self, between, inputs):
        super().__init__()
        torch.manual_seed(0)
        self.between, self.conv, self.last = between, nn.Conv2d(3, 6, 3, 2), nn.Linear(inputs, 4)

    def forward(self, x):
        return self.last(self.between(self.conv(x)))


class Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


CUT = {
    'mean': (lambda x: F.relu(x).mean([2, 3]), 6),
    'mean, kept': (lambda x: torch.mean(x.relu(), (-2, -1), keepdim=True).flatten(1), 6),
    'gelu': (lambda x: F.gelu(x).flatten(1), 294),
    'tanh': (lambda x: F.avg_pool2d(torch.tanh(x), 2).flatten(1), 54),
    'sigmoid': (lambda x: x.sigmoid().flatten(1), 294),
    'silu': (lambda x: F.silu(x).flatten(1), 294),
}


@pytest.mark.parametrize('function, inputs', CUT.values(), ids=CUT)
def test_channels_behind_means_and_functions_are_cut(function, inputs):
    net = Branch(Between(function), inputs).double()
    narrow, report = compress_layer(net, PICTURES, 'last', 0.9, tolerance=1e-2)
    assert (report['removed'], report['why']) == (True, '') and len(narrow.conv.weight) == report[
        'channels'
    ] < 6
    zeroed, _ = compress_layer(net, PICTURES, 'last', 0.9, tolerance=1e-2, remove=False)
    assert torch.allclose(zeroed(PICTURES), narrow(PICTURES), rtol=1e-9, atol=1e-12)


FIXED = {
    'size': (lambda x: (y := F.relu(x)).view(y.size(0), 6 * 7 * 7), 294),
    'shape': (lambda x: (y := F.relu(x)).reshape(y.shape[0], 6 * 7 * 7), 294),
    '-1': (lambda x: F.max_pool2d(F.relu(x), 2).view(-1, 54), 54),
    'a tuple': (lambda x: torch.reshape(F.relu(x), (-1, 294)), 294),
}


@pytest.mark.parametrize('function, inputs', FIXED.values(), ids=FIXED)
def test_channels_behind_a_view_of_a_fixed_size_are_groups_that_stay(function, inputs):
    """Behind a flattening they would be cut, to the same function; the view takes no fewer."""
    pool = nn.Sequential(
        nn.ReLU(), nn.MaxPool2d(2) if inputs == 54 else nn.Identity(), nn.Flatten()
    )
    net, other = (Branch(between, inputs).double() for between in (Between(function), pool))
    narrow, report = compress_layer(net, PICTURES, 'last', 0.5, tolerance=1e-4)
    cut, same = compress_layer(other, PICTURES, 'last', 0.5, tolerance=1e-4)
    assert same['removed'] and torch.equal(report['kept'], same['kept']) and len(same['kept']) == 6
    assert 'it wants a fixed number of channels' in report['why'] and len(narrow.conv.weight) == 6
    assert torch.allclose(narrow(PICTURES), cut(PICTURES), rtol=1e-9)


UNCUT = {
    'two readers': (lambda x: (x + F.relu(x)).flatten(1), 294, 'add'),
    'rows that are no images': (
        lambda x: x.relu().view(-1, 49),
        49,
        'last: its input is not one row an image',
    ),
    'other axes': (lambda x: F.relu(x).transpose(1, 2).flatten(1), 294, 'transpose'),
    'positions': (
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(294), nn.ReLU()),
        294,
        'between.1 normalizes the positions',
    ),
}


@pytest.mark.parametrize('between, inputs, why', UNCUT.values(), ids=UNCUT)
def test_where_channels_are_not_cut_the_report_says_why(between, inputs, why):
    net = (
        Branch(between if isinstance(between, nn.Module) else Between(between), inputs)
        .double()
        .eval()
    )
    narrow, report = compress_layer(net, PICTURES, 'last', 0.3, tolerance=1e-2)
    assert (
        why in report['why']
        and not report['removed']
        and torch.equal(narrow.conv.weight, net.conv.weight)
    )
    assert (
        torch.equal(narrow.last.weight.ne(0).any(0), report['kept'])
        and 0 < report['channels'] < inputs
    )


def test_few_images_go_through_the_network_at_once(monkeypatch):
    sizes, net = [], alexnet()
    one, _ = compress_layer(net, PICTURES, '13', 0.02)
    monkeypatch.setattr(linear, 'images_per_pass', lambda net, images: 7)
    forward = nn.AdaptiveAvgPool2d.forward
    monkeypatch.setattr(
        nn.AdaptiveAvgPool2d, 'forward', lambda self, x: sizes.append(len(x)) or forward(self, x)
    )
    two, _ = compress_layer(net, PICTURES, '13', 0.02)
    assert (
        max(sizes) == 7
        and sum(sizes) == 61
        and torch.allclose(one[13].weight, two[13].weight, rtol=1e-6)
    )


@pytest.mark.parametrize(
    'name, arguments, words',
    [
        ('11', {}, r"'11': not a linear layer of Sequential; it has 10, 13, 16"),
        ('conv', {}, "'conv': not a linear layer"),
        ('10', {'lam': 1.5}, 'lam'),
        ('10', {'images': PICTURES / 0}, 'images'),
        ('10', {'refit': 'exact'}, 'refit'),
        ('10', {'cost': 'two'}, "cost = 'two'"),
        (
            '10',
            {'images': PICTURES[:, :2]},
            r'images: Sequential does not take one of shape \(1, 2, 16, 16\)',
        ),
        ('10', {'images': PICTURES[:, :, :2]}, 'images: Sequential does not take one'),
        ([], {}, 'name: at least one layer'),
        (['10', '12'], {}, "'12': not a linear layer"),
    ],
)
def test_bad_arguments_of_a_layer_are_named(name, arguments, words):
    net = alexnet()
    with pytest.raises(BadInput, match=words):
        compress_layer(**({'net': net, 'images': PICTURES, 'name': name, 'lam': 0.1} | arguments))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


# The network without its dead channels


def test_the_shipped_pruned_network_is_exported(tmp_path):
    net, _ = load_network(ROOT / 'results' / 'sparse-certificate' / 'CONV-3-32')
    images = torch.rand(300, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    save(tmp_path / 'dead.pt', drop_dead(net), (1, 28, 28))
    small = load(tmp_path / 'dead.pt')
    weights = [weight for weight in small.parameters()]
    assert [len(weight) for weight in weights] == [4, 3, 13, 10] and sum(
        weight.numel() for weight in weights
    ) == 81_470
    assert (tmp_path / 'dead.pt').stat().st_size < 330_000
    with torch.no_grad():
        assert torch.equal(small(images).argmax(1), net(images).argmax(1))
        whole, small = net(images).abs().max(), drop_dead(net.double())
        images = images.double()
        assert (small(images) - net(images)).abs().max() < 1e-14 * max(1, whole)


def test_constants_of_batch_normalized_channels_are_kept_where_padding_needs_them():
    """Half of each layer's filters are emptied; what is left of them is the constant that batch normalization makes."""
    settings = settings_of(network='CONVBN', depth=3, width=16, normalization='batch')
    torch.manual_seed(0)
    net = get_network(settings, (1, 16, 16), 10).double().eval()
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    norms_ = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for layer, norm in zip(convolutions, norms_):
            layer.weight[::2] = 0
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                tensor.normal_()
            norm.running_var.uniform_(0.5, 2)
    small = drop_dead(net)
    wanted = []
    for index, norm in enumerate(norms_):
        value = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
        padded = (
            1 <= index <= 3
        )  # the stem's second convolution and the classifier read without padding
        wanted.append(8 + int((value[::2] > 0).sum()) * padded)
    found = [len(module.weight) for module in small if hasattr(module, 'weight')]
    assert found == [*wanted, 10] and 8 < max(found[:-1]) < 16
    images = torch.rand(50, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(
            small(images), net(images), rtol=0, atol=1e-14 * max(1, net(images).abs().max().item())
        )


def test_a_network_that_is_dead_is_exported_too():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)
    ).double()
    with torch.no_grad():
        net[0].weight.zero_()
        net[2].weight.zero_()
        small = drop_dead(net)
        assert [len(module.weight) for module in small if hasattr(module, 'weight')] == [1, 1, 3]
        assert torch.allclose(small(IMAGES), net(IMAGES), rtol=0, atol=1e-14)


def test_networks_that_are_no_chain_are_refused_by_name():
    settings = settings_of(network='CONVRES', depth=1, width=4, normalization='batch')
    with pytest.raises(BadInput, match='add'):
        drop_dead(get_network(settings, (1, 16, 16), 10).eval())
    with pytest.raises(BadInput, match='0 .Conv2d.'):
        drop_dead(nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3)))
    with pytest.raises(BadInput, match='0 .Linear.'):
        drop_dead(nn.Sequential(nn.Linear(7, 3), nn.ReLU()))


# The width theorem


@pytest.mark.parametrize(
    'K, N, D, rank', [(9, 3, 2, 3), (30, 5, 5, 5), (40, 8, 3, 4), (20, 6, 5, 2)]
)
def test_solutions_within_the_sharper_width_bound(K, N, D, rank):
    """On random exact problems a solution is found that meets its constraints, is optimal, and is as narrow as proved."""
    rng, counts = np.random.default_rng(0), []
    for _ in range(25):
        features = rng.standard_normal((K, rank)) @ rng.standard_normal((rank, N))
        targets = rng.standard_normal((D, K)) @ features
        q = min(D, rank)
        t, dual, gap = exact_lasso(features, targets)
        sparse = vertex(t, dual, features)
        V = (dual @ features.T) * sparse
        assert gap < 1e-6 and np.linalg.norm(V @ features - targets) < 1e-6 * np.linalg.norm(
            targets
        )
        assert np.linalg.norm(V, axis=0).sum() == pytest.approx(t.sum(), rel=1e-6)
        counts.append(np.count_nonzero(sparse))
    assert max(counts) <= width_bound(rank, q) <= rank * (rank + 1) / 2
    if (N, D) == (3, 2):
        assert max(counts) == 5  # attained; rank times rank would be 6


@pytest.mark.parametrize(
    'figure, place, counts', [(4, 0, (2, 2)), (4, 1, (None, 8))], ids=['r = 2', 'r = 5']
)
def test_problems_of_the_figures_need_as_many_neurons_as_ever(figure, place, counts):
    """The quicker ones of docs/width_theorem.py, with seeds 0 and 1."""
    for seed, count in enumerate(counts):
        if count:
            features, targets = draw_problem(np.random.default_rng(seed), **FIGURES[figure][place])
            t, dual, _ = exact_lasso(features, targets)
            assert np.count_nonzero(vertex(t, dual, features)) == count


@pytest.mark.parametrize(
    'problem',
    [
        *FIGURES[3],
        *FIGURES[4],
        {'K': 9, 'N': 4, 'D': 3, 'rY': 2},
        {'K': 2, 'N': 3, 'D': 2, 'rX': 1},
    ],
)
def test_problems_have_the_sizes_and_ranks_that_are_asked_for_and_solutions(problem):
    features, targets = draw_problem(np.random.default_rng(0), **problem)
    assert (features.shape, targets.shape) == (
        (problem['K'], problem['N']),
        (problem['D'], problem['N']),
    )
    r = problem.get('rX', min(features.shape))
    assert np.linalg.matrix_rank(features) == r
    assert np.linalg.matrix_rank(targets) == min(problem['D'], r, problem.get('rY', r))
    assert (
        np.linalg.matrix_rank(np.concatenate([features, targets])) == r
    )  # V features = targets has a solution


def test_arguments_of_the_width_theorem(capsys, tmp_path, monkeypatch):
    """The pictures of the page are drawn by the commands of the page alone; what makes no sense is one line."""
    monkeypatch.chdir(tmp_path)
    docs, defaults = (
        ROOT / 'docs',
        [{'K': K, 'N': 3, 'D': 2, 'rX': 0, 'rY': 0} for K in range(7, 12)],
    )
    assert arguments([]) == (defaults, 100, docs / 'width_theorem.png')
    assert arguments(['--figure', '3']) == (FIGURES[3], 10, docs / 'width_theorem_3.png')
    assert arguments(['--figure', '4', '--draws', '2']) == (
        FIGURES[4],
        2,
        Path('my_width_theorem_4.png'),
    )
    assert arguments(['--K', '2', '--rY', '1'])[0] == [{'K': 2, 'N': 3, 'D': 2, 'rX': 0, 'rY': 1}]
    for words, said in (
        ('--K 9 2', '--K 2: fewer neurons than the 3 samples'),
        ('--figure 4 --draws 0', '--draws 0'),
        ('--draws 0', '--draws 0'),
        ('--K 2 --rY 3', '--rY must lie between 0 and 2'),
    ):
        with pytest.raises(SystemExit):
            arguments(words.split())
        assert f'error: {said}' in capsys.readouterr().err.splitlines()[-1]
    main(*arguments(['--K', '2', '--rY', '1', '--draws', '2']))
    assert (
        capsys.readouterr().out.endswith('2 to 2 neurons, median 2\n')
        and (tmp_path / 'my_width_theorem.png').exists()
    )


# Files and the command


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A results folder with CONV-2-16, trained on the digits as the quick start trains."""
    folder = tmp_path_factory.mktemp('trained') / '1'
    flags = '--depth', 2, '--width', 16, '--eval-every', 150, '--certify-every', 0
    status, _, errors = run(
        *DIGITS, *flags, '--results-path', folder, '--results-dir', folder.parent, timeout=300
    )
    assert status == 0, errors
    return folder


def command(*arguments):
    words = [sys.executable, '-m', 'studies.compress', *map(str, arguments)]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300)
    return process.returncode, process.stdout, process.stderr


@pytest.fixture(scope='module')
def narrowed(trained):
    """The folder and the rows that compress.py leaves of the trained network at two lams."""
    status, _, errors = command(trained, '--lam', '1e-2', '0.1', '--refit', 'none')
    assert status == 0, errors
    folder = trained.parent / '2'
    return folder, list(csv.DictReader((folder / 'CONV-2-16' / 'compress.csv').open()))


def test_command_leaves_a_folder_of_its_own(trained, narrowed, digits):
    folder, rows = narrowed
    assert 'compress.py' in (folder / 'global_settings.py').read_text().splitlines()[0]
    assert [float(row['lam']) for row in rows] == [0, 0.01, 0.1]
    assert rows[0]['channels'] == '16|16'
    assert (folder / 'figure.png').exists() or (folder / 'compress.png').exists()
    source, settings = load_network(trained / 'CONV-2-16')
    assert {(row['round'], row['epoch']) for row in rows} == {('0', str(settings.epochs))}
    for row in rows:
        path = folder / 'CONV-2-16' / f'lam-{row["lam"]}.pt'
        net = load(path)
        with torch.no_grad():
            outputs = net(digits.test_images)
        wrong = (outputs.argmax(1) != digits.test_labels).double().mean().item()
        loss = (outputs - F.one_hot(digits.test_labels, 10)).square().mean().item()
        table = measure_network(net, digits.input_shape)
        assert wrong == float(row['test_error']) and loss == pytest.approx(
            float(row['test_loss']), rel=1e-5
        )
        assert table.W.sum() == int(row['weights']) and path.stat().st_size == int(row['bytes'])
        assert table.rho == pytest.approx(float(row['rho'])) and float(row['speed_up']) > 0
    assert torch.allclose(
        load(folder / 'CONV-2-16' / 'lam-0.pt')(digits.test_images),
        source(digits.test_images),
        atol=1e-5,
    )
    assert 'made narrower' in refused('--results-path', folder, '--resume')


def test_bounds_hold_for_all_narrower_networks_at_once(trained, narrowed, digits):
    """The data chose one of 16 * 16 pairs of widths: each bound is that at delta / 256; the test set chose nothing."""
    folder, rows = narrowed
    _, settings = load_network(trained / 'CONV-2-16')
    for row in rows:
        net = load(folder / 'CONV-2-16' / f'lam-{row["lam"]}.pt')
        with torch.no_grad():
            margins = classification_margins(net(digits.train_images), digits.train_labels)
        data = measure_data(net, digits.train_images)
        united, single = (
            evaluate_bounds(net, data, margins, settings.delta / choices, settings.gamma)
            for choices in (256, 1)
        )
        for column in ('our_bound', 'corrected_bound', 'path_bound', 'sedghi_bound'):
            assert float(row[column]) == pytest.approx(united[column], rel=1e-6)
            assert float(row[column]) > single[column] * (1 + 1e-5)
        error = float(row['test_error'])
        alone = set_bound(error, len(digits.test_images), settings.delta)
        assert float(row['test_set_bound']) == pytest.approx(alone, rel=1e-9)


def test_certificates_hold_for_all_narrower_networks_at_once(digits, monkeypatch, tmp_path):
    deltas = []
    monkeypatch.setattr(
        evaluation, 'certify', lambda net, images, labels, delta, found: deltas.append(delta) or {}
    )
    settings = settings_of(dataset_name='digits', depth=2, width=4, certify_every=1, epochs=1)
    net = get_network(settings, digits.input_shape, 10).eval()
    options = SimpleNamespace(lam=[], layer=[])
    (tmp_path / 'run').mkdir()
    compress_run(net, settings, (0, 1), options, tmp_path / 'run')
    assert deltas == [settings.delta / 16] * 2


def small_alexnet(settings, input_shape, num_classes):
    """A family of a user's own: batch normalization, max and adaptive pooling, dropout and three linear layers."""
    width = settings.width
    features = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)
    first = (
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
    )
    linear = nn.Linear(8 * width, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 24), nn.ReLU()
    return nn.Sequential(*features, *first, *linear, nn.Linear(24, num_classes))


def test_layers_of_an_alexnet_of_the_users_own(tmp_path, digits, monkeypatch, capsys):
    """Pooling, dropout and batch normalization stay as they are, in the file too."""
    monkeypatch.setitem(models.NETWORKS, 'ALEX', small_alexnet)
    flags = (
        '--network',
        'ALEX',
        '--normalization',
        'none',
        '--bias',
        'True',
        '--width',
        6,
        '--epochs',
        2,
        '--results-dir',
        tmp_path,
    )
    train_small(tmp_path / '1', *flags)
    (name,) = (path.name for path in (tmp_path / '1').iterdir() if path.is_dir())
    layers = '--layer', '14', '--layer', '9', '--layer', '12'
    assert compress_main([str(tmp_path / '1'), *layers, '--lam', '0.05']) == 0, (
        capsys.readouterr().err
    )
    net, _ = load_network(tmp_path / '1' / name)
    rows = list(csv.DictReader((tmp_path / '2' / name / 'compress.csv').open()))
    assert [row['layer'] for row in rows] == ['14|9|12'] * 2 and rows[0]['channels'] == '6|12|32|24'
    whole, narrow = (load(tmp_path / '2' / name / f'lam-{row["lam"]}.pt') for row in rows)
    made, reports = compress_layer(net, digits.train_images, ['9', '12', '14'], 0.05)
    with torch.no_grad():
        assert torch.equal(whole(digits.test_images), net(digits.test_images))
        outputs = narrow(digits.test_images)
        assert torch.allclose(outputs, made(digits.test_images), atol=1e-4)
    assert (
        isinstance(narrow[1], nn.BatchNorm2d)
        and isinstance(narrow[7], nn.Flatten)
        and not narrow.training
    )
    widths = [reports[layer]['channels'] for layer in ('9', '12', '14')]
    assert rows[1]['channels'] == '|'.join(map(str, (6, *widths))) and widths != [12, 32, 24]
    assert [float(cell) for cell in rows[1]['residual'].split('|')] == pytest.approx(
        [reports[layer]['residual'] for layer in ('14', '9', '12')], rel=2e-2
    )
    assert (
        sum(weight.numel() for weight in narrow.parameters())
        == int(rows[1]['weights'])
        < int(rows[0]['weights'])
    )
    assert (outputs.argmax(1) != digits.test_labels).double().mean().item() == float(
        rows[1]['test_error']
    )
    assert float(rows[1]['path_norm']) > 0
    monkeypatch.delitem(models.NETWORKS, 'ALEX')
    with pytest.raises(BadInput, match="network = 'ALEX'"):
        load(tmp_path / '2' / name / 'lam-0.05.pt')


def test_one_layer_of_a_trained_network(trained, digits):
    status, stdout, errors = command(trained, '--layer', 5, '--lam', '1e-2')
    assert status == 0, errors
    (line,) = [line for line in stdout.splitlines() if 'from' in line]
    folder = Path(line.partition(':')[0])
    whole, row = csv.DictReader((folder / 'compress.csv').open())
    net, _ = load_network(trained / 'CONV-2-16')
    narrow, report = compress_layer(net, digits.train_images, '5', 1e-2)
    assert (row['layer'], row['channels']) == ('5', f'16|{report["channels"]}') and report[
        'channels'
    ] < 16
    assert float(row['residual']) == pytest.approx(report['residual'], rel=1e-2)
    with torch.no_grad():
        found = load(folder / 'lam-0.01.pt')(digits.test_images)
        assert torch.allclose(found, narrow(digits.test_images), atol=1e-4)
        assert torch.allclose(
            load(folder / 'lam-0.pt')(digits.test_images), net(digits.test_images), atol=1e-5
        )
    assert float(whole['train_loss']) > 0 and float(row['train_loss']) != float(whole['train_loss'])


def test_pruned_network_is_made_smaller_by_the_command(tmp_path, digits):
    flags = (
        '--density',
        0.1,
        '--initial-mask',
        'random',
        '--width',
        16,
        '--epochs',
        2,
        '--eval-every',
        2,
    )
    train_small(
        tmp_path / '1', *flags, '--measures-every', 2, '--results-dir', tmp_path
    )  # of distances, to other widths none
    status, stdout, errors = command(tmp_path / '1')
    assert status == 0, errors
    (table,) = tmp_path.glob('2/*/compress.csv')
    whole, row = csv.DictReader(table.open())
    net, settings = load_network(tmp_path / '1' / table.parent.name)
    small = load(table.parent / 'dead.pt')
    assert (whole['lam'], row['lam'], row['epoch']) == (
        '0',
        '',
        '2',
    ) and 'not finished' not in stdout
    assert (
        sum(weight.numel() for weight in small.parameters())
        == int(row['weights'])
        < int(whole['weights'])
    )
    assert int(row['bytes']) < int(whole['bytes']) and row['test_error'] == whole['test_error']
    with torch.no_grad():
        assert torch.allclose(small(digits.test_images), net(digits.test_images), atol=1e-6)
    path = tmp_path / '1' / 'global_settings.py'
    path.write_text(path.read_text().replace('epochs = 2 ', 'epochs = 5 '))
    status, stdout, errors = command(tmp_path / '1')
    assert status == 0, errors
    said = 'its training is not finished; the last row is that of epoch 2 of round 0'
    assert said in stdout and said in (tmp_path / '3' / 'global_settings.py').read_text()


def test_ctrl_c_leaves_the_rows_that_are_done(trained):
    lams = [f'{0.001 * k}' for k in range(1, 200)]
    words = [sys.executable, '-m', 'studies.compress', str(trained), '--lam', *lams]
    before = set(trained.parent.iterdir())
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not any('lam 0.001' in line for line in iter(process.stdout.readline, '')):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert (
        process.returncode == 130
        and errors.count('\n') == 1
        and 'the rows that are done are kept' in errors
    )
    (folder,) = set(trained.parent.iterdir()) - before
    rows = list(csv.DictReader((folder / 'CONV-2-16' / 'compress.csv').open()))
    assert 2 <= len(rows) < len(lams) and all(row['test_set_bound'] for row in rows)
    assert {path.name for path in folder.rglob('*.pt')} >= {f'lam-{row["lam"]}.pt' for row in rows}
    assert not list(folder.rglob('*.tmp'))


@pytest.mark.parametrize(
    'arguments, words',
    [
        (('--lam', 2), 'lam'),
        (('--lam', 'small'), 'lam'),
        (('--lam', 0.1, '--run', 2), '--run 2'),
        (('--lam', 0.1, '--refit', 'exact'), 'refit'),
        (('--layer', '5'), '--layer 5'),
        (('--layer', '0', '--lam', 0.1), "'0': not a linear layer"),
        (('--layer', '7', '--layer', '7', '--lam', 0.1), '--layer 7: is listed twice'),
    ],
)
def test_bad_command_lines_are_one_line(trained, arguments, words):
    before = sorted(path.name for path in trained.parent.iterdir())
    status, _, errors = command(trained, *arguments)
    assert (status, errors.count('\n')) == (2, 1) and words in errors
    assert sorted(path.name for path in trained.parent.iterdir()) == before


def test_folders_without_networks_are_refused(tmp_path, trained):
    status, _, errors = command(tmp_path, '--lam', 0.1)
    assert status == 2 and 'not a results folder' in errors
    (tmp_path / 'global_settings.py').write_text((trained / 'global_settings.py').read_text())
    status, _, errors = command(tmp_path, '--lam', 0.1)
    assert status == 2 and 'checkpoint' in errors and errors.count('\n') == 1


@pytest.mark.parametrize('knob, value', [('label_noise', '0.5'), ('normalize', 'True')])
def test_other_settings_than_those_of_the_training_are_refused(tmp_path, trained, knob, value):
    shutil.copytree(trained, tmp_path / 'run')
    path = tmp_path / 'run' / 'global_settings.py'
    path.write_text(re.sub(rf'(?m)^{knob} = \S+', f'{knob} = {value}', path.read_text()))
    before = sorted(path.name for path in trained.parent.iterdir())
    status, _, errors = command(tmp_path / 'run')
    assert status == 2 and f'was trained with {knob} = ' in errors and errors.count('\n') == 1
    assert sorted(path.name for path in trained.parent.iterdir()) == before


def test_other_data_than_those_of_the_training_are_refused(trained, digits, monkeypatch):
    labels = digits.test_labels.flip(0)
    other = SimpleNamespace(**vars(digits) | {'test_labels': labels})
    monkeypatch.setattr('launch.get_inputs', lambda settings: (torch.device('cpu'), other))
    with pytest.raises(BadInput, match='was trained on other data'):
        load_source(trained / 'CONV-2-16')


@pytest.mark.parametrize('name', [b'two\nlines', b'\xff'])
def test_a_folder_that_no_settings_file_can_name_is_refused(tmp_path, trained, name):
    folder = tmp_path / os.fsdecode(name)
    shutil.copytree(trained, folder)
    status, _, errors = command(folder)
    assert status == 2 and 'rename the folder' in errors and errors.count('\n') == 1


def test_files_that_hold_no_network_are_refused(tmp_path, trained):
    with pytest.raises(BadInput, match='no such file'):
        load(tmp_path / 'none.pt')
    with pytest.raises(BadInput, match='does not hold'):
        load(trained / 'CONV-2-16' / 'model.pt')
