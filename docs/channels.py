"""Test error and channels left against channel_sparsity, of a sweep of conf/channels.py (docs/sparse.md).

python train.py --settings conf/channels.py --results-path results/7
python docs/channels.py results/7   prints a table and draws docs/channels.png, in seconds
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from harness.records import folder_settings, read_layers, read_metrics

WORDS = {'random': 'SET', 'gradient': 'RigL'}


def read(folder):
    """{(regrow, channel_sparsity): [(test error, density, channels left of each layer)] over seeds}."""
    found = {}
    for run in folder_settings(folder)[1]:
        layers = read_layers(folder / run.name / 'layers.csv')
        metrics = read_metrics(folder / run.name / 'metrics.csv')
        last = (layers['epoch'] == run.epochs) & (layers['layer'] > 0) & (layers['layer'] <= run.depth)
        left = run.width - layers['dead_channels'][last]
        row = metrics['test_error'][-1], metrics['density'][-1], left
        found.setdefault((run.regrow, run.channel_sparsity), []).append(row)
    return found


def main(folder):
    import matplotlib.figure

    found = read(folder)
    print('| | channel_sparsity | test error | weights | channels left |\n| --- | --- | --- | --- | --- |')
    for (regrow, sparsity), rows in found.items():
        errors, densities, left = zip(*rows)
        channels = ', '.join('-'.join(f'{count:.0f}' for count in layers) for layers in left)
        error = f'{np.mean(errors):.3f} ({min(errors):.3f} to {max(errors):.3f})'
        cells = WORDS[regrow], str(sparsity), error, f'{100 * np.mean(densities):.1f} %', channels
        print(f'| {" | ".join(cells)} |')

    figure = matplotlib.figure.Figure(figsize=(10, 4), layout='constrained')
    panels = figure.subplots(1, 2)
    for (regrow, words), color in zip(WORDS.items(), ('#0072B2', '#D55E00')):
        sparsities = sorted(sparsity for kind, sparsity in found if kind == regrow)
        rows = [found[regrow, sparsity] for sparsity in sparsities]
        errors = [[error for error, _, _ in runs] for runs in rows]
        left = [[channels.sum() for _, _, channels in runs] for runs in rows]
        for panel, values in zip(panels, (errors, left)):
            panel.plot(sparsities, [np.mean(runs) for runs in values], marker='o', color=color, label=words)
            range_ = ([f(runs) for runs in values] for f in (min, max))
            panel.fill_between(sparsities, *range_, color=color, alpha=0.2)
    panels[0].set(xlabel='channel_sparsity', ylabel='test error', ylim=0)
    panels[1].set(xlabel='channel_sparsity', ylabel='hidden channels left', ylim=0)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(Path(__file__).with_suffix('.png'), dpi=130)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
