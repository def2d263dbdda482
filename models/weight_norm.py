"""Weight normalization with one scalar per layer (Salimans and Kingma 2016), and masks.

The weight is W = g V / ||V||. A mask M applies to it, and the masked entries of V are set to 0, so
that W = g (V * M) / ||V * M||. The gradient of a masked entry is 0, and so are its weight decay
and, once it is 0, its momentum: the entry stays exactly 0 without any work per step. A mask changes
in place, since a captured CUDA graph keeps its address.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize


class WeightNorm(nn.Module):
    """The effective weight g V / ||V||, with the norm of the whole tensor V and one scalar g."""

    def forward(self, g, v):
        return v * (g / torch.linalg.vector_norm(v))

    def right_inverse(self, weight):
        norm = torch.linalg.vector_norm(weight)
        # A zero weight has no direction: V becomes ones and g is 0, since V = 0 would give 0 / 0.
        return norm, torch.where(norm == 0, 1, weight)


class Mask(nn.Module):
    """The weight with exact zeros where the boolean buffer `mask` is False."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer('mask', torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight):
        # Unlike a product, `where` keeps the strides of the weight, on which last digits depend.
        return torch.where(self.mask, weight, 0)

    def right_inverse(self, weight):
        return torch.where(self.mask, weight, 0)


def weight_norm(layer):
    """Parametrizes the weight of a layer as g V / ||V||, without changing its value; returns it.

    Afterwards `layer.weight` is the effective weight.
    """
    parametrize.register_parametrization(layer, 'weight', WeightNorm())
    return layer


def add_masks(net, settings):
    """Adds all-ones masks to the prunable layers, where a setting prunes; returns the network.

    To be called before the optimizer is made, since masks change the names of parameters.
    """
    if settings.density < 1 or settings.prune_rounds:
        layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        if settings.prune_layers != 'all':
            layers.pop()  # the classifier
        for layer in layers:
            parametrize.register_parametrization(layer, 'weight', Mask(layer.weight))
    return net


def free_weight(layer):
    """The parameter of a masked weight: V of a weight-normalized layer, else W itself."""
    parametrizations = layer.parametrizations.weight
    if parametrizations.is_tensor:
        return parametrizations.original
    return parametrizations.original1


@torch.no_grad()
def set_mask(layer, mask, keep_g=False):
    """Sets the mask of a layer; weights that it newly includes start at 0.

    Args:
        layer: a layer with a mask.
        mask: boolean tensor of the shape of its weight.
        keep_g: False: the weights that stay keep their effective values, for which g shrinks as
            ||V|| does. True: g stays and they grow instead. A new network so keeps the norms of its
            layers, without which a sparse one may not learn.
    """
    parametrizations = layer.parametrizations.weight
    free = free_weight(layer)
    before = torch.linalg.vector_norm(free)
    free.mul_(mask)
    if not parametrizations.is_tensor:
        after = torch.linalg.vector_norm(free)
        if not keep_g or after == 0:
            parametrizations.original0.mul_(after / before)
        # Where only zeros stay, V has no direction: it becomes ones, with g = 0.
        if after == 0:
            free.copy_(mask)
    parametrizations[-1].mask.copy_(mask)
