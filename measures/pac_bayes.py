"""PAC-Bayes certificates of a trained network, in the symbols of docs/certificate.md.

That page has their statement and proof.
"""

import bisect
import itertools
import math
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from conf import BadInput
from measures.norms import dft_norm
from measures.tails import kl_inverse
from measures.trace import features, ieee_float32, trace_layers

COLUMNS = 'pac_bayes_error', 'pac_bayes_rounded_error', 'pac_bayes_gibbs_error'  # A, B, C

SEARCH = 500, 128, 1000  # prior images, rank and other images of the data that a search looks at
SCORED = 4000  # images on which a search over c, beta and gamma compares bounds
MAX_PIXEL = 1e25  # features, no longer than an image, then stay far from float32's largest number
MAX_CLASSES = 1000  # up to here the quadrature of `noisy_errors` is known to be accurate enough
MAX_FLOATS = 2**28  # of the prior images' features, all held at once: 1 GiB
MAX_BITS = 22  # integers of 22 bits are exact in float32
CHOICES = 1000  # designs among which this one was chosen by looking at MNIST; delta pays for them

# The grids of gamma, beta and theta, whose product the union bound pays for.
GAMMAS = 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3
BETAS = 2.0 ** torch.arange(4, 21, dtype=torch.float64)
THETAS = (0.0, *(2.0 ** (i / 8) for i in range(-400, 400)))
LOSSES = len(GAMMAS) * len(BETAS) * len(THETAS)
START = 52, 9, 4  # of a search: 8 log2 c, and the indices of beta and gamma


class Prior(NamedTuple):
    """The design of the prior: the images that it is made of, and what it is a mixture over."""

    images: int = 2000  # n0, images set aside, at most a tenth of the sample
    rank: int = 512  # R, directions of the features along which the classifier's noise is smaller
    # Of each hidden layer: scales of two Gaussians in steps, and the share of the first.
    scales: torch.Tensor = 2.0 ** torch.arange(-3, 21, dtype=torch.float64)
    shares: torch.Tensor = 2.0 ** -torch.arange(13, dtype=torch.float64)
    # Of the classifier: ridge and size of the mean, and the beta of its covariance.
    ridges: torch.Tensor = 2.0 ** torch.arange(-20, -3, dtype=torch.float64)
    sizes: torch.Tensor = torch.cat([torch.zeros(1), 2.0 ** (torch.arange(80) / 8)]).double()
    betas: torch.Tensor = torch.cat([torch.zeros(1), 2.0 ** torch.arange(21)]).double()


PRIOR = Prior()


class Certificate(NamedTuple):
    """A bound of an error, and what it is made of (`What A is made of` in docs/certificate.md)."""

    bound: float
    loss: float = math.nan  # mean over the images of the noisy errors p
    hidden: float = math.nan  # nats per image: hidden kernels, grids and delta
    classifier: float = math.nan  # nats per image
    c: float = math.nan
    beta: float = math.nan
    gamma: float = math.nan
    slack: float = math.nan  # mean over the images of theta |x|
    bits: tuple = ()  # the hidden kernels of layer l are multiples of 2^-bits[l]
    sent: int = 0  # hidden weights that are not 0


def _cells(values, scales):
    """P(k) of each of the values (U,) for a rounded Gaussian of each scale, (scales, U) float64."""
    widths = scales.to(values.device)[:, None] * math.sqrt(2)
    # erfc of both edges; a normal distribution function would lose the tail.
    lower = torch.special.erfc((values - 0.5) / widths)
    upper = torch.special.erfc((values + 0.5) / widths)
    return (lower - upper) / 2


def code_length(steps, prior=PRIOR):
    """-ln P(k) of a layer's integer tensor k, in nats.

    Its entries are i.i.d., each a mixture of two Gaussians rounded to integers. P is the mean
    over all their scales and shares, of which the largest term is taken.
    """
    values, counts = steps.abs().double().flatten().unique(return_counts=True)
    cells, counts = _cells(values, prior.scales), counts.double()
    likelihoods = []
    for share in prior.shares.tolist():
        mixtures = share * cells[:, None] + (1 - share) * cells
        likelihoods.append((mixtures.log() @ counts).max().item())
    return math.log(len(prior.scales) ** 2 * len(prior.shares)) - max(likelihoods)


def noisy_errors(margins, v, gamma):
    """P(some r != y has m_r + v (z_y - z_r) <= gamma sqrt(2) v), z i.i.d. N(0, 1), a sample each.

    By Gauss-Hermite quadrature over z_y; up to 2e-6 more than the exact value, never less.

    Args:
        margins: (N, C) float64, m_r = output of the label minus output of class r, infinite at
            the label itself.
        v: (N,) float64, standard deviation of each output.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(32 if margins.shape[1] <= 10 else 128)
    nodes = torch.from_numpy(nodes).to(margins.device)
    weights = torch.from_numpy(weights / math.sqrt(2 * math.pi)).to(margins.device)
    kept = 0.0
    for node, weight in zip(nodes, weights):
        shifted = margins / v.clamp_min(1e-300)[:, None] + (node - gamma * math.sqrt(2))
        kept = kept + weight * torch.special.ndtr(shifted).prod(1)
    without_noise = (~(margins.amin(1) > 0)).double()
    return torch.where(v > 0, (1 - kept + 1e-6).clamp(0, 1), without_noise)


def _climb(score, point, strides):
    """The least score, and its point, at which a coordinate search over integers ends.

    Args:
        point: tuple of integers where it starts; strides: the steps it takes, one after another.
    """
    score = lru_cache(None)(score)
    for stride in strides:
        while True:
            best = point
            for i, step in itertools.product(range(len(point)), (stride, -stride)):
                near = (*point[:i], point[i] + step, *point[i + 1 :])
                if score(near) < score(best):
                    best = near
            if best == point:
                break
            point = best
    return score(point), point


def live_channels(kernels):
    """Kernels (out, in, h, w) of the same function without channels that are zero or unread.

    Each hidden layer keeps a channel, so the zero function has kernels too, one of them all zero.
    """
    kernels = list(kernels)
    for l in range(1, len(kernels)):
        _keep_channels(kernels, l, kernels[l - 1].flatten(1).any(1))
    for l in reversed(range(1, len(kernels))):
        _keep_channels(kernels, l, kernels[l].transpose(0, 1).flatten(1).any(1))
    return kernels


def _keep_channels(kernels, l, keep):
    """Keeps these channels between the layers l - 1 and l; the first one where there is none."""
    keep[0] |= ~keep.any()
    kernels[l - 1] = kernels[l - 1][keep]
    kernels[l] = kernels[l][:, keep]


def _operator_norm(kernel, layer):
    """An upper bound of the operator norm of a layer with that kernel."""
    if layer.is_linear:
        return torch.linalg.matrix_norm(kernel.flatten(1), 2).item()
    padding, dilation = layer.geometry['padding'], layer.geometry['dilation']
    return dft_norm(kernel, layer.in_size, padding, dilation)


def _measure(layers, kernels, data):
    """What the bounds need of hidden kernels h and a classifier W on a sample.

    Args:
        layers: as `trace_layers` returns them, those of the hidden kernels first.
        kernels: list of (out, in, h, w) float64, the last one the classifier.
        data: namespace of images and labels; prior and sample, the indices of the images that
            the prior is made of and of those that are measured; rank, the largest number of
            directions; m1, the number of images outside the prior; design, a Prior.
    Returns:
        Namespace of m1 and
            margins     (N, C) (W_y - W_r) . phi_h(x), infinite at r = y
            v           (N, betas) sqrt(phi' Sigma phi)
            x           (N,) |x|
            scale       1 / sqrt(E_h) of the features; 0 where E_h is below 1e-60: all is a tie
            kl(c, beta) KL of the classifier in nats, from the size c of its mean and beta's index
    """
    *hidden, classifier = (kernel.to(data.dtype) for kernel in kernels)
    images, labels, prior, sample = data.images, data.labels, data.prior, data.sample
    # Images at a time: 8 MiB of features, enough for fast matrix products.
    step = max(64, 2**21 // classifier[0].numel())
    phi = classifier.new_empty(len(prior), classifier[0].numel())
    for rows, indices in zip(phi.split(step), prior.split(step)):
        rows.copy_(features(layers, hidden, images[indices].to(data.dtype)).flatten(1))

    # The eigenvectors of the features' second moment come from the Gram matrix of the images, of
    # which there are fewer as a rule. It is summed in float64, so that small eigenvalues survive,
    # and in blocks, since a float64 copy of phi would be too large.
    gram = torch.zeros(len(phi), len(phi), dtype=torch.float64, device=phi.device)
    for block in phi.split(2**12, 1):
        block = block.double()
        gram.addmm_(block, block.T)
    energy = (gram.trace() / len(phi)).item()
    scale = 0.0  # below 1e-60, 1 / |phi| would come near the end of float32
    if energy > 1e-60:
        scale = 1 / math.sqrt(energy)
    phi *= scale  # the prior images now have E_h = 1, so that the grids fit any network
    lam, vectors = torch.linalg.eigh(gram * (scale**2 / len(phi)))
    lam, vectors = lam.flip(0), vectors.flip(1)
    # Smaller eigenvalues are rounding errors of the float32 features.
    vectors = vectors[:, lam > 1e-7 * lam[0]]
    lam = lam[: vectors.shape[1]]
    top = lam[: data.rank]
    directions = phi.T @ (vectors[:, : data.rank] / (len(phi) * top).sqrt()).to(data.dtype)
    weights = classifier.flatten(1).T
    means = vectors.T @ (phi @ weights).double() / (len(phi) * lam).sqrt()[:, None]
    del phi  # 1 GiB, before the sample's own

    # v^2 = phi' (I + beta Phi)^-1 phi: the noise shrinks along Phi's directions and acts in full
    # on the rest of phi. One pass over the features gives coordinates and outputs.
    shrink = 1 / (1 + BETAS.to(lam.device) * top[:, None])
    coordinates_and_outputs = torch.cat([directions, weights], 1)
    # Filled in place: small tensors that stay, allocated between large ones that are freed, would
    # fragment the heap.
    margins = lam.new_empty(len(sample), len(classifier))
    v, x = lam.new_empty(len(sample), len(BETAS)), lam.new_empty(len(sample))
    for start in range(0, len(sample), step):
        rows = slice(start, start + step)
        batch, own = images[sample[rows]].to(data.dtype), labels[sample[rows], None]
        z = features(layers, hidden, batch).flatten(1) * scale
        both = (z @ coordinates_and_outputs).double()
        squares, outputs = both[:, : len(top)].square(), both[:, len(top) :]
        length = torch.linalg.vector_norm(z, dim=1).double()
        rest = (length.square() - squares.sum(1)).clamp_min(0)
        margins[rows] = (outputs.gather(1, own) - outputs).scatter(1, own, math.inf)
        v[rows] = (rest[:, None] + squares @ shrink).sqrt()
        x[rows] = torch.linalg.vector_norm(batch.flatten(1), dim=1, dtype=torch.float64)
    square = classifier.double().square().sum().item()
    kl = _classifier_kl(lam, len(top), vectors, means, square, labels[prior], data.design)
    return SimpleNamespace(m1=data.m1, scale=scale, margins=margins, v=v, x=x, kl=kl)


def _classifier_kl(lam, rank, vectors, means, square, labels, design):
    """KL in nats of N(c W, (I + beta Phi)^-1) to the classifier's prior, as kl(c, beta's index).

    Args:
        lam, vectors: eigenvalues (K,) and eigenvectors (n0, K) of the prior images' kernel matrix.
        rank: Phi consists of the first `rank` of them.
        means: (K, C) coordinates of W along the same directions of the features.
        square: |W|^2.
        labels: (n0,) of these images.
    """
    classes = means.shape[1]
    betas, prior_betas, ridges, sizes = (
        grid.to(lam.device) for grid in (BETAS, design.betas, design.ridges, design.sizes)
    )
    targets = F.one_hot(labels, classes).double() - 1 / classes
    # Coordinates of the ridge solution, times (lam + ridge).
    target = (lam / len(labels)).sqrt()[:, None] * (vectors.T @ targets)
    # Diagonal of the prior's inverse covariance along these directions, (K, prior betas).
    inverse = torch.ones(len(lam), len(prior_betas), dtype=torch.float64, device=lam.device)
    inverse[:rank] += lam[:rank, None] * prior_betas
    # Products with the ridge solution scaled to norm 1, for each ridge and prior beta.
    ridge = 1 / (lam + ridges[:, None])
    scale = (ridge.square() @ target.square().sum(1)).sqrt().clamp_min(1e-100)[:, None]
    cross = ridge @ ((means * target).sum(1)[:, None] * inverse) / scale
    prior_square = ridge.square() @ (target.square().sum(1)[:, None] * inverse) / scale.square()
    energies = means.square().sum(1)
    square = energies @ inverse + max(0.0, square - energies.sum().item())
    # What the KL has beside the distance of the means, (betas, prior betas).
    ratio = inverse[:rank] / (1 + betas[:, None, None] * lam[:rank, None])
    spread = (classes - 1) / 2 * (ratio - 1 - ratio.log()).sum(1)
    choices = math.log(len(prior_betas) * len(ridges) * len(sizes))

    def kl(c, beta):
        size = c * cross / prior_square.clamp_min(1e-300)
        size = sizes[(sizes - size[..., None]).abs().argmin(-1)]
        distance = c**2 * square - 2 * c * size * cross + size.square() * prior_square
        return choices + (distance / 2 + spread[beta]).min().item()

    return kl


def _certificate(problem, point, count=None):
    """The Certificate of the statement at one point of its grids; infinite outside of them.

    Args:
        problem: namespace of what `_measure` returns and of
            nats   KL without the classifier's, and the price of grids and delta
            gap    theta / c: how far an output difference of the trained network can be from
                   that of h, per |x|
            gibbs  whether it is about the random (Gibbs) classifier, whose gamma is 0
        point: (8 log2 c, index of beta, index of gamma).
        count: it is computed on the first `count` samples; None: on all.
    """
    octaves, beta, gamma = point
    c = 2 ** (octaves / 8)
    index = bisect.bisect_left(THETAS, c * problem.gap)
    gammas = 1 if problem.gibbs else len(GAMMAS)
    on_grid = 0 <= beta < len(BETAS) and 0 <= gamma < gammas and index < len(THETAS)
    if not (on_grid and problem.scale):
        return Certificate(math.inf)
    gamma, theta = GAMMAS[gamma], THETAS[index]
    x, v = problem.x[:count], problem.v[:count, beta]
    margins = c * problem.margins[:count] - theta * x[:, None]
    loss = noisy_errors(margins, v, gamma).mean().item()
    classifier = problem.kl(c, beta)
    bound = kl_inverse(loss, (problem.nats + classifier) / problem.m1)
    if not problem.gibbs:
        bound /= math.erfc(-gamma / math.sqrt(2)) * 0.5  # Phi(gamma)
    nats = problem.nats / problem.m1, classifier / problem.m1
    return Certificate(bound, loss, *nats, c, BETAS[beta].item(), gamma, theta * x.mean().item())


def _score(problem, point, count=None):
    """The bound at a point; otherwise a surrogate above 1 that keeps the search descending."""
    found = _certificate(problem, point, count)
    if found.bound < 1 or found.bound == math.inf:
        return found.bound
    return 1 + found.loss + found.hidden + found.classifier


def _best(problem, point):
    """The point over c, beta and gamma that a search on the first images finds."""
    return _climb(lambda point: _score(problem, point, SCORED), point, (1,))[1]


def _bits(kernel):
    """The step 2**-bits nearest to half the root mean square of the kernel's nonzero entries."""
    return 1 - round(math.log2(kernel[kernel != 0].square().mean().sqrt().item()))


def _round(kernel, bits):
    return (kernel * 2.0**bits).round() / 2.0**bits


def _nats(kernels, bits, design):
    """-ln P(h) in nats of rounded hidden kernels, modulo permutations of their filters."""
    total = 0.0
    for kernel, bit in zip(kernels[:-1], bits):
        equal = kernel.flatten(1).unique(dim=0, return_counts=True)[1].double()
        permutations = math.lgamma(len(kernel) + 1)
        total += (
            code_length(kernel * 2.0**bit, design)
            - permutations
            + torch.lgamma(equal + 1).sum().item()
        )
    return total


def _slack(errors):
    """Largest |features - rounded features| / |x| where layers of norm 1 have these errors."""
    return math.expm1(sum(math.log1p(error) for error in errors))


def certify(net, images, labels, delta=0.001, dtype=torch.float32):
    """Upper bounds of the true error of a trained network, from its training data alone.

    Each holds with probability at least 1 - delta over the sample, jointly and for all networks
    of that architecture at once, however trained, if the architecture was chosen without the
    sample (docs/certificate.md). The images that the prior is made of are a fixed random subset.

    Args:
        net: a network as `trace_layers` takes it.
        images, labels: all the data that the network was trained on, (m, C, H, W) as the network
            sees them and integers (m,). An i.i.d. sample: no augmentation, no label noise of an
            exact count, no statistics of the data in the images.
        dtype: of the features and outputs that are measured. Their rounding errors are not
            covered by the theorem; torch.float64 makes them negligible, in more time.
    Returns:
        pac_bayes_error          of the trained network itself
        pac_bayes_rounded_error  of the network with its hidden layers rounded coarsely
        pac_bayes_gibbs_error    of the rounded one, with a random classifier for each image
    Raises:
        BadInput: the network is not covered, has more than MAX_CLASSES outputs, or the arguments
            make no sense.
    """
    found = certificates(net, images, labels, delta, dtype=dtype)
    return {column: certificate.bound for column, certificate in found.items()}


@torch.no_grad()
def certificates(net, images, labels, delta=0.001, prior=PRIOR, dtype=torch.float32):
    """As `certify`, which see, with what each bound is made of: {column: Certificate}."""
    layers = trace_layers(net, tuple(images.shape[1:]))
    kernels = [layer.kernel for layer in layers]
    m = len(images)
    labels = _checked(images, labels, delta, len(kernels[-1]))
    n0 = max(1, min(prior.images, m // 10, MAX_FLOATS // kernels[-1][0].numel()))
    order = torch.from_numpy(np.random.default_rng(0).permutation(m)).to(images.device)
    data = SimpleNamespace(images=images, labels=labels, design=prior, m1=m - n0, dtype=dtype)
    data.prior, data.sample, data.rank = order[:n0], order[n0:], prior.rank
    # Nats that every network pays: the constant of the theorem, the grids, and the number of live
    # channels of each layer.
    data.fixed = math.log(2 * math.sqrt(data.m1) * CHOICES * LOSSES / delta)
    data.fixed += sum(math.log(len(kernel)) for kernel in kernels[:-1])
    few_images, few_directions, few_samples = SEARCH
    search = SimpleNamespace(**vars(data))
    search.prior, search.sample = data.prior[:few_images], data.sample[:few_samples]
    search.rank = few_directions

    nothing = dict.fromkeys(COLUMNS, Certificate(1.0))
    kernels = live_channels([*kernels[:-1], kernels[-1] - kernels[-1].mean(0)])
    if not all(kernel.any() for kernel in kernels):
        return nothing
    hidden = [kernel / _operator_norm(kernel, layer) for kernel, layer in zip(kernels[:-1], layers)]
    classifier = kernels[-1] / kernels[-1].norm()
    with ieee_float32():
        found = _trained(layers, hidden, classifier, data, search)
        found |= _rounded(layers, hidden, classifier, data, search)
    return nothing | {column: part for column, part in found.items() if part.bound < 1}


def _checked(images, labels, delta, classes):
    """The labels as int64. Raises BadInput where the arguments make no sense."""
    m = len(images)
    if m < 10 or labels.shape != (m,):
        shape = tuple(labels.shape)
        raise BadInput(f'{m} images, labels {shape}: must be at least 10, and a label for each')
    whole = labels.long()
    if labels.is_floating_point() or whole.min() < 0 or whole.max() >= classes:
        raise BadInput(f'labels: must be integers from 0 to {classes - 1}, one for each output')
    if not 0 < delta < 1:
        raise BadInput(f'delta = {delta!r}: must be between 0 and 1')
    if not images.isfinite().all():
        raise BadInput('the images contain NaN or infinity')
    largest = images.abs().max().item()
    if largest > MAX_PIXEL:
        raise BadInput(f'images: a pixel of {largest:g}, above {MAX_PIXEL:g}; scale them down')
    if classes > MAX_CLASSES:
        raise BadInput(f'{classes} classes: certificates are for at most {MAX_CLASSES}')
    return whole


def _trained(layers, hidden, classifier, data, search):
    """{column: Certificate} of A; {} where a search finds none below 1."""
    # The search measures the trained network, and takes it for the rounded one.
    problem = _measure(layers, [*hidden, classifier], search)
    problem.gibbs = False
    bits = [_bits(kernel) + 8 for kernel in hidden]
    norms = []  # errors of rounding, in steps
    for kernel, bit, layer in zip(hidden, bits, layers):
        norms.append(_operator_norm(kernel - _round(kernel, bit), layer) * 2.0**bit)
    spread = torch.pdist(classifier.flatten(1)).max().item()

    @lru_cache(None)
    def length(l, bit):
        rounded = _round(hidden[l], bit)
        return code_length(rounded * 2.0**bit, data.design) if rounded.any() else math.inf

    def score(point):
        bits = point[3:]
        if not all(0 <= bit <= MAX_BITS for bit in bits):
            return math.inf
        problem.nats = data.fixed + sum(length(l, bit) for l, bit in enumerate(bits))
        slack = _slack(norm / 2.0**bit for norm, bit in zip(norms, bits))
        problem.gap = spread * problem.scale * slack
        return _score(problem, point[:3])

    value, point = _climb(score, (*START, *bits), (2, 1))
    if value >= 1:
        return {}
    bits = point[3:]
    rounded = [_round(kernel, bit) for kernel, bit in zip(hidden, bits)]
    live = live_channels([*rounded, classifier])
    problem = _measure(layers, live, data)
    problem.nats, problem.gibbs = data.fixed + _nats(live, bits, data.design), False
    slack = _slack(_operator_norm(k - r, layer) for k, r, layer in zip(hidden, rounded, layers))
    problem.gap = spread * problem.scale * slack
    found = _certificate(problem, _best(problem, point[:3]))
    return {COLUMNS[0]: found._replace(bits=bits, sent=_nonzero(live[:-1]))}


def _rounded(layers, hidden, classifier, data, search):
    """{column: Certificate} of B and C; {} where a search finds no B below 1."""

    def rounded_at(bits, data):
        """The live kernels with these bits, the measured problem, and the best point for B."""
        rounded = [_round(kernel, bit) for kernel, bit in zip(hidden, bits)]
        live = live_channels([*rounded, classifier])
        problem = _measure(layers, live, data)
        problem.nats = data.fixed + _nats(live, bits, data.design)
        problem.gap, problem.gibbs = 0.0, False
        return live, problem, _best(problem, START)

    def score(bits):
        if not all(0 <= bit <= MAX_BITS for bit in bits):
            return math.inf
        _, problem, point = rounded_at(bits, search)
        return _score(problem, point)

    value, bits = _climb(score, tuple(_bits(kernel) for kernel in hidden), (1,))
    if value >= 1:
        return {}
    live, problem, point = rounded_at(bits, data)
    b = _certificate(problem, point)
    problem.gibbs = True
    c = _certificate(problem, _best(problem, (*point[:2], 0)))
    sent = _nonzero(live[:-1])
    return {
        COLUMNS[1]: b._replace(bits=bits, sent=sent),
        COLUMNS[2]: c._replace(bits=bits, sent=sent),
    }


def _nonzero(kernels):
    return sum(int(kernel.count_nonzero()) for kernel in kernels)
