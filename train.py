"""Trains networks with SGD and logs errors, the generalization gap and each bound as it goes.

python train.py                                       the paper's run: CONV-3-200 on MNIST
python train.py --settings conf/digits.py             the quick start: offline, about a minute
python train.py --depth 3 4 --width 200 600           a sweep of four networks
python train.py --results-path results/7 --resume     continue after an interruption
python train.py --results-path results/7 --plot       draw the figures
python train.py --results-path results/7 --status     show which networks are finished

A run is a list of rows and one checkpoint, which is written after each epoch and before each
evaluation. SIGINT and SIGTERM set a flag, which is read before each training step.
"""

import datetime
import functools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import records
import sparsify
from conf import GLOBAL_SETTINGS, ROOT, BadInput, load_settings, parse_command_line, run_program
from datasets import VARIANTS, crops, fingerprint
from device import (
    check_memory,
    choose_device,
    choose_precision,
    describe_machine,
    graphed,
    has_bfloat16_units,
    keep_freed_memory,
)
from evaluation import (
    COLUMNS,
    LAYER_COLUMNS,
    LOSSES,
    Diverged,
    at_target,
    certifies,
    check_bounds,
    due,
    evaluate,
    evaluate_layers,
    initial_network,
    is_finished,
    last_epoch,
    learning_rate,
    no_certificate,
    report,
    require_finite,
    schedule,
    stopped_early,
    training_loss,
)
from measures.norms import measure_data
from measures.trace import not_covered
from models import get_network

TORCH_THREADS = torch.get_num_threads()
PARENT = 'SPARSE_NETWORKS_PARENT'  # in the environment of a process of --jobs: who started it

stop = None  # the signal that asked this program to stop
defer_signals = False  # True while weights change or files are written: then a signal waits
resume_hint = ''  # how to continue a run that was stopped


def request_stop(number, frame):
    """Handles a signal: stops after the training step under way, or at once in an evaluation.

    Nothing is lost then, since `train` writes the checkpoint before each evaluation.
    """
    global stop
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C kills
    stop = stop or number
    if not defer_signals:
        if PARENT not in os.environ:  # else the parent says it
            os.write(2, stopped_message().encode())  # not print, which is not safe in a handler
        os._exit(128 + number)


def stopped_message():
    return f'train.py: stopped by {signal.Signals(stop).name}{resume_hint}\n'


def stop_requested():
    """Whether a signal came, or the process died that launched this one."""
    return stop is not None or os.environ.get(PARENT, str(os.getppid())) != str(os.getppid())


def say(text):
    tqdm.write(text)
    sys.stdout.flush()


# ------------------------------------------------------------------------------------------------
# The experiment
# ------------------------------------------------------------------------------------------------


def make_optimizer(net, settings):
    """SGD with the settings' momentum and weight decay; its learning rate is set at each epoch."""
    lr = torch.tensor(settings.lr, device=next(net.parameters()).device)  # read by a CUDA graph
    options = {'momentum': settings.momentum, 'weight_decay': settings.weight_decay}
    return torch.optim.SGD(net.parameters(), lr, **options, fused=True)


def make_step(net, optimizer, settings, dataset):
    """(step, batch_loss): two functions of the indices (B,) of a batch's samples.

    `step` takes a training step, on CUDA as a captured graph; `batch_loss` returns the loss, to be
    differentiated. With augment = 'crop' index i + m v stands for variant v of image i of m.
    """
    device, m = dataset.train_images.device, len(dataset.train_labels)
    targets = F.one_hot(dataset.train_labels, dataset.num_classes).float()
    loss = LOSSES[settings.loss]

    def batch_loss(batch):
        samples = batch % m
        images = dataset.train_images.index_select(0, samples)
        if settings.augment == 'crop':
            images = crops(images, batch // m)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == 'bf16'):
            outputs = net(images)
        return loss(outputs.float(), targets.index_select(0, samples))

    def step(batch):
        optimizer.zero_grad()
        batch_loss(batch).backward()
        optimizer.step()

    if device.type == 'cuda':
        step = graphed(step, settings.batch_size, device)
    return step, batch_loss


def train_epoch(net, optimizer, step, batch_loss, settings, dataset, epoch, state, bar):
    """Trains for one epoch, or for the rest of it, until a signal, or until target_loss is reached.

    All that is random depends on (seed, epoch) or (seed, step) alone, so that a resumed run equals
    an uninterrupted one to the digit.

    Args:
        step: function that takes a training step on the samples with these indices (B,).
        batch_loss: function that returns the loss on them with its graph.
        epoch: number of the epoch, from 1.
        state: its 'step' counts the epoch's steps, its 'train_loss' is the last one measured.
        bar: tqdm bar of steps.
    """
    m, device = len(dataset.train_labels), dataset.train_labels.device
    generator = torch.default_generator  # torch.manual_seed takes as long as a small step
    if device.type == 'cuda':
        generator = torch.cuda.default_generators[device.index]
    rng = np.random.default_rng((settings.seed, epoch))
    order = rng.permutation(m)
    if settings.augment == 'crop':
        order += m * rng.integers(VARIANTS, size=m)  # i + m v: variant v of image i
    batches = torch.from_numpy(order).to(device).split(settings.batch_size)
    steps = len(batches)
    total = settings.epochs * steps
    optimizer.param_groups[0]['lr'].fill_(learning_rate(settings, epoch))
    net.train()
    start, first = time.perf_counter(), state['step']
    while state['step'] < steps and not at_target(settings, state['train_loss']):
        if stop_requested():
            break
        batch, number = batches[state['step']], (epoch - 1) * steps + state['step']
        generator.manual_seed(hash((settings.seed, number)))  # of dropout, and the like
        regrow = sparsify.regrow_due(settings, number, total)
        if not regrow or settings.regrow == 'random':  # RigL's update replaces the gradient step
            step(batch)
        if regrow:
            loss = functools.partial(batch_loss, batch)
            sparsify.regrow(net, optimizer, settings, number, total, loss)
        state['step'] += 1
        bar.update()
        if epoch == 1 and state['step'] == first + 20:
            say_pace(settings, (time.perf_counter() - start) / 20 * steps, device)
        # The training loss is measured after each epoch; near the target, eight times an epoch.
        near = state['train_loss'] < 4 * settings.target_loss
        eighth = state['step'] % math.ceil(steps / 8) == 0
        if settings.target_loss and (state['step'] == steps or (near and eighth)):
            state['train_loss'] = training_loss(net, settings, dataset)
    state['train_seconds'] += time.perf_counter() - start


def say_pace(settings, epoch_seconds, device):
    """Says how long a run of more than a minute will take, from its first steps."""
    epochs = settings.epochs * (1 + settings.prune_rounds)
    if epochs * epoch_seconds < 60:
        return
    total = datetime.timedelta(seconds=round(epochs * epoch_seconds))
    text = (
        f'{settings.name}: an epoch trains for {epoch_seconds:.1f} s, {epochs} epochs for {total}'
    )
    if device.type == 'cpu' and total.days > 0:
        text += '; a GPU is faster, and so is --settings conf/mnist_quick.py'
    if device.type == 'cpu' and settings.precision != 'bf16' and has_bfloat16_units():
        text += '; --precision bf16 is faster on this CPU'
    say(text)


def train(settings, dataset, folder):
    """Trains one network, from its checkpoint in `folder` if there is one; writes its tables there.

    Args:
        settings: namespace of every knob, as `load_settings` returns it.
        dataset: as `load_data` returns it, on the device to train on.
        folder: an existing folder.
    Returns:
        False if a signal interrupted it, else True.
    Raises:
        Diverged: the loss or a weight became NaN or infinite; the last good checkpoint is kept.
        BadInput: the checkpoint does not fit.
    """
    global defer_signals
    folder, device = Path(folder), dataset.train_images.device
    path = folder / 'model.pt'
    origin = {'settings': vars(settings), 'data': fingerprint(dataset)}
    checkpoint = records.load_run(path, settings, origin['data'], device) if path.exists() else None
    threads = checkpoint['machine']['threads'] if checkpoint else TORCH_THREADS
    torch.set_num_threads(settings.threads or threads)
    choose_precision(settings.precision, device)

    net = initial_network(settings, dataset)
    optimizer = make_optimizer(net, settings)
    # `done` is the last position that is finished, `step` counts the steps done in the next one.
    state = {'done': (0, -1), 'step': 0, 'train_loss': math.inf, 'train_seconds': 0.0}
    state |= {'rows': [], 'layers': [], 'rewind_to': None}
    if checkpoint:
        net.load_state_dict(checkpoint['network'])
        optimizer.load_state_dict(optimizer.state_dict() | {'state': checkpoint['momentum']})
        state |= checkpoint['state']
        say_resumed(settings, state, checkpoint['machine'], describe_machine(device))
    origin['machine'] = describe_machine(device)

    step, batch_loss = make_step(net, optimizer, settings, dataset)

    def save(position):
        require_finite(*net.state_dict().values())
        saved = {'network': net.state_dict(), 'momentum': optimizer.state_dict()['state']}
        records.save_checkpoint(path, origin | saved | {'state': state, 'position': position})

    def write_tables():
        records.write_table(folder / 'metrics.csv', COLUMNS, state['rows'])
        if settings.layers_every:
            records.write_table(folder / 'layers.csv', LAYER_COLUMNS, state['layers'])

    if checkpoint:
        write_tables()
        if is_finished(settings, state['rows']):
            return True
    data = measure_data(net, dataset.train_images, skip_uncovered=True)
    positions = [position for position in schedule(settings) if position > state['done']]
    steps = math.ceil(len(dataset.train_labels) / settings.batch_size)
    total = steps * sum(epoch > 0 for _, epoch in positions)
    hidden = not sys.stdout.isatty() or PARENT in os.environ
    progress = {'total': total, 'initial': state['step'], 'desc': settings.name}
    bar = tqdm(**progress, dynamic_ncols=True, disable=hidden)
    for round_, epoch in positions:
        if round_over(settings, state, round_):
            continue
        defer_signals = True
        if epoch > 0:
            train_epoch(net, optimizer, step, batch_loss, settings, dataset, epoch, state, bar)
        elif round_ > 0:
            sparsify.prune(net, settings, round_, dataset.input_shape)
        last = last_epoch(settings, epoch, state['train_loss'])
        row_due = due(epoch, settings.eval_every, last)
        layers_due = due(epoch, settings.layers_every, last)
        stopping = stop_requested()
        if epoch > 0 and (row_due or layers_due or stopping):
            save(None)

        # In an evaluation nothing can be lost any more, and a signal ends the program at once.
        defer_signals = not (row_due or layers_due)
        if stopping or (stop_requested() and not defer_signals):
            return False
        row, layers = None, []
        if row_due:
            if certifies(settings, round_, epoch, last):
                say(f'{settings.name} epoch {epoch}/{settings.epochs}: certifying')
            row = evaluate(net, settings, dataset, data, round_, epoch)
        if layers_due:
            layers = evaluate_layers(net, dataset, round_, epoch, probes=epoch == last)

        # Whatever a kill leaves undone here is done again: a resume writes the tables first.
        defer_signals = True
        if row:
            state['rows'].append(row | {'train_seconds': state['train_seconds']})
            state |= {'train_loss': row['train_loss'], 'train_seconds': 0.0}
            say(f'{settings.name} epoch {epoch}/{settings.epochs} {report(row)}')
        state['layers'] += layers
        position = (round_, epoch)
        if due(epoch, settings.snapshot_every, last):
            (folder / 'snapshots').mkdir(exist_ok=True)
            snapshot = {'network': net.state_dict(), 'position': position}
            records.save_checkpoint(
                folder / 'snapshots' / f'{round_}-{epoch}.pt', origin | snapshot
            )
        state |= {'done': position, 'step': 0}
        if settings.prune_rounds and position == (0, settings.rewind_epoch):
            state['rewind_to'] = {name: value.clone() for name, value in net.state_dict().items()}
        if round_ > 0 and epoch == 0:
            sparsify.rewind(net, optimizer, state['rewind_to'])
            state['train_loss'] = math.inf
            position = None  # the weights are no longer those of the row
        save(position)
        if row or layers:
            write_tables()
        defer_signals = False
        if stop_requested():
            return False
    bar.close()
    if reason := stopped_early(settings, state['rows']):
        say(f'{settings.name}: {reason}')
    return True


def round_over(settings, state, round_):
    """Whether a round needs no more training: it met target_loss, or the run stopped early."""
    done_round, done_epoch = state['done']
    trained = done_round == round_ and done_epoch > 0 and state['step'] == 0
    met = trained and at_target(settings, state['train_loss'])
    return met or stopped_early(settings, state['rows']) is not None


def say_resumed(settings, state, before, now):
    """Says where a run continues, and what has changed of the machine that affects its digits."""
    if is_finished(settings, state['rows']):
        say(f'{settings.name}: finished already')
        return
    round_, epoch = state['done']
    where = f'epoch {epoch} of round {round_}' if settings.prune_rounds else f'epoch {epoch}'
    say(f'{settings.name}: continues after {where} and {state["step"]} steps')
    for name in before:
        if before[name] != now[name]:
            effect = 'last digits will differ from those of an uninterrupted run'
            say(f'{settings.name}: {name} was {before[name]}, now {now[name]}: {effect}')


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def check_run(settings, folder):
    """Checks one network before the first training; returns what will not be logged, as lines.

    Raises:
        BadInput: settings that do not fit together, the data or this machine; or the checkpoint in
            `folder`, if not None, does not fit.
    """
    device = choose_device(settings.device)
    dataset = records.load_data(settings)
    choose_precision(settings.precision, device)
    sparsify.check(settings)
    m, batch = len(dataset.train_labels), settings.batch_size
    if settings.normalization == 'batch' and 1 in (m % batch, batch):
        reason = f'leaves a batch of 1 of {m} samples, which batch normalization cannot take'
        raise BadInput(f'batch_size = {batch}: {reason}')
    with torch.device('meta'):
        net = get_network(settings, dataset.input_shape, dataset.num_classes)
        image = torch.empty(1, *dataset.input_shape)
        check_memory(settings, net, image, min(m, batch), device)
    if folder:
        path = folder / settings.name
        if (path / 'model.pt').exists():
            with records.lock(path):
                records.load_run(path / 'model.pt', settings, fingerprint(dataset), 'cpu')
        elif any(path.glob('*.csv')):
            advice = f'to train it again: --settings {folder}/global_settings.py'
            raise BadInput(f'{path}: has results and no model.pt to resume; {advice}')
    if settings.channel_sparsity or settings.prune_rounds:
        initial_network(settings, dataset)  # refuses networks that these do not cover
    if reason := not_covered(net, dataset.input_shape):
        return [f'bounds that do not cover {settings.network} stay empty: {reason}']
    reason = no_certificate(settings)
    return [f'certificates stay empty: {reason}'] if settings.certify_every and reason else []


def train_here(runs, folder):
    """Trains networks one after the other. Returns the exit status."""
    global defer_signals
    keep_freed_memory()
    status = 0
    for settings in runs:
        dataset, path = records.load_data(settings), folder / settings.name
        sizes = f'{len(dataset.train_labels)} training and {len(dataset.test_labels)} test images'
        say(f'{path}: {dataset.name}, {sizes}, on {dataset.train_images.device}')
        path.mkdir(exist_ok=True)
        with records.lock(path):
            try:
                if not train(settings, dataset, path):
                    return 128 + (stop or signal.SIGTERM)
            except Diverged:
                advice = f'the last good checkpoint is kept; try an lr below {settings.lr:g}'
                message = f'{settings.name}: the loss became NaN or infinite; {advice}'
                print(f'train.py: error: {message}', file=sys.stderr)
                status, defer_signals = 1, False
    return status


def train_side_by_side(numbers, runs, folder, jobs):
    """Trains the networks with these numbers, `jobs` at a time, in processes of their own, each on
    a GPU of its own unless `device` names one. Returns the exit status.
    """
    global defer_signals
    defer_signals = True  # a signal sets the flag, and is passed on below
    gpus = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
    if gpus == ['']:
        gpus = [str(index) for index in range(torch.cuda.device_count())] or ['']
    waiting, running, status = list(numbers), {}, 0  # running: {slot: (number, process)}
    told = False
    while waiting or running:
        if stop and not told:
            told = True
            waiting.clear()
            for _, process in running.values():
                process.terminate()  # each writes its checkpoint and ends
        for slot in range(jobs):
            if waiting and slot not in running:
                number = waiting.pop(0)
                environment = os.environ | {PARENT: str(os.getpid())}
                if ':' not in runs[number - 1].device:
                    environment['CUDA_VISIBLE_DEVICES'] = gpus[slot % len(gpus)]
                command = [sys.executable, str(ROOT / 'train.py'), '--resume', f'--run={number}']
                command.append(f'--results-path={folder}')
                running[slot] = number, subprocess.Popen(command, env=environment)
        for slot, (number, process) in list(running.items()):
            if process.poll() is None:
                continue
            del running[slot]
            if process.returncode == 0 or stop:
                continue
            status = 1
            if process.returncode < 0 or process.returncode > 128:
                # Killed by the kernel as memory ran out, or stopped by somebody else.
                name = signal.Signals(abs(process.returncode) % 128).name
                message = f'{runs[number - 1].name}: its process was killed by {name}{resume_hint}'
                print(f'train.py: error: {message}', file=sys.stderr)
        time.sleep(0.05)
    defer_signals = False
    return 128 + stop if stop else status


def draw_figures(folder):
    """Draws the figures in a process of its own, so that nothing trained depends on them."""
    command = [sys.executable, str(ROOT / 'train.py'), f'--results-path={folder}', '--plot']
    subprocess.run(command)


def plot(folder):
    try:
        import figures

        paths = figures.draw(folder)
    except ModuleNotFoundError as error:  # matplotlib, without which training works
        raise BadInput(f'no figure: {error}; pip install {error.name}') from None
    if not paths:
        print(f'{folder}: nothing is logged yet, so there is no figure')
    for path in paths:
        print(f'drew {path}')


def check_options(options, flags):
    """Raises BadInput if the options do not fit together, or the folder does not fit them."""
    existing = [name for name in ('resume', 'plot', 'status') if getattr(options, name)]
    if existing and not options.results_path:
        raise BadInput(f'--{existing[0]} needs the folder: --results-path DIR')
    if existing and options.settings:
        raise BadInput(f"--{existing[0]} reads the folder's own settings; leave --settings out")
    if flags and (options.plot or options.status):
        raise BadInput(f'--{existing[0]} takes no setting; leave --{next(iter(flags))} out')
    if flags and options.resume and options.run is not None:
        raise BadInput('a setting cannot change with --run; give it to the whole sweep')
    if options.prepare and options.run is not None:
        raise BadInput('--prepare makes the folder of a whole sweep; leave --run out')
    folder = options.results_path and Path(options.results_path)
    if folder and not existing and folder.exists():
        if not folder.is_dir() or any(folder.iterdir()):
            raise BadInput(f'{folder}: exists; add --resume to continue it, or name a new folder')


def main(argv=None):
    """Runs the command line. Returns 0, 1 if a network diverged, 128 + signal if it was stopped."""
    global stop, defer_signals, resume_hint
    stop, defer_signals, resume_hint = None, False, ''
    options, flags = parse_command_line(argv)
    check_options(options, flags)
    if options.plot:
        plot(options.results_path)
        return 0
    if options.status:
        records.show_status(options.results_path)
        return 0
    if options.resume:
        sweep, runs = records.resumed_settings(options.results_path, flags)
    else:
        sweep, runs = load_settings(options.settings or GLOBAL_SETTINGS, flags)
    if options.run is not None and not 1 <= options.run <= len(runs):
        raise BadInput(f'--run {options.run}: the sweep has the networks 1 to {len(runs)}')
    numbers = [options.run] if options.run else range(1, len(runs) + 1)
    chosen = [runs[number - 1] for number in numbers]

    check_bounds()
    resumed = Path(options.results_path) if options.resume else None
    notes = dict.fromkeys(note for settings in chosen for note in check_run(settings, resumed))
    if not (options.resume or options.prepare):  # a task of Slurm has its own number of threads
        share = max(1, TORCH_THREADS // min(sweep['jobs'], len(chosen)))
        sweep['threads'] = sweep['threads'] or share
        for settings in runs:
            settings.threads = sweep['threads']
    folder = records.make_folder(options, flags, sweep, notes, choose_device(sweep['device']))
    if options.prepare:
        print(len(runs), folder)
        return 0
    if PARENT not in os.environ:
        command = f'python {shlex.quote(sys.argv[0])} --results-path {shlex.quote(str(folder))}'
        only = f' --run {options.run}' if options.run else ''
        resume_hint = f'; continue with: {command} --resume{only}'
        for note in notes:
            say(note)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
            signal.signal(number, request_stop)
    if sweep['jobs'] > 1 and len(chosen) > 1:
        status = train_side_by_side(numbers, runs, folder, min(sweep['jobs'], len(chosen)))
    else:
        status = train_here(chosen, folder)
    if status >= 128 and PARENT not in os.environ:
        sys.stderr.write(stopped_message())
    elif PARENT not in os.environ:
        # Of an array job on Slurm, the task that ends last draws.
        rows = ((settings, records.rows_so_far(folder / settings.name)) for settings in runs)
        if options.run is None or all(is_finished(*pair) for pair in rows):
            draw_figures(folder)
    return status


if __name__ == '__main__':
    sys.exit(run_program(main))
