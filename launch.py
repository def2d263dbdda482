"""The command line's work around a training: options, checks, locks, signals, jobs, --evaluate, --status and --plot."""

import contextlib
import datetime
import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import figures
import sparsify
from conf import GLOBAL_SETTINGS, ROOT, BadInput, load_settings, parse_command_line, settings_text
from datasets import fingerprint, load_dataset
from device import (
    check_memory,
    check_stop,
    choose_device,
    choose_precision,
    guarded,
    keep_freed_memory,
)
from evaluation import (
    COLUMNS,
    Diverged,
    check_bounds,
    evaluate,
    finished,
    new_network,
    no_certificate,
    stopped_early,
)
from jobs import CHILD, resuming, train_side_by_side
from measures.norms import measure_data
from measures.trace import not_covered
from models import get_network
from records import (
    FREE,
    csv_line,
    folder_settings,
    load_run,
    load_weights,
    locked,
    new_results_folder,
    newest_rows,
    read_metrics,
    rows_of,
    seen_from_here,
    write_file,
    write_table,
)
from studies import ranking

# ----------------------------------------------------------------------------------------------------------------------
# What a run is trained on, and what can be seen to be wrong before
# ----------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def get_dataset(name, data_dir, *how):
    if (there := os.environ.get('DATA_DIR')) and not os.path.isdir(there):
        raise BadInput(
            f'DATA_DIR = {there}: no such folder; make it, or unset the environment variable'
        )
    return load_dataset(name, there or ROOT / data_dir, *how)


def get_inputs(settings):
    """A run's device and its dataset, which is held on the device once for all runs in a row that share it."""
    device = choose_device(settings.device)
    noise = settings.train_samples, settings.label_noise, settings.clean_samples, settings.data_seed
    return device, get_dataset(
        settings.dataset_name, settings.data_dir, settings.normalize, device, *noise
    )


def check_run(settings):
    """Raises BadInput for all that is seen to be wrong before training. Returns what will not be logged, and why, as lines."""
    check_bounds()
    device, dataset = get_inputs(settings)
    choose_precision(settings.precision, device)
    sparsify.check(settings)
    m, batch = len(dataset.train_images), settings.batch_size
    if settings.normalization == 'batch' and 1 in (m % batch, batch):
        raise BadInput(
            f'batch_size = {batch}: of {m} samples it leaves a batch of one, which batch normalization cannot take'
        )
    with torch.device('meta'):
        net = get_network(settings, dataset.input_shape, dataset.num_classes)
        check_memory(settings, net, torch.empty(1, *dataset.input_shape), min(m, batch), device)
    missing = []
    if reason := not_covered(net, dataset.input_shape):
        missing.append(f'bounds that do not cover {settings.network} stay empty: {reason}')
    elif settings.certify_every and (reason := no_certificate(settings)):
        missing.append(f'certificates stay empty: {reason}')
    return missing


# ----------------------------------------------------------------------------------------------------------------------
# Results folders
# ----------------------------------------------------------------------------------------------------------------------


def launch_header(device, missing):
    """What a launch's settings file says of where it came from and what it does not log, as lines."""

    def git(*arguments):
        command = subprocess.run(['git', '-C', ROOT, *arguments], capture_output=True, text=True)
        return command.stdout.strip() if command.returncode == 0 else None

    try:
        commit = git('rev-parse', 'HEAD') or 'unknown'
        commit += (
            ' with uncommitted changes'
            if git('status', '--porcelain', '--untracked-files=no')
            else ''
        )
    except OSError:
        commit = 'unknown, git is not installed'
    name = (
        torch.cuda.get_device_name(device)
        if device.type == 'cuda'
        else f'{torch.get_num_threads()} threads'
    )
    return [
        f'date: {datetime.datetime.now().astimezone().isoformat(timespec="seconds")}',
        f'versions: Python {platform.python_version()}, torch {torch.__version__}',
        f'device: {device}, {name}',
        f'commit: {commit}',
        *missing,
    ]


@contextlib.contextmanager
def locked_run(folder):
    """Keeps other processes from training the network of this folder. Raises BadInput where one still does after a while."""
    with locked(
        folder / '.lock', seconds=5
    ) as free:  # a process that was stopped writes its checkpoint first
        if not free:
            raise BadInput(f'{folder}: another process is training this network; let it end first')
        yield


def check_options(options, flags):
    """Raises BadInput where the options do not fit together or the folder does not fit them."""
    folder, reads = (
        options.folder,
        [name for name in ('plot', 'status', 'evaluate') if getattr(options, name)],
    )
    allowed = (
        FREE if options.resume else ('delta', 'gamma') if options.evaluate else ()
    )  # what the bounds alone depend on
    option = f'--{reads[0]}' if reads else '--resume'
    if options.prepare and options.run is not None:
        raise BadInput('--prepare makes the folder of a whole sweep; leave --run out')
    if not (options.resume or reads):
        if folder and folder.exists():
            content = [path.name for path in folder.iterdir()] if folder.is_dir() else None
            if content == ['global_settings.py'] and options.settings is None:
                options.settings = (
                    folder / 'global_settings.py'
                )  # put there by hand, or left by a launch that trained nothing
            elif content != []:
                resume = (
                    'add --resume to go on with it, or ' * (folder / 'global_settings.py').exists()
                )
                raise BadInput(f'{folder}: exists already; {resume}name a new folder')
        options.is_there = bool(folder and folder.exists())
        return
    if folder is None:
        raise BadInput(f'{option} needs the folder: --results-path DIR')
    if options.settings is not None:
        raise BadInput(f"{option} takes the folder's own settings; leave --settings out")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(
            folder / 'global_settings.py'
        )  # what else is wrong with it, as links that lead in a circle, says so itself
    if not (folder / 'global_settings.py').is_file():
        mend = (
            f'name {folder.parent}'
            if (folder.parent / 'global_settings.py').is_file()
            else f'launch without {option}'
        )
        raise BadInput(f'{folder}: not a results folder, it has no global_settings.py; {mend}')
    if options.resume and any(folder.glob('*/compress.csv')):
        raise BadInput(
            f'{folder}: holds networks made narrower, not trained ones; run compress.py again'
        )
    trained_here = [*folder.glob('*/model.pt'), *folder.glob('*/.lock')]
    if options.resume and any(folder.glob('*/metrics.csv')) and not trained_here:
        repeat = f'python train.py --settings {folder}/global_settings.py repeats them'
        raise BadInput(
            f'{folder}: results that are shipped without checkpoints are for reading; {repeat}'
        )
    if reads and options.run is not None:
        raise BadInput(f'{option} is for every network of the folder; leave --run out')
    if flags and options.run is not None:
        raise BadInput(
            f'{next(iter(flags))}: a setting cannot change with --run; give it to a --resume of the whole sweep'
        )
    if changed := [name for name in flags if name not in allowed]:
        may = f'only {", ".join(allowed)} may change' if allowed else 'leave it out'
        raise BadInput(f'{option} keeps the setting {changed[0]}; {may}')


def resumed_settings(folder, flags, option):
    """(sweep, runs) of a folder with these flags. Raises BadInput where they change which runs there are, or shorten one."""
    sweep, before = folder_settings(folder)
    if not flags:
        return sweep, before
    if varied := [name for name in flags if len({str(getattr(run, name)) for run in before}) > 1]:
        leave = f'leave --{varied[0].replace("_", "-")} out'
        raise BadInput(f'{option} keeps the runs of the sweep, which varies {varied[0]}; {leave}')
    sweep, runs = folder_settings(folder, flags)
    if [run.name for run in runs] != [run.name for run in before]:
        raise BadInput(
            f'{option} keeps the runs of the sweep; give one value of {", ".join(flags)}'
        )
    if any(run.epochs < own.epochs for run, own in zip(runs, before)):
        raise BadInput(
            f'epochs = {runs[0].epochs}: a resumed run can only be made longer than {before[0].epochs}'
        )
    return sweep, runs


def check_checkpoints(folder, runs):
    """Raises BadInput where a checkpoint does not fit, before anything is written, so that a refused resume changes nothing."""
    for run in runs:
        if (folder / run.name).is_dir():
            with locked_run(folder / run.name):
                if (path := folder / run.name / 'model.pt').exists():
                    device, dataset = get_inputs(run)
                    net = get_network(run, dataset.input_shape, dataset.num_classes)
                    load_run(path, run, net, fingerprint(dataset), steps_of(run, dataset))


def steps_of(settings, dataset):
    """Training steps of an epoch."""
    return -(-len(dataset.train_images) // settings.batch_size)


def check_name(option, path):
    """Raises BadInput where a folder's name could not be given to another command, as by the line that says how to go on."""
    if re.search(r'^-|[\r\n]', path):
        raise BadInput(f'{option} {path!r}: must have no dash in front and be a single line')


def make_folder(options, flags, sweep, missing, device):
    """Makes the results folder, or brings the settings of one that is resumed up to date; what it was made by stays on top."""
    if options.folder is None:
        where = seen_from_here(ROOT / sweep['results_dir'])
        check_name('results_dir', str(where))
        options.folder = new_results_folder(where)
    elif not options.resume:
        options.folder.mkdir(
            parents=True, exist_ok=options.is_there
        )  # else another launch has made it since
    path = options.folder / 'global_settings.py'
    header = launch_header(device, missing)
    if options.resume:
        lines = path.read_text('utf-8').splitlines()
        kept = [line[2:] for line in lines[: lines.index('')]] if '' in lines else []
        header = [
            *kept,
            f'resumed with {", ".join(f"{name} = {value!r}" for name, value in flags.items())}',
            *header,
        ]
    else:
        header = [
            'The settings of this launch; python train.py --settings with this file repeats it.',
            *header,
        ]
    write_file(path, settings_text(sweep, header).encode())


# ----------------------------------------------------------------------------------------------------------------------
# What the command line asks for
# ----------------------------------------------------------------------------------------------------------------------


def train_all(runs, folder, train):
    """Trains one network after the other. Returns 1 if one of them diverged, else 0."""
    keep_freed_memory()
    status = 0
    for settings in runs:
        device, dataset = get_inputs(settings)
        sizes = f'{len(dataset.train_images)} training and {len(dataset.test_images)} test images'
        first = (
            ''
            if (folder / settings.name / 'model.pt').exists()
            else '; measuring the network before training'
        )
        print(f'{folder / settings.name}: {dataset.name}, {sizes}, on {device}{first}', flush=True)
        (folder / settings.name).mkdir(exist_ok=True)
        with locked_run(folder / settings.name):
            try:
                train(settings, dataset, folder / settings.name, device)
            except Diverged:
                mend = f'its last good checkpoint is kept; launch it anew with an lr smaller than {settings.lr:g}'
                print(
                    f'train.py: error: {settings.name}: the loss became NaN or infinite; {mend}',
                    file=sys.stderr,
                )
                status = 1
        check_stop()
    return status


def draw(folder):
    """Draws the figures, or says why not: what was trained does not depend on them."""
    try:
        paths = figures.draw(folder) + ranking.draw(folder)
        print(
            '\n'.join(f'drew {path}' for path in paths)
            or f'{folder}: nothing is logged yet, so no figure was drawn'
        )
    except ImportError:
        print('no figure was drawn, since matplotlib is not installed: pip install matplotlib')
    except (OSError, BadInput):
        raise
    except Exception as error:  # whatever matplotlib makes of its own settings
        print(f'no figure was drawn: {type(error).__name__}: {error}')


def evaluate_all(runs, folder, flags):
    """Measures the snapshots and the last checkpoint of each network anew, with today's BOUNDS, into its evaluation.csv.

    Rows of places whose weights are gone stay. The flags may name what the bounds alone depend on, delta and gamma, to be
    others than those of the training; the table says which they were.
    """
    keep_freed_memory()
    for settings in runs:
        path = folder / settings.name
        files = [*path.glob('snapshots/*.pt'), *path.glob('model.pt'), *path.glob('weights.pt')]
        if not files:
            print(f'{path}: has no weights yet')
            continue
        _, dataset = get_inputs(settings)
        net = new_network(settings, dataset)
        data, table = (
            measure_data(net, dataset.train_images, skip_uncovered=True),
            path / 'evaluation.csv',
        )
        before = read_metrics(table) if table.exists() else {}
        columns = list(
            dict.fromkeys([*COLUMNS, 'delta', 'gamma', *before])
        )  # a bound that went since stays in its rows
        rows, measured = (
            {(int(row['round']), int(row['epoch'])): row for row in rows_of(before)},
            set(),
        )
        for file in tqdm(files, desc=settings.name, disable=not sys.stdout.isatty()):
            place = load_weights(net, file, settings, fingerprint(dataset), (*FREE, *flags))
            if place is None:
                tqdm.write(
                    f'{file}: its weights lie between two rows of the table; a --resume goes on to the next'
                )
                continue
            if place not in measured:
                measured.add(place)
                knobs, old = {'delta': settings.delta, 'gamma': settings.gamma}, rows.get(place, {})
                old = old if all(old.get(name) == value for name, value in knobs.items()) else {}
                rows[place] = old | evaluate(net, settings, dataset, data, *place) | knobs
            kept = [
                row | {'round': place[0], 'epoch': place[1]} for place, row in sorted(rows.items())
            ]
            lines = [csv_line(row, columns) for row in kept]
            write_table(table, columns, lines)
        print(f'{table}: {len(rows)} row{"s" * (len(rows) != 1)}\n' * bool(rows), end='')
    draw(folder)


def show_status(runs, folder):
    """A line per network: finished, running or left; where it is; its test error; when it was last written."""
    print(f'{"network":40} {"state":9} {"round":>5} {"epoch":>11} {"test error":>10}  last written')
    for settings in runs:
        path = folder / settings.name / 'metrics.csv'
        rows = newest_rows(path)
        state = 'finished' if finished(settings, rows) else 'left'
        if (folder / settings.name).is_dir() and state == 'left':
            with (
                contextlib.suppress(OSError),
                locked(folder / settings.name / '.lock', seconds=0) as free,
            ):  # or read-only
                state = state if free else 'running'
        if not rows:
            print(f'{settings.name:40} {state:9}')
            continue
        last, epochs = rows[-1], f'{rows[-1]["epoch"]:.0f}/{settings.epochs}'
        written = datetime.datetime.fromtimestamp(path.stat().st_mtime).isoformat(' ', 'seconds')
        early = f'  {reason}' if (reason := stopped_early(settings, rows)) else ''
        print(
            f'{settings.name:40} {state:9} {last["round"]:5.0f} {epochs:>11} {last["test_error"]:10.4f}  {written}{early}'
        )


def run(options, flags, train):
    """Does what the command line says. Returns the exit status."""
    check_options(options, flags)
    if options.plot:
        draw(options.folder)
        return 0
    if options.status:
        show_status(folder_settings(options.folder)[1], options.folder)
        return 0
    if options.resume or options.evaluate:
        sweep, runs = resumed_settings(
            options.folder, flags, '--resume' if options.resume else '--evaluate'
        )
    else:
        sweep, runs = load_settings(
            GLOBAL_SETTINGS if options.settings is None else options.settings, flags
        )
    torch.set_default_dtype(
        torch.float32
    )  # a settings file is a program, and may have changed either
    torch.set_grad_enabled(True)
    if options.run is not None and not 1 <= options.run <= len(runs):
        raise BadInput(f'--run {options.run}: the sweep has the networks 1 to {len(runs)}')
    numbers = range(1, len(runs) + 1) if options.run is None else [options.run]
    chosen = [runs[number - 1] for number in numbers]
    missing = list(dict.fromkeys(line for settings in chosen for line in check_run(settings)))
    if options.evaluate:
        evaluate_all(runs, options.folder, flags)
        return 0
    if not (options.resume or options.prepare):  # a task of Slurm has its own number of threads
        if sweep['threads'] > os.cpu_count():
            raise BadInput(
                f'threads = {sweep["threads"]}: this machine has {os.cpu_count()} cores; choose less, or 0'
            )
        sweep['threads'] = sweep['threads'] or max(
            1, torch.get_num_threads() // min(sweep['jobs'], len(runs))
        )
        for settings in runs:
            settings.threads = sweep['threads']
    try:
        if options.resume and flags:
            check_checkpoints(options.folder, runs)
        if flags or not options.resume:
            make_folder(options, flags, sweep, missing, choose_device(runs[0].device))
    except OSError as error:
        raise BadInput(f'the results folder cannot be written: {error}; name another one') from None
    if options.prepare:
        print(len(runs), options.folder)
        return 0
    print(''.join(f'{line}\n' for line in missing), end='')
    if sweep['jobs'] > 1 and len(chosen) > 1:
        status = train_side_by_side(
            numbers, runs, options.folder, min(sweep['jobs'], len(chosen)), sweep['device']
        )
    else:
        status = train_all(chosen, options.folder, train)
    if CHILD not in os.environ:  # of a sweep on Slurm, the task that ends last draws
        tables = [(settings, options.folder / settings.name / 'metrics.csv') for settings in runs]
        if options.run is None or all(
            finished(settings, newest_rows(path)) for settings, path in tables
        ):
            draw(options.folder)
    return status


def main(train, argv=None):
    """Runs the command line. Returns 0, 1 where a run failed, 2 for bad input, 128 + signal where it was stopped.

    Args:
        train: function of (settings, dataset, folder, device) that trains one network, from its checkpoint where there is one.
    """
    options = None

    def program():
        nonlocal options
        options, flags = parse_command_line(argv)
        options.folder = None
        if options.results_path is not None:
            options.folder = Path(options.results_path)
            check_name('--results-path', str(options.folder))
        return run(options, flags, train)

    def how_to_go_on():
        reads = options is None or options.plot or options.status or options.evaluate
        if reads or not options.folder or not (options.folder / 'global_settings.py').exists():
            return ''
        only = '' if options.run is None else f' --run {options.run}'
        return f'; go on with: {resuming(options.folder)}{only}'

    return guarded('train.py', program, how_to_go_on)
