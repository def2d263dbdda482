"""The landscape around a trained network: distance from the start, flatness, margins.

Each entry of MEASURES is a function of

    net, initial       the trained network and the same network before training
    images, labels     (m, C, H, W) and (m,), the training samples

to a number. W_l are the effective weights, after weight normalization and masks, of all layers,
without biases; W_l^0 are the ones before training. Most are after Jiang et al. 2020,
"Fantastic generalization measures and where to find them" (ICLR), whose measures are often the
squares or the inverses of these: the same order.
"""

import math

import torch

from conf import BadInput
from measures.norms import classification_margins, margin_error, product
from measures.paths import path_metric, path_norm
from measures.steps import evaluation_mode
from measures.trace import (
    effective_weights,
    forward,
    outputs,
    plain_copy,
    require_counted,
    taking,
    weight_layers,
)

SHARPNESS_SAMPLES, SHARPNESS_DRAWS, SHARPNESS_RISE = 500, 5, 0.1


def _moved(net, initial):
    """The Frobenius distance of each layer from its start."""
    weights, starts = effective_weights(net).values(), effective_weights(initial).values()
    if [weight.shape for weight in weights] != [start.shape for start in starts]:
        kinds = f'{type(net).__name__} and {type(initial).__name__}'
        raise BadInput(f'{kinds}: the layers before training have other shapes')
    return [(weight - start).norm().item() for weight, start in zip(weights, starts, strict=True)]


def living_weights(net, initial, images, labels):
    """The number of nonzero weights."""
    return sum(weight.count_nonzero().item() for weight in effective_weights(net).values())


def weight_norm(net, initial, images, labels):
    """sqrt(sum_l ||W_l||_F^2)."""
    return math.hypot(*(weight.norm().item() for weight in effective_weights(net).values()))


def distance(net, initial, images, labels):
    """sqrt(sum_l ||W_l - W_l^0||_F^2)."""
    return math.hypot(*_moved(net, initial))


def distance_product(net, initial, images, labels):
    """prod_l ||W_l - W_l^0||_F."""
    return product(_moved(net, initial))


def margin_10(net, initial, images, labels):
    """The 10 % quantile of the training margins, with its sign."""
    return classification_margins(outputs(net, images), labels).quantile(0.1).item()


def path_norm_2(net, initial, images, labels):
    """The l2 path-norm."""
    return path_norm(net, tuple(images.shape[1:]), 2)


def path_norm_4(net, initial, images, labels):
    """The l4 path-norm."""
    return path_norm(net, tuple(images.shape[1:]), 4)


def path_distance(net, initial, images, labels):
    """The path-metric from the start."""
    return path_metric(net, initial, tuple(images.shape[1:]))[0]


@torch.no_grad()
def sharpness(net, initial, images, labels):
    """The sigma at which W + sigma Z errs by 0.1 more on the training set; larger: flatter.

    Z is standard normal on the nonzero weights. The error is the mean over 5 draws of Z, the same
    for every sigma, on the first 500 samples. A bisection of log2 sigma over [-12, 4] in 10 steps:
    if the error does not grow with sigma, it finds one of the crossings; without a crossing it
    returns nan.
    """
    require_counted(net)
    net = plain_copy(net)
    images, labels = images[:SHARPNESS_SAMPLES], labels[:SHARPNESS_SAMPLES]
    weights = [layer.weight for layer in weight_layers(net).values()]
    trained = [weight.clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(SHARPNESS_DRAWS):
        noise = [torch.randn(weight.shape, generator=generator) for weight in trained]
        draws.append([z.to(weight) * (weight != 0) for z, weight in zip(noise, trained)])

    def error(sigma):
        errors = []
        for draw in draws:
            for weight, center, noise in zip(weights, trained, draw):
                weight.copy_(center + sigma * noise)
            margins = classification_margins(outputs(net, images), labels)
            errors.append(margin_error(margins, 0))
        return sum(errors) / len(errors)

    allowed = error(0.0) + SHARPNESS_RISE
    low, high = -12.0, 4.0
    for _ in range(10):
        middle = (low + high) / 2
        if error(2.0**middle) > allowed:
            high = middle
        else:
            low = middle
    if low == -12 or high == 4:
        return math.nan
    return 2.0**low


@torch.inference_mode(False)
def input_gradient(net, initial, images, labels):
    """The median over samples of ||d margin / d image||_2 / max(margin, 1e-6).

    To first order the inverse of the distance at which the label changes.

    After Hou et al. 2022, "Instance-dependent generalization bounds via optimal transport".
    """
    if not images.is_floating_point():
        raise BadInput(f'images of {images.dtype}: there is no gradient by whole numbers')
    net, ratios = plain_copy(net), []
    with evaluation_mode(net), torch.enable_grad():
        net.requires_grad_(False)
        for batch, own in zip(images.split(100), labels.split(100)):
            batch = batch.detach().clone().requires_grad_()
            with taking(net, batch):
                found = forward(net, batch)
            margins, gradient = classification_margins(found, own.clone()), None
            if margins.requires_grad:
                (gradient,) = torch.autograd.grad(margins.sum(), batch, allow_unused=True)
            if gradient is None:
                raise BadInput(f'{type(net).__name__}: its outputs have no gradient by the images')
            # In float64 before anything is squared: float32 has no squares of 1e20 or of 1e-24.
            norms = gradient.flatten(1).double().norm(dim=1)
            ratios.append(norms / margins.detach().clamp(min=1e-6))
    return torch.cat(ratios).median().item()


MEASURES = {
    'living_weights': living_weights,
    'weight_norm': weight_norm,
    'distance': distance,
    'distance_product': distance_product,
    'margin_10': margin_10,
    'path_norm_2': path_norm_2,
    'path_norm_4': path_norm_4,
    'path_distance': path_distance,
    'sharpness': sharpness,
    'input_gradient': input_gradient,
}


def measure_landscape(net, initial, images, labels):
    """Every measure of MEASURES, as {column: float}; nan where one does not cover the network.

    Raises:
        BadInput: images and labels do not fit each other or the network.
    """
    # Refuses what does not fit, so that a refusal below means that the network is not covered.
    margin_10(net, initial, images, labels)
    row = {}
    for column, measure in MEASURES.items():
        try:
            row[column] = float(measure(net, initial, images, labels))
        except BadInput:
            row[column] = math.nan
    return row
