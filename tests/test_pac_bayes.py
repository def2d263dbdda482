"""The certificates: their formulas against brute force, and against the errors that they bound."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import settings_of, train_small
from torch import nn

from conf import BadInput
from measures import pac_bayes
from measures.pac_bayes import certify, code_length, kl_inverse, noisy_errors
from measures.trace import trace_layers
from models import get_network
from records import read_metrics
from studies import paper_width

A, B, C = pac_bayes.COLUMNS


def templates(m, seed):
    """An easy sample: one of four patterns on 6x6 pixels, and noise that hides it now and then."""
    random = np.random.default_rng((seed, m))
    labels = random.integers(4, size=m)
    patterns = np.random.default_rng(1).random((4, 1, 6, 6))
    images = patterns[labels] + random.random((m, 1, 6, 6))
    return torch.from_numpy(images).float(), torch.from_numpy(labels)


def fitted(hidden, images, labels, classes=4):
    """A network of these random hidden layers and the classifier that ridge regression gives it."""
    with torch.no_grad():
        z = nn.Sequential(*hidden, nn.Flatten())(images).double()
        gram = z.T @ z / len(z)
        gram += 5e-5 * gram.trace() * torch.eye(len(gram))
        weight = torch.linalg.solve(
            gram, z.T @ F.one_hot(labels, classes).double() / len(z)
        ).T.float()
    classifier = nn.Linear(z.shape[1], classes, bias=False)
    classifier.weight = nn.Parameter(weight)
    return nn.Sequential(*hidden, nn.Flatten(), classifier)


def convolutions(width=4):
    torch.manual_seed(0)
    return [
        nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Conv2d(width, width, 2, bias=False), nn.ReLU()
    ]  # fmt: skip


def units():
    torch.manual_seed(0)
    return [
        nn.Flatten(),
        nn.Linear(36, 12, bias=False),
        nn.ReLU(),
        nn.Linear(12, 8, bias=False),
        nn.ReLU(),
    ]


@pytest.fixture(scope='module')
def sample():
    return templates(6000, 0)


@pytest.fixture(scope='module')
def toy(sample):
    net = fitted(convolutions(), *sample)
    return net, certify(net, *sample)


def error(net, images, labels):
    with torch.no_grad():
        return net(images).argmax(1).ne(labels).double().mean().item()


def measured(net, images, labels, prior=50, rank=8):
    """The table of `net` as it is, and its features and centred classifier in float64."""
    layers = trace_layers(net, tuple(images.shape[1:]))
    kernels = [layer.kernel for layer in layers]
    kernels[-1] -= kernels[-1].mean(0)
    indices = torch.arange(len(images))
    data = {
        'images': images,
        'labels': labels,
        'prior': indices[:prior],
        'sample': indices[prior:],
        'rank': rank,
        'm1': 1,
    }
    table = pac_bayes._measure(layers, kernels, SimpleNamespace(**data))
    features = net[:-1](images).flatten(1).double().detach() * table.scale
    return table, features, kernels[-1].flatten(1)


def test_kl_inverse():
    known = {
        (0, 0.01): 0.00995016625083195,
        (0.1, 0.05): 0.22007860110692454,
        (0.05, 0.1): 0.20640140780622523,
        (0.5, 0.2): 0.7870888163813810,
        (0.1, (3000 + math.log(2 * math.sqrt(59000) / 0.001)) / 59000): 0.22160134740846166,
        (1, 0.1): 1,
        (0, 100): 1,
    }
    for (q, a), value in known.items():
        assert kl_inverse(q, a) == pytest.approx(value, abs=1e-9)
    assert 0.3 <= kl_inverse(0.3, 0) <= 0.3 + 1e-8
    for q, a in ((0.01, 0.3), (0.4, 0.001), (0.9, 0.05)):
        p = kl_inverse(q, a)
        assert q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) == pytest.approx(
            a, abs=1e-9
        )
        assert kl_inverse(q + 0.01, a) > p < kl_inverse(q, a + 0.001)
    for arguments in ((1.2, 0.1), (-0.1, 0.1), (0.1, -1), (0.1, math.nan), (math.nan, 0.1)):
        with pytest.raises(BadInput):
            kl_inverse(*arguments)


def test_the_test_set_alone():
    assert pac_bayes.test_set_bound(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert (
        0.05
        < pac_bayes.test_set_bound(0.05, 10000, 0.001)
        < pac_bayes.test_set_bound(0.05, 1000, 0.001)
    )
    for arguments in ((0.1, 0, 0.1), (0.1, 10, 0), (0.1, 10, 1)):
        with pytest.raises(BadInput):
            pac_bayes.test_set_bound(*arguments)


def test_cells():
    """The mass of each integer sums to 1 at every scale, and the code of a single Gaussian is that of the reference."""
    masses = pac_bayes._cells(torch.arange(-2000, 2001).double())
    assert torch.allclose(
        masses.sum(1)[pac_bayes.SCALES <= 128], torch.ones((), dtype=torch.float64), atol=1e-12
    )
    weight = torch.tensor([[1, -2], [0.5, 0.25]]).double()
    assert torch.allclose(
        (weight / 1.15244).round() * 1.15244, torch.tensor([[1.15244, -2.30488], [0, 0]]).double()
    )
    for scale, nats in ((1, 6.143266197286669), (4, 11.189867961943346), (16, 16.793443967327647)):
        steps = (weight / weight.square().mean().sqrt() * scale).round()
        code = -pac_bayes._cells(steps.abs().flatten())[pac_bayes.SCALES == scale].log().sum()
        assert code.item() == pytest.approx(nats, abs=1e-12)


def test_code_length():
    """P sums to at most 1, a Gaussian costs its differential entropy and little more, and zeros are almost free."""
    assert sum(math.exp(-code_length(torch.tensor([k]))) for k in range(-400, 401)) <= 1
    assert sum(2 * math.exp(-code_length(torch.tensor([k, k]))) for k in range(1, 400)) <= 1
    gauss = torch.randn(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert code_length((gauss * 2**12).round()) / 20000 == pytest.approx(
        0.5 * math.log(2 * math.pi * math.e) + 12 * math.log(2), abs=0.02
    )
    assert code_length(torch.zeros(20000)) < 20
    sparse = torch.where(torch.arange(20000) % 20 == 0, (gauss * 2**6).round(), 0.0)
    entropy = 20000 * -(0.05 * math.log(0.05) + 0.95 * math.log(0.95)) + 1000 * (
        1.4189 + 6 * math.log(2)
    )
    assert code_length(sparse) == pytest.approx(entropy, rel=0.05)
    assert math.isfinite(code_length(torch.tensor([0, 0, 2**22])))


def test_permutations():
    """What equal and unequal filters save is the number of different networks that a permutation of channels makes."""
    for filters, different in (
        ([[1, 2], [3, 4], [5, 6]], 6),
        ([[1, 2], [3, 4], [1, 2]], 3),
        ([[1, 2]] * 3, 1),
    ):
        steps = torch.tensor(filters).double()[:, :, None, None]
        saved = code_length(steps) - pac_bayes._nats([steps / 4, steps], [2])
        assert saved == pytest.approx(math.log(different))


def test_noisy_errors():
    random = torch.Generator().manual_seed(0)
    label = torch.full((200, 1), math.inf, dtype=torch.float64)
    margins = torch.cat([label, torch.randn(200, 9, dtype=torch.float64, generator=random) + 1], 1)
    v = torch.rand(200, dtype=torch.float64, generator=random) + 0.1
    two, gamma = margins[:, :2], 1.25
    ties = torch.stack([label[:, 0], 0 * v], 1)
    exact = torch.special.ndtr(gamma - two[:, 1] / (math.sqrt(2) * v))
    assert torch.allclose(
        noisy_errors(two, v, gamma), (exact + 1e-6).clamp_max(1), rtol=0, atol=1e-14
    )
    assert torch.allclose(noisy_errors(margins, 1e9 * v, 0), torch.tensor(0.9).double(), atol=2e-6)
    wrong = (margins.amin(1) <= 0).double()
    assert (
        torch.equal(noisy_errors(margins, 0 * v, gamma), wrong)
        and noisy_errors(ties, 0 * v, 0).all()
    )
    assert torch.allclose(noisy_errors(margins, 1e-9 * v, gamma), wrong, atol=2e-6)
    draws = torch.randn(4000, 200, 10, dtype=torch.float64, generator=random) * v[:, None]
    lost = (margins + draws[..., :1] - draws)[..., 1:] <= gamma * math.sqrt(2) * v[:, None]
    p = noisy_errors(margins, v, gamma)
    assert (
        (lost.any(-1).double().mean(0) - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-3
    ).all()


@pytest.mark.parametrize('classes', [2, 10, 100, 1000])
def test_quadrature_errs_on_the_safe_side(classes):
    """Against the trapezoidal rule, which converges faster than any power here, at margins of every size."""
    z = torch.linspace(-12, 12, 801, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    count = 200 if classes <= 100 else 20
    shifts = torch.linspace(-6, 12, count, dtype=torch.float64)[:, None].expand(-1, classes).clone()
    tilted = shifts + torch.linspace(-3, 3, classes, dtype=torch.float64)
    for margins in (shifts, tilted):
        margins[:, 0] = math.inf
        exact = torch.stack(
            [1 - weight @ torch.special.ndtr(z[:, None] + row).prod(1) for row in margins]
        )
        excess = noisy_errors(margins, torch.ones(count, dtype=torch.float64), 0) - exact
        assert excess.min() >= -1e-12 and excess.max() <= 2e-6


def test_classifier_kl(monkeypatch):
    """Against torch's KL of multivariate normals, the prior's mean being a ridge regression done the long way."""
    grids = {'RIDGES': [0.01, 0.3], 'SIZES': [0, 1, 3], 'PRIOR_BETAS': [0, 2, 50]}
    for name, grid in grids.items():
        monkeypatch.setattr(pac_bayes, name, torch.tensor(grid).double())
    torch.manual_seed(0)
    images, labels = torch.rand(60, 1, 1, 5), torch.arange(60) % 3
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 3, bias=False))
    table, phi, weight = measured(net, images, labels, rank=2)
    phi, targets = phi[:50], F.one_hot(labels[:50], 3).double() - 1 / 3
    moment = phi.T @ phi / 50
    lam, directions = torch.linalg.eigh(moment)
    cut = (directions[:, -2:] * lam[-2:]) @ directions[:, -2:].T
    contrasts = torch.linalg.qr(torch.tensor([[1.0, 0], [-1, 1], [0, -1]]).double())[0].T

    def normal(mean, beta):
        return torch.distributions.MultivariateNormal(
            contrasts @ mean, precision_matrix=torch.eye(5) + beta * cut
        )

    for c, beta in ((2.0, 0), (5.0, 4)):
        kls = []
        for ridge in grids['RIDGES']:
            mean = targets.T @ phi / 50 @ torch.linalg.inv(moment + ridge * torch.eye(5))
            for size in grids['SIZES']:
                for prior_beta in grids['PRIOR_BETAS']:
                    pair = (
                        normal(c * weight, 2.0 ** (4 + beta)),
                        normal(size * mean / mean.norm(), prior_beta),
                    )
                    kls.append((torch.distributions.kl_divergence(*pair).sum().item(), size))
        best = min(kl for kl, _ in kls)
        assert table.kl(c, beta) == pytest.approx(best + math.log(18), abs=1e-4 * best)


def test_measures(sample):
    """Margins, noise and lengths against dense float64 linear algebra."""
    images, labels = sample[0][:150], sample[1][:150]
    table, phi, weight = measured(fitted(convolutions(), images, labels), images, labels)
    moment = phi[:50].T @ phi[:50] / 50
    assert phi[:50].square().sum(1).mean().item() == pytest.approx(1)
    lam, directions = torch.linalg.eigh(moment)
    cut = (directions[:, -8:] * lam[-8:]) @ directions[:, -8:].T
    phi, labels = phi[50:], labels[50:]
    for index, beta in enumerate(pac_bayes.BETAS):
        variance = (phi @ torch.linalg.inv(torch.eye(len(cut)) + beta * cut) * phi).sum(1)
        assert torch.allclose(
            table.v[:, index].square(), variance, rtol=1e-3, atol=3e-6
        )  # of float32 features
    outputs = phi @ weight.T
    margins = outputs.gather(1, labels[:, None]) - outputs
    others = F.one_hot(labels, 4) == 0
    assert (
        torch.allclose(table.margins[others], margins[others], atol=1e-4)
        and table.margins[~others].isinf().all()
    )
    assert torch.allclose(table.x, images[50:].flatten(1).double().norm(dim=1))


@pytest.mark.parametrize('hidden', [convolutions, units])
@pytest.mark.parametrize('bits', [2, 5])
def test_slack_and_derandomization(sample, hidden, bits):
    """Features of a rounded network are within the slack; where the trained one errs, the loss is 1 often enough."""
    images, labels = sample[0][:400], sample[1][:400]
    net = fitted(hidden(), images, labels)
    layers = trace_layers(net, (1, 6, 6))[:-1]
    kernels = [layer.kernel for layer in layers]
    kernels = [
        kernel / pac_bayes._operator_norm(kernel, layer) for kernel, layer in zip(kernels, layers)
    ]
    rounded = [pac_bayes._round(kernel, bits) for kernel in kernels]
    assert all((kernel * 2**bits == (kernel * 2**bits).round()).all() for kernel in rounded)
    slack = pac_bayes._slack(
        pac_bayes._operator_norm(k - r, layer) for k, r, layer in zip(kernels, rounded, layers)
    )
    inputs = torch.cat([images.double(), torch.randn(400, 1, 6, 6, dtype=torch.float64)])
    true, near = (
        pac_bayes.features(layers, part, inputs).flatten(1) for part in (kernels, rounded)
    )
    lengths = inputs.flatten(1).norm(dim=1)
    ratio = (true - near).norm(dim=1) / lengths
    assert 0 < ratio.max() <= slack

    weight = net[-1].weight.detach().double()
    weight = weight - weight.mean(0)
    spread = torch.cdist(weight, weight).max()
    moment = near.T @ near / len(near)
    noise = torch.linalg.cholesky(torch.linalg.inv(torch.eye(len(moment)) + moment))
    outputs = true @ weight.T
    # every class but the predicted one is an error of the trained network, and the nearest of them the hardest
    wrong = outputs.topk(2).indices[:, 1]
    v, gamma, theta = (near @ noise).norm(dim=1), 1.0, slack * spread * lengths
    draws = weight + (torch.randn(2000, 4, len(noise), dtype=torch.float64) @ noise.T)
    scores = torch.einsum('nd,tcd->tnc', near, draws)
    margins = (scores.gather(2, wrong.expand(2000, -1)[..., None]) - scores).scatter(
        2, wrong.expand(2000, -1)[..., None], math.inf
    )
    often = (margins.amin(2) <= gamma * math.sqrt(2) * v + theta).double().mean(0)
    least = torch.special.ndtr(torch.tensor(gamma)).item()
    assert often.min() >= least - 5 * math.sqrt(least * (1 - least) / 2000)


def test_linear_network_by_sampling(sample, monkeypatch):
    """Without hidden layers A is B, and the loss is that of classifiers drawn at random; every price is paid."""
    images, labels = sample
    net, seen = fitted([], *sample), []
    bound = pac_bayes._bound
    monkeypatch.setattr(
        pac_bayes, '_bound', lambda *arguments: seen.append(arguments[:2]) or bound(*arguments)
    )
    found = certify(net, *sample, delta=0.01)
    assert found[A] == pytest.approx(found[B], rel=0.02) and found[C] < found[B] < 0.1
    assert error(net, *templates(20000, 1)) < found[C]
    problem, (i, b, g) = seen[-1]
    assert (problem.m1, problem.gap, g, problem.gibbs) == (5400, 0, 0, True)
    assert problem.nats == pytest.approx(
        math.log(2 * math.sqrt(5400) * 1000 * 11 * 17 * 801 / 0.01)
    )
    kl = (problem.nats + problem.kl(2 ** (i / 8), b)) / 5400
    p = noisy_errors(2 ** (i / 8) * problem.margins, problem.v[:, b], 0)
    assert found[C] == pytest.approx(kl_inverse(p.mean().item(), kl))

    order = torch.from_numpy(np.random.default_rng(0).permutation(6000))
    phi = images[order].flatten(1).double() * problem.scale
    moment = phi[:600].T @ phi[:600] / 600
    noise = torch.linalg.cholesky(torch.linalg.inv(torch.eye(36) + pac_bayes.BETAS[b] * moment))
    weight = net[-1].weight.detach().double()
    mean = 2 ** (i / 8) * (weight - weight.mean(0)) / (weight - weight.mean(0)).norm()
    draws = (
        mean
        + torch.randn(400, 4, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        @ noise.T
    )
    lost = torch.einsum('nd,tcd->tnc', phi[600:], draws).argmax(2) != labels[order[600:]]
    assert p.mean().item() == pytest.approx(
        lost.double().mean().item(), abs=5 * lost.double().mean(1).std().item() / 20
    )


def test_each_hidden_layer_pays_for_the_number_of_its_channels_that_live(monkeypatch):
    """It is chosen by looking at the data, among as many as the layer has: log K, dead channels or not."""
    images, labels = templates(60, 0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Conv2d(3, 5, 2, bias=False), nn.ReLU(), nn.Flatten(),
                        nn.Linear(5 * 9, 4, bias=False))  # fmt: skip
    nn.init.zeros_(net[0].weight[:1])
    seen = set()
    monkeypatch.setattr(pac_bayes, '_bound', lambda problem, *_: seen.add(problem.nats) or 0.5)
    for name in ('code_length', '_nats'):  # what the kernels themselves cost
        monkeypatch.setattr(pac_bayes, name, lambda *_: 0.0)
    certify(net, images, labels, delta=0.01)
    losses = math.log(2 * math.sqrt(54) * 1000 * 11 * 17 * 801 / 0.01)
    assert list(seen) == pytest.approx([losses + math.log(3) + math.log(5)] * len(seen))


def test_images_of_any_size(sample):
    """Scaled by a power of 2 they give the same margins and noise, bit for bit, and lengths that are no infinity."""
    images, labels = sample[0][:200], sample[1][:200]
    net = fitted(convolutions(), images, labels)
    (table, _, _), (large, _, _) = (
        measured(net, part, labels) for part in (images, images * 2.0**66)
    )
    assert torch.equal(large.margins, table.margins) and torch.equal(large.v, table.v)
    assert torch.equal(large.x, table.x * 2.0**66)
    (small, _, _) = measured(
        net, images * 2.0**-125, labels
    )  # the features' squares have no float32, and all is a tie
    assert (
        small.scale == 0
        and pac_bayes._bound(SimpleNamespace(**vars(small), gibbs=False), pac_bayes.START)
        == math.inf
    )


@pytest.mark.parametrize('knob', ['label_noise', 'normalize'])
def test_samples_that_are_not_iid_are_not_certified(tmp_path, knob):
    reason = {
        'label_noise': 'with label_noise the training samples',
        'normalize': 'normalize = True takes the statistics',
    }
    value = {'label_noise': 0.1, 'normalize': True}[knob]
    flags = '--epochs', 1, '--certify-every', 1, '--train-samples', 50, f'--{knob}', value
    assert f'certificates stay empty: {reason[knob]}' in train_small(tmp_path / 'run', *flags)
    table = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')
    assert len(table['epoch']) == 2 and all(np.isnan(table[column]).all() for column in (A, B, C))


def test_certificates_bound_and_say_something(toy, sample):
    net, found = toy
    fresh = error(net, *templates(20000, 1))
    assert fresh < found[A] < 0.7 and found[B] < found[A] and fresh < found[C] < found[B]


def test_formulas_of_the_statement(toy, sample, monkeypatch):
    """The three numbers, computed once more from the tables: R(gamma, beta, theta) / Phi(gamma), theta from the error norms."""
    net, found = toy
    bound, slack, seen, errors = pac_bayes._bound, pac_bayes._slack, {}, []

    def spy(problem, point, count=None):
        if count is None and len(problem.x) == 5400:
            seen[A if problem.gap else C if problem.gibbs else B] = (
                problem,
                problem.nats,
                problem.gap,
                point,
            )
        return bound(problem, point, count)

    monkeypatch.setattr(pac_bayes, '_bound', spy)
    monkeypatch.setattr(
        pac_bayes, '_slack', lambda norms: errors.append(list(norms)) or slack(errors[-1])
    )
    assert certify(net, *sample) == found
    for column, (table, nats, gap, (i, b, g)) in seen.items():
        c, gamma = 2 ** (i / 8), pac_bayes.GAMMAS[g]
        theta = 2 ** (math.ceil(8 * math.log2(c * gap)) / 8) if gap else 0
        assert table.m1 == 5400 and theta >= c * gap
        p = (
            noisy_errors(c * table.margins - theta * table.x[:, None], table.v[:, b], gamma)
            .mean()
            .item()
        )
        factor = 1 if column == C else 2 / math.erfc(-gamma / math.sqrt(2))
        assert found[column] == pytest.approx(
            factor * kl_inverse(p, (nats + table.kl(c, b)) / 5400)
        )
    table, _, gap, _ = seen[A]
    weight = net[-1].weight.detach().double()
    weight = (weight - weight.mean(0)) / (weight - weight.mean(0)).norm()
    spread = max((one - other).norm() for one in weight for other in weight)
    first, second = errors[-1]
    assert gap == pytest.approx(spread.item() * table.scale * ((1 + first) * (1 + second) - 1))
    norms = [layer.weight.detach().double() for layer in (net[0], net[2])]
    norms = [
        pac_bayes._operator_norm(weight, layer)
        for weight, layer in zip(norms, trace_layers(net, (1, 6, 6)))
    ]
    outputs = net[:-1](sample[0]).detach().double() @ weight.T / math.prod(norms) * table.scale
    order = torch.from_numpy(np.random.default_rng(0).permutation(6000))[600:]
    outputs, own = outputs[order], sample[1][order, None]
    margins = outputs.gather(1, own) - outputs
    apart = (margins - table.margins.clamp_max(1e9).scatter(1, own, 0)).abs()
    assert 0 < (apart / table.x[:, None]).max() <= gap


def test_more_data_and_less_confidence(toy, sample):
    net, found = toy
    assert certify(net, *sample, delta=0.1)[A] < found[A]
    assert certify(net, *(part[:3000] for part in sample))[A] > found[A]


def test_invariance(toy, sample):
    """Scales of layers, a common vector in the classifier, and the order of channels change no prediction and no bound."""
    net, found = toy
    other = fitted(convolutions(), *sample)
    with torch.no_grad():
        other[0].weight *= 3
        other[2].weight *= 0.25
        other[-1].weight *= 0.1
        other[-1].weight += torch.randn(36 // 9 * 4)
        order = torch.tensor([2, 0, 3, 1])
        other[0].weight.copy_(other[0].weight[order])
        other[2].weight.copy_(other[2].weight[:, order])
    assert certify(other, *sample) == pytest.approx(found, abs=1e-4)


def test_dead_channels(sample):
    """Channels of zeros, or that feed nothing, cost no more than the choice of how many live: their kernels are not coded."""
    wide = convolutions(16)
    with torch.no_grad():
        for layer, live in ((wide[0], 4), (wide[2], 4)):
            layer.weight[live:] = 0
        wide[0].weight[4:8] = 1
        wide[2].weight[:, 4:] = 0
        narrow = convolutions(4)
        for layer, source in ((narrow[0], wide[0]), (narrow[2], wide[2])):
            layer.weight.copy_(source.weight[:4, : layer.weight.shape[1]])
    bounds = [certify(fitted(hidden, *sample), *sample) for hidden in (wide, narrow)]
    price = 2 * math.log(4) / 5400
    for name in (A, B, C):
        assert (
            bounds[1][name] <= bounds[0][name] + 1e-4
            and bounds[0][name] <= bounds[1][name] + 4 * price + 1e-4
        )


def test_a_pruned_network_at_the_papers_width_is_the_same_function():
    """docs/paper_width.py: exactly so many weights stay, dead channels go and come back as zeros, and what is 0 stays 0."""
    torch.manual_seed(0)
    full = [
        torch.randn(6, 1, 2, 2),
        torch.randn(6, 6, 2, 2),
        torch.randn(6, 6, 2, 2),
        torch.randn(3, 6, 3, 3),
    ]
    masked = [
        full[0],
        *(torch.where(k.abs() >= k.abs().flatten().topk(12).values[-1], k, 0) for k in full[1:3]),
        full[3],
    ]
    kernels = paper_width.pruned(full, 12)
    assert [int(kernel.count_nonzero()) for kernel in kernels[1:3]] <= [12, 12] and len(
        kernels[1]
    ) < 6
    x, narrow = torch.rand(5, 1, 6, 6), paper_width.chain(kernels, masks=True)
    for same in (masked, paper_width.widened(kernels, 6)):
        assert torch.allclose(narrow(x), paper_width.chain(same, masks=False)(x), atol=1e-5)
    optimizer = torch.optim.SGD(narrow.parameters(), lr=0.01, momentum=0.9, weight_decay=3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        narrow(x).square().mean().backward()
        optimizer.step()
    trained = paper_width.kernels_of(narrow, (1, 6, 6))
    assert all((new != 0).equal(old != 0) for new, old in zip(trained[:-1], kernels[:-1]))


def test_live_channels_alone_compute_the_function():
    torch.manual_seed(0)
    net = nn.Sequential(
        *convolutions(8),
        nn.Flatten(),
        nn.Linear(8 * 4, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, 3, bias=False),
    )
    layers = trace_layers(net, (1, 6, 6))
    kernels = [layer.kernel.float() for layer in layers]
    kernels[0][[1, 4]] = 0
    kernels[1][:, 2] = 0  # so channel 2 of the first layer feeds nothing
    kernels[1][3] = 0
    kernels[1][5, [0, 3, 5, 6, 7]] = 0  # reads dead channels alone
    kernels[2][:, 6] = 0
    live = pac_bayes.live_channels(kernels)
    assert [tuple(kernel.shape[:2]) for kernel in live] == [(5, 1), (5, 5), (5, 5), (3, 5)]
    x = torch.rand(7, 1, 6, 6)
    outputs = [
        pac_bayes.features(layers, part[:-1], x).flatten(1) @ part[-1].flatten(1).T
        for part in (kernels, live)
    ]
    assert torch.allclose(*outputs, atol=1e-6)


def test_kernels_without_fine_digits_are_certified(sample):
    """All entries are equal: steps that round them exactly look free, and coarser ones round them to zero."""
    layer = nn.Conv2d(1, 1, 2, bias=False)
    nn.init.ones_(layer.weight)
    found = certify(fitted([layer, nn.ReLU()], *sample), *sample)
    assert 0 < found[C] < found[A] < 1


@pytest.mark.parametrize('hidden', [convolutions, list])
def test_random_labels_certify_nothing(sample, hidden):
    images = sample[0]
    labels = torch.from_numpy(np.random.default_rng(0).integers(4, size=len(images)))
    found = certify(fitted(hidden(), images, labels), images, labels)
    assert min(found.values()) >= 0.75 - 3 * math.sqrt(0.75 * 0.25 / len(images))


def test_networks_that_do_nothing(sample):
    for layer in (0, 2, -1):
        net = fitted(convolutions(), *sample)
        nn.init.zeros_(net[layer].weight)
        assert set(certify(net, *sample).values()) == {1.0}
    net = fitted(convolutions(), *sample)
    with torch.no_grad():
        net[0].weight.copy_(-net[0].weight.abs())  # every feature is 0 at every image, so E_h is
    assert set(certify(net, *sample).values()) == {1.0}


def test_precision_and_signals(toy, sample, monkeypatch):
    """IEEE float32 inside, whatever it was before, and that again outside, also after an interruption."""
    seen, features = [], pac_bayes.features

    def interrupted(*arguments):
        seen.append(
            (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
        )
        if len(seen) == 10:
            raise KeyboardInterrupt
        return features(*arguments)

    monkeypatch.setattr(pac_bayes, 'features', interrupted)
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = (
            'tf32'
        )
        with pytest.raises(KeyboardInterrupt):
            certify(toy[0], *sample)
        assert set(seen) == {('ieee', 'ieee')}
        assert (
            torch.backends.cuda.matmul.fp32_precision
            == torch.backends.cudnn.conv.fp32_precision
            == 'tf32'
        )
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before


def test_bad_input(toy, sample):
    net, (images, labels) = toy[0], sample
    nan = images.clone()
    nan[3, 0, 2, 2] = math.nan
    for arguments, words in (
        ((net, images, labels, 0), 'delta'),
        ((net, images, labels, 1.0), 'delta'),
        ((net, images, labels[1:]), 'a label for each'),
        ((net, images[:9], labels[:9]), '10 images'),
        ((net, images, labels + 1), 'labels'),
        ((net, images, labels.float()), 'labels'),
        ((net, nan, labels), 'NaN'),
        ((net, images * 1e26, labels), 'scale the images down'),
        (
            (nn.Sequential(nn.Flatten(), nn.Linear(36, 1001, bias=False)), images, labels),
            '1001 classes',
        ),
        ((net, images[0], labels), 'input_shape'),
        ((nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), images, labels), 'bias'),
    ):
        with pytest.raises(BadInput, match=words):
            certify(*arguments)


def test_mnist(mnist):
    """CONV-1-8 after two epochs of the default recipe: bounds below 1 and above the errors on the test set, as measured."""
    torch.manual_seed(0)
    net = get_network(settings_of(depth=1, width=8), mnist.input_shape, 10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=3e-3)
    images, labels = mnist.train_images, mnist.train_labels
    targets = F.one_hot(labels).float()
    for epoch in (1, 2):
        for batch in torch.from_numpy(
            np.random.default_rng((0, epoch)).permutation(len(images))
        ).split(32):
            optimizer.zero_grad()
            F.mse_loss(net(images[batch]), targets[batch]).backward()
            optimizer.step()
    found = certify(net, images, labels)
    assert error(net, mnist.test_images, mnist.test_labels) < found[C] < found[B] < found[A]
    assert (found[A], found[B], found[C]) == pytest.approx((0.288, 0.282, 0.173), abs=0.01)
