"""How many training images reach a test error, at each density: launches of conf/samples.py (docs/sparse.md).

python docs/samples.py results/7 results/8 ...   prints a table and draws docs/samples.png, in seconds
"""

import sys
from pathlib import Path

import numpy as np

from conf import ROOT
from records import folder_settings, read_metrics
from summary import last_rows

PICTURE = ROOT / 'docs' / 'samples.png'
ERROR = 0.08


def read(folders):
    """{number of images: (runs, rounds) test errors at the ends of the rounds}, and the rounds' densities."""
    errors = {}
    for folder in folders:
        for run in folder_settings(folder)[1]:
            rows = last_rows(read_metrics(folder / run.name / 'metrics.csv'))
            errors.setdefault(run.train_samples, []).append([row['test_error'] for row in rows])
            densities = [row['density'] for row in rows]
    return {samples: np.array(errors[samples]) for samples in sorted(errors)}, densities


def main(folders):
    import matplotlib.figure

    errors, densities = read(folders)
    print(
        '| density |',
        *(f'{samples} images |' for samples in errors),
        f'images for an error of {ERROR} |',
    )
    print('|', ' --- |' * (len(errors) + 2), sep='')
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout='constrained')
    panel = figure.subplots()
    for number, density in enumerate(densities):
        rounds = [runs[:, number] for runs in errors.values()]
        means, low, high = ([f(runs) for runs in rounds] for f in (np.mean, np.min, np.max))
        reached = [samples for samples, mean in zip(errors, means) if mean <= ERROR]
        cells = [
            *(f'{mean:.3f}' for mean in means),
            str(reached[0]) if reached else f'more than {max(errors)}',
        ]
        print(f'| {density:.3g} |', ' | '.join(cells), '|')
        panel.plot(
            list(errors), means, marker='o', color=f'C{number}', label=f'density {density:.3g}'
        )
        panel.fill_between(list(errors), low, high, color=f'C{number}', alpha=0.2)
    panel.axhline(ERROR, color='black', linewidth=0.8)
    panel.set(xscale='log', xlabel='training images', ylabel='test error', ylim=0)
    panel.set_xticks([], minor=True)
    panel.set_xticks(list(errors), labels=[str(samples) for samples in errors])
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    figure.savefig(PICTURE, dpi=130)


if __name__ == '__main__':
    main([Path(folder) for folder in sys.argv[1:]])
