"""What training buys a coded network: the tables and the picture of a folder (docs/coded.md).

python -m studies.coded.controls results/coded                draws coded.png from the tables
python -m studies.coded.controls results/coded --prove        proves the messages again first
python -m studies.coded.controls results/coded --differ       bounds the shipped networks first
python -m studies.coded.controls results/coded --seconds 60   searches each control first

A control is the same search, for that many CPU seconds, on hidden layers that nobody trained or on
random labels.
"""

import math
import sys
from pathlib import Path

import torch

from conf import ROOT, load_settings, run_program
from evaluation import rounded_up
from measures.pac_bayes import COLUMNS as CERTIFICATES
from measures.tails import exact_binomial_inverse
from records import load_data, read_metrics, write_table
from studies.coded.__main__ import compare
from studies.coded.message import count_errors, encode, prove, share
from studies.coded.search import search, unfitted
from studies.report import new_figure, read_csv, save, study_parser

RESULTS = ROOT / 'results'
NETWORKS = 'mnist-width mnist-depth sparse-certificate released batch-norm mnist-200-decays'.split()
COLUMNS = 'name', 'bytes', 'train_error', 'test_error', 'bound'
SEED_BYTES = 2  # a message of random kernels only says which of 2^16 seeds they are drawn with
WIDTHS = 4, 8, 16


def control(widths, q=None):
    """The code of random ternary 2x2 kernels, with a classifier of zeros."""
    generator, kernels, channels = torch.Generator().manual_seed(0), [], 1
    for width in widths:
        kernels.append(torch.randint(-1, 2, (width, channels, 2, 2), generator=generator))
        channels = width
    return unfitted(kernels, [(1, 0)] * len(kernels), 1, 10, q)


def row_of(name, length, code, errors, dataset):
    """A row of a table: what a network of `length` bytes proves by its number of errors."""
    m, test_labels = len(dataset.train_labels), dataset.test_labels
    test_error = count_errors(code, dataset.test_images, test_labels) / len(test_labels)
    bound = float(exact_binomial_inverse(errors, m, share(length, 0.001)))
    return dict(zip(COLUMNS, (name, length, errors / m, test_error, bound), strict=True))


def controls(path, dataset, seconds):
    """Searches each control and writes its row; the kernels are held, their seed is sent."""
    images, labels = dataset.train_images, dataset.train_labels
    generator = torch.Generator().manual_seed(0)
    random_labels = torch.randint(10, labels.shape, generator=generator)
    tried = [('pixels', control((), 8), labels)]
    tried += [(f'random {w}, {w}, {w}', control((w,) * 3), labels) for w in WIDTHS]
    tried.append(('random labels', control((), 8), random_labels))
    rows = []
    for name, code, own in tried:
        *_, (_, _, best) = search(code, images, own, seconds=seconds, hold=True)
        length = len(encode(best._replace(kernels=[], geometry=[])))
        if best.kernels:
            length += SEED_BYTES
        errors = count_errors(best, images, own)
        rows.append(row_of(name, length, best, errors, dataset))
        print(rows[-1], flush=True)
        write_table(path, COLUMNS, rows)


def messages(folder, dataset):
    """Proves the messages of a folder again and writes their rows."""
    rows = []
    for path in sorted(folder.glob('*/coded.bin')):
        message = path.read_bytes()
        proof = prove(message, dataset.train_images, dataset.train_labels, dataset.num_classes)
        name = f'D, from {path.parent.name}'
        rows.append(row_of(name, len(message), proof.code, proof.errors, dataset))
    write_table(folder / 'messages.csv', COLUMNS, rows)


def differences(folder):
    """Certificate E of each shipped MNIST network with weights, by the shortest message."""
    message = min(folder.glob('*/coded.bin'), key=lambda path: path.stat().st_size)
    rows = []
    for name in NETWORKS:
        for weights in sorted((RESULTS / name).glob('*/weights.pt')):
            row = compare(weights.parent, message)
            rows.append({'name': str(weights.parent.relative_to(RESULTS))} | row)
    write_table(folder / 'disagreement.csv', rows[0], rows)


def rows_drawn(folder):
    """[(name, proven error, test error)] of A, B, C of a pruned network, messages and controls."""
    metrics, rows = read_metrics(RESULTS / 'sparse-certificate' / 'CONV-3-16' / 'metrics.csv'), []
    for letter, column in zip('ABC', CERTIFICATES, strict=True):
        test_error = metrics['test_error'][-1] if letter == 'A' else math.nan
        rows.append((f'{letter} of pruned CONV-3-16', metrics[column][-1], test_error))
    for name in ('messages', 'controls'):
        for row in read_csv(folder / f'{name}.csv'):
            label = f'{row["name"]}, {row["bytes"]} bytes'
            rows.append((label, float(row['bound']), float(row['test_error'])))
    return rows


def draw(folder):
    """coded.png: the proven and the test error of each."""
    names, bounds, tests = zip(*rows_drawn(folder), strict=True)
    figure = new_figure(6.5, 1 + 0.32 * len(names))
    axes = figure.subplots()
    colors = ['tab:red' if name.startswith('D') else 'silver' for name in names]
    axes.barh(names, bounds, color=colors, label='proven error')
    axes.plot(tests, names, 'k|', markersize=14, label='test error')
    edge = 0.3  # of the axis; the arrow says that a bar ends outside
    for name, bound in zip(names, bounds, strict=True):
        text = f'{rounded_up(bound):.4f}' + (' →' if bound > edge else '')
        end = min(bound, edge - 0.05), name
        axes.annotate(text, end, (3, 0), textcoords='offset points', va='center')
    axes.set_xlim(0, edge)
    axes.invert_yaxis()
    axes.set_xlabel('error on MNIST, proven with probability 0.999')
    axes.legend(loc='upper right', bbox_to_anchor=(1, 0.72))
    save(figure, folder / 'coded.png')


def main(argv=None):
    parser = study_parser('coded.controls', __doc__)
    add = parser.add_argument
    add('folder', type=Path, help='folder of the messages, tables and the picture')
    add('--prove', action='store_true', help='prove the messages again, into messages.csv')
    add('--differ', action='store_true', help='certificate E, into disagreement.csv')
    add('--seconds', type=float, metavar='X', help='search the controls, into controls.csv')
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.prove or options.seconds:
        flags = {
            'dataset_name': 'MNIST',
            'normalize': False,
            'train_samples': 0,
            'label_noise': 0.0,
        }
        dataset = load_data(load_settings(flags=flags)[1][0], 'cpu')
        if options.prove:
            messages(options.folder, dataset)
        if options.seconds:
            controls(options.folder / 'controls.csv', dataset, options.seconds)
    if options.differ:
        differences(options.folder)
    draw(options.folder)


if __name__ == '__main__':
    sys.exit(run_program(main))
