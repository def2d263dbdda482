"""Makes trained networks narrower, into a results folder of their own.

python -m studies.compress results/7                          without the dead channels
python -m studies.compress results/7 --lam 1e-4 1e-3 1e-2     by the multi-task lasso, once per lam
python -m studies.compress results/7 --layer 7 --lam 1e-3     one linear layer of any network
"""

import argparse
import math
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

import train
from conf import ROOT, BadInput, Parser, load_launch, run_program, settings_text
from datasets import fingerprint
from device import choose_device, choose_precision, keep_freed_memory
from evaluation import evaluate
from measures.norms import measure_data
from measures.pac_bayes import COLUMNS as CERTIFICATES
from measures.trace import folded, folded_layers, plain_copy, trace_layers, weight_layers
from records import (
    launch_header,
    load_data,
    load_network,
    load_weights,
    new_results_folder,
    write_file,
    write_table,
)
from studies.compress import balance, compress, compress_layer, drop_dead, save
from studies.compress.linear import linear_layer
from utils import BOUNDS

_FIRST = (
    'round epoch lam layer channels weights bytes speed_up residual gap train_loss test_loss '
    'train_error test_error rho prod_ratio norm_ratio path_norm'
)
COLUMNS = [*_FIRST.split(), *BOUNDS, *CERTIFICATES, 'test_set_bound', 'test_size']


def parse_arguments(argv=None):
    """The command line as a namespace of source, lam, layer, refit and run."""
    parser = Parser('python -m studies.compress', __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add('source', type=Path, metavar='DIR', help='results folder of the trained networks')
    about = 'penalties between 0 and 1, as shares of the smallest one that removes all channels'
    add('--lam', type=float, nargs='+', default=[], metavar='X', help=about)
    about = 'fit only this linear layer, named as in net.named_modules(); repeat it for several'
    add('--layer', metavar='NAME', action='append', default=[], help=about)
    about = 'fit the kept channels again with a small ridge penalty, or keep the shrunk weights'
    add('--refit', choices=('ridge', 'none'), default='ridge', help=f'{about} (default: ridge)')
    add('--run', type=int, metavar='K', help='only the K-th network of the folder, counted from 1')
    options = parser.parse_args(argv)
    options.lam = sorted(set(options.lam))
    for lam in options.lam:
        if not 0 < lam < 1:
            parser.error(f'--lam {lam:g}: must be between 0 and 1')
    if options.layer and not options.lam:
        parser.error(f'--layer {options.layer[0]}: give a penalty with --lam')
    if len(set(options.layer)) < len(options.layer):
        parser.error(f'--layer {" ".join(options.layer)}: a layer is listed twice')
    return options


def load_source(folder, options):
    """A trained network that the options apply to, its settings and its (round, epoch).

    Round and epoch are nan in the middle of an epoch.

    Raises:
        BadInput: it was trained with other settings or data, or it is not covered.
    """
    net, settings = load_network(folder)
    dataset = load_data(settings)
    files = [folder / name for name in ('model.pt', 'weights.pt')]
    path = next(path for path in files if path.exists())
    position = load_weights(net, path, settings, fingerprint(dataset))
    for name in options.layer:
        linear_layer(net, name)
    if options.lam and not options.layer:
        trace_layers(net, dataset.input_shape)
    elif not options.lam:
        folded_layers(net)
    return net, settings, position or (math.nan, math.nan)


def narrower(net, images, lam, options):
    """The network of a row, and the reports of its fits; lam is 0 for the source.

    Without --lam and --layer, lam is None for the network without its dead channels.
    """
    if lam is None:
        return drop_dead(net), []
    if options.layer:
        if lam == 0:
            return plain_copy(net), []
        net, reports = compress_layer(net, images, options.layer, lam, options.refit)
        return plain_copy(net), [reports[name] for name in options.layer]
    if not options.lam:
        return folded(net), []
    if lam == 0:
        return balance(net, tuple(images.shape[1:])), []
    return compress(net, images, lam, options.refit)


@torch.no_grad()
def speed_up(net, other, images, repeats=20):
    """How many times faster `other` is than `net`: the ratio of their shortest forward passes.

    The passes alternate. On a CPU the processor time of one thread is measured, since other
    programs change it least.
    """
    clock = time.perf_counter if images.is_cuda else time.process_time
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {net: [], other: []}
    for _ in range(repeats):
        for network, times in seconds.items():
            start = clock()
            network(images).cpu()
            times.append(clock() - start)
    torch.set_num_threads(threads)
    return min(seconds[net]) / min(seconds[other])


def widths(net):
    """The number of channels of each hidden layer."""
    return [len(layer.weight) for layer in [*weight_layers(net).values()][:-1]]


def compress_run(net, settings, position, options, folder):
    """Makes one trained network narrower: the weights and a row of compress.csv for each lam.

    Row 0 is the source. The training data choose the widths of a narrower network, so that each
    bound is taken at delta divided by the number of possible widths; test_set_bound is not.

    Returns:
        The errors of the lams at which a layer lost all its channels.
    """
    dataset = load_data(settings)
    images = dataset.train_images
    choose_precision('float32', images.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    net = net.to(images.device)
    source, _ = narrower(net, images, 0, options)
    data = measure_data(source, images, skip_uncovered=True)
    delta = settings.delta / math.prod(widths(source))
    # The distance from the initial weights does not exist for other widths.
    unmeasured = SimpleNamespace(**vars(settings) | {'measures_every': 0})
    rows, errors = [], []
    folder.mkdir(exist_ok=True)
    for lam in [0, *(options.lam or [None])]:
        try:
            narrow, reports = narrower(net, images, lam, options)
        except BadInput as error:
            errors.append(f'{settings.name}: {error}')
            continue
        path = folder / ('dead.pt' if lam is None else f'lam-{lam}.pt')
        save(path, narrow, dataset.input_shape, settings if options.layer else None)
        faster = speed_up(source, narrow, dataset.test_images[:32]) if lam != 0 else 1.0
        about = {
            'lam': math.nan if lam is None else lam,
            'layer': '|'.join(options.layer),
            'channels': '|'.join(map(str, widths(narrow))),
            'weights': sum(weight.numel() for weight in narrow.parameters()),
            'bytes': path.stat().st_size,
            'speed_up': faster,
            'residual': '|'.join(f'{report["residual"]:.3g}' for report in reports),
            'gap': max((report['gap'] for report in reports), default=0.0),
        }
        row = evaluate(narrow, unmeasured, dataset, data, *position, delta) | about
        rows.append({column: row.get(column, math.nan) for column in COLUMNS})
        write_table(folder / 'compress.csv', COLUMNS, rows)
        print(f'{settings.name} {describe(row)}', flush=True)
    return errors


def describe(row):
    """A row of compress.csv in words."""
    name = f'lam {row["lam"]:g}'
    if row['lam'] == 0:
        name = 'source'
    elif math.isnan(row['lam']):
        name = 'without dead channels'
    size = f'{row["channels"]} channels, {row["weights"]} weights, {row["bytes"]} bytes'
    errors = f'train error {row["train_error"]:.4f}, test error {row["test_error"]:.4f}'
    return f'{name}: {size}, {row["speed_up"]:.1f} times as fast, {errors}'


def main(argv=None):
    """Runs the command line. Raises BadInput."""
    options = parse_arguments(argv)
    sweep, runs = load_launch(options.source)
    if options.run is not None:
        if not 1 <= options.run <= len(runs):
            raise BadInput(f'--run {options.run}: the folder has the networks 1 to {len(runs)}')
        runs = [runs[options.run - 1]]
    # Everything is checked before anything is written.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        sources = [load_source(options.source / settings.name, options) for settings in runs]
    notes = [str(warning.message) for warning in caught]
    for note in notes:
        print(note, flush=True)

    folder = new_results_folder(ROOT / sweep['results_dir'])
    # A path may contain any character, but the header is a comment of one line.
    words = ' '.join(sys.argv[1:] if argv is None else argv).encode('unicode_escape').decode()
    made = f'Networks made narrower by python -m studies.compress {words}'
    header = [f'{made}; the settings are those that they were trained with.']
    header += launch_header(choose_device(sweep['device']), notes)
    write_file(folder / 'global_settings.py', settings_text(sweep, header).encode())
    keep_freed_memory()
    errors = []
    for net, settings, position in sources:
        print(f'{folder / settings.name}: from {options.source / settings.name}', flush=True)
        errors += compress_run(net, settings, position, options, folder / settings.name)
    train.draw_figures(folder)
    if errors:
        raise BadInput('; '.join(errors))
    return 0


if __name__ == '__main__':
    sys.exit(run_program(main))
