"""Networks made narrower by the multi-task lasso: each next layer says which channels it can do without (docs/compress.md)."""

import copy
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from conf import BadInput
from measures.chains import Plain, plain_layer, sequential
from measures.geometry import evaluation_mode, flattens, rectifies, trace, trace_layers
from measures.lasso import group_lasso, norms, ridge, scaled, squared_residual
from measures.steps import folded_norm

FIT_IMAGES = 10_000  # at most so many are fitted to, evenly spaced
GRAM_COLUMNS = 12_000  # the largest Gram matrix that is formed, 1.1 GiB; beyond it the features themselves are kept
FEATURE_BYTES = 2**31  # ... of as many images as fit into this
CHUNK = 2**23  # features at once where they are summed up

# What a channel passes through on its own, so that it can be cut together with what makes it.
_POOLS = nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d
_HOMOGENEOUS = nn.Identity, nn.Dropout, nn.Dropout2d, nn.LeakyReLU, *_POOLS
_OTHERS = nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Hardtanh, nn.Hardswish
_FUNCTIONS = torch.max_pool2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.leaky_relu, F.dropout
_NORMS = nn.BatchNorm1d, nn.BatchNorm2d


def balance(net, input_shape):
    """The same function with the least product of Frobenius norms: each neuron's incoming and outgoing weights equal in norm.

    Rescaling neuron k by a > 0 turns (w_k, v_k) into (a w_k, v_k / a). Balancing one layer after the other descends the sum
    of squares of all weights, which is convex in the logarithms of the factors. A neuron that is fed by nothing or feeds
    nothing becomes zero on both sides.

    Args:
        net: a network as `trace_layers` takes it.
        input_shape: (channels, height, width) of an image.
    Returns:
        An nn.Sequential of plain layers.
    """
    layers, weights = _tensors(net, input_shape)
    return _narrow(layers, _balanced(weights))


@torch.no_grad()
def compress(net, images, lam, refit='ridge', tolerance=1e-3):
    """A narrower network of nearly the same function, from unlabelled training images.

    From the input on, layer l + 1 is fitted anew to the features of layer l, with a group lasso whose groups are the
    channels of layer l, weighted by the norms of their filters:

        min_V  1/(2N) ||V Phi - Psi||_F^2  +  lam lam_max sum_k ||w_k|| ||V_k||_F

    Phi are the patches of the narrow network's features, Psi the original network's pre-activations, so that later layers
    repair what earlier ones lost. Channels with V_k = 0 are dropped, and the network is balanced before the first and after
    each fit.

    Args:
        net: a network as `trace_layers` takes it.
        images: (m, C, H, W) training images, as the network sees them; at most FIT_IMAGES of them are used.
        lam: share of lam_max, from which on no channel is kept; 0 < lam < 1.
        refit: 'none' keeps the lasso's weights, which are shrunk; 'ridge' fits the kept channels once more, under a tenth
            of the penalty's quadratic majorizer at the solution. (With no penalty at all the norms explode.)
        tolerance: of the duality gap, relative to the objective.
    Returns:
        (nn.Sequential, report): a dict per hidden layer of channels (kept), residual (||V Phi - Psi|| / ||Psi|| after the
        refit), gap (relative to the objective) and steps.
    Raises:
        BadInput: an argument that makes no sense, a network that is not covered, or a lam at which a layer dies.
    """
    _check(images, lam, refit)
    if images.dim() != 4:
        raise BadInput(f'images of shape {tuple(images.shape)}: must be (m, C, H, W)')
    layers, weights = _tensors(net, tuple(images.shape[1:]))
    original = narrow = _balanced(weights)
    report = []
    for index in range(1, len(layers)):
        problem = _layer_problem(layers[: index + 1], narrow[:index], original[: index + 1], images)
        costs = narrow[index - 1].flatten(1).norm(dim=1)
        V, row = _fit(problem, costs, lam, narrow[index].flatten(2), refit, tolerance, layers[index - 1].name)
        kept = row.pop('kept')
        report.append(row)
        V = V[:, kept].unflatten(2, narrow[index].shape[2:])
        narrow = _balanced([*narrow[: index - 1], narrow[index - 1][kept], V, *narrow[index + 1 :]])
    return _narrow(layers, narrow), report


@torch.no_grad()
def compress_layer(net, images, name, lam, refit='ridge', tolerance=1e-3):
    """A copy of any network with one linear layer fitted anew to as few channels of its input as lam leaves.

    The fit is that of `compress`, V Phi to V_0 Phi with Phi the layer's own input; the layer's bias is held. Where one channel
    of what is in front makes several of the layer's inputs, as a convolution does, these inputs are a group. A group costs
    the norm of its filter together with its bias, since a ReLU is homogeneous in both, after batch normalization between the
    two is folded in; batch normalization behind the ReLU is folded into the layer. Behind another activation all cost the
    same.

    The walk back from the layer goes through ReLUs and other elementwise activations, pooling, dropout, batch normalization
    and flattening to the Conv2d or the Linear that makes the channels. Those that are not kept are cut there too. Where the
    walk ends elsewhere (at a skip connection, a reshape, a grouped convolution, a layer that is used twice), each input is a
    group of cost 1, and the columns of those that are not kept stay, as zeros.

    Args:
        net: any nn.Module; what counts is its function in evaluation mode.
        images: (m, ...) training inputs, as the network sees them; at most FIT_IMAGES of them are used.
        name: of the nn.Linear, as in net.named_modules().
        lam, refit, tolerance: as in `compress`.
    Returns:
        (a network like net, report): channels (how many are kept), kept (boolean, of each channel of net), removed (whether
        the others are cut), residual, gap and steps as in `compress`.
    Raises:
        BadInput: an argument that makes no sense, no such layer, or a lam at which it loses all its channels.
    """
    _check(images, lam, refit)
    layer, source = linear_layer(net, name), _source(net, name)
    channels = layer.in_features // source.taps
    weight = layer.weight.double()
    target = weight * source.scale
    undo = torch.where(source.scale != 0, 1 / source.scale, 0)
    with evaluation_mode(net):
        problem = _problem(_linear_batches(net, name, images, source.shift, undo, target), (channels, source.taps))
    start = target.unflatten(1, (channels, source.taps))
    V, report = _fit(problem, source.costs, lam, start, refit, tolerance, name)
    V, kept, bias = V.flatten(1) * undo, report['kept'], layer.bias
    if source.shift.any():
        bias = (0 if bias is None else bias) + (weight - V) @ source.shift

    other = copy.deepcopy(net)
    report['removed'] = source.name is not None and not kept.all()
    if report['removed']:
        V = V[:, kept.repeat_interleave(source.taps)]
        producer = net.get_submodule(source.name)
        _replace(other, source.name, producer.weight[kept], None if producer.bias is None else producer.bias[kept])
        for norm in map(other.get_submodule, source.norms):
            entries = kept.repeat_interleave(norm.num_features // channels)
            norm.num_features = int(entries.sum())
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                if tensor is not None:
                    tensor.data = tensor.data[entries]
    _replace(other, name, V, bias)
    return other, report


def linear_layer(net, name):
    """The nn.Linear of this name. Raises BadInput where the network has none."""
    linear = {other: module for other, module in net.named_modules() if isinstance(module, nn.Linear)}
    if name not in linear:
        raise BadInput(f'{name}: not a linear layer of {type(net).__name__}; it has {", ".join(linear) or "none"}')
    if not linear[name].weight.isfinite().all():
        raise BadInput(f'{name}: its weights contain NaN or infinity')
    return linear[name]


def _source(net, name):
    """What makes the inputs scale * Phi + shift of a linear layer, where Phi is behind the first activation.

    Returns:
        Namespace of name (of the Conv2d or Linear that makes the channels, None where they cannot be cut), norms (the names
        of the batch norms behind it), taps (inputs per channel), costs (one for each channel), scale and shift (one for each
        input).
    """
    layer, path = net.get_submodule(name), _path(net, name)
    inputs = layer.in_features
    ones = torch.ones(inputs, dtype=torch.float64, device=layer.weight.device)
    source = SimpleNamespace(name=None, norms=[], taps=1, costs=ones, scale=ones, shift=0 * ones)
    if not path:
        return source
    source.name, producer = path[0]
    source.norms = [other for other, module in path if isinstance(module, _NORMS)]
    source.taps = inputs // len(producer.weight)
    weight = producer.weight.double().flatten(1)
    bias = torch.zeros_like(weight[:, 0]) if producer.bias is None else producer.bias.double()
    activated, homogeneous = False, True
    for other, module in path[1:]:
        if isinstance(module, _NORMS):
            factor, offset = folded_norm(module, other)
            if not activated:
                weight, bias = factor[:, None] * weight, factor * bias + offset
            else:
                factor, offset = (entry.repeat_interleave(inputs // len(factor)) for entry in (factor, offset))
                source.scale, source.shift = source.scale * factor, source.shift * factor + offset
        activated |= module is None or isinstance(module, (nn.ReLU, nn.LeakyReLU, *_OTHERS))
        homogeneous &= not isinstance(module, _OTHERS)
    source.costs = (weight.square().sum(1) + bias.square()).sqrt() if homogeneous else torch.ones_like(bias)
    return source


def _path(net, name):
    """(name, module) of what a linear layer's input passes through, from the Conv2d or Linear that makes its channels on.

    The module of a function, as F.relu, is None; flattenings are left out. Nothing where the channels cannot be cut.
    """
    try:
        modules = {node: module for node, module, _ in trace(net)}
    except BadInput:
        return []
    targets = [node.target for node in modules]
    if targets.count(name) != 1:
        return []
    node, path, inputs = list(modules)[targets.index(name)], [], net.get_submodule(name).in_features
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        module = modules[node]
        if len(node.users) != 1 or (isinstance(module, (nn.Conv2d, nn.Linear, *_NORMS)) and targets.count(node.target) != 1):
            return []
        if flattens(node, module) in ((1, -1), (1, 3)):
            continue
        path.insert(0, (node.target, module))
        if isinstance(module, nn.Linear):  # flattened outputs of several positions would mix channels
            return path if module.out_features == inputs else []
        if isinstance(module, nn.Conv2d):
            return path if module.groups == 1 and inputs % module.out_channels == 0 else []
        passed = isinstance(module, (*_HOMOGENEOUS, *_OTHERS, *_NORMS)) or node.target in _FUNCTIONS
        if not passed and not rectifies(node, module):
            return []
    return []


def _linear_batches(net, name, images, shift, undo, target):
    """Yields (Phi, Psi) of a linear layer, as `_problem` takes them: Phi is its input, less the shift, times `undo`."""
    layer, read = net.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].clone()))
    try:
        chosen = _evenly(images, layer.in_features, 1)
        for batch in chosen.split(max(1, CHUNK // layer.in_features)):
            read.clear()
            net(batch)
            if not read or any(inputs.dim() != 2 for inputs in read):
                raise BadInput(f'{name}: its input must be of shape (N, {layer.in_features}), once at least in a forward pass')
            phi = ((torch.cat(read) - shift.to(batch)) * undo.to(batch)).T
            yield phi, target @ phi.double()
    finally:
        handle.remove()


def _replace(net, name, weight, bias):
    """Puts a plain layer of this weight and bias in the place of the Conv2d or Linear of this name."""
    layer = net.get_submodule(name)
    conv = ('stride', 'padding', 'dilation', 'padding_mode') if isinstance(layer, nn.Conv2d) else ()
    parent, _, child = name.rpartition('.')
    plain = plain_layer(weight, bias, **{field: getattr(layer, field) for field in conv})
    setattr(net.get_submodule(parent), child, plain.to(layer.weight.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# The fit of one layer
# ----------------------------------------------------------------------------------------------------------------------


def _check(images, lam, refit):
    if not 0 < lam < 1:
        raise BadInput(f'lam = {lam:g}: must be a share of lam_max, between 0 and 1')
    if refit not in ('none', 'ridge'):
        raise BadInput(f'refit = {refit!r}: must be none or ridge')
    if not len(images) or not images.isfinite().all():
        raise BadInput(f'images of shape {tuple(images.shape)}: must be at least one, without NaN or infinity')


def _fit(problem, costs, lam, start, refit, tolerance, name):
    """(V, report): V (D, K, taps) of the lasso, with 0 where report['kept'] (K,) is False, or of its refit."""
    # In U_k = c_k V_k every channel costs the same, and rescaling channels changes not a single step. Dead ones stay 0.
    scale = torch.where(norms(problem.cross) > 0, 1 / costs, 0)[:, None]
    problem = scaled(problem, scale)
    U, report = group_lasso(problem, lam, torch.where(scale > 0, start * costs[:, None], 0), tolerance)
    kept = norms(U) > 0
    if not kept.any():
        raise BadInput(f'lam = {lam:g}: layer {name} loses all its channels; choose a smaller lam')
    penalty = report.pop('penalty')
    if refit == 'ridge':
        U = ridge(problem, 0.1 * penalty / norms(U), U)
    residual = squared_residual(problem, U, problem.gram(U)) / problem.energy
    report |= {'channels': int(kept.sum()), 'kept': kept, 'residual': math.sqrt(max(0.0, residual))}
    return U * scale, report


def _evenly(images, columns, positions):
    """As many of the images as a fit to features (columns, images * positions) takes."""
    most = FIT_IMAGES
    if columns > GRAM_COLUMNS:
        most = min(most, FEATURE_BYTES // (columns * positions * images.element_size()))
    return images[:: -(-len(images) // max(1, most))]


def _problem(batches, groups):
    """The problem of measures.lasso of batches of features Phi (K taps, n) and targets Psi (D, n); `groups` is (K, taps).

    The Gram matrix is summed up in float64. Where it would be too large, the features are kept instead.
    """
    dense = math.prod(groups) <= GRAM_COLUMNS
    gram, cross, energy, N, features = 0, 0, 0.0, 0, []
    for phi, targets in batches:
        targets, exact = targets.double(), phi.double()
        if dense:
            gram = gram + exact @ exact.T
        else:
            features.append(phi)
        cross, energy, N = cross + targets @ exact.T, energy + targets.square().sum().item(), N + phi.shape[1]

    def times_gram(V):
        V = V.flatten(1)
        product = V @ gram if dense else sum((V @ (phi := part.double())) @ phi.T for part in features)
        return (product / N).view(-1, *groups)

    return SimpleNamespace(gram=times_gram, cross=(cross / N).view(-1, *groups), energy=energy / N)


# ----------------------------------------------------------------------------------------------------------------------
# Bias-free chains
# ----------------------------------------------------------------------------------------------------------------------


def _layer_problem(layers, narrow, original, images):
    """The problem of the last of `layers`: fit its original pre-activations to the features of the narrow ones before it."""
    *before, layer = layers
    positions, taps = layer.taps[0].shape[1] * layer.taps[1].shape[1], math.prod(layer.shape[2:])
    columns = len(narrow[-1]) * taps

    def batches():
        for batch in _evenly(images, columns, positions).split(max(1, CHUNK // (columns * positions))):
            targets = _forward(layer, original[-1], _features(before, original, batch))
            phi = F.unfold(_features(before, narrow, batch), layer.shape[2:], layer.dilation, layer.padding, layer.stride)
            yield (maps.flatten(2).transpose(0, 1).flatten(1) for maps in (phi, targets))

    return _problem(batches(), (len(narrow[-1]), taps))


def _tensors(net, input_shape):
    """The layers of a network and their weights, each as a convolution's (out, in, h, w) in float64."""
    layers = trace_layers(net, input_shape)
    weights = [layer.module.weight.detach().double().reshape(layer.shape) for layer in layers]
    for layer, weight in zip(layers, weights):
        if not weight.isfinite().all():
            raise BadInput(f'{type(net).__name__}: the weights of {layer.name} contain NaN or infinity')
    return layers, weights


def _balanced(weights, tolerance=1e-12):
    weights = list(weights)
    change = 1.0
    while change > tolerance:
        change = 0.0
        for index in range(len(weights) - 1):
            incoming = weights[index].flatten(1).norm(dim=1)
            outgoing = weights[index + 1].transpose(0, 1).flatten(1).norm(dim=1)
            alive = (incoming > 0) & (outgoing > 0)
            factor = torch.where(alive, (outgoing / incoming).sqrt(), 0)
            weights[index] = weights[index] * factor[:, None, None, None]
            weights[index + 1] = weights[index + 1] * torch.where(alive, 1 / factor, 0)[:, None, None]
            change = max([change, *(factor[alive].log().abs().tolist())])
    return weights


def _forward(layer, weight, maps):
    """One layer, seen as a convolution, on maps (N, in, h, w)."""
    return F.conv2d(maps, weight.to(maps.dtype), None, layer.stride, layer.padding, layer.dilation)


def _features(layers, weights, images):
    """The post-activation maps (N, K, h, w) that the layers make of images."""
    for layer, weight in zip(layers, weights):
        images = _forward(layer, weight, images).relu()
    return images


def _narrow(layers, weights):
    """The chain of plain layers with these weights (out, in, h, w), of the dtype of the traced ones."""
    chain = []
    for layer, weight in zip(layers, weights):
        conv = layer.module.weight.ndim == 4
        geometry = {field: getattr(layer, field) for field in ('stride', 'padding', 'dilation')} if conv else {}
        chain.append(Plain(weight if conv else weight.flatten(1), None, layer is not layers[-1], geometry))
    return sequential(chain).to(layers[0].module.weight.dtype)
