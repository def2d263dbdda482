"""Masks at the start, pruning rounds with rewinding, and regrowth, in trainings on the digits."""

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
from models import get_network
from models.weight_norm import add_masks, free_weight, set_mask

MASKS = ('random', 'erk', 'snip', 'synflow')
RIGL = {'density': 0.3, 'initial_mask': 'erk', 'regrow': 'gradient'}
SET = RIGL | {'regrow': 'random'}


class Training:
    """A training on the digits, which calls sparsify as train.py does."""

    def __init__(self, digits, steps=200, **flags):
        self.settings = settings_of(**({'dataset_name': 'digits', 'width': 8, 'lr': 0.05} | flags))
        self.images, self.targets = digits.train_images, torch.eye(10)[digits.train_labels]
        self.shape, self.number, self.steps = digits.input_shape, 0, steps
        torch.manual_seed(self.settings.seed)
        self.net = get_network(self.settings, self.shape, 10).to(memory_format=torch.channels_last)
        self.dense = copy.deepcopy(self.net.state_dict())
        sparsify.initialize(self.net, self.settings, self.images, self.targets, F.mse_loss)
        self.layers = {name: self.net.get_submodule(name) for name in sparsify.prunable(self.net)}
        rates = {'lr': self.settings.lr, 'weight_decay': self.settings.weight_decay}
        self.optimizer = torch.optim.SGD(self.net.parameters(), momentum=0.9, fused=True, **rates)

    def batch(self):
        chosen = np.random.default_rng((7, self.number)).integers(0, len(self.images), 32)
        return self.images[chosen], self.targets[chosen]

    def loss(self):
        images, targets = self.batch()
        return F.mse_loss(self.net(images), targets)

    def step(self, count=1):
        """Gradient steps, and the updates of masks that are due at them."""
        for _ in range(count):
            due = sparsify.regrow_due(self.settings, self.number, self.steps)
            if not due or self.settings.regrow == 'random':
                self.optimizer.zero_grad()
                self.loss().backward()
                self.optimizer.step()
            if due:
                self.regrow()
            self.number += 1
        return self

    def regrow(self):
        arguments = self.settings, self.number, self.steps, self.loss
        sparsify.regrow(self.net, self.optimizer, *arguments)
        return self.masks

    def prune(self, round_=1):
        sparsify.prune(self.net, self.settings, round_, self.shape)
        return self.masks

    def state(self):
        return copy.deepcopy(self.net.state_dict())

    @property
    def masks(self):
        return {name: weight_mask(layer).clone() for name, layer in self.layers.items()}

    @property
    def weights(self):
        layers = weight_layers(self.net).items()
        return {name: layer.weight.detach().clone() for name, layer in layers}

    @property
    def momenta(self):
        """{layer: momentum of its free weights}, the optimizer's own tensors."""
        state = self.optimizer.state
        layers = self.layers.items()
        return {name: state[free_weight(layer)]['momentum_buffer'] for name, layer in layers}

    def addresses(self):
        tensors = [*self.net.state_dict().values(), *self.momenta.values()]
        return [tensor.data_ptr() for tensor in tensors]


def equal(first, second):
    return first.keys() == second.keys() and all(map(torch.equal, first.values(), second.values()))


def living(masks):
    return [int(mask.sum()) for mask in masks.values()]


def indices(mask):
    return mask.nonzero().flatten().tolist()


# --- masks ---


def test_masks_of_ones_change_no_digit(digits):
    dense, masked = Training(digits).step(30), Training(digits, prune_rounds=1).step(30)
    assert not any('mask' in name for name in dense.state())
    assert sum('mask' in name for name in masked.state()) == 4
    # The names of a weight-normalized layer stay; the plain classifier's weight has another.
    assert set(dense.state()) - set(masked.state()) == {'7.weight'}
    assert equal(dense.weights, masked.weights)


@pytest.mark.parametrize('initial_mask', MASKS)
def test_masked_weights_stay_exactly_zero(digits, initial_mask):
    training = Training(digits, density=0.2, initial_mask=initial_mask)
    before = training.masks
    training.step(100)
    assert equal(before, training.masks) and density(training.net) == round(0.2 * 2544) / 2544
    for name, layer in training.layers.items():
        mask = before[name]
        for tensor in (layer.weight, free_weight(layer), training.momenta[name]):
            assert not tensor[~mask].any()
            assert tensor[mask].count_nonzero() > mask.sum() / 2


def test_an_initial_mask_keeps_g_and_pruning_does_not(digits):
    training = Training(digits, density=0.2, initial_mask='erk')
    for name in ('0', '2', '4'):
        g = training.layers[name].parametrizations.weight.original0
        assert torch.equal(g, training.dense[f'{name}.parametrizations.weight.original0'])
        torch.testing.assert_close(training.weights[name].norm(), g)
    training = Training(digits, prune_rounds=1, prune_fraction=0.6).step(20)
    before, masks = training.weights, training.prune()
    for name, weight in training.weights.items():
        torch.testing.assert_close(weight, before[name] * masks[name], rtol=1e-5, atol=0)


def test_a_resume_needs_the_state_dicts_alone(digits):
    flags = RIGL | {'initial_mask': 'random', 'regrow_every': 10}
    whole, first, second = (Training(digits, **flags) for _ in range(3))
    first.step(31)  # past the update at step 30
    second.step(1)  # somewhere else, before it loads the state of `first`
    second.net.load_state_dict(first.state())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.number = first.number
    second.step(29)
    assert equal(whole.step(60).state(), second.state())
    assert not equal(whole.masks, first.masks)


# --- masks at the start ---


@pytest.mark.parametrize('share', [0.001, 0.3, 0.77])
@pytest.mark.parametrize('initial_mask', MASKS)
def test_initial_counts_are_exact(digits, initial_mask, share):
    masks = Training(digits, density=share, initial_mask=initial_mask).masks
    assert sum(living(masks)) == max(round(share * 2544), 4) and min(living(masks)) >= 1


@pytest.mark.parametrize('initial_mask', MASKS)
def test_initial_masks_of_convolutions_are_seeded(digits, initial_mask):
    flags = {'density': 0.3, 'initial_mask': initial_mask, 'prune_layers': 'conv'}
    once, again = Training(digits, **flags), Training(digits, **flags)
    other = Training(digits, seed=1, **flags)
    assert list(once.layers) == ['0', '2', '4'] and sum(living(once.masks)) == round(0.3 * 544)
    assert equal(once.masks, again.masks) and not equal(once.masks, other.masks)
    assert density(once.net) == (163 + 2000) / 2544


def test_erk_counts():
    shapes = [(16, 1, 2, 2), (16, 16, 2, 2), (16, 16, 2, 2), (10, 400)]
    scores = [torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    alive = [torch.ones(shape, dtype=torch.bool) for shape in shapes]
    sizes, sums = np.array([64, 1024, 1024, 4000]), np.array([21, 36, 36, 410])

    def counts(share):
        masks = sparsify.best_masks(sparsify.erk_scores(scores, share), alive, round(share * 6112))
        for mask, score in zip(masks, scores):  # the best of each layer
            assert mask.all() or score[mask].min() > score[~mask].max()
        found = np.array([int(mask.sum()) for mask in masks])
        assert (found <= sizes).all() and found.sum() == round(share * 6112)
        return found

    for share in (0.03, 0.1, 0.12):  # no layer is dense: densities eps * sum / size
        assert abs(counts(share) - share * 6112 * sums / sums.sum()).max() < 1
    # The first layer would have the density 2 and is dense; eps is solved again for the others.
    first, *others = counts(0.5)
    assert first == 64
    assert abs(others - (0.5 * 6112 - 64) * sums[1:] / sums[1:].sum()).max() < 1
    counts(0.99)


def test_snip_by_finite_differences(digits):
    training = Training(digits, prune_rounds=1, width=4)
    images, targets = training.images[:150], training.targets[:150]
    scores = sparsify.snip_scores(training.net, training.layers, images, targets, F.mse_loss)
    net = copy.deepcopy(training.net).double()
    batches = list(zip(images.double().split(100), targets.double().split(100)))

    @torch.no_grad()
    def loss(layer, weight, index, factor):
        changed = weight.clone()
        changed[index] *= factor
        layer.weight = changed
        return sum(F.mse_loss(net(x), y).item() for x, y in batches)

    for score, name in zip(scores, training.layers):
        layer = net.get_submodule(name)
        weight = layer.weight.detach().clone()
        picked = np.random.default_rng(0).integers(0, score.numel(), 12)
        for index in zip(*np.unravel_index(picked, score.shape)):
            rise = loss(layer, weight, index, 1 + 1e-5) - loss(layer, weight, index, 1 - 1e-5)
            assert score[index].item() == pytest.approx(abs(rise) / 2e-5, rel=1e-5, abs=3e-11)
        loss(layer, weight, index, 1)  # leaves the weight as it was


def test_synflow_masks_in_matrices():
    torch.manual_seed(0)
    layers = nn.Linear(6, 40, bias=False), nn.Linear(40, 4, bias=False)
    net = nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1])
    first, last = (layer.weight.detach().double().abs().numpy() for layer in layers)
    masks = np.ones(400)
    for k in range(1, 101):
        # The published rule: the flow through a weight is what comes in times what goes out.
        a, b = first * masks[:240].reshape(40, 6), last * masks[240:].reshape(4, 40)
        scores = np.concatenate([(a * b.sum(0)[:, None]).ravel(), (b * a.sum(1)).ravel()])
        masks = np.zeros(400)
        masks[np.argsort(-scores)[: round(0.05 ** (k / 100) * 400)]] = 1
    settings = settings_of(density=0.05, initial_mask='synflow')
    sparsify.initialize(add_masks(net, settings), settings, torch.zeros(1, 1, 2, 3), None, None)
    found = np.concatenate([weight_mask(layer).numpy().ravel() for layer in layers])
    assert (found == masks).all() and found.sum() == 20


def test_snip_takes_a_thousand_images_by_seed(digits, monkeypatch):
    snip_scores, seen = sparsify.snip_scores, []

    def spy(net, names, images, *others):
        seen.append(images)
        return snip_scores(net, names, images, *others)

    monkeypatch.setattr(sparsify, 'snip_scores', spy)
    for seed in (0, 0, 1):
        Training(digits, density=0.5, initial_mask='snip', seed=seed)
    first, again, other = seen
    assert len(first) == 1000 and torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, digits.train_images[:1000])


@pytest.mark.parametrize('initial_mask', MASKS)
def test_scores_take_batch_norm_and_biases(digits, initial_mask):
    flags = {'density': 0.4, 'initial_mask': initial_mask, 'normalization': 'batch', 'bias': True}
    training = Training(digits, **flags)
    assert density(training.net) == round(0.4 * 2544) / 2544
    for name, value in training.net[1].state_dict().items():  # SNIP leaves its statistics
        assert torch.equal(value, training.dense[f'1.{name}'])


# --- pruning rounds ---


def test_best_breaks_ties_by_index_and_keeps_every_layer():
    alive = [torch.ones(2, 2) > 0, torch.tensor([True, False, True]), torch.ones(3) > 0]
    scores = [torch.ones(2, 2), torch.full((3,), 9.0), torch.zeros(3)]
    masks = sparsify.best_masks(scores, alive, 5)
    assert [mask.flatten().tolist() for mask in masks] == [[1, 1, 0, 0], [1, 0, 1], [1, 0, 0]]
    assert [int(mask.sum()) for mask in sparsify.best_masks(alive, alive, 0)] == [1, 1, 1]


@pytest.mark.parametrize('layers', ('all', 'conv'))
@pytest.mark.parametrize('allocation', ('global', 'layer'))
def test_magnitude_rounds_are_exact_and_nested(digits, allocation, layers):
    flags = {'prune_allocation': allocation, 'prune_layers': layers, 'prune_fraction': 0.3}
    training = Training(digits, prune_rounds=3, **flags)
    assert ('7' in training.masks) == (layers == 'all')
    for round_ in (1, 2, 3):
        weights, alive = training.step(5).weights, training.masks
        masks = training.prune(round_)
        groups = [[name] for name in masks]
        if allocation == 'global':
            groups = [list(masks)]
        for names in groups:
            scores = torch.cat([weights[name].abs().flatten() for name in names])
            old = torch.cat([alive[name].flatten() for name in names])
            new = torch.cat([masks[name].flatten() for name in names])
            count = int(old.sum())
            assert new.sum() == count - round(0.3 * count) and (new <= old).all()
            assert scores[new].min() >= scores[old & ~new].max()
    assert not training.step(20).weights['0'][~masks['0']].any()


def test_random_rounds_are_seeded_by_seed_and_round(digits):
    def masks(round_, **flags):
        return Training(digits, prune_rounds=1, prune_score='random', **flags).prune(round_)

    assert equal(masks(1), masks(1))
    assert not equal(masks(1), masks(2)) and not equal(masks(1), masks(1, seed=1))


def test_rewinding(digits):
    training = Training(digits, prune_rounds=2, prune_fraction=0.4, bias=True).step(10)
    saved, weights = training.state(), training.weights
    addresses = training.step(40).addresses()
    for round_ in (1, 2):
        masks = training.step(30).prune(round_)
        sparsify.rewind(training.net, training.optimizer, saved)
        assert not any(momentum.any() for momentum in training.momenta.values())
        for name, layer in training.layers.items():
            expected = weights[name] * masks[name]
            torch.testing.assert_close(layer.weight, expected, rtol=1e-5, atol=0)
            assert torch.equal(layer.bias, saved[f'{name}.bias'])
    tuned = training.step(5).weights
    sparsify.rewind(training.net, training.optimizer, None)
    assert equal(tuned, training.weights) and not training.momenta['0'].any()
    assert training.addresses() == addresses  # all in place, for a CUDA graph


def test_a_layer_of_which_only_zeros_are_kept(digits):
    """Weights that feed nothing decay to 0; where random pruning keeps only such ones, W is 0."""
    training = Training(digits, prune_rounds=1).step(5)
    layer = training.layers['2']
    kept = torch.arange(layer.weight.numel()).view(layer.weight.shape) % 9 == 0
    with torch.no_grad():
        free_weight(layer)[kept] = 0
    set_mask(layer, kept)
    assert not layer.weight.any() and not training.net(training.images[:5]).any()
    training.step(3)
    assert all(value.isfinite().all() for value in training.state().values())


@pytest.mark.long
def test_path_pruning_does_not_see_a_rescaling(digits):
    trained = Training(digits, prune_rounds=1, width=16, lr=0.1).step(900)
    errors, masks = {}, {}
    for score, rescaled in itertools.product(('path', 'magnitude'), (False, True)):
        training = copy.deepcopy(trained)
        flags = {'prune_score': score, 'prune_fraction': 0.8, 'rescale_neurons': rescaled}
        vars(training.settings).update(flags)
        found = masks[score, rescaled] = training.prune()
        assert density(training.net) == (6112 - round(0.8 * 6112)) / 6112
        for name, weight in training.weights.items():  # the network itself is not rescaled
            torch.testing.assert_close(
                weight, trained.weights[name] * found[name], rtol=1e-5, atol=1e-8
            )
        with torch.no_grad():
            wrong = training.net(digits.test_images).argmax(1) != digits.test_labels
        errors[score, rescaled] = wrong.double().mean().item()
    assert equal(masks['path', False], masks['path', True])
    assert not equal(masks['magnitude', False], masks['magnitude', True])
    expected = dict(zip(errors, (0.111, 0.111, 0.114, 0.828)))
    assert errors == pytest.approx(expected, abs=0.03)  # docs/sparse.md; a digit is 0.003


# --- regrowth ---


@pytest.mark.parametrize('flags', (RIGL, SET), ids=('gradient', 'random'))
def test_regrowth_keeps_counts_and_starts_at_zero(digits, flags):
    training = Training(digits, steps=100, regrow_fraction=0.4, regrow_every=1000, **flags).step(2)
    addresses, moved, returned = training.addresses(), 0, 0
    for number in (10, 20, 40, 60, 70):
        training.step(10).number = number
        before, alive = training.weights, training.masks
        momenta = copy.deepcopy(training.momenta)
        masks = training.regrow()
        share = 0.4 / 2 * (1 + math.cos(math.pi * number / 75))
        for name, layer in training.layers.items():
            old, new, momentum = alive[name], masks[name], training.momenta[name]
            count = int(old.sum())
            # The largest |W| stay; the others are dropped, and may grow again.
            magnitude = before[name].abs().masked_fill(~old, -1)
            order = magnitude.flatten().argsort(descending=True, stable=True)
            largest = torch.zeros(old.shape, dtype=torch.bool)
            largest.view(-1)[order[: count - int(share * count)]] = True
            both = old & new
            assert new.sum() == count and (largest <= new).all()
            assert not layer.weight[~both].any() and not momentum[~both].any()
            torch.testing.assert_close(layer.weight[both], before[name][both], rtol=1e-5, atol=1e-8)
            assert torch.equal(momentum[both], momenta[name][both])
            moved += int((new & ~old).sum())
            returned += int((both & ~largest).sum())
    assert moved > 50 and (returned > 0 or flags is RIGL)
    assert training.addresses() == addresses


def test_growth_follows_the_dense_gradient(digits):
    training = Training(digits, **RIGL | {'density': 0.2}).step(30)
    layers, masks = training.layers, training.masks
    dense = Training(digits, normalization='none').net
    dense.load_state_dict({f'{name}.weight': weight for name, weight in training.weights.items()})
    images, targets = training.batch()
    F.mse_loss(dense(images), targets).backward()
    expected = {name: dense.get_submodule(name).weight.grad for name in layers}

    gradients = sparsify.dense_gradients(list(layers.values()), training.loss)
    assert equal(masks, training.masks)
    for (name, layer), gradient in zip(layers.items(), gradients):
        factor = 1
        if name != '7':
            factor = layer.parametrizations.weight.original0 / free_weight(layer).norm()
        dead = ~masks[name]
        found, wanted = gradient[dead], factor * expected[name][dead]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)

    counts = []
    for name, mask in training.regrow().items():
        score, dead = expected[name].abs(), ~masks[name]
        grown, passed = score[mask & dead], score[~mask & dead]
        assert grown.numel() == 0 or grown.min() >= passed.max() * (1 - 1e-4)
        counts.append(len(grown))
    assert sum(counts) > 20


def test_set_draws_by_seed_and_step(digits):
    def masks(number):
        training = Training(digits, steps=10**6, **SET)
        training.number = number
        return training.regrow()

    assert equal(masks(100), masks(100)) and not equal(masks(100), masks(200))


def test_when_masks_are_updated():
    def steps(**flags):
        settings = settings_of(density=0.5, initial_mask='random', regrow_every=20, **flags)
        return [step for step in range(200) if sparsify.regrow_due(settings, step, 200)]

    assert steps(regrow='random', regrow_until=0.6) == [0, 20, 40, 60, 80, 100]
    assert steps(regrow='gradient', regrow_until=0.0) == steps(regrow='none') == []


# --- channels ---


@pytest.mark.parametrize('bias', [False, True])
def test_empty_filters_come_back_only_with_a_bias(digits, bias):
    """Without one, what grew there, and what read it, would be 0 for ever."""
    training = Training(digits, regrow_every=5, regrow_fraction=0.5, bias=bias, **SET).step(20)
    mask = training.masks['2']
    mask[3] = False
    set_mask(training.layers['2'], mask)
    read, count = training.masks['4'][:, 3], sum(living(training.masks))
    masks = training.step(100).masks
    assert masks['2'][3].any() == bias
    if not bias:
        assert (masks['4'][:, 3] <= read).all()  # none has grown
        assert sum(living(masks)) > 0.9 * count


def layers_of(*magnitudes):
    """{linear layer whose filters have these mean magnitudes: one that reads all of them}."""
    layers = [nn.Linear(3, len(values)) for values in magnitudes]
    for layer, values in zip(layers, magnitudes):
        layer.weight.data = torch.tensor(values)[:, None] * torch.tensor([1.0, -2.0, 0.0])
    return {layer: nn.Linear(len(layer.weight), 2) for layer in layers}


def test_channels_die_on_schedule():
    def left(layers, done, sparsity=0.6):
        found = sparsify.living_channels(layers, sparsity, done)
        return [indices(alive) for alive in found]

    layers = layers_of([float(value) for value in range(1, 21)], [50.0, 0.5] * 10)
    # 40 (1 - 0.6 (1 - (1 - done)^3)) are left, the largest of both layers together.
    counts = {done: [len(found) for found in left(layers, done)] for done in (0, 0.2, 0.5, 1)}
    assert counts == {0: [20, 20], 0.2: [18, 10], 0.5: [9, 10], 1: [6, 10]}
    assert left(layers, 1) == [list(range(14, 20)), list(range(0, 20, 2))]
    # A layer keeps at least int(0.5 * 0.4 * 20) = 4, and one.
    assert left(layers_of([1.0] * 20, [50.0] * 20), 1) == [[0, 1, 2, 3], list(range(12))]
    assert left(layers_of([1.0], [50.0]), 1, 0.9) == [[0], [0]]


def test_channels_die_by_their_mean_magnitude_over_all_entries():
    """By sums, squares, or means over living entries other channels would stay."""
    first, second = nn.Linear(2, 4), nn.Linear(8, 4)
    first.weight.data = torch.tensor([[6.0, -6.0], [4.5, 4.5], [0.0, 1.0], [0.0, 1.0]])
    second.weight.data = torch.tensor([5.0, 0.0, -4.0, 1.0])[:, None].repeat(1, 8)
    second.weight.data[1, 0] = 24.0  # a mean of 3
    readers = {first: nn.Linear(4, 2), second: nn.Linear(4, 2)}
    three, four = (sparsify.living_channels(readers, 1 - count / 8, 1) for count in (3, 4))
    # By sums [[0], [0, 2]], by squares or over living entries [[0], [0, 1]].
    assert [indices(alive) for alive in three] == [[0, 1], [0]]
    assert [indices(alive) for alive in four] == [[0, 1], [0, 2]]  # with signs [[0, 1], [0, 1]]


def test_channels_that_nothing_reads_die_first():
    first, second = layers_of([9.0, 1.0, 2.0, 3.0], [5.0, 6.0, 7.0, 8.0])
    last = nn.Linear(8, 2)  # reads each of the four channels at two positions
    second.weight = nn.Parameter(torch.ones(4, 4) * torch.tensor([5.0, 6.0, 7.0, 8.0])[:, None])
    second.weight.data[:, 0] = 0
    last.weight.data[:, 6:] = 0
    last.weight.data[0, 4] = 0  # at one position and in one output of several
    found = sparsify.living_channels({first: second, second: last}, 0.5, 1)
    assert [indices(alive) for alive in found] == [[3], [0, 1, 2]]


@pytest.mark.parametrize('regrow', ('random', 'gradient'))
@pytest.mark.parametrize(
    'flags', ({}, {'prune_layers': 'conv'}, {'network': 'MLP'}, {'normalization': 'batch'}), ids=str
)
def test_dead_channels_are_neither_made_nor_read(digits, regrow, flags):
    flags = SET | {'density': 0.4, 'width': 16, 'regrow_every': 5} | flags | {'regrow': regrow}
    training = Training(digits, steps=60, channel_sparsity=0.5, **flags).step(2)
    addresses, count = training.addresses(), sum(living(training.masks))
    masks = training.step(58).masks
    assert sum(living(masks)) <= count and training.addresses() == addresses
    dead = []
    for layer, reader in hidden_readers(training.net).items():
        made = layer.weight.flatten(1).ne(0).any(1)
        read = reader.weight.reshape(len(reader.weight), len(made), -1).ne(0).any(2).any(0)
        dead.append(int((~made & ~read).sum()))
    if 'prune_layers' in flags:
        dead[-1] = int((~made).sum())  # the dense classifier reads all channels
    assert sum(dead) >= 8 * len(dead) - 1 and max(dead) <= 12


def test_channel_sparsity_needs_a_chain(digits):
    flags = SET | {'channel_sparsity': 0.5, 'normalization': 'batch'}
    with pytest.raises(BadInput, match='channel_sparsity = 0.5: needs a chain'):
        Training(digits, network='CONVRES', **flags)
    Training(digits, network='CONVBN', **flags)


# --- settings ---

MASKED = {'initial_mask': 'erk', 'density': 0.5}


@pytest.mark.parametrize(
    'flags, text',
    (
        ({'density': 0.5}, 'density = 0.5: needs an initial_mask'),
        ({'regrow': 'random'}, "regrow = 'random': needs an initial_mask and a density below 1"),
        (SET | {'density': 1.0}, "regrow = 'random': needs an initial_mask and a density below 1"),
        (MASKED | {'channel_sparsity': 0.5}, 'channel_sparsity = 0.5: needs regrow'),
        (SET | {'prune_rounds': 2}, 'prune_rounds = 2: not with regrow'),
        (RIGL | {'regrow_every': 1}, 'regrow_every = 1'),
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
def test_settings_that_contradict_each_other(flags, text):
    with pytest.raises(BadInput, match=text):
        sparsify.check(settings_of(**flags))


@pytest.mark.parametrize(
    'flags', ({}, {'initial_mask': 'erk'}, {'prune_rounds': 3, 'rewind_epoch': -1}, SET, RIGL)
)
def test_settings_that_go_together(flags):
    sparsify.check(settings_of(**flags))
