"""The zoo: networks in pairs that differ in one knob, trained to the same loss (docs/ranking.md).

    python -m studies.zoo results/8                 trains 520 networks: an hour of two cores
    python -m studies.zoo results/8 --networks 26   the first two base points only

A base point is a random value of each knob. Its 13 networks are the base itself and, for each
knob, a neighbour in which only that knob has its other value. The same command continues after an
interruption. At the end it writes networks.csv, tables.npz and weights.npz, from which
`python -m studies.ranking` ranks every bound, a user's own too, without MNIST and without training.
"""

import functools
import io
import itertools
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from conf import KNOBS as SETTINGS
from conf import BadInput, run_program
from evaluation import Diverged, at_target, evaluate, initial_network
from measures.norms import Table, classification_margins, measure_data, measure_network
from measures.trace import outputs
from records import (
    load_checkpoint,
    load_data,
    load_weights,
    lock,
    rows_so_far,
    save_checkpoint,
    write_file,
    write_table,
)
from studies.report import positive, study_parser
from train import PARENT, say, train

BASES = 40
# Two values of each knob. step_size is lr / (1 - momentum).
KNOBS = {
    'depth': (2, 3),
    'width': (24, 48),
    'kernel_size': (3, 5),
    'padding': (1, 2),
    'normalization': ('none', 'weight'),
    'density': (0.5, 1.0),
    'train_samples': (250, 1000),
    'label_noise': (0.0, 0.1),
    'batch_size': (16, 32),
    'step_size': (0.1, 0.2),
    'momentum': (0.0, 0.9),
    'weight_decay': (0.0, 1e-4),
}
FIXED = {
    'stride': 2,
    'loss': 'CE',
    'target_loss': 0.01,
    'epochs': 300,  # at most
    'milestones': [],
    'eval_every': 1000,  # before the training and after it
    'certify_every': 0,  # at 1,000 images every certificate is 1
    'device': 'cpu',
    'precision': 'float32',
    'threads': 1,
}
KEPT = 'measured.pt'  # of a network's folder
WEIGHTS = 12e6  # bytes of weights.npz, at most


# ------------------------------------------------------------------------------------------------
# The networks
# ------------------------------------------------------------------------------------------------


def design():
    """{name: {knob: value}} of the networks; names are 00-base, 00-depth, ..., 39-weight_decay.

    Each value of a knob stands in half of the base points.
    """
    rng, points = np.random.default_rng(0), {}
    halves = np.arange(BASES) % 2
    choices = np.array([rng.permutation(halves) for _ in KNOBS])
    for base in range(BASES):
        chosen = dict(zip(KNOBS, choices[:, base]))
        for changed in ('base', *KNOBS):
            point = {}
            for knob, values in KNOBS.items():
                point[knob] = values[chosen[knob] ^ (knob == changed)]
            points[f'{base:02}-{changed}'] = point
    return points


def base_of(name):
    """The number of the base point that a network belongs to."""
    return int(name.partition('-')[0])


def zoo_settings(name, point):
    """The settings of a network: the two values of its knobs, and a seed for its base point."""
    values = {knob: neutral for knob, (neutral, _) in SETTINGS.items()} | FIXED | point
    values['lr'] = point['step_size'] * (1 - point['momentum'])
    if point['density'] < 1:
        values['initial_mask'] = 'erk'
    values['seed'] = values['data_seed'] = base_of(name)
    return SimpleNamespace(name=name, **values)


# ------------------------------------------------------------------------------------------------
# One network
# ------------------------------------------------------------------------------------------------


def measure(settings, dataset, net, epoch):
    """What is kept of a trained network: its row, the tables of its bounds, its weights.

    The weights are rounded to float16 first, so that what is kept is what is measured.
    """
    state = {}
    for name, value in net.state_dict().items():
        state[name] = value.half() if value.is_floating_point() else value
    net.load_state_dict(state)
    data = measure_data(net, dataset.train_images)
    everything = SimpleNamespace(**vars(settings) | {'measures_every': 1})
    row = evaluate(net, everything, dataset, data, 0, epoch)
    margins = classification_margins(outputs(net, dataset.train_images), dataset.train_labels)
    network = measure_network(net, dataset.input_shape, margins.float())
    return {
        'row': {name: float(value) for name, value in row.items()},
        'network': as_tensors(network),
        'data': as_tensors(data),
        'weights': state,
    }


def as_tensors(table):
    """{measure: tensor} of a table in which nothing is missing; margins in float32."""
    tensors = {}
    for name, value in vars(table).items():
        if name == 'margins':
            tensors[name] = value
        elif name != 'missing':
            tensors[name] = torch.as_tensor(np.asarray(value, dtype=float))
    return tensors


def train_network(name, folder):
    """Trains and measures one network into its folder, unless that is done; returns its name."""
    settings = zoo_settings(name, design()[name])
    path = folder / name
    path.mkdir(exist_ok=True)
    with lock(path):
        if (path / KEPT).exists():
            return name
        dataset = load_data(settings)
        try:
            if not train(settings, dataset, path):  # a signal
                return name
        except Diverged:
            say(f'{name}: its loss became NaN or infinite')
            return name
        last = rows_so_far(path)[-1]
        net = initial_network(settings, dataset)
        load_weights(net, path / 'model.pt', settings)
        kept = measure(settings, dataset, net, int(last['epoch']))
        kept['row']['reached'] = float(at_target(settings, last['train_loss']))
        save_checkpoint(path / KEPT, kept)
    return name


def start_worker():
    """Lets a process of the pool end with its parent, at Ctrl-C too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[PARENT] = str(os.getppid())


# ------------------------------------------------------------------------------------------------
# The files of a zoo
# ------------------------------------------------------------------------------------------------


def write_files(folder):
    """Writes networks.csv, tables.npz and weights.npz of all networks that are measured."""
    points, kept = design(), {}
    for name in points:
        if (folder / name / KEPT).exists():
            kept[name] = load_checkpoint(folder / name / KEPT)
    if not kept:
        raise BadInput(f'{folder}: no network was trained to its end')
    rows = []
    for name, network in kept.items():
        rows.append({'name': name, 'base': base_of(name)} | points[name] | network['row'])
    write_table(folder / 'networks.csv', list(rows[0]), rows)

    # Of each measure an array with a row per network; nan fills up rows of layers or samples.
    tables = {}
    for table in ('network', 'data'):
        for measure in next(iter(kept.values()))[table]:
            values = [network[table][measure] for network in kept.values()]
            if values[0].dim():
                filled = pad_sequence(values, batch_first=True, padding_value=math.nan)
            else:
                filled = torch.stack(values)
            tables[f'{table}.{measure}'] = filled.numpy()
    write_file(folder / 'tables.npz', packed(tables))

    weights, size = {}, 0
    for _, members in itertools.groupby(kept, base_of):
        arrays = {}
        for name in members:
            for key, value in kept[name]['weights'].items():
                arrays[f'{name}/{key}'] = value.numpy()
        size += len(packed(arrays))
        if size <= WEIGHTS:
            weights |= arrays
    write_file(folder / 'weights.npz', packed(weights))
    return kept


def packed(arrays):
    """The bytes of a compressed npz file of {name: array}."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_tables(folder):
    """[(network, data)] of tables.npz: what a bound reads, in the order of networks.csv."""
    with np.load(Path(folder, 'tables.npz')) as file:
        columns = {name: file[name] for name in file.files}
    pairs = []
    for number in range(len(columns['data.m'])):
        pair = {'network': Table(missing={}), 'data': Table(missing={})}
        for name, column in columns.items():
            table, measure = name.split('.')
            setattr(pair[table], measure, _cell(measure, column[number]))
        pairs.append((pair['network'], pair['data']))
    return pairs


def _cell(measure, value):
    """A measure as `measure_network` or `measure_data` returns it."""
    if value.ndim:
        value = value[~np.isnan(value)]
        return torch.from_numpy(value) if measure == 'margins' else value
    return int(value) if value % 1 == 0 else float(value)  # inf % 1 is nan


def read_networks(folder):
    """Yields (name, net, initial, dataset) of the networks of weights.npz; reads MNIST."""
    points = design()
    with np.load(Path(folder, 'weights.npz')) as file:
        keys = itertools.groupby(file.files, lambda key: key.partition('/')[0])
        for name, members in keys:
            settings = zoo_settings(name, points[name])
            dataset = load_data(settings)
            net = initial_network(settings, dataset)
            state = {key.partition('/')[2]: torch.from_numpy(file[key]) for key in members}
            net.load_state_dict(state)
            yield name, net, initial_network(settings, dataset), dataset


def main(arguments=None):
    parser = study_parser('zoo', __doc__)
    parser.add_argument('folder', type=Path, help='results folder, new or interrupted')
    count, number = positive(int), {'metavar': 'N'}
    parser.add_argument('--networks', type=count, **number, help='only the first N networks')
    parser.add_argument('--jobs', type=count, default=2, **number, help='processes (2)')
    options = parser.parse_args(arguments)
    names, folder = list(design())[: options.networks], options.folder
    if (folder / 'networks.csv').exists() and not any(folder.glob(f'*/{KEPT}')):
        raise BadInput(f'{folder}: has tables of a zoo without its runs; name a new folder')
    folder.mkdir(parents=True, exist_ok=True)
    load_data(zoo_settings(names[0], design()[names[0]]))  # downloads it, once
    # New processes, since a fork of one that has used torch may hang.
    pool = multiprocessing.get_context('spawn').Pool(options.jobs, start_worker)
    try:
        done = pool.imap_unordered(functools.partial(train_network, folder=folder), names)
        for _ in tqdm(done, 'networks', len(names)):
            pass
    except KeyboardInterrupt:
        print(f'{folder}: the same command continues', file=sys.stderr)
        raise
    finally:
        pool.terminate()
        pool.join()
    kept = write_files(folder)
    reached = sum(network['row']['reached'] for network in kept.values())
    print(f'{folder}: {len(kept)} of {len(design())} networks, {reached:.0f} reached the loss')


if __name__ == '__main__':
    sys.exit(run_program(main))
