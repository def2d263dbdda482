"""A hidden layer as every family builds it: a linear map, its normalization, a ReLU."""

import torch
from torch import nn

from models.weight_norm import weight_norm


def hidden_layer(linear, normalization):
    """The modules of a hidden layer, as a list.

    Args:
        linear: its Conv2d or Linear module.
        normalization: weight, batch or none.
    """
    if normalization == 'weight':
        return [weight_norm(linear), nn.ReLU()]
    if normalization == 'batch':
        return [linear, batch_norm(linear), nn.ReLU()]
    return [linear, nn.ReLU()]


def batch_norm(linear):
    """Batch normalization of the outputs of a Conv2d or a Linear."""
    channels = len(linear.weight)
    if isinstance(linear, nn.Conv2d):
        return nn.BatchNorm2d(channels)
    return nn.BatchNorm1d(channels)


class Flatten(nn.Flatten):
    """nn.Flatten whose gradient is returned in the memory format of the maps, channels_last.

    nn.Flatten returns it with NCHW strides, with which the backward passes of the ReLU and the
    convolution before it are slow. The values are equal to the bit.
    """

    def forward(self, x):
        if self.training and x.requires_grad and x.ndim == 4:
            x.register_hook(_channels_last)
        return super().forward(x)


def _channels_last(gradient):
    return gradient.contiguous(memory_format=torch.channels_last)
