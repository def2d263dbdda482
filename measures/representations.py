"""What each layer has learned: nearest class centers, neural collapse, linear probes, depth.

The quantities of Galanti, Galanti and Ben-Shaul, "Comparative Generalization Bounds for Deep Neural
Networks" (TMLR 2023). docs/depth.md has the formulas, the protocol and the theorem that
`comparative_estimate` follows.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from conf import BadInput
from measures.norms import classification_margins, margin_error
from measures.steps import evaluation_mode
from measures.tails import binomial_inverse
from measures.trace import (
    hooked,
    ieee_float32,
    images_per_pass,
    outputs,
    require_rows,
    taking,
)

PROBE_SIZE = 2048  # most coordinates of a layer's maps that a linear probe reads
PROBE_RIDGE = 1e-3  # lambda of a probe, as a share of the mean of H'H's diagonal


@torch.no_grad()
def measure_representations(net, train_images, train_labels, test_images, test_labels, layers=None):
    """The input and the output of each layer, compared with the means of its classes.

    A class that a set lacks has no mean there: it is no candidate of the nearest class center, its
    pairs are left out, and each of its samples is an error, as is a tie.

    Args:
        net: a network, in any mode; it runs in evaluation mode.
        train_images: (m, ...), exactly as the network sees them, on its device.
        train_labels: (m,) integers, the labels trained on, wrong ones included.
        test_images, test_labels: the same of the test set.
        layers: names of modules, as in net.named_modules(), in the order of the forward pass; a
            layer is the output of one. None: net is an nn.Sequential, and layers end with each
            nn.ReLU among its children and each child that has a true attribute `is_layer`.
    Returns:
        A list of dicts, the input first (layer 0), then layer 1 to L, each with
            size             number of coordinates D_l
            train_ncc_error  share of training samples not nearest to the mean of their own class
            test_ncc_error   the same of the test set, by the training set's means
            train_cdnv       (V_a + V_b) / (2 ||mu_a - mu_b||^2), the mean over pairs of classes;
                             inf where two means are equal
            test_cdnv        the same of the test set, by its own means and variances
        and the marks of neural collapse (Papyan, Han and Donoho, PNAS 2020) on the training set,
        which go to 0. M has the C class means less their mean as rows; E = I - 11'/C is the Gram
        matrix of a simplex; norms are Frobenius norms:
            nc1  tr(pinv(Sigma_B) Sigma_W) / C, covariances of the class means and within classes
            nc2  ||MM' / ||MM'|| - E / sqrt(C - 1)||
            nc3  the same of WM', W the classifier: of the last layer, if there are as many
                 outputs as classes, else nan
            nc4  share of samples whose nearest class center is not that of the largest output
        With fewer than two classes they are nan.
    Raises:
        BadInput: the layers cannot be told apart, images and labels do not fit, or a
            representation contains NaN or infinity.
    """
    modules = _layer_modules(net, layers)
    train, test = _checked_sets(train_images, train_labels, test_images, test_labels)
    scores = outputs(net, train_images).flatten(1)
    with evaluation_mode(net), ieee_float32(), parametrize.cached():
        centers = _class_means(net, modules, *train)
        classes = train[1].unique()
        on_train = _compare(net, modules, *train, centers, classes, centers)
        test_means = _class_means(net, modules, *test)
        on_test = _compare(net, modules, *test, centers, classes, test_means)
    rows = []
    for layer, means in enumerate(centers):
        row = {'size': means.shape[1]}
        row |= {'train_ncc_error': on_train['error'][layer]}
        row |= {'test_ncc_error': on_test['error'][layer]}
        row |= {'train_cdnv': on_train['cdnv'][layer], 'test_cdnv': on_test['cdnv'][layer]}
        row |= {'nc1': on_train['nc1'][layer], 'nc2': _off_simplex(_gram(_centered(means)))}
        row |= {'nc3': math.nan, 'nc4': math.nan}
        if len(classes) > 1:
            chosen = classes[on_train['nearest'][layer]]
            row['nc4'] = (chosen != scores.argmax(1)).double().mean().item()
        rows.append(row)
    if len(classes) == scores.shape[1]:
        # Means of the outputs are those of Wh; a bias is the same in every class and cancels.
        means = [scores[members].mean(0) for _, members in _by_class(train[1])]
        rows[-1]['nc3'] = _off_simplex(_centered(torch.stack(means)))
    return rows


def _centered(means):
    """M (C, D): the class means less their mean."""
    return means - means.mean(0)


def _gram(m):
    return m @ m.T


def _off_simplex(a):
    """||A / ||A|| - E / sqrt(C - 1)||; nan where A is zero."""
    simplex = torch.eye(len(a), dtype=a.dtype, device=a.device) - 1 / len(a)
    return (a / a.norm() - simplex / simplex.norm()).norm().item()


def _checked_sets(*arrays):
    """((images, labels), (images, labels)) of both sets, labels as int64. Raises BadInput."""
    sets = arrays[:2], arrays[2:]
    for part, (images, labels) in zip(('train', 'test'), sets):
        fits = images.dim() >= 2 and labels.shape == images.shape[:1] and len(labels) > 0
        if labels.is_floating_point() or not fits:
            shapes = f'{tuple(images.shape)} and {tuple(labels.shape)}'
            needs = 'must be (m, ...) and integers (m,), m at least 1'
            raise BadInput(f'{part} images and labels of shapes {shapes}: {needs}')
    return [(images, labels.long()) for images, labels in sets]


def _layer_modules(net, layers):
    """The modules whose outputs are the layers, in the order of the forward pass."""
    kind = type(net).__name__
    if layers is not None:
        modules = dict(net.named_modules())
        if unknown := [name for name in layers if name not in modules]:
            names = ', '.join(name for name in modules if name)
            raise BadInput(f'{kind}: no module {unknown[0]!r}; there are {names}')
        return [modules[name] for name in layers]
    if not isinstance(net, nn.Sequential) or type(net).forward is not nn.Sequential.forward:
        advice = 'name its layers, layers=[...], or give its modules as a plain nn.Sequential'
        raise BadInput(f'{kind}: {advice}')
    modules = [
        module
        for module in net
        if isinstance(module, nn.ReLU) or getattr(module, 'is_layer', False)
    ]
    if not modules:
        raise BadInput(f'{kind}: no nn.ReLU among its children ends a layer; name layers=[...]')
    return modules


def _representations(net, modules, images):
    """The input and the output of each layer, (B, ...), copied, in float32 or more."""
    names = {module: name for name, module in net.named_modules()}
    called, found = [], [images]

    def note(module, inputs, output):
        called.append(module)
        require_rows(f'layer {names[module]}', output, images)
        found.append(output.to(torch.promote_types(output.dtype, torch.float32), copy=True))

    with hooked(net, dict.fromkeys(modules), note):
        net(images.clone())  # its first step may work in place
    if len(called) != len(modules) or any(a is not b for a, b in zip(called, modules)):
        given, order = (', '.join(names[each] for each in part) for part in (modules, called))
        advice = 'name layers that run once in a forward pass, in its order'
        raise BadInput(f'{type(net).__name__}: {advice}: of {given}, there run {order or "none"}')
    found[0] = images.to(torch.promote_types(images.dtype, torch.float32))
    return found


def _pass_size(net, modules, images):
    """The number of images at a time. All layers of a pass are kept, which counts on a GPU."""
    size = images_per_pass(net, images)
    if images.is_cuda:
        size = max(1, size // len(modules))
    return size


def _by_class(labels):
    """[(class, indices of its samples)] for each class that occurs, in increasing order."""
    return [(label, (labels == label).nonzero()[:, 0]) for label in labels.unique()]


def _batches(net, modules, images, members):
    """Yields (layer, representation (B, D_l)) of the samples `members`, batch after batch."""
    for indices in members.split(_pass_size(net, modules, images)):
        for layer, h in enumerate(_representations(net, modules, images[indices])):
            yield layer, h.movedim(1, -1).flatten(1)  # channels last, the order of memory


def _class_means(net, modules, images, labels):
    """Per layer, the means (C, D_l) float64 of the classes that occur, in increasing order.

    They are taken from the first sample on, so that those of a constant layer are equal to the bit.
    """
    means, first, classes = [], [], _by_class(labels)
    for row, (_, members) in enumerate(classes):
        for layer, h in _batches(net, modules, images, members):
            if layer == len(means):
                first.append(h[0])
                means.append(h.new_zeros((len(classes), h.shape[1]), dtype=torch.float64))
            means[layer][row] += (h.double() - first[layer]).sum(0)
        for layer_means in means:
            layer_means[row] /= len(members)
    means = [layer_means + start for layer_means, start in zip(means, first)]
    _require_finite(means)
    return means


def _require_finite(means):
    for layer, layer_means in enumerate(means):
        if not layer_means.isfinite().all():
            what = 'the representation contains NaN or infinity (layer 0 is the input)'
            raise BadInput(f'layer {layer}: {what}')


def _compare(net, modules, images, labels, centers, candidates, means):
    """{error, cdnv, nearest, nc1} of a set, a list over layers each; nc1 if `centers` is `means`.

    With e = h - m, m the sample's class mean in this set, and w = mu - m, ||h - mu||^2 - ||e||^2 =
    ||w||^2 - 2 e.w. All differences are taken before anything is squared, so that means far from
    zero cancel no digits.

    Args:
        centers: per layer (C, D_l) float64; the nearest one classifies.
        candidates: (C,), their classes.
        means: per layer (C', D_l) float64, of the classes of this set.
    """
    depth, dtype = len(means), torch.promote_types(images.dtype, torch.float32)
    scales = [_scale(layer_means) for layer_means in means]
    variances = [layer_means.new_zeros(len(layer_means)) for layer_means in means]
    right, nearest = labels.new_zeros(depth), labels.new_zeros(depth, len(labels))
    # With M = USV', the sum over j of (v_j'e)^2 / s_j^2 is ||pinv(MM') Me||^2 = ||pinv(MM') we||^2:
    # the rows of w are those of M less one vector, and pinv(MM') takes constants to 0.
    grams = [_gram(scale * _centered(center)) for scale, center in zip(scales, centers)]
    inverses = [torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) for gram in grams]
    within = [0.0] * depth
    for row, (label, members) in enumerate(_by_class(labels)):
        shifts = []
        for scale, layer_centers, layer_means in zip(scales, centers, means):
            w = scale * (layer_centers - layer_means[row])
            shift = -scale * layer_means[row], w, w.square().sum(1) / 2
            shifts.append([part.to(dtype) for part in shift])
        scores, squares = [[] for _ in means], [[] for _ in means]
        for layer, h in _batches(net, modules, images, members):
            minus_mean, w, half_square = shifts[layer]
            e = torch.add(minus_mean, h, alpha=scales[layer])
            scores[layer].append((w @ e.T).T - half_square)
            squares[layer].append(e.square_().sum())
        own = candidates == label
        for layer in range(depth):
            variances[layer][row] = torch.stack(squares[layer]).double().sum() / len(members)
            score = torch.cat(scores[layer])
            nearest[layer, members] = score.argmax(1)
            products = (score + shifts[layer][2]).double() @ inverses[layer]
            within[layer] += products.square().sum().item()
            if own.any() and not own.all():
                others = score[:, ~own].amax(1, keepdim=True)
                right[layer] += (score[:, own] > others).sum()
    found = {'error': [math.nan] * depth, 'cdnv': [], 'nearest': nearest, 'nc1': []}
    if len(candidates) > 1:
        found['error'] = [(len(labels) - count) / len(labels) for count in right.tolist()]
    for layer in range(depth):
        found['cdnv'].append(_cdnv(scales[layer] * means[layer], variances[layer]))
        collapsed = not grams[layer].any()
        found['nc1'].append(math.nan if collapsed else within[layer] / len(labels))
    return found


def _scale(means):
    """A power of two that brings the largest entry near 1, so that no square over- or underflows.

    What is measured does not depend on it.
    """
    if not means.numel():
        return 1.0
    _, exponent = math.frexp(means.abs().max().item())
    return math.ldexp(1.0, -max(-100, min(exponent, 100)))


def _cdnv(means, variances):
    """The mean over pairs of classes of (V_a + V_b) / (2 ||mu_a - mu_b||^2); (C, D) and (C,).

    It is inf where two means are equal, also for 0 / 0, in a dead layer.
    """
    a, b = torch.triu_indices(len(means), len(means), 1)
    pairs = (variances[a] + variances[b]) / (2 * torch.pdist(means).square())
    return pairs.nan_to_num(math.inf, math.inf).mean().item()


# --------------------------------------------------------------------------------------------------
# Linear probes
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_probes(net, train_images, train_labels, test_images, test_labels, layers=None):
    """What a linear classifier reads from the input and each layer: ridge regression, closed form.

    With H (m, D) the representations of the training set less their mean and Y (m, C) its one-hot
    labels, the probe is W = (H'H + lambda I)^-1 H'Y, lambda = 0.001 tr(H'H) / D; its outputs are
    W'(h less the mean) + mean of Y. There is no seed and no step size, and the scale of h does not
    matter. Maps of more than 2,048 coordinates are first averaged over the cells of a square grid,
    to at most 2,048 unless there are more channels: a probe with tied weights. (docs/depth.md says
    what the released code does instead.)

    Args:
        as `measure_representations`; the classes are 0 to the largest label of either set.
    Returns:
        A list of dicts, the input first (layer 0), then layer 1 to L, each with
            train_probe_error, test_probe_error  shares of samples whose largest output is not that
                                                 of their class, or tied
            train_probe_loss, test_probe_loss    squared errors to one-hot labels, means over
                                                 samples and outputs
    Raises:
        BadInput: as `measure_representations`; or a negative label.
    """
    modules = _layer_modules(net, layers)
    train, test = _checked_sets(train_images, train_labels, test_images, test_labels)
    classes = int(torch.cat([train[1], test[1]]).max()) + 1
    with evaluation_mode(net), ieee_float32(), parametrize.cached():
        with taking(net, train_images):
            _representations(net, modules, train_images[:1])
        frequencies = train[1].bincount(minlength=classes).double() / len(train[1])
        means, probes = _fit_probes(net, modules, *train, classes)
        rows = [{} for _ in probes]
        for part, (images, labels) in (('train', train), ('test', test)):
            found = [[] for _ in probes]
            for _, features in _probe_features(net, modules, images):
                for layer, h in enumerate(features):
                    found[layer].append((h - means[layer]) @ probes[layer] + frequencies)
            targets = F.one_hot(labels, classes).double()
            for row, parts in zip(rows, found):
                scores = torch.cat(parts)
                row[f'{part}_probe_error'] = margin_error(classification_margins(scores, labels), 0)
                row[f'{part}_probe_loss'] = F.mse_loss(scores, targets).item()
    return rows


def _fit_probes(net, modules, images, labels, classes):
    """Per layer, the mean (D,) of its representations and the probe (D, C), in float64."""
    sums = None
    for _, features in _probe_features(net, modules, images):
        parts = [h.sum(0) for h in features]
        sums = parts if sums is None else [a + b for a, b in zip(sums, parts)]
    means = [layer_sums / len(labels) for layer_sums in sums]
    _require_finite(means)
    squares = [mean.new_zeros(len(mean), len(mean)) for mean in means]  # H'H
    products = [mean.new_zeros(len(mean), classes) for mean in means]  # H'Y
    for start, features in _probe_features(net, modules, images):
        targets = F.one_hot(labels[start : start + len(features[0])], classes).double()
        for layer, h in enumerate(features):
            h -= means[layer]
            squares[layer].addmm_(h.T, h)
            products[layer].addmm_(h.T, targets)
    return means, [_ridge(*layer_sums) for layer_sums in zip(squares, products)]


def _probe_features(net, modules, images, samples=1024):
    """Yields (first sample, [what a probe reads of each layer, (samples, D) float64])."""
    size = _pass_size(net, modules, images)
    for start in range(0, len(images), samples):
        batches = images[start : start + samples].split(size)
        passes = [map(_pooled, _representations(net, modules, batch)) for batch in batches]
        yield start, [torch.cat(layer).double() for layer in zip(*passes)]


def _pooled(h):
    """Representations (B, ...) as (B, D), large maps averaged over a square grid."""
    if h.dim() == 4 and h[0].numel() > PROBE_SIZE:
        h = F.adaptive_avg_pool2d(h, max(1, math.isqrt(PROBE_SIZE // h.shape[1])))
    return h.flatten(1)


def _ridge(squares, products):
    """The probe W (D, C) of H'H (D, D), which is overwritten, and H'Y; 0 for a constant layer."""
    level = squares.trace() / len(squares)
    squares.diagonal().add_(torch.where(level > 0, PROBE_RIDGE * level, 1.0))
    return torch.cholesky_solve(products, torch.linalg.cholesky(squares))


def effective_depth(train_ncc_errors, eps):
    """d^eps_S, the first layer whose nearest class centers err on at most a share eps; inf if none.

    Args:
        train_ncc_errors: of layer 1 to L, without the input.
    Raises:
        BadInput: eps is no share.
    """
    if not 0 <= eps < 1:
        raise BadInput(f'eps = {eps!r}: must be a number from 0 to below 1')
    for layer, error in enumerate(train_ncc_errors, 1):
        if error <= eps:
            return float(layer)
    return math.inf


def comparative_estimate(depths, noisy_depths, noise, alpha):
    """The comparative bound's right-hand side, estimated: no certificate (docs/depth.md says why).

    Args:
        depths: per draw of (S1, S2), effective depths of networks trained on S1, one per
            initialization.
        noisy_depths: the same of networks trained on S1 and S2, S2 with a share `noise` of wrong
            labels.
        noise: p of the theorem, above 0 and below 1/2.
        alpha: the theorem's slack, above 0 and below 1.
    Returns:
        Dict of
            a         per draw, the mean depth that S1 takes
            b         per draw, the least depth found for S1 and the mislabelled S2, which stands in
                      for the minimal one
            share     of the draws with a >= b, the estimate of the theorem's probability
            limit     upper 95 % limit of that probability, if the draws were independent and b the
                      minimal depth
            estimate  share + (1 + alpha) noise, the number that is compared with the test error
            at_limit  limit + (1 + alpha) noise
            open      number of draws whose b is inf: deeper than the network, or not trained to
                      the end
    Raises:
        BadInput: the lists do not fit, or noise and alpha are out of range.
    """
    if not (0 < noise < 0.5 and 0 < alpha < 1):
        needs = 'must lie between 0 and 0.5, and between 0 and 1'
        raise BadInput(f'noise = {noise!r}, alpha = {alpha!r}: {needs}')
    if not depths or len(depths) != len(noisy_depths) or not all([*depths, *noisy_depths]):
        counts = f'{len(depths)} and {len(noisy_depths)} draws'
        raise BadInput(f'depths of {counts}: must be equally many, each of a network or more')
    a = [sum(draw) / len(draw) for draw in depths]
    b = [min(draw) for draw in noisy_depths]
    reached = sum(depth >= noisy for depth, noisy in zip(a, b))
    share, floor = reached / len(a), (1 + alpha) * noise
    limit = binomial_inverse(reached, len(a), math.log(0.05))  # Clopper and Pearson
    estimate = {'a': a, 'b': b, 'share': share, 'limit': limit}
    estimate |= {'estimate': share + floor, 'at_limit': limit + floor}
    return estimate | {'open': sum(map(math.isinf, b))}
