"""Linear layers of any network, fitted anew to fewer channels of their inputs, one alone or several (docs/compress.md)."""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from conf import BadInput
from measures.steps import RELUS, averages, flattens, folded_norm, trace, viewed_as
from measures.trace import evaluation_mode, hooked, images_per_pass, make_plain
from studies.compress.narrow import CHUNK, check_fit, evenly, fit_layer, problem_of

# What each channel passes through on its own, so that it can be cut together with what makes it: types of modules, and
# functions and methods as they are traced.
_PASSED = {
    'norm': (nn.BatchNorm1d, nn.BatchNorm2d),
    'rectifier': (nn.ReLU, nn.LeakyReLU, F.leaky_relu, *RELUS),
    'activation': (
        *(nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Hardtanh, nn.Hardswish),
        *(
            torch.tanh,
            'tanh',
            torch.sigmoid,
            'sigmoid',
            F.gelu,
            F.silu,
            F.elu,
            F.softplus,
            F.hardtanh,
            F.hardswish,
        ),
    ),
    'pooling': (
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d),
        *(torch.max_pool2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    ),
    'nothing': (nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout),
}
_KINDS = {what: kind for kind, several in _PASSED.items() for what in several}


@torch.no_grad()
def compress_layer(
    net, images, name, lam, refit='ridge', tolerance=1e-3, cost='incoming', remove=True
):
    """A copy of any network with linear layers fitted anew, each to as few channels of its input as lam leaves.

    The fit is that of `compress`, V Phi to V_0 Phi_0 with Phi the layer's own input in the network narrowed so far, and V_0 and
    Phi_0 those of net; the layer's bias is held. Several layers are fitted from the input on, so that later ones repair what
    earlier ones lost. Where one channel of what is in front makes several of a layer's inputs, as a convolution does, these
    inputs are a group. A group costs the norm of its filter together with its bias, since a ReLU is homogeneous in both, after
    batch normalization between the two is folded in; batch normalization behind the ReLU is folded into the layer. Behind
    another activation all cost the same. The objective does not change when copies of a channel share its weights in another
    way: they are not merged, and may all stay.

    The walk back from a layer goes through ReLUs and other elementwise activations, pooling, means over all positions, dropout,
    batch normalization and flattening to the Conv2d or the Linear that makes the channels. Those that are not kept are cut
    there too. Where the walk ends elsewhere (at a skip connection, a reshape, a grouped convolution, a layer that is used
    twice), each input is a group of cost 1, and the columns of those that are not kept stay, as zeros. They also stay where
    the channels go through a view to a fixed number of columns, which no narrower map would fit.

    Args:
        net: any nn.Module; what counts is its function in evaluation mode.
        images: (m, ...) training inputs, as the network sees them; at most FIT_IMAGES of them are used.
        name: of the nn.Linear, as in net.named_modules(), or a list of such names, in any order.
        lam, refit, tolerance: as in `compress`.
        cost: 'incoming' as above, or 'one' for groups that all cost the same (then the scale of a channel matters).
        remove: False leaves zeros in place of the channels that are not kept.
    Returns:
        (a network like net, report): channels (how many are kept), kept (boolean, of each channel in front of the layer),
        removed (whether the others are cut), why (why not, '' where they are), residual, gap and steps as in `compress`. For a
        list of names, {name: report} in the order of the fits.
    Raises:
        BadInput: an argument that makes no sense, no such layer, or a lam at which one loses all its channels.
    """
    check_fit(images, lam, refit)
    if cost not in ('incoming', 'one'):
        raise BadInput(f'cost = {cost!r}: must be incoming or one')
    if not name:
        raise BadInput('name: at least one layer is needed')
    once = _once_an_image(net, images[:1], [name] if isinstance(name, str) else {*name})
    narrow, reports = net, {}
    for each in once:
        source = _source(narrow, each, once[each])
        V, bias, report = _fitted(net, narrow, images, each, source, (lam, refit, tolerance, cost))
        kept = report['kept']
        why = 'all channels are kept' if kept.all() else source.why if remove else 'remove = False'
        reports[each] = report | {'removed': not why, 'why': why}
        narrow = copy.deepcopy(narrow)
        if not why:
            V = V[:, kept.repeat_interleave(source.taps)]
            for other in (source.name, *source.norms):
                _cut(narrow.get_submodule(other), kept)
        set_tensors(
            narrow.get_submodule(each), weight=V.to(net.get_submodule(each).weight.dtype), bias=bias
        )
    return narrow, reports[name] if isinstance(name, str) else reports


def linear_layer(net, name):
    """The nn.Linear of this name. Raises BadInput where the network has none."""
    linear = {
        other: module for other, module in net.named_modules() if isinstance(module, nn.Linear)
    }
    if name not in linear:
        raise BadInput(
            f'{name!r}: not a linear layer of {type(net).__name__}; it has {", ".join(linear) or "none"}'
        )
    if not linear[name].weight.isfinite().all():
        raise BadInput(f'{name}: its weights contain NaN or infinity')
    return linear[name]


def set_tensors(module, **tensors):
    """Gives a Conv2d, a Linear or a batch norm other tensors, plain ones, and the sizes that go with them."""
    make_plain(module)
    for name, tensor in tensors.items():
        parameter = name in ('weight', 'bias') and tensor is not None
        setattr(module, name, nn.Parameter(tensor) if parameter else tensor)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = (
            len(module.weight),
            module.weight.shape[1] * module.groups,
        )
    else:
        module.num_features = len(next(iter(tensors.values())))


def _cut(module, kept):
    """Leaves a Conv2d, a Linear or a batch norm only the kept (boolean) of the channels that it makes, or normalizes."""
    fields = ('weight', 'bias', 'running_mean', 'running_var')
    tensors = {
        name: tensor for name in fields if (tensor := getattr(module, name, None)) is not None
    }
    entries = kept.repeat_interleave(len(next(iter(tensors.values()))) // len(kept))
    set_tensors(module, **{name: tensor[entries] for name, tensor in tensors.items()})


# ----------------------------------------------------------------------------------------------------------------------
# The fit
# ----------------------------------------------------------------------------------------------------------------------


def _once_an_image(net, image, names):
    """{name: whether an image makes one row of the layer's input, once}, in the order in which they are called first."""
    layers, read = {linear_layer(net, name): name for name in names}, {}

    def note(layer, inputs, output):
        read.setdefault(layers[layer], []).append(inputs[0].shape)

    try:
        with evaluation_mode(net), hooked(layers, note):
            net(image)
    except (RuntimeError, ValueError, IndexError) as error:
        kind, reason = type(net).__name__, str(error).partition('\n')[0]
        raise BadInput(
            f'images: {kind} does not take one of shape {tuple(image.shape)} ({reason})'
        ) from None
    for name in names:
        if any(len(shape) != 2 for shape in read.get(name, [()])):
            size = f'(N, {net.get_submodule(name).in_features})'
            raise BadInput(
                f'{name}: its input must be of shape {size}, once at least in a forward pass'
            )
    return {name: [shape[0] for shape in shapes] == [1] for name, shapes in read.items()}


def _fitted(net, narrow, images, name, source, options):
    """The weight V of a layer in float64, its bias, and the report of the fit."""
    lam, refit, tolerance, cost = options
    layer = net.get_submodule(name)
    groups = layer.in_features // source.taps, source.taps
    target = layer.weight.double() * source.scale
    undo = torch.where(source.scale != 0, 1 / source.scale, 0)
    chosen = evenly(images, layer.in_features, 1)
    size = images_per_pass(net, chosen)

    def features(other, batch):
        return (
            (_inputs(other, name, batch.split(size)) - source.shift.to(batch)) * undo.to(batch)
        ).T

    def batches():
        for batch in chosen.split(max(1, CHUNK // layer.in_features)):
            phi = features(narrow, batch)
            yield phi, target @ (phi if narrow is net else features(net, batch)).double()

    with evaluation_mode(net), evaluation_mode(narrow):
        problem = problem_of(batches(), groups)
    costs = source.costs if cost == 'incoming' else torch.ones_like(source.costs)
    V, report = fit_layer(problem, costs, lam, target.unflatten(1, groups), refit, tolerance, name)
    V, bias = V.flatten(1) * undo, layer.bias
    if source.shift.any():
        bias = (0 if bias is None else bias) + (layer.weight.double() - V) @ source.shift
    return V, None if bias is None else bias.to(layer.weight.dtype).clone(), report


def _inputs(net, name, batches):
    """The inputs (N, in_features) of a linear layer, of batches of images."""
    read = []
    with hooked(
        [net.get_submodule(name)], lambda layer, inputs, output: read.append(inputs[0].clone())
    ):
        for batch in batches:
            net(batch)
    return torch.cat(read)


# ----------------------------------------------------------------------------------------------------------------------
# What makes the inputs
# ----------------------------------------------------------------------------------------------------------------------


def _source(net, name, once):
    """What makes the inputs scale * Phi + shift of a linear layer, where Phi is behind the first activation.

    Returns:
        Namespace of name (of the Conv2d or Linear that makes the channels), why ('', or why they cannot be cut), norms (the
        names of the batch norms behind it), taps (inputs per channel), costs (one for each channel), scale and shift (one for
        each input).
    """
    layer = net.get_submodule(name)
    inputs = layer.in_features
    ones = torch.ones(inputs, dtype=torch.float64, device=layer.weight.device)
    source = SimpleNamespace(why='', norms=[], taps=1, costs=ones, scale=ones, shift=0 * ones)
    try:
        (source.name, producer), *path = _path(net, name, once)
    except BadInput as error:
        source.why = str(error)
        return source
    source.taps = inputs // len(producer.weight)
    weight = producer.weight.double().flatten(1)
    bias = torch.zeros_like(weight[:, 0]) if producer.bias is None else producer.bias.double()
    active = False
    for kind, (other, module) in path:
        if kind == 'fixed':
            source.why = f'{other}: it wants a fixed number of channels; write x.flatten(1)'
        if kind == 'norm':
            source.norms.append(other)
            factor, offset = folded_norm(module, other)
            if not active:
                weight, bias = factor[:, None] * weight, factor * bias + offset
            else:
                factor, offset = (
                    entry.repeat_interleave(inputs // len(factor)) for entry in (factor, offset)
                )
                source.scale, source.shift = source.scale * factor, source.shift * factor + offset
        active |= kind in ('rectifier', 'activation')
    homogeneous = all(kind != 'activation' for kind, _ in path)
    source.costs = (
        (weight.square().sum(1) + bias.square()).sqrt() if homogeneous else torch.ones_like(bias)
    )
    return source


def _path(net, name, once):
    """The Conv2d or Linear that makes the channels of a layer's input, and what they pass through from there on.

    Returns:
        [(name, module), (kind, (name, module)), ...], flattenings left out but for views to a fixed number of columns.
    Raises:
        BadInput: the channels cannot be cut, and why.
    """
    modules = {node: (module, what) for node, module, what in trace(net)}
    targets = [node.target for node in modules]
    if not once:
        raise BadInput(f'{name}: its input is not one row an image')
    node, path, inputs = list(modules)[targets.index(name)], [], net.get_submodule(name).in_features
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        module, what = modules[node]
        if len(node.users) != 1:
            raise BadInput(f'{what} is read more than once')
        if module is not None and targets.count(node.target) != 1:
            raise BadInput(f'{what} is used more than once')
        if viewed_as(node) == (-1, inputs) or node.meta.get(
            'fixed'
        ):  # a flattening, since it makes one row an image
            path.insert(0, ('fixed', (what, None)))
            continue
        if flattens(node, module) in ((1, -1), (1, 3)):
            continue
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            _check_producer(module, what, path, inputs)
            return [(node.target, module), *path]
        kind = (
            'pooling'
            if averages(node)
            else _KINDS.get(node.target if module is None else type(module))
        )
        if kind is None or node.op == 'placeholder':
            raise BadInput(f'{what}: the walk back ends there')
        path.insert(0, (kind, (node.target, module)))
    raise BadInput(f'{modules[node][1]}: the walk back ends there')


def _check_producer(module, what, path, inputs):
    """Raises BadInput where the channels that a Conv2d or a Linear makes do not reach the layer each as a group of inputs."""
    channels, kinds = len(module.weight), [kind for kind, _ in path]
    if getattr(module, 'groups', 1) != 1:
        raise BadInput(f'{what} is grouped')
    if inputs % channels or (
        isinstance(module, nn.Linear) and (inputs != channels or 'pooling' in kinds)
    ):
        raise BadInput(
            f'{what}: its {channels} channels do not make the {inputs} inputs one group each'
        )
    for kind, (other, norm) in path:
        if kind in ('rectifier', 'activation'):
            return
        if kind == 'norm' and norm.num_features != channels:
            raise BadInput(
                f'{other} normalizes the positions of a channel in front of its activation, each on its own'
            )
