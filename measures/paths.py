"""Path-norms: sums over all paths of a network in one pass.

A path leads from an input coordinate, or from a bias, to an output; its value is the product of the
weights on it (of the bias and the weights after it), weights of average poolings and upsamplings
included. Exact for any network that measures/steps.py covers, with biases or without, a chain, a
residual network or a U-net, as it is in evaluation mode: batch normalization enters with its
running statistics, folded into the layer in front of it. A LeakyReLU of slope a is a ReLU with a
skip connection, a h + (1 - a) relu(h): edges that add up to 1, so that it passes the sum over paths
on; at any exponent but 1 it is counted as a single edge of weight 1. The theorems about the
path-norm, the path-metric and `path_bound` hold for all of these networks.

Source: Gonon et al., "A path-norm toolkit for modern networks" (ICLR 2024).
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.modules.utils import _pair

from conf import BadInput
from measures.steps import (
    LAYERS,
    NotCovered,
    channel_readers,
    channels,
    forward_steps,
    per_channel,
    refuse,
)
from measures.trace import plain_copy, shared_parameters


def _power_sums(steps, input_shape, q=1):
    """Per output, the sum over its paths of |product of weights|^q, as values * 2^exponent.

    Tensors are scaled by powers of 2, which is exact, so that no product over- or underflows and,
    at q = 1, rescaled neurons give the same bits. A number that is 2^1074 times smaller than the
    largest of its tensor counts as 0.
    """
    if not isinstance(input_shape, (tuple, list)):
        given = str(input_shape).partition('\n')[0]
        raise BadInput(f'input_shape = {given}: must be the shape of an image, a tuple')
    device = next((tensor.device for tensor in _numbers(steps)), None)
    results = [(torch.ones(1, *input_shape, dtype=torch.float64, device=device), 0)]
    for step in steps[1:]:
        terms, exponent = _aligned([results[index] for index in step.inputs])
        shape = tuple(terms[0].shape[1:])
        if step.op[0] == 'linear' and step.norm and len(shape) != 1:
            raise NotCovered(
                f'{step.norm}: batch normalization after a linear layer of maps is not covered'
            )
        if step.op[0] == 'cat' and step.op[1] % terms[0].dim() == 0:
            raise NotCovered(f'{step.name}: concatenates images, which is not covered')
        try:
            values, shift = _apply(step, terms, q)
            exponent += shift
            if step.bias is not None:
                bias, top = _powers(step.bias, q)
                if step.op[0] != 'linear':
                    bias = bias.view(-1, *[1] * (values.dim() - 2))
                terms, exponent = _aligned([(values, exponent), (bias.expand_as(values), top)])
                values = sum(terms)
        except (RuntimeError, ValueError):
            images = tuple(input_shape)
            raise NotCovered(
                f'{step.name}: does not fit its input of shape {shape}, from images {images}'
            ) from None
        values, top = _scaled(values)
        results.append((values, exponent + top))
    values, exponent = results[-1]
    return values.flatten(), exponent


def _scaled(tensor):
    """A nonnegative tensor as (tensor / 2^exponent, exponent), with its maximum in [1/2, 1)."""
    top = tensor.detach().max().item() if tensor.numel() else 0
    if not top:
        return tensor, -(2**60)  # 0 yields to any number
    exponent = math.frexp(top)[1]
    half = exponent // 2  # 2^exponent itself may have no float
    return tensor * 2.0**-half * 2.0 ** (half - exponent), exponent


def _powers(weight, q):
    """|weight|^q as (values, whole exponent), for any real q."""
    values, exponent = _scaled(weight.abs())
    whole = math.floor(q * exponent)
    return values**q * 2.0 ** (q * exponent - whole), whole


def _aligned(terms):
    """Pairs (values, exponent) at the largest exponent: (list of values, exponent)."""
    top = max(exponent for _, exponent in terms)
    return [values * 2.0 ** (exponent - top) for values, exponent in terms], top


def _number(value, exponent):
    """value * 2^exponent; inf and 0 only where it has no float."""
    with np.errstate(over='ignore', under='ignore'):
        return np.ldexp(value, np.clip(exponent, -5000, 5000))


def _apply(step, terms, q):
    """A step without its bias and with |entry|^q for each entry: (values, exponent)."""
    kind, *how = step.op
    values = terms[0]
    if kind == 'add':
        return sum(terms), 0
    if kind == 'cat':
        return torch.cat(terms, *how), 0
    if kind == 'flatten':
        return torch.flatten(values, *how), 0
    if kind in ('max', 'mean'):
        rows, columns = _axes(values, *how)
        rows, drop = _powers(rows, q)
        columns, shift = _powers(columns, q)
        return rows @ values @ columns, drop + shift
    if kind == 'relu':
        return values, 0
    weight, shift = _powers(step.weight, q)
    if kind == 'conv':
        return F.conv2d(values, weight, None, *how), shift
    if kind == 'transposed':
        return F.conv_transpose2d(values, weight, None, *how), shift
    if kind == 'linear':
        return F.linear(values, weight), shift
    return values * weight.view(-1, *[1] * (values.dim() - 2)), shift


def _axes(values, function, *how):
    """A pooling or an upsampling as two matrices, (out, height) and (width, out').

    It maps (1, C, height, width) to (1, C, out, out'). Output (o, p) weighs input (i, j) by rows[o,
    i] columns[j, p]; a max pooling weighs all of its window by 1. They are read off its outputs on
    maps that are 1 in one row, or in one column, and 0 elsewhere.
    """
    _, _, height, width = values.shape

    def outputs(maps):
        parts = maps.expand(-1, 1, height, width).split(32)
        return torch.cat([function(part, *how) for part in parts])

    total = outputs(values.new_ones(1, 1, 1, 1))
    if not total.isfinite().all():
        raise RuntimeError('a window of nothing but padding')
    rows = outputs(torch.eye(height).to(values).view(height, 1, height, 1))[:, 0, :, 0]
    columns = outputs(torch.eye(width).to(values).view(width, 1, 1, width))[:, 0, 0]
    return rows.T, columns / total[0, 0, 0, 0]


@torch.no_grad()
def path_norm(net, input_shape, q=1, r=None):
    """The l^q path-norm: (the sum over a network's paths of |product of weights|^q)^(1/q).

    At q = 1 it is a Lipschitz constant of the network from the l_inf norm of images to the l1 norm
    of outputs.

    Args:
        net: a network of the modules named on top of this file, with biases and skip connections or
            not.
        input_shape: shape of an input, (channels, height, width) for an image.
        q: a positive number.
        r: the mixed norm: l^q over the paths to each output, then l^r over outputs (math.inf for
            the largest). None: q.
    Returns:
        float; inf only where the norm has no float.
    Raises:
        BadInput: the network holds something that is not covered, which is named, or weights with
            NaN or infinity.
    """
    r = q if r is None else r
    if not 0 < q < math.inf or not r > 0:
        raise BadInput(f'q = {q}, r = {r}: q must be positive and finite, r positive or None')
    values, exponent = _power_sums(forward_steps(net), input_shape, q)
    if q == r == 1:
        return float(_number(values.sum().item(), exponent))
    logs = (values.log() + exponent * math.log(2)) / q  # per output, of the l^q norm over its paths
    if r == math.inf:
        return logs.max().exp().item()
    return (torch.logsumexp(r * logs, 0) / r).exp().item()


@torch.no_grad()
def path_metric(net, other, input_shape, outputs=False):
    """The l1 distance of two networks' paths, or, where it is not known, a bound all the same.

    The value times max(||x||_inf, 1), or times ||x||_inf without biases, is at least ||net(x) -
    other(x)||_1 for every x: the theorem of Gonon et al. 2024, "Path-metrics, pruning, and
    generalization", where no weight changes its sign, and the triangle inequality through the
    weights of smaller absolute value, 0 where signs differ, anywhere. The same holds of each
    output, |net(x)_v - other(x)_v|, and the paths that end in it; the value is the sum over
    outputs.

    Args:
        outputs: give the value of each output instead of their sum.
    Returns:
        (value, exact): exact is True where the weights of one network are those of the other shrunk
        towards zero, as by pruning; the value then is the l1 distance of the paths. With `outputs`,
        a float64 tensor (outputs,).
    Raises:
        BadInput: as `path_norm`, or the networks are not of the same structure.
    """
    steps, others = forward_steps(net), forward_steps(other)
    if _structure(steps) != _structure(others):
        kinds = f'{type(net).__name__} and {type(other).__name__}'
        raise BadInput(f'{kinds}: not two networks of the same structure')
    between = []
    for step, twin in zip(steps, others):
        weight, bias = _between(step.weight, twin.weight), _between(step.bias, twin.bias)
        between.append(step._replace(weight=weight, bias=bias))
    sums, top = _aligned([_power_sums(side, input_shape) for side in (steps, others, between)])
    values = ((sums[0] - sums[2]) + (sums[1] - sums[2])).clamp(min=0)
    exact = any(
        all(map(torch.equal, _numbers(side), _numbers(between))) for side in (steps, others)
    )
    if outputs:
        return torch.from_numpy(_number(values.cpu().numpy(), top)).to(values.device), exact
    return float(_number(values.sum().item(), top)), exact


def _structure(steps):
    """What two networks of the same structure share."""
    return [
        (step.op, step.inputs, [tensor.shape for tensor in _numbers([step])], step.bias is None)
        for step in steps
    ]


def _numbers(steps):
    return [tensor for step in steps for tensor in (step.weight, step.bias) if tensor is not None]


def _between(a, b):
    """Elementwise the one of smaller absolute value, 0 where the signs differ."""
    if a is None:
        return None
    return torch.where(a.sign() == b.sign(), torch.where(a.abs() < b.abs(), a, b), 0.0)


@torch.inference_mode(False)
def path_magnitude(net, input_shape):
    """Path-magnitude: what each weight of a layer contributes to the l1 path-norm.

    It is |w| d||Phi||_1 / d|w|, by how much the path-norm falls if the weight is set to 0: the sum
    over the paths through it. Rescaling neurons does not change it (Gonon et al. 2024,
    "Path-metrics, pruning, and generalization").

    Returns:
        {'<module>.weight': float64 tensor of the weight's shape}; of the effective weights where
        they are parametrized.
    Raises:
        BadInput: as `path_norm`, or a module or a parameter is used twice, so that a path can meet
            a weight twice.
    """
    steps = _used_once(net)
    layers = [step for step in steps if step.op[0] in LAYERS]
    with torch.enable_grad():
        for step in layers:
            step.weight.requires_grad_()
        values, exponent = _power_sums(steps, input_shape)
        gradients = torch.autograd.grad(values.sum(), [step.weight for step in layers])
    scores = {}
    for step, gradient in zip(layers, gradients):
        score = (step.weight.detach() * gradient).cpu().numpy()
        score = torch.from_numpy(_number(score, exponent))
        scores[f'{step.name}.weight'] = score.to(gradient.device)
    return scores


def _used_once(net):
    """The steps of a network; refuses it where a module or a parameter is used twice."""
    steps = forward_steps(net)
    names = [name for step in steps if step.weight is not None for name in {step.name, step.norm}]
    twice = {name for name in names if name and names.count(name) > 1}
    obstacles = [(name, ' is used twice in the forward pass') for name in sorted(twice)]
    refuse(net, obstacles + shared_parameters(net), 'not covered here')
    return steps


@torch.no_grad()
def rescale_neurons(net, factors):
    """A copy of a network with rescaled neurons: other weights, the same function.

    A channel's incoming weights, its bias and its batch norm's mean and bias are multiplied by c >
    0, its outgoing weights divided by it; with powers of 2 the function stays the same bit for bit,
    short of overflow. What a skip connection or a concatenation carries is left as it is.
    Parametrized weights become plain ones in the copy.

    Args:
        factors: function from a number of channels to that many positive factors; called for each
            rescaled layer in order.
    Raises:
        BadInput: as `path_norm`, or a module or a parameter is used twice, or factors are not
            positive.
    """
    steps, net = _used_once(net), plain_copy(net)
    for index, step in enumerate(steps):
        way = channel_readers(steps, index) if step.op[0] in LAYERS else None
        if way is None or not channels(step):
            continue
        passed, readers = way
        # A sum has channels of others in it, and what reaches the output has no reader to undo the
        # factor.
        carriers = (index, *passed)
        if len(steps) - 1 in carriers or any(steps[number].op[0] == 'add' for number in passed):
            continue
        count, module = channels(step), net.get_submodule(step.name)
        factor = torch.as_tensor(factors(count)).to(module.weight)
        if factor.shape != (count,) or not (factor > 0).all() or not factor.isfinite().all():
            raise BadInput(
                f'{step.name}: factors must be {count} positive numbers, one for each channel'
            )
        module.weight.mul_(per_channel(factor, step))
        if module.bias is not None:
            module.bias.mul_(factor)
        for name in [steps[number].norm for number in carriers if steps[number].norm]:
            norm = net.get_submodule(name)
            norm.running_mean.mul_(factor)
            if norm.bias is not None:
                norm.bias.mul_(factor)
        for number in readers:
            reader = net.get_submodule(steps[number].name)
            reader.weight.div_(per_channel(factor, steps[number], incoming=True))
    return net


@torch.no_grad()
def measure_paths(net, input_shape):
    """What the path-norm's generalization bound asks of a network, on its input of the given shape.

    Returns:
        Namespace of
            path_norm   the l1 path-norm
            path_depth  the longest path in neurons: ReLU and LeakyReLU layers, max poolings, and
                        the output
            pool        numbers in the largest window of a max pooling; 0 without one
            biased      whether there are biases (batch normalization has them)
            chain       no bias, no max pooling, no skip connection or concatenation, no LeakyReLU
                        (it has a skip)
            outputs     number of outputs
    Raises:
        BadInput: as `path_norm`.
    """
    steps = forward_steps(net)
    values, exponent = _power_sums(steps, input_shape)
    # Per step: the neurons on the longest path up to it, and whether it still combines their values
    # linearly.
    depth, linear = [0], [True]
    for step in steps[1:]:
        kind = step.op[0]
        before = any(linear[index] for index in step.inputs)
        neurons = 0
        if kind == 'relu':
            neurons = int(before)
        elif kind == 'max':  # sums that it compares are neurons too
            neurons = 1 + before
        depth.append(max(depth[index] for index in step.inputs) + neurons)
        linear.append(before if kind in ('flatten', 'cat') else kind not in ('relu', 'max'))
    biased = any(step.bias is not None for step in steps)
    windows = [math.prod(_pair(step.op[2])) for step in steps if step.op[0] == 'max']
    leaky = any(step.op[0] == 'relu' and step.op[1] for step in steps)
    skips = leaky or any(len(step.inputs) > 1 for step in steps)
    return SimpleNamespace(
        path_norm=float(_number(values.sum().item(), exponent)),
        path_depth=depth[-1] + 1,
        pool=max(windows, default=0),
        biased=biased,
        chain=not (skips or biased or windows),
        outputs=len(values),
    )
