"""CONVBN-L-H and CONVRES-L-H: a strided stem, L batch-normalized layers of 3x3 convolutions with H
channels, then a linear classifier.

They are CONV-L-H and CONVRES-L-H of Galanti, Galanti and Ben-Shaul (TMLR 2023), whose released code
omits the skip.
"""

from torch import nn

from conf import BadInput
from models.layers import Flatten, batch_norm, hidden_layer


class Stem(nn.Sequential):
    """Two 2x2 convolutions of stride 2, each batch-normalized, then a ReLU. Not one of the L."""

    def __init__(self, channels, width, bias):
        first = nn.Conv2d(channels, width, 2, 2, bias=bias)
        second = nn.Conv2d(width, width, 2, 2, bias=bias)
        super().__init__(first, batch_norm(first), second, batch_norm(second), nn.ReLU())


class Block(nn.Module):
    """A residual layer, x -> relu(bn2(x + conv2(relu(bn1(conv1(x))))))."""

    is_layer = True  # its output is the representation of a layer, like the output of an nn.ReLU

    def __init__(self, width, bias):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.bn1 = batch_norm(self.conv1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.bn2 = batch_norm(self.conv2)
        self.relu = nn.ReLU()

    def forward(self, x):
        inner = self.conv2(self.relu(self.bn1(self.conv1(x))))
        return self.relu(self.bn2(x + inner))


def convbn(settings, input_shape, num_classes):
    """CONVBN-`depth`-`width`: a layer is a 3x3 convolution of padding 1, batch norm and a ReLU."""

    def layer(width, bias):
        return hidden_layer(nn.Conv2d(width, width, 3, padding=1, bias=bias), 'batch')

    return _stemmed(layer, settings, input_shape, num_classes)


def convres(settings, input_shape, num_classes):
    """CONVRES-`depth`-`width`: a layer is a residual block of two 3x3 convolutions."""

    def layer(width, bias):
        return [Block(width, bias)]

    return _stemmed(layer, settings, input_shape, num_classes)


def _stemmed(layer, settings, input_shape, num_classes):
    """Stem, L layers, classifier as an nn.Sequential, with PyTorch's default initialization.

    Args:
        layer: function of (width, bias) that gives the modules of a layer.
        settings: namespace with network, depth, width, normalization and bias.
        input_shape: (channels, height, width) of an image.
        num_classes: number of outputs.
    Raises:
        BadInput: another normalization is set, or the image is too small for the stem.
    """
    if settings.normalization != 'batch':
        raise BadInput(
            f'normalization = {settings.normalization!r}: {settings.network} is made of batch '
            "normalization; set normalization = 'batch'"
        )
    channels, height, width = input_shape
    if min(height, width) < 4:
        raise BadInput(
            f'network = {settings.network!r}: an image of {height}x{width} is too small for its '
            'stem, which needs at least 4x4'
        )
    layers = [Stem(channels, settings.width, settings.bias)]
    for _ in range(settings.depth):
        layers += layer(settings.width, settings.bias)
    features = settings.width * (height // 4) * (width // 4)
    return nn.Sequential(*layers, Flatten(), nn.Linear(features, num_classes, bias=settings.bias))
