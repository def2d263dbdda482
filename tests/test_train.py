"""What a training computes and logs, and that no kill and no signal changes any of it."""

import os
import random
import re
import signal
from pathlib import Path

import freeze
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    main,
    numbers,
    refused,
    resume,
    rows,
    run,
    same,
    settings_of,
    start,
    succeeds,
    train_small,
)
from torch import nn

import models
import records
import sparsify
import train
from datasets import crops
from evaluation import COLUMNS, report
from measures.norms import classification_margins, margin_error, measure_data
from models import get_network
from records import load_checkpoint, read_layers, read_metrics
from utils import BOUNDS, evaluate_bounds


@pytest.mark.process
def test_quick_start(tmp_path):
    status, stdout, stderr = run(
        '--settings', 'conf/digits.py', '--results-dir', tmp_path / 'results', cwd=ROOT
    )
    assert (status, stderr) == (0, '')
    folder = tmp_path / 'results' / '1'
    paths = [str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()]
    pictures = {f'{name}.{kind}' for name in ('figure', 'bounds') for kind in ('png', 'pdf')}
    files = {'CONV-3-32/metrics.csv', 'CONV-3-32/model.pt', 'CONV-3-32/.lock', 'global_settings.py'}
    assert set(paths) == files | pictures
    table = read_metrics(folder / 'CONV-3-32' / 'metrics.csv')
    assert list(table) == COLUMNS
    assert table['epoch'].tolist() == list(range(151))
    assert table['test_error'][-1] < 0.10 < 0.8 < table['test_error'][0]
    assert (table['generalization_gap'] == table['test_error'] - table['train_error']).all()
    assert (table['density'] == 1).all() and (table['round'] == 0).all()
    assert all(np.isfinite(table[column]).all() for column in BOUNDS)
    lines = re.findall(r'^CONV-3-32 epoch \d+/150 test 0\.\d+ train .*ours 2\^\d.*$', stdout, re.M)
    assert len(lines) == 151 and max(map(len, lines)) <= 100
    header = (folder / 'global_settings.py').read_text()
    for word in (
        '# date: 20',
        'Python 3.',
        f'torch {torch.__version__}',
        'device: cpu',
        '# commit: ',
    ):
        assert word in header
    assert '\nthreads = 1 ' in header


def test_metrics_are_those_of_the_final_network(uninterrupted, digits):
    """The last row, computed from the checkpoint without the training program."""
    settings = settings_of(dataset_name='digits', width=4)
    net = get_network(settings, digits.input_shape, 10)
    path = uninterrupted / 'CONV-3-4'
    net.load_state_dict(load_checkpoint(path / 'model.pt')['network'])
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
    table = read_metrics(path / 'metrics.csv')
    for column, value in expected.items():
        assert table[column][-1] == pytest.approx(value, rel=1e-5), column


def test_training_is_sgd_on_the_loss_with_weight_normalization(tmp_path, digits):
    """Two epochs against a loop written out with PyTorch's own weight normalization."""
    train_small(tmp_path / 'run', '--epochs', '2', '--milestones', '1')
    torch.manual_seed(0)
    layers, channels = [], 1
    for _ in range(3):
        layers += [nn.Conv2d(channels, 4, 2, bias=False), nn.ReLU()]
        channels = 4
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(100, 10, bias=False))
    for layer in net[:6:2]:
        nn.utils.parametrizations.weight_norm(layer, dim=None)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=3e-3)
    for epoch, lr in ((1, 0.01), (2, 0.001)):
        optimizer.param_groups[0]['lr'] = lr
        order = torch.from_numpy(np.random.default_rng((0, epoch)).permutation(1437))
        for batch in order.split(32):
            targets = nn.functional.one_hot(digits.train_labels[batch], 10).float()
            loss = ((net(digits.train_images[batch]) - targets) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        outputs = net(digits.train_images)
    loss = ((outputs - torch.eye(10)[digits.train_labels]) ** 2).mean().item()
    logged = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')['train_loss'][-1]
    assert logged == pytest.approx(loss, rel=1e-4)


def test_a_study_can_call_the_loop(tmp_path, digits, uninterrupted):
    settings = settings_of(dataset_name='digits', width=4, epochs=6)
    (tmp_path / 'CONV-3-4').mkdir()
    assert train.train(settings, digits, tmp_path / 'CONV-3-4') is True
    assert same(tmp_path, uninterrupted)


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    folder, name = tmp_path / 'run', 'CONV-3-4-lr1000000000.0'
    status, _, stderr = main(*SMALL, '--lr', '1e9', '0.01', '--results-path', folder)
    assert status == 1 and stderr.count('\n') == 1
    assert 'the loss became NaN or infinite' in stderr and 'lr below 1e+09' in stderr
    assert (
        len(load_checkpoint(folder / name / 'model.pt')['state']['rows']) == rows(folder, name) == 1
    )
    assert rows(folder, 'CONV-3-4-lr0.01') == 7  # the rest of the sweep is trained all the same


def test_weights_that_explode_in_the_last_step_are_kept_nowhere(tmp_path, monkeypatch):
    step, taken = torch.optim.SGD.step, []

    def exploding(optimizer):
        step(optimizer)
        taken.append(optimizer)
        if len(taken) == 2 * 45:
            optimizer.param_groups[0]['params'][0].data.fill_(float('inf'))

    monkeypatch.setattr(torch.optim.SGD, 'step', exploding)
    flags = ('--eval-every', '5', '--layers-every', '1', '--snapshot-every', '1')
    refused(*SMALL, *flags, '--results-path', tmp_path / 'run', status=1)
    files = list((tmp_path / 'run').rglob('*.pt'))
    assert files
    for path in files:
        assert all(weight.isfinite().all() for weight in load_checkpoint(path)['network'].values())


def test_periods(tmp_path, uninterrupted):
    train_small(tmp_path / 'run', '--epochs', '5', '--eval-every', '2')
    table = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')
    every = read_metrics(uninterrupted / 'CONV-3-4' / 'metrics.csv')
    assert table['epoch'].tolist() == [0, 2, 4, 5]
    assert table['our_bound'].tolist() == every['our_bound'][[0, 2, 4, 5]].tolist()


def test_early_stopping_is_said_and_kept(tmp_path):
    flags = ('--lr', '1e-9', '--early-stop-epoch', '4', '--early-stop-accuracy', '0.5')
    reason = 'stopped at epoch 4: accuracy below 0.5'
    assert f'CONV-3-4: {reason}\n' in train_small(tmp_path / 'run', *flags)
    assert rows(tmp_path / 'run') == 5
    assert 'finished already' in resume(tmp_path / 'run')
    assert rows(tmp_path / 'run') == 5
    assert reason in succeeds('--results-path', tmp_path / 'run', '--status')


def test_a_training_ends_at_its_target_loss(tmp_path):
    """Within an epoch, which counts as the last one: rows, layers, snapshots, measures are due."""
    flags = '--train-samples 320 --lr 0.1 --loss CE --normalization none'.split()
    train_small(tmp_path / 'whole', *flags)
    losses = read_metrics(tmp_path / 'whole' / 'CONV-3-4' / 'metrics.csv')['train_loss']
    target = (3 * losses[4] + losses[5]) / 4
    assert losses[5] < target < losses[:5].min()
    flags += '--eval-every 4 --layers-every 4 --snapshot-every 4 --measures-every 4'.split()
    folder = tmp_path / 'run'
    said = train_small(folder, *flags, '--target-loss', target, '--epochs', '9')
    assert f'CONV-3-4: stopped at epoch 5: training loss at most {target:g}' in said
    table = read_metrics(folder / 'CONV-3-4' / 'metrics.csv')
    assert table['epoch'].tolist() == [0, 4, 5]
    assert table['train_loss'][:2].tolist() == losses[[0, 4]].tolist()
    assert losses[5] < table['train_loss'][2] <= target  # the epoch was not trained to its end
    assert np.isfinite(table['sharpness']).tolist() == [False, True, True]
    snapshots = (folder / 'CONV-3-4' / 'snapshots').iterdir()
    assert {path.stem for path in snapshots} == {'0-0', '0-4', '0-5'}
    assert read_layers(folder / 'CONV-3-4' / 'layers.csv')['epoch'][-1] == 5
    before = (folder / 'CONV-3-4' / 'metrics.csv').read_bytes()
    assert 'finished already' in resume(folder, '--epochs', '20')
    assert (folder / 'CONV-3-4' / 'metrics.csv').read_bytes() == before


@pytest.mark.parametrize('rewind', ['0', '-1'])
def test_each_round_trains_to_the_target(tmp_path, rewind):
    """A round ends where its own training loss is at most the target."""
    flags = '--epochs 30 --target-loss 0.1 --prune-rounds 2 --prune-fraction 0.1'.split()
    train_small(tmp_path, '--train-samples', '320', *flags, '--rewind-epoch', rewind)
    table = read_metrics(tmp_path / 'CONV-3-4' / 'metrics.csv')
    for round_ in range(3):
        at = (table['round'] == round_) & (table['epoch'] > 0)
        losses = table['train_loss'][at]
        assert losses[-1] <= 0.1 and (losses[:-1] > 0.1).all() and table['epoch'][at][-1] < 30


@pytest.mark.parametrize(
    'flags', ['--loss CE', '--loss L1', '--normalize True', '--precision bf16']
)
def test_other_settings_learn_too(tmp_path, flags):
    learning = '--epochs 20 --width 8 --lr 0.05 --eval-every 20'.split()
    train_small(tmp_path / 'run', *learning, *flags.split())
    table = read_metrics(tmp_path / 'run' / 'CONV-3-8' / 'metrics.csv')
    assert table['train_loss'][-1] < 0.95 * table['train_loss'][0]
    assert 'L1' in flags or table['train_error'][-1] < 0.5  # L1 is content with zeros for long


def test_a_network_that_bounds_do_not_cover(tmp_path):
    """It is trained, the reason is said and kept once, its cells are empty; a resume is exact."""
    folder = tmp_path / 'run'
    flags = '--bias True --layers-every 2 --train-samples 320 --width 4 5'.split()
    stdout = train_small(folder, *flags)
    assert stdout.count('bounds that do not cover CONV stay empty: ') == 1
    assert (
        '\n# bounds that do not cover CONV stay empty: '
        in (folder / 'global_settings.py').read_text()
    )
    table = read_metrics(folder / 'CONV-3-4' / 'metrics.csv')
    missing = {column for column, values in table.items() if np.isnan(values).all()}
    assert {'our_bound', 'rho', 'corrected_bound', 'certified_error'} <= missing
    assert not missing & {'train_error', 'test_error', 'density', 'path_norm', 'path_bound'}
    assert 'nan' not in (folder / 'CONV-3-4' / 'metrics.csv').read_text() and ' nan' not in stdout


def test_few_samples_are_trained_on_without_a_certificate(tmp_path):
    flags = '--train-samples 5 --epochs 1 --certify-every 1'.split()
    stdout = train_small(tmp_path / 'run', *flags)
    assert 'certificates stay empty: train_samples = 5, and at least 10 are needed' in stdout


@pytest.mark.long
def test_threads_are_written_down_and_kept(tmp_path, monkeypatch):
    folder, slurm = tmp_path / 'run', tmp_path / 'slurm'
    try:
        train_small(folder, '--threads', '2', '--epochs', '1')
        resume(folder, '--epochs', '2')
        assert torch.get_num_threads() == 2
        # Each task of Slurm has its own number, which its checkpoint keeps.
        monkeypatch.setattr(train, 'TORCH_THREADS', 2)
        train_small(slurm, '--epochs', '1', '--prepare')
        assert '\nthreads = 0 ' in (slurm / 'global_settings.py').read_text()
        resume(slurm)
        monkeypatch.setattr(train, 'TORCH_THREADS', 1)
        resume(slurm, '--epochs', '2')
        assert load_checkpoint(slurm / 'CONV-3-4' / 'model.pt')['machine']['threads'] == 2
    finally:
        torch.set_num_threads(1)


def test_another_machine_is_said(tmp_path, monkeypatch):
    train_small(tmp_path / 'run', '--epochs', '1')
    machine = {'processor': 'another CPU', 'threads': 1, 'torch': torch.__version__}
    monkeypatch.setattr(train, 'describe_machine', lambda device: machine)
    stdout = resume(tmp_path / 'run', '--epochs', '2')
    assert 'now another CPU: last digits will differ' in stdout and stdout.count('differ') == 1


def test_how_long_it_will_take_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'has_bfloat16_units', lambda: True)
    settings = settings_of(epochs=500)
    lines = []
    monkeypatch.setattr(train, 'say', lines.append)
    train.say_pace(settings, 0.1, torch.device('cpu'))
    assert not lines
    train.say_pace(settings, 600.0, torch.device('cpu'))
    assert 'an epoch trains for 600.0 s, 500 epochs for 3 days, 11:20:00' in lines[0]
    assert '--precision bf16 is faster on this CPU' in lines[0] and 'GPU' in lines[0]


def test_augmentation_is_of_training_alone(tmp_path, uninterrupted, monkeypatch):
    """Steps see other crops in every epoch; the order of samples and what is measured stay."""
    seen = []

    def watched(images, variants):
        seen.append((images, crops(images, variants)))
        return seen[-1][1]

    monkeypatch.setattr(train, 'crops', watched)
    train_small(tmp_path / 'run', '--augment', 'crop', '--epochs', '2')
    path = 'CONV-3-4/metrics.csv'
    augmented, plain = numbers(tmp_path / 'run' / path), numbers(uninterrupted / path)
    assert augmented[1] == plain[1] and augmented[2] != plain[2]  # row 0: the untrained network
    images, changed = (torch.cat(part).split(1437) for part in zip(*seen))
    assert torch.equal(images[0].sum((1, 2, 3)).sort()[0], images[1].sum((1, 2, 3)).sort()[0])
    assert not torch.equal(changed[0].sum((1, 2, 3)).sort()[0], changed[1].sum((1, 2, 3)).sort()[0])


def test_rounds_are_logged_from_the_pruned_network_on(tmp_path):
    train_small(tmp_path / 'run', *freeze.KINDS['rounds'].split())
    table = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')
    assert table['round'].tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert table['epoch'].tolist() == [0, 1, 2, 3, 0, 2, 3, 0, 2, 3]
    weights = 4 * 4 + 2 * 4 * 4 * 4 + 100 * 10
    kept = [weights, weights - round(0.2 * weights)]
    kept.append(kept[1] - round(0.2 * kept[1]))
    expected = [kept[int(number)] / weights for number in table['round']]
    assert table['density'] == pytest.approx(expected, rel=1e-12)


def test_a_density_of_1_is_the_dense_network(tmp_path, uninterrupted):
    train_small(tmp_path / 'run', '--density', '1', '--initial-mask', 'erk')
    assert same(tmp_path / 'run', uninterrupted)
    train_small(tmp_path / 'rounds', '--prune-rounds', '1')  # masks of ones until the first pruning
    path = 'CONV-3-4/metrics.csv'
    assert numbers(tmp_path / 'rounds' / path)[: 1 + 7] == numbers(uninterrupted / path)


def test_resume_to_more_epochs(tmp_path, uninterrupted):
    train_small(tmp_path / 'run', '--epochs', '3')
    resume(tmp_path / 'run', '--epochs', '6')
    assert same(tmp_path / 'run', uninterrupted)
    assert '\nepochs = 6 ' in (tmp_path / 'run' / 'global_settings.py').read_text()


# ------------------------------------------------------------------------------------------------
# A kill or a signal at any moment
# ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, so that only what is on the disk is left."""


def kill_at(name, count, *arguments):
    """Runs train.py in this process up to the count-th moment of this name, before or after it.

    Moments are training steps, changes of masks, evaluations, files moved into their place and
    checkpoints. Returns the names of the moments that went by; with None it runs to its end.
    """
    names = []

    def pass_by(moment):
        names.append(moment)
        if (moment, names.count(moment)) == (name, count):
            raise Killed

    def watched(moment, function):
        def call(*arguments, **options):
            pass_by(moment)
            result = function(*arguments, **options)
            pass_by(moment)
            return result

        return call

    moments = [(train, 'evaluate'), (train, 'evaluate_layers'), (records, 'save_checkpoint')]
    moments += [(os, 'replace'), (torch.optim.SGD, 'step')]
    moments += [(sparsify, change) for change in ('prune', 'rewind', 'regrow')]
    with pytest.MonkeyPatch.context() as patch:
        for owner, moment in moments:
            patch.setattr(owner, moment, watched(moment, getattr(owner, moment)))
        try:
            succeeds(*arguments)
        except Killed:
            pass
    return names


@pytest.mark.long
@pytest.mark.parametrize('kind', freeze.KINDS)
def test_a_kill_at_any_moment_changes_nothing(tmp_path, kind):
    """Killed twice at a moment of every name, each time by a resume after the kill before."""
    whole, folder, flags = tmp_path / 'whole', tmp_path / 'run', freeze.KINDS[kind].split()
    names = sorted(set(kill_at(None, 0, *SMALL, *flags, '--results-path', whole)))
    (network,) = (path.name for path in whole.iterdir() if path.is_dir())
    rng = random.Random(kind)
    for name in rng.sample(names * 2, 2 * len(names)):
        resumed = (folder / 'global_settings.py').exists()
        arguments = ['--resume'] if resumed else [*SMALL, *flags]
        count = rng.randint(1, 12 if name == 'step' else 4)
        kill_at(name, count, *arguments, '--results-path', folder)
    resume(folder)
    assert same(whole, folder, network)
    final, expected = (
        load_checkpoint(path / network / 'model.pt')['network'] for path in (folder, whole)
    )
    assert all((final[name] == expected[name]).all() for name in expected)


def test_a_run_resumed_in_mid_epoch_draws_the_same_dropout(tmp_path, monkeypatch):
    def dropout(settings, input_shape, classes):
        layers = nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Dropout()
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, classes, bias=False))

    monkeypatch.setitem(models.NETWORKS, 'DROP', dropout)
    train_small(tmp_path / 'whole', '--network', 'DROP', '--epochs', '4')
    arguments = (*SMALL, '--network', 'DROP', '--epochs', '4', '--results-path', tmp_path / 'run')
    step, taken = torch.optim.SGD.step, []

    def interrupting(optimizer):
        step(optimizer)
        taken.append(optimizer)
        if len(taken) == 2 * 45 + 20:
            train.stop = signal.SIGTERM

    with monkeypatch.context() as context:
        context.setattr(torch.optim.SGD, 'step', interrupting)
        status, _, stderr = main(*arguments)
    assert status == 143 and 'stopped by SIGTERM; continue with: python ' in stderr
    assert 'continues after epoch 2 and 20 steps' in resume(tmp_path / 'run')
    assert same(tmp_path / 'run', tmp_path / 'whole', 'DROP-3-4')


def test_a_signal_while_a_checkpoint_is_written_does_not_wait_for_the_evaluation(
    tmp_path, monkeypatch
):
    save, evaluated = records.save_checkpoint, []

    def interrupted(path, checkpoint):
        save(path, checkpoint)
        if checkpoint['state']['step'] == 45:  # the one before the evaluation of epoch 1
            train.stop = signal.SIGTERM

    def evaluate(*arguments):
        evaluated.append(arguments[-1])
        return original(*arguments)

    original = train.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(records, 'save_checkpoint', interrupted)
        patch.setattr(train, 'evaluate', evaluate)
        status, _, _ = main(*SMALL, '--epochs', '2', '--results-path', tmp_path / 'run')
    assert status == 143 and evaluated == [0]
    resume(tmp_path / 'run')
    assert rows(tmp_path / 'run') == 3


def test_a_kill_before_the_first_checkpoint_leaves_a_run_that_can_be_resumed(tmp_path):
    kill_at('save_checkpoint', 1, *SMALL, '--epochs', '1', '--results-path', tmp_path / 'run')
    resume(tmp_path / 'run')
    assert rows(tmp_path / 'run') == 2


@pytest.mark.process
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize('kind', ['dense', 'rounds', 'gradient', 'target'])
def test_a_run_that_is_stopped_again_and_again_equals_the_whole_one(tmp_path, kind, number):
    """It ends within a second or two, says how to continue, and loses nothing that was logged."""
    flags = freeze.KINDS[kind].split() + ['--epochs', '9', '--train-samples', '1437']
    train_small(tmp_path / 'whole', *flags)
    folder, arguments, rng = tmp_path / 'run', [*SMALL, *flags], random.Random(number)
    for _ in range(3):
        process = start(*arguments, '--results-path', folder)
        before = rows(folder)
        while rows(folder) <= before and process.poll() is None:
            signal.sigtimedwait([], 0.002)
        signal.sigtimedwait([], rng.uniform(0, 0.3))
        process.send_signal(number)
        _, stderr = process.communicate(timeout=10)
        if process.returncode == 0:
            break
        if number == signal.SIGKILL:
            assert process.returncode == -9
        else:
            assert process.returncode == 128 + number
            assert re.fullmatch(
                rf'train.py: stopped by {number.name}; continue with: python .*train.py '
                rf'--results-path {folder} --resume\n',
                stderr,
            )
        arguments = ['--resume']
    resume(folder)
    assert same(tmp_path / 'whole', folder)


# ------------------------------------------------------------------------------------------------
# What is shown
# ------------------------------------------------------------------------------------------------


def test_the_line_of_a_row():
    row = {'test_error': 0.1, 'train_error': 0.05, 'generalization_gap': 0.05, 'our_bound': 8.0}
    row |= {'pac_bayes_error': 0.40001, 'path_bound': 16.1}
    assert report(row) == 'test 0.1000 A 0.4001 train 0.0500 gap +0.0500 ours 2^3.0 path 2^4.1'


@pytest.mark.long
def test_paper_run_learns_mnist(tmp_path, mnist):
    """Width 4 and one epoch: enough to see the real files go through the program."""
    stdout = succeeds('--width', '4', '--epochs', '1', '--results-path', tmp_path / 'run')
    assert 'MNIST, 60000 training and 10000 test images' in stdout
    path = Path(tmp_path, 'run', 'CONV-3-4', 'metrics.csv')
    assert read_metrics(path)['test_error'][-1] < 0.12
