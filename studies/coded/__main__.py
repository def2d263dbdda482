"""A network as a message of a few hundred bytes, with a proven bound of its true error (docs/coded.md).

python coded.py results/7/CONV-3-16 --seconds 600   searches, and leaves coded.bin beside the network's weights
python coded.py --check results/7/CONV-3-16/coded.bin   decodes it and proves its error anew
"""

import signal
import sys

if __name__ == '__main__':
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # while torch is imported, Ctrl-C ends the program without a traceback

import argparse
from pathlib import Path
from types import SimpleNamespace

import launch
import torch
from tqdm import tqdm

from conf import BadInput, Parser, load_settings
from datasets import DATASETS
from device import guarded
from evaluation import no_certificate, rounded_up
from records import load_network, write_file
from studies.coded.message import count_errors, decode, encode, prove
from studies.coded.search import rounded, search


def coded_line(message, dataset, delta):
    """What a message proves, in words; everything in it is computed anew from the bytes. Raises BadInput."""
    proof = prove(message, dataset.train_images, dataset.train_labels, dataset.num_classes, delta)
    test = count_errors(proof.code, dataset.test_images, dataset.test_labels) / len(
        dataset.test_labels
    )
    train = proof.errors / len(dataset.train_labels)
    errors = f'train error {train:.4f}, test error {test:.4f}, proven error {rounded_up(proof.bound):.4f}'
    return f'{len(message)} bytes, {errors} at delta {delta:g}'


def code_run(folder, seconds, sweeps):
    """Searches for the message of a trained network, from the coded.bin in its folder where there is one. Raises BadInput."""
    net, settings = load_network(folder)
    if reason := no_certificate(settings):
        raise BadInput(f'{folder}: {reason}, which the theorem does not cover')
    _, dataset = launch.get_inputs(SimpleNamespace(**vars(settings) | {'device': 'cpu'}))
    path = folder / 'coded.bin'
    if path.exists():
        code = read(
            path, lambda message: decode(message, dataset.input_shape[0], dataset.num_classes)
        )
    else:
        code = rounded(net, dataset.input_shape, dataset.num_classes)
    data, least = (dataset.train_images, dataset.train_labels, settings.delta), 1.0
    torch.set_num_threads(1)  # more gain nothing, and the last digits of the search depend on them
    with tqdm(
        total=100,
        desc=settings.name,
        bar_format='{l_bar}{bar}{postfix}',
        disable=not sys.stderr.isatty(),
    ) as bar:
        for share, bound, best in search(code, *data, seconds, sweeps):
            if bound < least:
                least = bound
                write_file(path, encode(best))
            bar.set_postfix_str(f' proven error about {rounded_up(bound):.4f}', refresh=False)
            bar.update(min(100, 100 * share) - bar.n)
    print(f'{path}: {read(path, lambda message: coded_line(message, dataset, settings.delta))}')


def read(path, use):
    """What `use` makes of the message in a file. Raises BadInput, with the file's name."""
    if not path.is_file():
        raise BadInput(f'{path}: no such file')
    try:
        return use(path.read_bytes())
    except BadInput as error:
        raise BadInput(f'{path}: {error}') from None


def parse_arguments(argv):
    """The command line as a namespace of source, check, dataset_name, seconds and sweeps. Raises BadInput."""
    parser = Parser('coded.py', __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        'source',
        type=Path,
        nargs='?',
        metavar='DIR',
        help='folder of a trained network, as results/7/CONV-3-16',
    )
    add(
        '--seconds',
        type=float,
        metavar='X',
        help='how long the search takes, in CPU seconds (default 120)',
    )
    sweeps_help = (
        'sweeps of the search, instead of seconds; the same number gives the same message again'
    )
    add('--sweeps', type=int, metavar='N', help=sweeps_help)
    add(
        '--check',
        type=Path,
        metavar='FILE',
        help='only decode this message and prove its error anew',
    )
    add('--dataset-name', choices=DATASETS, help='what --check proves it of (default MNIST)')
    return parser.parse_args(argv)


def run(options):
    """Does what the command line says. Returns the exit status."""
    if (options.source is None) == (options.check is None):
        raise BadInput('name a network as results/7/CONV-3-16, or a message with --check')
    if options.check is None and options.dataset_name:
        raise BadInput('--dataset-name goes with --check; the network of a folder has its own')
    if options.check and (options.seconds or options.sweeps):
        raise BadInput('--check searches for nothing; leave --seconds and --sweeps out')
    if options.seconds is not None and options.sweeps is not None:
        raise BadInput('--seconds and --sweeps: give one of the two')
    if not (options.seconds is None or options.seconds > 0) or not (
        options.sweeps is None or options.sweeps > 0
    ):
        raise BadInput('--seconds and --sweeps: must be above 0')
    if options.source:
        code_run(options.source, options.seconds or 120, options.sweeps)
        return 0
    _, (settings,) = load_settings(
        flags={'dataset_name': options.dataset_name or 'MNIST', 'device': 'cpu'}
    )
    _, dataset = launch.get_inputs(settings)
    print(
        f'{options.check}: {read(options.check, lambda message: coded_line(message, dataset, settings.delta))}'
    )
    return 0


def main(argv=None):
    """Runs the command line. Returns 0, 1 where the message cannot be written, 2 for bad input, 128 + signal where stopped."""
    options = None

    def program():
        nonlocal options
        options = parse_arguments(argv)
        return run(options)

    def what_is_kept():
        path = options and options.source and options.source / 'coded.bin'
        return f'; {path} has the best message so far' if path and path.exists() else ''

    return guarded('coded.py', program, what_is_kept)


if __name__ == '__main__':
    sys.exit(main())
