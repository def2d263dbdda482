"""How the deviations of the paper's released code change the bounds of a trained network.

    python tests/released_code.py results/mnist-width/CONV-3-8

reads the settings and the weights of that run and prints the factors of docs/released_code.md and
the levels that the released code would plot for this network. Like that code, it leaves the biases
out of the bounds.
"""

import copy
import sys

import conftest  # noqa: F401, for the path to the project
import numpy as np
import torch

from measures.norms import measure_data, measure_network
from measures.trace import trace_layers, weight_layers
from records import load_data, load_network
from utils import golowich_bound, graf_bound, our_bound, sedghi_bound


def changed(table, **values):
    """A copy of a namespace with these values."""
    table = copy.copy(table)
    vars(table).update(values)
    return table


def show(what, factor, quantity):
    print(f'{what:60} {factor:8.3f} times {quantity}')


def main(path):
    net, settings = load_network(path)
    raw_set = load_data(changed(settings, normalize=False))
    for layer in weight_layers(net).values():
        layer.bias = None
    network = measure_network(net, raw_set.input_shape)
    raw = measure_data(net, raw_set.train_images)
    standardized_set = load_data(changed(settings, normalize=True))
    standardized = measure_data(net, standardized_set.train_images)
    data = standardized if settings.normalize else raw

    def value(bound, network=network, data=data):
        return bound(network, data, settings.delta, settings.gamma)

    def compare(what, bound, network=network, data=data):
        show(what, value(bound, network, data) / value(bound), bound.__name__)

    print(path)
    for bound in (our_bound, golowich_bound):
        ratio = value(bound, data=standardized) / value(bound, data=raw)
        show('inputs: standardized', ratio, bound.__name__)
    m = 50000  # the released code's, of MNIST and Fashion-MNIST
    for bound in (our_bound, golowich_bound, sedghi_bound):
        compare('m: 50,000', bound, data=changed(data, m=m))
    log_c = np.log(network.c[-1])
    log_here = network.D * np.log(2) + np.log(network.deg[:-1]).sum() + log_c
    log_released = network.D * np.log(2 * network.deg[:-1].max()) + log_c
    log_factor = (1 + (2 * log_released) ** 0.5) / (1 + (2 * log_here) ** 0.5)
    show('log factor: D log(2 max deg)', log_factor, 'our_bound')

    weights = [layer.weight.flatten(1) for layer in trace_layers(net, raw_set.input_shape)]
    s = np.array([torch.linalg.matrix_norm(weight, 2).item() for weight in weights])
    ratios = np.round(network.s / s, 3)
    print(f'{"operator norms over those of the reshaped kernels":60} {ratios}')
    reshaped = changed(network, s=s)
    compare('s: of the reshaped kernels', sedghi_bound, reshaped)
    compare('s: of the reshaped kernels', graf_bound, reshaped)
    largest = changed(data, E_tot=data.m * data.B**2)
    compare('Graf: largest input norm for sqrt(E_tot / m)', graf_bound, data=largest)
    log_2W = np.log(2 * network.W.max()) ** 0.5
    show('Graf: log(2W) for its square root', log_2W, 'graf_bound, nearly')
    cut = changed(network, R=network.b)
    compare('Graf: the classifier cut into positions', graf_bound, cut)
    graf = value(graf_bound)
    released = changed(data, m=m, E_tot=m * data.B**2)
    four = value(graf_bound, reshaped, released) * log_2W / graf
    show('Graf: the four', four, 'graf_bound, nearly')
    five = value(graf_bound, changed(reshaped, R=network.b), released) * log_2W / graf
    show('Graf: all five, the classifier cut', five, 'graf_bound, nearly')

    levels = np.log2([graf, value(graf_bound, cut)])
    print('graf_bound: 2^{:.2f}, with the classifier cut 2^{:.2f}'.format(*levels))
    ours = value(our_bound, data=changed(raw, m=m)) * log_factor
    standardized = changed(standardized, m=m)
    golowich = value(golowich_bound, data=standardized)
    sedghi = value(sedghi_bound, reshaped, standardized)
    levels = np.log2([ours, golowich, sedghi])
    print('as released: ours 2^{:.1f}, Golowich et al. 2^{:.1f}, Sedghi 2^{:.1f}'.format(*levels))


if __name__ == '__main__':
    main(*sys.argv[1:])
