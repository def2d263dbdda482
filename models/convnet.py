"""CONV-L-H: L convolutions of H channels, each followed by a ReLU, then a linear classifier (Galanti et al. 2023).

Every layer but the classifier is weight-normalized with one scalar in the paper; batch normalization or none are settings.
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
        BadInput: the image is too small for that many convolutions, or the padding as large as the kernel.
    """
    kernel, stride, padding, bias = (
        settings.kernel_size,
        settings.stride,
        settings.padding,
        settings.bias,
    )
    if padding >= kernel:
        raise BadInput(
            f'padding = {padding}: must be below kernel_size = {kernel}; beyond it an output reads padding alone'
        )
    channels, *size = input_shape
    layers = []
    for depth in range(settings.depth):
        if min(size) + 2 * padding < kernel:
            image = f'an image of {input_shape[1]}x{input_shape[2]}'
            geometry = f'kernel_size = {kernel}, stride = {stride}, padding = {padding}'
            raise BadInput(
                f'depth = {settings.depth}: {image} allows at most {depth} convolutions with {geometry}'
            )
        size = [(n + 2 * padding - kernel) // stride + 1 for n in size]
        convolution = nn.Conv2d(channels, settings.width, kernel, stride, padding, bias=bias)
        layers += hidden_layer(convolution, settings.normalization)
        channels = settings.width
    return nn.Sequential(
        *layers, Flatten(), nn.Linear(channels * size[0] * size[1], num_classes, bias=bias)
    )
