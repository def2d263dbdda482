"""The forward pass of a network as a list of steps: linear maps, activations and poolings.

Covered are Conv2d and ConvTranspose2d (padded with zeros), Linear, batch normalization, ReLU, LeakyReLU of a slope
in [0, 1], max and average pooling, means over all positions, nearest and bilinear upsampling, Flatten, additions
and concatenations. Whatever else a network does is refused by its name.
"""

import operator
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from conf import BadInput
from measures.trace import MEANS, SIZES, averages, flattens, rectifies, trace

# A step of the forward pass: the module's name; what it does, as a tuple that two networks of the same
# structure share; the indices of the steps that it reads (the first step is the input); its weights, folded;
# the batch norm folded into it.
Step = namedtuple('Step', 'name op inputs weight bias norm', defaults=(None, None, None))

# The ops of layers with weights, and of what maps the rows and columns of each channel, with their attributes.
_LAYERS = {
    nn.Conv2d: ('conv', 'stride', 'padding', 'dilation', 'groups'),
    nn.ConvTranspose2d: ('transposed', 'stride', 'padding', 'output_padding', 'groups', 'dilation'),
    nn.Linear: ('linear',),
}
LAYERS = tuple(op for op, *_ in _LAYERS.values())
_MAPS = {
    nn.MaxPool2d: ('max', F.max_pool2d, 'kernel_size', 'stride', 'padding', 'dilation', 'ceil_mode'),
    nn.AvgPool2d: ('mean', F.avg_pool2d, 'kernel_size', 'stride', 'padding', 'ceil_mode', 'count_include_pad',
                   'divisor_override'),
    nn.AdaptiveAvgPool2d: ('mean', F.adaptive_avg_pool2d, 'output_size'),
    nn.Upsample: ('mean', F.interpolate, 'size', 'scale_factor', 'mode', 'align_corners', 'recompute_scale_factor'),
}  # fmt: skip
_FUNCTIONS = {
    torch.max_pool2d: nn.MaxPool2d,
    F.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.interpolate: nn.Upsample,
    F.leaky_relu: nn.LeakyReLU,
}
_ADDITIONS = (operator.add, operator.iadd, torch.add, 'add', 'add_')
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_PASSED = (nn.Identity, nn.Dropout, nn.Dropout2d)


def forward_steps(net):
    """The forward pass of a network in evaluation mode as a list of Step: its input first, its output last.

    What changes nothing is no step, and a mean over all positions is two, an average pooling and a flattening.

    Raises:
        BadInput: for whatever is not covered, by name.
    """
    *traced, (output, _, _) = trace(net)
    steps, index = [], {}  # index: node -> the step that computes it
    for node, module, what in traced:
        if node.op == 'placeholder' and not steps:
            index[node] = 0
            steps.append(Step(node.target, ('input',), ()))
            continue
        ops = _ops(node, module, what)
        kind = ops[0][0] if ops else None
        reads = [
            *{'add': node.args, 'cat': _argument(node, 0, 'tensors', ())}.get(kind, node.args[:1])
        ]
        if {*reads} != {*node.all_input_nodes} or (module and (len(node.args) > 1 or node.kwargs)):
            raise BadInput(
                f'{what}: called with more than its input, or by keyword, which is not covered'
            )
        if not node.users:
            raise BadInput(f'{what}: its output is not used, which is not covered')
        if _in_place(node, module) and len(reads[0].users) > 1:
            raise BadInput(
                f'{what} works in place on a value that is used elsewhere too; not covered'
            )
        inputs, weight, bias, norm = tuple(index[read] for read in reads), None, None, None
        if kind == 'diagonal':
            (weight, bias), norm = folded_norm(module, what), node.target
            front = steps[inputs[0]]
            layers = ('conv', 'transposed') if isinstance(module, nn.BatchNorm2d) else ('linear',)
            if front.op[0] in layers and front.name == reads[0].target and len(reads[0].users) == 1:
                bias = bias if front.bias is None else bias + weight * front.bias
                weight = front.weight * along(weight, front)
                steps[inputs[0]] = front._replace(weight=weight, bias=bias, norm=norm)
                index[node] = inputs[0]
                continue
        elif kind in LAYERS:
            weight, bias = _doubles(what, module.weight, module.bias)
        for op in ops:
            steps.append(
                Step(getattr(node.target, '__name__', node.target), op, inputs, weight, bias, norm)
            )
            inputs = (len(steps) - 1,)
        index[node] = inputs[0]
    if index.get(output.args[0] if isinstance(output.args[0], fx.Node) else None) != len(steps) - 1:
        raise BadInput(
            f"{type(net).__name__}: its output is not the last layer's, which is not covered"
        )
    return steps


def along(factor, layer, incoming=False):
    """A factor for each channel that a layer makes, or that it reads, in the shape of its weights.

    The channels that a convolution makes lie along axis 0 of its weights, and those that it reads, of one
    group, along axis 1; of a transposed convolution it is the other way round. A linear layer behind a
    flattening reads a channel at several places.
    """
    rows, columns, *kernel = layer.weight.shape
    if incoming == (layer.op[0] == 'transposed'):
        return factor.view(-1, 1, *[1] * len(kernel))
    groups = _groups(layer)
    factor = factor.view(groups, -1)
    factor = factor.repeat_interleave(columns // factor.shape[1], 1).repeat_interleave(
        rows // groups, 0
    )
    return factor.view(*factor.shape, *[1] * len(kernel))


def channels(layer):
    """How many channels a layer makes."""
    return (
        layer.weight.shape[1] * _groups(layer) if layer.op[0] == 'transposed' else len(layer.weight)
    )


def _groups(layer):
    return 1 if layer.op[0] == 'linear' else layer.op[4]


def _argument(node, place, name, default):
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _in_place(node, module):
    marks = getattr(module, 'inplace', False) or node.kwargs.get('inplace', False)
    return (
        marks
        or node.target is operator.iadd
        or (node.op == 'call_method' and node.target.endswith('_'))
    )


def _doubles(what, *tensors):
    tensors = [None if tensor is None else tensor.detach().double() for tensor in tensors]
    if not all(tensor is None or tensor.isfinite().all() for tensor in tensors):
        raise BadInput(f'{what}: its weights contain NaN or infinity')
    return tensors


def folded_norm(norm, what):
    """Batch normalization with running statistics as x -> weight * x + bias."""
    if norm.running_mean is None:
        raise BadInput(
            f'{what} keeps no running statistics; it depends on the batch, which is not covered'
        )
    scale, shift = (norm.weight, norm.bias) if norm.affine else (1, 0)
    weight = scale * (norm.running_var.double() + norm.eps).rsqrt()
    return _doubles(what, weight, shift - weight * norm.running_mean)


def _ops(node, module, what):
    """What a node does, as a list of `op` of a Step."""
    if node.op == 'call_function' and node.target in _FUNCTIONS:
        options = dict(node.kwargs)
        if options.pop('antialias', False):
            raise BadInput(f'{what}: antialias is not covered')
        module = _FUNCTIONS[node.target](*node.args[1:], **options)
    for kind, (op, *names) in _LAYERS.items():
        if isinstance(module, kind):
            if getattr(module, 'padding_mode', 'zeros') != 'zeros':
                raise BadInput(
                    f"{what}: padding_mode = '{module.padding_mode}' is not covered, only zeros"
                )
            return [(op, *(getattr(module, name) for name in names))]
    for kind, (op, function, *names) in _MAPS.items():
        if isinstance(module, kind):
            if getattr(module, 'mode', 'nearest') not in ('nearest', 'nearest-exact', 'bilinear'):
                raise BadInput(
                    f"{what}: mode = '{module.mode}' is not covered, only nearest and bilinear"
                )
            if getattr(module, 'return_indices', False):
                raise BadInput(f'{what}: return_indices is not covered')
            return [(op, function, *(getattr(module, name) for name in names))]
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        return [('diagonal',)]
    if rectifies(node, module):
        return [('relu', 0)]
    if isinstance(module, nn.LeakyReLU):
        if not 0 <= module.negative_slope <= 1:
            raise BadInput(f'{what}: only slopes between 0 and 1 are covered')
        return [('relu', module.negative_slope)]
    if dims := flattens(node, module):
        if dims[0] < 1:
            raise BadInput(f'{what}: a flattening from dimension {dims[0]} on is not covered')
        return [('flatten', *dims)]
    if isinstance(module, _PASSED) or (
        node.target is F.dropout and not _argument(node, 2, 'training', True)
    ):
        return []
    if node.op in ('call_function', 'call_method'):
        values = [isinstance(argument, fx.Node) for argument in node.args]
        if node.target in _ADDITIONS and values == [True, True] and not node.kwargs:
            return [('add',)]
        if node.target in _CONCATENATIONS and {*node.kwargs} <= {'tensors', 'dim'}:
            return [('cat', _argument(node, 1, 'dim', 0))]
        if node.target in MEANS and {*node.kwargs} <= {'dim', 'keepdim'}:
            if not averages(node):
                raise BadInput(
                    f'{what}: only a mean over all positions, the dimensions 2 and 3, is covered'
                )
            flat = [] if _argument(node, 2, 'keepdim', False) else [('flatten', 1, -1)]
            return [('mean', F.adaptive_avg_pool2d, 1), *flat]
        if node.target in SIZES:
            raise BadInput(
                f'{what}: a shape or a part of a value is not covered; write sizes as numbers'
            )
    raise BadInput(
        f'{what}: not covered; paths go through convolutions, transposed too, Linear, BatchNorm, ReLU, LeakyReLU, '
        'Flatten, pooling, means, upsampling, and sums and concatenations of what is computed from the input'
    )
