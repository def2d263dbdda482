"""Test error and remaining channels against channel_sparsity (docs/topology.md).

    python train.py --settings conf/channels.py --results-path results/7
    python -m studies.channels results/7 [--out DIR]

prints a table of the sweep. The weights of each network without its dead channels are counted where
its model.pt is, and otherwise come from export.csv in the sweep's folder.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from conf import BadInput, load_launch, run_program
from measures.masks import drop_dead
from records import load_network, read_layers, write_table
from studies.report import (
    new_figure,
    plot_range,
    print_table,
    read_csv,
    read_finished,
    save,
    study_parser,
)

NAMES = {'random': 'SET', 'gradient': 'RigL'}
COLORS = {'random': '#0072B2', 'gradient': '#D55E00'}


def read(folder):
    """{(regrow, channel_sparsity): networks}, each with its name, test error, density, and
    `channels`, {epoch: remaining channels of each hidden layer}."""
    networks = {}
    for run in load_launch(folder)[1]:
        if run.regrow not in NAMES:
            raise BadInput(f'{run.name}: regrow must be random or gradient, as in conf/channels.py')
        layers = read_layers(folder / run.name / 'layers.csv')
        metrics = read_finished(folder, run)
        hidden = (layers['layer'] > 0) & (layers['layer'] <= run.depth)
        channels = {}
        for epoch in np.unique(layers['epoch']):
            dead = layers['dead_channels'][hidden & (layers['epoch'] == epoch)]
            channels[epoch] = run.width - dead
        network = SimpleNamespace(name=run.name, channels=channels)
        network.error, network.density = metrics['test_error'][-1], metrics['density'][-1]
        networks.setdefault((run.regrow, run.channel_sparsity), []).append(network)
    return networks


def count_exported(folder, names):
    """Rows of export.csv: the number of weights of each network without its dead channels."""
    if not all((folder / name / 'model.pt').exists() for name in names):
        return read_csv(folder / 'export.csv')
    rows = []
    for name in names:
        small = drop_dead(load_network(folder / name)[0])
        rows.append({'name': name, 'weights': sum(w.numel() for w in small.parameters())})
    return rows


def last(network):
    """Remaining channels of each hidden layer after the last epoch."""
    return network.channels[max(network.channels)]


def draw(networks):
    figure = new_figure(8.5, 6.5)
    mosaic = figure.subplot_mosaic([['errors', 'channels'], ['epochs', 'epochs']])
    panels = list(mosaic.values())
    for regrow in dict.fromkeys(regrow for regrow, _ in networks):
        color = COLORS[regrow]
        sparsities = sorted(sparsity for kind, sparsity in networks if kind == regrow)
        groups = [networks[regrow, sparsity] for sparsity in sparsities]
        style = {'color': color, 'label': NAMES[regrow]}
        errors = [[network.error for network in group] for group in groups]
        plot_range(panels[0], sparsities, errors, **style)
        channels = [[last(network).sum() for network in group] for group in groups]
        plot_range(panels[1], sparsities, channels, **style)
        # Of the largest channel_sparsity: means over seeds at each epoch.
        epochs = list(groups[-1][0].channels)
        counts = np.mean([list(network.channels.values()) for network in groups[-1]], axis=0)
        for layer, line in enumerate(('-', '--', ':')):
            label = f'{NAMES[regrow]}, layer {layer + 1}'
            panels[2].plot(epochs, counts[:, layer], line, color=color, label=label)
    panels[0].set(xlabel='channel_sparsity', ylabel='test error', ylim=0)
    panels[1].set(xlabel='channel_sparsity', ylabel='hidden channels left', ylim=0)
    label = f'channels left, channel_sparsity {sparsities[-1]}'
    panels[2].set(xlabel='epoch', ylabel=label, ylim=0)
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    panels[1].legend(frameon=False)
    panels[2].legend(frameon=False, loc='upper right', ncols=2)
    return figure


def main(arguments=None):
    parser = study_parser('channels', __doc__, 'channels.png and export.csv')
    parser.add_argument('folder', type=Path, help='results folder of conf/channels.py')
    options = parser.parse_args(arguments)
    networks = read(options.folder)
    names = [network.name for group in networks.values() for network in group]
    exported = count_exported(options.folder, names)
    weights = {row['name']: int(row['weights']) for row in exported}
    rows = []
    for (regrow, sparsity), group in networks.items():
        errors = [network.error for network in group]
        error = f'{np.mean(errors):.3f} ({min(errors):.3f} to {max(errors):.3f})'
        density = f'{100 * np.mean([network.density for network in group]):.1f} %'
        channels = ['-'.join(f'{count:.0f}' for count in last(network)) for network in group]
        counts = [f'{weights[network.name]:,}' for network in group]
        cells = error, density, ', '.join(channels), ', '.join(counts)
        rows.append((NAMES[regrow], str(sparsity), *cells))
    header = '', 'channel_sparsity', 'test error', 'weights', 'channels left', 'weights exported'
    print_table(header, rows)
    if options.out:
        save(draw(networks), options.out / 'channels.png')
        write_table(options.out / 'export.csv', ['name', 'weights'], exported)


if __name__ == '__main__':
    sys.exit(run_program(main))
