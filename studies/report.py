"""What several studies share: command lines, reading files, Markdown tables, pictures."""

import argparse
import csv
from pathlib import Path

import numpy as np

from conf import BadInput, Parser
from evaluation import is_finished
from records import read_metrics, rows_of


def study_parser(name, text, files=None):
    """The argument parser of `python -m studies.NAME`, with --out if it writes files."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = Parser(f'python -m studies.{name}', text, formatter_class=as_written)
    if files:
        help = f'write {files} into this folder'
        parser.add_argument('--out', type=Path, metavar='DIR', help=help)
    return parser


def positive(kind):
    """An argparse type: a number above 0."""

    def parse(text):
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f'{kind.__name__} above 0'
    return parse


def read_csv(path):
    """The rows of a csv file, {column: text}."""
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def read_finished(folder, settings):
    """The metrics of a network, {column: array}. Raises BadInput if its training is unfinished."""
    table = read_metrics(folder / settings.name / 'metrics.csv')
    if not is_finished(settings, rows_of(table)):
        advice = f'python train.py --results-path {folder} --resume'
        raise BadInput(f'{folder / settings.name}: is not finished; continue with {advice}')
    return table


def print_table(header, rows):
    """Prints a Markdown table of a header and rows of text."""
    print(f'| {" | ".join(header)} |')
    print(f'|{" --- |" * len(header)}')
    for row in rows:
        print(f'| {" | ".join(row)} |')


def new_figure(width, height):
    """A figure of this size in inches. Matplotlib is imported only when a picture is drawn."""
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), layout='constrained')


def plot_range(panel, x, groups, middle=np.mean, alpha=0.2, marker='o', **style):
    """Plots the middle of each group of values against x, in a band from least to largest."""
    panel.plot(x, [middle(group) for group in groups], marker=marker, **style)
    low, high = [min(group) for group in groups], [max(group) for group in groups]
    panel.fill_between(x, low, high, color=style['color'], alpha=alpha)


def save(figure, path, dpi=130):
    """Saves a picture, in a new folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
