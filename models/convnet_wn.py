"""CONV-L-H: L convolutions of H channels, each followed by a ReLU, then a linear classifier (Galanti et al. 2023).

Every layer but the classifier is weight-normalized with one scalar, W = g V / ||V|| (Salimans and Kingma 2016).
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

from conf import BadInput


class WeightNorm(nn.Module):
    """The effective weight g V / ||V||, with the norm of the whole tensor V and one scalar g."""

    def forward(self, g, v):
        return v * (g / torch.linalg.vector_norm(v))

    def right_inverse(self, weight):
        return torch.linalg.vector_norm(weight), weight


def weight_norm(layer):
    """`layer`, its weight W parametrized as g V / ||V||; its value stays, and `layer.weight` is the effective weight."""
    parametrize.register_parametrization(layer, 'weight', WeightNorm())
    return layer


def convnet(settings, input_shape, num_classes):
    """CONV-`depth`-`width` as an nn.Sequential, with PyTorch's default initialization.

    Args:
        settings: namespace with depth, width, kernel_size, stride, padding and bias.
        input_shape: (channels, height, width) of an image.
        num_classes: number of outputs.
    Raises:
        BadInput: the image is too small for that many convolutions.
    """
    kernel, stride, padding, bias = settings.kernel_size, settings.stride, settings.padding, settings.bias
    channels, *size = input_shape
    layers = []
    for depth in range(settings.depth):
        if min(size) + 2 * padding < kernel:
            image = f'an image of {input_shape[1]}x{input_shape[2]}'
            geometry = f'kernel_size = {kernel}, stride = {stride}, padding = {padding}'
            raise BadInput(f'depth = {settings.depth}: {image} allows at most {depth} convolutions with {geometry}')
        size = [(n + 2 * padding - kernel) // stride + 1 for n in size]
        layers += [weight_norm(nn.Conv2d(channels, settings.width, kernel, stride, padding, bias=bias)), nn.ReLU()]
        channels = settings.width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size[0] * size[1], num_classes, bias=bias))
