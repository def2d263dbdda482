"""How much the deviations of the paper's released code change the bounds of a trained network.

    python tests/released_code.py results/mnist-width/CONV-3-8

reads the settings and the weights of that run and prints, line by line, the factors of docs/released_code.md, and the levels
that the released code would plot for this network. It evaluates the bounds as if there were no biases; so does this script.
"""

import copy
import sys
from types import SimpleNamespace

import conftest  # noqa: F401, for the path to the project
import numpy as np
import torch

from measures.norms import measure_data, measure_network
from measures.trace import trace_layers, weight_layers
from records import load_data, load_network
from utils import golowich_bound, graf_bound, our_bound, sedghi_bound


def changed(table, **values):
    table = copy.copy(table)
    vars(table).update(values)
    return table


def main(path):
    net, settings = load_network(path)
    raw, standardized = (
        load_data(SimpleNamespace(**(vars(settings) | {'normalize': normalize})))
        for normalize in (False, True)
    )
    for layer in weight_layers(net).values():
        layer.bias = None
    network = measure_network(net, raw.input_shape)
    raw_data, standardized_data = (
        measure_data(net, raw.train_images),
        measure_data(net, standardized.train_images),
    )
    data = standardized_data if settings.normalize else raw_data

    def value(bound, network, data):
        return bound(network, data, settings.delta, settings.gamma)

    def show(what, factor, quantity):
        print(f'{what:60} {factor:8.3f} times {quantity}')

    def compare(what, bound, network_there, data_there):
        show(
            what,
            value(bound, network_there, data_there) / value(bound, network, data),
            bound.__name__,
        )

    print(path)
    show(
        'inputs: standardized',
        value(our_bound, network, standardized_data) / value(our_bound, network, raw_data),
        'our_bound',
    )
    golowich = [value(golowich_bound, network, inputs) for inputs in (standardized_data, raw_data)]
    show('inputs: standardized', golowich[0] / golowich[1], 'golowich_bound')
    for bound in (our_bound, golowich_bound, sedghi_bound):
        compare('m: 50,000', bound, network, changed(data, m=50000))
    log_here = network.D * np.log(2) + np.log(network.deg[:-1]).sum() + np.log(network.c[-1])
    log_there = network.D * np.log(2 * network.deg[:-1].max()) + np.log(network.c[-1])
    log_factor = (1 + (2 * log_there) ** 0.5) / (1 + (2 * log_here) ** 0.5)
    show('log factor: D log(2 max deg)', log_factor, 'our_bound')

    weights = [layer.weight.flatten(1) for layer in trace_layers(net, raw.input_shape)]
    reshaped = np.array([torch.linalg.matrix_norm(weight, 2).item() for weight in weights])
    print(
        f'{"operator norms over those of the reshaped kernels":60} {np.round(network.s / reshaped, 3)}'
    )
    compare('s: of the reshaped kernels', sedghi_bound, changed(network, s=reshaped), data)
    compare('s: of the reshaped kernels', graf_bound, changed(network, s=reshaped), data)
    largest = changed(data, E_tot=data.m * data.B**2)
    compare('Graf: largest input norm for sqrt(E_tot / m)', graf_bound, network, largest)
    log_2W = np.log(2 * network.W.max()) ** 0.5
    show('Graf: log(2W) for its square root', log_2W, 'graf_bound, nearly')
    cut = changed(network, R=network.b)
    compare('Graf: the classifier cut into positions', graf_bound, cut, data)
    four, m = changed(network, s=reshaped), 50000
    energy = m * data.B**2
    for what, network_there in (
        ('the four', four),
        ('all five, the classifier cut', changed(four, R=network.b)),
    ):
        there = value(graf_bound, network_there, changed(data, m=m, E_tot=energy))
        show(
            f'Graf: {what}', there * log_2W / value(graf_bound, network, data), 'graf_bound, nearly'
        )
    level = np.log2(value(graf_bound, network, data))
    print(
        f'graf_bound: 2^{level:.2f}, with the classifier cut 2^{np.log2(value(graf_bound, cut, data)):.2f}'
    )
    ours = value(our_bound, network, changed(raw_data, m=m)) * log_factor
    golowich, sedghi = (
        value(bound, table, changed(standardized_data, m=m))
        for bound, table in ((golowich_bound, network), (sedghi_bound, four))
    )
    print(
        f'as released: ours 2^{np.log2(ours):.1f}, Golowich et al. 2^{np.log2(golowich):.1f}, Sedghi 2^{np.log2(sedghi):.1f}'
    )


if __name__ == '__main__':
    main(*sys.argv[1:])
