"""What each layer has learned: nearest class centers, variances, neural collapse, linear probes, effective depth.

The quantities of Galanti, Galanti and Ben-Shaul, "Comparative Generalization Bounds for Deep Neural Networks" (TMLR 2023);
docs/depth.md has the formulas, the protocol and the theorem that `comparative_estimate` follows.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from conf import BadInput
from measures.norms import classification_margins, margin_error
from measures.tails import binomial_inverse
from measures.trace import evaluation_mode, ieee_float32, images_per_pass

PROBE_SIZE = 2048  # coordinates that a linear probe reads at most of the maps of a layer
PROBE_RIDGE = 1e-3  # lambda of a probe, as a share of the mean of H'H's diagonal


@torch.no_grad()
def measure_representations(net, train_images, train_labels, test_images, test_labels):
    """The input and the output of each layer, seen through the means of their classes.

    A layer ends with its nonlinearity; the classifier is none. A class that a set lacks has no mean there: it is no candidate
    of the nearest class center, its pairs are left out, and each of its samples is an error, as is a tie.

    Args:
        net: an nn.Sequential; an nn.ReLU among its children ends a layer, and so does a block of layers that has a true
            attribute `is_layer`. It runs in evaluation mode, and every module is left in the mode it was in.
        train_images: (m, ...), exactly as the network sees them; they and the labels are on the network's device.
        train_labels: (m,) int64, the labels trained on, wrong ones included.
        test_images, test_labels: the same of the test set.
    Returns:
        A list of dicts, the input first (layer 0), then layer 1 to L, each with
            size             number of coordinates D_l
            train_ncc_error  share of training samples that are not nearest to the mean of their own class
            test_ncc_error   the same of the test set, by the training set's means
            train_cdnv       (V_a + V_b) / (2 ||mu_a - mu_b||^2), the mean over pairs of classes; inf where two means are equal
            test_cdnv        the same of the test set, by means and variances of its own
        and the marks of neural collapse (Papyan, Han and Donoho, PNAS 2020) on the training set, which go to 0. M has the
        C class means less their mean as rows; E = I - 11'/C is the Gram matrix of a simplex; norms are Frobenius's:
            nc1  tr(pinv(Sigma_B) Sigma_W) / C, of the covariances of the class means and within the classes
            nc2  ||MM' / ||MM'|| - E / sqrt(C - 1)||
            nc3  the same of WM', W the classifier: of the last layer, where there are as many outputs as classes, else nan
            nc4  share of samples whose nearest class center is not that of the network's largest output
        Fewer than two classes leave nothing to tell apart: nan.
    Raises:
        BadInput: another kind of network, images and labels that do not fit, or representations with NaN or infinity.
    """
    modules, train, test = (
        _layered_modules(net),
        (train_images, train_labels),
        (test_images, test_labels),
    )
    _require_sets(train, test)
    with evaluation_mode(net), ieee_float32(), parametrize.cached():
        centers = _class_means(modules, *train)
        classes = train_labels.unique()
        train_errors, train_cdnvs, nearest, nc1 = _compare(
            modules, *train, centers, classes, centers
        )
        means = _class_means(modules, *test)
        test_errors, test_cdnvs, _, _ = _compare(modules, *test, centers, classes, means)
        batches = train_images.split(images_per_pass(net, train_images))
        outputs = torch.cat([net(batch).flatten(1) for batch in batches]).double()
    sizes, nc2 = (
        [center.shape[1] for center in centers],
        [_off_simplex(_centered(center)) for center in centers],
    )
    nc3, nc4 = [math.nan] * len(centers), [math.nan] * len(centers)
    if len(classes) > 1:
        nc4 = [(classes[own] != outputs.argmax(1)).double().mean().item() for own in nearest]
    if len(classes) == outputs.shape[1]:
        class_outputs = torch.stack(
            [outputs[members].mean(0) for _, members in _by_class(train_labels)]
        )
        nc3[-1] = _off_simplex(
            _centered(class_outputs), gram=False
        )  # (WM')': a bias is the same in every class
    columns = sizes, train_errors, test_errors, train_cdnvs, test_cdnvs, nc1, nc2, nc3, nc4
    names = 'size train_ncc_error test_ncc_error train_cdnv test_cdnv nc1 nc2 nc3 nc4'.split()
    return [dict(zip(names, row)) for row in zip(*columns)]


def _centered(means):
    """M (C, D): the class means less their mean."""
    return means - means.mean(0)


def _off_simplex(m, gram=True):
    """||A / ||A|| - E / sqrt(C - 1)|| of A = MM', or of a square M itself; nan where A is zero."""
    a = m @ m.T if gram else m
    simplex = torch.eye(len(a), dtype=a.dtype, device=a.device) - 1 / len(a)
    return (a / a.norm() - simplex / simplex.norm()).norm().item()


def _require_sets(train, test):
    """Raises BadInput where the images and labels of a set do not fit."""
    for part, (images, labels) in (('train', train), ('test', test)):
        if (
            images.dim() < 2
            or labels.shape != images.shape[:1]
            or labels.is_floating_point()
            or not len(labels)
        ):
            shapes = f'{tuple(images.shape)} and {tuple(labels.shape)}'
            raise BadInput(
                f'{part} images and labels of shapes {shapes}: must be (m, ...) and integers (m,), m at least 1'
            )


def _ends_layer(module):
    return isinstance(module, nn.ReLU) or getattr(module, 'is_layer', False)


def _layered_modules(net):
    """The children of a network up to its last layer's end, as an nn.Sequential."""
    if not isinstance(net, nn.Sequential) or type(net).forward is not nn.Sequential.forward:
        raise BadInput(
            f'{type(net).__name__}: give its modules as a plain nn.Sequential, so that layers can be told apart'
        )
    modules = list(net)
    while modules and not _ends_layer(modules[-1]):
        modules.pop()
    if not modules:
        raise BadInput(
            f'{type(net).__name__}: none of its children is an nn.ReLU, with which a layer ends'
        )
    return nn.Sequential(*modules)


def _representations(modules, images):
    """Yields the input and the output of each layer, (B, ...)."""
    yield images
    for module in modules:
        images = module(images)
        if _ends_layer(module):
            yield images


def _by_class(labels):
    """[(class, indices of its samples)] for each class that occurs, in increasing order."""
    return [(label, (labels == label).nonzero()[:, 0]) for label in labels.unique()]


def _batches(modules, images, members):
    """Yields (layer, representation (B, D_l)) of the samples `members`, all of one class, batch after batch."""
    for indices in members.split(images_per_pass(modules, images)):
        for layer, h in enumerate(_representations(modules, images[indices])):
            yield layer, h.movedim(1, -1).flatten(1)  # the channels last, in the order of memory


def _class_means(modules, images, labels):
    """Per layer, the means (C, D_l) float64 of the classes that occur, in increasing order."""
    means, classes = [], _by_class(labels)
    for row, (_, members) in enumerate(classes):
        for layer, h in _batches(modules, images, members):
            if layer == len(means):
                means.append(h.new_zeros((len(classes), h.shape[1]), dtype=torch.float64))
            means[layer][row] += h.sum(0)  # one row: the batch is of one class
        for layer_means in means:
            layer_means[row] /= len(members)
    for layer, layer_means in enumerate(means):
        if not layer_means.isfinite().all():
            raise BadInput(
                f'layer {layer}: the representation contains NaN or infinity (layer 0 is the input)'
            )
    return means


def _compare(modules, images, labels, centers, candidates, means):
    """Per layer, the NCC error, the CDNV, the nearest candidates (m,) and nc1 of a set; nc1 where `centers` are `means`.

    With e = h - m, m the sample's class mean in this set, ||h - mu||^2 - ||e||^2 = ||w||^2 - 2 e.w for w = mu - m. All
    differences are taken before anything is squared, so that means far from zero cancel no digits.

    Args:
        centers: per layer (C, D_l) float64, whose nearest one classifies; `candidates` (C,) are their classes.
        means: per layer (C', D_l) float64, of the classes of this set.
    """
    scales = [_scale(layer_means) for layer_means in means]
    variances = [layer_means.new_zeros(len(layer_means)) for layer_means in means]
    right, nearest = labels.new_zeros(len(means)), labels.new_zeros(len(means), len(labels))
    # With M = USV', sum_j (v_j'e)^2 / s_j^2 = ||pinv(MM') Me||^2 = ||pinv(MM') we||^2: the rows of w are those of M
    # less one vector, and pinv(MM') takes constants to 0.
    grams = [
        (m @ m.T) for m in (scale * _centered(center) for scale, center in zip(scales, centers))
    ]
    inverses, within = (
        [torch.linalg.pinv(g, rtol=1e-10, hermitian=True) for g in grams],
        [0.0 for _ in means],
    )
    for row, (label, members) in enumerate(_by_class(labels)):
        shifts = []
        for scale, layer_centers, layer_means in zip(scales, centers, means):
            w = scale * (layer_centers - layer_means[row])
            shifts.append(
                [
                    shift.to(images.dtype)
                    for shift in (-scale * layer_means[row], w, w.square().sum(1) / 2)
                ]
            )
        scores, squares = [[[] for _ in means] for _ in range(2)]
        for layer, h in _batches(modules, images, members):
            minus_mean, w, b = shifts[layer]
            e = torch.add(minus_mean, h, alpha=scales[layer])
            scores[layer].append((w @ e.T).T - b)
            squares[layer].append(e.square_().sum())
        own = candidates == label
        for layer in range(len(means)):
            variances[layer][row] = torch.stack(squares[layer]).double().sum() / len(members)
            score = torch.cat(scores[layer])
            nearest[layer, members] = score.argmax(1)
            within[layer] += (
                ((score + shifts[layer][2]).double() @ inverses[layer]).square().sum().item()
            )
            if own.any() and not own.all():
                right[layer] += (score[:, own] > score[:, ~own].amax(1, keepdim=True)).sum()
    errors = [
        (len(labels) - count) / len(labels) if len(candidates) > 1 else math.nan
        for count in right.tolist()
    ]
    cdnvs = [
        _cdnv(scale * layer_means, v) for scale, layer_means, v in zip(scales, means, variances)
    ]
    nc1 = [total / len(labels) if gram.any() else math.nan for total, gram in zip(within, grams)]
    return errors, cdnvs, nearest, nc1


def _scale(means):
    """A power of two that brings the largest entry near 1, so that no square over- or underflows; both quantities ignore it."""
    return math.ldexp(1.0, -max(-100, min(math.frexp(means.abs().max().item())[1], 100)))


def _cdnv(means, variances):
    """The mean over pairs of classes of (V_a + V_b) / (2 ||mu_a - mu_b||^2), of (C, D) and (C,); equal means give inf."""
    a, b = torch.triu_indices(len(means), len(means), 1)
    pairs = (variances[a] + variances[b]) / (2 * torch.pdist(means).square())
    return pairs.nan_to_num(math.inf, math.inf).mean().item()  # 0 / 0 is a dead layer


# ----------------------------------------------------------------------------------------------------------------------
# Linear probes
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_probes(net, train_images, train_labels, test_images, test_labels):
    """What a linear classifier reads off the input and the output of each layer: ridge regression in closed form.

    With H (m, D) the representations of the training set less their mean and Y (m, C) its one-hot labels, the probe
    is W = (H'H + lambda I)^-1 H'Y, lambda = 0.001 tr(H'H) / D; its outputs are W'(h less the mean) + mean of Y. There
    is no seed and no step size, and the scale of h does not matter. Maps of more than 2,048 coordinates are first
    averaged over the cells of a square grid, to at most 2,048 where there are no more channels: a probe with tied
    weights. (docs/depth.md says what the released code does instead.)

    Args:
        as `measure_representations`; the classes are 0 to the largest label of either set.
    Returns:
        A list of dicts, the input first (layer 0), then layer 1 to L, each with
            train_probe_error, test_probe_error  shares of samples whose largest output is not of their class, or tied
            train_probe_loss, test_probe_loss    squared errors to one-hot labels, means over samples and outputs
    Raises:
        BadInput: as `measure_representations`; or a negative label.
    """
    modules, train, test = (
        _layered_modules(net),
        (train_images, train_labels),
        (test_images, test_labels),
    )
    _require_sets(train, test)
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    with evaluation_mode(net), ieee_float32(), parametrize.cached():
        sums = None
        for _, features in _probe_features(modules, train_images):
            parts = [h.sum(0) for h in features]
            sums = parts if sums is None else [a + b for a, b in zip(sums, parts)]
        means = [layer_sums / len(train_labels) for layer_sums in sums]
        for layer, mean in enumerate(means):
            if not mean.isfinite().all():
                raise BadInput(
                    f'layer {layer}: the representation contains NaN or infinity (layer 0 is the input)'
                )
        frequencies = train_labels.bincount(minlength=classes).double() / len(train_labels)
        squares = [mean.new_zeros(len(mean), len(mean)) for mean in means]  # H'H
        products = [mean.new_zeros(len(mean), classes) for mean in means]  # H'Y
        for start, features in _probe_features(modules, train_images):
            for layer, h in enumerate(features):
                h -= means[layer]
                squares[layer].addmm_(h.T, h)
                products[layer].addmm_(
                    h.T, F.one_hot(train_labels[start : start + len(h)], classes).double()
                )
        probes = [_ridge(*layer_sums) for layer_sums in zip(squares, products)]
        rows = [{} for _ in probes]
        for part, (images, labels) in (('train', train), ('test', test)):
            outputs = [[] for _ in probes]
            for _, features in _probe_features(modules, images):
                for layer, h in enumerate(features):
                    outputs[layer].append((h - means[layer]) @ probes[layer] + frequencies)
            targets = F.one_hot(labels, classes).double()
            for row, parts in zip(rows, outputs):
                scores = torch.cat(parts)
                row[f'{part}_probe_error'] = margin_error(classification_margins(scores, labels), 0)
                row[f'{part}_probe_loss'] = F.mse_loss(scores, targets).item()
    return rows


def _probe_features(modules, images, samples=1024):
    """Yields (first sample, [what a probe reads of each layer, (samples, D) float64]), part after part of the images."""
    for start in range(0, len(images), samples):
        batches = images[start : start + samples].split(images_per_pass(modules, images))
        parts = zip(*([_pooled(h) for h in _representations(modules, batch)] for batch in batches))
        yield start, [torch.cat(layer).double() for layer in parts]


def _pooled(h):
    """Representations (B, ...) as (B, D), maps of more than PROBE_SIZE coordinates averaged over a square grid."""
    if h.dim() == 4 and h[0].numel() > PROBE_SIZE:
        h = F.adaptive_avg_pool2d(h, max(1, math.isqrt(PROBE_SIZE // h.shape[1])))
    return h.flatten(1)


def _ridge(squares, products):
    """The probe W (D, C) of H'H (D, D), which is overwritten, and H'Y (D, C); zero where the layer is constant."""
    level = squares.trace() / len(squares)
    squares.diagonal().add_(torch.where(level > 0, PROBE_RIDGE * level, 1.0))
    return torch.cholesky_solve(products, torch.linalg.cholesky(squares))


def effective_depth(train_ncc_errors, eps):
    """d^eps_S, the first layer whose nearest class centers err on at most a share eps of the training set; inf if none does.

    Args:
        train_ncc_errors: of layer 1 to L, without the input.
    Raises:
        BadInput: eps is no share.
    """
    if not 0 <= eps < 1:
        raise BadInput(f'eps = {eps!r}: must be a number from 0 to below 1')
    return next(
        (float(layer) for layer, error in enumerate(train_ncc_errors, 1) if error <= eps), math.inf
    )


def comparative_estimate(depths, noisy_depths, noise, alpha):
    """The comparative bound's right-hand side as an experiment can estimate it: no certificate (docs/depth.md says why).

    Args:
        depths: per draw of (S1, S2), the effective depths of networks trained on S1, one per initialization.
        noisy_depths: the same of networks trained on S1 and S2, S2 with a share `noise` of wrong labels.
        noise: p of the theorem, above 0 and below 1/2.
        alpha: the theorem's slack, above 0 and below 1.
    Returns:
        Dict of
            a         per draw, the mean depth that S1 takes
            b         per draw, the least depth found for S1 and the mislabelled S2, which stands in for the minimal one
            share     of the draws with a >= b, the estimate of the theorem's probability
            limit     upper 95 % limit of that probability, had the draws been independent and b the minimal depth
            estimate  share + (1 + alpha) noise, the number that is compared with the test error
            at_limit  limit + (1 + alpha) noise
            open      number of draws whose b is inf: deeper than the network, or not trained to the end
    Raises:
        BadInput: the lists do not fit, or noise and alpha are out of range.
    """
    if not (0 < noise < 0.5 and 0 < alpha < 1):
        raise BadInput(
            f'noise = {noise!r}, alpha = {alpha!r}: noise must lie between 0 and 0.5, alpha between 0 and 1'
        )
    if (
        not depths
        or len(depths) != len(noisy_depths)
        or not all(map(len, [*depths, *noisy_depths]))
    ):
        raise BadInput(
            f'depths of {len(depths)} and {len(noisy_depths)} draws: must be as many, each of one network or more'
        )
    a, b = [sum(draw) / len(draw) for draw in depths], [min(draw) for draw in noisy_depths]
    share = sum(depth >= noisy for depth, noisy in zip(a, b)) / len(a)
    limit = binomial_inverse(round(share * len(a)), len(a), math.log(0.05))  # Clopper and Pearson
    floor = (1 + alpha) * noise
    return {
        'a': a,
        'b': b,
        'share': share,
        'limit': limit,
        'estimate': share + floor,
        'at_limit': limit + floor,
        'open': sum(map(math.isinf, b)),
    }
