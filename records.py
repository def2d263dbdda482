"""A results folder: its settings, tables and checkpoints; load_network and load_data for notebooks.

Every file is written under a temporary name and renamed, so that a kill at any moment leaves it as
it was or complete.
"""

import contextlib
import csv
import datetime
import fcntl
import functools
import io
import os
import platform
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from conf import KNOBS, ROOT, BadInput, load_launch, settings_text
from datasets import DATASETS, load_dataset
from device import choose_device, describe_machine
from evaluation import COLUMNS, LAYER_COLUMNS, is_finished, stopped_early
from models import get_network

CHECKPOINT_FORMAT = 2  # 1 had the log as text; only its weights are read now

# Knobs that may differ when a run is resumed: its numbers do not depend on them, but for the last
# digits, on device and threads. epochs may only grow, and not with rounds or regrowth, whose
# schedules read it.
FREE = 'epochs', 'device', 'data_dir', 'results_dir', 'snapshot_every', 'jobs', 'threads'


def new_results_folder(results_dir):
    """Makes the next numbered folder in results_dir; simultaneous launches get different ones."""
    Path(results_dir).mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name) for path in Path(results_dir).iterdir() if path.name.isdecimal()]
    number = max(numbers, default=0)
    while True:
        number += 1
        folder = Path(results_dir, str(number))
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def write_file(path, content):
    """Replaces a file atomically by these bytes, under a temporary name of this process."""
    temporary = Path(f'{path}.{os.getpid()}.tmp')
    # O_EXCL and O_NOFOLLOW: a link that someone put there is not written through.
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(file, 'wb') as stream:
            stream.write(content)
            stream.flush()
            os.fsync(file)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


@contextlib.contextmanager
def lock(folder, seconds=5):
    """Holds the lock of a network's folder, which ends with the process.

    Raises:
        BadInput: another process still holds it after this time.
    """
    file = os.open(Path(folder, '.lock'), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    deadline = time.monotonic() + seconds  # a process that was just stopped writes its checkpoint
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for stale in Path(folder).rglob('*.tmp'):  # of a process killed as it wrote
                    stale.unlink(missing_ok=True)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise BadInput(
                        f'{folder}: another process is working on this network'
                    ) from None
                time.sleep(0.05)
            except OSError:
                print(
                    f'{folder}: no file locks here; start no second process on it', file=sys.stderr
                )
                break
        yield
    finally:
        os.close(file)


def is_locked(folder):
    """Whether a process is working on the network of this folder."""
    try:
        with lock(folder, seconds=0):
            return False
    except BadInput:
        return True
    except OSError:  # a read-only folder, in which nobody trains
        return False


# ------------------------------------------------------------------------------------------------
# A launch
# ------------------------------------------------------------------------------------------------


def resumed_settings(folder, flags):
    """(sweep, runs) of a folder with these flags, which may change FREE knobs. Raises BadInput."""
    sweep, before = load_launch(folder)
    for name in flags:
        if name not in FREE:
            raise BadInput(f'--resume keeps the setting {name}; only {", ".join(FREE)} may change')
        if isinstance(sweep[name], list):
            raise BadInput(f'--resume keeps the sweep over {name}; leave the flag out')
    sweep, runs = load_launch(folder, flags)
    if [run.name for run in runs] != [run.name for run in before]:
        raise BadInput(f'--resume keeps the networks of {folder}; give one value of each setting')
    return sweep, runs


def launch_header(device, notes):
    """What the settings file of a launch says of its origin, and what it does not log, as lines."""
    git = ['git', '-C', str(ROOT)]
    try:
        commit = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout
        changes = [*git, 'status', '--porcelain', '--untracked-files=no']
        changed = subprocess.run(changes, capture_output=True, text=True).stdout
    except OSError:  # git is not installed
        commit = changed = ''
    commit = commit.strip() or 'unknown'
    if changed:
        commit += ' with uncommitted changes'
    machine = describe_machine(device)
    return [
        f'date: {datetime.datetime.now().astimezone().isoformat(timespec="seconds")}',
        f'versions: Python {platform.python_version()}, torch {torch.__version__}',
        f'device: {device}, {machine["processor"]}',
        f'commit: {commit}',
        *notes,
    ]


def make_folder(options, flags, sweep, notes, device):
    """Makes the results folder with its settings, or updates the settings of a resumed one."""
    header = launch_header(device, notes)
    if options.resume:
        folder = Path(options.results_path)
        if flags:
            lines = (folder / 'global_settings.py').read_text('utf-8').splitlines()
            before = [line[2:] for line in lines if line.startswith('# ')]
            changed = ', '.join(f'{name} = {value!r}' for name, value in flags.items())
            header = [*before, f'resumed with {changed}', *header]
            write_file(folder / 'global_settings.py', settings_text(sweep, header).encode())
        return folder
    if options.results_path:
        folder = Path(options.results_path)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = new_results_folder(ROOT / sweep['results_dir'])
    command = f'python train.py --settings {folder}/global_settings.py'
    header = [f'The settings of this launch, which {command} repeats.', *header]
    write_file(folder / 'global_settings.py', settings_text(sweep, header).encode())
    return folder


def show_status(folder):
    """Prints a line for each network: its state, its last row, and when that was written."""
    print(
        f'{"network":40} {"state":10} {"round":>5} {"epoch":>11} {"test error":>10}  last written'
    )
    for settings in load_launch(folder)[1]:
        path = Path(folder, settings.name)
        rows = rows_so_far(path)
        state = 'unfinished'
        if is_finished(settings, rows):
            state = 'finished'
        elif path.is_dir() and is_locked(path):
            state = 'running'
        line = f'{settings.name:40} {state:10}'
        if rows:
            last, epoch = rows[-1], f'{rows[-1]["epoch"]:.0f}/{settings.epochs}'
            written = time.strftime(
                '%Y-%m-%d %H:%M', time.localtime((path / 'metrics.csv').stat().st_mtime)
            )
            line += f' {last["round"]:5.0f} {epoch:>11} {last["test_error"]:10.4f}  {written}'
            line += f'  {stopped_early(settings, rows) or ""}'
        print(line.rstrip())


# ------------------------------------------------------------------------------------------------
# Tables: a cell that does not apply is empty, and nan once read
# ------------------------------------------------------------------------------------------------


def write_table(path, columns, rows):
    """Writes a csv file of rows, {column: cell}; other columns come last, nan is an empty cell."""
    text = io.StringIO()
    names = dict.fromkeys(columns)
    for row in rows:
        names |= dict.fromkeys(row)
    writer = csv.DictWriter(text, names, lineterminator='\n')
    writer.writeheader()
    for row in rows:
        writer.writerow({name: cell for name, cell in row.items() if cell == cell})
    write_file(path, text.getvalue().encode())


def read_table(path, columns, required):
    """A csv file as {column: float array}; a missing column is nan, and so is an empty cell.

    Raises:
        BadInput: it is not such a table; the line and the cause are named.
    """
    try:
        with open(path, encoding='utf-8-sig', newline=None) as file:
            lines = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f'{path}: not a csv file ({error})') from None
    header = lines[0] if lines else list(columns)
    if missing := [name for name in required if name not in header]:
        raise BadInput(
            f'{path}: has no column {missing[0]}; move the file away, or put it back as it was'
        )
    rows = []
    for number, cells in enumerate(lines[1:], 2):
        if not any(cells):
            continue
        try:
            row = dict(zip(header, cells, strict=True))
            rows.append({name: float(cell or 'nan') for name, cell in row.items()})
        except ValueError as error:
            raise BadInput(f'{path}, line {number}: {error}; put the file back as it was') from None
        if any(rows[-1][name] != rows[-1][name] for name in required):
            raise BadInput(f'{path}, line {number}: {", ".join(required)} must not be empty')
    names = dict.fromkeys([*columns, *header])
    return {name: np.array([row.get(name, np.nan) for row in rows], dtype=float) for name in names}


def read_metrics(path):
    """metrics.csv or evaluation.csv as {column: float array}; older files are of one round."""
    table = read_table(path, COLUMNS, ('epoch', 'train_error', 'test_error', 'generalization_gap'))
    table['round'] = np.nan_to_num(table['round'])
    return table


def read_layers(path):
    """layers.csv as {column: float array}, a row per layer and evaluation."""
    return read_table(path, LAYER_COLUMNS, ('epoch', 'round', 'layer'))


def rows_of(table):
    """The rows, {column: cell}, of a table {column: array}."""
    return [dict(zip(table, cells)) for cells in zip(*table.values())]


def rows_so_far(folder):
    """The rows of a network's metrics.csv, none if it has none yet."""
    path = Path(folder, 'metrics.csv')
    return rows_of(read_metrics(path)) if path.exists() else []


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


def save_checkpoint(path, checkpoint):
    """Saves a dictionary of tensors and plain values atomically."""
    buffer = io.BytesIO()
    torch.save(checkpoint | {'format': CHECKPOINT_FORMAT}, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path, device='cpu'):
    """The dictionary that `save_checkpoint` wrote, also in older programs. Runs no code in it.

    Raises:
        BadInput: it is damaged or not a checkpoint.
    """
    path = Path(path)
    try:
        # torch does not verify the checksums of the zip: without testzip a flipped bit passes.
        if damaged := zipfile.ZipFile(path).testzip():
            raise ValueError(damaged)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if not all(weight.isfinite().all() for weight in checkpoint.get('network', {}).values()):
            raise ValueError('NaN or infinite weights')
        return checkpoint
    except OSError:
        raise
    except Exception:  # torch raises whatever a damaged or hostile file leads it to
        advice = 'move the file away'
        if path.name == 'model.pt':
            advice = f'move {path.parent} away to train this network again'
        raise BadInput(f'{path}: damaged, or not a checkpoint; {advice}') from None


def check_origin(path, checkpoint, settings, data, free=FREE):
    """Raises BadInput if a file of weights names other settings, `free` ones aside, or other data.

    Shipped weights.pt name neither.
    """
    before = checkpoint.get('settings', vars(settings))
    for name, (neutral, _) in KNOBS.items():
        old, new = before.get(name, neutral), getattr(settings, name)
        if name not in free and old != new:
            raise BadInput(f'{path}: was trained with {name} = {old!r}, not {new!r}')
    if checkpoint.get('data', data) != data:
        advice = 'name the folder it was trained on'
        raise BadInput(
            f'{path}: was trained on other data than data_dir or DATA_DIR holds; {advice}'
        )


def load_run(path, settings, data, device):
    """The checkpoint with which a run continues. Raises BadInput if it does not fit."""
    checkpoint = load_checkpoint(path, device)
    if checkpoint.get('format') != CHECKPOINT_FORMAT:
        advice = 'its weights can be read here, and commit 050935c continues the training'
        raise BadInput(f'{path}: the checkpoint of an older program; {advice}')
    check_origin(path, checkpoint, settings, data)
    before = checkpoint['settings']['epochs']
    if settings.epochs < before:
        raise BadInput(
            f'{path}: epochs = {settings.epochs}: a run cannot become shorter than {before}'
        )
    if settings.epochs > before and (settings.prune_rounds or settings.regrow != 'none'):
        raise BadInput(f'{path}: epochs = {before} cannot change with rounds or regrowth')
    return checkpoint


def position_of(checkpoint):
    """(round, epoch) of the row that is logged of these weights; None if there is none."""
    if 'position' in checkpoint:
        return checkpoint['position'] and tuple(checkpoint['position'])
    return checkpoint.get('place') and tuple(checkpoint['place'])  # its name in older files


# ------------------------------------------------------------------------------------------------
# For notebooks and studies
# ------------------------------------------------------------------------------------------------


def load_network(path):
    """The trained network of a run and its settings: load_network('results/7/CONV-3-200').

    The network is on the CPU and in evaluation mode. A warning says if its training is unfinished.

    Raises:
        BadInput: there is no such run, or no sound checkpoint of it.
    """
    path = Path(path)
    if not path.is_dir():
        raise BadInput(f'{path}: no such folder; name a run, as results/7/CONV-3-200')
    runs = {run.name: run for run in load_launch(path.parent)[1]}
    if path.name not in runs:
        raise BadInput(f'{path}: no such run; {path.parent} has {", ".join(runs)}')
    files = [path / name for name in ('model.pt', 'weights.pt') if (path / name).exists()]
    if not files:
        raise BadInput(f'{path}: has no weights; train it, or name another run')
    settings = runs[path.name]
    net = get_network(settings, *DATASETS[settings.dataset_name][1:3])
    load_weights(net, files[0], settings)
    rows = rows_so_far(path)
    if not is_finished(settings, rows):
        epoch = f'epoch {rows[-1]["epoch"]:.0f}' if rows else 'the start'
        warnings.warn(
            f'{path}: its training is not finished; its last row is of {epoch}', stacklevel=2
        )
    return net.eval(), settings


def load_weights(net, path, settings, data=None, free=FREE):
    """Loads the weights of a checkpoint into a network; returns `position_of` it.

    Raises:
        BadInput: they are of other settings, or, if `data` (a fingerprint) is given, of other data.
    """
    checkpoint = load_checkpoint(path, next(net.parameters()).device)
    check_origin(path, checkpoint, settings, data if data else checkpoint.get('data'), free)
    try:
        net.load_state_dict(checkpoint['network'])
    except (KeyError, RuntimeError):
        raise BadInput(
            f'{path}: not the weights of the network that its settings describe'
        ) from None
    return position_of(checkpoint)


def load_data(settings, device=None):
    """The dataset of a run, as `datasets.load_dataset` returns it, on its device or on another one.

    The variable DATA_DIR wins over data_dir. The last dataset is kept for the next call.
    """
    folder = os.environ.get('DATA_DIR')
    if folder and not os.path.isdir(folder):
        raise BadInput(f'DATA_DIR = {folder}: no such folder; make it, or unset the variable')
    labels = (
        settings.train_samples,
        settings.label_noise,
        settings.clean_samples,
        settings.data_seed,
    )
    device = device or choose_device(settings.device)
    path = folder or ROOT / settings.data_dir
    return _load_data(settings.dataset_name, path, settings.normalize, device, *labels)


_load_data = functools.lru_cache(maxsize=1)(load_dataset)
