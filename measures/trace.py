"""The layers of a network as linear maps on their real input, found by tracing one forward pass; what is not covered."""

import contextlib
import contextvars
import copy
import math
import operator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from conf import BadInput

WEIGHT_LAYERS = (nn.Conv2d, nn.Linear)
_LAYERS = (*WEIGHT_LAYERS, nn.ConvTranspose2d)
RELUS = (torch.relu, F.relu, 'relu', 'relu_')
FLATTENS = (torch.flatten, 'flatten')
MEANS = (torch.mean, 'mean')
SIZES = (
    'size',
    'shape',
    getattr,
    operator.getitem,
)  # what a traced x.size(0) or x.shape[0] consists of

_traced = contextvars.ContextVar(
    'traced', default=None
)  # {network: its trace} inside of `traced_once`


class Layer(NamedTuple):
    """One weight layer seen as a convolution; a linear layer is one whose kernel covers the whole map.

    `shape` is (out, in, h, w). `taps` holds, for the vertical and the horizontal axis, the boolean array (kernel, outputs,
    inputs) that says which tap of which output position reads which input position; a tap that lies in the padding reads none.
    """

    name: str
    module: nn.Module
    shape: tuple
    stride: tuple
    padding: tuple
    dilation: tuple
    taps: list

    @property
    def is_linear(self):
        return isinstance(self.module, nn.Linear)

    @property
    def in_size(self):
        """(height, width) of the input map."""
        return tuple(axis.shape[2] for axis in self.taps)

    @property
    def kernel(self):
        """The effective weight as it is now, (out, in, h, w) float64."""
        return self.module.weight.detach().double().reshape(self.shape)

    def forward(self, kernel, maps):
        """The pre-activations (N, out, h', w') of the layer with another kernel, (out, in, h, w), on maps (N, in, H, W)."""
        if self.is_linear:
            return (maps.flatten(1) @ kernel.flatten(1).T)[:, :, None, None]
        return F.conv2d(maps, kernel, None, self.stride, self.padding, self.dilation)


def features(layers, kernels, images):
    """The post-activation maps (N, K, h, w) that layers with these kernels, (out, in, h, w), make of images (N, C, H, W)."""
    for layer, kernel in zip(layers, kernels):
        images = layer.forward(kernel.to(images.dtype), images).relu()
    return images


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, _LAYERS) or super().is_leaf_module(module, name)


def weight_layers(net):
    """{name: module} of the network's Conv2d and Linear modules, in their order in the network."""
    return {
        name: module for name, module in net.named_modules() if isinstance(module, WEIGHT_LAYERS)
    }


@contextlib.contextmanager
def evaluation_mode(net):
    """Runs what it encloses in evaluation mode, and leaves each module in the mode it was in."""
    training = [module for module in net.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def plain_copy(net):
    """A copy of a network whose parametrized weights, weight-normalized or masked, are plain ones of the same values."""
    net = copy.deepcopy(net)
    for module in [*net.modules()]:
        make_plain(module)
    return net


def make_plain(module):
    """Makes the parametrized weights of a module plain ones of the same values, in place."""
    if parametrize.is_parametrized(
        module
    ):  # remove_parametrizations would change the class, which a copy shares
        plain = {
            name: nn.Parameter(getattr(module, name).detach().clone())
            for name in module.parametrizations
        }
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in plain.items():
            module.register_parameter(name, value)


@contextlib.contextmanager
def ieee_float32():
    """Products of float32 matrices and convolutions in float32 on CUDA, whatever training asks for."""
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
def traced_once():
    """In what it encloses or decorates, each network is traced once. Its weights may change in there, its modules may not."""
    token = _traced.set({})
    try:
        yield
    finally:
        _traced.reset(token)


def trace(net):
    """The forward pass of a network as a list of (fx.Node, module or None, what it is in words), the output's node last.

    A view or reshape to (N, -1) is traced as a flattening, and so is one to (N, a number), with meta['fixed']. The third entry
    names the node in a refusal.

    Raises:
        BadInput: it cannot be traced, or what a module computes is not what its type says; it is named.
    """
    known = _traced.get()
    if known is None:
        return _trace(net)
    if net not in known:
        known[net] = _trace(net)
    return known[net]


def _trace(net):
    kind = type(net).__name__
    for name, module in net.named_modules():
        what = f'{name} ({type(module).__name__})' if name else kind
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise BadInput(f'{what} is a wrapper: pass the network in it, its .module')
        if hasattr(module, '_orig_mod'):
            raise BadInput(
                f'{what} is a compiled network: pass the one that was given to torch.compile, its ._orig_mod'
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise BadInput(f'{what} is a jit module: pass the nn.Module that it was made from')
        if any(
            type(hook).__module__.startswith('torch.nn.utils')
            for hook in module._forward_pre_hooks.values()
        ):
            mend = 'pass it after remove_weight_norm, prune.remove, ..., or use torch.nn.utils.parametrizations'
            raise BadInput(
                f'{what} has forward hooks of torch.nn.utils, which compute its weights: {mend}'
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise BadInput(
                f'{what} has forward hooks, which can change what it computes; remove them'
            )
        if isinstance(module, _LAYERS):
            passes = (
                [kind.forward for kind in _LAYERS],
                [getattr(kind, '_conv_forward', None) for kind in _LAYERS],
            )
            own = (
                getattr(getattr(module, method, None), '__func__', None)
                for method in ('forward', '_conv_forward')
            )
            if any(function not in known for function, known in zip(own, passes)):
                raise BadInput(f'{what} has a forward pass of its own, which is not covered')
        elif 'forward' in vars(module) and _Tracer().is_leaf_module(module, name):
            raise BadInput(f'{what} has a forward pass of its own, which is not covered')
    try:
        with evaluation_mode(net):  # what is measured is the network in evaluation mode
            graph = _Tracer().trace(net)
    except Exception as error:  # whatever the network's own code raises when it is run on symbols
        reason = str(error).partition('\n')[0]
        raise BadInput(f'{kind}: its forward pass cannot be traced ({reason})') from None
    for node in reversed(graph.nodes):  # each after its users
        if _is_batch_by_rest(shape := viewed_as(node)):
            node.op, node.target, node.args = 'call_method', 'flatten', (node.args[0], 1)
            node.meta['fixed'] = shape[1] != -1
        elif node.op != 'call_module' and node.target in SIZES and not node.users:
            graph.erase_node(node)
    traced = []
    for node in graph.nodes:
        module = net.get_submodule(node.target) if node.op == 'call_module' else None
        name = getattr(node.target, '__name__', node.target)
        traced.append(
            (node, module, f'{kind}: {name}{f" ({type(module).__name__})" if module else ""}')
        )
    return traced


def viewed_as(node):
    """The shape to which a traced node views or reshapes, () where it does something else."""
    if node.op == 'call_module' or node.target not in ('view', 'reshape', torch.reshape):
        return ()
    shape = node.args[1:]
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape


def _is_batch_by_rest(shape):
    """Whether a traced shape is (number of samples, -1), or has a number, which can be no other, in the place of -1."""
    if len(shape) != 2 or not isinstance(shape[1], int) or not isinstance(shape[0], fx.Node):
        return False
    size = shape[0]
    if size.target is operator.getitem and size.args[1] == 0:
        size = size.args[0]
        return (size.target == 'size' and len(size.args) == 1) or (
            size.target is getattr and size.args[1] == 'shape'
        )
    return size.target == 'size' and size.args[1:] == (0,)


def flattens(node, module):
    """The dimensions (first, last) that a traced node flattens, or None where it does something else."""
    if isinstance(module, nn.Flatten):
        return module.start_dim, module.end_dim
    return (
        _flatten_dims(*node.args, **node.kwargs)
        if node.op != 'call_module' and node.target in FLATTENS
        else None
    )


def averages(node):
    """Whether a traced node is the mean over all positions of maps, the dimensions 2 and 3."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get('dim')
    return (
        node.op != 'call_module'
        and node.target in MEANS
        and dims in ([2, 3], (2, 3), [-2, -1], (-2, -1))
    )


def rectifies(node, module):
    """Whether a traced node is a ReLU."""
    return isinstance(module, nn.ReLU) or (node.op != 'call_module' and node.target in RELUS)


@contextlib.contextmanager
def hooked(modules, note):
    """Calls note(module, inputs, output) after each forward pass of one of these modules inside of the block."""
    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def activations(net, image):
    """How many numbers each convolution and each linear layer makes of an image (1, C, H, W), as a list."""
    sizes = []
    with hooked(
        weight_layers(net).values(), lambda layer, inputs, output: sizes.append(output.numel())
    ):
        net(image)
    return sizes


def images_per_pass(net, images):
    """How many of the images go through the network at once, where nothing is learned from them.

    On a CPU few enough that activations stay in its cache, else many: at most 1 GiB in the largest activation.
    """
    if images.device.type == 'cpu':
        return 32
    return max(1, min(1000, 2**28 // max(activations(net, images[:1]), default=1)))


def trace_layers(net, input_shape):
    """The weight layers of a bias-free ReLU network, found by tracing one forward pass.

    Args:
        net: any nn.Module whose forward pass is a chain of (Conv2d, ReLU) or (Linear, ReLU), a flattening, and a last Linear.
        input_shape: (channels, height, width) of an image.
    Returns:
        A list of Layer, in the order of the forward pass.
    Raises:
        BadInput: the network has a bias, a skip connection or a module that the theory does not cover; it is named.
    """
    if len(input_shape) != 3:
        raise BadInput(f'input_shape = {tuple(input_shape)}: must be (channels, height, width)')
    (channels, *size), flat, layers, rectified = input_shape, False, [], True
    *traced, (output, _, _) = trace(net)
    if output.args != (traced[-1][0],):
        raise BadInput(
            f"{type(net).__name__}: its output is not the last layer's, which is not covered"
        )
    followers = [node for node, _, _ in traced[1:]] + [output]
    for (node, module, what), following in zip(traced, followers):
        if list(node.users) != [following] or following.all_input_nodes != [node]:
            raise BadInput(
                f'{what}: its output does not go to the next layer and there alone; skip connections are not covered'
            )
        if isinstance(module, WEIGHT_LAYERS):
            if module.bias is not None:
                raise BadInput(f'{what} has a bias; the theorems are about bias-free networks')
            if not rectified:
                raise BadInput(f'{what} follows a layer without a ReLU between them')
            rectified = False
        if isinstance(module, nn.Conv2d):
            if (
                flat
                or module.groups != 1
                or module.padding_mode != 'zeros'
                or isinstance(module.padding, str)
            ):
                raise BadInput(
                    f'{what}: only ungrouped convolutions of maps, padded with a number of zeros, are covered'
                )
            shape, stride, padding, dilation = (
                module.weight.shape,
                module.stride,
                module.padding,
                module.dilation,
            )
        elif isinstance(module, nn.Linear):
            if not flat or module.in_features != channels * math.prod(size):
                raise BadInput(
                    f'{what}: expected a linear layer on the flattened map of {channels * math.prod(size)} numbers'
                )
            shape, stride, padding, dilation = (
                (module.out_features, channels, *size),
                (1, 1),
                (0, 0),
                (1, 1),
            )
        elif rectifies(node, module):
            if not layers:
                raise BadInput(
                    f'{what} comes before the first layer; give the network rectified images instead'
                )
            rectified = True
            continue
        elif dims := flattens(node, module):
            if dims not in ((1, -1), (1, 3)):
                raise BadInput(f'{what}: flattens other than the dimensions 1 to -1')
            flat = True
            continue
        elif node.op == 'placeholder' or isinstance(module, nn.Identity):
            continue
        else:
            raise BadInput(
                f'{what}: not covered; the theorems are about Conv2d, ReLU, Flatten and Linear'
            )
        taps = [_taps(*axis) for axis in zip(size, shape[2:], stride, padding, dilation)]
        if shape[1] != channels or not all(axis.shape[1] for axis in taps):
            raise BadInput(
                f'{what}: does not fit its input of {channels} channels of {size[0]}x{size[1]}'
            )
        if not all(axis.any() for axis in taps):
            raise BadInput(f'{what}: reads nothing but its padding')
        layers.append(Layer(node.target, module, tuple(shape), stride, padding, dilation, taps))
        channels, size = shape[0], [axis.shape[1] for axis in taps]
    if not layers or not isinstance(layers[-1].module, nn.Linear) or rectified:
        raise BadInput(f'{type(net).__name__}: its last layer is not a linear classifier')
    return layers


def not_covered(net, input_shape):
    """Why the theorems about bias-free chains do not cover a network, in one line that names the module; None if they do."""
    try:
        trace_layers(net, input_shape)
    except BadInput as error:
        return str(error)


def _flatten_dims(x, start_dim=0, end_dim=-1):
    return start_dim, end_dim


def _taps(size, kernel, stride, padding, dilation):
    """Which tap of which output position reads which input position along one axis: (kernel, outputs, inputs)."""
    outputs = max(0, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    tap, out = np.ogrid[:kernel, :outputs]
    return (out * stride - padding + tap * dilation)[..., None] == np.arange(size)
