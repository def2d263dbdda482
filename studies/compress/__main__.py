"""Make trained networks narrower, into a results folder of their own.

python compress.py results/7                           without the dead channels: the same function
python compress.py results/7 --lam 1e-4 1e-3 1e-2      by the multi-task lasso, once per lam
python compress.py results/7 --layer 7 --lam 1e-3      one linear layer of any network; --layer 4 --layer 7: two
"""

import signal
import sys

if __name__ == '__main__':
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # while torch is imported, Ctrl-C ends the program without a traceback

import argparse
import math
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import launch
import torch
from torch import nn
from tqdm import tqdm

from conf import BEFORE, ROOT, BadInput, Parser, settings_text
from datasets import DATASETS, fingerprint
from device import choose_precision, guarded, keep_freed_memory
from evaluation import evaluate
from measures.masks import drop_dead
from measures.norms import measure_data
from measures.pac_bayes import COLUMNS as CERTIFICATES
from measures.trace import (
    Layer,
    folded,
    folded_layers,
    plain_copy,
    sequential,
    trace_layers,
    weight_layers,
)
from models import get_network
from records import (
    csv_line,
    folder_settings,
    load_checkpoint,
    load_network,
    load_weights,
    new_results_folder,
    save_checkpoint,
    seen_from_here,
    write_file,
    write_table,
)
from studies.compress.linear import compress_layer, linear_layer, set_tensors
from studies.compress.narrow import balance, compress
from utils import BOUNDS

COLUMNS = (
    'round, epoch, lam, layer, channels, weights, bytes, speed_up, residual, gap, train_loss, test_loss, train_error, '
    f'test_error, rho, prod_ratio, norm_ratio, path_norm, {", ".join([*BOUNDS, *CERTIFICATES])}, test_set_bound, test_size'
).split(', ')

# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def save(path, net, input_shape, settings=None):
    """Saves a narrower network.

    Args:
        settings: those by which `get_network` makes the network that it was narrowed from, any one; without them it must be
            a chain, as `folded_layers` takes it.
    """
    saved = {'input_shape': list(input_shape)}
    if settings:
        state = {name: tensor.to('cpu') for name, tensor in plain_copy(net).state_dict().items()}
        save_checkpoint(path, saved | {'settings': vars(settings), 'network': state})
        return
    layers, dtype = folded_layers(net), next(net.parameters()).dtype
    saved['weights'] = [layer.weight.to('cpu', dtype) for layer in layers]
    saved['biases'] = [
        None if layer.bias is None else layer.bias.to('cpu', dtype) for layer in layers
    ]
    saved |= {
        'rectified': [layer.rectified for layer in layers],
        'geometry': [layer.geometry for layer in layers],
    }
    save_checkpoint(path, saved)


def load(path):
    """The narrower network of a file, on the CPU: load('results/8/CONV-3-200/dead.pt').

    It is an nn.Sequential, or, where linear layers alone were fitted, a network of the class that it was made from.

    Raises:
        BadInput: there is no such file, or it holds no narrower network, or one of a family that models has not.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f'{path}: no such file')
    saved = load_checkpoint(path, 'cpu')
    try:
        shape, make = saved['input_shape'], _of_family if 'network' in saved else _chain
        net = make(saved)
        net(torch.zeros(1, *shape, dtype=next(net.parameters()).dtype))
    except BadInput:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError):
        raise BadInput(f'{path}: does not hold a narrower network') from None
    return net


def _chain(saved):
    weights, geometry = saved['weights'], saved['geometry']
    biases = saved.get('biases', [None] * len(weights))  # older files are of bias-free chains
    rectified = saved.get('rectified', [True] * (len(weights) - 1) + [False])
    geometry = [
        how if weight.ndim == 4 else {} for how, weight in zip(geometry, weights, strict=True)
    ]
    return sequential(
        Layer(*layer) for layer in zip(weights, biases, rectified, geometry, strict=True)
    )


def _of_family(saved):
    """The network of the settings, in evaluation mode, its layers of the sizes of the saved tensors."""
    settings, state = SimpleNamespace(**BEFORE | saved['settings']), saved['network']
    net = plain_copy(get_network(settings, *DATASETS[settings.dataset_name][1:3])).eval()
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)):
            fields = ('weight', 'bias', 'running_mean', 'running_var')
            set_tensors(
                module,
                **{
                    field: tensor
                    for field in fields
                    if (tensor := state.get(f'{name}.{field}')) is not None
                },
            )
    net.load_state_dict(state)
    return net


def load_source(folder):
    """A trained network, its settings, the (round, epoch) of its weights, and what there is to say of it, as lines.

    Round and epoch are nan in the middle of an epoch. Raises BadInput where the folder's settings or the data are not those
    of the training.
    """
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter('always')
        net, settings = load_network(folder)
    path = next(path for name in ('model.pt', 'weights.pt') if (path := folder / name).exists())
    _, dataset = launch.get_inputs(settings)
    place = load_weights(net, path, settings, fingerprint(dataset)) or (math.nan, math.nan)
    return net, settings, place, [str(note.message) for note in notes]


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def narrower(net, images, lam, options):
    """The network of a row, and the reports of its fits: a chain of plain layers, or, of single layers, one like net.

    lam is 0 for the whole network, and None for the one without its dead channels.
    """
    if lam is None:
        return drop_dead(net), []
    if options.layer:
        net, reports = (
            compress_layer(net, images, options.layer, lam, options.refit) if lam else (net, {})
        )
        return plain_copy(net), [reports[name] for name in options.layer if lam]
    if not options.lam:
        return folded(net), []
    return (
        compress(net, images, lam, options.refit)
        if lam
        else (balance(net, tuple(images.shape[1:])), [])
    )


@torch.no_grad()
def speed_up(net, other, images, repeats=20):
    """How many times faster `other` is than `net`: the ratio of the shortest forward passes of these images, taken in turn.

    On a CPU it is the processor time of one thread, which other programs change least.
    """
    clock, threads = (
        time.perf_counter if images.is_cuda else time.process_time,
        torch.get_num_threads(),
    )
    torch.set_num_threads(1)
    seconds = [], []
    for network, times in [(net, seconds[0]), (other, seconds[1])] * repeats:
        start = clock()
        network(images).cpu()
        times.append(clock() - start)
    torch.set_num_threads(threads)
    return min(seconds[0]) / min(seconds[1])


def compress_run(net, settings, place, options, folder):
    """Makes one trained network narrower into `folder`: weights, and a row of compress.csv each; row 0 is the source.

    The widths of a narrower network are chosen by the training data, so each bound holds at delta over the number of choices
    there are; the test set has nothing to pay for. Returns the errors of the lams at which a layer died.
    """
    device, dataset = launch.get_inputs(settings)
    choose_precision('float32', device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    net, images = net.to(device), dataset.train_images
    whole, _ = narrower(net, images, 0, options)
    data, delta = (
        measure_data(whole, images, skip_uncovered=True),
        settings.delta / math.prod(widths(whole)),
    )
    lines, errors = [], []
    unmeasured = SimpleNamespace(
        **vars(settings) | {'measures_every': 0}
    )  # no distance from a start of other widths
    lams = [0, *(options.lam or [None])]
    with tqdm(
        total=len(lams), desc=settings.name, miniters=0, disable=not sys.stdout.isatty()
    ) as bar:
        for lam in lams:
            try:
                narrow, reports = narrower(net, images, lam, options)
            except BadInput as error:
                errors.append(f'{settings.name}: {error}')
                continue
            path = folder / ('dead.pt' if lam is None else f'lam-{lam}.pt')
            folder.mkdir(exist_ok=True)
            save(path, narrow, dataset.input_shape, settings if options.layer else None)
            row = evaluate(narrow, unmeasured, dataset, data, *place, delta)
            row |= {'lam': math.nan if lam is None else lam, 'layer': '|'.join(options.layer)}
            row |= {'channels': '|'.join(map(str, widths(narrow))), 'bytes': path.stat().st_size}
            row |= {'weights': sum(weight.numel() for weight in narrow.parameters())}
            row |= {
                'speed_up': speed_up(whole, narrow, dataset.test_images[:32]) if lam != 0 else 1.0
            }
            row |= {'residual': '|'.join(f'{report["residual"]:.3g}' for report in reports)}
            row |= {'gap': max((report['gap'] for report in reports), default=0.0)}
            lines.append(csv_line(row, COLUMNS))
            write_table(folder / 'compress.csv', COLUMNS, lines)
            bar.update()
            what = 'without dead channels' if lam is None else f'lam {lam:g}'
            size = f'{row["channels"]} channels, {row["weights"]} weights, {row["bytes"]} bytes'
            found = f'{row["speed_up"]:.1f} times as fast, train {row["train_error"]:.4f} test {row["test_error"]:.4f}'
            bar.write(f'{settings.name} {what}: {size}, {found}')
    return errors


def widths(net):
    """The channels of each hidden layer."""
    return [len(layer.weight) for layer in [*weight_layers(net).values()][:-1]]


def parse_arguments(argv):
    """The command line as a namespace of source, lam, layer, refit and run. Raises BadInput."""
    parser = Parser('compress.py', __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('source', type=Path, metavar='DIR', help='results folder of the trained networks')
    lam_help = 'penalties, as shares of the one from which on nothing is left; between 0 and 1'
    add('--lam', type=float, nargs='+', default=[], metavar='X', help=lam_help)
    layer_help = (
        'fit this linear layer alone, as net.named_modules() calls it; repeat it for several'
    )
    add('--layer', metavar='NAME', action='append', default=[], help=layer_help)
    refit_help = 'fit the kept channels once more with a small ridge penalty (default), or keep the shrunk weights'
    add('--refit', choices=('none', 'ridge'), default='ridge', help=refit_help)
    add('--run', type=int, metavar='K', help='only the K-th network of the folder, counted from 1')
    options = parser.parse_args(argv)
    options.lam = sorted(set(options.lam))
    if bad := [lam for lam in options.lam if not 0 < lam < 1]:
        raise BadInput(f'--lam {bad[0]:g}: must be a share of lam_max, between 0 and 1')
    if options.layer and not options.lam:
        raise BadInput(f'--layer {options.layer[0]}: is fitted with a penalty; give one with --lam')
    if twice := [
        name for number, name in enumerate(options.layer) if name in options.layer[:number]
    ]:
        raise BadInput(f'--layer {twice[0]}: is listed twice')
    return options


def run(options):
    """Does what the command line says. Returns the exit status."""
    if not (options.source / 'global_settings.py').is_file():
        raise BadInput(f'{options.source}: not a results folder, it has no global_settings.py')
    if not str(options.source).isprintable():  # it is written into a settings file
        raise BadInput(f'{str(options.source)!r}: must be a printable text; rename the folder')
    sweep, runs = folder_settings(options.source)
    if options.run is not None and not 1 <= options.run <= len(runs):
        raise BadInput(f'--run {options.run}: the folder has the networks 1 to {len(runs)}')
    sources, notes = [], []
    for settings in runs if options.run is None else [runs[options.run - 1]]:
        net, settings, place, said = load_source(options.source / settings.name)
        device, dataset = launch.get_inputs(settings)
        for name in options.layer:
            linear_layer(net, name)
        if not options.layer:
            trace_layers(net, dataset.input_shape) if options.lam else folded_layers(net)
        notes += said
        sources.append((net, settings, place))
    for note in notes:
        print(note, flush=True)

    folder = new_results_folder(seen_from_here(ROOT / sweep['results_dir']))
    what = f'python compress.py {options.source}'
    what += ''.join(f' --layer {name}' for name in options.layer)
    what += f' --lam {" ".join(map(str, options.lam))} --refit {options.refit}' * bool(options.lam)
    what += f' --run {options.run}' * (options.run is not None)
    header = [
        f'Networks made narrower by {what}; the settings are those that they were trained with.'
    ]
    header += launch.launch_header(device, notes)
    write_file(folder / 'global_settings.py', settings_text(sweep, header).encode())
    keep_freed_memory()
    errors = []
    for net, settings, place in sources:
        print(f'{folder / settings.name}: from {options.source / settings.name}', flush=True)
        errors += compress_run(net, settings, place, options, folder / settings.name)
    launch.draw(folder)
    if errors:
        raise BadInput('; '.join(errors))
    return 0


def main(argv=None):
    """Runs the command line. Returns 0, 1 where the results cannot be written, 2 for bad input, 128 + signal where stopped."""
    return guarded(
        'compress.py',
        lambda: run(parse_arguments(argv)),
        lambda: '; the rows that are done are kept',
    )


if __name__ == '__main__':
    sys.exit(main())
