"""What each layer has learned, against brute force in float64 and cases whose values are known."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import settings_of, train_small
from torch import nn

from conf import BadInput
from measures import representations
from measures.representations import (
    comparative_estimate,
    effective_depth,
    measure_probes,
    measure_representations,
)
from models import get_network
from records import read_layers, rows_of

COLUMNS = ('train_ncc_error', 'test_ncc_error', 'train_cdnv', 'test_cdnv')


def brute_force(train, train_labels, test, test_labels):
    """The four columns of one layer, from (m, D) float64 arrays, sample by sample."""

    def moments(h, labels):
        groups = {c: h[labels == c] for c in np.unique(labels)}
        means = {c: group.mean(0) for c, group in groups.items()}
        return means, {c: ((group - means[c]) ** 2).sum(1).mean() for c, group in groups.items()}

    def error(h, labels, means):
        wrong = 0
        for x, label in zip(h, labels):
            distances = {c: ((x - mean) ** 2).sum() for c, mean in means.items()}
            own = distances.pop(label, math.inf)
            wrong += not own < min(distances.values())
        return wrong / len(h)

    def cdnv(means, variances):
        found = []
        for a, b in itertools.combinations(means, 2):
            distance = ((means[a] - means[b]) ** 2).sum()
            found.append((variances[a] + variances[b]) / (2 * distance))
        return np.mean(found)

    means, variances = moments(train, train_labels)
    errors = error(train, train_labels, means), error(test, test_labels, means)
    cdnvs = cdnv(means, variances), cdnv(*moments(test, test_labels))
    return dict(zip(COLUMNS, [*errors, *cdnvs], strict=True))


def neural_collapse(net, h, images, labels, last):
    """nc1 to nc4 of the representation h (m, D) by definition; net[-1] is the classifier."""
    m, classes = h.shape[0], 10
    means = np.stack([h[labels == c].mean(0) for c in range(classes)])
    centered = means - means.mean(0)
    within = h - means[labels]
    between = np.linalg.pinv(centered.T @ centered / classes, rcond=1e-10, hermitian=True)
    simplex = (np.eye(classes) - 1 / classes) / np.sqrt(classes - 1)

    def off(matrix):
        return np.linalg.norm(matrix / np.linalg.norm(matrix) - simplex)

    with torch.no_grad():
        chosen = copy.deepcopy(net).double().eval()(images.double()).argmax(1).numpy()
    nearest = ((h[:, None] - means) ** 2).sum(2).argmin(1)
    nc3 = off(net[-1].weight.detach().double().numpy() @ centered.T) if last else math.nan
    return {
        'nc1': np.trace(between @ (within.T @ within / m)) / classes,
        'nc2': off(centered @ centered.T),
        'nc3': nc3,
        'nc4': (nearest != chosen).mean(),
    }


def all_representations(net, images):
    """Input and layers as float64 arrays, by hooks: another way than the code's."""
    outputs = [images]
    net = copy.deepcopy(net).double().eval()
    for module in net:
        if isinstance(module, nn.ReLU) or type(module).__name__ == 'Block':
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        net(images.double())
    return [output.double().flatten(1).numpy() for output in outputs]


def unbalanced(digits, seed, m=203, test=77):
    """A part of the digits in random order, some classes rare."""
    chance, kept = np.random.default_rng(seed), []
    for c in range(10):
        kept += np.flatnonzero(digits.train_labels == c)[: 30 - 3 * c].tolist()
    train = torch.from_numpy(chance.permutation(kept)[:m])
    tested = torch.from_numpy(chance.permutation(360)[:test])
    sets = digits.train_images[train], digits.train_labels[train]
    return *sets, digits.test_images[tested], digits.test_labels[tested]


def points(h, labels):
    """Points (m, D) as training and as test set of a network of one layer, which returns them."""
    h, labels = torch.as_tensor(h, dtype=torch.float32), torch.as_tensor(labels)
    return measure_representations(nn.Sequential(nn.ReLU()), h, labels, h, labels)


NETWORKS = {
    'CONV': {'depth': 3, 'width': 6},
    'MLP': {'depth': 4, 'width': 20, 'bias': True, 'normalization': 'batch'},
    'CONVBN': {'depth': 2, 'width': 5, 'bias': True, 'normalization': 'batch'},
    'CONVRES': {'depth': 2, 'width': 4, 'normalization': 'batch'},
}


@pytest.mark.parametrize('channels_last', [True, False])
@pytest.mark.parametrize('batch', [1, 7, 32])
@pytest.mark.parametrize('name', NETWORKS)
def test_brute_force(digits, monkeypatch, name, batch, channels_last):
    monkeypatch.setattr(representations, 'images_per_pass', lambda net, images: batch)
    torch.manual_seed(0)
    net = get_network(settings_of(network=name, **NETWORKS[name]), (1, 8, 8), 10)
    train, train_labels, test, test_labels = unbalanced(digits, seed=batch)
    net(train)  # in training mode, so that batch normalization has statistics of its own
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    layers = measure_representations(net, train, train_labels, test, test_labels)
    hidden = zip(all_representations(net, train), all_representations(net, test), strict=True)
    assert len(layers) == NETWORKS[name]['depth'] + 1
    for layer, (h, h_test) in zip(layers, hidden, strict=True):
        exact = brute_force(h, train_labels.numpy(), h_test, test_labels.numpy())
        collapse = neural_collapse(net, h, train, train_labels.numpy(), last=layer is layers[-1])
        assert layer['size'] == h.shape[1] and set(layer) == {'size', *exact, *collapse}
        for column in COLUMNS[:2]:
            assert layer[column] == exact[column]
        for column in COLUMNS[2:]:
            assert layer[column] == pytest.approx(exact[column], rel=1e-6)
        found = {column: layer[column] for column in collapse}
        assert found == pytest.approx(collapse, rel=1e-4, nan_ok=True)
    assert {layer['train_ncc_error'] for layer in layers} != {0.0}


class Residual(nn.Module):
    """Not an nn.Sequential, with a skip connection and an in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(4 * 36, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.body(x)).relu().flatten(1))


def test_layers_by_name(digits):
    """Those of any network; a nested and an in-place one."""
    torch.manual_seed(0)
    net, sets = Residual(), unbalanced(digits, seed=1)
    names = ['stem', 'body.0', 'body.1']
    found = measure_representations(net, *sets, layers=names)
    with torch.no_grad():
        net.double()
        stem = [net.stem(images.double()) for images in (sets[0], sets[2])]
        first = [net.body[0](h) for h in stem]
        last = [h.relu() for h in first]
        net.float()
    for layer, pair in zip(found[1:], (stem, first, last), strict=True):
        h, h_test = (part.flatten(1).numpy() for part in pair)
        exact = brute_force(h, sets[1].numpy(), h_test, sets[3].numpy())
        assert {column: layer[column] for column in COLUMNS} == pytest.approx(exact, rel=1e-5)
    assert len(measure_probes(net, *sets, layers=names)) == 4
    for wrong, words in (
        (['stern'], "no module 'stern'; there are stem, body"),
        (names[::-1], 'order'),
    ):
        with pytest.raises(BadInput, match=words):
            measure_representations(net, *sets, layers=wrong)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(digits, dtype):
    """The representations are those of the network, but scores and sums are in float32."""
    torch.manual_seed(0)
    net = get_network(settings_of(depth=2, width=6, normalization='none'), (1, 8, 8), 10).to(dtype)
    train, train_labels, test, test_labels = unbalanced(digits, seed=2)
    sets = train.to(dtype), train_labels, test.to(dtype), test_labels
    with torch.no_grad():
        h = [net[:2](images).double().flatten(1).numpy() for images in (sets[0], sets[2])]
    exact = brute_force(h[0], train_labels.numpy(), h[1], test_labels.numpy())
    layer = measure_representations(net, *sets)[1]
    assert {column: layer[column] for column in COLUMNS} == pytest.approx(exact, rel=1e-5)
    collapse = neural_collapse(net, h[0], sets[0], train_labels.numpy(), last=False)
    assert layer['nc1'] == pytest.approx(collapse['nc1'], rel=1e-3)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize('measure', [measure_representations, measure_probes])
def test_labels_of_any_integer_type(measure, dtype):
    torch.manual_seed(0)
    images, labels, net = torch.rand(30, 5), torch.arange(30) % 3, nn.Sequential(nn.ReLU())
    found = measure(net, images, labels.to(dtype), images, labels.to(dtype))
    assert str(found) == str(measure(net, images, labels, images, labels))


@pytest.mark.long
def test_mnist(mnist):
    torch.manual_seed(0)
    net = get_network(settings_of(depth=2, width=4), (1, 28, 28), 10)
    net = net.to(memory_format=torch.channels_last)
    train, labels = mnist.train_images[:640], mnist.train_labels[:640]
    test, test_labels = mnist.test_images[:200], mnist.test_labels[:200]
    layers = measure_representations(net, train, labels, test, test_labels)
    hidden = all_representations(net, train), all_representations(net, test)
    for layer, h, h_test in zip(layers, *hidden, strict=True):
        exact = brute_force(h, labels.numpy(), h_test, test_labels.numpy())
        assert {column: layer[column] for column in COLUMNS} == pytest.approx(exact, rel=1e-6)


PROBES = [f'{part}_probe_{kind}' for kind in ('error', 'loss') for part in ('train', 'test')]


def least_squares(h, labels, h_test, test_labels, classes=10):
    """The columns of a probe of (m, D) float64 arrays, by least squares, the ridge as more rows."""
    mean, targets = h.mean(0), np.eye(classes)
    ridge = 1e-3 * ((h - mean) ** 2).sum() / h.shape[1]
    inputs = np.concatenate([h - mean, np.sqrt(ridge) * np.eye(h.shape[1])])
    frequencies = targets[labels].mean(0)
    wanted = np.concatenate([targets[labels] - frequencies, np.zeros((h.shape[1], classes))])
    probe = np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    errors, losses = [], []
    for part, known in ((h, labels), (h_test, test_labels)):
        outputs = (part - mean) @ probe + frequencies
        errors.append((outputs.argmax(1) != known).mean())
        losses.append(((outputs - targets[known]) ** 2).mean())
    return dict(zip(PROBES, [*errors, *losses], strict=True))


@pytest.mark.parametrize('channels_last', [True, False])
@pytest.mark.parametrize('name', NETWORKS)
def test_probes_are_least_squares(digits, monkeypatch, name, channels_last):
    """In parts of two sizes, both uneven."""
    monkeypatch.setattr(representations, 'images_per_pass', lambda net, images: 7)
    features = representations._probe_features
    monkeypatch.setattr(representations, '_probe_features', lambda *given: features(*given, 30))
    torch.manual_seed(0)
    net = get_network(settings_of(network=name, **NETWORKS[name]), (1, 8, 8), 10)
    train, train_labels, test, test_labels = unbalanced(digits, seed=3)
    net(train)
    net = net.to(memory_format=torch.channels_last) if channels_last else net
    before = copy.deepcopy(net.state_dict())
    layers = measure_probes(net, train, train_labels, test, test_labels)
    expected = zip(all_representations(net, train), all_representations(net, test), strict=True)
    assert len(layers) == NETWORKS[name]['depth'] + 1 and net.training
    for layer, (h, h_test) in zip(layers, expected, strict=True):
        exact = least_squares(h, train_labels.numpy(), h_test, test_labels.numpy())
        assert layer == pytest.approx(exact, rel=1e-4)
        assert [layer[column] for column in PROBES[:2]] == [exact[column] for column in PROBES[:2]]
    assert all(torch.equal(entry, before[key]) for key, entry in net.state_dict().items())


def probe(h, labels):
    """The probe of points (m, ...), the first half of them the training set."""
    h, labels, half = torch.as_tensor(h, dtype=torch.float32), torch.as_tensor(labels), len(h) // 2
    sets = h[:half], labels[:half], h[half:], labels[half:]
    return measure_probes(nn.Sequential(nn.ReLU()), *sets)[0]


@pytest.mark.parametrize(
    'change', [lambda h: 1e-30 * h, lambda h: 1e30 * h, lambda h: h + 50, lambda h: 50 - h]
)
def test_probes_know_no_scale_and_no_origin(change):
    torch.manual_seed(1)
    labels = torch.randint(10, (800,))
    h = torch.eye(10, 40)[labels] + 0.5 * torch.randn(800, 40)
    before = probe(h, labels)
    assert probe(change(h), labels) == pytest.approx(before, rel=1e-3)
    assert 0 < before['train_probe_error'] < before['test_probe_error'] < 0.5


def test_large_maps_are_averaged_before_a_probe_reads_them():
    """12 x 20 maps of 9 channels, 15 x 15 cells allowed; of 2,100 channels one cell each."""
    torch.manual_seed(2)
    labels = torch.arange(60) % 3
    for shape, side in (((9, 12, 20), 15), ((2100, 1, 20), 1)):
        h = torch.rand(60, *shape) + 0.1 * labels[:, None, None, None]
        cells = torch.nn.functional.adaptive_avg_pool2d(h, side).flatten(1)
        found = probe(h, labels)
        assert found == pytest.approx(probe(cells, labels), rel=1e-6)
    whole = probe(h.flatten(1)[:, :2100], labels)  # vectors are read whole
    assert whole['test_probe_loss'] != pytest.approx(found['test_probe_loss'])


def test_probes_of_constant_layers_and_of_classes_that_a_set_lacks():
    labels = torch.tensor([0, 0, 1, 0, 1, 2])
    constant = probe(torch.full((6, 4), 3.0), labels)  # outputs 2/3, 1/3 and 0: the majority
    assert constant['train_probe_error'] == pytest.approx(1 / 3) == constant['test_probe_error'] / 2
    assert constant['train_probe_loss'] == pytest.approx((2 * 2 / 9 + 8 / 9) / 9)
    tie = probe(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))
    assert tie['train_probe_error'] == tie['test_probe_error'] == 1
    assert tie['train_probe_loss'] == 0.25


def test_a_training_probes_its_last_epoch(tmp_path):
    train_small(tmp_path / 'run', '--epochs', 3, '--layers-every', 2, '--prune-rounds', 1)
    rows = rows_of(read_layers(tmp_path / 'run' / 'CONV-3-4' / 'layers.csv'))
    probed = [row for row in rows if not math.isnan(row['train_probe_error'])]
    found = {(row['round'], row['epoch'], row['layer']) for row in probed}
    assert found == {(round_, 3, layer) for round_ in (0, 1) for layer in range(4)}


CHANGES = {
    'rotation': (lambda h: h @ torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0], 1e-6),
    'small': (lambda h: h * 1e-3, 1e-6),
    'large': (lambda h: h * 1e6, 1e-6),
    'tiny': (lambda h: h * 1e-30, 1e-6),  # squares underflow in float32
    'huge': (lambda h: h * 1e30, 1e-6),  # squares overflow
    'channels': (lambda h: h[:, torch.randperm(40)], 1e-6),
    'shift': (lambda h: h + 50, 1e-5),
}


@pytest.mark.parametrize('change', CHANGES)
def test_invariances(change):
    torch.manual_seed(1)
    labels = torch.randint(10, (500,))
    h = torch.eye(10, 40, dtype=torch.float64)[labels] + 0.3 * torch.randn(
        500, 40, dtype=torch.float64
    )
    order = torch.randperm(500)
    function, tolerance = CHANGES[change]
    before, after = points(h, labels)[0], points(function(h)[order], labels[order])[0]
    assert before['train_ncc_error'] == after['train_ncc_error'] == after['test_ncc_error']
    assert 0 < before['train_ncc_error'] < 0.5
    assert before['train_cdnv'] == pytest.approx(after['train_cdnv'], rel=tolerance)


@pytest.mark.parametrize('t, further', [(1.0, 0.0), (1e-2, 0.0), (1e-4, 100.0)])
def test_constructed_cdnv(t, further):
    """Class c at s e_c + t e_C and s e_c - t e_C, half each: V = t^2, squared distance 2 s^2."""
    s, classes = 2.0, 5
    means = s * torch.eye(classes, classes + 2)
    means[:, -1] = s * further
    spread = s * t * torch.eye(classes + 2)[classes]
    labels = torch.arange(classes).repeat(20)
    h = torch.cat([means.repeat(10, 1) + spread, means.repeat(10, 1) - spread])
    layer = points(h, labels)[0]
    assert layer['train_cdnv'] == pytest.approx(t**2 / 2, rel=1e-6) == layer['test_cdnv']
    assert layer['train_ncc_error'] == layer['test_ncc_error'] == 0


def test_absent_classes_and_classes_of_one_sample():
    train, labels = torch.tensor([[0.0, 1], [0, 3], [8, 2]]), torch.tensor([7, 7, 2])
    test, test_labels = torch.tensor([[0.0, 2], [9, 2], [9, 2], [1, 2]]), torch.tensor([7, 2, 5, 2])
    layer = measure_representations(nn.Sequential(nn.ReLU()), train, labels, test, test_labels)[1]
    # Class 5 is unknown, and the last sample is nearer to 7.
    assert (layer['train_ncc_error'], layer['test_ncc_error']) == (0, 2 / 4)
    assert layer['train_cdnv'] == pytest.approx((1 + 0) / (2 * 64))
    # Test: means of 7, 2, 5 at x = 0, 5, 9, variance of class 2: 16.
    assert layer['test_cdnv'] == pytest.approx((16 / (2 * 25) + 0 + 16 / (2 * 16)) / 3)


def test_fewer_than_two_classes_are_nan():
    h, labels = torch.rand(6, 3), torch.zeros(6, dtype=torch.int64)
    layer = points(h, labels)[0]
    assert all(math.isnan(layer[column]) for column in COLUMNS)
    layer = measure_representations(nn.Sequential(nn.ReLU()), h, torch.arange(6) % 2, h, labels)[0]
    assert math.isnan(layer['test_cdnv'])
    assert 0 <= layer['test_ncc_error'] <= 1 and layer['train_cdnv'] > 0


def test_dead_layers_equal_means_and_ties():
    labels = torch.tensor([0, 0, 1, 1])
    dead = points(-torch.rand(4, 3), labels)[1]
    assert [dead[column] for column in COLUMNS] == [1, 1, math.inf, math.inf]
    same = points([[0.0, 1], [0, 3], [0, 0], [0, 4]], labels)[0]
    assert same['train_ncc_error'] == 1 and same['train_cdnv'] == math.inf
    tie = points([[0.0], [2.0], [2.0], [4.0]], labels)[0]  # means 1 and 3: both points at 2 tie
    assert tie['train_ncc_error'] == tie['test_ncc_error'] == 2 / 4


def test_modes_weights_and_statistics_are_left_alone(digits):
    net = get_network(settings_of(network='CONVRES', **NETWORKS['CONVRES']), (1, 8, 8), 10)
    net[1].bn1.eval()
    before = copy.deepcopy(net.state_dict())
    calls = []
    hook = net[0].register_forward_hook(lambda *_: calls.append(net.training))
    measure_representations(net, *unbalanced(digits, 0))
    assert [module for module in net.modules() if not module.training] == [net[1].bn1]
    assert all(torch.equal(entry, before[name]) for name, entry in net.state_dict().items())
    assert len(calls) > 2 * 280 / 32 and not any(calls)
    hook.remove()

    def interrupt(*_):
        raise KeyboardInterrupt

    net[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure_representations(net, *unbalanced(digits, 0))
    assert net.training and not net[1].bn1.training


def test_matrix_products_are_in_full_float32(digits):
    matmul, seen = torch.backends.cuda.matmul, []
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = 'tf32'
        net = nn.Sequential(nn.ReLU())
        net[0].register_forward_hook(lambda *_: seen.append(matmul.fp32_precision))
        measure_representations(net, *unbalanced(digits, 0))
        assert set(seen) == {'ieee'} and matmul.fp32_precision == 'tf32'
    finally:
        matmul.fp32_precision = before


class Skipping(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


REFUSED = {
    'own forward': (Skipping(nn.ReLU()), {}, 'Skipping: name its layers'),
    'no Sequential': (nn.Linear(3, 3), {}, 'Linear: name its layers'),
    'no ReLU': (
        nn.Sequential(nn.Flatten(), nn.Linear(3, 3)),
        {},
        'no nn.ReLU among its children',
    ),
    'NaN': (
        nn.Sequential(nn.ReLU()),
        {'train_images': torch.full((4, 3), math.nan)},
        'layer 0: .* NaN',
    ),
    'overflow': (
        nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
        {'test_images': torch.full((4, 3), 3e38)},
        'layer 1: .* infinity',
    ),
    'labels': (
        nn.Sequential(nn.ReLU()),
        {'test_labels': torch.zeros(5, dtype=torch.int64)},
        r'\(4, 3\) and \(5,\)',
    ),
    'one-hot': (nn.Sequential(nn.ReLU()), {'train_labels': torch.eye(4)}, 'train images'),
    'none': (
        nn.Sequential(nn.ReLU()),
        {'train_images': torch.ones(0, 3), 'train_labels': torch.arange(0)},
        'm at least 1',
    ),
}


@pytest.mark.parametrize('measure', [measure_representations, measure_probes])
@pytest.mark.parametrize('case', REFUSED)
def test_refused(case, measure):
    net, changed, message = REFUSED[case]
    if case == 'overflow' and measure is measure_probes:
        changed = {'train_images': changed['test_images']}
    given = {'train_images': torch.rand(4, 3), 'train_labels': torch.arange(4)}
    given |= {'test_images': torch.rand(4, 3), 'test_labels': torch.arange(4)}
    if case == 'overflow':
        nn.init.constant_(net[0].weight, 10.0)
    with pytest.raises(BadInput, match=message) as caught:
        measure(net, **(given | changed))
    assert '\n' not in str(caught.value)


def test_effective_depth():
    errors = [0.3, 0.05, 0.01, 0.02, 0.0]
    assert [effective_depth(errors, eps) for eps in (0.3, 0.05, 0.01, 0.009, 0)] == [1, 2, 3, 5, 5]
    assert (
        effective_depth(errors[:2], 0.01)
        == effective_depth([], 0.5)
        == effective_depth([math.nan], 0.5)
        == math.inf
    )
    assert effective_depth([6 / 600], 0.01) == 1  # at most eps
    for eps in (-0.1, 1, math.nan):
        with pytest.raises(BadInput, match='eps = '):
            effective_depth(errors, eps)


def test_comparative_estimate():
    inf = math.inf
    found = comparative_estimate(
        [[5, 2], [2, 1], [2, 2]], [[inf, inf], [4, 3], [2, inf]], noise=0.1, alpha=0.5
    )
    assert found['a'] == [3.5, 1.5, 2.0] and found['b'] == [inf, 3, 2] and found['open'] == 1
    assert found['share'] == 1 / 3 and found['estimate'] == pytest.approx(1 / 3 + 0.15)
    assert found['at_limit'] == pytest.approx(found['limit'] + 0.15)
    undecided = comparative_estimate(
        [[inf, 2]], [[inf]], noise=0.1, alpha=0.5
    )  # a network that does not fit S1 counts against
    assert undecided['share'] == undecided['limit'] == 1


@pytest.mark.parametrize(
    'changed',
    [
        {'noise': 0},
        {'noise': 0.5},
        {'alpha': 0},
        {'alpha': 1},
        {'depths': []},
        {'depths': [[]]},
        {'noisy_depths': [[2], [3]]},
    ],
)
def test_comparative_estimate_refuses(changed):
    given = {'depths': [[1]], 'noisy_depths': [[2]], 'noise': 0.1, 'alpha': 0.1}
    with pytest.raises(BadInput):
        comparative_estimate(**(given | changed))
