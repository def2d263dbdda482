"""Networks made narrower by the multi-task lasso: each next layer says which channels it can do without (docs/compress.md)."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from conf import BadInput
from measures.trace import features, sequential, trace_layers
from studies.compress.lasso import group_lasso, norms, ridge, scaled, squared_residual

FIT_IMAGES = 10_000  # at most so many are fitted to, evenly spaced
GRAM_COLUMNS = 12_000  # the largest Gram matrix that is formed, 1.1 GiB; beyond it the features themselves are kept
FEATURE_BYTES = 2**31  # ... of as many images as fit into this
CHUNK = 2**23  # features at once where they are summed up


def balance(net, input_shape):
    """The same function with the least product of Frobenius norms: each neuron's incoming and outgoing weights equal in norm.

    Rescaling neuron k by a > 0 turns (w_k, v_k) into (a w_k, v_k / a). Balancing one layer after the other descends the sum
    of squares of all weights, which is convex in the logarithms of the factors. A neuron that is fed by nothing or feeds
    nothing becomes zero on both sides.

    Args:
        net: a network as `trace_layers` takes it.
        input_shape: (channels, height, width) of an image.
    Returns:
        An nn.Sequential of plain layers.
    """
    layers, weights = _tensors(net, input_shape)
    return _narrow(net, layers, _balanced(weights))


@torch.no_grad()
def compress(net, images, lam, refit='ridge', tolerance=1e-3):
    """A narrower network of nearly the same function, from unlabelled training images.

    From the input on, layer l + 1 is fitted anew to the features of layer l, with a group lasso whose groups are the
    channels of layer l, weighted by the norms of their filters:

        min_V  1/(2N) ||V Phi - Psi||_F^2  +  lam lam_max sum_k ||w_k|| ||V_k||_F

    Phi are the patches of the narrow network's features, Psi the original network's pre-activations, so that later layers
    repair what earlier ones lost. Channels with V_k = 0 are dropped, and the network is balanced before the first and after
    each fit.

    Args:
        net: a network as `trace_layers` takes it.
        images: (m, C, H, W) training images, as the network sees them; at most FIT_IMAGES of them are used.
        lam: share of lam_max, from which on no channel is kept; 0 < lam < 1.
        refit: 'none' keeps the lasso's weights, which are shrunk; 'ridge' fits the kept channels once more, under a tenth
            of the penalty's quadratic majorizer at the solution. (With no penalty at all the norms explode.)
        tolerance: of the duality gap, relative to the objective.
    Returns:
        (nn.Sequential, report): a dict per hidden layer of channels (kept), residual (||V Phi - Psi|| / ||Psi|| after the
        refit), gap (relative to the objective) and steps.
    Raises:
        BadInput: an argument that makes no sense, a network that is not covered, or a lam at which a layer dies.
    """
    check_fit(images, lam, refit)
    if images.dim() != 4:
        raise BadInput(f'images of shape {tuple(images.shape)}: must be (m, C, H, W)')
    layers, weights = _tensors(net, tuple(images.shape[1:]))
    original = narrow = _balanced(weights)
    report = []
    for index in range(1, len(layers)):
        problem = _layer_problem(layers[: index + 1], narrow[:index], original[: index + 1], images)
        costs = narrow[index - 1].flatten(1).norm(dim=1)
        V, row = fit_layer(
            problem, costs, lam, narrow[index].flatten(2), refit, tolerance, layers[index - 1].name
        )
        kept = row.pop('kept')
        report.append(row)
        V = V[:, kept].unflatten(2, narrow[index].shape[2:])
        narrow = _balanced([*narrow[: index - 1], narrow[index - 1][kept], V, *narrow[index + 1 :]])
    return _narrow(net, layers, narrow), report


# ----------------------------------------------------------------------------------------------------------------------
# The fit of one layer
# ----------------------------------------------------------------------------------------------------------------------


def check_fit(images, lam, refit):
    if not 0 < lam < 1:
        raise BadInput(f'lam = {lam:g}: must be a share of lam_max, between 0 and 1')
    if refit not in ('none', 'ridge'):
        raise BadInput(f'refit = {refit!r}: must be none or ridge')
    if not len(images) or not images.isfinite().all():
        raise BadInput(
            f'images of shape {tuple(images.shape)}: must be at least one, without NaN or infinity'
        )


def fit_layer(problem, costs, lam, start, refit, tolerance, name):
    """(V, report): V (D, K, taps) of the lasso, with 0 where report['kept'] (K,) is False, or of its refit."""
    # In U_k = c_k V_k every channel costs the same, and rescaling channels changes not a single step. Dead ones stay 0.
    scale = torch.where(norms(problem.cross) > 0, 1 / costs, 0)[:, None]
    problem = scaled(problem, scale)
    U, report = group_lasso(
        problem, lam, torch.where(scale > 0, start * costs[:, None], 0), tolerance
    )
    kept = norms(U) > 0
    if not kept.any():
        raise BadInput(f'lam = {lam:g}: layer {name} loses all its channels; choose a smaller lam')
    penalty = report.pop('penalty')
    if refit == 'ridge':
        U = ridge(problem, 0.1 * penalty / norms(U), U)
    residual = squared_residual(problem, U, problem.gram(U)) / problem.energy
    report |= {'channels': int(kept.sum()), 'kept': kept, 'residual': math.sqrt(max(0.0, residual))}
    return U * scale, report


def evenly(images, columns, positions):
    """As many of the images as a fit to features (columns, images * positions) takes."""
    most = FIT_IMAGES
    if columns > GRAM_COLUMNS:
        most = min(most, FEATURE_BYTES // (columns * positions * images.element_size()))
    return images[:: -(-len(images) // max(1, most))]


def problem_of(batches, groups):
    """The problem of studies.compress.lasso of batches of features Phi (K taps, n) and targets Psi (D, n); `groups` is (K, taps).

    The Gram matrix is summed up in float64. Where it would be too large, the features are kept instead.
    """
    dense = math.prod(groups) <= GRAM_COLUMNS
    gram, cross, energy, N, kept = 0, 0, 0.0, 0, []
    for phi, targets in batches:
        targets, exact = targets.double(), phi.double()
        if dense:
            gram = gram + exact @ exact.T
        else:
            kept.append(phi)
        cross, energy, N = (
            cross + targets @ exact.T,
            energy + targets.square().sum().item(),
            N + phi.shape[1],
        )

    def times_gram(V):
        V = V.flatten(1)
        product = V @ gram if dense else sum((V @ (phi := part.double())) @ phi.T for part in kept)
        return (product / N).view(-1, *groups)

    return SimpleNamespace(gram=times_gram, cross=(cross / N).view(-1, *groups), energy=energy / N)


# ----------------------------------------------------------------------------------------------------------------------
# Bias-free chains
# ----------------------------------------------------------------------------------------------------------------------


def _layer_problem(layers, narrow, original, images):
    """The problem of the last of `layers`: fit its original pre-activations to the features of the narrow ones before it."""
    *before, layer = layers
    positions, taps = layer.taps[0].shape[1] * layer.taps[1].shape[1], math.prod(layer.kernel.shape[2:])
    columns = len(narrow[-1]) * taps

    def batches():
        for batch in evenly(images, columns, positions).split(
            max(1, CHUNK // (columns * positions))
        ):
            targets = layer.forward(original[-1].to(batch.dtype), features(before, original, batch))
            phi = F.unfold(
                features(before, narrow, batch), layer.kernel.shape[2:], **layer.geometry
            )
            yield (maps.flatten(2).transpose(0, 1).flatten(1) for maps in (phi, targets))

    return problem_of(batches(), (len(narrow[-1]), taps))


def _tensors(net, input_shape):
    """The layers of a network and their weights, each as a convolution's (out, in, h, w) in float64."""
    layers = trace_layers(net, input_shape)
    return layers, [layer.kernel for layer in layers]


def _balanced(weights, tolerance=1e-12):
    weights = list(weights)
    change = 1.0
    while change > tolerance:
        change = 0.0
        for index in range(len(weights) - 1):
            incoming = weights[index].flatten(1).norm(dim=1)
            outgoing = weights[index + 1].transpose(0, 1).flatten(1).norm(dim=1)
            alive = (incoming > 0) & (outgoing > 0)
            factor = torch.where(alive, (outgoing / incoming).sqrt(), 0)
            weights[index] = weights[index] * factor[:, None, None, None]
            weights[index + 1] = (
                weights[index + 1] * torch.where(alive, 1 / factor, 0)[:, None, None]
            )
            change = max([change, *(factor[alive].log().abs().tolist())])
    return weights


def _narrow(net, layers, weights):
    """The chain of plain layers with these weights (out, in, h, w), of the dtype of a network."""
    chain = [
        layer._replace(weight=weight.flatten(1) if layer.is_linear else weight)
        for layer, weight in zip(layers, weights)
    ]
    return sequential(chain).to(next(net.parameters()).dtype)
