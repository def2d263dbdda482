"""PAC-Bayes certificates of a trained network; docs/certificate.md has their statement and proof, in these symbols."""

import bisect
import math
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from conf import BadInput
from measures.norms import dft_norm
from measures.trace import features, ieee_float32, trace_layers

PRIOR_IMAGES = (
    2000  # n0, images set aside for the prior and the losses; never more than a tenth of the sample
)
RANK = 512  # R, directions of the features in which the classifier's noise is held back
SEARCH = 500, 128, 1000  # images set aside, rank and other images that a search makes do with
MAX_PIXEL = (
    1e25  # so that the features, which are no longer than an image, stay far from float32's end
)
MAX_CLASSES = (
    1000  # up to which the quadrature of `noisy_errors` is known to be within its allowance
)
MAX_FLOATS = 2**28  # of the features of the images set aside, held at a time: 1 GiB
CHOICES = 1000  # designs of prior and loss among which this one was chosen by looking at MNIST; delta pays for them

GAMMAS = 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3
BETAS = 2.0 ** torch.arange(4, 21, dtype=torch.float64)
THETAS = (0.0, *(2.0 ** (i / 8) for i in range(-400, 400)))
MAX_BITS = 22  # integers of so many bits are exact in float32
COLUMNS = 'pac_bayes_error', 'pac_bayes_rounded_error', 'pac_bayes_gibbs_error'

START = 52, 9, 4  # of a search: 8 log2 c, and the indices of beta and gamma
LOSSES = len(GAMMAS) * len(BETAS) * len(THETAS)

# What the prior is a mixture over: of each hidden layer (scales of two components in units of the step, share of the
# first), and of the classifier (ridge and size of its mean, inverse covariance).
SCALES = 2.0 ** torch.arange(-3, 21, dtype=torch.float64)
SHARES = 2.0 ** -torch.arange(13, dtype=torch.float64)
RIDGES = 2.0 ** torch.arange(-20, -3, dtype=torch.float64)
SIZES = torch.cat([torch.zeros(1), 2.0 ** (torch.arange(80) / 8)]).double()
PRIOR_BETAS = torch.cat([torch.zeros(1), 2.0 ** torch.arange(21)]).double()


def kl_inverse(q, a):
    """sup {p in [q, 1]: kl(q|p) <= a}, kl of two Bernoulli variables with means q and p; the upper end of 60 bisections."""
    if not (0 <= q <= 1 and a >= 0):
        raise BadInput(f'q = {q}, a = {a}: q must be an error between 0 and 1, and a at least 0')
    low, high = q, 1.0
    for _ in range(60):
        p = (low + high) / 2
        kl = (
            math.inf
            if p == 1
            else (q and q * math.log(q / p)) + (1 - q) * math.log((1 - q) / (1 - p))
        )
        low, high = (p, high) if kl <= a else (low, p)
    return high


def test_set_bound(error, n, delta):
    """An upper bound of the true error that holds with probability 1 - delta, from the error on n samples never trained on.

    kl_inverse(error, log(1 / delta) / n), Chernoff's bound inverted (Langford 2005, theorem 3.3).
    """
    if not (n >= 1 and 0 < delta < 1):
        raise BadInput(
            f'n = {n}, delta = {delta}: wants a sample or more, and delta between 0 and 1'
        )
    return kl_inverse(error, math.log(1 / delta) / n)


def _cells(values):
    """P(k) of each of these values (U,) for a rounded Gaussian of each scale, (scales, U) float64."""
    edges = torch.stack([values - 0.5, values + 0.5])[:, None] / (
        SCALES.to(values.device)[:, None] * math.sqrt(2)
    )
    lower, upper = torch.special.erfc(edges)  # and not ndtr, which has no tail
    return (lower - upper) / 2


def code_length(steps):
    """-ln P(k) of a layer's integer tensor k, in nats.

    Its entries are iid, each a mixture of two Gaussians rounded to integers; P is the mean over all their scales and shares,
    of which the largest term is taken.
    """
    values, counts = steps.abs().double().flatten().unique(return_counts=True)
    cells, counts = _cells(values), counts.double()
    mixtures = (share * cells[:, None] + (1 - share) * cells for share in SHARES.tolist())
    log_likelihood = max((mixture.log() @ counts).max().item() for mixture in mixtures)
    return math.log(len(SCALES) ** 2 * len(SHARES)) - log_likelihood


def noisy_errors(margins, v, gamma):
    """P(some r != y has (m_r + v (z_y - z_r)) <= gamma sqrt(2) v) for each sample, z iid N(0, 1), or at most 2e-6 more.

    Args:
        margins: (N, C) float64, m_r = output of the label minus output of class r, infinite at the label itself.
        v: (N,) float64, standard deviation of each output.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(32 if margins.shape[1] <= 10 else 128)
    nodes, weights = (
        torch.from_numpy(part).to(margins.device)
        for part in (nodes, weights / math.sqrt(2 * math.pi))
    )
    kept = 0.0
    for node, weight in zip(nodes, weights):
        shifted = margins / v.clamp_min(1e-300)[:, None] + (node - gamma * math.sqrt(2))
        kept = kept + weight * torch.special.ndtr(shifted).prod(1)
    return torch.where(v > 0, (1 - kept + 1e-6).clamp(0, 1), (~(margins.amin(1) > 0)).double())


def _climb(score, point, strides):
    """The point of integers and its score that a coordinate search ends at, with smaller and smaller strides."""
    score, point = lru_cache(None)(score), tuple(point)
    least = score(point)
    for stride in strides:
        moves = [
            tuple(sign * stride * (i == j) for j in range(len(point)))
            for i in range(len(point))
            for sign in (1, -1)
        ]
        while (
            point
            and score(near := min((tuple(map(sum, zip(point, move))) for move in moves), key=score))
            < least
        ):
            point, least = near, score(near)
    return point, least


def live_channels(kernels):
    """Kernels (out, in, h, w) of the same function, less the channels that are zero or feed nothing.

    Each hidden layer keeps a channel, so that the zero function has kernels too: one of them, at least, is all zeros.
    """
    kernels = list(kernels)
    pairs = range(1, len(kernels))
    for l, filters in [(l, True) for l in pairs] + [(l, False) for l in reversed(pairs)]:
        keep = (kernels[l - 1] if filters else kernels[l].transpose(0, 1)).flatten(1).any(1)
        keep[0] |= ~keep.any()
        kernels[l - 1], kernels[l] = kernels[l - 1][keep], kernels[l][:, keep]
    return kernels


def _operator_norm(kernel, layer):
    """An upper bound of the operator norm of a layer with that kernel."""
    if layer.is_linear:
        return torch.linalg.matrix_norm(kernel.flatten(1), 2).item()
    return dft_norm(
        kernel, layer.in_size, layer.geometry['padding'], layer.geometry['dilation']
    )


def _measure(layers, kernels, data):
    """What the bounds ask of hidden kernels h and a classifier W on a sample, with a prior made of other images.

    Args:
        layers: as `trace_layers` returns them, those of the hidden kernels first.
        kernels: list of (out, in, h, w) float64, the last one the classifier.
        data: namespace of images and labels, of prior and sample, the indices of the images that the prior is made of and of
            those that are measured, of rank, so many directions at most, and of m1, the number of images outside the prior.
    Returns:
        Namespace of m1 and
            margins     (N, C) (W_y - W_r) . phi_h(x), infinite at r = y
            v           (N, betas) sqrt(phi' Sigma phi)
            x           (N,) |x|
            scale       1 / sqrt(E_h), of the features; 0 where E_h is (or below 1e-60), so that all is a tie
            kl(c, beta) the classifier's KL in nats, of its mean's size c and the index of beta
    """
    *hidden, classifier = (kernel.float() for kernel in kernels)
    images, labels, prior, sample = data.images, data.labels, data.prior, data.sample
    step = max(
        64, 2**21 // classifier[0].numel()
    )  # images at once: 8 MiB of features, enough for fast matrix products
    phi = classifier.new_empty(len(prior), classifier[0].numel())
    for rows, indices in zip(phi.split(step), prior.split(step)):
        rows.copy_(features(layers, hidden, images[indices].float()).flatten(1))
    # The eigenvectors of the features' second moment come from the Gram matrix of the images, which are fewer as a rule. It is
    # summed up in float64, in which small eigenvalues survive, and in blocks, since phi as a whole is too large for that.
    gram = torch.zeros(len(phi), len(phi), dtype=torch.float64, device=phi.device)
    for block in phi.split(2**12, 1):
        block = block.double()
        gram.addmm_(block, block.T)
    energy = (gram.trace() / len(phi)).item()
    scale = 1 / math.sqrt(energy) if energy > 1e-60 else 0.0  # below, 1 / |phi| nears float32's end
    phi *= scale  # from here on the prior's images have E_h = 1, and the grids fit any network
    lam, vectors = torch.linalg.eigh(gram * (scale**2 / len(phi)))
    lam, vectors = lam.flip(0), vectors.flip(1)
    vectors = vectors[
        :, lam > 1e-7 * lam[0]
    ]  # the others are rounding of the float32 features, and no directions
    lam = lam[: vectors.shape[1]]
    top = lam[: data.rank]
    directions = phi.T @ (vectors[:, : data.rank] / (len(phi) * top).sqrt()).float()
    weights = classifier.flatten(1).T
    means = vectors.T @ (phi @ weights).double() / (len(phi) * lam).sqrt()[:, None]
    del phi  # 1 GiB, before the sample's own

    # v^2 = phi' (I + beta Phi)^-1 phi: along Phi's directions the noise shrinks, and on the rest of phi all of it acts.
    shrink = 1 / (1 + BETAS.to(lam.device) * top[:, None])
    coordinates_and_outputs = torch.cat(
        [directions, weights], 1
    )  # one pass over the features gives both
    # Filled in place: small tensors that stay, allocated between large ones that go, would tear the heap to pieces.
    problem = SimpleNamespace(
        m1=data.m1, scale=scale, margins=lam.new_empty(len(sample), len(classifier))
    )
    problem.v, problem.x = lam.new_empty(len(sample), len(BETAS)), lam.new_empty(len(sample))
    for indices, margins, v, x in zip(
        *(part.split(step) for part in (sample, problem.margins, problem.v, problem.x))
    ):
        batch, own = images[indices].float(), labels[indices, None]
        z = features(layers, hidden, batch).flatten(1) * scale
        coordinates, outputs = (
            (z @ coordinates_and_outputs).double().split([len(top), len(classifier)], 1)
        )
        squares = coordinates.square()
        rest = (torch.linalg.vector_norm(z, dim=1).double().square() - squares.sum(1)).clamp_min(0)
        margins.copy_((outputs.gather(1, own) - outputs).scatter(1, own, math.inf))
        v.copy_((rest[:, None] + squares @ shrink).sqrt())
        x.copy_(torch.linalg.vector_norm(batch.flatten(1), dim=1, dtype=torch.float64))
    square = classifier.double().square().sum().item()
    problem.kl = _classifier_kl(lam, len(top), vectors, means, square, labels[prior])
    return problem


def _classifier_kl(lam, rank, vectors, means, square, labels):
    """The KL in nats between N(c W, (I + beta Phi)^-1) and the classifier's prior, as a function of c and of beta's index.

    Args:
        lam, vectors: eigenvalues (K,) and eigenvectors (n0, K) of the kernel matrix of the n0 images of the prior.
        rank: Phi is cut off at so many of them.
        means: (K, C) coordinates of W along the same directions of the features.
        square: |W|^2.
        labels: (n0,) of these images.
    """
    classes = means.shape[1]
    targets = F.one_hot(labels, classes).double() - 1 / classes
    target = (lam / len(labels)).sqrt()[:, None] * (
        vectors.T @ targets
    )  # of the ridge solution, times lam + ridge
    betas, prior_betas, ridges, sizes = (
        grid.to(lam.device) for grid in (BETAS, PRIOR_BETAS, RIDGES, SIZES)
    )
    inverse = torch.ones(len(lam), len(prior_betas), dtype=torch.float64, device=lam.device)
    inverse[:rank] += lam[:rank, None] * prior_betas
    ridge = 1 / (lam + ridges[:, None])
    scale = (ridge.square() @ target.square().sum(1)).sqrt().clamp_min(1e-100)[:, None]
    cross = ridge @ ((means * target).sum(1)[:, None] * inverse) / scale
    prior_square = ridge.square() @ (target.square().sum(1)[:, None] * inverse) / scale.square()
    energies = means.square().sum(1)
    square = energies @ inverse + max(0.0, square - energies.sum().item())
    ratio = inverse[:rank] / (1 + betas[:, None, None] * lam[:rank, None])
    spread = (classes - 1) / 2 * (ratio - 1 - ratio.log()).sum(1)
    choices = math.log(len(prior_betas) * len(ridges) * len(sizes))

    def kl(c, beta):
        size = c * cross / prior_square.clamp_min(1e-300)
        size = sizes[(sizes - size[..., None]).abs().argmin(-1)]
        distance = c**2 * square - 2 * c * size * cross + size.square() * prior_square
        return choices + (distance / 2 + spread[beta]).min().item()

    return kl


def _bound(problem, point, count=None):
    """A bound of the statement, and above 1 a number that still tells how far from 1 a search is.

    Args:
        problem: namespace of what `_measure` returns and of
            nats   KL without the classifier's, and the price of the losses and delta
            gap    theta / c, how far an output difference of the trained network can be from that of h, per |x|
            gibbs  whether it is of the Gibbs classifier, whose gamma is 0
        point: (8 log2 c, index of beta, index of gamma).
        count: it is computed on the first so many samples; None: on all.
    """
    c, beta, gamma = 2 ** (point[0] / 8), point[1], point[2]
    if not (
        0 <= beta < len(BETAS)
        and 0 <= gamma < (1 if problem.gibbs else len(GAMMAS))
        and problem.scale
    ):
        return math.inf
    place = bisect.bisect_left(THETAS, c * problem.gap)
    if place == len(THETAS):
        return math.inf
    margins = c * problem.margins[:count] - THETAS[place] * problem.x[:count, None]
    error = noisy_errors(margins, problem.v[:count, beta], GAMMAS[gamma]).mean().item()
    kl = (problem.nats + problem.kl(c, beta)) / problem.m1
    bound = kl_inverse(error, kl) / (
        1 if problem.gibbs else math.erfc(-GAMMAS[gamma] / math.sqrt(2)) * 0.5
    )
    return bound if bound < 1 else 1 + error + kl


def _least_bound(problem, point):
    """The least bound over c, beta and gamma that a search on the first few thousand samples finds, on all; and its point."""
    point, _ = _climb(lambda point: _bound(problem, point, 4000), point, (1,))
    return _bound(problem, point), point


def _bits(kernel):
    """The step 2**-bits nearest to half the root mean square of the kernel's nonzero entries."""
    return 1 - round(math.log2(kernel[kernel != 0].square().mean().sqrt().item()))


def _round(kernel, bits):
    return (kernel * 2.0**bits).round() / 2.0**bits


def _nats(kernels, bits):
    """-ln P(h) in nats of rounded hidden kernels, modulo permutations of their filters."""
    total = 0.0
    for kernel, bit in zip(kernels[:-1], bits):
        equal = kernel.flatten(1).unique(dim=0, return_counts=True)[1].double()
        total += (
            code_length(kernel * 2.0**bit)
            - math.lgamma(len(kernel) + 1)
            + torch.lgamma(equal + 1).sum().item()
        )
    return total


def _slack(errors):
    """Largest |features - rounded features| / |x| where layers of operator norm 1 are rounded with these errors."""
    return math.expm1(sum(math.log1p(error) for error in errors))


@torch.no_grad()
def certify(net, images, labels, delta=0.001, found=None):
    """Upper bounds of the true error of a trained network, from its training data alone (docs/certificate.md).

    Each holds with probability at least 1 - delta over the sample, jointly and for every network of that architecture at
    once, however it was trained, if the architecture was chosen without the sample. Nothing in here is random but the choice
    of the images that are set aside, which is fixed.

    Args:
        net: a network as `trace_layers` takes it.
        images, labels: all the data that the network was trained on, (m, C, H, W) as the network sees them and (m,). An
            iid sample: no augmentation, no label noise of an exact count, no statistics of the data in the images.
        found: {column: value} of an earlier call that was stopped, of the same network and data; the rest is put into it.
    Returns:
        pac_bayes_error          of the trained network itself
        pac_bayes_rounded_error  of the network with its hidden layers rounded coarsely
        pac_bayes_gibbs_error    of those, with a random classifier for each image
    Raises:
        BadInput: the network is not covered, has more than MAX_CLASSES outputs, or the arguments make no sense.
    """
    found = {} if found is None else found
    layers = trace_layers(net, tuple(images.shape[1:]))
    m, classes = len(images), len(layers[-1].weight)
    if m < 10 or labels.shape != (m,):
        raise BadInput(
            f'{m} images, labels of shape {tuple(labels.shape)}: wants 10 images or more, and a label for each'
        )
    if labels.dtype != torch.int64 or labels.min() < 0 or labels.max() >= classes:
        raise BadInput(
            f'labels: must be int64 from 0 to {classes - 1}, since the network has {classes} outputs'
        )
    if not 0 < delta < 1:
        raise BadInput(f'delta = {delta!r}: must be between 0 and 1')
    kernels = [layer.kernel for layer in layers]
    if not all(tensor.isfinite().all() for tensor in (images, *kernels)):
        raise BadInput(f'{type(net).__name__}: the images or its weights contain NaN or infinity')
    if (largest := images.abs().max().item()) > MAX_PIXEL:
        raise BadInput(
            f'images: a pixel of {largest:g}; float32 wants them below {MAX_PIXEL:g}: scale the images down'
        )
    if classes > MAX_CLASSES:
        raise BadInput(
            f'{classes} classes: the errors of noisy outputs are computed for at most {MAX_CLASSES}'
        )

    n0 = max(1, min(PRIOR_IMAGES, m // 10, MAX_FLOATS // kernels[-1][0].numel()))
    prior, sample = (
        torch.from_numpy(np.random.default_rng(0).permutation(m))
        .to(images.device)
        .split([n0, m - n0])
    )
    data = SimpleNamespace(
        images=images, labels=labels, prior=prior, sample=sample, rank=RANK, m1=m - n0
    )
    data.fixed = math.log(
        2 * math.sqrt(data.m1) * CHOICES * LOSSES / delta
    )  # nats that every network pays
    data.fixed += sum(
        math.log(len(kernel)) for kernel in kernels[:-1]
    )  # of how many channels of a layer live
    few_images, few_directions, few_samples = SEARCH
    smaller = {'prior': prior[:few_images], 'sample': sample[:few_samples], 'rank': few_directions}
    data.search = SimpleNamespace(**(vars(data) | smaller))

    kernels = live_channels([*kernels[:-1], kernels[-1] - kernels[-1].mean(0)])
    if not all(kernel.any() for kernel in kernels):
        return dict.fromkeys(COLUMNS, 1.0)
    hidden = [kernel / _operator_norm(kernel, layer) for kernel, layer in zip(kernels[:-1], layers)]
    classifier = kernels[-1] / kernels[-1].norm()
    with ieee_float32():
        if COLUMNS[0] not in found:
            found[COLUMNS[0]] = min(1.0, _trained(layers, hidden, classifier, data))
        if COLUMNS[2] not in found:
            found |= zip(
                COLUMNS[1:],
                (min(1.0, bound) for bound in _rounded(layers, hidden, classifier, data)),
            )
    return found


def _trained(layers, hidden, classifier, data):
    """Certificate A, where it is below 1; the arguments are those of `certify`."""
    problem = _measure(
        layers, [*hidden, classifier], data.search
    )  # the search takes the trained network for the rounded one
    problem.gibbs = False
    bits = [_bits(kernel) + 8 for kernel in hidden]
    norms = [
        _operator_norm(k - _round(k, bit), layer) * 2.0**bit
        for k, bit, layer in zip(hidden, bits, layers)
    ]
    spread = torch.pdist(classifier.flatten(1)).max().item()
    length = lru_cache(None)(
        lambda l, bit: (
            code_length(rounded * 2.0**bit)
            if (rounded := _round(hidden[l], bit)).any()
            else math.inf
        )
    )

    def score(point):
        bits = point[3:]
        if not all(0 <= bit <= MAX_BITS for bit in bits):
            return math.inf
        problem.nats = data.fixed + sum(length(l, bit) for l, bit in enumerate(bits))
        problem.gap = (
            spread * problem.scale * _slack(norm / 2.0**bit for norm, bit in zip(norms, bits))
        )
        return _bound(problem, point[:3])

    point, value = _climb(score, (*START, *bits), (2, 1))
    if value >= 1:
        return 1.0
    rounded = [_round(kernel, bit) for kernel, bit in zip(hidden, point[3:])]
    live = live_channels([*rounded, classifier])
    problem = _measure(layers, live, data)
    problem.nats, problem.gibbs = data.fixed + _nats(live, point[3:]), False
    slack = _slack(_operator_norm(k - r, layer) for k, r, layer in zip(hidden, rounded, layers))
    problem.gap = spread * problem.scale * slack
    return _least_bound(problem, point[:3])[0]


def _rounded(layers, hidden, classifier, data):
    """Certificates B and C, where they are below 1; the arguments are those of `certify`."""

    def certificate(bits, data):
        if not all(0 <= bit <= MAX_BITS for bit in bits):
            return math.inf, None, None
        live = live_channels(
            [*(_round(kernel, bit) for kernel, bit in zip(hidden, bits)), classifier]
        )
        problem = _measure(layers, live, data)
        problem.nats, problem.gap, problem.gibbs = data.fixed + _nats(live, bits), 0.0, False
        return *_least_bound(problem, START), problem

    bits, value = _climb(
        lambda bits: certificate(bits, data.search)[0], [_bits(kernel) for kernel in hidden], (1,)
    )
    if value >= 1:
        return 1.0, 1.0
    value, point, problem = certificate(bits, data)
    problem.gibbs = True
    return value, _least_bound(problem, (*point[:2], 0))[0]
