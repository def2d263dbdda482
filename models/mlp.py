"""MLP-L-H: L linear layers of H neurons, each followed by a ReLU, then a linear classifier."""

import itertools
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
    sizes = [math.prod(input_shape)] + settings.depth * [settings.width]
    layers = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += hidden_layer(
            nn.Linear(inputs, outputs, bias=settings.bias), settings.normalization
        )
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes, bias=settings.bias))
