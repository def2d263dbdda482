"""Path-norms: a network unrolled into its paths, each the product of its weights, and sums over all of them in one pass.

A path leads from an input coordinate, or from a bias, to an output; its number is the product of the weights on it (of the
bias and the weights behind it). Exact for any network of Conv2d, Linear, ReLU, batch normalization, max and average pooling
and additions, with biases or without, as it is in evaluation mode: batch normalization enters with its running statistics,
folded into the layer in front of it. Source: Gonon, Brisebarre, Riccietti, Gribonval, "A path-norm toolkit for modern
networks", ICLR 2024.
"""

import math
import operator
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.utils import _pair

from conf import BadInput
from measures.geometry import flattens, plain_copy, rectifies, trace

# A step of the forward pass: the module's name; what it does, as a tuple that two networks of the same structure share; the
# indices of the steps that it reads (the first step is the input); its weights, folded; the batch norm folded into it.
Step = namedtuple('Step', 'name op inputs weight bias norm', defaults=(None, None, None))

_ADDITIONS = (operator.add, operator.iadd, torch.add, 'add', 'add_')
_POOLS = {torch.max_pool2d: nn.MaxPool2d, F.max_pool2d: nn.MaxPool2d,
          F.avg_pool2d: nn.AvgPool2d, F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d}  # fmt: skip
_PASSED = (nn.Identity, nn.Dropout, nn.Dropout2d)


def _steps(net):
    """The forward pass as a list of Step. Raises BadInput for whatever is not covered, by name."""
    *traced, (output, _, _) = trace(net)
    steps, index = [], {}  # index: node -> the step that computes it
    for node, module, what in traced:
        if node.op == 'placeholder' and not steps:
            index[node] = 0
            steps.append(Step(node.target, ('input',), ()))
            continue
        reads = node.all_input_nodes
        if reads != [*node.args][: len(reads)] or not all(read in index for read in reads) or not node.users:
            raise BadInput(f'{what}: reads something else than the layers before it, or its output is not used; not covered')
        if _in_place(node, module) and len(reads[0].users) > 1:
            raise BadInput(f'{what} works in place on a value that is used elsewhere too; not covered')
        inputs = tuple(index[read] for read in node.args if isinstance(read, fx.Node))
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            weight, bias = _folded(module, what)
            front = steps[inputs[0]]
            layer = 'conv' if isinstance(module, nn.BatchNorm2d) else 'linear'  # its outputs lie on the axis that is normalized
            if front.op[0] == layer and front.name == reads[0].target and len(reads[0].users) == 1:
                bias = bias if front.bias is None else bias + weight * front.bias
                weight = front.weight * weight.view(-1, *[1] * (front.weight.dim() - 1))
                steps[inputs[0]] = front._replace(weight=weight, bias=bias, norm=node.target)
                index[node] = inputs[0]
                continue
            step = Step(node.target, ('diagonal',), inputs, weight, bias, node.target)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            if isinstance(module, nn.Conv2d) and module.padding_mode != 'zeros':
                raise BadInput(f'{what}: padded with something else than zeros, which is not covered')
            geometry = ('stride', 'padding', 'dilation', 'groups') if isinstance(module, nn.Conv2d) else ()
            op = 'conv' if geometry else 'linear', *(getattr(module, number) for number in geometry)
            step = Step(node.target, op, inputs, *_doubles(what, module.weight, module.bias))
        else:
            step = Step(str(node.target), _unweighted(node, module, what), inputs)
        if step.op == ('identity',):
            index[node] = inputs[0]
        else:
            index[node] = len(steps)
            steps.append(step)
    if index.get(output.args[0] if isinstance(output.args[0], fx.Node) else None) != len(steps) - 1:
        raise BadInput(f"{type(net).__name__}: its output is not the last layer's, which is not covered")
    return steps


def _argument(node, place, name, default):
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _in_place(node, module):
    marks = getattr(module, 'inplace', False) or node.kwargs.get('inplace', False)
    return marks or node.target is operator.iadd or (node.op == 'call_method' and node.target.endswith('_'))


def _doubles(what, *tensors):
    tensors = [None if tensor is None else tensor.detach().double() for tensor in tensors]
    if not all(tensor is None or tensor.isfinite().all() for tensor in tensors):
        raise BadInput(f'{what}: its weights contain NaN or infinity')
    return tensors


def _folded(norm, what):
    """Batch normalization with running statistics as x -> weight * x + bias."""
    if norm.running_mean is None:
        raise BadInput(f'{what} keeps no running statistics; its function depends on the batch, which is not covered')
    scale, shift = (norm.weight, norm.bias) if norm.affine else (1, 0)
    weight = scale * (norm.running_var.double() + norm.eps).rsqrt()
    return _doubles(what, weight, shift - weight * norm.running_mean)


def _unweighted(node, module, what):
    """What a node without weights does, as the `op` of a Step."""
    if node.op != 'call_module' and node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs:
        if all(isinstance(term, fx.Node) for term in node.args):
            return ('add',)
    elif len(node.all_input_nodes) != 1:
        pass
    elif rectifies(node, module):
        return ('relu',)
    elif dims := flattens(node, module):
        if dims[0] >= 1:
            return 'flatten', *dims
    elif isinstance(module, _PASSED) or (node.target is F.dropout and not _argument(node, 2, 'training', True)):
        return ('identity',)
    elif node.op == 'call_function' and node.target in _POOLS:
        module = _POOLS[node.target](*node.args[1:], **node.kwargs)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return 'adaptive', module.output_size
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        if module.ceil_mode or getattr(module, 'return_indices', False):
            raise BadInput(f'{what}: pooling with ceil_mode or indices is not covered')
        kernel, stride, padding = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)
        if isinstance(module, nn.MaxPool2d):
            return 'max', kernel, stride, padding, _pair(module.dilation)
        if not module.count_include_pad and any(padding):
            raise BadInput(f'{what}: count_include_pad=False with padding is not covered')
        return 'mean', kernel, stride, padding, (1, 1), module.divisor_override or math.prod(kernel)
    raise BadInput(f'{what}: not covered; paths go through Conv2d, Linear, BatchNorm, ReLU, Flatten, pooling and additions')


def _power_sums(steps, input_shape, q=1):
    """Sum over the paths to each output of |product of its weights|^q: (values, exponent), meaning values * 2^exponent.

    Tensors are scaled by powers of 2, which is exact, so that no product over- or underflows and, at q = 1, rescaled neurons
    give the same bits. A number that is 2^1074 times smaller than the largest of its tensor counts as 0.
    """
    device = next((tensor.device for tensor in _numbers(steps)), None)
    results = [(torch.ones(1, *input_shape, dtype=torch.float64, device=device), 0)]
    for step in steps[1:]:
        values, exponent = _sum([results[index] for index in step.inputs])
        if step.op[0] == 'linear' and step.norm and values.dim() != 2:
            raise BadInput(f'{step.norm}: batch normalization behind a linear layer of maps is not covered')
        try:
            weight, shift = (None, 0) if step.weight is None else _powers(step.weight, q)
            values, divisor = _through(step.op, values, weight, q)
            values, drop = _shifted(values, -q * math.log2(divisor))
            if step.bias is not None:
                bias, top = _powers(step.bias, q)
                bias = bias if step.op[0] == 'linear' else bias.view(-1, *[1] * (values.dim() - 2))
                values, exponent = _sum([(values, exponent + shift + drop), (bias.expand_as(values), top)])
                shift = drop = 0
        except RuntimeError:
            shape = tuple(values.shape[1:])
            raise BadInput(f'{step.name}: does not fit its input of shape {shape}, from images {tuple(input_shape)}') from None
        values, top = _scaled(values)
        results.append((values, exponent + shift + drop + top))
    values, exponent = results[-1]
    return values.flatten(), exponent


def _scaled(tensor):
    """A nonnegative tensor as (tensor / 2^exponent, exponent), so that its maximum lies in [1/2, 1)."""
    top = tensor.detach().max().item()
    exponent = math.frexp(top)[1]
    half = exponent // 2  # 2^exponent itself may have no float
    return (tensor * 2.0**-half * 2.0 ** (half - exponent), exponent) if top else (tensor, -(2**60))  # 0 yields to any number


def _powers(weight, q):
    """|weight|^q as (values, exponent)."""
    values, exponent = _scaled(weight.abs())
    return _shifted(values**q, q * exponent)


def _shifted(values, exponent):
    """values * 2^exponent, for any real exponent, as (values, whole exponent)."""
    whole = math.floor(exponent)
    return (values * 2.0 ** (exponent - whole) if exponent != whole else values), whole


def _sum(terms):
    """The sum of (values, exponent) pairs, at the largest exponent."""
    top = max(exponent for _, exponent in terms)
    return sum(values * 2.0 ** (exponent - top) for values, exponent in terms), top


def _number(value, exponent):
    """value * 2^exponent; inf and 0 only where it has no float."""
    with np.errstate(over='ignore', under='ignore'):
        return np.ldexp(value, np.clip(exponent, -5000, 5000))


def _through(op, values, weight, q):
    """A step on nonnegative values: (values, divisor), where the result is values * divisor^-q."""
    kind, *how = op
    if kind == 'conv':
        return F.conv2d(values, weight, None, *how), 1
    if kind == 'linear':
        return F.linear(values, weight), 1
    if kind == 'diagonal':
        return values * weight.view(-1, *[1] * (values.dim() - 2)), 1
    if kind in ('max', 'mean'):  # the sum over each window; no path starts in the padding
        kernel, stride, padding, dilation, *divisor = how
        ones = values.new_ones(values.shape[1], 1, *kernel)
        return F.conv2d(values, ones, None, stride, padding, dilation, groups=len(ones)), *(divisor or [1])
    if kind == 'adaptive':
        axes = []
        for size, outputs in zip(values.shape[2:], _pair(how[0])):
            pixel, output = torch.arange(size), torch.arange(outputs or size)[:, None]
            first, last = output * size // len(output), -(-(output + 1) * size // len(output))
            axes.append(((first <= pixel) & (pixel < last)).to(values))
        counts = torch.outer(*(axis.sum(1) for axis in axes))
        least = counts.min().item()
        return (axes[0] @ values @ axes[1].T) * (counts / least) ** -q, least
    return (torch.flatten(values, *how) if kind == 'flatten' else values), 1


@torch.no_grad()
def path_norm(net, input_shape, q=1, r=None):
    """The l^q path-norm of a network: (the sum over its paths of |product of the path's weights|^q)^(1/q).

    At q = 1 it is a Lipschitz constant of the network from the l_inf norm of images to the l1 norm of outputs.

    Args:
        net: a network of the modules named on top of this file, with biases and skip connections or not.
        input_shape: shape of an input, (channels, height, width) for an image.
        q: a positive number.
        r: the mixed norm: l^q over the paths to each output, then l^r over outputs (math.inf for the largest). None: q.
    Returns:
        float; inf only where the norm has no float.
    Raises:
        BadInput: the network holds something that is not covered, which is named, or weights with NaN or infinity.
    """
    r = q if r is None else r
    if not 0 < q < math.inf or not r > 0:
        raise BadInput(f'q = {q}, r = {r}: a path-norm wants a positive, finite q, and an r that is positive or None')
    values, exponent = _power_sums(_steps(net), input_shape, q)
    if q == r == 1:
        return float(_number(values.sum().item(), exponent))
    logs = (values.log() + exponent * math.log(2)) / q  # per output, of the l^q norm over its paths
    return (logs.max() if r == math.inf else torch.logsumexp(r * logs, 0) / r).exp().item()


@torch.no_grad()
def path_metric(net, other, input_shape):
    """The l1 distance of two networks' paths, or an upper bound on the distance of their functions where that is not known.

    The value times max(||x||_inf, 1), or times ||x||_inf without biases, is at least ||net(x) - other(x)||_1 for every x: the
    theorem of Gonon et al. 2024, "Path-metrics, pruning, and generalization", where no weight changes its sign, and the
    triangle inequality through the weights of smaller absolute value, 0 where signs differ, anywhere.

    Returns:
        (value, exact): exact is True where the weights of one network are those of the other shrunk towards zero, as by
        pruning; the value then is the l1 distance of the paths.
    Raises:
        BadInput: as `path_norm`, or the networks are not of the same structure.
    """
    steps, others = _steps(net), _steps(other)
    sides = [[(step.op, step.inputs, *(value if value is None else value.shape for value in step[3:5])) for step in side]
             for side in (steps, others)]  # fmt: skip
    if sides[0] != sides[1]:
        raise BadInput(f'{type(net).__name__} and {type(other).__name__}: not two networks of the same structure')
    between = [
        step._replace(weight=_between(step.weight, twin.weight), bias=_between(step.bias, twin.bias))
        for step, twin in zip(steps, others)
    ]
    sums = [_power_sums(side, input_shape) for side in (steps, others, between)]
    top = max(exponent for _, exponent in sums)
    of_net, of_other, of_between = (values.sum().item() * 2.0 ** (exponent - top) for values, exponent in sums)
    value = max(0.0, (of_net - of_between) + (of_other - of_between))
    exact = any(all(map(torch.equal, _numbers(side), _numbers(between))) for side in (steps, others))
    return float(_number(value, top)), exact


def _numbers(steps):
    return [tensor for step in steps for tensor in (step.weight, step.bias) if tensor is not None]


def _between(a, b):
    """Elementwise the one of smaller absolute value, 0 where the signs differ."""
    return None if a is None else torch.where(a.sign() == b.sign(), torch.where(a.abs() < b.abs(), a, b), 0.0)


def path_magnitude(net, input_shape):
    """Path-magnitude: what each weight of a convolution or a linear layer contributes to the l1 path-norm.

    It is |w| d||Phi||_1 / d|w|, by how much the path-norm falls if the weight is set to 0: the sum over the paths through it.
    Rescaling neurons does not change it (Gonon et al. 2024, "Path-metrics, pruning, and generalization").

    Returns:
        {'<module>.weight': float64 tensor of the weight's shape}; of the effective weights where they are parametrized.
    Raises:
        BadInput: as `path_norm`, or a module is used twice, so that a path can meet a weight twice.
    """
    steps = _used_once(_steps(net))
    layers = [step for step in steps if step.op[0] in ('conv', 'linear')]
    with torch.enable_grad():
        for step in layers:
            step.weight.requires_grad_()
        values, exponent = _power_sums(steps, input_shape)
        gradients = torch.autograd.grad(values.sum(), [step.weight for step in layers])
    scores = {}
    for step, gradient in zip(layers, gradients):
        score = (step.weight.detach() * gradient).cpu().numpy()
        scores[f'{step.name}.weight'] = torch.from_numpy(_number(score, exponent)).to(gradient.device)
    return scores


def _used_once(steps):
    names = [name for step in steps if step.weight is not None for name in {step.name, step.norm} - {None}]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f'{name} is used twice in the forward pass, which is not covered here')
    return steps


@torch.no_grad()
def rescale_neurons(net, factors):
    """A copy of a network whose neurons are rescaled, which changes its weights and not its function.

    A channel's incoming weights, its bias and its batch norm's mean and bias are multiplied by c > 0, its outgoing weights
    divided by it; with powers of 2 the function stays the same bit for bit, short of overflow. What a skip connection carries
    is left as it is. Parametrized weights become plain ones in the copy.

    Args:
        factors: function from a number of channels to that many positive factors; called for each rescaled layer in order.
    Raises:
        BadInput: as `path_norm`, or a module is used twice, or factors are not positive.
    """
    net = plain_copy(net)
    steps = _used_once(_steps(net))
    for index, step in enumerate(steps):
        if step.op[0] not in ('conv', 'linear') or (found := _behind(steps, index, step.op[0] == 'linear')) is None:
            continue
        norms, readers = found
        module = net.get_submodule(step.name)
        factor = torch.as_tensor(factors(len(step.weight))).to(module.weight)
        if factor.shape != (len(step.weight),) or not (factor > 0).all() or not factor.isfinite().all():
            raise BadInput(f'{step.name}: factors must be {len(step.weight)} positive numbers, one for each of its channels')
        module.weight.mul_(factor.view(-1, *[1] * (module.weight.dim() - 1)))
        norms = [net.get_submodule(norm) for norm in norms]
        for moved in (module.bias, *(norm.running_mean for norm in norms), *(norm.bias for norm in norms)):
            if moved is not None:
                moved.mul_(factor)
        for reader in readers:
            weight, groups = net.get_submodule(reader.name).weight, reader.op[4] if reader.op[0] == 'conv' else 1
            divisor = factor.view(groups, -1).repeat_interleave(groups * weight.shape[1] // len(factor), 1)
            divisor = divisor.repeat_interleave(len(weight) // groups, 0)
            weight.div_(divisor.view(*weight.shape[:2], *[1] * (weight.dim() - 2)))
    return net


def _behind(steps, index, flat):
    """The batch norms that a layer's channels, `flat` or maps, pass through and the layers that read them; None for a skip."""
    norms, readers = [steps[index].norm] if steps[index].norm else [], []
    followers = [number for number, step in enumerate(steps) if index in step.inputs]
    for number in followers:
        kind, *how = steps[number].op
        part = kind == 'flatten' and (flat or how not in ([1, -1], [1, 3]))  # then a channel's numbers may lie elsewhere
        if kind == ('linear' if flat else 'conv'):
            readers.append(steps[number])
        elif part or kind in ('add', 'conv', 'linear') or (behind := _behind(steps, number, flat or kind == 'flatten')) is None:
            return None
        else:
            norms, readers = norms + behind[0], readers + behind[1]
    return (norms, readers) if followers else None


@torch.no_grad()
def measure_paths(net, input_shape):
    """What the path-norm's generalization bound asks of a network, on its input of the given shape.

    Returns:
        Namespace of
            path_norm   the l1 path-norm
            path_depth  the longest path in neurons, the output's included: ReLU layers and max poolings, and the output
            pool        numbers in the largest window of a max pooling; 0 without one
            biased      whether there are biases (batch normalization has them)
            chain       no bias, no max pooling and no skip connection
            outputs     number of outputs
    Raises:
        BadInput: as `path_norm`.
    """
    steps = _steps(net)
    values, exponent = _power_sums(steps, input_shape)
    depth, linear = [0], [True]  # per step: neurons behind it, and whether it combines their values linearly
    for step in steps[1:]:
        kind, before = step.op[0], step.inputs
        neurons = {'relu': 1, 'max': 2}.get(kind, 0) if any(linear[i] for i in before) else int(kind == 'max')
        depth.append(max(depth[i] for i in before) + neurons)
        linear.append(kind not in ('relu', 'max') and (kind != 'flatten' or linear[before[0]]))
    biased = any(step.bias is not None for step in steps)
    pool = max((math.prod(step.op[1]) for step in steps if step.op[0] == 'max'), default=0)
    chain = not biased and not pool and all(step.op[0] != 'add' for step in steps)
    norm, depth = float(_number(values.sum().item(), exponent)), depth[-1] + 1
    return SimpleNamespace(path_norm=norm, path_depth=depth, pool=pool, biased=biased, chain=chain, outputs=len(values))
