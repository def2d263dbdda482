"""The zeros of a network: density, dead channels, spectral gaps of each mask, shared neurons.

`drop_dead` gives the network without its dead channels.

A layer's mask is the bipartite graph between its left nodes, the in * kh * kw entries of a filter,
and its right nodes, the filters, with an edge where the weight is not 0. The eigenvalues of its
adjacency matrix are plus and minus the singular values of the left x right matrix.
"""

import itertools
import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from conf import BadInput
from measures.steps import LAYERS, NotCovered, channel_readers, evaluation_mode, walk
from measures.trace import (
    folded_layers,
    require_counted,
    sequential,
    trace_layers,
    weight_layers,
)


def weight_mask(layer):
    """The mask of a layer's weight, the buffer `mask` of one of its parametrizations, or None."""
    if not parametrize.is_parametrized(layer, 'weight'):
        return None
    masks = [step.mask for step in layer.parametrizations.weight if hasattr(step, 'mask')]
    return masks[0] if masks else None


def density(net):
    """The share of nonzero weights in all convolutions and linear layers, biases left out.

    By the masks: an entry that the mask keeps and is 0 counts. It is 1 without masks.

    Raises:
        BadInput: there are no weights, or weights that are not counted, as `require_counted` says.
    """
    require_counted(net)
    with evaluation_mode(net):
        kept = [_kept(layer) for layer in weight_layers(net).values()]
    total = sum(mask.numel() for mask in kept)
    if not total:
        raise BadInput(f'{type(net).__name__}: has no weights in a convolution or a linear layer')
    return sum(int(mask.count_nonzero()) for mask in kept) / total


def masked_density(net):
    """The same share among the weights of the layers that have a mask; it is 1 where none has."""
    masks = [weight_mask(layer) for layer in weight_layers(net).values()]
    masks = [mask for mask in masks if mask is not None]
    if not masks:
        return 1.0
    kept = sum(int(mask.count_nonzero()) for mask in masks)
    return kept / sum(mask.numel() for mask in masks)


def _kept(layer):
    """The mask of a layer; ones without one."""
    mask = weight_mask(layer)
    return torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask


@torch.no_grad()
def topology(weight):
    """The spectral gaps of a layer's bipartite graph, nodes without an edge left out.

    Args:
        weight: (out, in) or (out, in, kh, kw), with exact zeros where it has no edge.
    Returns:
        A dict, nan where undefined:
            ramanujan_gap   sqrt(d_L - 1) + sqrt(d_R - 1) - sigma_2, with the mean degrees d_L of
                            left and d_R of right nodes (both at least 3, else undefined) and the
                            second singular value of the unweighted graph; of a graph with equal
                            degrees on each side it is at least 0 if that is Ramanujan (Hoang et al.
                            2023)
            imdb            mean of ramanujan_gap over subgraphs, one for each degree of left nodes:
                            those that have it, and all their neighbours. Those where it is
                            undefined are left out, as are then those of fewer than three left
                            nodes, whose d_R is at most 2
            weighted_gap    sigma_1 - sigma_2 of |weight|
    Raises:
        BadInput: not a matrix or a kernel, or a NaN or an infinity in it.
    """
    if weight.ndim not in (2, 4) or not weight.isfinite().all():
        raise BadInput(
            f'weight of shape {tuple(weight.shape)}: must be (out, in) or (out, in, kh, kw), '
            'of finite numbers'
        )
    if not weight.numel():
        return dict.fromkeys(('ramanujan_gap', 'imdb', 'weighted_gap'), math.nan)
    magnitudes = weight.detach().flatten(1).T.abs().double().cpu()
    edges = (magnitudes != 0).double()
    degrees = edges.sum(1)
    gaps = [_ramanujan_gap(edges[degrees == degree]) for degree in degrees.unique()]
    gaps = [gap for gap in gaps if not math.isnan(gap)]
    sigma = torch.linalg.svdvals(magnitudes).tolist() + [0.0]
    return {
        'ramanujan_gap': _ramanujan_gap(edges),
        'imdb': sum(gaps) / len(gaps) if gaps else math.nan,
        'weighted_gap': sigma[0] - sigma[1] if edges.any() else math.nan,
    }


def _ramanujan_gap(edges):
    edges = edges[edges.any(1)][:, edges.any(0)]
    if edges.sum() < 3 * max(edges.shape) or not edges.numel():
        return math.nan
    d_left, d_right = (edges.sum().item() / nodes for nodes in edges.shape)
    sigma_2 = torch.linalg.svdvals(edges)[1].item()
    return math.sqrt(d_left - 1) + math.sqrt(d_right - 1) - sigma_2


@torch.no_grad()
def measure_masks(net):
    """What layers.csv says of each layer's weights, for any network.

    A channel is dead if its filter is zeros or if no later layer reads it. Batch norm, biases and
    skips do not matter to that: a layer reads the channels of every layer whose output, or a sum
    with it, reaches it.

    Returns:
        {name: dict} over the convolutions, transposed too, and linear layers in their order in the
        network, the classifier last, with density, dead_channels and the gaps of `topology`.
        dead_channels is nan where the order of the channels is lost on the way to a reader (in a
        concatenation, a reshape, ...), or the forward pass cannot be traced.
    Raises:
        BadInput: weights that are not counted, as `require_counted` says.
    """
    require_counted(net)
    layers, readers = weight_layers(net), _readers(net)
    with evaluation_mode(net):
        return {
            name: _measure_mask(layer, readers.get(name), layers) for name, layer in layers.items()
        }


def _measure_mask(layer, readers, layers):
    weight, kept = _filters(layer), _kept(layer)
    dead = weight.eq(0).flatten(1).all(1)
    if len(dead) and readers and None not in readers:
        dead |= ~torch.stack([reads(layers[reader], len(dead)) for reader in readers]).any(0)
    return {
        'density': int(kept.count_nonzero()) / kept.numel() if kept.numel() else math.nan,
        'dead_channels': int(dead.sum()) if readers else math.nan,
    } | topology(weight)


def _filters(layer):
    """The weight of a layer with its filters along the first axis, (out, in of a group, ...)."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return layer.weight
    by_group = layer.weight.unflatten(0, (layer.groups, -1))  # (groups, in, out, kh, kw)
    return by_group.transpose(1, 2).flatten(0, 1)


def hidden_readers(net):
    """{hidden layer: the layer that reads it} of a chain; empty with skips, groups or the like."""
    layers, readers = weight_layers(net), _readers(net)
    each = [readers.get(name, ()) for name in layers]
    # In a chain each layer has one reader, the last one the output, and no two have the same.
    if any(len(names) != 1 for names in each) or len(set().union(*each)) < len(layers):
        return {}
    if any(getattr(layer, 'groups', 1) > 1 for layer in layers.values()):
        return {}
    return {layers[name]: layers[reader] for name, (reader,) in zip(layers, each) if reader}


def _readers(net):
    """{layer: {layers that read its channels, None: the network's output}}, all by their names.

    Layers whose channels lose their order on the way are left out.
    """
    try:
        steps = walk(net)
    except NotCovered:
        return {}
    found, lost = {}, set()
    for index, step in enumerate(steps):
        if step.op[0] not in LAYERS:
            continue
        way = channel_readers(steps, index)
        if way is None:
            lost.add(step.name)
            continue
        passed, readers = way
        names = {steps[number].name for number in readers}
        if len(steps) - 1 in passed:
            names.add(None)
        found[step.name] = names | found.get(step.name, set())  # a module may be used twice
    return {name: names for name, names in found.items() if name not in lost}


def reads(layer, channels):
    """Whether the layer has a nonzero weight on each channel of its input, (channels,) boolean.

    The input may be a flattened map.
    """
    with evaluation_mode(layer):  # in training mode spectral_norm would move it
        weight = layer.weight
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.ne(0).flatten(1).any(1)
    weight = weight.flatten(2) if weight.ndim == 4 else weight[..., None]
    by_group = weight.ne(0).reshape(getattr(layer, 'groups', 1), -1, *weight.shape[1:])
    return by_group.any(1).reshape(channels, -1).any(1)


@torch.no_grad()
def neuron_norms(net, input_shape):
    """The weights that come into each hidden neuron or channel and go out of it.

    Args:
        net: a network as `trace_layers` takes it.
        input_shape: (channels, height, width) of an image.
    Returns:
        A list of (inc, out, per) in float64, one for each hidden layer of K channels in front of
        one of D: inc (K,) are the norms of the filters, per (D, K) those of the weights from
        channel k to channel d, over taps or, at a classifier, positions, and out (K,) those of all
        weights out of channel k.
    """
    weights = [layer.kernel.flatten(2) for layer in trace_layers(net, input_shape)]
    return [
        (into.norm(dim=(1, 2)), out.norm(dim=(0, 2)), out.norm(dim=2))
        for into, out in itertools.pairwise(weights)
    ]


@torch.no_grad()
def sharing(net, input_shape):
    """How many neurons each hidden layer uses, and how many of the next layer's share one.

    After Shenouda et al. 2024, "Variation spaces for multi-output neural networks" (JMLR).

    Args:
        net: a network as `trace_layers` takes it.
        input_shape: (channels, height, width) of an image.
    Returns:
        A dict for each hidden layer, in a list; inc, out and per are those of `neuron_norms`:
            active          channels with inc * out above a thousandth of the layer's largest
            participation   mean over active channels of (sum of per^2)^2 / sum of per^4, from 1 to
                            D; nan if there is none
    """
    measured = []
    for inc, out, per in neuron_norms(net, input_shape):
        through = inc * out
        active = through > 1e-3 * through.max()
        squares = per[:, active].square()
        shares = squares.sum(0).square() / squares.square().sum(0)
        measured.append({'active': int(active.sum()), 'participation': shares.mean().item()})
    return measured


@torch.no_grad()
def drop_dead(net):
    """The network without its dead channels: the same function in evaluation mode, up to rounding.

    From the input on, a channel whose filter is zeros has one value everywhere: its bias after the
    ReLU. A reader without padding has this value in its own bias. With padding,
    positions at the border read fewer of its taps, so that no bias is right: there the channel
    stays unless its value is 0. From the output on, channels go that nothing reads any more. One
    pass each way is enough: what the second one drops makes no filter zero. A layer keeps at least
    one channel, so that the zero function has a network too.

    Args:
        net: a network as `folded_layers` takes it, with masks or without.
    Returns:
        An nn.Sequential of plain layers, batch normalization folded in, of the network's dtype.
    Raises:
        BadInput: the network is not a chain.
    """
    layers = folded_layers(net)
    for index in range(len(layers) - 1):
        layer, reader = layers[index : index + 2]
        kept = layer.weight.flatten(1).ne(0).any(1)
        value = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        if layer.rectified:
            value = value.relu()
        if any(reader.geometry.get('padding', ())):
            kept |= value.ne(0)
        kept[0] |= ~kept.any()
        constant = _columns(reader, layer).sum(2) @ torch.where(kept, 0, value)
        if constant.any():
            if reader.bias is not None:
                constant = reader.bias + constant
            reader = reader._replace(bias=constant)
        layers[index : index + 2] = _without(layer, reader, kept)
    for index in reversed(range(len(layers) - 1)):
        layer, reader = layers[index : index + 2]
        kept = _columns(reader, layer).ne(0).any(2).any(0)
        kept[0] |= ~kept.any()
        layers[index : index + 2] = _without(layer, reader, kept)
    return sequential(layers).to(next(net.parameters()).dtype)


def _columns(reader, layer):
    """The weights (out, channels, taps) with which a layer reads the channels of the one before."""
    return reader.weight.reshape(len(reader.weight), len(layer.weight), -1)


def _without(layer, reader, kept):
    """Two layers of a chain with only the `kept` (boolean) of the channels between them."""
    weight = _columns(reader, layer)[:, kept]
    weight = weight.reshape(len(weight), -1, *reader.weight.shape[2:])
    bias = None if layer.bias is None else layer.bias[kept]
    return layer._replace(weight=layer.weight[kept], bias=bias), reader._replace(weight=weight)
