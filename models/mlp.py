"""MLP-L-H: L linear layers of H neurons, each followed by a ReLU, then a linear classifier."""

import math

from torch import nn

from models.layers import hidden_layer


def mlp(settings, input_shape, num_classes):
    """MLP-`depth`-`width` as an nn.Sequential, with PyTorch's default initialization.

    Args:
        settings: namespace with depth, width, normalization and bias.
        input_shape: (channels, height, width) of an image.
        num_classes: number of outputs.
    """
    inputs = math.prod(input_shape)
    layers = [nn.Flatten()]
    for _ in range(settings.depth):
        linear = nn.Linear(inputs, settings.width, bias=settings.bias)
        layers += hidden_layer(linear, settings.normalization)
        inputs = settings.width
    return nn.Sequential(*layers, nn.Linear(inputs, num_classes, bias=settings.bias))
