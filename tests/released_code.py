"""How much the deviations of the paper's released code change the bounds of a trained network.

    python tests/released_code.py results/7 CONV-3-32

reads the settings and the checkpoint of that run and prints, line by line, the factors of the README's table.
"""

import copy
import sys
from pathlib import Path

import conftest  # noqa: F401, for the path to the project
import numpy as np
import torch

from conf import load_settings
from models import get_network
from train import get_dataset
from utils import (
    golowich_bound,
    graf_bound,
    load_checkpoint,
    measure_data,
    measure_network,
    our_bound,
    sedghi_bound,
    trace_layers,
)


def main(folder, name):
    settings = next(run for run in load_settings(Path(folder, 'global_settings.py'))[1] if run.name == name)
    where = settings.dataset_name, settings.data_dir
    raw, standardized = (get_dataset(*where, normalize, 'cpu') for normalize in (False, True))
    net = get_network(settings, raw.input_shape, raw.num_classes)
    net.load_state_dict(load_checkpoint(Path(folder, name, 'model.pt'), 'cpu')['network'])
    network = measure_network(net, raw.input_shape)
    data, standardized_data = measure_data(net, raw.train_images), measure_data(net, standardized.train_images)
    rest = (settings.delta, settings.gamma)

    def changed(table, **values):
        table = copy.copy(table)
        vars(table).update(values)
        return table

    def show(what, bound, network_there, data_there):
        factor = bound(network_there, data_there, *rest) / bound(network, data, *rest)
        print(f'{what:60} {factor:8.3f} times {bound.__name__}')

    print(f'{folder}/{name}')
    show('inputs: standardized', our_bound, network, standardized_data)
    show('inputs: standardized', golowich_bound, network, standardized_data)
    show('m: 50,000', our_bound, network, changed(data, m=50000))
    log_here = network.D * np.log(2) + np.log(network.deg[:-1]).sum() + np.log(network.c[-1])
    log_there = network.D * np.log(2 * network.deg[:-1].max()) + np.log(network.c[-1])
    print(
        f'{"log factor: D log(2 max deg)":60} {(1 + (2 * log_there) ** 0.5) / (1 + (2 * log_here) ** 0.5):8.3f} times our_bound'
    )

    weights = [layer.module.weight.detach().double().flatten(1) for layer in trace_layers(net, raw.input_shape)]
    reshaped = np.array([torch.linalg.matrix_norm(weight, 2).item() for weight in weights])
    print(f'{"operator norms over those of the reshaped kernels":60} {np.round(network.s / reshaped, 3)}')
    show('s: of the reshaped kernels', sedghi_bound, changed(network, s=reshaped), data)
    show('s: of the reshaped kernels', graf_bound, changed(network, s=reshaped), data)
    largest = raw.train_images.flatten(1).norm(dim=1).max().item()
    show('Graf: largest input norm for sqrt(E_tot / m)', graf_bound, network, changed(data, E_tot=data.m * largest**2))
    print(f'{"Graf: log(2W) for its square root":60} {np.log(2 * network.W.max()) ** 0.5:8.3f} times graf_bound, nearly')


if __name__ == '__main__':
    main(*sys.argv[1:])
