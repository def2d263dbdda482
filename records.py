"""Results folders: metrics.csv and layers.csv, checkpoints and snapshots, the settings of a launch, `load_network`.

A kill at any moment leaves every file whole: as it was, or as it was to be.
"""

import contextlib
import fcntl
import io
import math
import os
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from conf import BEFORE, LATER, BadInput, load_settings
from datasets import DATASETS
from evaluation import COLUMNS, LAYER_COLUMNS, PROBES, at_target, due, finished
from measures.landscape import MEASURES
from measures.pac_bayes import COLUMNS as CERTIFICATES
from models import get_network

CHECKPOINT_FORMAT = 1
METRICS = (
    'epoch',
    'train_error',
    'test_error',
    'generalization_gap',
)  # what a table of metrics has at least
OLDER_LAYER_COLUMNS = LAYER_COLUMNS[
    : LAYER_COLUMNS.index(PROBES[0])
]  # of checkpoints that do not name theirs

# What may change when a run is resumed, since the numbers do not depend on it.
FREE = ('epochs', 'device', 'data_dir', 'results_dir', 'checkpoint_every', 'snapshot_every', 'jobs')


def seen_from_here(path):
    """A path as commands that are given here name it: relative where it lies below the current folder, else whole."""
    with contextlib.suppress(
        ValueError, FileNotFoundError
    ):  # it lies elsewhere; the current folder is gone
        return path.relative_to(Path.cwd())
    return path


def new_results_folder(results_dir):
    """Makes and returns the next numbered folder in results_dir; launches at the same moment get different ones."""
    results_dir = Path(results_dir)
    results_dir.mkdir(parents=True, exist_ok=True)
    number = max(
        (int(entry.name) for entry in results_dir.iterdir() if entry.name.isdecimal()), default=0
    )
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            (results_dir / str(number)).mkdir()
            return results_dir / str(number)


def write_file(path, content):
    """Writes bytes to a temporary file and moves it into place, so that a kill at any moment leaves the old or the new."""
    temporary = Path(f'{path}.tmp')
    try:
        with _named(path), open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def _named(path):
    """Gives an error of writing, which names no file, the name of the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_table(path, columns, lines):
    write_file(path, (','.join(columns) + '\n' + ''.join(lines)).encode())


def append_lines(path, lines):
    if lines:
        with _named(path), open(path, 'a') as file:
            file.writelines(lines)


@contextlib.contextmanager
def locked(path, seconds=None):
    """Holds a lock that ends with the process however it ends; yields whether it was got in `seconds`, None for any time."""
    deadline = None if seconds is None else time.monotonic() + seconds
    with open(path, 'w') as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if deadline is None else fcntl.LOCK_NB))
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                yield False
                return
            except OSError:  # a file system without locks
                pass
            yield True
            return


# ----------------------------------------------------------------------------------------------------------------------
# Tables: a cell that does not apply is empty, and read as nan
# ----------------------------------------------------------------------------------------------------------------------


def csv_line(row, columns):
    """A row, {column: value}, as a line of a table; floats read back exactly."""
    cells = [row.get(column, np.nan) for column in columns]
    return ','.join('' if value != value else str(value) for value in cells) + '\n'


def parse_line(line, columns):
    """The row of a line, {column: float}. Raises ValueError where it is not one of these columns."""
    return {column: float(cell or 'nan') for column, cell in cells_of(line, columns).items()}


def cells_of(line, columns):
    """A line of a table as {column: text}. Raises ValueError where it is not one of these columns."""
    return dict(zip(columns, line.rstrip('\n').split(','), strict=True))


def line_of(cells, columns):
    """The line of {column: text}."""
    return ','.join(cells.get(column, '') for column in columns) + '\n'


def read_table(path, columns, required):
    """A table as {column: float array}: what it has not of `columns` is nan, and so are empty cells.

    The unfinished last line of a run that is being written is left out.
    """
    return _parsed(path, Path(path).read_bytes(), columns, required)


def _parsed(path, content, columns, required):
    """The table, as `read_table`, of the bytes of a file."""
    try:
        text = content.decode()
        first, *lines = text[: text.rfind('\n') + 1].splitlines() or [','.join(columns)]
        header = first.split(',')
        rows = [parse_line(line, header) for line in lines]
        if not set(required) <= set(header):
            raise ValueError
    except ValueError:
        raise _not_a_table(path) from None
    names = dict.fromkeys([*columns, *header])
    return {name: np.array([row.get(name, np.nan) for row in rows], dtype=float) for name in names}


def _not_a_table(path):
    again = '--evaluate' if Path(path).stem == 'evaluation' else '--resume, from the checkpoint,'
    return BadInput(
        f'{path}: not a table of {Path(path).stem}; move it away, {again} writes it again'
    )


def rows_of(table):
    """The rows, {column: cell}, of a table {column: array}."""
    return [dict(zip(table, cells)) for cells in zip(*table.values())]


def read_metrics(path):
    """metrics.csv or evaluation.csv as {column: float array}; older files are of one round. Raises BadInput."""
    table = read_table(path, COLUMNS, METRICS)
    table['round'] = np.nan_to_num(table['round'])
    return table


def newest_rows(path, count=3):
    """The last rows of a metrics.csv, {column: cell}; none where there is no table yet. Reads no more than its two ends."""
    if not path.exists():
        return []
    with open(path, 'rb') as file:
        header = file.readline()
        file.seek(max(len(header), os.path.getsize(path) - (count + 1) * 8 * len(header)))
        *lines, _ = file.read().split(b'\n')  # what follows the last newline is not finished
    table = _parsed(path, header + b'\n'.join([*lines[-count:], b'']), ('round',), METRICS)
    return rows_of(table | {'round': np.nan_to_num(table['round'])})


def read_layers(path):
    """layers.csv as {column: float array}, a row per layer and evaluation. Raises BadInput."""
    return read_table(path, LAYER_COLUMNS, ('epoch', 'round', 'layer'))


# ----------------------------------------------------------------------------------------------------------------------
# Settings, checkpoints and networks of a folder
# ----------------------------------------------------------------------------------------------------------------------


def folder_settings(folder, flags=None):
    """(sweep, runs) of a results folder, as `load_settings`; knobs that came after it have the value that they stand for."""
    return load_settings(Path(folder, 'global_settings.py'), flags, BEFORE)


def save_checkpoint(path, checkpoint):
    """Saves a dictionary of tensors and plain values. Raises OSError where the disk does not take it."""
    buffer = io.BytesIO()
    torch.save(checkpoint | {'format': CHECKPOINT_FORMAT}, buffer)
    write_file(path, buffer.getbuffer())


def load_checkpoint(path, device):
    """The dictionary that `save_checkpoint` wrote, tensors on the device. Raises BadInput where it is damaged or newer."""
    mend = (
        'move it away'
        if path.name != 'model.pt'
        else f'move {path.parent} away to train this network anew'
    )
    if path.exists() and not path.is_file():
        raise BadInput(f'{path}: is not a regular file; {mend}')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a file that is no checkpoint; the refusal says so
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except PermissionError:
        raise BadInput(f'{path}: no permission to read it') from None
    except Exception:  # torch raises whatever a damaged or a hostile file leads it to
        raise BadInput(f'{path}: not a checkpoint, or a damaged one; {mend}') from None
    found = checkpoint.get('format') if isinstance(checkpoint, dict) else None
    if found != CHECKPOINT_FORMAT:
        raise BadInput(
            f'{path}: has checkpoint format {found}, this program reads {CHECKPOINT_FORMAT}; {mend}'
        )
    return checkpoint


def load_run(path, settings, net, data, steps):
    """The checkpoint of a training of `net` with these settings on this data; the log in it has today's columns.

    Args:
        path: the checkpoint.
        settings: namespace of every knob, as the run is to go on.
        net: the network, for the shapes of its weights and the device.
        data: fingerprint of the dataset.
        steps: training steps of an epoch.
    Raises:
        BadInput: it is damaged, or was left by other settings or on other data.
    """
    checkpoint = load_checkpoint(path, next(net.parameters()).device)
    wrong = BadInput(
        f'{path}: not a checkpoint of {settings.name}; move {path.parent} away to train it anew'
    )
    if not isinstance(checkpoint.get('settings'), dict):
        raise wrong
    check_origin(path, checkpoint, settings, data)
    before = BEFORE | checkpoint['settings']
    if settings.epochs != before['epochs'] and (settings.prune_rounds or settings.regrow != 'none'):
        changed = 'with rounds or regrowth they cannot change'
        raise BadInput(f'{path}: was trained with epochs = {before["epochs"]}; {changed}')
    try:
        state = {
            'round': 0,
            'layer_columns': OLDER_LAYER_COLUMNS,
            'layer_lines': [],
            'train_loss': math.inf,
        }
        state |= {'certificates': {}} | checkpoint['state']
        shapes = [weight.shape for weight in net.parameters()]
        momentum = [
            entry['momentum_buffer'].shape for _, entry in sorted(checkpoint['momentum'].items())
        ]
        trained = settings.momentum > 0 and (
            state['epoch'] > 1 or state['step'] > 0 or state['round'] > 0
        )
        steps_done = (state['epoch'] - 1) * steps + state['step']
        sound = (
            all(weight.isfinite().all() for weight in checkpoint['network'].values()),
            [(name, weight.shape) for name, weight in checkpoint['network'].items()]
            == [(name, weight.shape) for name, weight in net.state_dict().items()],
            momentum == shapes * trained
            or (momentum == [] and steps_done == 1),  # by RigL, which takes no gradient step
            type(state['round']) is int and 0 <= state['round'] <= settings.prune_rounds,
            type(state['epoch']) is int and state['epoch'] >= 0,
            type(state['step']) is int and 0 <= state['step'] <= steps,
            type(state['train_seconds']) is float and type(state['train_loss']) is float,
            all(
                name in CERTIFICATES and 0 <= value <= 1
                for name, value in state['certificates'].items()
            ),
            len(state['lines']) > 0 or state['epoch'] == 0,
            all(parse_line(line, state['columns']) for line in state['lines']),
            all(parse_line(line, state['layer_columns']) for line in state['layer_lines']),
        )
        if not all(sound):
            raise ValueError
    except Exception:  # the content may be anything
        raise wrong from None
    if settings.epochs > before['epochs'] and not at_target(settings, state['train_loss']):
        _forget_the_end(state, SimpleNamespace(**before))
    for kind, now in (('', COLUMNS), ('layer_', LAYER_COLUMNS)):
        lines, columns = state[f'{kind}lines'], state[f'{kind}columns']
        if columns != now:  # bounds came or went since
            state[f'{kind}columns'] = [*now, *(column for column in columns if column not in now)]
            rows = [{'round': '0'} | cells_of(line, columns) for line in lines]
            state[f'{kind}lines'] = [line_of(row, state[f'{kind}columns']) for row in rows]
    return checkpoint | {'state': state}


def check_origin(path, checkpoint, settings, data, free=FREE):
    """Raises BadInput where a file of weights says that it is of other settings or other data, but for the knobs `free`."""
    before = BEFORE | checkpoint['settings']
    for name, value in vars(settings).items():
        if name in (*free, 'name'):
            continue
        if name not in before:
            mend = f'if it is a new knob, give its rule the value of older runs: {LATER}'
            raise BadInput(f'{path}: has no setting {name}; {mend}')
        if before[name] != value:
            raise BadInput(f'{path}: was trained with {name} = {before[name]!r}, not {value!r}')
    if checkpoint.get('data', data) != data:
        mend = 'name the folder of before'
        raise BadInput(
            f'{path}: was trained on other data than data_dir or DATA_DIR holds here; {mend}'
        )


def _forget_the_end(state, before):
    """Takes from the log what the end of a shorter run alone had caused: an uninterrupted longer one does not have it."""
    layers, end = state['layer_lines'], f'{before.epochs},'
    if not due(before.epochs, before.layers_every):
        state['layer_lines'] = [line for line in layers if not line.startswith(end)]
    else:
        columns, blank = state['layer_columns'], dict.fromkeys(PROBES, '')
        state['layer_lines'] = [
            line_of(cells_of(line, columns) | blank, columns) if line.startswith(end) else line
            for line in layers
        ]
    if (
        not state['lines']
        or parse_line(state['lines'][-1], state['columns'])['epoch'] != before.epochs
    ):
        return
    *earlier, last = state['lines']
    cells = cells_of(last, state['columns'])
    if not due(before.epochs, before.eval_every):
        state['lines'] = earlier
        state['train_seconds'] += float(cells['train_seconds'])
    else:
        for columns, every in (
            (CERTIFICATES, before.certify_every),
            (MEASURES, before.measures_every),
        ):
            cells |= {} if due(before.epochs, every) else dict.fromkeys(columns, '')
        state['lines'] = [*earlier, line_of(cells, state['columns'])]


def load_network(path):
    """The trained network of a run's folder, and its settings: load_network('results/7/CONV-3-200') -> (net, settings).

    The network is on the CPU, in evaluation mode, with its masks where it has any. A warning says where its training is not
    at its end.

    Raises:
        BadInput: there is no such run, or no sound checkpoint of it.
    """
    path = Path(path)
    if not (path.parent / 'global_settings.py').is_file():
        raise BadInput(f'{path}: not a run of a results folder; name it as results/7/CONV-3-200')
    runs = {run.name: run for run in folder_settings(path.parent)[1]}
    if path.name not in runs:
        raise BadInput(f'{path}: no such run; {path.parent} has {", ".join(runs)}')
    files = [file for name in ('model.pt', 'weights.pt') if (file := path / name).exists()]
    if not files:
        raise BadInput(
            f'{path}: has no checkpoint model.pt; go on with its training, or name another run'
        )
    settings = runs[path.name]
    net = get_network(settings, *DATASETS[settings.dataset_name][1:3])
    load_weights(net, files[0])
    rows = newest_rows(path / 'metrics.csv')
    if not finished(settings, rows):
        where = (
            f'epoch {rows[-1]["epoch"]:.0f} of round {rows[-1]["round"]:.0f}'
            if rows
            else 'the start'
        )
        warnings.warn(
            f'{path}: its training is not finished; the last row is that of {where}', stacklevel=2
        )
    return net.eval(), settings


def load_weights(net, path, settings=None, data=None, free=FREE):
    """Puts the weights of a checkpoint or a snapshot into a network.

    Args:
        settings, data: where given, the file must be of these settings, but for the knobs `free`, and of the data with this
            fingerprint; a file that does not say is taken as it is.
    Returns:
        (round, epoch) after which they are, or None where they are of the middle of an epoch.
    """
    checkpoint = load_checkpoint(path, next(net.parameters()).device)
    if settings is not None and isinstance(checkpoint.get('settings'), dict):
        check_origin(path, checkpoint, settings, data, free)
    try:
        net.load_state_dict(checkpoint['network'])
        state = checkpoint.get('state', {})
        before = (
            (0, state['epoch'] - 1) if state and state['step'] == 0 else None
        )  # as it is in older checkpoints
        place = checkpoint.get('place', before)
        place = None if place is None else tuple(place)
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise BadInput(
            f'{path}: does not hold the weights of the network that its settings describe'
        ) from None
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        raise BadInput(f'{path}: its weights contain NaN or infinity; move it away')
    return place
