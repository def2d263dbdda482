"""Networks as the measures see them: their layers as a chain, plain copies, and their outputs on a
whole set."""

import contextlib
import copy
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from conf import BadInput
from measures.steps import (
    COMPUTES_WEIGHTS,
    LAYER_TYPES,
    NotCovered,
    compiled,
    computes_weights,
    evaluation_mode,
    forward_steps,
    named,
    quantized,
    read_weights,
    refuse,
    require_values,
    walk,
)

# The arguments of a convolution that shape its maps, with their defaults.
_GEOMETRY = {'stride': (1, 1), 'padding': (0, 0), 'dilation': (1, 1)}
_CHAINS = 'expected convolutions, a flattening, linear layers, and ReLUs after them'
_THEOREMS = 'the theorems are about bias-free networks of Conv2d, ReLU, Flatten and Linear'


# --------------------------------------------------------------------------------------------------
# Chains
# --------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer of a chain in float64.

    `weight` is (out, in, h, w) of a convolution, (out, in) of a linear layer, and `bias` (out,) or
    None; `rectified` says whether a ReLU follows; `geometry` has a convolution's arguments stride,
    padding and dilation. `trace_layers` adds `taps`: for the vertical and the horizontal axis the
    boolean array (kernel, outputs, inputs) that says which tap of which output position reads which
    input position; a tap that lies in the padding reads none. There a linear layer is a convolution
    whose kernel covers the whole map.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    rectified: bool
    geometry: dict
    name: str = ''
    taps: list | None = None

    @property
    def is_linear(self):
        return self.weight.ndim == 2

    @property
    def in_size(self):
        """(height, width) of the input map."""
        return tuple(axis.shape[2] for axis in self.taps)

    @property
    def kernel(self):
        """The weight as a convolution's, (out, in, h, w)."""
        return self.weight.reshape(len(self.weight), -1, *(axis.shape[0] for axis in self.taps))

    def forward(self, kernel, maps):
        """The pre-activations (N, out, h', w') of maps (N, in, H, W), with this kernel."""
        if self.is_linear:
            return (maps.flatten(1) @ kernel.flatten(1).T)[:, :, None, None]
        return F.conv2d(maps, kernel, **self.geometry)


def features(layers, kernels, images):
    """The maps (N, K, h, w) after layers with kernels (out, in, h, w), of images (N, C, H, W)."""
    for layer, kernel in zip(layers, kernels):
        images = layer.forward(kernel.to(images.dtype), images).relu()
    return images


def trace_layers(net, input_shape):
    """The weight layers of a bias-free ReLU network in evaluation mode.

    Args:
        net: any nn.Module whose forward pass is a chain of (Conv2d, ReLU) or (Linear, ReLU), a
            flattening, and a last Linear.
        input_shape: (channels, height, width) of an image.
    Returns:
        A list of Layer with taps, in the order of the forward pass; the weights are copies.
    Raises:
        NotCovered: the network has biases, skip connections or modules that the theory does not
            cover; all are named.
        BadInput: the weights contain NaN or infinity, or the shape is none of an image.
    """
    require_values(net)
    return _trace_layers(net, input_shape)


def _trace_layers(net, input_shape):
    """`trace_layers`, also of a network on the meta device, which has a geometry and no values."""
    if not isinstance(input_shape, (tuple, list)) or len(input_shape) != 3:
        given = str(input_shape).partition('\n')[0]
        raise BadInput(f'input_shape = {given}: must be (channels, height, width)')
    steps = walk(net)
    _chain(net, steps, bias_free=True)
    (channels, *size), layers = input_shape, []
    for layer in _chain(net, read_weights(net, steps)):
        maps = f'{channels} channels of {size[0]}x{size[1]}'
        kernel, inputs = layer.weight.shape[2:], channels
        if layer.is_linear:
            kernel, inputs = size, channels * size[0] * size[1]
        geometry = [layer.geometry.get(name, default) for name, default in _GEOMETRY.items()]
        taps = [_taps(*axis) for axis in zip(size, kernel, *geometry)]
        if layer.weight.shape[1] != inputs or not all(axis.shape[1] for axis in taps):
            raise NotCovered(
                f'{type(net).__name__}: {layer.name}: does not fit its input of {maps}'
            )
        if not all(axis.any() for axis in taps):
            raise NotCovered(f'{type(net).__name__}: {layer.name}: reads nothing but its padding')
        layers.append(layer._replace(taps=taps))
        channels, size = len(layer.weight), [axis.shape[1] for axis in taps]
    return layers


def not_covered(net, input_shape):
    """Why the theorems about bias-free chains do not cover a network; None if they do."""
    try:
        _trace_layers(net, input_shape)
    except BadInput as error:
        return str(error)


def folded_layers(net):
    """The layers of a chain in evaluation mode with batch norms folded in: Layers without taps.

    Args:
        net: a chain of Conv2d or Linear, each followed by batch normalization, by a ReLU, by both
            or by none of them, with a flattening in front of the first Linear. Weights may be
            parametrized.
    Raises:
        NotCovered: it is not such a chain, and what is in the way is named.
        BadInput: the weights contain NaN or infinity.
    """
    return _chain(net, forward_steps(net))


def _chain(net, steps, bias_free=False):
    """The layers of steps that are a chain; what keeps them from being one is refused by name.

    With `bias_free` the steps come from `walk`, without weights, and the chain has a ReLU
    between any two layers and a linear classifier at its end.
    """
    layers, flat, obstacles = [], False, []
    for number, step in enumerate(steps[1:]):
        kind, *how = step.op
        reasons = [step.obstacle] if step.obstacle else []
        if step.inputs != (number,) and not reasons:
            reasons.append(
                ': does not read the step before it alone; skip connections are not covered'
            )
        elif kind in ('conv', 'linear'):
            reasons += _layer_obstacles(step, flat)
            if bias_free and step.module.bias is not None:
                reasons.append(' has a bias')
            if bias_free and layers and not layers[-1].rectified:
                reasons.append(' follows a layer without a ReLU between them')
            geometry = dict(zip(_GEOMETRY, how))
            layers.append(Layer(step.weight, step.bias, False, geometry, step.name))
        elif kind == 'flatten':
            flat = True
            if how not in ([1, -1], [1, 3]):
                reasons.append(': flattens other than the dimensions 1 to -1')
        elif kind == 'relu' and how == [0]:
            if not layers:
                reasons.append(' comes before the first layer; rectify the images instead')
            else:
                layers[-1] = layers[-1]._replace(rectified=True)
        elif kind != 'output' and not reasons:
            reasons.append(': not covered')
        obstacles += [(step.what, reason) for reason in reasons]
    if not layers:
        obstacles.append(('it', ' has no Conv2d or Linear module'))
    elif bias_free and (layers[-1].geometry or layers[-1].rectified):
        obstacles.append(('its last layer', ' is not a linear classifier'))
    refuse(net, obstacles, _THEOREMS if bias_free else _CHAINS)
    return layers


def _layer_obstacles(step, flat):
    """Why a convolution or a linear layer cannot be a layer of a chain, as a list of reasons."""
    kind, *how = step.op
    reasons = []
    if kind == 'conv':
        _, padding, _, groups = how
        if flat or groups != 1 or isinstance(padding, str):
            reasons.append(
                ': only ungrouped convolutions, padded with a number of zeros, are covered'
            )
    elif not flat:
        reasons.append(': expected a linear layer on the flattened map')
    sizes = ('in_features', 'out_features') if kind == 'linear' else ('in_channels', 'out_channels')
    if 0 in [getattr(step.module, size) for size in sizes]:
        reasons.append(' has no weights')
    return reasons


def _taps(size, kernel, stride, padding, dilation):
    """Which tap of an output position reads which input position: (kernel, outputs, inputs)."""
    outputs = max(0, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    tap, out = np.ogrid[:kernel, :outputs]
    return (out * stride - padding + tap * dilation)[..., None] == np.arange(size)


def sequential(layers):
    """The nn.Sequential of a chain's layers; it shares their tensors."""
    modules, flat = [], False
    for layer in layers:
        if layer.is_linear and not flat:
            modules.append(nn.Flatten())
            flat = True
        modules.append(plain_layer(layer.weight, layer.bias, **layer.geometry))
        if layer.rectified:
            modules.append(nn.ReLU())
    return nn.Sequential(*modules)


def folded(net):
    """The same function as an nn.Sequential of plain layers; `net` as `folded_layers` takes it."""
    return sequential(folded_layers(net)).to(next(net.parameters()).dtype)


def plain_layer(weight, bias=None, **geometry):
    """The Conv2d of a weight (out, in, h, w) and its geometry, or the Linear of one (out, in)."""
    options = {'bias': bias is not None, 'device': 'meta'}
    if weight.ndim == 4:
        layer = nn.Conv2d(*weight.shape[1::-1], tuple(weight.shape[2:]), **options, **geometry)
    else:
        layer = nn.Linear(*weight.shape[::-1], **options)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def weight_layers(net):
    """{name: module} of the Conv2d, ConvTranspose2d and Linear modules, in the network's order."""
    return {name: module for name, module in net.named_modules() if isinstance(module, LAYER_TYPES)}


@torch.no_grad()
def effective_weights(net):
    """{name: float64 copy of its weight in evaluation mode} of the layers of `weight_layers`.

    Raises:
        BadInput: as `require_counted`.
    """
    require_counted(net)
    with evaluation_mode(net):
        return {
            name: layer.weight.to(torch.float64, copy=True)
            for name, layer in weight_layers(net).items()
        }


def require_counted(net):
    """Refuses a network with weights that `weight_layers` leaves out, or that modules share.

    Left out are attention, embeddings and any other kind of module, complex and quantized weights,
    and those that forward hooks of torch.nn.utils compute; all of them are named.
    """
    require_values(net)
    obstacles = shared_parameters(net) + _computed_weights(net)
    for name, module in net.named_modules():
        if quantized(module):
            obstacles.append((named(name, module), ' holds quantized weights'))
    for name, module, parameter in _owned_parameters(net):
        if parameter.is_complex():
            obstacles.append((named(name, module), ' holds complex weights'))
        elif parameter.ndim > 1 and not isinstance(module, (*LAYER_TYPES, nn.LayerNorm)):
            obstacles.append((named(name, module), ' holds weights that are not counted'))
    refuse(net, obstacles, 'only Conv2d, ConvTranspose2d and Linear modules are counted')


def _computed_weights(net):
    """The modules whose weights hooks compute, as pairs (what, reason) for `refuse`."""
    return [
        (named(name, module), COMPUTES_WEIGHTS)
        for name, module in net.named_modules()
        if computes_weights(module)
    ]


def require_own_weights(net):
    """Refuses a network whose weights hooks compute: to read them may be too early, and what is
    written does not stay."""
    refuse(net, _computed_weights(net), 'the weights could not be read and set')


def not_counted(net):
    """Why the weights of a network cannot be counted (see `require_counted`); None if they can."""
    try:
        require_counted(net)
    except NotCovered as error:
        return str(error)


def shared_parameters(net):
    """The modules that share a parameter, as pairs (what, reason) for `refuse`."""
    owners, obstacles = {}, []
    for name, module, parameter in _owned_parameters(net):
        address = parameter.data_ptr()  # 0 for an empty tensor
        other, owner = owners.setdefault(address, (name, module))
        if address and owner is not module:
            obstacles.append((f'{other} and {name}', ' share a parameter'))
    return obstacles


def _owned_parameters(net):
    """Yields (name, module, parameter); a parametrized weight belongs to its layer."""
    for path, parameter in net.named_parameters(remove_duplicate=False):
        name, parametrized, _ = f'.{path}'.partition('.parametrizations.')
        if not parametrized:
            name = name.rpartition('.')[0]
        name = name.removeprefix('.')
        yield name, net.get_submodule(name), parameter


def plain_copy(net):
    """A copy of a network whose parametrized weights are plain ones with the same values.

    Raises:
        NotCovered: forward hooks of torch.nn.utils compute its weights.
    """
    require_own_weights(net)
    net = copied(net)
    for module in [*net.modules()]:
        make_plain(module)
    return net


def copied(net):
    """A copy of a network, whose own code may have kept activations with their graph."""
    kept = [value for module in net.modules() for value in vars(module).values()]
    graphs = [value for value in kept if isinstance(value, torch.Tensor) and not value.is_leaf]
    return copy.deepcopy(net, {id(value): value.detach().clone() for value in graphs})


def make_plain(module):
    """Makes a module's parametrized weights plain, in place, with their values in evaluation
    mode."""
    if not parametrize.is_parametrized(module):
        return
    with evaluation_mode(module):
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    # remove_parametrizations would change the class, which a copy shares.
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


# --------------------------------------------------------------------------------------------------
# Forward passes
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ieee_float32():
    """Runs what it encloses in IEEE float32 on CUDA, whatever precision the training has set."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = 'ieee'
        yield
    finally:
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision


@contextlib.contextmanager
def hooked(net, modules, note):
    """Calls note(module, inputs, output) after each forward pass of one of these modules of net.

    Raises:
        NotCovered: a part of the network is compiled, so that its modules may run unseen.
    """
    obstacles = [(named(name, part), compiled(part)) for name, part in net.named_modules()]
    refuse(net, [each for each in obstacles if each[1]], 'its modules run unseen')
    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def activations(net, image):
    """How many numbers each layer with weights makes of an image (1, C, H, W), as a list."""
    sizes = []

    def note(layer, inputs, output):
        sizes.append(output.numel())

    with hooked(net, weight_layers(net).values(), note):
        net(image.clone())  # its first step may work in place
    return sizes


def images_per_pass(net, images):
    """How many of the images go through the network at once, where nothing is learned from them.

    On a CPU few enough that activations stay in its cache, else many: at most 1 GiB in the largest
        activation.
    """
    if images.device.type == 'cpu':
        return 32
    return max(1, min(1000, 2**28 // max(activations(net, images[:1]), default=1)))


def forward(net, images):
    """What a network makes of images, of which it gets a copy: its first step may work in place.

    Raises:
        BadInput: it is no tensor with a row for each image.
    """
    found = net(images.clone())
    require_rows(type(net).__name__, found, images)
    return found


@contextlib.contextmanager
def taking(net, images):
    """Turns the error of a forward pass in what it encloses into BadInput: they do not fit."""
    try:
        yield
    except BadInput:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        # Then the images may be sound.
        if re.search('(of|allocate) memory|ALLOC_FAILED|CUDA error', str(error)):
            raise
        given = f'one of shape {tuple(images[:1].shape)} and {images.dtype}'
        reason = str(error).partition('\n')[0]
        raise BadInput(f'images: {type(net).__name__} does not take {given} ({reason})') from None


def require_rows(what, output, images):
    """Raises BadInput unless an output is a tensor of real numbers with a row for each image."""
    given = type(output).__name__
    if isinstance(output, torch.Tensor):
        if output.shape[:1] == images.shape[:1] and not output.is_complex():
            return
        given = f'{output.dtype} of shape {tuple(output.shape)}'
    needs = 'must be a tensor of real numbers with a row for each image'
    raise BadInput(f'{what}: makes {given} of {len(images)} images; {needs}')


@torch.no_grad()
def outputs(net, images):
    """The outputs (m, ...) of a network in evaluation mode on a whole set of images (m, ...).

    They are float64 numbers of forward passes in the network's dtype, in IEEE float32 at least on
    CUDA. Batches go through one after the other, as many images at once as `images_per_pass` says.

    Raises:
        BadInput: the network does not take the images, or returns no tensor with a row for each.
    """
    with evaluation_mode(net), ieee_float32(), parametrize.cached():
        batch = images_per_pass(net, images)
        with taking(net, images):
            first = forward(net, images[:1])
        # Filled in place: small tensors that stay, allocated between large ones that go, would tear
        # the heap to pieces.
        values = first.new_empty(len(images), *first.shape[1:], dtype=torch.float64)
        for rows, part in zip(values.split(batch), images.split(batch)):
            rows.copy_(forward(net, part))
    return values
