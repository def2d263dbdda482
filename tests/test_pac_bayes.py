"""The certificates: their formulas against brute force, and against the errors that they bound."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import settings_of, train_small
from torch import nn

from conf import BadInput
from measures import pac_bayes, tails
from measures.pac_bayes import PRIOR, certificates, certify, code_length, noisy_errors
from measures.tails import binomial_inverse, exact_binomial_inverse, kl_inverse
from measures.trace import outputs, trace_layers
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
    first = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
    return [first, nn.ReLU(), nn.Conv2d(width, width, 2, bias=False), nn.ReLU()]


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
    return net, certificates(net, *sample)


def bounds_of(net, *arguments):
    """(A, B, C) of `certify`."""
    return list(certify(net, *arguments).values())


def error(net, images, labels):
    return outputs(net, images).argmax(1).ne(labels).double().mean().item()


def kernels_of(net, images):
    layers = trace_layers(net, tuple(images.shape[1:]))
    return layers, [layer.kernel for layer in layers]


def measured(net, images, labels, rank=8, design=PRIOR):
    """What `_measure` says with 50 prior images; features and centred classifier in float64."""
    layers, kernels = kernels_of(net, images)
    kernels[-1] -= kernels[-1].mean(0)
    indices = torch.arange(len(images))
    data = SimpleNamespace(
        images=images, labels=labels, rank=rank, m1=1, design=design, dtype=torch.float32
    )
    data.prior, data.sample = indices[:50], indices[50:]
    table = pac_bayes._measure(layers, kernels, data)
    features = net[:-1](images).flatten(1).double().detach() * table.scale
    return table, features, kernels[-1].flatten(1)


def order_of(m):
    """The order in which `certify` takes the images: those of the prior first."""
    return torch.from_numpy(np.random.default_rng(0).permutation(m))


# --------------------------------------------------------------------------------------------------
# Tails
# --------------------------------------------------------------------------------------------------


KL_INVERSES = {
    (0, 0.01): 0.00995016625083195,
    (0.1, 0.05): 0.22007860110692454,
    (0.05, 0.1): 0.20640140780622523,
    (0.5, 0.2): 0.7870888163813810,
    (0.1, (3000 + math.log(2 * math.sqrt(59000) / 0.001)) / 59000): 0.22160134740846166,
    (1, 0.1): 1,
    (0, 100): 1,
}


def test_kl_inverse():
    for (q, a), value in KL_INVERSES.items():
        assert kl_inverse(q, a) == pytest.approx(value, abs=1e-9)
    assert 0.3 <= kl_inverse(0.3, 0) <= 0.3 + 1e-8
    assert -math.expm1(-1e-12) <= kl_inverse(0, 1e-12) <= 1e-12 + 1e-18
    for q, a in ((0.01, 0.3), (0.4, 0.001), (0.9, 0.05)):
        p = kl_inverse(q, a)
        divergence = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        assert divergence == pytest.approx(a, abs=1e-9)
        assert kl_inverse(q + 0.01, a) > p < kl_inverse(q, a + 0.001)


def test_the_test_set_alone():
    assert tails.test_set_bound(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert 0.05 < tails.test_set_bound(0.05, 10000, 0.001) < tails.test_set_bound(0.05, 1000, 0.001)


@pytest.mark.parametrize(
    'function, arguments',
    [
        (kl_inverse, (1.2, 0.1)),
        (kl_inverse, (0.1, -1)),
        (kl_inverse, (0.1, math.nan)),
        (kl_inverse, (math.nan, 0.1)),
        (tails.test_set_bound, (0.1, 0, 0.1)),
        (tails.test_set_bound, (0.1, 10, 0)),
        (tails.test_set_bound, (0.1, 10, 1)),
        (binomial_inverse, (3, 2, -1.0)),
        (exact_binomial_inverse, (3, 2, Fraction(1, 2))),
        (exact_binomial_inverse, (1, 2, Fraction(0))),
    ],
)
def test_tails_refuse_what_makes_no_sense(function, arguments):
    with pytest.raises(BadInput):
        function(*arguments)


def test_binomial_inverses_are_quantiles_of_the_beta_distribution():
    """The exact one is the next millionth above, also where fewer than half are right."""
    from scipy.stats import beta

    for errors, m, eta in (
        (3, 100, '0.05'),
        (27, 1000, '1e-6'),
        (0, 50, '0.01'),
        (60, 70, '0.001'),
    ):
        value = beta.ppf(1 - float(eta), errors + 1, m - errors)
        assert binomial_inverse(errors, m, math.log(float(eta))) == pytest.approx(value, abs=1e-9)
        exact = exact_binomial_inverse(errors, m, Fraction(eta))
        assert exact == Fraction(math.ceil(value * 10**6), 10**6)
    assert binomial_inverse(5, 5, -1.0) == exact_binomial_inverse(5, 5, Fraction(1, 2)) == 1


def test_exact_inverses_hold_and_are_the_least(monkeypatch):
    """By the definition, in fractions; wherever floats tell to look first."""
    monkeypatch.setattr(tails, 'binomial_inverse', lambda *_: 0.5)
    for m, eta in ((4, Fraction(1, 10)), (7, Fraction(1, 3000))):
        for errors in range(m):
            p = exact_binomial_inverse(errors, m, eta, parts=1000)

            def tail(p, m=m, errors=errors):
                terms = [math.comb(m, j) * p**j * (1 - p) ** (m - j) for j in range(errors + 1)]
                return sum(terms)

            assert tail(p) < eta <= tail(p - Fraction(1, 1000))


def test_a_binomial_inverse_is_below_chernoff_and_has_the_tail_that_it_says():
    for errors, m, nats in ((1600, 60000, 1300.0), (0, 10, 3.0), (9, 10, 0.5)):
        p = binomial_inverse(errors, m, -nats)
        assert errors / m <= p <= kl_inverse(errors / m, nats / m) + 1e-12
        k = torch.arange(errors + 1).double()
        choose = math.lgamma(m + 1) - torch.lgamma(k + 1) - torch.lgamma(m - k + 1)
        tail = torch.logsumexp(choose + k * math.log(p) + (m - k) * math.log1p(-p), 0)
        assert tail.item() == pytest.approx(-nats, abs=1e-6)


def test_the_shipped_message_with_other_lengths():
    """1114 errors of 60000 with 295 bytes and 0, 8, 16, 32 bytes more."""
    for added, bound in ((0, 689), (8, 699), (16, 708), (32, 727)):
        eta = Fraction(1, 1000 * 256 ** (295 + added))
        assert math.ceil(10**4 * exact_binomial_inverse(1114, 60000, eta)) == bound


# --------------------------------------------------------------------------------------------------
# The code of the kernels
# --------------------------------------------------------------------------------------------------


def test_cells():
    """Masses sum to 1 at every scale, and a single Gaussian costs what the reference says."""
    masses = pac_bayes._cells(torch.arange(-2000, 2001).double(), PRIOR.scales).sum(1)
    assert masses[PRIOR.scales <= 128].tolist() == pytest.approx([1] * 11, abs=1e-12)
    weight = torch.tensor([1, -2, 0.5, 0.25]).double()
    for scale, nats in ((1, 6.143266197286669), (4, 11.189867961943346), (16, 16.793443967327647)):
        steps = (weight / weight.square().mean().sqrt() * scale).round()
        cells = pac_bayes._cells(steps.abs(), PRIOR.scales)[PRIOR.scales == scale]
        assert -cells.log().sum().item() == pytest.approx(nats, abs=1e-12)


def test_code_length():
    """P sums to at most 1, a Gaussian costs little more than its entropy, zeros hardly anything."""
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
    """A permutation of channels saves the number of different networks that it makes."""
    for filters, different in (
        ([[1, 2], [3, 4], [5, 6]], 6),
        ([[1, 2], [3, 4], [1, 2]], 3),
        ([[1, 2]] * 3, 1),
    ):
        steps = torch.tensor(filters).double()[:, :, None, None]
        saved = code_length(steps) - pac_bayes._nats([steps / 4, steps], [2], PRIOR)
        assert saved == pytest.approx(math.log(different))


def test_noisy_errors():
    """Two classes have a closed form; without noise it is the error; else by 4,000 draws."""
    random = torch.Generator().manual_seed(0)
    label = torch.full((200, 1), math.inf, dtype=torch.float64)
    margins = torch.cat([label, torch.randn(200, 9, dtype=torch.float64, generator=random) + 1], 1)
    v = torch.rand(200, dtype=torch.float64, generator=random) + 0.1
    two, gamma = margins[:, :2], 1.25
    exact = torch.special.ndtr(gamma - two[:, 1] / (math.sqrt(2) * v)) + 1e-6
    assert torch.allclose(noisy_errors(two, v, gamma), exact.clamp_max(1), rtol=0, atol=1e-14)
    assert torch.allclose(noisy_errors(margins, 1e9 * v, 0), torch.tensor(0.9).double(), atol=2e-6)
    wrong = (margins.amin(1) <= 0).double()
    assert torch.equal(noisy_errors(margins, 0 * v, gamma), wrong)
    assert noisy_errors(torch.stack([label[:, 0], 0 * v], 1), 0 * v, 0).all()  # ties
    assert torch.allclose(noisy_errors(margins, 1e-9 * v, gamma), wrong, atol=2e-6)
    draws = torch.randn(4000, 200, 10, dtype=torch.float64, generator=random) * v[:, None]
    lost = (margins + draws[..., :1] - draws)[..., 1:] <= gamma * math.sqrt(2) * v[:, None]
    p = noisy_errors(margins, v, gamma)
    apart = (lost.any(-1).double().mean(0) - p).abs()
    assert (apart <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize('classes', [2, 10, 100, 1000])
def test_quadrature_errs_on_the_safe_side(classes):
    """Against the trapezoidal rule, at margins of every size."""
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


def test_classifier_kl():
    """Against torch's KL of multivariate normals and a ridge regression by an inverse."""
    grids = {'ridges': [0.01, 0.3], 'sizes': [0, 1, 3], 'betas': [0, 2, 50]}
    design = PRIOR._replace(**{name: torch.tensor(grid).double() for name, grid in grids.items()})
    torch.manual_seed(0)
    images, labels = torch.rand(60, 1, 1, 5), torch.arange(60) % 3
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 3, bias=False))
    table, phi, weight = measured(net, images, labels, rank=2, design=design)
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
        for ridge in grids['ridges']:
            mean = targets.T @ phi / 50 @ torch.linalg.inv(moment + ridge * torch.eye(5))
            for size in grids['sizes']:
                for prior_beta in grids['betas']:
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
    """Rounded features are within the slack; where the trained one errs, the loss is often 1."""
    images, labels = sample[0][:400], sample[1][:400]
    net = fitted(hidden(), images, labels)
    layers = trace_layers(net, (1, 6, 6))[:-1]
    kernels = [layer.kernel / pac_bayes._operator_norm(layer.kernel, layer) for layer in layers]
    rounded = [pac_bayes._round(kernel, bits) for kernel in kernels]
    errors = map(torch.sub, kernels, rounded)
    slack = pac_bayes._slack(map(pac_bayes._operator_norm, errors, layers))
    inputs = torch.cat([images.double(), torch.randn(400, 1, 6, 6, dtype=torch.float64)])
    true = pac_bayes.features(layers, kernels, inputs).flatten(1)
    near = pac_bayes.features(layers, rounded, inputs).flatten(1)
    lengths = inputs.flatten(1).norm(dim=1)
    assert 0 < ((true - near).norm(dim=1) / lengths).max() <= slack

    weight = net[-1].weight.detach().double()
    weight = weight - weight.mean(0)
    spread = torch.cdist(weight, weight).max()
    moment = near.T @ near / len(near)
    noise = torch.linalg.cholesky(torch.linalg.inv(torch.eye(len(moment)) + moment))
    # Every class but the predicted one is an error; the nearest one is the hardest.
    wrong = (true @ weight.T).topk(2).indices[:, 1]
    v, gamma, theta = (near @ noise).norm(dim=1), 1.0, slack * spread * lengths
    draws = weight + torch.randn(2000, 4, len(noise), dtype=torch.float64) @ noise.T
    scores = torch.einsum('nd,tcd->tnc', near, draws)
    label = F.one_hot(wrong, 4).bool()
    margins = scores[:, label][..., None] - scores.masked_fill(label, -math.inf)
    often = (margins.amin(2) <= gamma * math.sqrt(2) * v + theta).double().mean(0)
    least = torch.special.ndtr(torch.tensor(gamma)).item()
    assert often.min() >= least - 5 * math.sqrt(least * (1 - least) / 2000)


def test_linear_network_by_sampling(sample):
    """Without hidden layers A is B, and the loss is that of classifiers drawn at random."""
    images, labels = sample
    net = fitted([], *sample)
    found = certificates(net, *sample, delta=0.01)
    assert found[A].bound == pytest.approx(found[B].bound, rel=0.02)
    assert error(net, *templates(20000, 1)) < found[C].bound < found[B].bound < 0.1
    gibbs = found[C]
    assert (gibbs.slack, gibbs.gamma, gibbs.sent) == (0, 0, 0)

    order = order_of(6000)
    z = images[order].flatten(1).double()
    phi = z / z[:600].square().sum(1).mean().sqrt()
    moment = phi[:600].T @ phi[:600] / 600
    noise = torch.linalg.cholesky(torch.linalg.inv(torch.eye(36) + gibbs.beta * moment))
    weight = net[-1].weight.detach().double()
    weight = weight - weight.mean(0)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(400, 4, 36, dtype=torch.float64, generator=generator)
    draws = gibbs.c * weight / weight.norm() + normal @ noise.T
    lost = torch.einsum('nd,tcd->tnc', phi[600:], draws).argmax(2) != labels[order[600:]]
    deviation = lost.double().mean(1).std().item() / 20
    assert gibbs.loss == pytest.approx(lost.double().mean().item(), abs=5 * deviation)


def test_every_network_pays_for_grids_designs_and_its_live_channels(monkeypatch):
    """How many channels live is chosen by looking at the data: log K a layer, dead or not."""
    images, labels = templates(60, 0)
    hidden = nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Conv2d(3, 5, 2, bias=False), nn.ReLU()
    net = nn.Sequential(*hidden, nn.Flatten(), nn.Linear(5 * 9, 4, bias=False))
    nn.init.zeros_(net[0].weight[:1])
    for name in ('code_length', '_nats'):  # what the kernels themselves cost
        monkeypatch.setattr(pac_bayes, name, lambda *_: 0.0)
    monkeypatch.setattr(pac_bayes, 'kl_inverse', lambda q, a: 0.4)
    found = certificates(net, images, labels, delta=0.01)
    losses = math.log(2 * math.sqrt(54) * 1000 * 11 * 17 * 801 / 0.01)
    for column in (A, B, C):
        assert 54 * found[column].hidden == pytest.approx(losses + math.log(3) + math.log(5))


def test_images_of_any_size(sample):
    """Scaled by a power of 2 they give the same margins and noise, bit for bit, finite lengths."""
    images, labels = sample[0][:200], sample[1][:200]
    net = fitted(convolutions(), images, labels)
    table, _, _ = measured(net, images, labels)
    large, _, _ = measured(net, images * 2.0**66, labels)
    assert torch.equal(large.margins, table.margins) and torch.equal(large.v, table.v)
    assert torch.equal(large.x, table.x * 2.0**66)
    # The squares of the features underflow in float32, and all is a tie.
    assert measured(net, images * 2.0**-125, labels)[0].scale == 0
    assert bounds_of(net, images * 2.0**-125, labels) == [1, 1, 1]


@pytest.mark.parametrize(
    'knob, value, reason',
    [
        ('--label-noise', 0.1, 'with label_noise the training samples'),
        ('--normalize', True, 'normalize = True takes the statistics'),
    ],
)
def test_samples_that_are_not_iid_are_not_certified(tmp_path, knob, value, reason):
    flags = '--epochs', 1, '--certify-every', 1, '--train-samples', 50, knob, value
    assert f'certificates stay empty: {reason}' in train_small(tmp_path / 'run', *flags)
    table = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')
    assert len(table['epoch']) == 2 and all(np.isnan(table[column]).all() for column in (A, B, C))


def test_float64_differs_in_the_last_digits_of_float32(toy, sample):
    net, found = toy
    for column, exact in certify(net, *sample, dtype=torch.float64).items():
        assert found[column].bound != exact == pytest.approx(found[column].bound, rel=1e-4)


def test_certificates_bound_and_say_something(toy, sample):
    net, found = toy
    assert error(net, *templates(20000, 1)) < found[C].bound < found[B].bound < found[A].bound < 0.7


def test_formulas_of_the_statement(toy, sample):
    """The bounds from their parts, and the parts of A from the network: R / Phi(gamma), theta."""
    net, found = toy
    for column, part in found.items():
        factor = 1 if column == C else 2 / math.erfc(-part.gamma / math.sqrt(2))
        bound = factor * kl_inverse(part.loss, part.hidden + part.classifier)
        assert part.bound == pytest.approx(bound)
    layers, kernels = kernels_of(net, sample[0])
    *hidden, classifier = kernels
    classifier = (classifier - classifier.mean(0)).flatten(1)
    classifier /= classifier.norm()
    hidden = [
        kernel / pac_bayes._operator_norm(kernel, layer) for kernel, layer in zip(hidden, layers)
    ]
    rounded = [(kernel * 2**bit).round() / 2**bit for kernel, bit in zip(hidden, found[A].bits)]
    assert found[A].sent == sum(int(kernel.count_nonzero()) for kernel in rounded)
    errors = [
        pac_bayes._operator_norm(k - r, layer) for k, r, layer in zip(hidden, rounded, layers)
    ]
    order = order_of(6000)
    images = sample[0][order].double()
    true, near = (pac_bayes.features(layers, part, images).flatten(1) for part in (hidden, rounded))
    scale = 1 / near[:600].square().sum(1).mean().sqrt().item()
    lengths = images[600:].flatten(1).norm(dim=1)
    spread = max((one - other).norm() for one in classifier for other in classifier)
    # theta, the next 2^(i / 8), is at least c times what an output difference can be off by.
    gap = spread.item() * scale * ((1 + errors[0]) * (1 + errors[1]) - 1)
    theta = 2 ** (math.ceil(8 * math.log2(found[A].c * gap)) / 8)
    assert found[A].slack == pytest.approx(theta * lengths.mean().item(), rel=1e-6)
    apart = (scale * (true - near)[600:] @ classifier.T)[:, None]
    assert 0 < ((apart - apart.mT).abs().amax((1, 2)) / lengths).max() <= gap
    # The nats of the kernels, modulo permutations, beside what every network pays.
    fixed = math.log(2 * math.sqrt(5400) * 1000 * 11 * 17 * 801 / 0.001) + 2 * math.log(4)
    nats = pac_bayes._nats([*rounded, classifier], found[A].bits, PRIOR)
    assert 5400 * found[A].hidden == pytest.approx(fixed + nats)


@pytest.mark.long
def test_more_data_and_less_confidence(toy, sample):
    net, found = toy
    assert certify(net, *sample, delta=0.1)[A] < found[A].bound
    assert certify(net, *(part[:3000] for part in sample))[A] > found[A].bound


@pytest.mark.long
def test_invariance(toy, sample):
    """Scales of layers, a vector common to the classes and the order of channels change nothing."""
    _, found = toy
    other, order = fitted(convolutions(), *sample), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        other[0].weight.copy_(3 * other[0].weight[order])
        other[2].weight.copy_(other[2].weight[:, order] / 4)
        other[-1].weight.copy_(0.1 * other[-1].weight + torch.randn(16))
    bounds = [part.bound for part in found.values()]
    assert bounds_of(other, *sample) == pytest.approx(bounds, abs=1e-4)


def test_a_pruned_network_at_the_papers_width_is_the_same_function():
    """At most 12 weights of each stay, dead channels go and come back as zeros, zeros stay zero."""
    torch.manual_seed(0)
    shapes = (6, 1, 2, 2), (6, 6, 2, 2), (6, 6, 2, 2), (3, 6, 3, 3)
    full = [torch.randn(shape) for shape in shapes]
    masked = list(full)
    for l in (1, 2):
        least = full[l].abs().flatten().topk(12).values[-1]
        masked[l] = torch.where(full[l].abs() >= least, full[l], 0)
    kernels = paper_width.pruned(full, 12)
    assert all(kernel.count_nonzero() <= 12 for kernel in kernels[1:3]) and len(kernels[1]) < 6
    x, narrow = torch.rand(5, 1, 6, 6), paper_width.chain(kernels, masks=True)
    for same in (masked, paper_width.widened(kernels, 6)):
        assert torch.allclose(narrow(x), paper_width.chain(same, masks=False)(x), atol=1e-5)
    optimizer = torch.optim.SGD(narrow.parameters(), lr=0.01, momentum=0.9, weight_decay=3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        narrow(x).square().mean().backward()
        optimizer.step()
    trained = paper_width.kernels_of(narrow, (1, 6, 6))
    for new, old in zip(trained[:-1], kernels[:-1], strict=True):
        assert (new != 0).equal(old != 0)


def test_live_channels_alone_compute_the_function():
    torch.manual_seed(0)
    net = nn.Sequential(
        *convolutions(8),
        nn.Flatten(),
        nn.Linear(8 * 4, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, 3, bias=False),
    )
    x = torch.rand(7, 1, 6, 6)
    layers, kernels = kernels_of(net, x)
    kernels[0][[1, 4]] = 0
    kernels[1][:, 2] = 0  # so channel 2 of the first layer feeds nothing
    kernels[1][3] = 0
    kernels[1][5, [0, 3, 5, 6, 7]] = 0  # reads dead channels alone
    kernels[2][:, 6] = 0
    live = pac_bayes.live_channels(kernels)
    assert [tuple(kernel.shape[:2]) for kernel in live] == [(5, 1), (5, 5), (5, 5), (3, 5)]
    scores = []
    for *hidden, classifier in (kernels, live):
        features = pac_bayes.features(layers, hidden, x.double()).flatten(1)
        scores.append(features @ classifier.flatten(1).T)
    assert torch.allclose(*scores)


def test_kernels_without_fine_digits_are_certified(sample):
    """Equal entries: steps that round them exactly look free, coarser ones make them zero."""
    layer = nn.Conv2d(1, 1, 2, bias=False)
    nn.init.ones_(layer.weight)
    found = certify(fitted([layer, nn.ReLU()], *sample), *sample)
    assert 0 < found[C] < found[A] < 1


@pytest.mark.long
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
    """IEEE float32 inside, and the precision of before outside, also after an interruption."""
    switches, seen, features = [torch.backends.cuda.matmul, torch.backends.cudnn.conv], [], []

    def precisions():
        return [switch.fp32_precision for switch in switches]

    def set_precisions(values):
        for switch, value in zip(switches, values, strict=True):
            switch.fp32_precision = value

    def interrupted(*arguments):
        seen.append(precisions())
        if len(seen) == 10:
            raise KeyboardInterrupt
        return features[0](*arguments)

    features.append(pac_bayes.features)
    monkeypatch.setattr(pac_bayes, 'features', interrupted)
    before = precisions()
    try:
        set_precisions(['tf32', 'tf32'])
        with pytest.raises(KeyboardInterrupt):
            certify(toy[0], *sample)
        assert seen == [['ieee', 'ieee']] * 10 and precisions() == ['tf32', 'tf32']
    finally:
        set_precisions(before)


def test_labels_of_any_integer_type(sample):
    images, labels = sample[0][:300], sample[1][:300]
    net = fitted([], images, labels)
    assert bounds_of(net, images, labels.to(torch.uint8)) == bounds_of(net, images, labels)


def with_nan(images):
    images = images.clone()
    images[3, 0, 2, 2] = math.nan
    return images


BAD = {
    'delta = 0': lambda net, x, y: (net, x, y, 0),
    'delta = 1.0': lambda net, x, y: (net, x, y, 1.0),
    'a label for each': lambda net, x, y: (net, x, y[1:]),
    'must be at least 10': lambda net, x, y: (net, x[:9], y[:9]),
    'labels: must be integers from 0 to 3': lambda net, x, y: (net, x, y + 1),
    'labels: must be integers': lambda net, x, y: (net, x, y.float()),
    'NaN': lambda net, x, y: (net, with_nan(x), y),
    'scale them down': lambda net, x, y: (net, x * 1e26, y),
    '1001 classes': lambda net, x, y: (classifier(1001, bias=False), x, y),
    'input_shape': lambda net, x, y: (net, x[0], y),
    'bias': lambda net, x, y: (classifier(4), x, y),
}


def classifier(classes, **options):
    return nn.Sequential(nn.Flatten(), nn.Linear(36, classes, **options))


@pytest.mark.parametrize('words', BAD)
def test_bad_input(sample, words):
    net = fitted(convolutions(), *(part[:100] for part in sample))
    with pytest.raises(BadInput, match=words):
        certify(*BAD[words](net, *sample))


@pytest.mark.long
def test_mnist(mnist):
    """CONV-1-8 after two epochs of the default recipe: bounds above the test error, as measured."""
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
