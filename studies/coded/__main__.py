"""A network as a message of a few hundred bytes, with a proven bound of its true error.

python -m studies.coded results/7/CONV-3-16 --seconds 600
    searches, and writes coded.bin beside the network's weights
python -m studies.coded --check results/7/CONV-3-16/coded.bin
    decodes it and proves its error again
python -m studies.coded results/7/CONV-3-200 --message results/7/CONV-3-16/coded.bin
    bounds the error of any network by how often it differs from the message's

docs/coded.md has the theorem.
"""

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from conf import BadInput, load_launch, load_settings, run_program
from datasets import DATASETS
from evaluation import no_certificate, rounded_up
from records import load_data, load_network, lock, write_file
from studies.coded.disagreement import certify_by_disagreement
from studies.coded.message import count_errors, decode, encode, pixels, prove
from studies.coded.search import initial_code, search
from studies.report import positive, study_parser

PUBLISHED = {
    'MNIST': 'edc0d1098aa497be14ace79ddd5171e5a3dcf9c4d196c015389203eb3ba1f59b'
}  # what `digest` is of the published files


def digest(images, labels):
    """sha256 of all pixels and then all labels, a byte each."""
    content = pixels(images).byte().numpy().tobytes() + labels.byte().numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def coded_line(message, dataset, name, delta):
    """What a message proves, in words, computed from its bytes and the dataset of that name."""
    images, labels = dataset.train_images, dataset.train_labels
    proof = prove(message, images, labels, dataset.num_classes, delta)
    wrong = count_errors(proof.code, dataset.test_images, dataset.test_labels)
    counted = f'{proof.errors} errors of {len(labels)}, {wrong} of {len(dataset.test_labels)} test'
    proven = f'proven error {rounded_up(proof.bound):.4f} at delta {delta:g}'
    found = digest(images, labels)
    origin = ' (as published)' if PUBLISHED.get(name) == found else ''
    return f'{len(message)} bytes, {counted}, {proven}; {name}, sha256 {found}{origin}'


def refuse_uncovered(folder, settings):
    """Raises BadInput if the training set is not an i.i.d. sample, as the theorem needs it."""
    if reason := no_certificate(settings):
        raise BadInput(f'{folder}: {reason}, which the theorem does not cover')


def code_run(folder, seconds, sweeps):
    """Searches for a trained network's message, from its coded.bin if there is one."""
    net, settings = load_network(folder)
    refuse_uncovered(folder, settings)
    dataset = load_data(settings, 'cpu')
    path, least = folder / 'coded.bin', 1.0
    torch.set_num_threads(1)  # the last digits of a search depend on it, and more gain nothing
    # One search at a time, so that a worse message never replaces a better one.
    with lock(folder, seconds=0):
        if path.exists():
            code = read(path, decode, dataset.input_shape[0], dataset.num_classes)
        else:
            code = initial_code(net, dataset.input_shape, dataset.num_classes)
        data = dataset.train_images, dataset.train_labels, settings.delta
        form = '{l_bar}{bar}{postfix}'
        with tqdm(total=100, desc=settings.name, bar_format=form, disable=None) as bar:
            for share, bound, best in search(code, *data, seconds, sweeps):
                if bound < least:
                    least = bound
                    write_file(path, encode(best))
                bar.set_postfix_str(f' proven error about {rounded_up(bound):.4f}', refresh=False)
                bar.update(min(100, 100 * share) - bar.n)
    print(f'{path}: {read(path, coded_line, dataset, settings.dataset_name, settings.delta)}')


def check(path, dataset_name):
    """Proves a message on the dataset of that name, or of the results folder it lies in."""
    if dataset_name:
        whole = {'train_samples': 0, 'label_noise': 0.0, 'normalize': False, 'delta': 0.001}
        runs = load_settings(flags=whole | {'dataset_name': dataset_name})[1]
    elif (path.parent.parent / 'global_settings.py').exists():
        runs = load_launch(path.parent.parent)[1]
        runs = [run for run in runs if run.name == path.parent.name]
    else:
        runs = []
    if not runs:
        raise BadInput(f'{path}: no settings beside it say of what; give --dataset-name')
    settings, reason = runs[0], no_certificate(runs[0])
    if settings.train_samples and not reason:
        reason = f'train_samples = {settings.train_samples} is only a part of the dataset'
    if reason:
        raise BadInput(f'{path.parent}: {reason}; to check on the whole, give --dataset-name')
    dataset = load_data(settings, 'cpu')
    print(f'{path}: {read(path, coded_line, dataset, settings.dataset_name, settings.delta)}')


class Standardized(nn.Module):
    """A network behind the standardization of `normalize`, so that it takes pixels from 0 to 1."""

    def __init__(self, net, images):
        super().__init__()
        std, mean = torch.std_mean(images.double(), (0, 2, 3), correction=0, keepdim=True)
        self.net, self.mean, self.std = net, mean.float(), std.float()

    def forward(self, images):
        return self.net((images - self.mean) / self.std)


def compare(folder, path):
    """Bounds the error of a trained network by its disagreement with a message's, on test images.

    Returns a row of disagreement.csv.
    """
    net, settings = load_network(folder)
    normalized, settings.normalize = settings.normalize, False
    refuse_uncovered(folder, settings)
    dataset = load_data(settings, 'cpu')
    if normalized:
        net = Standardized(net, dataset.train_images)
    sample = dataset.train_images, dataset.train_labels, dataset.test_images, settings.delta
    found = read(path, lambda message: certify_by_disagreement(net, message, *sample))
    coded, share, bound = map(rounded_up, (found.proof.bound, found.share, found.bound))
    parts = f"{coded:.4f} (the message's network) + {share:.4f}"
    count = f'{found.differ} of {len(dataset.test_images)} test images'
    text = f'error at most {bound:.4f}: {parts} (they differ on {count}), delta {settings.delta:g}'
    print(f'{folder}: {text}')
    return {'differ': found.differ, 'coded': coded, 'share': share, 'bound': bound}


def read(path, use, *arguments):
    """use(message, *arguments) of the message in a file. Raises BadInput with the file's name."""
    if not path.is_file():
        raise BadInput(f'{path}: no such file')
    try:
        return use(path.read_bytes(), *arguments)
    except BadInput as error:
        raise BadInput(f'{path}: {error}') from None


def main(argv=None):
    parser = study_parser('coded', __doc__)
    add = parser.add_argument
    add(
        'network',
        type=Path,
        nargs='?',
        metavar='DIR',
        help='a trained network, results/7/CONV-3-16',
    )
    add('--seconds', type=positive(float), metavar='X', help='CPU seconds of the search (120)')
    add('--sweeps', type=positive(int), metavar='N', help='length of a search that repeats exactly')
    add('--message', type=Path, metavar='FILE', help='bound DIR by its difference from this one')
    add('--check', type=Path, metavar='FILE', help='only prove the error of this message again')
    add('--dataset-name', choices=DATASETS, help='dataset of --check; default: as its folder says')
    options = parser.parse_args(argv)
    if (options.network is None) == (options.check is None):
        raise BadInput('name a network as results/7/CONV-3-16, or a message with --check')
    searching = options.network is not None and options.message is None
    if options.check is None and options.dataset_name:
        raise BadInput('--dataset-name goes with --check; the network of a folder has its own')
    if not searching and (options.seconds or options.sweeps):
        raise BadInput('--seconds and --sweeps: only a search takes them')
    if options.seconds and options.sweeps:
        raise BadInput('--seconds and --sweeps: give one of the two')
    if options.check:
        check(options.check, options.dataset_name)
    elif options.message:
        compare(options.network, options.message)
    else:
        code_run(options.network, options.seconds or 120, options.sweeps)


if __name__ == '__main__':
    sys.exit(run_program(main))
