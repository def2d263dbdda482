"""Narrower chains of layers by the multi-task lasso: each next layer selects the channels that it
reads (docs/compress.md).
"""

import math

import torch
import torch.nn.functional as F

from conf import BadInput
from measures.trace import features, sequential, trace_layers
from studies.compress.lasso import Problem, group_lasso, norms, ridge, scaled, squared_residual

FIT_IMAGES = 10_000  # the largest number of images that a layer is fitted to
GRAM_COLUMNS = 12_000  # the largest Gram matrix, 1.1 GiB; of more columns the features are kept
FEATURE_BYTES = 2**31  # the most memory of features that are kept
CHUNK = 2**23  # features that are summed up at once


def balance(net, input_shape):
    """The same function with the least product of Frobenius norms.

    Every neuron's incoming and outgoing weights have equal norms. Rescaling neuron k by a > 0 turns
    (w_k, v_k) into (a w_k, v_k / a). A neuron with zeros on one side becomes zero on both.

    Args:
        net: a network as `trace_layers` takes it.
        input_shape: (channels, height, width) of an image.
    Returns:
        An nn.Sequential of plain layers.
    """
    layers = trace_layers(net, input_shape)
    return _sequential(net, layers, _balanced([layer.kernel for layer in layers]))


@torch.no_grad()
def compress(net, images, lam, refit='ridge', tolerance=1e-3):
    """A narrower network of nearly the same function, from unlabelled training images.

    From the input on, layer l + 1 is fitted to the features of layer l, with a group lasso whose
    groups are the channels of layer l, weighted by the norms of their filters:

        min_V  1/(2N) ||V Phi - Psi||_F^2  +  lam lam_max sum_k ||w_k|| ||V_k||_F

    Phi are the patches of the narrow network's features, Psi the original network's pre-
    activations, so that later layers correct the errors of earlier ones. Channels with V_k = 0
    are dropped, and the network is balanced before the first fit and after each.

    Args:
        net: a network as `trace_layers` takes it. images: (m, C, H, W) training images, as the
        network sees them; at most FIT_IMAGES are used. lam: share of lam_max, the smallest
        penalty that drops all channels; 0 < lam < 1. refit: 'none' keeps the lasso's weights,
        which are shrunk; 'ridge' fits the kept channels once
            more, under a tenth of the penalty's quadratic majorizer at the solution. (Without any
            penalty the norms explode.)
        tolerance: of the duality gap, relative to the objective.
    Returns:
        (nn.Sequential, report): a dict per hidden layer of channels (the number that is kept),
        residual (||V Phi - Psi|| / ||Psi|| after the refit), gap (relative to the objective),
        steps.
    Raises:
        BadInput: an invalid argument, a network that is not covered, or a lam at which a layer
        loses
            all its channels.
    """
    check_fit(images, lam, refit)
    if images.dim() != 4:
        raise BadInput(f'images of shape {tuple(images.shape)}: must be (m, C, H, W)')
    if not images.is_floating_point():
        raise BadInput(f'images of {images.dtype}: must be floating-point numbers')
    layers = trace_layers(net, tuple(images.shape[1:]))
    original = _balanced([layer.kernel for layer in layers])
    narrow, report = list(original), []
    for index in range(1, len(layers)):
        problem = _layer_problem(layers[: index + 1], narrow[:index], original[: index + 1], images)
        costs = narrow[index - 1].flatten(1).norm(dim=1)
        start, name = narrow[index].flatten(2), layers[index - 1].name
        V, row = fit_layer(problem, costs, start, name, lam, refit, tolerance)
        kept = row.pop('kept')
        report.append(row)
        narrow[index] = V[:, kept].unflatten(2, narrow[index].shape[2:])
        narrow[index - 1] = narrow[index - 1][kept]
        narrow = _balanced(narrow)
    return _sequential(net, layers, narrow), report


# --------------------------------------------------------------------------------------------------
# The fit of one layer
# --------------------------------------------------------------------------------------------------


def check_fit(images, lam, refit):
    """Raises BadInput if an argument of a fit is invalid."""
    if not 0 < lam < 1:
        raise BadInput(f'lam = {lam:g}: must be a share of lam_max, between 0 and 1')
    if refit not in ('none', 'ridge'):
        raise BadInput(f'refit = {refit!r}: must be none or ridge')
    if not len(images) or not images.isfinite().all():
        shape = tuple(images.shape)
        raise BadInput(f'images of shape {shape}: must be at least one, without NaN or infinity')


def fit_layer(problem, costs, start, name, lam, refit, tolerance):
    """The weights V (D, K, taps) of the lasso with these costs (K,), or of its refit.

    Returns:
        (V, report): V is 0 where report['kept'] (K,) is False; report has also channels, residual,
        gap and steps.
    Raises:
        BadInput: no channel of layer `name` is kept.
    """
    # In U_k = c_k V_k every channel costs the same, and the steps do not depend on the scale of the
    # channels. Channels that correlate with no target stay 0.
    scale = torch.where(norms(problem.cross) > 0, 1 / costs, 0)[:, None]
    problem = scaled(problem, scale)
    start = torch.where(scale > 0, start * costs[:, None], 0)
    U, report = group_lasso(problem, lam, start, tolerance)
    kept = norms(U) > 0
    if not kept.any():
        raise BadInput(f'lam = {lam:g}: layer {name} loses all its channels; choose a smaller lam')
    penalty = report.pop('penalty')
    if refit == 'ridge':
        U = ridge(problem, 0.1 * penalty / norms(U), U)
    residual = squared_residual(problem, U, problem.gram(U)) / problem.energy
    report |= {'channels': int(kept.sum()), 'kept': kept, 'residual': math.sqrt(max(0.0, residual))}
    return U * scale, report


def subsample(images, columns, positions):
    """Evenly spaced images, as many as a fit to features (columns, images * positions) takes."""
    most = FIT_IMAGES
    if columns > GRAM_COLUMNS:
        most = min(most, FEATURE_BYTES // (columns * positions * images.element_size()))
    return images[:: math.ceil(len(images) / max(1, most))]


def problem_of(batches, groups):
    """The Problem of batches of features Phi (K taps, n) and targets Psi (D, n).

    The Gram matrix is summed up in float64; if it would be too large, the features are kept
    instead. `groups` is (K, taps).
    """
    dense = math.prod(groups) <= GRAM_COLUMNS
    gram, cross, energy, N, kept = 0, 0, 0.0, 0, []
    for phi, targets in batches:
        exact, targets = phi.double(), targets.double()
        if dense:
            gram = gram + exact @ exact.T
        else:
            kept.append(phi)
        cross = cross + targets @ exact.T
        energy += targets.square().sum().item()
        N += phi.shape[1]

    def times_gram(V):
        V, product = V.flatten(1), 0
        if dense:
            product = V @ gram
        for phi in kept:
            exact = phi.double()
            product = product + (V @ exact) @ exact.T
        return (product / N).view(-1, *groups)

    return Problem(times_gram, (cross / N).view(-1, *groups), energy / N)


# --------------------------------------------------------------------------------------------------
# Bias-free chains
# --------------------------------------------------------------------------------------------------


def _layer_problem(layers, narrow, original, images):
    """The fit of the last of `layers` to the features of the narrow layers before it.

    The targets are its pre-activations in the original network.
    """
    *before, layer = layers
    *whole, weight = original
    kernel = layer.kernel.shape[2:]
    groups = len(narrow[-1]), math.prod(kernel)
    columns, positions = math.prod(groups), math.prod(axis.shape[1] for axis in layer.taps)

    def rows(maps):
        return maps.flatten(2).transpose(0, 1).flatten(1)

    def batches():
        chosen = subsample(images, columns, positions)
        for batch in chosen.split(max(1, CHUNK // (columns * positions))):
            targets = layer.forward(weight.to(batch.dtype), features(before, whole, batch))
            phi = F.unfold(features(before, narrow, batch), kernel, **layer.geometry)
            yield rows(phi), rows(targets)

    return problem_of(batches(), groups)


def _balanced(weights, tolerance=1e-12):
    """Balanced weights of the same function.

    Balancing one layer after the other descends the sum of squares of all weights, which is
    convex in the logarithms of the factors, so that the result is unique.
    """
    weights = list(weights)
    change = 1.0
    while change > tolerance:
        change = 0.0
        for index in range(len(weights) - 1):
            incoming = weights[index].flatten(1).norm(dim=1)
            outgoing = weights[index + 1].transpose(0, 1).flatten(1).norm(dim=1)
            alive = (incoming > 0) & (outgoing > 0)
            factor = torch.where(alive, (outgoing / incoming).sqrt(), 0)
            back = torch.where(alive, 1 / factor, 0)
            weights[index] = weights[index] * factor[:, None, None, None]
            weights[index + 1] = weights[index + 1] * back[:, None, None]
            change = max([change, *factor[alive].log().abs().tolist()])
    return weights


def _sequential(net, layers, weights):
    """The nn.Sequential of layers with other weights (out, in, h, w), of the dtype of a network."""
    chain = []
    for layer, weight in zip(layers, weights):
        if layer.is_linear:
            weight = weight.flatten(1)
        chain.append(layer._replace(weight=weight))
    return sequential(chain).to(next(net.parameters()).dtype)
