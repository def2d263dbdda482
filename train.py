"""Train CONV-L-H networks and log, at every epoch, the errors, the generalization gap and each generalization bound.

python train.py                                     the paper's run: CONV-3-200 on MNIST
python train.py --settings conf/digits.py           the quick start, offline and in under a minute
python train.py --depth 3 4 --width 200 600         a sweep of four networks
python train.py --results-path results/7 --resume   go on with what was interrupted
python train.py --results-path results/7 --plot     draw figure.png from what is logged so far
"""

import contextlib
import ctypes
import datetime
import functools
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

from conf import GLOBAL_SETTINGS, ROOT, BadInput, load_settings, parse_command_line, settings_text
from models import get_network
from utils import (
    BOUNDS,
    COLUMNS,
    classification_margins,
    evaluate_bounds,
    load_checkpoint,
    load_dataset,
    locked,
    margin_error,
    measure_data,
    metrics_line,
    new_results_folder,
    plot_figure,
    save_checkpoint,
    trace_layers,
    write_file,
)

LOSSES = {'MSE': F.mse_loss, 'CE': F.cross_entropy, 'L1': F.l1_loss}  # of outputs and one-hot targets

# Images per forward pass of an evaluation: on a CPU few enough that activations stay in its cache.
EVAL_BATCH = {'cpu': 32, 'cuda': 1000}

# What may change when a run is resumed, since the numbers do not depend on it.
FREE = ('epochs', 'device', 'data_dir', 'results_dir', 'checkpoint_every')


class Interrupted(BaseException):
    """SIGINT or SIGTERM. No Exception, so that nothing on its way takes it for a failure of its own."""


class Diverged(Exception):
    """The loss or a weight became NaN or infinite."""


stop = SimpleNamespace(deferred=False, signal=None)


def on_signal(number, frame):
    """Ends the program here, or, while a network is being trained, at the next `check_stop`.

    A second SIGINT kills. A second SIGTERM does not: batch systems send it to a script and to its children alike.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop.signal = number
    if not stop.deferred:
        raise Interrupted


def check_stop():
    if stop.signal:
        raise Interrupted


@contextlib.contextmanager
def deferred_stop():
    """Lets a signal wait for the next `check_stop`, where weights, optimizer and step count fit together."""
    stop.deferred = True
    try:
        yield
    finally:
        stop.deferred = False
    check_stop()


def keep_freed_memory():
    """Lets glibc keep freed memory, where it is the C library.

    It would hand the activations of every batch back to the kernel, which clears their pages anew for the next batch; at
    small widths that takes longer than the computation.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest that it accepts, in bytes


def choose_device(name):
    """The torch.device of the setting `device`; raises BadInput where this machine does not have it."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    match = re.fullmatch(r'cpu|cuda(?::(\d+))?', name)
    if not match or (name != 'cpu' and int(match[1] or 0) >= torch.cuda.device_count()):
        raise BadInput(f'device = {name!r}: not on this machine; use auto, cpu, cuda or cuda:N')
    device = torch.device(name)
    if device.type == 'cuda':
        torch.cuda.set_device(device)  # graphs are captured on the current device
    return device


def choose_precision(name, device):
    """Sets how float32 products are computed on CUDA, and returns whether training runs in bfloat16."""
    if name == 'tf32' and device.type != 'cuda':
        raise BadInput("precision = 'tf32': a CPU has no TF32; use auto, float32 or bf16")
    fp32 = 'tf32' if device.type == 'cuda' and name in ('auto', 'tf32') else 'ieee'
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = fp32
    return name == 'bf16'


def learning_rate(settings, epoch):
    """The learning rate of an epoch, counted from 1: times lr_decay after each milestone."""
    return settings.lr * settings.lr_decay ** sum(epoch > milestone for milestone in settings.milestones)


@torch.no_grad()
def evaluate(net, images, labels, targets, loss):
    """The mean loss and the margins (m,) of a network on a whole set."""
    outputs = []
    with parametrize.cached():
        for batch in images.split(EVAL_BATCH[images.device.type]):
            check_stop()
            outputs.append(net(batch))
    outputs = torch.cat(outputs).double()
    return loss(outputs, targets.double()).item(), classification_margins(outputs, labels)


def make_step(net, optimizer, loss, images, targets, loss_sum, bf16):
    """The training step: a function of the indices (B,) of a batch's samples that adds the batch's loss to loss_sum."""

    def step(indices):
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            outputs = net(images.index_select(0, indices))
        batch_loss = loss(outputs.float(), targets.index_select(0, indices))
        batch_loss.backward()
        optimizer.step()
        loss_sum.add_(batch_loss.detach())

    return step


def graphed(step, optimizer, batch_size, device):
    """The training step as a CUDA graph, called as the step is.

    The first steps are plain ones, to set up kernels, workspaces and momentum; so is that of an uneven last batch. A graph
    holds the learning rate as a constant, so it is captured anew when that changes.
    """
    indices_of_graph = torch.zeros(batch_size, dtype=torch.int64, device=device)
    graph, graph_lr, plain_steps, side = None, None, 0, torch.cuda.Stream()

    def call(indices):
        nonlocal graph, graph_lr, plain_steps
        if plain_steps < 3 or len(indices) < batch_size:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # as the capture does: gradients are accumulated on the stream they came from
                step(indices)
            torch.cuda.current_stream().wait_stream(side)
            plain_steps += 1
            return
        lr = optimizer.param_groups[0]['lr']
        if lr != graph_lr:
            graph, graph_lr = torch.cuda.CUDAGraph(), lr
            with torch.cuda.graph(graph):
                step(indices_of_graph)
        indices_of_graph.copy_(indices)
        graph.replay()

    return call


def restore(path, settings, net, optimizer, state, steps):
    """Puts a checkpoint into the network, its optimizer and the state. Raises BadInput where it does not fit."""
    checkpoint = load_checkpoint(path, next(net.parameters()).device)
    try:
        for name, value in vars(settings).items():
            if name not in (*FREE, 'name') and checkpoint['settings'][name] != value:
                raise BadInput(f'{path}: was trained with {name} = {checkpoint["settings"][name]!r}, not {value!r}')
        net.load_state_dict(checkpoint['network'])
        groups = optimizer.state_dict()['param_groups']
        optimizer.load_state_dict({'state': checkpoint['momentum'], 'param_groups': groups})
        saved = checkpoint['state']
        if saved['columns'] != COLUMNS:
            raise BadInput(f'{path}: was logged with other columns than BOUNDS gives now; launch it anew')
        trained = saved['epoch'] > 1 or saved['step'] > 0
        sound = (
            all(weight.isfinite().all() for weight in net.parameters()),
            all(entry['momentum_buffer'].shape == weight.shape for weight, entry in optimizer.state.items()),
            len(optimizer.state) == (len(list(net.parameters())) if trained else 0),
            type(saved['epoch']) is int and saved['epoch'] >= 0,
            type(saved['step']) is int and 0 <= saved['step'] <= steps,
            type(saved['train_seconds']) is float,
            len(saved['lines']) > 0 or saved['epoch'] == 0,
            all(len([float(number) for number in line.split(',')]) == len(COLUMNS) for line in saved['lines']),
            all(type(error) is float for error in saved['recent_errors']),
        )
        if not all(sound):
            raise ValueError
        state.update({name: saved[name] for name in state})
    except BadInput:
        raise
    except Exception:  # the content may be anything
        raise BadInput(f'{path}: not a checkpoint of {settings.name}; move it away to train this network anew') from None


def ended(settings, state):
    """Whether the last epoch is done, or the run does not learn: too low a training accuracy at the last three evaluations."""
    hopeless = [1 - error < settings.early_stop_accuracy for error in state['recent_errors']]
    late = settings.early_stop_epoch and state['epoch'] > settings.early_stop_epoch
    return state['epoch'] > settings.epochs or bool(late and len(hopeless) == 3 and all(hopeless))


def report(row):
    """A row of metrics.csv in words short enough for a line; bounds as powers of 2, as on the figure's axis."""

    def level(column):
        value, is_bound = row[column], column.endswith('_bound')
        text = f'2^{math.log2(value):.1f}' if is_bound and 0 < value < math.inf else f'{value:.3g}'
        return f'{column.removesuffix("_bound").replace("_", " ")} {text}'

    errors = f'train {row["train_error"]:.4f} test {row["test_error"]:.4f} gap {row["generalization_gap"]:+.4f}'
    return f'{errors} | {" ".join(level(column) for column in BOUNDS)}'


def train(settings, dataset, folder, device):
    """Trains one network to its last epoch, from its checkpoint in `folder` where there is one, logging as it goes.

    Raises:
        BadInput: the checkpoint is missing, damaged or of other settings.
        Interrupted: after a checkpoint was written.
        Diverged: the last good checkpoint is kept.
        OSError: the results cannot be written; the last checkpoint is kept.
    """
    bf16 = choose_precision(settings.precision, device)
    torch.manual_seed(settings.seed)
    net = get_network(settings, dataset.input_shape, dataset.num_classes).to(device, memory_format=torch.channels_last)
    rates = {'lr': settings.lr, 'momentum': settings.momentum, 'weight_decay': settings.weight_decay}
    optimizer = torch.optim.SGD(net.parameters(), **rates, fused=True)
    loss, images = LOSSES[settings.loss], dataset.train_images
    one_hot = torch.eye(dataset.num_classes, device=device)
    train_targets, test_targets = one_hot[dataset.train_labels], one_hot[dataset.test_labels]
    steps = -(-len(images) // settings.batch_size)

    # The epoch that is under way, its steps done, and what is logged so far.
    state = {'epoch': 0, 'step': 0, 'train_seconds': 0.0, 'recent_errors': [], 'columns': COLUMNS, 'lines': []}
    checkpoint_path, metrics_path = folder / 'model.pt', folder / 'metrics.csv'
    if checkpoint_path.exists():
        restore(checkpoint_path, settings, net, optimizer, state, steps)
        place = f'goes on in epoch {state["epoch"]} after {state["step"]} of its {steps} steps'
        print(f'{settings.name}: {"finished already" if ended(settings, state) else place}', flush=True)
    elif metrics_path.exists() and metrics_path.read_bytes().count(b'\n') > 1:
        raise BadInput(f'{checkpoint_path}: is missing; put it back, or move {folder} away to train this network anew')
    write_file(metrics_path, (','.join(COLUMNS) + '\n' + ''.join(state['lines'])).encode())
    data = measure_data(net, images)
    loss_sum = torch.zeros((), device=device)  # NaN from the first batch on whose loss is

    train_step = make_step(net, optimizer, loss, images, train_targets, loss_sum, bf16)
    step = graphed(train_step, optimizer, settings.batch_size, device) if device.type == 'cuda' else train_step

    def train_epoch(epoch):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(settings, epoch)
        order = torch.from_numpy(np.random.default_rng((settings.seed, epoch)).permutation(len(images))).to(device)
        start = time.perf_counter()
        try:
            for indices in order.split(settings.batch_size)[state['step'] :]:
                check_stop()
                step(indices)
                state['step'] += 1
                bar.update(1 / steps)
            require_finite(loss_sum)  # waits for the device
        finally:
            state['train_seconds'] += time.perf_counter() - start

    def evaluate_epoch(epoch):
        start = time.perf_counter()
        train_loss, margins = evaluate(net, images, dataset.train_labels, train_targets, loss)
        test_loss, test_margins = evaluate(net, dataset.test_images, dataset.test_labels, test_targets, loss)
        train_error, test_error = margin_error(margins, 0), margin_error(test_margins, 0)
        require_finite(*net.parameters(), margins)
        row = {'epoch': epoch, 'lr': learning_rate(settings, max(epoch, 1))}
        row |= {'train_loss': train_loss, 'test_loss': test_loss, 'train_error': train_error, 'test_error': test_error}
        row |= {'generalization_gap': test_error - train_error}
        row |= {'train_margin_error': margin_error(margins, settings.gamma)}
        row |= evaluate_bounds(net, data, margins, settings.delta, settings.gamma)
        row |= {'train_seconds': state['train_seconds'], 'eval_seconds': time.perf_counter() - start}
        state['train_seconds'] = 0.0
        state['recent_errors'] = [*state['recent_errors'], train_error][-3:] if epoch else []
        return row

    def save():
        require_finite(loss_sum, *net.parameters())
        momentum = optimizer.state_dict()['state']
        saved = {'settings': vars(settings), 'network': net.state_dict(), 'momentum': momentum, 'state': state}
        save_checkpoint(checkpoint_path, saved)

    shape = '{desc} {percentage:3.0f}%|{bar:20}| epoch {n:.2f}/{total} [{elapsed}<{remaining}]{postfix}'
    begun = max(0.0, state['epoch'] - 1 + state['step'] / steps)
    terminal = sys.stdout.isatty()
    bar = tqdm(
        desc=settings.name, total=settings.epochs, initial=begun, bar_format=shape, dynamic_ncols=True, disable=not terminal
    )
    with bar, deferred_stop():
        try:
            while not ended(settings, state):
                epoch = state['epoch']
                if epoch > 0:
                    train_epoch(epoch)
                row = None
                if epoch % settings.eval_every == 0 or epoch == settings.epochs:
                    row = evaluate_epoch(epoch)
                    state['lines'].append(metrics_line(row))
                state['epoch'], state['step'] = epoch + 1, 0
                if epoch % settings.checkpoint_every == 0 or ended(settings, state):
                    save()
                if row:
                    with open(metrics_path, 'a') as file:
                        file.write(state['lines'][-1])
                    if terminal:
                        bar.set_postfix_str(report(row))
                    else:
                        print(f'{settings.name} epoch {epoch}/{settings.epochs} lr {row["lr"]:g} {report(row)}', flush=True)
        except Interrupted:
            save()
            raise


def require_finite(*tensors):
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise Diverged


def launch_header(device):
    """What a launch's settings file says of where it came from, as lines."""

    def git(*arguments):
        command = subprocess.run(['git', '-C', ROOT, *arguments], capture_output=True, text=True)
        return command.stdout.strip() if command.returncode == 0 else None

    try:
        commit = git('rev-parse', 'HEAD') or 'unknown'
        commit += ' with uncommitted changes' if git('status', '--porcelain', '--untracked-files=no') else ''
    except OSError:
        commit = 'unknown, git is not installed'
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} threads'
    return [
        'The settings of this launch; python train.py --settings with this file repeats it.',
        f'date: {datetime.datetime.now().astimezone().isoformat(timespec="seconds")}',
        f'versions: Python {platform.python_version()}, torch {torch.__version__}',
        f'device: {device}, {name}',
        f'commit: {commit}',
    ]


@functools.lru_cache(maxsize=1)
def get_dataset(name, data_dir, normalize, device):
    if (there := os.environ.get('DATA_DIR')) and not os.path.isdir(there):
        raise BadInput(f'DATA_DIR = {there}: no such folder; make it, or unset the environment variable')
    return load_dataset(name, there or ROOT / data_dir, normalize, device)


def get_inputs(settings):
    """A run's device and its dataset, which is held on the device once for all runs in a row that share it."""
    device = choose_device(settings.device)
    return device, get_dataset(settings.dataset_name, settings.data_dir, settings.normalize, device)


def check(settings):
    """Raises BadInput for all that can be seen to be wrong before training: device, data, depth, and what no bound covers."""
    if settings.bias:
        raise BadInput('bias = True: the theorems are about bias-free networks; set it to False')
    device, dataset = get_inputs(settings)
    choose_precision(settings.precision, device)
    with torch.device('meta'):
        net = get_network(settings, dataset.input_shape, dataset.num_classes)
    trace_layers(net, dataset.input_shape)


@contextlib.contextmanager
def locked_run(folder):
    """Keeps other processes from training the network of this folder. Raises BadInput where one does."""
    with locked(folder / '.lock', wait=False) as free:
        if not free:
            raise BadInput(f'{folder}: another process is training this network; let it end first')
        yield


def train_all(runs, folder):
    """Trains one network after the other, then draws the figure. Returns 1 if one of them diverged, else 0."""
    keep_freed_memory()
    status = 0
    for settings in runs:
        device, dataset = get_inputs(settings)
        print(
            f'{folder / settings.name}: {dataset.name}, {len(dataset.train_images)} training and {len(dataset.test_images)} '
            f'test images, on {device}',
            flush=True,
        )
        (folder / settings.name).mkdir(exist_ok=True)
        with locked_run(folder / settings.name):
            try:
                train(settings, dataset, folder / settings.name, device)
            except Diverged:
                mend = f'its last good checkpoint is kept; launch it anew with an lr smaller than {settings.lr:g}'
                print(f'train.py: error: {settings.name}: the loss became NaN or infinite; {mend}', file=sys.stderr)
                status = 1
        check_stop()
    draw(folder)
    return status


def draw(folder):
    """Draws figure.png, or says why not: what was trained does not depend on it."""
    try:
        path = plot_figure(folder, [run.name for run in load_settings(folder / 'global_settings.py')[1]])
        print(f'drew {path}' if path else f'{folder}: nothing is logged yet, so no figure was drawn')
    except ImportError:
        print('no figure was drawn, since matplotlib is not installed: pip install matplotlib')
    except (OSError, BadInput):
        raise
    except Exception as error:  # whatever matplotlib makes of its own settings
        print(f'no figure was drawn: {type(error).__name__}: {error}')


def check_options(options, flags):
    """Raises BadInput where the options do not fit together or the folder does not fit them."""
    folder, option = options.folder, '--plot' if options.plot else '--resume'
    if options.prepare and options.run is not None:
        raise BadInput('--prepare makes the folder of a whole sweep; leave --run out')
    if not (options.resume or options.plot):
        if folder and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            known = (folder / 'global_settings.py').exists()
            raise BadInput(
                f'{folder}: exists already; {"add --resume to go on with it, or " if known else ""}name a new folder'
            )
        return
    if folder is None:
        raise BadInput(f'{option} needs the folder: --results-path DIR')
    if options.settings is not None:
        raise BadInput(f"{option} takes the folder's own settings; leave --settings out")
    if not (folder / 'global_settings.py').is_file():
        mend = f'name {folder.parent}' if (folder.parent / 'global_settings.py').is_file() else f'launch without {option}'
        raise BadInput(f'{folder}: not a results folder, it has no global_settings.py; {mend}')
    if options.plot and options.run is not None:
        raise BadInput('--plot draws every network of the folder; leave --run out')
    if flags and (options.plot or options.run is not None):
        where = '--plot' if options.plot else '--run; give it to a --resume of the whole sweep'
        raise BadInput(f'{next(iter(flags))}: a setting cannot change with {where}')
    if changed := [name for name in flags if name not in FREE]:
        raise BadInput(f'--resume keeps the setting {changed[0]}; only {", ".join(FREE)} may change')


def check_resume(folder, flags, runs):
    """Raises BadInput where the flags of a resume would change which runs there are, or what they have done."""
    before = load_settings(folder / 'global_settings.py')[1]
    if [run.name for run in runs] != [run.name for run in before]:
        raise BadInput(f'--resume keeps the runs of the sweep; give one value of {", ".join(flags)}')
    if any(run.epochs < own.epochs for run, own in zip(runs, before)):
        raise BadInput(f'epochs = {runs[0].epochs}: a resumed run can only be made longer than {before[0].epochs}')
    for run in runs:
        if (folder / run.name).is_dir():
            with locked_run(folder / run.name):
                pass


def run(options, flags):
    """Does what the command line says. Returns the exit status."""
    check_options(options, flags)
    if options.plot:
        draw(options.folder)
        return 0
    own = options.folder / 'global_settings.py' if options.resume else GLOBAL_SETTINGS
    sweep, runs = load_settings(own if options.settings is None else options.settings, flags)
    if options.run is not None and not 1 <= options.run <= len(runs):
        raise BadInput(f'--run {options.run}: the sweep has the networks 1 to {len(runs)}')
    chosen = runs if options.run is None else [runs[options.run - 1]]
    for settings in chosen:
        check(settings)
    try:
        if options.resume and flags:
            check_resume(options.folder, flags, runs)
        elif options.folder is None:
            options.folder = Path(os.path.relpath(new_results_folder(ROOT / sweep['results_dir'])))
        elif not options.resume:
            options.folder.mkdir(parents=True, exist_ok=True)
        if flags or not options.resume:
            text = settings_text(sweep, launch_header(choose_device(runs[0].device)))
            write_file(options.folder / 'global_settings.py', text.encode())
    except OSError as error:
        raise BadInput(f'the results folder cannot be written: {error}; name another one') from None
    if options.prepare:
        print(len(runs), options.folder)
        return 0
    return train_all(chosen, options.folder)


def main(argv=None):
    """Runs the command line. Returns 0, 1 where a run failed, 2 for bad input, 128 + signal where it was stopped."""
    stop.deferred, stop.signal = False, None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    options, go_on = None, ''
    try:
        options, flags = parse_command_line(argv)
        options.folder = None if options.results_path is None else Path(options.results_path)
        return run(options, flags)
    except BadInput as error:
        status, message = 2, f'error: {error}'
    except Interrupted:
        status, message = 128 + stop.signal, f'stopped by {signal.Signals(stop.signal).name}'
    except OSError as error:
        status, message = 1, f'error: {error}'
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        status, message = 1, f'error: not enough memory ({error}); choose a smaller network or batch_size'
    if status != 2 and options and not options.plot and options.folder and (options.folder / 'global_settings.py').exists():
        only = '' if options.run is None else f' --run {options.run}'
        go_on = f'; go on with: python train.py --results-path {shlex.quote(str(options.folder))} --resume{only}'
    print(f'train.py: {" ".join(message.splitlines())}{go_on}', file=sys.stderr)
    return status


if __name__ == '__main__':
    sys.exit(main())
