"""CONV-L-H: L convolutions of H channels, each followed by a ReLU, then a linear classifier.

It is the network of Galanti et al. 2023. In the paper every layer except the classifier is
weight-normalized with a single scalar; batch normalization and no normalization are settings.
"""

from torch import nn

from conf import BadInput
from models.layers import Flatten, hidden_layer


def convnet(settings, input_shape, num_classes):
    """CONV-`depth`-`width` as an nn.Sequential, with PyTorch's default initialization.

    Args:
        settings: namespace with depth, width, kernel_size, stride, padding, normalization and bias.
        input_shape: (channels, height, width) of an image.
        num_classes: number of outputs.
    Raises:
        BadInput: the image is too small for the depth, or the padding as large as the kernel.
    """
    kernel, stride = settings.kernel_size, settings.stride
    padding, bias = settings.padding, settings.bias
    if padding >= kernel:
        raise BadInput(
            f'padding = {padding}: must be below kernel_size = {kernel}; '
            'otherwise some outputs read nothing but padding'
        )
    channels, *size = input_shape
    layers = []
    for depth in range(settings.depth):
        if min(size) + 2 * padding < kernel:
            raise BadInput(
                f'depth = {settings.depth}: an image of {input_shape[1]}x{input_shape[2]} allows '
                f'at most {depth} convolutions with kernel_size = {kernel}, stride = {stride}, '
                f'padding = {padding}'
            )
        size = [(n + 2 * padding - kernel) // stride + 1 for n in size]
        convolution = nn.Conv2d(channels, settings.width, kernel, stride, padding, bias=bias)
        layers += hidden_layer(convolution, settings.normalization)
        channels = settings.width
    features = channels * size[0] * size[1]
    return nn.Sequential(*layers, Flatten(), nn.Linear(features, num_classes, bias=bias))
