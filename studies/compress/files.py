"""Files of narrower networks."""

from types import SimpleNamespace

from torch import nn

from conf import KNOBS, BadInput
from datasets import DATASETS
from measures.trace import Layer, folded_layers, plain_copy, sequential
from models import get_network
from records import load_checkpoint, save_checkpoint
from studies.compress.linear import FIELDS, set_tensors


def save(path, net, input_shape, settings=None):
    """Saves a narrower network.

    Args:
        path: the file.
        net: a chain as `folded_layers` takes it, or, with settings, any network.
        input_shape: (channels, height, width) of an image.
        settings: of the network that it was made from, for `get_network`.
    """
    saved = {'input_shape': list(input_shape)}
    if settings is None:
        layers, dtype = folded_layers(net), next(net.parameters()).dtype
        saved['weights'] = [layer.weight.to('cpu', dtype) for layer in layers]
        saved['biases'] = [
            None if layer.bias is None else layer.bias.to('cpu', dtype) for layer in layers
        ]
        saved['rectified'] = [layer.rectified for layer in layers]
        saved['geometry'] = [layer.geometry for layer in layers]
    else:
        state = plain_copy(net).state_dict()
        saved['settings'] = vars(settings)
        saved['network'] = {name: tensor.to('cpu') for name, tensor in state.items()}
    save_checkpoint(path, saved)


def load(path):
    """The narrower network of a file, on the CPU: load('results/8/CONV-3-200/dead.pt').

    It is an nn.Sequential, or, if only linear layers were fitted, a network of the class that it
    was made from.

    Raises:
        BadInput: the file holds no narrower network, or one of a family that `models` lacks.
    """
    saved = load_checkpoint(path)
    if 'input_shape' not in saved:
        raise BadInput(f'{path}: does not hold a narrower network')
    if 'settings' in saved:
        return _of_family(saved)
    weights = saved['weights']
    # Older files are of bias-free chains, in which a ReLU follows each layer but the last.
    biases = saved.get('biases', [None] * len(weights))
    rectified = saved.get('rectified', [True] * (len(weights) - 1) + [False])
    geometry = [how if weight.ndim == 4 else {} for how, weight in zip(saved['geometry'], weights)]
    return sequential(Layer(*layer) for layer in zip(weights, biases, rectified, geometry))


def _of_family(saved):
    """The network that the saved settings describe, with the sizes of the saved tensors."""
    knobs = {name: neutral for name, (neutral, _) in KNOBS.items()} | saved['settings']
    settings, state = SimpleNamespace(**knobs), saved['network']
    net = plain_copy(get_network(settings, *DATASETS[settings.dataset_name][1:3])).eval()
    for name, module in net.named_modules():
        fields = [field for field in FIELDS if f'{name}.{field}' in state]
        if fields and isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)):
            set_tensors(module, {field: state[f'{name}.{field}'] for field in fields})
    net.load_state_dict(state)
    return net
