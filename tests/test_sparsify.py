"""Masks at the start, pruning rounds with rewinding, regrowth: on the digits, with the optimizer of a training."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import settings_of
from torch import nn

import sparsify
from conf import BadInput
from measures.masks import density, hidden_readers, weight_layers, weight_mask
from measures.paths import path_norm
from models import get_network
from models.weight_norm import add_masks, free_weight, set_mask

MASKS = ('random', 'erk', 'snip', 'synflow')


class Training:
    """A training on the digits, as train.py drives sparsify: `step(n)` takes n steps, updates of the masks among them."""

    def __init__(self, digits, steps=200, **flags):
        self.settings = settings_of(**({'dataset_name': 'digits', 'width': 8, 'lr': 0.05} | flags))
        self.images, self.targets = digits.train_images, torch.eye(10)[digits.train_labels]
        self.shape, self.number, self.steps = digits.input_shape, 0, steps
        torch.manual_seed(self.settings.seed)
        self.net = get_network(self.settings, self.shape, 10).to(memory_format=torch.channels_last)
        self.dense = copy.deepcopy(self.net.state_dict())
        sparsify.initialize(self.net, self.settings, self.images, self.targets, F.mse_loss)
        self.saved = copy.deepcopy(self.net.state_dict())
        self.layers = {name: self.net.get_submodule(name) for name in sparsify.prunable(self.net)}
        rates = {
            'lr': self.settings.lr,
            'momentum': 0.9,
            'weight_decay': self.settings.weight_decay,
        }
        self.optimizer = torch.optim.SGD(self.net.parameters(), **rates, fused=True)

    def loss(self):
        chosen = torch.from_numpy(
            np.random.default_rng((7, self.number)).integers(0, len(self.images), 32)
        )
        return F.mse_loss(self.net(self.images[chosen]), self.targets[chosen])

    def step(self, count=1):
        for _ in range(count):
            due = sparsify.regrow_due(self.settings, self.number, self.steps)
            if not due or self.settings.regrow == 'random':
                self.optimizer.zero_grad()
                self.loss().backward()
                self.optimizer.step()
            if due:
                sparsify.regrow(
                    self.net, self.optimizer, self.settings, self.number, self.steps, self.loss
                )
            self.number += 1
        return self

    def prune(self, round_=1, **flags):
        vars(self.settings).update(flags)
        sparsify.prune(self.net, self.settings, round_, self.shape)
        return self.masks

    @property
    def masks(self):
        return {name: weight_mask(layer).clone() for name, layer in self.layers.items()}

    @property
    def weights(self):
        return {
            name: layer.weight.detach().clone() for name, layer in weight_layers(self.net).items()
        }

    def momentum(self, layer):
        return self.optimizer.state[free_weight(layer)]['momentum_buffer']

    def addresses(self):
        tensors = [
            *self.net.state_dict().values(),
            *(state['momentum_buffer'] for state in self.optimizer.state.values()),
        ]
        return [tensor.data_ptr() for tensor in tensors]


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def living(masks):
    return [int(mask.sum()) for mask in masks.values()]


# --- masks ---


def test_masks_of_ones_change_no_digit(digits):
    dense, masked = Training(digits).step(30), Training(digits, prune_rounds=1).step(30)
    assert not any('mask' in name for name in dense.net.state_dict())
    assert set(dense.net.state_dict()) - set(masked.net.state_dict()) == {
        '7.weight'
    }  # of the plain layer
    assert sum('mask' in name for name in masked.net.state_dict()) == 4
    assert equal(dense.weights, masked.weights)
    sparse = Training(digits, density=0.5, initial_mask='erk')
    renamed = {'7.weight': '7.parametrizations.weight.original'}
    drawn = {name: sparse.dense[renamed.get(name, name)] for name in dense.dense}
    assert equal(drawn, dense.dense)  # no draw but the network's own


@pytest.mark.parametrize('initial_mask', MASKS)
def test_masked_weights_stay_exactly_zero(digits, initial_mask):
    training = Training(digits, density=0.2, initial_mask=initial_mask)
    before = training.masks
    training.step(100)
    assert equal(before, training.masks) and density(training.net) == round(0.2 * 2544) / 2544
    for name, layer in training.layers.items():
        dead = ~before[name]
        for tensor in (layer.weight, free_weight(layer), training.momentum(layer)):
            assert tensor[dead].eq(0).all() and tensor[~dead].ne(0).float().mean() > 0.5
    with torch.no_grad():
        layer = training.layers['2']
        layer.weight = torch.full_like(layer.weight, 3.0)  # through both parametrizations
        norm = 3 * math.sqrt(before['2'].sum())
        assert layer.parametrizations.weight.original0.item() == pytest.approx(norm)
        assert torch.allclose(layer.weight, 3.0 * before['2'])


def test_an_initial_mask_keeps_g_and_pruning_does_not(digits):
    training = Training(digits, density=0.2, initial_mask='erk')
    for name, layer in training.layers.items():
        if name != '7':
            assert torch.equal(
                layer.parametrizations.weight.original0,
                training.dense[f'{name}.parametrizations.weight.original0'],
            )
            assert layer.weight.norm().item() == pytest.approx(
                layer.parametrizations.weight.original0.item()
            )
    training = Training(digits, prune_rounds=1).step(20)
    before = training.weights
    masks = training.prune(prune_fraction=0.6)
    for name, layer in training.layers.items():
        assert torch.allclose(layer.weight, before[name] * masks[name], rtol=1e-5, atol=0)
        if name != '7':
            assert layer.parametrizations.weight.original0.item() == pytest.approx(
                (before[name] * masks[name]).norm().item()
            )


def test_a_resume_needs_the_state_dicts_alone(digits):
    flags = {'density': 0.3, 'initial_mask': 'random', 'regrow': 'gradient', 'regrow_every': 10}
    whole, first, second = (Training(digits, **flags) for _ in range(3))
    first.step(31)  # past the update at step 30
    second.step(1)  # another place, then over it
    second.net.load_state_dict(copy.deepcopy(first.net.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.number = first.number
    loaded = get_network(whole.settings, whole.shape, 10)
    loaded.load_state_dict(first.net.state_dict())
    assert equal(first.net.state_dict(), loaded.state_dict())
    whole.step(60), second.step(29)
    assert equal(whole.net.state_dict(), second.net.state_dict()) and not equal(
        whole.masks, first.masks
    )


# --- masks at the start ---


@pytest.mark.parametrize('initial_mask', MASKS)
def test_initial_counts_are_exact(digits, initial_mask):
    for share in (0.001, 0.05, 0.3, 0.77):
        masks = Training(digits, density=share, initial_mask=initial_mask).masks
        assert sum(living(masks)) == max(round(share * 2544), 4) and min(living(masks)) >= 1
    flags = {'density': 0.3, 'initial_mask': initial_mask, 'prune_layers': 'conv'}
    once, again, other = (
        Training(digits, **flags),
        Training(digits, **flags),
        Training(digits, seed=1, **flags),
    )
    assert list(once.layers) == ['0', '2', '4'] and sum(living(once.masks)) == round(0.3 * 544)
    assert equal(once.masks, again.masks) and not equal(once.masks, other.masks)
    assert density(once.net) == (163 + 2000) / 2544


def test_erk_counts():
    shapes = [(16, 1, 2, 2), (16, 16, 2, 2), (16, 16, 2, 2), (10, 400)]
    scores, alive = (
        [torch.from_numpy(np.random.default_rng(0).random(shape)) for shape in shapes],
        [torch.ones(shape, dtype=torch.bool) for shape in shapes],
    )
    sizes, sums = np.array([64, 1024, 1024, 4000]), np.array([21, 36, 36, 410])

    def counts(share):
        masks = sparsify.best_masks(sparsify.erk_scores(scores, share), alive, round(share * 6112))
        for mask, score in zip(masks, scores):  # the best of each layer
            assert mask.all() or score[mask].min() > score[~mask].max()
        return np.array([int(mask.sum()) for mask in masks])

    for share in (0.03, 0.1, 0.12):  # no layer is dense: densities eps * sum / size
        ideal = share * 6112 * sums / sums.sum()
        assert abs(counts(share) - ideal).max() < 1 and counts(share).sum() == round(share * 6112)
    assert counts(0.1) / sizes == pytest.approx([0.4, 0.043, 0.043, 0.125], abs=0.01)
    left = (
        0.5 * 6112 - 64
    )  # the first layer would have 2 and is dense; eps is solved again for the others
    assert (
        counts(0.5)[0] == 64 and abs(counts(0.5)[1:] - left * sums[1:] / sums[1:].sum()).max() < 1
    )
    assert (counts(0.99) <= sizes).all() and counts(0.99).sum() == round(0.99 * 6112)


def test_snip_by_finite_differences(digits):
    training = Training(digits, prune_rounds=1, width=4)
    images, targets = training.images[:150], training.targets[:150]
    scores = sparsify.snip_scores(training.net, training.layers, images, targets, F.mse_loss)
    net = copy.deepcopy(training.net).double()

    def loss():
        with torch.no_grad():
            return sum(
                F.mse_loss(net(x), y).item()
                for x, y in zip(images.double().split(100), targets.double().split(100))
            )

    for score, name in zip(scores, training.layers):
        layer, picked = (
            net.get_submodule(name),
            np.random.default_rng(0).integers(0, score.numel(), 12),
        )
        weight = layer.weight.detach().clone()
        for index in zip(*np.unravel_index(picked, score.shape)):
            ends = []
            for value in (1 + 1e-5, 1 - 1e-5, 1):
                factor = torch.ones_like(weight)
                factor[index] = value
                with torch.no_grad():
                    layer.weight = weight * factor
                ends.append(loss())
            assert score[index].item() == pytest.approx(
                abs(ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=3e-11
            )


def test_synflow_conserves_its_flow(digits):
    training = Training(digits, prune_rounds=1).step(50)
    net = copy.deepcopy(training.net).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()
        flow = net(torch.ones(1, *training.shape, dtype=torch.double)).sum().item()
    layers = {name: net.get_submodule(name) for name in training.layers}
    sums = [
        score.sum().item()
        for score in sparsify.synflow_scores(net, list(layers.values()), training.shape)
    ]
    assert sums == pytest.approx([flow] * 4, rel=1e-12)


def test_synflow_masks_in_matrices():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 40, bias=False), nn.ReLU(), nn.Linear(40, 4, bias=False)
    )
    first, last = (net[index].weight.detach().double().abs().numpy() for index in (1, 3))
    masks = np.ones(400)
    for k in range(
        1, 101
    ):  # the published rule: the flow through a weight is what comes in times what goes out
        a, b = first * masks[:240].reshape(40, 6), last * masks[240:].reshape(4, 40)
        scores = np.concatenate([(a * b.sum(0)[:, None]).ravel(), (b * a.sum(1)).ravel()])
        masks = np.zeros(400)
        masks[np.argsort(-scores)[: round(0.05 ** (k / 100) * 400)]] = 1
    settings = settings_of(density=0.05, initial_mask='synflow')
    sparsify.initialize(add_masks(net, settings), settings, torch.zeros(1, 1, 2, 3), None, None)
    found = np.concatenate([weight_mask(net[index]).numpy().ravel() for index in (1, 3)])
    assert (found == masks).all() and found.sum() == 20


def test_snip_takes_a_thousand_images_by_seed(digits, monkeypatch):
    snip_scores = sparsify.snip_scores
    place_of = {image.numpy().tobytes(): place for place, image in enumerate(digits.train_images)}

    def chosen(seed):
        seen = []
        monkeypatch.setattr(
            sparsify, 'snip_scores', lambda *of: seen.append(of) or snip_scores(*of)
        )
        Training(digits, density=0.5, initial_mask='snip', seed=seed)
        ((_, _, images, targets, _),) = seen
        places = [place_of[image.numpy().tobytes()] for image in images]
        assert torch.equal(targets.argmax(1), digits.train_labels[places])
        return places

    first = chosen(0)
    assert len(first) == len(set(first)) == 1000 and max(first) > 1300
    assert first == chosen(0) != chosen(1)


def test_scores_take_batch_norm_and_biases():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )
    images, targets = torch.rand(40, 1, 4, 4), torch.eye(3)[torch.arange(40) % 3]
    for initial_mask in MASKS:
        masked = copy.deepcopy(net)
        settings = settings_of(density=0.4, initial_mask=initial_mask)
        sparsify.initialize(add_masks(masked, settings), settings, images, targets, F.mse_loss)
        assert density(masked) == round(0.4 * 124) / 124
        assert all(
            torch.equal(a, b)
            for a, b in zip(masked[1].state_dict().values(), net[1].state_dict().values())
        )


# --- pruning rounds ---


def test_best_breaks_ties_by_index_and_keeps_every_layer():
    alive = [torch.ones(2, 2) > 0, torch.tensor([True, False, True]), torch.ones(3) > 0]
    masks = sparsify.best_masks([torch.ones(2, 2), torch.full((3,), 9.0), torch.zeros(3)], alive, 5)
    assert [mask.flatten().tolist() for mask in masks] == [[1, 1, 0, 0], [1, 0, 1], [1, 0, 0]]
    assert living(dict(enumerate(sparsify.best_masks(alive, alive, 0)))) == [1, 1, 1]


@pytest.mark.parametrize('layers', ('all', 'conv'))
@pytest.mark.parametrize('allocation', ('global', 'layer'))
def test_magnitude_rounds_are_exact_and_nested(digits, allocation, layers):
    training = Training(
        digits, prune_rounds=3, prune_allocation=allocation, prune_layers=layers, prune_fraction=0.3
    )
    masks = training.step(5).masks
    assert ('7' in masks) == (layers == 'all')
    for round_ in (1, 2, 3):
        weights, alive = training.step(5).weights, masks
        masks = training.prune(round_)
        assert all((masks[name] <= alive[name]).all() for name in masks)
        counts, before = living(masks), living(alive)
        groups = [list(masks)] if allocation == 'global' else [[name] for name in masks]
        if allocation == 'global':
            assert sum(counts) == sum(before) - round(0.3 * sum(before))
        else:
            assert counts == [count - round(0.3 * count) for count in before]
        for names in groups:
            kept = torch.cat([weights[name][masks[name]].abs() for name in names])
            gone = torch.cat([weights[name][~masks[name] & alive[name]].abs() for name in names])
            assert kept.min() >= gone.max()
    assert training.step(20).net[0].weight[~masks['0']].eq(0).all()


def test_random_rounds_are_seeded_by_seed_and_round(digits):
    def masks(round_, **flags):
        return Training(digits, prune_rounds=1, prune_score='random', **flags).prune(round_)

    assert equal(masks(1), masks(1))
    assert not equal(masks(1), masks(2)) and not equal(masks(1), masks(1, seed=1))


def test_rewinding(digits):
    training = Training(digits, prune_rounds=2, bias=True, rewind_epoch=1).step(10)
    saved = copy.deepcopy(training.net.state_dict())
    weights, later = training.weights, training.step(40).addresses()
    sparsify.rewind(training.net, training.optimizer, saved)  # nothing was pruned: the same network
    assert equal(saved, training.net.state_dict())
    assert all(state['momentum_buffer'].eq(0).all() for state in training.optimizer.state.values())
    for round_ in (1, 2):
        masks = training.step(30).prune(round_, prune_fraction=0.4)
        sparsify.rewind(training.net, training.optimizer, saved)
        for name, layer in training.layers.items():
            assert torch.allclose(layer.weight, weights[name] * masks[name], rtol=1e-5, atol=0)
            assert layer.weight.ne(0).sum() == masks[name].sum() and torch.equal(
                layer.bias, saved[f'{name}.bias']
            )
            if name != '7':
                norm = (weights[name] * masks[name]).norm().item()
                assert layer.parametrizations.weight.original0.item() == pytest.approx(norm)
    tuned = training.step(5).weights
    sparsify.rewind(training.net, training.optimizer, None)
    assert equal(tuned, training.weights) and training.momentum(training.layers['0']).eq(0).all()
    assert training.addresses() == later  # all in place, as a CUDA graph wants


def test_a_layer_of_which_zeros_alone_are_left(digits):
    """Weights that feed nothing decay to 0; where random pruning leaves only such ones, W is 0 and not 0 / 0."""
    training = Training(digits, prune_rounds=1, prune_score='random').step(5)
    saved, layer = copy.deepcopy(training.net.state_dict()), training.layers['2']
    kept = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    with torch.no_grad():
        free_weight(layer)[kept] = 0
    set_mask(layer, kept)
    assert layer.weight.eq(0).all() and training.net(training.images[:5]).eq(0).all()
    training.step(3)
    assert all(weight.isfinite().all() for weight in training.net.state_dict().values())
    sparsify.rewind(training.net, training.optimizer, saved)
    assert layer.weight.ne(0).sum() == kept.sum() and layer.weight.isfinite().all()


def test_the_bounds_norms_of_masked_networks_are_ordered():
    def partitioned(net, positions, size):
        """R of the block theorem (docs/sparse.md) with hidden channels in blocks of `size`, without padding."""
        *hidden, last = [layer.weight.detach().double() for layer in weight_layers(net).values()]
        norms = torch.ones(1, dtype=torch.double)  # of the blocks; one for the input's channels
        for weight in hidden:
            blocks = torch.stack(
                [
                    part.norm(dim=1).sum((1, 2))
                    for part in weight.split(weight.shape[1] // len(norms), 1)
                ],
                1,
            )
            norms = torch.stack([part.norm() for part in (blocks @ norms).split(size)])
        last = last.reshape(len(last), len(norms), size, positions)
        return (last.norm(dim=2).sum((0, 2)) @ norms).item()

    for seed, share in enumerate((1.0, 0.5, 0.2)):
        torch.manual_seed(seed)
        settings = settings_of(
            width=8,
            depth=3,
            density=share,
            initial_mask='random',
            padding=0,
            kernel_size=2,
            seed=seed,
        )
        net = get_network(settings, (1, 8, 8), 10)
        sparsify.initialize(add_masks(net, settings), settings, torch.zeros(1, 1, 8, 8), None, None)
        ordered = [path_norm(net, (1, 8, 8))] + [
            partitioned(net, 25, size) for size in (1, 2, 4, 8)
        ]
        *hidden, last = weight_layers(net).values()
        frobenius = math.prod(2 * layer.weight.norm().item() for layer in hidden)  # sqrt(deg) = 2
        ordered.append(frobenius * last.weight.detach().reshape(10, 8, 25).norm(dim=1).sum().item())
        assert ordered[0] == pytest.approx(ordered[1], rel=1e-6)
        assert all(small < large for small, large in itertools.pairwise(ordered[1:]))


# --- regrowth ---


@pytest.mark.parametrize('regrow', ('random', 'gradient'))
def test_regrowth_keeps_counts_and_starts_at_zero(digits, regrow):
    flags = {
        'density': 0.3,
        'initial_mask': 'erk',
        'regrow': regrow,
        'regrow_every': 10,
        'regrow_fraction': 0.4,
    }
    training, moved, returned = Training(digits, steps=100, **flags), 0, 0
    counts = living(training.masks)
    training.step(5)
    addresses = training.addresses()
    for number in range(5, 100):
        before, masks = training.weights, training.masks
        momenta = {
            name: training.momentum(layer).clone() for name, layer in training.layers.items()
        }
        if sparsify.regrow_due(training.settings, number, 100):
            if regrow == 'random':  # the gradient step comes first
                vars(training.settings)['regrow'] = 'none'
                training.step()
                vars(training.settings)['regrow'] = regrow
                training.number -= 1
                before = training.weights
                momenta = {
                    name: training.momentum(layer).clone()
                    for name, layer in training.layers.items()
                }
            sparsify.regrow(
                training.net, training.optimizer, training.settings, number, 100, training.loss
            )
            training.number += 1
        else:
            training.step()
            assert equal(masks, training.masks)
            continue
        assert number % 10 == 0 and number < 75 and living(training.masks) == counts
        share = 0.4 / 2 * (1 + math.cos(math.pi * number / 75))
        for (name, layer), count in zip(training.layers.items(), counts):
            old, new, momentum = masks[name], weight_mask(layer), training.momentum(layer)
            largest = np.argsort(
                -before[name].abs().masked_fill(~old, -1).numpy().ravel(), kind='stable'
            )
            dropped = old.clone().contiguous()
            dropped.view(-1)[largest[: count - int(share * count)]] = False
            assert not (old & ~new & ~dropped).any() and (new & (~old | dropped)).sum() == int(
                share * count
            )
            assert (
                layer.weight[(new & ~old) | ~new].eq(0).all()
                and momentum[(new & ~old) | ~new].eq(0).all()
            )
            stays = old & new
            assert torch.allclose(layer.weight[stays], before[name][stays], rtol=1e-5, atol=0)
            assert torch.equal(momentum[stays], momenta[name][stays])
            moved, returned = moved + int((old & ~new).sum()), returned + int((dropped & new).sum())
    assert moved > 50 and (returned > 0 or regrow == 'gradient')
    assert training.addresses() == addresses


def test_growth_follows_the_dense_gradient(digits):
    flags = {'density': 0.2, 'initial_mask': 'erk', 'regrow': 'gradient'}
    training = Training(digits, **flags).step(30)
    masks, outputs = training.masks, training.net(training.images[:50]).detach()
    convolutions = [nn.Conv2d(channels, 8, 2, bias=False) for channels in (1, 8, 8)]
    hidden = [module for convolution in convolutions for module in (convolution, nn.ReLU())]
    plain = nn.Sequential(*hidden, nn.Flatten(), nn.Linear(200, 10, bias=False))
    plain.load_state_dict({f'{name}.weight': weight for name, weight in training.weights.items()})
    assert torch.allclose(plain(training.images[:50]), outputs, atol=1e-6)
    gradients = sparsify.dense_gradients(list(training.layers.values()), training.loss)
    assert equal(masks, training.masks)
    chosen = torch.from_numpy(np.random.default_rng((7, training.number)).integers(0, 1437, 32))
    F.mse_loss(plain(training.images[chosen]), training.targets[chosen]).backward()
    for (name, layer), gradient in zip(training.layers.items(), gradients):
        dead = ~masks[name]
        v = free_weight(layer)
        factor = layer.parametrizations.weight.original0 / v.norm() if name != '7' else 1
        expected = factor * plain.get_submodule(name).weight.grad
        assert torch.allclose(gradient[dead], expected[dead], rtol=1e-3, atol=1e-7)
        if (
            name != '7'
        ):  # among living entries weight normalization projects, so that only the dead ones rank as W's do
            assert not torch.allclose(gradient[~dead], expected[~dead], rtol=1e-3, atol=1e-7)
    with pytest.raises(ZeroDivisionError):
        sparsify.dense_gradients(list(training.layers.values()), lambda: 1 / 0)
    assert equal(masks, training.masks)

    before = training.masks
    sparsify.regrow(training.net, training.optimizer, training.settings, 30, 200, training.loss)
    grown = {name: mask & ~before[name] for name, mask in training.masks.items()}
    for name in before:
        score = plain.get_submodule(name).weight.grad.abs()
        passed = ~before[name] & ~training.masks[name]
        if grown[name].any() and passed.any():
            assert score[grown[name]].min() >= score[passed].max() * (1 - 1e-4)
    assert sum(int(mask.sum()) for mask in grown.values()) > 20


def test_set_draws_by_seed_and_step(digits):
    def masks(number, **flags):
        training = Training(digits, density=0.3, initial_mask='erk', regrow='random', **flags)
        sparsify.regrow(training.net, training.optimizer, training.settings, number, 10**6, None)
        return training.masks

    assert equal(masks(100), masks(100)) and not equal(masks(100), masks(200))


def test_when_masks_are_updated():
    def steps(**flags):
        settings = settings_of(density=0.5, initial_mask='random', regrow_every=20, **flags)
        return [step for step in range(200) if sparsify.regrow_due(settings, step, 200)]

    assert steps(regrow='random', regrow_until=0.6) == [0, 20, 40, 60, 80, 100]
    assert steps(regrow='gradient', regrow_until=0.0) == steps(regrow='none') == []


# --- channels ---


def test_empty_filters_stay_empty_and_unread_by_what_grows(digits):
    """What grew there would be 0 for ever."""
    flags = {
        'density': 0.2,
        'initial_mask': 'erk',
        'regrow': 'random',
        'regrow_every': 5,
        'regrow_fraction': 0.5,
    }
    training = Training(digits, steps=200, **flags).step(20)
    second = training.layers['2']
    mask = weight_mask(second).clone()
    mask[3] = False
    set_mask(second, mask)
    read, alive = training.masks['4'][:, 3], sum(living(training.masks))
    training.step(100)
    assert weight_mask(second)[3].logical_not().all()
    assert (training.masks['4'][:, 3] <= read).all()  # none has grown
    assert sum(living(training.masks)) > 0.9 * alive


def test_channels_with_a_bias_may_come_back(digits):
    """With a bias an empty filter's channel is not 0, and what grows in it learns."""
    flags = {
        'density': 0.5,
        'initial_mask': 'random',
        'regrow': 'random',
        'regrow_every': 5,
        'bias': True,
    }
    training = Training(digits, **flags).step(20)
    mask = weight_mask(training.layers['2']).clone()
    mask[3] = False
    set_mask(training.layers['2'], mask)
    assert weight_mask(training.step(30).layers['2'])[3].any()


def layers_of(*magnitudes):
    """{linear layer whose filters have these mean magnitudes: one that reads all of them}."""
    layers = [nn.Linear(3, len(values)) for values in magnitudes]
    for layer, values in zip(layers, magnitudes):
        layer.weight.data = torch.tensor(values)[:, None] * torch.tensor([1.0, -2.0, 0.0])
    return {layer: nn.Linear(len(layer.weight), 2) for layer in layers}


def test_channels_die_on_schedule():
    layers = layers_of([float(value) for value in range(1, 21)], [50.0, 0.5] * 10)
    counts = {
        done: [int(alive.sum()) for alive in sparsify.living_channels(layers, 0.6, done)]
        for done in (0, 0.2, 0.5, 1)
    }
    # 40 (1 - 0.6 (1 - (1 - done)^3)) are left; of each layer at least int(0.5 * 0.4 * 20) = 4
    assert {done: sum(count) for done, count in counts.items()} == {0: 40, 0.2: 28, 0.5: 19, 1: 16}
    assert counts[0.2] == [18, 10] and counts[1] == [6, 10]
    first, second = sparsify.living_channels(layers, 0.6, 1)
    assert (
        first.nonzero().flatten().tolist() == [14, 15, 16, 17, 18, 19]
        and second.tolist() == [True, False] * 10
    )
    floors = sparsify.living_channels(layers_of([1.0] * 20, [50.0] * 20), 0.6, 1)
    assert [int(alive.sum()) for alive in floors] == [4, 12] and floors[
        0
    ].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert [
        int(alive.sum()) for alive in sparsify.living_channels(layers_of([1.0], [50.0]), 0.9, 1)
    ] == [1, 1]


def test_channels_die_by_their_mean_magnitude_over_all_entries():
    """Two layers of unequal fan-ins; by sums, squares, or means over living entries other channels would stay."""
    first, second = nn.Linear(2, 4), nn.Linear(8, 4)
    first.weight.data = torch.tensor([[6.0, -6.0], [4.5, 4.5], [0.0, 1.0], [0.0, 1.0]])
    second.weight.data = torch.tensor([5.0, 0.0, -4.0, 1.0])[:, None].repeat(1, 8)
    second.weight.data[1, 0] = 24.0  # a mean of 3
    readers = {first: nn.Linear(4, 2), second: nn.Linear(4, 2)}

    def best(count):
        return [
            alive.nonzero().flatten().tolist()
            for alive in sparsify.living_channels(readers, 1 - count / 8, 1)
        ]

    assert best(3) == [
        [0, 1],
        [0],
    ]  # by sums it would be [[0], [0, 2]], by squares or over living entries [[0], [0, 1]]
    assert best(4) == [[0, 1], [0, 2]]  # with signs [[0, 1], [0, 1]]


def test_channels_that_nothing_reads_die_first():
    first, second = layers_of([9.0, 1.0, 2.0, 3.0], [5.0, 6.0, 7.0, 8.0])
    last = nn.Linear(8, 2)  # reads each of the four channels at two positions
    second.weight = nn.Parameter(torch.ones(4, 4) * torch.tensor([5.0, 6.0, 7.0, 8.0])[:, None])
    second.weight.data[:, 0] = 0
    last.weight.data[:, 6:] = 0
    last.weight.data[0, 4] = 0  # at one position and in one output of several
    found = sparsify.living_channels({first: second, second: last}, 0.5, 1)
    assert [alive.tolist() for alive in found] == [
        [False, False, False, True],
        [True, True, True, False],
    ]


@pytest.mark.parametrize(
    'flags', ({}, {'prune_layers': 'conv'}, {'network': 'MLP'}, {'normalization': 'batch'}), ids=str
)
@pytest.mark.parametrize('regrow', ('random', 'gradient'))
def test_dead_channels_are_neither_made_nor_read(digits, monkeypatch, regrow, flags):
    flags = flags | {
        'density': 0.4,
        'initial_mask': 'erk',
        'width': 16,
        'bias': 'normalization' in flags,
    }
    training = Training(digits, regrow=regrow, regrow_every=5, channel_sparsity=0.5, **flags).step(
        2
    )
    living_channels, found = sparsify.living_channels, []
    monkeypatch.setattr(
        sparsify, 'living_channels', lambda *of: found.append(living_channels(*of)) or found[-1]
    )
    addresses, before = training.addresses(), sum(living(training.masks))
    while training.number < 200:
        training.step(5)
        for (layer, reader), alive in zip(hidden_readers(training.net).items(), found[-1]):
            assert not weight_mask(layer)[~alive].any()
            if (mask := weight_mask(reader)) is not None:
                assert not mask.reshape(len(mask), len(alive), -1)[:, ~alive].any()
    counts = [int(alive.sum()) for alive in found[-1]]
    assert sum(counts) == 16 * len(counts) / 2 and min(counts) >= 4
    assert training.addresses() == addresses and 0 < min(living(training.masks))
    assert sum(living(training.masks)) <= before
    assert all(value.isfinite().all() for value in training.net.state_dict().values())


def test_channel_sparsity_needs_a_chain(digits):
    flags = {
        'channel_sparsity': 0.5,
        'density': 0.4,
        'initial_mask': 'erk',
        'regrow': 'random',
        'normalization': 'batch',
    }
    with pytest.raises(BadInput, match='channel_sparsity = 0.5: needs a chain'):
        Training(digits, network='CONVRES', **flags)
    Training(digits, network='CONVBN', **flags)


@pytest.mark.parametrize(
    'flags, text',
    (
        ({'density': 0.5}, 'density = 0.5: needs an initial_mask'),
        ({'regrow': 'random'}, "regrow = 'random': needs an initial_mask"),
        (
            {'regrow': 'random', 'initial_mask': 'random'},
            "regrow = 'random': needs an initial_mask, with a density below 1",
        ),
        (
            {'channel_sparsity': 0.5, 'initial_mask': 'erk', 'density': 0.5},
            'channel_sparsity = 0.5: needs regrow',
        ),
        (
            {'regrow': 'random', 'initial_mask': 'erk', 'density': 0.5, 'prune_rounds': 2},
            'prune_rounds = 2: not with regrow',
        ),
        (
            {'regrow': 'gradient', 'initial_mask': 'erk', 'density': 0.5, 'regrow_every': 1},
            'regrow_every = 1',
        ),
        (
            {'prune_rounds': 1, 'epochs': 7, 'rewind_epoch': 7},
            'rewind_epoch = 7: must be below epochs = 7',
        ),
        (
            {'prune_rounds': 1, 'rewind_epoch': 1, 'target_loss': 0.1},
            'rewind_epoch = 1: must be 0 or -1 with target_loss',
        ),
        (
            {'prune_rounds': 1, 'epochs': 0, 'rewind_epoch': -1},
            'rewind_epoch = -1: must be below epochs = 0',
        ),
    ),
)
def test_settings_that_do_not_go_together(flags, text):
    with pytest.raises(BadInput, match=text):
        sparsify.check(settings_of(**flags))


def test_settings_that_go_together():
    sparsify.check(settings_of())
    sparsify.check(settings_of(initial_mask='erk'))  # density 1 goes with any mask
    sparsify.check(settings_of(prune_rounds=3, rewind_epoch=-1))


def test_path_pruning_does_not_see_a_rescaling(digits):
    trained, errors, masks = Training(digits, prune_rounds=1, width=16, lr=0.1).step(900), {}, {}
    for fraction in (0.2, 0.8):
        for score in ('path', 'magnitude'):
            for rescaled in (False, True):
                training = copy.deepcopy(trained)
                masks[rescaled] = training.prune(
                    prune_score=score, prune_fraction=fraction, rescale_neurons=rescaled
                )
                assert density(training.net) == (6112 - round(fraction * 6112)) / 6112
                for name, layer in training.layers.items():  # the network itself is not rescaled
                    assert torch.allclose(
                        layer.weight, trained.weights[name] * masks[rescaled][name], rtol=1e-5
                    )
                with torch.no_grad():
                    wrong = training.net(digits.test_images).argmax(1) != digits.test_labels
                errors[score, rescaled] = wrong.double().mean().item()
            assert equal(masks[False], masks[True]) == (score == 'path')
    expected = {
        ('path', False): 0.111,
        ('path', True): 0.111,
        ('magnitude', False): 0.114,
        ('magnitude', True): 0.828,
    }
    assert errors == pytest.approx(expected, abs=0.03)  # docs/sparse.md; a digit is 0.003
