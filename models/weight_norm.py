"""Weight normalization with one scalar a layer, W = g V / ||V|| (Salimans and Kingma 2016), and masks of a layer's weight.

A mask M comes after weight normalization, and the entries of V that it kills are set to 0, so that in effect
W = g (V * M) / ||V * M||. The gradient of a killed entry is 0, and so are its weight decay and its momentum once that is 0: it
stays exactly 0 without any work at a step. A mask changes in place, so that a captured CUDA graph goes on reading it.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize


class WeightNorm(nn.Module):
    """The effective weight g V / ||V||, with the norm of the whole tensor V and one scalar g."""

    def forward(self, g, v):
        return v * (g / torch.linalg.vector_norm(v))

    def right_inverse(self, weight):
        return torch.linalg.vector_norm(weight), weight


class Mask(nn.Module):
    """The weight with exact zeros where the boolean buffer `mask` is False."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer('mask', torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight):
        return torch.where(
            self.mask, weight, 0
        )  # unlike a product it keeps the strides, on which the last digits depend

    def right_inverse(self, weight):
        return torch.where(self.mask, weight, 0)


def weight_norm(layer):
    """`layer`, its weight W parametrized as g V / ||V||; its value stays, and `layer.weight` is the effective weight."""
    parametrize.register_parametrization(layer, 'weight', WeightNorm())
    return layer


def add_masks(net, settings):
    """`net`, with a mask that kills none on each layer whose weights a setting can kill; made before the optimizer is."""
    if settings.density < 1 or settings.prune_rounds:
        layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        for layer in layers if settings.prune_layers == 'all' else layers[:-1]:
            parametrize.register_parametrization(layer, 'weight', Mask(layer.weight))
    return net


def free_weight(layer):
    """The parameter whose entries a mask kills: V of a weight-normalized layer with a mask, else the weight itself."""
    parametrizations = layer.parametrizations.weight
    return parametrizations.original if parametrizations.is_tensor else parametrizations.original1


@torch.no_grad()
def set_mask(layer, mask, keep_g=False):
    """Kills the weights where `mask` (boolean, of the weight's shape) is False; a weight that returns starts at 0.

    The other entries of the effective weight keep their values, for which g shrinks as ||V|| does. With `keep_g` g stays and
    they grow instead: so an initial network keeps the norm of its layers, without which a sparse one may not learn at all.
    Where all the weights that are left are 0, V is made of ones there and g is 0: a V of zeros has no direction.
    """
    parametrizations, free = layer.parametrizations.weight, free_weight(layer)
    norm = torch.linalg.vector_norm(free)
    free.mul_(mask)
    if not parametrizations.is_tensor:
        left = torch.linalg.vector_norm(free)
        if not keep_g or left == 0:
            parametrizations.original0.mul_(left / norm)
        if left == 0:
            free.copy_(mask)
    parametrizations[-1].mask.copy_(mask)
