"""What a training computes and logs: SGD, its rows, sparse networks, and that a kill at any moment changes none of it."""

import fcntl
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    main,
    numbers,
    resume,
    rows,
    run,
    same,
    settings_of,
    succeeds,
    train_small,
)
from torch import nn

import device as machine
import evaluation
import launch
import models
import train
from datasets import VARIANTS, crops, load_dataset
from evaluation import COLUMNS, PROBES
from measures.norms import classification_margins, margin_error, measure_data
from models import get_network
from records import (
    csv_line,
    load_checkpoint,
    parse_line,
    read_layers,
    read_metrics,
    save_checkpoint,
)
from utils import BOUNDS, evaluate_bounds


def test_quick_start(tmp_path):
    status, stdout, stderr = run(
        '--settings', 'conf/digits.py', '--results-dir', tmp_path / 'results', cwd=ROOT
    )
    assert (status, stderr) == (0, '')
    folder = tmp_path / 'results' / '1'
    left = {
        str(path.relative_to(folder)) for path in folder.rglob('*') if not path.name.startswith('.')
    }
    files = {'CONV-3-32/metrics.csv', 'CONV-3-32/model.pt', 'global_settings.py'}
    files |= {f'{name}.{suffix}' for name in ('figure', 'bounds') for suffix in ('png', 'pdf')}
    assert left == files | {'CONV-3-32'}
    table = read_metrics(folder / 'CONV-3-32' / 'metrics.csv')
    assert list(table) == COLUMNS
    assert table['epoch'].tolist() == list(range(151))
    assert table['test_error'][-1] < 0.10 < 0.8 < table['test_error'][0]
    assert (table['generalization_gap'] == table['test_error'] - table['train_error']).all()
    assert (table['density'] == 1).all() and (table['round'] == 0).all()
    assert all(np.isfinite(table[column]).all() for column in BOUNDS)
    lines = re.findall(r'^CONV-3-32 epoch \d+/150 .*ours 2\^\d.*$', stdout, re.M)
    assert len(lines) == 151 and max(map(len, lines)) <= 120
    assert re.match(r'CONV-3-32 epoch 150/150 test 0\.0\d+ train ', lines[-1])
    assert (folder / 'figure.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    assert (folder / 'figure.pdf').read_bytes()[:5] == b'%PDF-'
    header = (folder / 'global_settings.py').read_text()
    for word in (
        '# date: 20',
        'Python 3.',
        f'torch {torch.__version__}',
        'device: cpu',
        '# commit: ',
        '\nthreads = 1 ',
    ):
        assert word in header
    loaded = load_checkpoint(folder / 'CONV-3-32' / 'model.pt', 'cpu')
    assert loaded['state']['epoch'] == 151


def test_dropout_is_that_of_the_step(tmp_path, monkeypatch):
    """A run resumed in the middle of an epoch draws what the uninterrupted one does."""

    def dropout(settings, input_shape, classes):
        layers = (
            nn.Linear(64, 8, bias=False),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(8, classes, bias=False),
        )
        return nn.Sequential(nn.Flatten(), *layers)

    def interrupted(self, *arguments):
        if self.state['epoch'] == 3 and self.state['step'] == 20:
            machine.stop.signal = signal.SIGTERM

    monkeypatch.setitem(models.NETWORKS, 'DROP', dropout)
    train_small(tmp_path / 'whole', '--network', 'DROP', '--epochs', '4')
    with monkeypatch.context() as context:
        context.setattr(train.Run, 'watch_target', interrupted)
        status, *_ = main(
            *SMALL, '--network', 'DROP', '--epochs', '4', '--results-path', tmp_path / 'run'
        )
    assert status == 128 + signal.SIGTERM
    assert 'epoch 3 after 20 of its 45 steps' in resume(tmp_path / 'run')
    assert same(tmp_path / 'run', tmp_path / 'whole', 'DROP-3-4')


def test_metrics_are_those_of_the_network_that_is_left(uninterrupted, digits):
    """The last row, computed anew from the checkpoint without the training program."""
    settings = settings_of(dataset_name='digits', width=4)
    net = get_network(settings, digits.input_shape, 10)
    net.load_state_dict(load_checkpoint(uninterrupted / 'CONV-3-4' / 'model.pt', 'cpu')['network'])
    with torch.no_grad():
        train_outputs, test_outputs = net(digits.train_images), net(digits.test_images)
    targets = torch.eye(10)[digits.train_labels]
    margins = classification_margins(train_outputs, digits.train_labels)
    expected = {
        'train_loss': ((train_outputs - targets) ** 2).mean().item(),
        'train_error': (train_outputs.argmax(1) != digits.train_labels).float().mean().item(),
        'test_error': (test_outputs.argmax(1) != digits.test_labels).float().mean().item(),
        'train_margin_error': margin_error(margins, 1.0),
        'lr': 0.01,
    }
    expected |= evaluate_bounds(net, measure_data(net, digits.train_images), margins)
    table = read_metrics(uninterrupted / 'CONV-3-4' / 'metrics.csv')
    for column, value in expected.items():
        assert table[column][-1] == pytest.approx(value, rel=1e-5), column


def test_training_is_sgd_on_the_loss_with_weight_normalization(tmp_path, digits):
    """Two epochs of the program against a loop written out with PyTorch's own weight normalization and optimizer."""
    train_small(tmp_path / 'run', '--epochs', '2', '--milestones', '1')
    torch.manual_seed(0)
    layers, channels = [], 1
    for _ in range(3):
        layers += [torch.nn.Conv2d(channels, 4, 2, bias=False), torch.nn.ReLU()]
        channels = 4
    net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(100, 10, bias=False))
    for layer in net[:6:2]:
        torch.nn.utils.parametrizations.weight_norm(layer, dim=None)
    for epoch, lr in ((1, 0.01), (2, 0.001)):
        if epoch == 1:
            optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=3e-3)
        optimizer.param_groups[0]['lr'] = lr
        order = torch.from_numpy(np.random.default_rng((0, epoch)).permutation(1437))
        for batch in order.split(32):
            targets = torch.nn.functional.one_hot(digits.train_labels[batch], 10).float()
            loss = ((net(digits.train_images[batch]) - targets) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        loss = ((net(digits.train_images) - torch.eye(10)[digits.train_labels]) ** 2).mean().item()
    assert read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')['train_loss'][
        -1
    ] == pytest.approx(loss, rel=1e-4)


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    folder = tmp_path / 'run'
    status, _, stderr = main(*SMALL, '--lr', '1e9', '0.01', '--results-path', folder)
    assert (
        status == 1
        and stderr.count('\n') == 1
        and 'the loss became NaN or infinite' in stderr
        and 'lr' in stderr
    )
    kept = load_checkpoint(folder / 'CONV-3-4-lr1000000000.0' / 'model.pt', 'cpu')
    assert all(weight.isfinite().all() for weight in kept['network'].values())
    assert len(kept['state']['lines']) == rows(folder, 'CONV-3-4-lr1000000000.0') == 1
    assert rows(folder, 'CONV-3-4-lr0.01') == 7  # the rest of the sweep is trained all the same


def test_few_samples_are_trained_on_without_a_certificate(tmp_path):
    stdout = train_small(
        tmp_path / 'run', '--train-samples', '5', '--epochs', '1', '--certify-every', '1'
    )
    assert 'certificates stay empty: train_samples = 5, and at least 10 are needed' in stdout


def test_weights_that_explode_in_the_last_step_of_an_epoch_are_kept_nowhere(tmp_path, monkeypatch):
    step_of, taken = train.step_of, []

    def make_exploding(run):
        step = step_of(run)

        def exploding(indices):
            step(indices)
            taken.append(indices)
            if len(taken) == 2 * 45:
                run.optimizer.param_groups[0]['params'][0].data.fill_(float('inf'))

        return exploding

    monkeypatch.setattr(train, 'step_of', make_exploding)
    flags = ('--eval-every', '5', '--layers-every', '1', '--snapshot-every', '1')
    status, _, stderr = main(*SMALL, *flags, '--results-path', tmp_path / 'run')
    assert status == 1 and stderr.count('\n') == 1 and 'the loss became NaN or infinite' in stderr
    for path in (tmp_path / 'run').rglob('*.pt'):
        assert all(
            weight.isfinite().all() for weight in load_checkpoint(path, 'cpu')['network'].values()
        )


def test_periods(tmp_path, uninterrupted):
    folder = tmp_path / 'run'
    train_small(folder, '--epochs', '5', '--eval-every', '2', '--checkpoint-every', '3')
    table, every = (
        read_metrics(path / 'CONV-3-4' / 'metrics.csv') for path in (folder, uninterrupted)
    )
    assert table['epoch'].tolist() == [0, 2, 4, 5]
    assert table['our_bound'].tolist() == every['our_bound'][[0, 2, 4, 5]].tolist()


def test_early_stopping(tmp_path):
    flags = ('--early-stop-epoch', '4', '--early-stop-accuracy', '0.5', '--checkpoint-every', '100')
    train_small(tmp_path / 'run', '--lr', '1e-9', *flags)
    assert read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')['epoch'].tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert load_checkpoint(tmp_path / 'run' / 'CONV-3-4' / 'model.pt', 'cpu')['state']['epoch'] == 5
    assert 'finished already' in resume(tmp_path / 'run')
    assert rows(tmp_path / 'run') == 5


def test_a_training_ends_at_its_target_loss(tmp_path):
    """Within an epoch, which counts as the last one: rows, layers, snapshots and measures are due after it."""
    flags = ('--train-samples', '320', '--lr', '0.1', '--loss', 'CE', '--normalization', 'none')
    train_small(tmp_path / 'whole', *flags)
    whole = read_metrics(tmp_path / 'whole' / 'CONV-3-4' / 'metrics.csv')
    target = (3 * whole['train_loss'][4] + whole['train_loss'][5]) / 4
    assert whole['train_loss'][5] < target < whole['train_loss'][:5].min()
    every = [
        word
        for knob in ('eval', 'layers', 'snapshot', 'measures')
        for word in (f'--{knob}-every', '4')
    ]
    said = train_small(tmp_path / 'run', *flags, *every, '--target-loss', target, '--epochs', '9')
    assert f'CONV-3-4: stopped at epoch 5: training loss at most {target:g}' in said
    table = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')
    assert (
        table['epoch'].tolist() == [0, 4, 5]
        and table['train_loss'][:2].tolist() == whole['train_loss'][[0, 4]].tolist()
    )
    assert (
        whole['train_loss'][5] < table['train_loss'][2] <= target
    )  # the epoch was not trained to its end
    assert np.isfinite(table['sharpness']).tolist() == [False, True, True]
    assert {path.stem for path in (tmp_path / 'run' / 'CONV-3-4' / 'snapshots').iterdir()} == {
        '0-0',
        '0-4',
        '0-5',
    }
    assert read_layers(tmp_path / 'run' / 'CONV-3-4' / 'layers.csv')['epoch'][-1] == 5
    before = (tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv').read_bytes()
    assert 'finished already' in resume(tmp_path / 'run', '--epochs', '20')
    assert (tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv').read_bytes() == before
    assert 'training loss at most' in succeeds('--results-path', tmp_path / 'run', '--status')


@pytest.mark.parametrize(
    'flags', [('--loss', 'CE'), ('--loss', 'L1'), ('--normalize', 'True'), ('--precision', 'bf16')]
)
def test_other_settings_learn_too(tmp_path, flags):
    train_small(tmp_path / 'run', '--epochs', '20', '--width', '8', '--lr', '0.05', *flags)
    table = read_metrics(tmp_path / 'run' / 'CONV-3-8' / 'metrics.csv')
    assert table['train_loss'][-1] < 0.95 * table['train_loss'][0]
    assert (
        'L1' in flags or table['train_error'][-1] < 0.5
    )  # the mean absolute error is content with zeros for a long time


def test_a_network_that_bounds_do_not_cover(tmp_path):
    """It is trained, the reason is said once and kept, its cells are empty, and a resume goes on to the same digits."""
    folder, flags = (
        tmp_path / 'run',
        ('--bias', 'True', '--layers-every', '2', '--train-samples', '320'),
    )
    stdout = train_small(folder, *flags, '--width', '4', '5')
    assert (
        stdout.count('bounds that do not cover CONV stay empty: ')
        == stdout.count(' has a bias')
        == 1
    )
    assert (
        '\n# bounds that do not cover CONV stay empty: '
        in (folder / 'global_settings.py').read_text()
    )
    table = read_metrics(folder / 'CONV-3-4' / 'metrics.csv')
    missing = {column for column, values in table.items() if np.isnan(values).all()}
    assert {'our_bound', 'rho', 'corrected_bound', 'certified_error', 'pac_bayes_error'} <= missing
    assert not missing & {
        'train_error',
        'test_error',
        'test_set_bound',
        'density',
        'path_norm',
        'path_bound',
    }
    assert 'nan' not in (folder / 'CONV-3-4' / 'metrics.csv').read_text() and ' nan' not in stdout

    train_small(tmp_path / 'short', *flags, '--epochs', '3', '--width', '4', '5')
    resume(tmp_path / 'short', '--epochs', '6')
    assert same(folder, tmp_path / 'short') and same(folder, tmp_path / 'short', 'CONV-3-5')


def test_threads_are_written_down_and_kept(tmp_path, monkeypatch):
    folder = tmp_path / 'run'
    train_small(folder, '--threads', '2', '--epochs', '1')
    resume(folder, '--epochs', '2')
    assert torch.get_num_threads() == 2
    assert load_checkpoint(folder / 'CONV-3-4' / 'model.pt', 'cpu')['threads'] == 2
    torch.set_num_threads(1)

    monkeypatch.setattr(train, 'TORCH_THREADS', 2)
    train_small(tmp_path / 'slurm', '--epochs', '1', '--prepare')  # each task has its own number
    assert '\nthreads = 0 ' in (tmp_path / 'slurm' / 'global_settings.py').read_text()
    resume(tmp_path / 'slurm')
    assert (
        load_checkpoint(tmp_path / 'slurm' / 'CONV-3-4' / 'model.pt', 'cpu')['threads']
        == torch.get_num_threads()
        == 2
    )
    monkeypatch.setattr(train, 'TORCH_THREADS', 1)
    resume(tmp_path / 'slurm', '--epochs', '2')
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------------------------
# A kill at any moment, and more epochs than were asked for at first
# ----------------------------------------------------------------------------------------------------------------------

TINY = ('--train-samples', '320', '--epochs', '3')  # 10 steps an epoch
CHANNELS = (
    '--density 0.3 --initial-mask erk --regrow random --regrow-every 3 --channel-sparsity 0.5'
)
KINDS = {
    'dense': (
        *TINY,
        '--layers-every',
        '2',
        '--eval-every',
        '2',
        '--snapshot-every',
        '1',
        '--checkpoint-every',
        '2',
    ),
    'target rounds': (
        *TINY[:2],
        *'--epochs 5 --target-loss 0.1002 --eval-every 9 --prune-rounds 2'.split(),
    ),
    'target': (
        *TINY[:2],
        *'--epochs 7 --target-loss 0.1002 --eval-every 9 --measures-every 4 --snapshot-every 1'.split(),
    ),
    'batch norm': (*TINY, '--network', 'CONVBN', '--normalization', 'batch', '--layers-every', '1'),
    'rounds': (
        *TINY,
        '--prune-rounds',
        '2',
        '--rewind-epoch',
        '1',
        '--layers-every',
        '3',
        '--snapshot-every',
        '1',
    ),
    'fine-tuning': (
        *TINY,
        '--prune-rounds',
        '1',
        '--prune-fraction',
        '0.8',
        '--rewind-epoch',
        '-1',
        '--checkpoint-every',
        '5',
    ),
    'gradient': (
        *TINY,
        *'--density 0.2 --initial-mask erk --regrow gradient --regrow-every 4 --snapshot-every 1'.split(),
    ),
    'a step an epoch': (
        *TINY,
        '--density',
        '0.2',
        '--initial-mask',
        'erk',
        '--regrow',
        'gradient',
        '--batch-size',
        '9999',
    ),
    'channels': (*TINY, *CHANNELS.split()),
    'channels, gradient': (*TINY, *CHANNELS.replace('random', 'gradient').split()),
    'random': (
        *TINY,
        '--density',
        '0.2',
        '--initial-mask',
        'random',
        '--regrow',
        'random',
        '--regrow-every',
        '3',
    ),
    'crop': (*TINY, '--augment', 'crop', '--layers-every', '2'),
}


@pytest.mark.parametrize('kind', KINDS)
def test_a_kill_at_any_moment_changes_nothing(tmp_path, kill_at, kind):
    """Killed twice at a moment of every name there is, each time by a resume of what the kill before has left."""
    whole, folder = tmp_path / 'whole', tmp_path / 'run'
    names = sorted(set(kill_at(None, 0, *SMALL, *KINDS[kind], '--results-path', whole)))
    (network,) = (path.name for path in whole.iterdir() if path.is_dir())
    chance = random.Random(kind)
    for name in chance.sample(names * 2, 2 * len(names)):
        arguments = (
            ('--resume',) if (folder / 'global_settings.py').exists() else (*SMALL, *KINDS[kind])
        )
        kill_at(
            name,
            chance.randint(1, 12 if name == 'step' else 4),
            *arguments,
            '--results-path',
            folder,
        )
    kill_at(None, 0, '--results-path', folder, '--resume')
    assert same(whole, folder, network)
    network += '/model.pt'
    left, expected = (load_checkpoint(path / network, 'cpu')['network'] for path in (folder, whole))
    assert all((left[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize('kind', ['dense', 'rounds', 'gradient', 'target'])
def test_a_signal_at_any_moment_changes_nothing(tmp_path, monkeypatch, kind):
    """SIGTERM at any moment of a training or an evaluation, between any two lines of Python, again and again.

    A checkpoint that names an epoch has the weights of its snapshot.
    """
    train_small(tmp_path / 'whole', *KINDS[kind])
    chance, train_all, lives = random.Random(kind), launch.train_all, []
    patched_in_a_trace = {name: getattr(nn.Module, name) for name in ('__call__', '__getattr__')}

    def interrupted(*arguments):
        signal.setitimer(signal.ITIMER_VIRTUAL, chance.uniform(0.01, 0.04 * len(lives)))
        try:
            return train_all(*arguments)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            for name, function in patched_in_a_trace.items():  # in a process they would end with it
                setattr(nn.Module, name, function)

    monkeypatch.setattr(launch, 'train_all', interrupted)
    signal.signal(signal.SIGVTALRM, lambda number, frame: machine.on_signal(signal.SIGTERM, frame))
    arguments = (*SMALL, *KINDS[kind])
    while len(lives) < 60:
        lives.append(arguments)
        status, _, stderr = main(*arguments, '--results-path', tmp_path / 'run')
        if status == 0:
            break
        assert status == 143 and 'stopped by SIGTERM' in stderr, stderr
        arguments = ('--resume',)
        if (path := tmp_path / 'run' / 'CONV-3-4' / 'model.pt').exists():
            kept = load_checkpoint(path, 'cpu')
            if kept['place']:
                round_, epoch = kept['place']
                snapshot = load_checkpoint(
                    tmp_path / 'whole' / 'CONV-3-4' / 'snapshots' / f'{round_}-{epoch}.pt', 'cpu'
                )
                assert all(
                    (kept['network'][name] == weight).all()
                    for name, weight in snapshot['network'].items()
                )
    assert 4 < len(lives) < 60 and same(tmp_path / 'whole', tmp_path / 'run')


def test_each_round_trains_to_the_target(tmp_path):
    """A round ends where its own training loss is at most the target, which the pruned network may be below at once."""
    flags = '--epochs 30 --target-loss 0.1 --eval-every 1 --prune-rounds 2 --prune-fraction 0.1 --rewind-epoch'.split()
    for rewind, name in ((0, 'rewound'), (-1, 'fine-tuned')):
        train_small(tmp_path / name, '--train-samples', '320', *flags, rewind)
        table = read_metrics(tmp_path / name / 'CONV-3-4' / 'metrics.csv')
        for round_ in range(3):
            at = (table['round'] == round_) & (table['epoch'] > 0)
            losses = table['train_loss'][at]
            assert losses[-1] <= 0.1 and (losses[:-1] > 0.1).all() and table['epoch'][at][-1] < 30
    assert 'stopped at epoch' in succeeds('--results-path', tmp_path / 'rewound', '--status')


def test_a_stop_before_the_first_step_keeps_the_place(tmp_path, monkeypatch):
    train_small(tmp_path / 'run', '--epochs', '1')

    def stop():
        machine.stop.signal = signal.SIGTERM
        machine.check_stop()

    monkeypatch.setattr(train, 'check_stop', stop)
    status, _, _ = main('--results-path', tmp_path / 'run', '--resume', '--epochs', '2')
    assert status == 143 and load_checkpoint(tmp_path / 'run' / 'CONV-3-4' / 'model.pt', 'cpu')[
        'place'
    ] == [0, 1]


@pytest.mark.parametrize('kind', ['dense', 'rounds', 'fine-tuning'])
def test_a_checkpoint_says_which_row_its_weights_are_those_of(tmp_path, kill_at, kind):
    """Wherever the run is killed, --evaluate measures what is logged of that epoch, or nothing."""
    names, folder = (
        kill_at(None, 0, *SMALL, *KINDS[kind], '--results-path', tmp_path / 'whole'),
        tmp_path / 'run',
    )
    for count in range(2, names.count('save') + 1, 2):  # after each save
        kill_at('save', count, *SMALL, *KINDS[kind], '--results-path', folder)
        kill_at(None, 0, '--results-path', folder, '--evaluate')
        tables = [folder / 'CONV-3-4' / f'{name}.csv' for name in ('metrics', 'evaluation')]
        tables = [numbers(table) if table.exists() else [] for table in tables]
        logged, measured = ({tuple(line[:2]): line for line in table} for table in tables)
        assert all(
            logged.get(key, line[:-2]) == line[:-2] for key, line in measured.items()
        )  # without delta and gamma
        shutil.rmtree(folder)


def test_augmentation_is_of_training_alone(tmp_path, uninterrupted, monkeypatch):
    """Steps see crops, another of each image in every epoch; the order of the samples and what is measured stay."""
    train_small(tmp_path / 'run', '--augment', 'crop', '--epochs', '2')
    augmented, plain = (
        numbers(path / 'CONV-3-4' / 'metrics.csv') for path in (tmp_path / 'run', uninterrupted)
    )
    assert (
        augmented[1] == plain[1] and augmented[2] != plain[2]
    )  # row 0 is of the untrained network

    settings, dataset = (
        settings_of(augment='crop', dataset_name='digits', width=4),
        load_dataset('digits', 'nowhere'),
    )
    (tmp_path / 'net').mkdir()
    run, seen = train.Run(settings, dataset, tmp_path / 'net', torch.device('cpu')), []
    plain = train.Run(
        settings_of(dataset_name='digits', width=4), dataset, tmp_path / 'net', torch.device('cpu')
    )
    run.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    for epoch in (1, 2):
        for state in (run.state, plain.state):
            state |= {'epoch': epoch, 'step': 0}
        for (_, indices), (_, samples) in zip(run.batches(epoch), plain.batches(epoch)):
            run.loss(run.net, indices)
            assert (indices % 1437).tolist() == samples.tolist() and indices.max() < 1437 * VARIANTS
            assert torch.equal(seen[-1], crops(dataset.train_images[samples], indices // 1437))
    first, second = torch.cat(seen).split(1437)
    assert not torch.equal(first.sum((1, 2, 3)).sort()[0], second.sum((1, 2, 3)).sort()[0])


@pytest.mark.pictures
def test_rounds_are_logged_from_the_pruned_network_on(tmp_path):
    train_small(tmp_path / 'run', *KINDS['rounds'])
    table = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')
    assert table['round'].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert table['epoch'].tolist() == [0, 1, 2, 3, 0, 2, 3, 0, 2, 3]
    weights = 4 * 4 + 2 * 4 * 4 * 4 + 100 * 10
    left = [weights, weights - round(0.2 * weights)]
    left.append(left[1] - round(0.2 * left[1]))
    assert table['density'] == pytest.approx(
        [left[int(number)] / weights for number in table['round']], rel=1e-12
    )
    figures = {path.name for path in (tmp_path / 'run').glob('*.p[nd][gf]')}
    assert figures == {
        f'{name}.{suffix}'
        for name in ('figure', 'bounds', 'density', 'layers')
        for suffix in ('png', 'pdf')
    }


def test_a_density_of_1_is_the_dense_network(tmp_path, uninterrupted):
    train_small(tmp_path / 'run', '--density', '1', '--initial-mask', 'erk')
    assert same(tmp_path / 'run', uninterrupted)
    train_small(
        tmp_path / 'rounds', '--prune-rounds', '1', '--epochs', '6'
    )  # masks of ones until the first pruning
    path = 'CONV-3-4/metrics.csv'
    assert numbers(tmp_path / 'rounds' / path)[: 1 + 7] == numbers(uninterrupted / path)


@pytest.mark.parametrize(
    'flags',
    [
        (),
        ('--eval-every', '2'),
        ('--layers-every', '2', '--snapshot-every', '3'),
        ('--layers-every', '3'),
        ('--momentum', '0'),
        ('--measures-every', '2'),
        ('--target-loss', '1e-9'),
    ],
)
def test_resume_to_more_epochs(tmp_path, flags):
    """What only the end of the shorter run has caused is taken back."""
    train_small(tmp_path / 'whole', *flags)
    train_small(tmp_path / 'run', '--epochs', '3', *flags)
    resume(tmp_path / 'run', '--epochs', '6')
    assert same(tmp_path / 'run', tmp_path / 'whole')
    assert '\nepochs = 6 ' in (tmp_path / 'run' / 'global_settings.py').read_text()


def test_layers_logged_before_there_were_probes(tmp_path):
    """The checkpoint of then does not name the columns of layers.csv; what it has logged stays, with empty cells."""
    train_small(tmp_path / 'run', '--layers-every', '2', '--epochs', '2')
    before = read_layers(tmp_path / 'run' / 'CONV-3-4' / 'layers.csv')
    path = tmp_path / 'run' / 'CONV-3-4' / 'model.pt'
    checkpoint = load_checkpoint(path, 'cpu')
    state = checkpoint['state']
    kept = state.pop('layer_columns').index(PROBES[0])
    state['layer_lines'] = [
        ','.join(line.split(',')[:kept]) + '\n' for line in state['layer_lines']
    ]
    save_checkpoint(path, checkpoint)
    resume(tmp_path / 'run', '--epochs', '4')
    after = read_layers(tmp_path / 'run' / 'CONV-3-4' / 'layers.csv')
    assert after['epoch'].tolist() == [epoch for epoch in (0, 2, 4) for _ in range(5)]
    for number, (column, values) in enumerate(before.items()):
        earlier = after[column][:10]
        assert (
            np.array_equal(earlier, values, equal_nan=True)
            if number < kept
            else np.isnan(earlier).all()
        )
    assert (
        np.isfinite(after['test_probe_error'][10:14]).all()
        and np.isfinite(after['nc1'][10:14]).all()
    )


def test_the_seconds_of_a_row_that_is_taken_back_are_kept(tmp_path):
    train_small(tmp_path / 'run', '--epochs', '3', '--eval-every', '2')
    path = tmp_path / 'run' / 'CONV-3-4' / 'model.pt'
    checkpoint = load_checkpoint(path, 'cpu')
    lines = checkpoint['state']['lines']
    lines[-1] = csv_line(parse_line(lines[-1], COLUMNS) | {'train_seconds': 1000.0}, COLUMNS)
    save_checkpoint(path, checkpoint)
    resume(tmp_path / 'run', '--epochs', '6')
    seconds = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')['train_seconds']
    assert seconds[0] == 0 < seconds[1] < 1000 < seconds[2] and 0 < seconds[3] < 1000


def test_resume_to_more_epochs_takes_back_certificates(tmp_path, monkeypatch):
    """Certificates are due every 2 epochs and at the last, of a trained network; those of the last row alone go when it is
    the last no more.
    """
    monkeypatch.setattr(evaluation, 'certify', lambda *arguments: {'pac_bayes_error': 0.5})
    train_small(tmp_path / 'whole', '--certify-every', '2')
    train_small(tmp_path / 'run', '--certify-every', '2', '--epochs', '3')
    resume(tmp_path / 'run', '--epochs', '6')
    assert same(tmp_path / 'run', tmp_path / 'whole')
    certified = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')['pac_bayes_error']
    assert (
        np.flatnonzero(certified == 0.5).tolist() == [2, 4, 6]
        and np.isnan(certified[[0, 1, 3, 5]]).all()
    )


# ----------------------------------------------------------------------------------------------------------------------
# What is said while it trains
# ----------------------------------------------------------------------------------------------------------------------


def test_report_shows_what_fits_most_wanted_first():
    row = {
        'test_error': 0.1,
        'train_error': 0.05,
        'generalization_gap': 0.05,
        'pac_bayes_error': 0.4,
        'our_bound': 8.0,
    }
    row |= {column: float('nan') for column in BOUNDS if column not in row}
    assert train.report(row) == 'test 0.1000 A 0.4000 train 0.0500 gap +0.0500 ours 2^3.0'
    for width in range(-20, 60):
        assert len(train.report(row, width)) <= max(width, 0) and train.report(row).startswith(
            train.report(row, width)
        )


def on_a_terminal(columns, *arguments):
    """What train.py shows in a pseudo-terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('4H', 50, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != 'COLUMNS'}
    command = [sys.executable, str(ROOT / 'train.py'), *SMALL, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b''
    while True:
        try:
            if not (chunk := os.read(master, 65536)):
                break
        except OSError:
            break
        seen += chunk
    assert process.wait(60) == 0, seen.decode()
    return seen.decode()


def test_a_long_name_on_a_narrow_terminal(tmp_path):
    text = on_a_terminal(
        60, '--label-noise', 0, 0.1, '--epochs', '1', '--results-path', tmp_path / 'run'
    )
    assert 'CONV-3-4-label_noise0.1' in text and 'Traceback' not in text


@pytest.mark.parametrize('columns', [80, 160, 250])
def test_progress_bar_on_a_terminal(tmp_path, columns):
    """One bar of at most the terminal's width, whole words beside it, test error first; no plain lines."""
    text = on_a_terminal(columns, '--results-path', tmp_path / 'run')
    assert 'clamping' not in text and 'Warning' not in text
    states = [line.strip() for line in re.split(r'[\r\n]', text) if 'epoch ' in line]
    assert all(len(state) <= columns for state in states)
    table = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')
    last = {column: values[-1] for column, values in table.items()}
    whole = train.report(last)
    shown = re.search(r'epoch 6\.00/6 \[\d\d:\d\d<00:00\], (.*)$', states[-1])[1]
    assert shown.startswith(f'test {last["test_error"]:.4f}')
    assert whole == shown or whole.startswith(f'{shown} ')
    assert columns < 160 or 'ours 2^' in shown
    assert text.count('\n') == 1 + 1 + 4


def test_paper_run_learns_mnist(tmp_path, mnist):
    """Width 4 and one epoch: enough to see the real files go through the program."""
    flags = (
        '--width',
        '4',
        '--epochs',
        '1',
        '--certify-every',
        '0',
        '--results-path',
        tmp_path / 'run',
    )
    status, stdout, stderr = run(*flags, cwd=ROOT, timeout=600)
    assert (status, stderr) == (0, '') and 'MNIST, 60000 training and 10000 test images' in stdout
    assert read_metrics(Path(tmp_path, 'run', 'CONV-3-4', 'metrics.csv'))['test_error'][-1] < 0.12
