"""Networks that are one chain, as plain layers: convolutions, linear layers, ReLUs; batch normalization is folded in."""

from collections import namedtuple

from torch import nn

from conf import BadInput
from measures.steps import forward_steps

# A layer of a chain: its weight, (out, in, h, w) of a convolution or (out, in) of a linear layer; its bias, (out,) or None;
# whether a ReLU follows; and, of a convolution, its arguments stride, padding and dilation.
Plain = namedtuple('Plain', 'weight bias rectified geometry')


def plain_layers(net):
    """The layers of a network in evaluation mode, as a list of Plain in float64.

    Args:
        net: a chain of Conv2d or Linear, each followed by batch normalization, by a ReLU, by both or by none of them, with a
            flattening in front of the first Linear. Weights may be parametrized.
    Raises:
        BadInput: it is not such a chain, and what is in the way is named; or a weight is NaN or infinite.
    """
    layers, flat = [], False
    for index, step in enumerate(forward_steps(net)[1:]):
        kind, *how = step.op
        if step.inputs != (index,):
            raise BadInput(
                f'{step.name}: reads something else than the layer before it; only chains are covered'
            )
        if kind == 'conv' and not flat and how[3] == 1 and not isinstance(how[1], str):
            layers.append(
                Plain(
                    step.weight, step.bias, False, dict(zip(('stride', 'padding', 'dilation'), how))
                )
            )
        elif kind == 'linear' and flat:
            layers.append(Plain(step.weight, step.bias, False, {}))
        elif kind == 'flatten' and how in ([1, -1], [1, 3]):
            flat = True
        elif kind == 'relu' and layers and how == [0]:
            layers[-1] = layers[-1]._replace(rectified=True)
        else:
            chain = 'ungrouped convolutions padded with a number of zeros, a flattening, linear layers, ReLUs behind them'
            raise BadInput(f'{step.name} ({kind}): not covered in its place; expected {chain}')
    if not layers:
        raise BadInput(f'{type(net).__name__}: has no Conv2d or Linear module')
    return layers


def sequential(layers):
    """The nn.Sequential of Plain layers."""
    modules, flat = [], False
    for layer in layers:
        if layer.weight.ndim == 2 and not flat:
            modules.append(nn.Flatten())
            flat = True
        modules.append(plain_layer(layer.weight, layer.bias, **layer.geometry))
        modules += [nn.ReLU()] * layer.rectified
    return nn.Sequential(*modules)


def plain(net):
    """The same function as an nn.Sequential of plain layers, for a network as `plain_layers` takes it."""
    return sequential(plain_layers(net)).to(next(net.parameters()).dtype)


def plain_layer(weight, bias=None, **geometry):
    """The Conv2d of a weight (out, in, h, w), whose further arguments are `geometry`, or the Linear of one (out, in)."""
    options = {'bias': bias is not None, 'device': 'meta'}
    if weight.ndim == 4:
        layer = nn.Conv2d(*weight.shape[1::-1], tuple(weight.shape[2:]), **options, **geometry)
    else:
        layer = nn.Linear(*weight.shape[::-1], **options)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer
