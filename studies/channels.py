"""Test error and channels left against channel_sparsity, of a sweep of conf/channels.py (docs/sparse.md).

python train.py --settings conf/channels.py --results-path results/7
python docs/channels.py results/7   prints a table and draws docs/channels.png, in seconds

The weights of the networks without their dead channels are kept in export.csv, next to the networks' folders.
"""

import csv
import sys
from pathlib import Path

import numpy as np

from conf import ROOT
from measures.masks import drop_dead
from records import folder_settings, load_network, read_layers, read_metrics

PICTURE = ROOT / 'docs' / 'channels.png'
WORDS = {'random': 'SET', 'gradient': 'RigL'}
COLORS = '#0072B2', '#D55E00'


def read(folder):
    """{(regrow, channel_sparsity): [(test error, density, {epoch: channels left of each layer}, name)] over seeds}."""
    found = {}
    for run in folder_settings(folder)[1]:
        layers = read_layers(folder / run.name / 'layers.csv')
        metrics = read_metrics(folder / run.name / 'metrics.csv')
        hidden = (layers['layer'] > 0) & (layers['layer'] <= run.depth)
        epochs, dead = layers['epoch'][hidden], layers['dead_channels'][hidden]
        left = {epoch: run.width - dead[epochs == epoch] for epoch in np.unique(epochs)}
        row = metrics['test_error'][-1], metrics['density'][-1], left, run.name
        found.setdefault((run.regrow, run.channel_sparsity), []).append(row)
    return found


def exported(folder, names):
    """{name: weights without dead channels}: counted where the networks are, else as export.csv has them."""
    path = folder / 'export.csv'
    if all((folder / name / 'model.pt').exists() for name in names):
        small = {name: drop_dead(load_network(folder / name)[0]) for name in names}
        rows = [
            f'{name},{sum(weight.numel() for weight in net.parameters())}'
            for name, net in small.items()
        ]
        path.write_text('\n'.join(['name,weights', *rows, '']))
    return {row['name']: int(row['weights']) for row in csv.DictReader(path.open())}


def draw_epochs(panel, found):
    """Channels left in each layer against the epoch at the largest channel_sparsity, means over seeds."""
    sparsity = max(sparsity for _, sparsity in found)
    for (regrow, words), color in zip(WORDS.items(), COLORS):
        left = [row[2] for row in found[regrow, sparsity]]
        means = np.mean([list(run.values()) for run in left], axis=0)
        for layer, (counts, style) in enumerate(zip(means.T, ('-', '--', ':')), 1):
            panel.plot(list(left[0]), counts, style, color=color, label=f'{words}, layer {layer}')
    panel.set(xlabel='epoch', ylabel=f'channels left, channel_sparsity {sparsity}', ylim=0)


def main(folder):
    import matplotlib.figure

    found = read(folder)
    weights = exported(folder, [row[3] for rows in found.values() for row in rows])
    header = '', 'channel_sparsity', 'test error', 'weights', 'channels left', 'weights exported'
    print(f'| {" | ".join(header)} |\n|{" --- |" * len(header)}')
    for (regrow, sparsity), rows in found.items():
        errors, densities, left, names = zip(*rows)
        channels = ', '.join('-'.join(f'{count:.0f}' for count in run[max(run)]) for run in left)
        error = f'{np.mean(errors):.3f} ({min(errors):.3f} to {max(errors):.3f})'
        cells = WORDS[regrow], str(sparsity), error, f'{100 * np.mean(densities):.1f} %', channels
        print(f'| {" | ".join(cells)} | {", ".join(f"{weights[name]:,}" for name in names)} |')

    epochs = len(rows[0][2]) > 2  # more rows than those of the start and the end
    figure = matplotlib.figure.Figure(figsize=(15 if epochs else 10, 4), layout='constrained')
    panels = figure.subplots(1, 3 if epochs else 2)
    for (regrow, words), color in zip(WORDS.items(), COLORS):
        sparsities = sorted(sparsity for kind, sparsity in found if kind == regrow)
        rows = [found[regrow, sparsity] for sparsity in sparsities]
        errors = [[error for error, *_ in runs] for runs in rows]
        left = [[channels[max(channels)].sum() for _, _, channels, _ in runs] for runs in rows]
        for panel, values in zip(panels, (errors, left)):
            panel.plot(
                sparsities, [np.mean(runs) for runs in values], marker='o', color=color, label=words
            )
            range_ = ([f(runs) for runs in values] for f in (min, max))
            panel.fill_between(sparsities, *range_, color=color, alpha=0.2)
    panels[0].set(xlabel='channel_sparsity', ylabel='test error', ylim=0)
    panels[1].set(xlabel='channel_sparsity', ylabel='hidden channels left', ylim=0)
    if epochs:
        draw_epochs(panels[2], found)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(PICTURE, dpi=130)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
