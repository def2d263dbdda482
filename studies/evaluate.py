"""Saved weights measured with today's BOUNDS: python -m studies.evaluate results/7

Snapshots and last checkpoints of each network are measured into its evaluation.csv, which the
figures show over metrics.csv. Rows whose weights are gone stay. delta and gamma, on which bounds
alone depend, may be others than in the training; the table names them.
"""

import sys
from pathlib import Path

import torch

from conf import BadInput, Parser, load_launch, run_program
from datasets import fingerprint
from device import keep_freed_memory
from evaluation import COLUMNS, evaluate, initial_network, power_of_2
from measures.norms import measure_data
from records import FREE, load_data, load_weights, lock, read_metrics, rows_of, write_table
from train import draw_figures, say
from utils import BOUNDS


def evaluate_network(folder, settings):
    """Measures the weights in the folder of a network and rewrites its evaluation.csv."""
    files = [*folder.glob('snapshots/*.pt'), *folder.glob('model.pt'), *folder.glob('weights.pt')]
    if not files:
        say(f'{folder}: has no weights to evaluate')
        return
    dataset = load_data(settings)
    net = initial_network(settings, dataset)
    data = measure_data(net, dataset.train_images, skip_uncovered=True)
    knobs = {'delta': settings.delta, 'gamma': settings.gamma}
    table = folder / 'evaluation.csv'
    kept = rows_of(read_metrics(table)) if table.exists() else []
    rows = {(int(row['round']), int(row['epoch'])): row for row in kept}
    measured = set()
    for file in files:
        position = load_weights(net, file, settings, fingerprint(dataset), (*FREE, *knobs))
        if position is None:
            say(f'{file}: these weights lie between two rows; --resume trains on to the next')
        if position is None or position in measured:
            continue
        measured.add(position)
        row = rows.get(position, {})
        if any(row.get(name) != value for name, value in knobs.items()):
            row = {}  # its cells are of another delta or gamma
        row |= evaluate(net, settings, dataset, data, *position) | knobs
        rows[position] = row
        write_table(table, [*COLUMNS, *knobs], [rows[at] for at in sorted(rows)])
        bounds = [f'{name} {in_words(name, row[name])}' for name in BOUNDS]
        say(f'{settings.name} epoch {position[1]}: {", ".join(bounds)}')
    if measured:
        say(f'{table}: {len(rows)} rows')


def in_words(name, value):
    """A bound as a power of 2; a certified error or margin, or an empty cell, as it is."""
    return f'{value:g}' if name.startswith('certified_') else power_of_2(value)


def main(argv=None):
    parser = Parser('studies.evaluate', __doc__.partition('\n')[0])
    parser.add_argument('folder', type=Path, help='results folder')
    parser.add_argument('--delta', type=float, help='another delta than that of the training')
    parser.add_argument('--gamma', type=float, help='another gamma than that of the training')
    options = parser.parse_args(argv)
    flags = {name: getattr(options, name) for name in ('delta', 'gamma')}
    flags = {name: value for name, value in flags.items() if value is not None}
    sweep, _ = load_launch(options.folder)
    for name in flags:
        if isinstance(sweep[name], list):
            raise BadInput(f'the sweep varies {name}; leave --{name} out')
    keep_freed_memory()
    for settings in load_launch(options.folder, flags)[1]:
        folder = options.folder / settings.name
        if not folder.is_dir():
            continue
        if settings.threads:
            torch.set_num_threads(settings.threads)
        with lock(folder):
            evaluate_network(folder, settings)
    draw_figures(options.folder)
    return 0


if __name__ == '__main__':
    sys.exit(run_program(main))
