"""Every public function on a network of every kind: the right value, found in another way, or a
refusal that names all that is in the way; and the network stays as it was."""

import copy
import itertools
import math
from fractions import Fraction
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import (
    BENCH,
    BENCH_SHAPE,
    WEIGHTED,
    bench,
    conv,
    linear,
    weights_of,
)
from test_coded import without_kernels
from test_paths import matrix_of
from test_paths import outputs_of as unrolled_outputs
from test_representations import brute_force, least_squares
from torch import nn
from torch.nn.utils import parametrize

from conf import BadInput
from measures import landscape, masks, norms, pac_bayes, paths, trace
from measures.representations import effective_depth, measure_probes, measure_representations
from studies.coded import certify_by_disagreement, encode
from studies.compress import balance, compress, compress_layer
from studies.falsify import falsify
from utils import evaluate_bounds, tail

# ------------------------------------------------------------------------------------------------
# A case, and what is known of it
# ------------------------------------------------------------------------------------------------

M, CLASSES, DELTA = 40, 3, 0.001
# A coded network that decides for class 0 on every image that is not black.
MESSAGE = encode(without_kernels(torch.tensor([1, -1, 0]).view(CLASSES, 1, 1, 1)))


def case_of(name):
    """A network of the bench, the same before training, and the data."""
    net, initial = bench(name), bench(name, seed=1)
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(M, *BENCH_SHAPE, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (M,), generator=generator)
    images = images.to(next(net.parameters()).dtype)
    named = [each for each, module in net.named_modules() if isinstance(module, WEIGHTED)]
    linear = [each for each in named if isinstance(net.get_submodule(each), nn.Linear)]
    return SimpleNamespace(
        name=name,
        net=net,
        initial=initial,
        images=images,
        labels=labels,
        layers=named,
        linear=linear,
        half=images.element_size() == 2,
    )


def weight_by_hand(layer):
    """The weight in evaluation mode, by the formula of its parametrization."""
    if not parametrize.is_parametrized(layer):
        return layer.weight
    (step,), tensors = (
        layer.parametrizations.weight,
        dict(layer.parametrizations.named_parameters()),
    )
    if len(tensors) == 2:
        v = tensors['weight.original1']
        lengths = v.flatten(1).square().sum(1).sqrt()
        return v * tensors['weight.original0'] / lengths.view(-1, *[1] * (v.ndim - 1))
    weight = tensors['weight.original']
    return weight / (step._u @ weight.flatten(1) @ step._v)


def plain(layer):
    """A layer without parametrizations."""
    if not parametrize.is_parametrized(layer):
        return layer
    weight = weight_by_hand(layer)
    if weight.ndim == 4:
        made = conv(*weight.shape[1::-1], tuple(weight.shape[2:]))
    else:
        made = linear(*weight.shape[::-1])
    made.weight = nn.Parameter(weight.detach())
    return made


def twin_of(net):
    """The same function in evaluation mode and in float64, of plain layers."""
    net = copy.deepcopy(net).double().eval()
    if any(map(parametrize.is_parametrized, net.modules())):
        with torch.random.fork_rng():
            net = nn.Sequential(*map(plain, net))
    return net.requires_grad_(False)


def without(net, part):
    """A copy without the smaller half of each layer's weights, or without the first weight of the
    layer of this number."""
    net = copy.deepcopy(net)
    for number, weight in enumerate(weights_of(net)):
        if part == 'half' and weight.numel():
            weight[weight.abs() <= weight.abs().median()] = 0
        elif part == number:
            weight.view(-1)[0] = 0
    return net


@lru_cache(None)
def products(name, part=None, seed=0):
    """Per output, the products of weights along its paths, one by one."""
    net = without(twin_of(bench(name, seed)), part)
    if name == 'no channels':  # the paths begin at the biases of the classifier
        return [np.array([value]) for value in net[-1].bias.tolist()]
    image = torch.ones(BENCH_SHAPE, dtype=torch.float64)
    return [np.array([phi for phi, _, _ in found]) for _, found in unrolled_outputs(net, image)]


def sums(name, q=1, part=None, seed=0):
    """Per output, the sum over its paths of |product|^q."""
    return [(np.abs(phi) ** q).sum() for phi in products(name, part, seed)]


def inputs_of(net, images):
    """What each layer with weights reads, by hooks, in the order of the forward pass."""
    found, layers = [], [module for module in net.modules() if isinstance(module, WEIGHTED)]

    def note(layer, inputs, output):
        found.append(inputs[0])

    hooks = [layer.register_forward_hook(note) for layer in layers]
    net(images)
    for hook in hooks:
        hook.remove()
    return list(zip(layers, found))


@lru_cache(None)
def toeplitz(name):
    """Of each layer of a chain, (weight, Toeplitz matrix, output positions), in float64."""
    found, image = [], torch.ones(1, *BENCH_SHAPE).double()
    for layer, read in inputs_of(twin_of(bench(name)), image):
        matrix, size = matrix_of(layer, tuple(read.shape[1:]))
        found.append((layer.weight, matrix, math.prod(size[1:])))
    return found


@torch.no_grad()
def scores_of(case):
    return twin_of(case.net)(case.images.double())


def margins_of(case):
    scores, found = scores_of(case).tolist(), []
    for row, label in zip(scores, case.labels.tolist()):
        own = row.pop(label)
        found.append(own - max(row))
    return np.array(found)


def same_function(case, other, rel=1e-5):
    """Whether a network computes what that of the case does; half precision rounds what is made."""
    scores = scores_of(case)
    with torch.no_grad():
        found = other.eval()(case.images).double()
    limit = (0.02 if case.half else rel) * scores.norm()
    assert (found - scores).norm() <= limit and scores.std() > 0.001


def close(found, expected, case, rel=1e-5):
    """Whether numbers agree, as well as the outputs in half precision allow."""
    rel, least = (0.05, 0.01) if case.half else (rel, 1e-7)
    np.testing.assert_allclose(found, expected, rtol=rel, atol=least)


# ------------------------------------------------------------------------------------------------
# What is in the way
# ------------------------------------------------------------------------------------------------

CHAINS = {
    'VGG': [
        '0 (Conv2d), 4 (Conv2d), 10 (Linear) has a bias',
        '1 (BatchNorm2d), 3 (MaxPool2d), 5 (BatchNorm2d), 7 (AvgPool2d): not covered',
    ],
    'residual': [
        '0 (Conv2d), 3.body.0 (Conv2d), 3.body.2 (Conv2d), 6 (Linear) has a bias',
        *('1 (BatchNorm2d): not covered', 'add: does not read'),
    ],
    'MLP': ['1 (Linear), 3 (Linear), 5 (Linear) has a bias'],
    'U-net': [
        '0 (Conv2d), 2.body.1 (Conv2d), 3 (Conv2d) has a bias',
        '2.body.0 (MaxPool2d), 2.body.3 (ConvTranspose2d): not covered',
        *('cat: does not read', 'its last layer is not a linear classifier'),
    ],
    'transformer': [
        'attn (MultiheadAttention), norm (LayerNorm), act (GELU): not covered',
        *('add: does not read', 'fc (Linear), out (Linear), head (Linear) has a bias'),
    ],
    'no channels': [
        '1 (Linear), 3 (Linear), 5 (Linear) has a bias',
        '3 (Linear), 5 (Linear) has no weights',
    ],
}
FOLDED = {
    'VGG': ['3 (MaxPool2d), 7 (AvgPool2d): not covered'],
    'residual': ['add: does not read'],
    'U-net': ['2.body.0 (MaxPool2d), 2.body.3 (ConvTranspose2d): not covered', 'cat: does not'],
    'transformer': ['attn (MultiheadAttention), norm (LayerNorm), act (GELU): not covered'],
    'no channels': ['3 (Linear), 5 (Linear) has no weights'],
}
PATHS = {'transformer': ['attn (MultiheadAttention), norm (LayerNorm), act (GELU): not covered']}
COUNTED = {
    'transformer': ['attn (MultiheadAttention) holds weights that are not counted'],
    'tied': ['3 and 5 share a parameter'],
}
CLASSIFIER = {'U-net': ['outputs (40, 3, 6, 4) and labels (40,): must be (m, classes) and (m,)']}
LAYERS = {'transformer': ['of attn.out_proj, fc, out, head, there run fc, out, head']}
NO_LINEAR = {'U-net': ['not a linear layer of Sequential; it has none']}
NO_WEIGHTS = {'no channels': ['5 (Linear) has no weights']}
# Neurons on the longest path, the largest pooling, whether there are biases, whether it is a chain.
DEPTHS = {
    'VGG': (4, 4, True, False),
    'residual': (4, 0, True, False),
    'MLP': (3, 0, True, False),
    'U-net': (4, 4, True, False),
    'tied': (4, 0, False, True),
    'spectral norm': (2, 0, False, True),
    'weight norm': (2, 0, False, True),
    'no channels': (3, 0, True, False),
}
READERS = {
    **{name: {} for name in ('residual', 'U-net', 'transformer')},
    'VGG': {'0': '4', '4': '10'},
    'tied': {'1': '3', '3': '5', '5': '7'},
    'nested': {'0.0.0': '1.2', '1.2': '3.0'},
    **{name: {'0': '3'} for name in ('spectral norm', 'weight norm')},
    **{name: {'1': '3', '3': '5'} for name in ('MLP', 'no channels')},
}
DEAD = {'U-net': [math.nan, 0, math.nan, 0], 'no channels': [4, 0, 3]}

# ------------------------------------------------------------------------------------------------
# The functions: {name: (call, what is in the way, check of what it returns)}
# ------------------------------------------------------------------------------------------------

FUNCTIONS = {}


def function(call, *obstacles):
    """Enters a check under its own name; later obstacles come second where a network has both."""
    refused = {}
    for table in reversed(obstacles):
        refused |= table

    def enter(check):
        FUNCTIONS[check.__name__.rstrip('_')] = call, refused, check
        return check

    return enter


@function(lambda case: trace.outputs(case.net, case.images))
def outputs(case, found):
    assert found.dtype == torch.float64
    close(found, scores_of(case), case)


@function(lambda case: trace.plain_copy(case.net))
def plain_copy(case, found):
    assert not any(map(parametrize.is_parametrized, found.modules()))
    same_function(case, found)


@function(lambda case: trace.folded(case.net), FOLDED)
def folded(case, found):
    same_function(case, found)


@function(lambda case: trace.trace_layers(case.net, BENCH_SHAPE), CHAINS)
def trace_layers(case, found):
    for layer, (weight, _, _) in zip(found, toeplitz(case.name), strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=1e-6, atol=1e-7)


@function(lambda case: trace.not_covered(case.net, BENCH_SHAPE))
def not_covered(case, found):
    assert (found is None) == (case.name not in CHAINS)
    assert all(part in found for part in CHAINS.get(case.name, []))


@function(lambda case: trace.effective_weights(case.net), COUNTED)
def effective_weights(case, found):
    assert list(found) == case.layers
    for weight, expected in zip(found.values(), weights_of(twin_of(case.net)), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)


@function(
    lambda case: [paths.path_norm(case.net, BENCH_SHAPE, *qr) for qr in ((1,), (2,), (2, 3))],
    PATHS,
)
def path_norm(case, found):
    one, two, mixed = found
    assert one == pytest.approx(sum(sums(case.name)), rel=1e-6)
    assert two == pytest.approx(sum(sums(case.name, 2)) ** 0.5, rel=1e-6)
    thirds = sum(value**1.5 for value in sums(case.name, 2))
    assert mixed == pytest.approx(thirds ** (1 / 3), rel=1e-6)


@function(
    lambda case: paths.path_metric(case.net, without(twin_of(case.net), 'half'), BENCH_SHAPE),
    PATHS,
)
def path_metric(case, found):
    pairs = zip(products(case.name), products(case.name, 'half'), strict=True)
    expected = sum(np.abs(one - other).sum() for one, other in pairs)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[1] or case.name in ('spectral norm', 'weight norm')  # rounded in float32


@function(lambda case: paths.path_magnitude(case.net, BENCH_SHAPE), PATHS, COUNTED)
def path_magnitude(case, found):
    assert list(found) == [f'{name}.weight' for name in case.layers]
    for number, score in enumerate(found.values()):
        if score.numel():
            fall = sum(sums(case.name)) - sum(sums(case.name, part=number))
            assert score.flatten()[0].item() == pytest.approx(fall, rel=1e-5, abs=1e-9)


@function(
    lambda case: paths.rescale_neurons(case.net, lambda count: torch.arange(1, count + 1)),
    PATHS,
    COUNTED,
)
def rescale_neurons(case, found):
    same_function(case, found)
    rel = 0.01 if case.half else 1e-5
    expected = sum(sums(case.name))
    assert paths.path_norm(found, BENCH_SHAPE) == pytest.approx(expected, rel=rel)
    moved = zip(weights_of(found), weights_of(twin_of(case.net)))
    if case.name not in ('U-net', 'no channels'):  # a concatenation, and a single channel
        assert any(not torch.allclose(one.double(), other, 0.1) for one, other in moved)


@function(lambda case: paths.measure_paths(case.net, BENCH_SHAPE), PATHS)
def measure_paths(case, found):
    depth, pool, biased, chain = DEPTHS.get(case.name, (3, 0, False, True))
    assert (found.path_depth, found.pool, found.biased, found.chain) == (depth, pool, biased, chain)
    assert found.path_norm == pytest.approx(sum(sums(case.name)), rel=1e-6)
    assert found.outputs == len(products(case.name))


@function(lambda case: norms.measure_network(case.net, BENCH_SHAPE), CHAINS)
def measure_network(case, found):
    layers = toeplitz(case.name)
    assert found.D == len(layers) and found.W.tolist() == [w.numel() for w, _, _ in layers]
    assert found.p.tolist() == [positions for _, _, positions in layers]
    close(found.F, [weight.norm() for weight, _, _ in layers], case)
    np.testing.assert_allclose(found.T, [matrix.norm() for _, matrix, _ in layers], rtol=1e-6)
    largest = [torch.linalg.svdvals(matrix)[0] for _, matrix, _ in layers]
    np.testing.assert_allclose(found.s, largest, rtol=1e-4)
    rows = [matrix.square().sum(1).sqrt().sum() for _, matrix, _ in layers]
    np.testing.assert_allclose(found.A, rows, rtol=1e-6)
    assert found.rho == pytest.approx(math.prod(w.norm().item() for w, _, _ in layers), rel=1e-6)


@function(
    lambda case: norms.measure_network(case.net, BENCH_SHAPE, skip_uncovered=True),
)
def measure_network_skipping(case, found):
    assert hasattr(found, 'rho') == (case.name not in CHAINS)
    assert hasattr(found, 'path_norm') == (case.name not in PATHS)
    if case.name in CHAINS:
        with pytest.raises(BadInput) as caught:
            _ = found.T
        assert all(part in str(caught.value) for part in CHAINS[case.name])
    if case.name not in PATHS:
        assert found.path_norm == pytest.approx(sum(sums(case.name)), rel=1e-6)


@function(lambda case: norms.measure_data(case.net, case.images, skip_uncovered=True))
def measure_data_skipping(case, found):
    squares = case.images.double().numpy() ** 2
    assert found.m == M and found.inputs == 24
    assert found.E_max == found.E_coord == pytest.approx(squares.sum(0).max(), rel=1e-12)
    assert found.E_tot == pytest.approx(squares.sum(), rel=1e-12)
    assert found.B == pytest.approx(squares.sum((1, 2, 3)).max() ** 0.5, rel=1e-12)
    assert hasattr(found, 'P') == (case.name not in CHAINS)


@function(lambda case: norms.measure_data(case.net, case.images), CHAINS)
def measure_data(case, found):
    measure_data_skipping(case, found)
    images, seen = case.images.double(), []
    for _, matrix, positions in toeplitz(case.name)[:1]:
        reads = matrix.view(-1, positions, 24)[0] != 0
        seen.append((images.flatten(1).square() @ reads.double().T).max() ** 0.5)
    np.testing.assert_allclose(found.P[[0, -1]], [*seen, found.B], rtol=1e-6)


@function(
    lambda case: [
        (measure(case.net.get_submodule(name).eval().weight, BENCH_SHAPE[1:]), name)
        for measure in (norms.operator_norm, norms.dft_norm)
        for name in case.layers
        if isinstance(case.net.get_submodule(name), nn.Conv2d)
    ],
)
def operator_norm_and_dft_norm(case, found):
    """On maps of 6 x 4, without padding."""
    case.net.train()
    twin, largest = dict(zip(case.layers, weights_of(twin_of(case.net)))), {}
    for name in {name for _, name in found}:
        layer = conv(*twin[name].shape[1::-1], tuple(twin[name].shape[2:]))
        layer.weight = nn.Parameter(twin[name], requires_grad=False)
        matrix, _ = matrix_of(layer, (layer.in_channels, *BENCH_SHAPE[1:]))
        largest[name] = torch.linalg.svdvals(matrix)[0].item()
    for value, name in found[: len(largest)]:
        assert value == pytest.approx(largest[name], rel=1e-4)
    for value, name in found[len(largest) :]:
        assert largest[name] <= value * (1 + 1e-6) <= 2 * largest[name]


def certified(net, images, labels):
    """Without a search, which takes its time on a network that has no certificate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pac_bayes, '_climb', lambda score, point, strides: (score(point), point))
        return pac_bayes.certify(net, images, labels)


@function(lambda case: certified(case.net, case.images, case.labels), CHAINS)
def certify(case, found):
    """40 images prove nothing; no bound is below the training error."""
    error = (margins_of(case) <= 0).mean()
    assert list(found) == [f'pac_bayes_{kind}error' for kind in ('', 'rounded_', 'gibbs_')]
    assert all(error <= bound <= 1 for bound in found.values())


def evaluated(case, **options):
    return evaluate_bounds(case.net, case.images, case.labels, DELTA, 2.0, **options)


@function(lambda case: evaluated(case), CHAINS)
def evaluate_bounds_(case, found):
    largest = [torch.linalg.svdvals(matrix)[0].item() for _, matrix, _ in toeplitz(case.name)]
    frobenius = [weight.norm().item() for weight, _, _ in toeplitz(case.name)]
    assert found['rho'] == pytest.approx(math.prod(frobenius), rel=1e-5)
    ratio = math.prod(largest) / math.prod(frobenius)
    assert found['prod_ratio'] == pytest.approx(ratio, rel=1e-3)
    D, weights = len(largest), sum(weight.numel() for weight, _, _ in toeplitz(case.name))
    sedghi = D * math.prod(largest) ** (1 / D) * (weights / M) ** 0.5
    sedghi += math.sqrt(math.log(1 / DELTA) / M)
    assert found['sedghi_bound'] == pytest.approx(sedghi, rel=1e-3)
    assert all(math.isfinite(value) for value in found.values())


@function(lambda case: evaluated(case, skip_uncovered=True), CLASSIFIER)
def evaluate_bounds_skipping(case, found):
    for column in ('rho', 'our_bound', 'certified_error'):
        assert math.isnan(found[column]) == (case.name in CHAINS), column
    assert math.isnan(found['path_bound']) == (case.name in PATHS)
    if case.name in PATHS:
        return
    depth, pool, biased, chain = DEPTHS.get(case.name, (3, 0, False, True))
    log_N = depth * math.log(2) + math.log(24 * CLASSES)
    if not chain:
        P, K = pool > 0, max(1, pool)
        log_N = depth * math.log((3 + 2 * P) * K)
        log_N += math.log((3 + 2 * P) / (1 + P) * 25 * CLASSES)
    energy, r = (case.images.double().numpy() ** 2).sum(0).max(), sum(sums(case.name))
    energy = max(energy, M) if biased else energy
    bound = 4 * (r + 1) / (2.0 * M) * math.sqrt(2 * log_N * energy) + tail(r, M, DELTA)
    assert found['path_bound'] == pytest.approx(bound, rel=1e-5)
    assert found['path_norm'] == pytest.approx(r, rel=1e-5)


# ------------------------------------------------------------------------------------------------
# Representations
# ------------------------------------------------------------------------------------------------


def sets_of(case):
    return case.images[:25], case.labels[:25], case.images[25:], case.labels[25:]


@torch.no_grad()
def representations_of(case, images):
    """The input and the layers' outputs in float64, by hooks."""
    found, net = [images], copy.deepcopy(case.net).eval()
    for name in case.layers:
        layer = net.get_submodule(name)
        layer.register_forward_hook(lambda layer, inputs, output: found.append(output))
    net(images)
    return [h.double().flatten(1).numpy() for h in found]


@function(lambda case: measure_representations(case.net, *sets_of(case), case.layers), LAYERS)
def representations(case, found):
    train, labels, test, test_labels = sets_of(case)
    labels, test_labels = labels.numpy(), test_labels.numpy()
    pairs = zip(representations_of(case, train), representations_of(case, test), strict=True)
    for layer, (h, h_test) in zip(found, pairs, strict=True):
        assert layer['size'] == h.shape[1]
        if not np.ptp(h, axis=0).any():
            assert (layer['train_ncc_error'], layer['train_cdnv']) == (1, math.inf)
            continue
        for column, value in brute_force(h, labels, h_test, test_labels).items():
            assert layer[column] == pytest.approx(value, rel=1e-4), column
    errors = [layer['train_ncc_error'] for layer in found[1:]]
    reached = [number for number, error in enumerate(errors, 1) if error <= 0.5]
    assert effective_depth(errors, 0.5) == min(reached, default=math.inf)


@function(lambda case: measure_probes(case.net, *sets_of(case), case.layers), LAYERS)
def probes(case, found):
    train, labels, test, test_labels = sets_of(case)
    labels, test_labels = labels.numpy(), test_labels.numpy()
    pairs = zip(representations_of(case, train), representations_of(case, test), strict=True)
    for layer, (h, h_test) in zip(found, pairs, strict=True):
        if h.shape[1] and h.std():
            expected = least_squares(h, labels, h_test, test_labels, CLASSES)
            assert layer == pytest.approx(expected, rel=1e-3)


# ------------------------------------------------------------------------------------------------
# Masks
# ------------------------------------------------------------------------------------------------


@function(lambda case: masks.density(case.net), COUNTED)
def density(case, found):
    assert found == 1


@function(lambda case: masks.masked_density(case.net))
def masked_density(case, found):
    assert found == 1


@function(lambda case: masks.measure_masks(case.net), COUNTED)
def measure_masks(case, found):
    assert list(found) == case.layers
    dead = [layer['dead_channels'] for layer in found.values()]
    assert dead == pytest.approx(DEAD.get(case.name, [0] * len(dead)), nan_ok=True)
    for name, weight in zip(case.layers, weights_of(twin_of(case.net))):
        layer = found[name]
        if not weight.numel():
            assert math.isnan(layer['density']) and math.isnan(layer['weighted_gap'])
            continue
        turned = isinstance(case.net.get_submodule(name), nn.ConvTranspose2d)
        filters = weight.transpose(0, 1) if turned else weight
        singular = np.linalg.svd(filters.abs().flatten(1).numpy(), compute_uv=False)
        gap = singular[0] - (singular[1] if len(singular) > 1 else 0)
        assert layer['density'] == 1
        assert layer['weighted_gap'] == pytest.approx(gap, rel=1e-4)


@function(
    lambda case: {
        name: masks.hidden_readers(case.net).get(case.net.get_submodule(name))
        for name in case.layers
    },
)
def hidden_readers(case, found):
    """The modules are those of the network itself."""
    expected = READERS.get(case.name, {'0': '2', '2': '5'})
    assert {name for name, module in found.items() if module is not None} == set(expected)
    for name, reader in expected.items():
        assert found[name] is case.net.get_submodule(reader)
    found.clear()


@function(lambda case: [case.net.get_submodule(name) for name in case.layers])
def weight_mask_and_reads(case, found):
    """No mask, and each layer reads each of its channels."""
    for layer in found:
        assert masks.weight_mask(layer) is None
        channels = getattr(layer, 'in_channels', None) or layer.in_features
        if channels and next(layer.parameters()).numel():
            assert masks.reads(layer, channels).tolist() == [True] * channels
    found.clear()


@function(lambda case: masks.neuron_norms(case.net, BENCH_SHAPE), CHAINS)
def neuron_norms(case, found):
    pairs = itertools.pairwise(weight for weight, _, _ in toeplitz(case.name))
    for (inc, out, per), (weight, following) in zip(found, pairs, strict=True):
        following = following.reshape(len(following), len(weight), -1)
        for k in range(len(weight)):
            assert inc[k].item() == pytest.approx(weight[k].norm().item(), rel=1e-5)
            assert out[k].item() == pytest.approx(following[:, k].norm().item(), rel=1e-5)
            expected = [row[k].norm().item() for row in following]
            assert per[:, k].tolist() == pytest.approx(expected, rel=1e-5)


@function(lambda case: masks.sharing(case.net, BENCH_SHAPE), CHAINS)
def sharing(case, found):
    pairs = itertools.pairwise(weight for weight, _, _ in toeplitz(case.name))
    for layer, (weight, following) in zip(found, pairs, strict=True):
        following = following.reshape(len(following), len(weight), -1)
        squares = [[row[k].square().sum().item() for row in following] for k in range(len(weight))]
        shares = [sum(row) ** 2 / sum(value**2 for value in row) for row in squares]
        assert layer['active'] == len(weight)
        assert layer['participation'] == pytest.approx(np.mean(shares), rel=1e-5)


@function(lambda case: masks.drop_dead(case.net), FOLDED)
def drop_dead(case, found):
    """Also of a network whose first filter is zeros: nothing but that channel goes."""
    same_function(case, found)
    widths = [len(weight) for weight in weights_of(found)]
    assert widths == [len(weight) for weight in weights_of(twin_of(case.net))]
    killed = SimpleNamespace(**vars(case) | {'net': trace.plain_copy(case.net)})
    first = killed.net.get_submodule(case.layers[0])
    first.weight.data[0] = 0
    small = masks.drop_dead(killed.net)
    same_function(killed, small)
    constant = first.bias is not None and first.bias[0] > 0
    assert [len(weight) for weight in weights_of(small)] == [widths[0] - 1, *widths[1:]], constant


# ------------------------------------------------------------------------------------------------
# The landscape
# ------------------------------------------------------------------------------------------------


def measured(name):
    return lambda case: landscape.MEASURES[name](case.net, case.initial, case.images, case.labels)


def both(case):
    """The layers' weights of the network and of the one before training."""
    pairs = zip(weights_of(twin_of(case.net)), weights_of(twin_of(case.initial)), strict=True)
    return [(one.numpy(), other.numpy()) for one, other in pairs]


@function(measured('living_weights'), COUNTED)
def living_weights(case, found):
    assert found == sum(np.count_nonzero(weight) for weight, _ in both(case))


@function(measured('weight_norm'), COUNTED)
def weight_norm(case, found):
    squares = sum((weight**2).sum() for weight, _ in both(case))
    assert found == pytest.approx(squares**0.5, rel=1e-5)


@function(measured('distance'), COUNTED)
def distance(case, found):
    squares = sum(((weight - start) ** 2).sum() for weight, start in both(case))
    assert found == pytest.approx(squares**0.5, rel=1e-5)


@function(measured('distance_product'), COUNTED)
def distance_product(case, found):
    lengths = [((weight - start) ** 2).sum() ** 0.5 for weight, start in both(case)]
    assert found == pytest.approx(math.prod(lengths), rel=1e-4)


@function(measured('margin_10'), CLASSIFIER)
def margin_10(case, found):
    close(found, np.quantile(margins_of(case), 0.1), case)


@function(measured('path_norm_2'), PATHS)
def path_norm_2(case, found):
    assert found == pytest.approx(sum(sums(case.name, 2)) ** 0.5, rel=1e-6)


@function(measured('path_norm_4'), PATHS)
def path_norm_4(case, found):
    assert found == pytest.approx(sum(sums(case.name, 4)) ** 0.25, rel=1e-6)


@function(measured('path_distance'), PATHS)
def path_distance(case, found):
    """No smaller than the distance of the paths, and no larger than the sum of both norms."""
    pairs = zip(products(case.name), products(case.name, seed=1), strict=True)
    least = sum(np.abs(one - other).sum() for one, other in pairs)
    most = sum(sums(case.name)) + sum(sums(case.name, seed=1))
    assert least * (1 - 1e-6) <= found <= most * (1 + 1e-6)


@function(measured('sharpness'), CLASSIFIER, COUNTED)
def sharpness(case, found):
    """A sigma of the range that is searched, or nan."""
    assert math.isnan(found) or 2**-12 < found < 2**4


@function(measured('input_gradient'), CLASSIFIER)
def input_gradient(case, found):
    net, ratios = twin_of(case.net), []
    for image, label, margin in zip(case.images, case.labels, margins_of(case)):
        image = image.double()[None].requires_grad_()
        scores = net(image)[0]
        others = [score for number, score in enumerate(scores) if number != label]
        (gradient,) = torch.autograd.grad(scores[label] - max(others), image)
        ratios.append(gradient.norm().item() / max(margin, 1e-6))
    close(found, np.sort(ratios)[(M - 1) // 2], case, rel=1e-3)


@function(
    lambda case: landscape.measure_landscape(case.net, case.initial, case.images, case.labels),
    CLASSIFIER,
)
def measure_landscape(case, found):
    """Each measure, and nan where it is refused."""
    assert list(found) == list(landscape.MEASURES)
    for name, value in found.items():
        call, refused, check = FUNCTIONS[name]
        if case.name in refused:
            assert math.isnan(value), name
        else:
            check(case, value)


# ------------------------------------------------------------------------------------------------
# Studies
# ------------------------------------------------------------------------------------------------


@function(lambda case: balance(case.net, BENCH_SHAPE), CHAINS)
def balance_(case, found):
    same_function(case, found)
    for weight, following in itertools.pairwise(weights_of(found)):
        incoming = weight.flatten(1).norm(dim=1)
        outgoing = following.unflatten(1, (len(weight), -1)).transpose(0, 1).flatten(1).norm(dim=1)
        close(incoming.detach().double(), outgoing.detach().double(), case)


@function(lambda case: compress(case.net, case.images, 1e-5), CHAINS)
def compress_(case, found):
    """So small a penalty keeps the function."""
    narrow, report = found
    same_function(case, narrow, rel=0.02)
    assert [row['channels'] for row in report] == [len(w) for w in weights_of(narrow)][:-1]


@function(
    lambda case: compress_layer(case.net, case.images, (case.linear or [''])[-1], 1e-5),
    NO_LINEAR,
    NO_WEIGHTS,
)
def compress_layer_(case, found):
    narrow, report = found
    same_function(case, narrow, rel=0.02)
    assert report['channels'] == int(report['kept'].sum())
    if report['removed']:
        layer = narrow.get_submodule(case.linear[-1])
        taps = case.net.get_submodule(case.linear[-1]).in_features // len(report['kept'])
        assert layer.in_features == report['channels'] * taps


@function(
    lambda case: certify_by_disagreement(
        case.net, MESSAGE, case.images, case.labels, case.images, DELTA
    ),
    {'U-net': ['outputs of shape (40, 3, 6, 4): must be (images, classes)']},
)
def certify_by_disagreement_(case, found):
    """They differ where the network does not decide for class 0."""
    scores = scores_of(case)
    assert found.differ == int((scores[:, 0] <= scores[:, 1:].amax(1)).sum())
    assert found.proof.errors == int((case.labels != 0).sum())
    assert found.bound == min(1, found.proof.bound + found.share)
    assert found.share >= Fraction(found.differ, M)


@function(lambda case: falsify(['our_bound'], {'it': case.net}, case.images, CLASSES), CHAINS)
def falsify_(case, found):
    layers = toeplitz(case.name)
    D, hidden = len(layers), math.prod(weight.norm().item() for weight, _, _ in layers[:-1])
    channels = [1, *(len(weight) for weight, _, _ in layers)]
    reads = [(matrix != 0).sum(1).max().item() for _, matrix, _ in layers]
    degrees = math.prod(read / count for read, count in zip(reads[:-1], channels))
    squares = case.images.double().numpy() ** 2
    logs = D * math.log(2) + math.log(degrees) + math.log(CLASSES)
    estimate = (1 + math.sqrt(2 * logs)) * math.sqrt(degrees * squares.sum(0).max()) / M
    z = inputs_of(twin_of(case.net), case.images.double())[-1][1].numpy()
    t = (z**2).sum()
    r2 = (((z @ z.T) ** 2).sum() - ((z**2).sum(1) ** 2).sum()) / t**2
    lower = math.sqrt(CLASSES * t / min(2, 1 + 2 * r2 / CLASSES)) / (M * hidden)
    (row,), others = found
    assert not others and row['complexity'] == pytest.approx(estimate, rel=1e-5)
    assert row['proven'] == pytest.approx(lower, rel=1e-4)


# ------------------------------------------------------------------------------------------------
# All pairs
# ------------------------------------------------------------------------------------------------


def state_of(case):
    """All of a case that a function could change, copied."""
    nets, found = (case.net, case.initial), [torch.get_rng_state(), case.images, case.labels]
    for net in nets:
        found += net.state_dict().values()
        for module in net.modules():
            flags = [module.training, len(module._forward_hooks), len(module._forward_pre_hooks)]
            found.append(torch.tensor(flags))
        for parameter in net.parameters():
            found.append(torch.tensor([parameter.requires_grad, parameter.grad is None]))
    return [tensor.clone() for tensor in found]


def tensors_in(result):
    """All tensors of what a function returns; of a network its parameters and buffers."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, nn.Module):
        yield from result.parameters()
        yield from result.buffers()
    elif isinstance(result, dict):
        yield from tensors_in([*result.values()])
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from tensors_in(part)
    elif isinstance(result, SimpleNamespace):
        yield from tensors_in(vars(result))


@pytest.mark.parametrize('network', BENCH)
@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.filterwarnings('ignore:some bounds are nan', 'ignore:Initializing zero-element')
def test_a_function_on_a_network(name, network):
    call, refused, check = FUNCTIONS[name]
    case = case_of(network)
    before, result = state_of(case), None
    if network in refused:
        with pytest.raises(BadInput) as caught:
            call(case)
        assert all(part in str(caught.value) for part in refused[network]), caught.value
        assert '\n' not in str(caught.value)
    else:
        result = call(case)
        with torch.random.fork_rng():
            check(case, result)
    for tensor in tensors_in(result):
        tensor.data.zero_()
    assert all(map(torch.equal, before, state_of(case)))
