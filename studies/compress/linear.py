"""Linear layers of any network, fitted again to fewer input channels (docs/compress.md)."""

from collections import Counter
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from conf import BadInput
from measures.steps import RELUS, averages, evaluation_mode, flattens, folded_norm, trace, viewed_as
from measures.trace import (
    copied,
    hooked,
    images_per_pass,
    make_plain,
    require_own_weights,
    taking,
)
from studies.compress.narrow import CHUNK, check_fit, fit_layer, problem_of, subsample

# Modules, functions and methods that act on each channel by itself: a channel that no layer reads
# can be removed through them from the layer that makes it.
_PASSED = {
    'norm': (nn.BatchNorm1d, nn.BatchNorm2d),
    'rectifier': (nn.ReLU, nn.LeakyReLU, F.leaky_relu, *RELUS),
    'activation': (
        *(nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Hardtanh, nn.Hardswish),
        *(torch.tanh, 'tanh', torch.sigmoid, 'sigmoid'),
        *(F.gelu, F.silu, F.elu, F.softplus, F.hardtanh, F.hardswish),
    ),
    'pooling': (
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d),
        *(torch.max_pool2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    ),
    'nothing': (nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout),
}
_KINDS = {type_: kind for kind, types in _PASSED.items() for type_ in types}
FIELDS = 'weight', 'bias', 'running_mean', 'running_var'


@torch.no_grad()
def compress_layer(
    net, images, name, lam, refit='ridge', tolerance=1e-3, cost='incoming', remove=True
):
    """A copy of any network whose linear layers read as few of their input channels as lam allows.

    As in `compress`, V Phi is fitted to V_0 Phi_0: Phi is the layer's input in the network
    narrowed so far, V_0 and Phi_0 are the weight and the input in net, and the layer's bias is
    held. Several layers are fitted from the input on, so that later ones correct the errors of
    earlier ones. If a channel of an earlier layer makes several of the inputs, as with a
    convolution, these inputs are a group. A group costs the norm of the channel's filter together
    with its bias, since a ReLU is homogeneous in both; batch normalization between the two is
    folded into the filter, and batch normalization after the ReLU into the layer. With another
    activation all groups cost the same. Copies of a channel are not merged, since the objective
    does not change when they share their weights in another way.

    The search for the layer that makes the channels, a Conv2d or a Linear, goes back through
    elementwise activations, pooling, means over all positions, dropout, batch normalization and
    flattening; the channels that are not kept are removed there too. If it ends elsewhere (at a
    skip connection, a reshape, a grouped convolution, a layer that is used twice), each input is
    a group of cost 1, and columns that are not kept stay as zeros. They also stay if the channels
    pass a view to a fixed number of columns, which takes no fewer.

    Args:
        net: any nn.Module; its function in evaluation mode counts.
        images: (m, ...) training inputs, as the network sees them; at most FIT_IMAGES are used.
        name: of the nn.Linear, as in net.named_modules(), or a list of names in any order.
        lam, refit, tolerance: as in `compress`.
        cost: 'incoming' as above, or 'one': every group costs 1, and the scale of channels matters.
        remove: False leaves zeros in the columns of the channels that are not kept.
    Returns:
        (a network like net, report): channels (their number that is kept), kept (boolean, of each
        input channel of the layer), removed (whether the others are removed), why (the reason if
        they are not, else ''), residual, gap and steps as in `compress`. For a list of names,
        {name: report} in the order of the fits.
    Raises:
        BadInput: an invalid argument, no such layer, or a lam at which a layer loses all channels.
    """
    check_fit(images, lam, refit)
    require_own_weights(net)
    if cost not in ('incoming', 'one'):
        raise BadInput(f'cost = {cost!r}: must be incoming or one')
    names = [name] if isinstance(name, str) else list(name)
    if not names:
        raise BadInput('name: at least one layer is needed')
    narrow, reports = net, {}
    with evaluation_mode(net):
        order = _order(net, images[:1], names)
    for each, one_row in order.items():
        # Weights too are read in evaluation mode: spectral_norm changes them in training mode.
        with evaluation_mode(net), evaluation_mode(narrow):
            source = _source(narrow, each, one_row)
            if cost == 'one':
                source.costs = torch.ones_like(source.costs)
            V, bias, report = _fit(net, narrow, images, each, source, (lam, refit, tolerance))
        kept, why = report['kept'], source.why
        if not remove:
            why = 'remove = False'
        if kept.all():
            why = 'all channels are kept'
        reports[each] = report | {'removed': not why, 'why': why}
        narrow = copied(narrow)
        if not why:
            V = V[:, kept.repeat_interleave(source.taps)]
            for other in (source.name, *source.norms):
                _remove_channels(narrow.get_submodule(other), kept)
        set_tensors(narrow.get_submodule(each), {'weight': V, 'bias': bias})
    return narrow, reports[name] if isinstance(name, str) else reports


def linear_layer(net, name):
    """The nn.Linear of this name. Raises BadInput if there is none, or with weights not finite."""
    linear = {key: module for key, module in net.named_modules() if isinstance(module, nn.Linear)}
    if name not in linear:
        names = ', '.join(linear) or 'none'
        raise BadInput(f'{name!r}: not a linear layer of {type(net).__name__}; it has {names}')
    weight = linear[name].weight
    if not weight.numel():
        raise BadInput(f'{name} (Linear) has no weights')
    if weight.is_complex():
        raise BadInput(f'{name} (Linear) has complex weights, which are not covered')
    if not weight.isfinite().all():
        raise BadInput(f'{name}: its weights contain NaN or infinity')
    return linear[name]


def set_tensors(module, tensors):
    """Replaces tensors, {field: tensor or None}, of a Conv2d, a Linear or a batch norm.

    The module's parametrizations end, and its sizes follow the tensors.
    """
    make_plain(module)
    for field, tensor in tensors.items():
        if tensor is not None and field in ('weight', 'bias'):
            tensor = nn.Parameter(tensor)
        setattr(module, field, tensor)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels = len(module.weight)
        module.in_channels = module.weight.shape[1] * module.groups
    else:
        module.num_features = len(module.running_mean)


def _remove_channels(module, kept):
    """Removes all but the kept (boolean) output channels of a Conv2d, a Linear or a batch norm."""
    make_plain(module)
    tensors = {}
    for field in FIELDS:
        tensor = getattr(module, field, None)
        if tensor is not None:
            # A BatchNorm1d of a flattened map has several entries for each channel.
            tensors[field] = tensor[kept.repeat_interleave(len(tensor) // len(kept))]
    set_tensors(module, tensors)


# --------------------------------------------------------------------------------------------------
# The fit
# --------------------------------------------------------------------------------------------------


def _order(net, image, names):
    """{name: whether an image makes exactly one row of the layer's input}, in order of calls."""
    for name in names:
        linear_layer(net, name)
    with taking(net, image):
        read = _inputs(net, names, [image])
    for name in names:
        if name not in read or any(rows.ndim != 2 for rows in read[name]):
            shape = f'(N, {net.get_submodule(name).in_features})'
            raise BadInput(f'{name}: must read an input of shape {shape} in each forward pass')
    return {name: [len(rows) for rows in calls] == [1] for name, calls in read.items()}


def _inputs(net, names, batches):
    """{name: the inputs of each call of a layer}, over batches of images, by the order of calls."""
    names = {net.get_submodule(name): name for name in names}
    read = {}

    def note(layer, inputs, output):
        read.setdefault(names[layer], []).append(inputs[0].clone())

    with hooked(net, names, note):
        for batch in batches:
            net(batch.clone())  # a first step may work in place
    return read


def _fit(net, narrow, images, name, source, options):
    """The new weight (D, inputs) and bias of a layer, and the report of the fit.

    The layer's inputs are scale * phi + shift, of activations phi before batch normalization. The
    fit is to phi, in which the costs are meant, with the target weight * scale; its solution is
    then divided by scale, and the bias takes what the shift contributes to the columns that are
    dropped.
    """
    layer = net.get_submodule(name)
    groups = len(source.costs), source.taps
    target = layer.weight.double() * source.scale
    undo = torch.where(source.scale != 0, 1 / source.scale, 0)
    chosen = subsample(images, layer.in_features, 1)
    size = images_per_pass(net, chosen)

    def features(other, batch):
        inputs = torch.cat(_inputs(other, [name], batch.split(size))[name])
        return ((inputs - source.shift.to(inputs)) * undo.to(inputs)).T

    def batches():
        for batch in chosen.split(max(1, CHUNK // layer.in_features)):
            phi = features(narrow, batch)
            original = phi if narrow is net else features(net, batch)
            yield phi, target @ original.double()

    problem = problem_of(batches(), groups)
    V, report = fit_layer(problem, source.costs, target.unflatten(1, groups), name, *options)
    V, bias, dtype = V.flatten(1) * undo, layer.bias, layer.weight.dtype
    if source.shift.any():
        dropped = (layer.weight.double() - V) @ source.shift
        bias = dropped if bias is None else bias + dropped
    if bias is not None:
        bias = bias.to(dtype, copy=True)
    return V.to(dtype), bias, report


# --------------------------------------------------------------------------------------------------
# What makes the inputs
# --------------------------------------------------------------------------------------------------


def _source(net, name, one_row):
    """What makes the inputs, scale * phi + shift, of a linear layer.

    phi is the output of the first activation after the producer, the layer that makes the channels.

    Returns:
        Namespace of name (of the producer), why ('', or why its channels cannot be removed), norms
        (names of the batch norms between the two), taps (inputs per channel), costs (of each
        channel), scale and shift (of each input).
    """
    layer = net.get_submodule(name)
    inputs = layer.in_features
    ones = torch.ones(inputs, dtype=torch.float64, device=layer.weight.device)
    source = SimpleNamespace(why='', norms=[], taps=1, costs=ones, scale=ones, shift=0 * ones)
    try:
        if not one_row:
            raise BadInput(f'{name}: its input is not one row per image')
        source.name, producer, path = _path(net, name, inputs)
    except BadInput as error:
        source.why = str(error)
        return source
    source.taps = inputs // len(producer.weight)
    weight = producer.weight.double().flatten(1)
    bias = torch.zeros_like(weight[:, 0]) if producer.bias is None else producer.bias.double()
    kinds = [kind for kind, _, _ in path]
    for index, (kind, other, module) in enumerate(path):
        if kind == 'fixed':
            source.why = f'{other}: takes a fixed number of channels; write x.flatten(1)'
        if kind != 'norm':
            continue
        source.norms.append(other)
        factor, offset = folded_norm(module, other)
        if 'rectifier' in kinds[:index] or 'activation' in kinds[:index]:
            repeats = inputs // len(factor)
            factor, offset = factor.repeat_interleave(repeats), offset.repeat_interleave(repeats)
            source.scale = source.scale * factor
            source.shift = source.shift * factor + offset
        else:
            weight = factor[:, None] * weight
            bias = factor * bias + offset
    source.costs = (weight.square().sum(1) + bias.square()).sqrt()
    if 'activation' in kinds:  # it is not homogeneous
        source.costs = torch.ones_like(bias)
    return source


def _path(net, name, inputs):
    """The producer of a linear layer's input channels, and what lies between them.

    Returns:
        Name and module of the Conv2d or Linear, and [(kind, name, module), ...] in the order of the
        forward pass: kinds as in _PASSED, and 'fixed' for a view to a fixed number of columns.
    Raises:
        BadInput: the channels cannot be removed, and why.
    """
    traced = {node: (module, what) for node, module, what in trace(net)}
    calls = Counter(node.target for node in traced if node.op == 'call_module')
    node = next(node for node in traced if node.op == 'call_module' and node.target == name)
    what, path = name, []
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        module, what = traced[node]
        if len(node.users) != 1:
            raise BadInput(f'{what} is read more than once')
        # A module without tensors, as a ReLU, can be called any number of times.
        if module is not None and module.state_dict() and calls[node.target] != 1:
            raise BadInput(f'{what} is used more than once')
        # One row per image enters the layer, so that a view to (-1, inputs) is a flattening.
        if viewed_as(node) == (-1, inputs) or node.meta.get('fixed'):
            path.insert(0, ('fixed', what, None))
            continue
        if flattens(node, module) in ((1, -1), (1, 3)):
            continue
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            _check_producer(module, what, path, inputs)
            return node.target, module, path
        kind = _KINDS.get(node.target if module is None else type(module))
        if averages(node):
            kind = 'pooling'
        if kind is None or node.op == 'placeholder':
            break
        path.insert(0, (kind, node.target, module))
    raise BadInput(f'{what}: its channels cannot be followed to one layer that makes them')


def _check_producer(module, what, path, inputs):
    """Raises BadInput unless each channel of a Conv2d or Linear makes one group of inputs."""
    channels = len(module.weight)
    kinds = [kind for kind, _, _ in path]
    if getattr(module, 'groups', 1) != 1:
        raise BadInput(f'{what} is grouped')
    mixed = isinstance(module, nn.Linear) and (inputs != channels or 'pooling' in kinds)
    if inputs % channels or mixed:
        groups = f'its {channels} channels do not make the {inputs} inputs one group each'
        raise BadInput(f'{what}: {groups}')
    for kind, other, norm in path:
        if kind in ('rectifier', 'activation'):
            return
        if kind == 'norm' and norm.num_features != channels:
            positions = 'normalizes the positions of a channel before its activation'
            raise BadInput(f'{other} {positions}, each on its own')
