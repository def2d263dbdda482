"""A hidden layer as every family builds it: a linear map, its normalization, a ReLU."""

import torch
from torch import nn

from models.weight_norm import weight_norm


def hidden_layer(linear, normalization):
    """The modules of a layer: `linear` (Conv2d or Linear), its normalization (weight, batch or none), and a ReLU."""
    if normalization == 'weight':
        return [weight_norm(linear), nn.ReLU()]
    return [linear, *([batch_norm(linear)] if normalization == 'batch' else []), nn.ReLU()]


def batch_norm(linear):
    """Batch normalization of the outputs of a Conv2d or a Linear."""
    return (nn.BatchNorm2d if isinstance(linear, nn.Conv2d) else nn.BatchNorm1d)(len(linear.weight))


class Flatten(nn.Flatten):
    """nn.Flatten whose gradient comes back in the memory format of the maps, channels_last.

    Without it the gradient has NCHW strides, over which the ReLU and the convolution before it run slowly. The values are equal
    to the bit.
    """

    def forward(self, x):
        if self.training and x.requires_grad and x.ndim == 4:
            x.register_hook(_channels_last)
        return super().forward(x)


def _channels_last(gradient):
    return gradient.contiguous(memory_format=torch.channels_last)
