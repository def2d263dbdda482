"""A hidden layer as every family builds it: a linear map, its normalization, a ReLU."""

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
