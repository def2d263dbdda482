"""What training buys a coded network: the same search on hidden layers that nobody trained, and results/coded/coded.png.

python docs/coded_controls.py 60    proves the shipped messages, searches each control for 60 CPU seconds, and draws
python docs/coded_controls.py       only draws, from results/coded
"""

import csv
import math
import sys

import matplotlib
import torch
from launch import get_dataset

from conf import ROOT
from evaluation import rounded_up
from measures.pac_bayes import COLUMNS as CERTIFICATES
from records import read_metrics
from studies.coded.message import binomial_inverse, count_errors, encode, log_eta, prove
from studies.coded.search import search, unfitted
from summary import csv_file

FOLDER = ROOT / 'results' / 'coded'
COLUMNS = 'name', 'bytes', 'train_error', 'test_error', 'bound'
SEED_BYTES = 2  # a message of random kernels says only which of 2^16 seeds they are drawn with
WIDTHS = 4, 8, 16


def control(widths, q=None):
    """The code of random ternary kernels of 2x2, with a classifier of zeros."""
    generator, kernels, before = torch.Generator().manual_seed(0), [], 1
    for width in widths:
        kernels.append(torch.randint(-1, 2, (width, before, 2, 2), generator=generator))
        before = width
    return unfitted(kernels, [(1, 0)] * len(kernels), 1, 10, q)


def measure(name, code, dataset, labels, seconds):
    """A row: what the search makes of these kernels, which it holds; random ones cost no more than their seed."""
    *_, (_, _, best) = search(code, dataset.train_images, labels, seconds=seconds, hold=True)
    length = len(encode(best._replace(kernels=[], geometry=[]))) + SEED_BYTES * bool(best.kernels)
    errors, m = count_errors(best, dataset.train_images, labels), len(labels)
    test = count_errors(best, dataset.test_images, dataset.test_labels) / len(dataset.test_labels)
    return dict(
        zip(
            COLUMNS,
            (name, length, errors / m, test, binomial_inverse(errors, m, log_eta(length, 0.001))),
        )
    )


def controls(seconds):
    """The rows of all controls, into results/coded/controls.csv."""
    dataset = get_dataset('MNIST', 'data')
    shuffled = dataset.train_labels[
        torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(0))
    ]
    tried = [('pixels', control((), 8), dataset.train_labels)]
    for width in WIDTHS:
        tried.append(
            (f'random {width}, {width}, {width}', control((width,) * 3), dataset.train_labels)
        )
    tried.append(('random labels', control((), 8), shuffled))
    rows = []
    for name, code, labels in tried:
        rows.append(measure(name, code, dataset, labels, seconds))
        print(rows[-1], flush=True)
        (FOLDER / 'controls.csv').write_bytes(csv_file(rows))


def messages():
    """The rows of the shipped messages, proven anew, into results/coded/messages.csv."""
    dataset, rows = get_dataset('MNIST', 'data'), []
    for path in sorted(FOLDER.glob('*/coded.bin')):
        proof = prove(
            path.read_bytes(), dataset.train_images, dataset.train_labels, dataset.num_classes
        )
        test = count_errors(proof.code, dataset.test_images, dataset.test_labels) / len(
            dataset.test_labels
        )
        train = proof.errors / len(dataset.train_labels)
        rows.append(
            dict(
                zip(
                    COLUMNS,
                    (f'D, from {path.parent.name}', path.stat().st_size, train, test, proof.bound),
                )
            )
        )
    (FOLDER / 'messages.csv').write_bytes(csv_file(rows))


def rows_drawn():
    """(name, proven error, test error) of A, B, C of the pruned CONV-3-16, of the shipped messages, and of the controls."""
    metrics = read_metrics(ROOT / 'results' / 'sparse-certificate' / 'CONV-3-16' / 'metrics.csv')
    for letter, column in zip('ABC', CERTIFICATES):
        yield (
            f'{letter} of pruned CONV-3-16',
            metrics[column][-1],
            metrics['test_error'][-1] if letter == 'A' else math.nan,
        )
    for name in ('messages', 'controls'):
        if (path := FOLDER / f'{name}.csv').exists():
            for row in csv.DictReader(path.open()):
                yield (
                    f'{row["name"]}, {row["bytes"]} bytes',
                    float(row['bound']),
                    float(row['test_error']),
                )


def draw():
    """results/coded/coded.png: the proven and the test error of each."""
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    names, bounds, tests = zip(*rows_drawn())
    figure, axes = plt.subplots(figsize=(7, 1 + 0.34 * len(names)), layout='constrained')
    axes.barh(
        names,
        bounds,
        color=['tab:red' if name.startswith('D') else 'silver' for name in names],
        label='proven error',
    )
    axes.plot(tests, names, 'k|', markersize=14, label='test error')
    for name, bound in zip(names, bounds):
        axes.annotate(
            f'{rounded_up(bound):.4f}',
            (min(bound, 0.27), name),
            (3, 0),
            textcoords='offset points',
            va='center',
        )
    axes.set_xlim(0, 0.3)
    axes.invert_yaxis()
    axes.set_xlabel('error on MNIST, proven with probability 0.999')
    axes.legend(loc='upper right', bbox_to_anchor=(1, 0.72))
    figure.savefig(FOLDER / 'coded.png', dpi=130)


if __name__ == '__main__':
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        messages()
        controls(float(sys.argv[1]))
    draw()
