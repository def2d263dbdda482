"""How many training images reach a test error, at each density (docs/samples.md).

    python -m studies.samples results/7 results/8 ... [--out DIR]

prints a table of launches of conf/samples.py, one per number of training images.
"""

import sys
from pathlib import Path

import numpy as np

from conf import load_launch, run_program
from figures import last_rows
from studies.report import new_figure, plot_range, print_table, read_finished, save, study_parser

ERROR = 0.08


def read(folders):
    """{number of images: (runs, rounds) test errors after each round}, and their densities."""
    errors = {}
    for folder in folders:
        for run in load_launch(folder)[1]:
            rows = last_rows(read_finished(folder, run))
            errors.setdefault(run.train_samples, []).append([row['test_error'] for row in rows])
            densities = [row['density'] for row in rows]
    return {samples: np.array(errors[samples]) for samples in sorted(errors)}, densities


def draw(errors, densities):
    figure = new_figure(6, 4)
    panel = figure.subplots()
    for number, density in enumerate(densities):
        rounds = [runs[:, number] for runs in errors.values()]
        style = {'color': f'C{number}', 'marker': 'osD^'[number % 4]}
        style['label'] = f'density {density:.3g}'
        plot_range(panel, list(errors), rounds, **style)
    panel.axhline(ERROR, color='black', linewidth=0.8)
    panel.set(xscale='log', xlabel='training images', ylabel='test error', ylim=0)
    panel.set_xticks([], minor=True)
    panel.set_xticks(list(errors), labels=[str(samples) for samples in errors])
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    return figure


def main(arguments=None):
    parser = study_parser('samples', __doc__, 'samples.png')
    parser.add_argument('folders', nargs='+', type=Path, help='results folders of conf/samples.py')
    options = parser.parse_args(arguments)
    errors, densities = read(options.folders)
    rows = []
    for number, density in enumerate(densities):
        means = {samples: runs[:, number].mean() for samples, runs in errors.items()}
        reached = [str(samples) for samples, mean in means.items() if mean <= ERROR]
        reached.append(f'more than {max(errors)}')
        rows.append((f'{density:.3g}', *(f'{mean:.3f}' for mean in means.values()), reached[0]))
    images = [f'{samples} images' for samples in errors]
    print_table(('density', *images, f'images for an error of {ERROR}'), rows)
    if options.out:
        save(draw(errors, densities), options.out / 'samples.png')


if __name__ == '__main__':
    sys.exit(run_program(main))
