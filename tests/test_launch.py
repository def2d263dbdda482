"""The command line around the trainings: folders, resumes, signals, sweeps, jobs, --evaluate, --status and --plot."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ROOT,
    SMALL,
    contents,
    refused,
    resume,
    rows,
    run,
    same,
    start,
    succeeds,
    train_small,
    wait_for,
)
from test_datasets import make_idx

import launch
from conf import load_settings
from evaluation import COLUMNS
from jobs import resuming
from records import folder_settings, load_checkpoint, locked, read_metrics, save_checkpoint
from figures import read_runs
from utils import BOUNDS


@pytest.mark.pictures
def test_sweep_leaves_four_runs_and_its_figures(tmp_path):
    image = pytest.importorskip('matplotlib.image')
    arguments = ('--depth', '2', '3', '--width', '8', '16', '--epochs', '5')
    succeeds(*SMALL, *arguments, '--results-dir', tmp_path)
    names = [f'CONV-{depth}-{width}' for depth in (2, 3) for width in (8, 16)]
    assert {path.name for path in (tmp_path / '1').iterdir() if path.is_dir()} == set(names)
    assert all(rows(tmp_path / '1', name) == 6 for name in names)
    height, width, _ = image.imread(tmp_path / '1' / 'figure.png').shape
    assert width == 1700 and 800 < height < 1700  # four panels in two rows, and the legend
    assert (tmp_path / '1' / 'sweep.pdf').exists() and (
        tmp_path / '1' / 'summary.csv'
    ).read_text().count('\n') == 1 + 4

    (tmp_path / '1' / 'figure.png').unlink()
    shutil.rmtree(tmp_path / '1' / names[3])
    succeeds('--results-path', tmp_path / '1', '--plot')
    assert (tmp_path / '1' / 'figure.png').exists()

    succeeds(
        '--settings', tmp_path / '1' / 'global_settings.py', '--results-path', tmp_path / 'again'
    )
    assert all(rows(tmp_path / 'again', name) == 6 for name in names)
    assert same(tmp_path / '1', tmp_path / 'again', names[0])


def test_one_network_of_a_sweep(tmp_path):
    stdout = train_small(tmp_path / 'run', '--width', '4', '5', '--run', '2')
    assert 'CONV-3-5' in stdout and not (tmp_path / 'run' / 'CONV-3-4').exists()
    resume(tmp_path / 'run')
    assert rows(tmp_path / 'run') == rows(tmp_path / 'run', 'CONV-3-5') == 7


def test_prepare_makes_the_folder_and_trains_nothing(tmp_path):
    stdout = train_small(tmp_path / 'run', '--width', '4', '5', '--prepare')
    assert stdout == f'2 {tmp_path / "run"}\n'
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['global_settings.py']


def test_launch_into_an_empty_folder(tmp_path):
    train_small(tmp_path, '--epochs', '1')
    assert rows(tmp_path) == 2


def test_launch_into_an_existing_folder_is_refused(uninterrupted):
    assert 'add --resume' in refused(*SMALL, '--results-path', uninterrupted)


def test_launches_at_once_get_a_folder_each(tmp_path, uninterrupted):
    processes = [start(*SMALL, '--results-dir', tmp_path) for _ in range(4)]
    for process in processes:
        assert process.communicate(timeout=240)[1] == '' and process.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == list('1234')
    assert all(same(tmp_path / number, uninterrupted) for number in '1234')


def test_a_folder_made_since_the_launch_began_is_left_alone(tmp_path, monkeypatch):
    def other(*arguments):
        train_small(tmp_path / 'run', '--width', '4', '--epochs', '0')
        return []

    check = launch.check_run
    monkeypatch.setattr(
        launch, 'check_run', lambda settings: check(settings) if settings.width == 4 else other()
    )
    assert 'exists' in refused(*SMALL, '--results-path', tmp_path / 'run', '--width', '8')
    assert '\nwidth = 4 ' in (tmp_path / 'run' / 'global_settings.py').read_text()


def test_works_from_any_folder(tmp_path):
    (tmp_path / 'here').mkdir()
    status, stdout, stderr = run(
        *SMALL, '--epochs', '1', '--results-dir', 'mine', cwd=tmp_path / 'here'
    )
    assert (status, stderr) == (0, '') and rows(tmp_path / 'here' / 'mine' / '1') == 2


def test_data_dir_of_the_environment_wins(tmp_path):
    make_idx(tmp_path / 'there')
    environment = os.environ | {'DATA_DIR': str(tmp_path / 'there')}
    flags = (
        '--dataset-name',
        'MNIST',
        '--epochs',
        '1',
        '--data-dir',
        tmp_path / 'gone',
        '--results-path',
        tmp_path / 'run',
    )
    status, stdout, stderr = run(*SMALL, *flags, env=environment)
    assert (status, stderr) == (0, '') and 'MNIST, 70 training and 20 test images' in stdout


@pytest.mark.pictures
def test_a_figure_that_fails_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr('figures.epochs_picture', lambda *arguments: 1 / 0)
    stdout = train_small(tmp_path / 'run', '--epochs', '1')
    assert 'no figure was drawn: ZeroDivisionError' in stdout and rows(tmp_path / 'run') == 2


# ----------------------------------------------------------------------------------------------------------------------
# Interrupts and resumes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_resume_after_a_signal_mid_epoch(tmp_path, uninterrupted, number):
    folder = tmp_path / 'run'
    process = start(*SMALL, '--results-path', folder)
    wait_for(lambda: rows(folder) == 3, process)
    time.sleep(0.05)
    sent = time.monotonic()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert time.monotonic() - sent < 2
    assert process.returncode == 128 + number
    assert (
        stderr
        == f'train.py: stopped by {number.name}; go on with: python train.py --results-path {folder} --resume\n'
    )
    assert rows(folder) < 7
    assert re.search(
        r'CONV-3-4: goes on in epoch [3-6] after \d+ of its \d+ steps\n', resume(folder)
    )
    assert same(folder, uninterrupted)
    assert 'finished already' in resume(folder)
    assert same(folder, uninterrupted)


def test_two_resumes_of_one_run_do_not_both_write(tmp_path):
    folder = tmp_path / 'run'
    first = start(*SMALL, '--epochs', '400', '--results-path', folder)
    wait_for(lambda: rows(folder) == 2, first)
    for flags in ((), ('--epochs', '500')):
        assert 'another process is training this network' in refused(
            '--results-path', folder, '--resume', *flags
        )
    first.kill()
    first.communicate()
    process = start('--results-path', folder, '--resume')  # the killed process left no lock behind
    before = rows(folder)
    wait_for(lambda: rows(folder) > before + 1, process)
    process.terminate()
    process.communicate()


@pytest.mark.parametrize(
    'flag', [('--width', '8'), ('--lr', '0.1'), ('--dataset-name', 'MNIST'), ('--threads', '2')]
)
def test_resume_with_other_settings_is_refused(uninterrupted, flag):
    assert flag[0][2:].replace('-', '_') in refused(
        '--results-path', uninterrupted, '--resume', *flag
    )


@pytest.mark.parametrize(
    'flags, message',
    [(('--epochs', '7', '8'), 'keeps the runs of the sweep'), (('--epochs', '2'), 'can only be made longer than 6'),
     (('--epochs', '8', '--run', '1'), 'cannot change with --run')],
)  # fmt: skip
def test_resume_that_would_change_what_was_done_is_refused(uninterrupted, flags, message):
    before = contents(uninterrupted)
    assert message in refused('--results-path', uninterrupted, '--resume', *flags)
    assert contents(uninterrupted) == before


def test_a_sweep_over_epochs_keeps_them(tmp_path):
    train_small(tmp_path / 'run', '--epochs', '1', '2')
    assert 'varies epochs; leave --epochs out' in refused(
        '--results-path', tmp_path / 'run', '--resume', '--epochs', '4'
    )
    train_small(tmp_path / 'other', '--epochs', '1', '--gamma', '1', '2')
    assert 'varies gamma; leave --gamma out' in refused(
        '--results-path', tmp_path / 'other', '--evaluate', '--gamma', '3'
    )
    (tmp_path / 'single.py').write_text(
        Path(SMALL[1]).read_text().replace('epochs = 6', 'epochs = [1]')
    )
    succeeds(
        '--settings', tmp_path / 'single.py', '--results-path', tmp_path / 'single'
    )  # no sweep
    resume(tmp_path / 'single', '--epochs', '2')
    assert rows(tmp_path / 'single') == 3


@pytest.mark.parametrize(
    'kind', ['--prune-rounds 1', '--density 0.5 --initial-mask random --regrow random']
)
def test_rounds_and_regrowth_keep_their_epochs(tmp_path, kind):
    train_small(tmp_path / 'run', '--epochs', '1', *kind.split())
    before = contents(tmp_path / 'run')
    assert 'with rounds or regrowth' in refused(
        '--results-path', tmp_path / 'run', '--resume', '--epochs', '2'
    )
    assert contents(tmp_path / 'run') == before


def test_a_resume_keeps_where_a_launch_came_from(tmp_path):
    train_small(tmp_path / 'run', '--epochs', '1')
    path = tmp_path / 'run' / 'global_settings.py'
    first = path.read_text().partition('\n\n')[0].replace('torch ', 'torch of last year ')
    path.write_text(first + '\n\n' + path.read_text().partition('\n\n')[2])
    for epochs in (2, 3):
        resume(tmp_path / 'run', '--epochs', epochs)
    header = path.read_text().partition('\n\n')[0]
    assert header.startswith(first + '\n# resumed with epochs = 2\n# date: 20')
    assert '\n# resumed with epochs = 3\n# date: 20' in header
    assert (
        header.count('# device: ')
        == header.count('# commit: ')
        == header.count('# versions: ')
        == 3
    )
    assert load_settings(path)[0]['epochs'] == 3


# ----------------------------------------------------------------------------------------------------------------------
# What reads a folder
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('option', ['--plot', '--status', '--evaluate'])
def test_reading_something_else_is_refused(uninterrupted, option):
    line = refused('--results-path', uninterrupted / 'CONV-3-4', option)
    assert f'has no global_settings.py; name {uninterrupted}' in line
    assert 'leave --run out' in refused('--results-path', uninterrupted, option, '--run', '1')
    assert f'{option} keeps the setting epochs' in refused(
        '--results-path', uninterrupted, option, '--epochs', '9'
    )


def test_status(tmp_path, kill_at):
    """Four networks: finished, one that a process holds, one that was killed, and one that was never begun."""
    folder = tmp_path / 'run'
    train_small(folder, '--width', '4', '5', '6', '7', '--prepare')
    resume(folder, '--run', '1')
    for number in (2, 3):
        kill_at(
            'log', 2 * number, '--results-path', folder, '--resume', '--run', number
        )  # after the row of epoch number - 1
    with locked(folder / 'CONV-3-5' / '.lock'):
        before = contents(folder)
        header, *lines = succeeds('--results-path', folder, '--status').splitlines()
        assert contents(folder) == before
    assert header.split() == [
        'network',
        'state',
        'round',
        'epoch',
        'test',
        'error',
        'last',
        'written',
    ]
    last = [
        read_metrics(folder / f'CONV-3-{width}' / 'metrics.csv')['test_error'][-1]
        for width in (4, 5, 6)
    ]
    expected = [
        ('CONV-3-4', 'finished', '6/6'),
        ('CONV-3-5', 'running', '1/6'),
        ('CONV-3-6', 'left', '2/6'),
    ]
    for line, (name, state, epoch), error in zip(lines, expected, last):
        assert re.fullmatch(
            rf'{name} +{state} +0 +{epoch} +{error:.4f}  20\d\d-\d\d-\d\d \d\d:\d\d:\d\d', line
        ), line
    assert lines[3].split() == ['CONV-3-7', 'left'] and len(lines) == 4


@pytest.mark.pictures
def test_a_new_bound_on_finished_runs(tmp_path, monkeypatch):
    """From snapshots its whole curve, without training; what was logged before is measured to the same digits."""
    folder, flags = tmp_path / 'run', ('--layers-every', '0', '--width', '4', '5')
    train_small(folder, *flags, '--snapshot-every', '2')
    train_small(tmp_path / 'last', *flags)
    before = contents(folder)

    def my_bound(network, data, delta, gamma):
        """My bound: a test."""
        return 2 * network.rho

    monkeypatch.setitem(BOUNDS, 'my_bound', my_bound)
    COLUMNS.insert(COLUMNS.index('our_bound'), 'my_bound')
    try:
        stdout = succeeds('--results-path', folder, '--evaluate')
        succeeds('--results-path', tmp_path / 'last', '--evaluate')
        assert (
            f'{folder}/CONV-3-4/evaluation.csv: 4 rows' in stdout
            and f'drew {folder}/figure.png' in stdout
        )
        logged, measured = (
            read_metrics(folder / 'CONV-3-4' / f'{name}.csv') for name in ('metrics', 'evaluation')
        )
        assert (
            measured['epoch'].tolist() == [0, 2, 4, 6]
            and (measured['my_bound'] == 2 * measured['rho']).all()
        )
        assert np.isnan(logged['my_bound']).all()
        for column in set(COLUMNS) - {'my_bound', 'train_seconds', 'eval_seconds'}:
            assert np.array_equal(measured[column], logged[column][::2], equal_nan=True), column
        last = read_metrics(tmp_path / 'last' / 'CONV-3-4' / 'evaluation.csv')
        assert last['epoch'].tolist() == [6] and last['my_bound'][0] == measured['my_bound'][-1]

        after = contents(folder)
        new = {folder / name / 'evaluation.csv' for name in ('CONV-3-4', 'CONV-3-5')}
        assert set(after) - set(before) == new
        changed = {path.name for path in before if before[path] != after[path]}
        pictures = {
            f'{name}.{suffix}'
            for name in ('figure', 'bounds', 'sweep')
            for suffix in ('png', 'pdf')
        }
        assert changed == pictures | {'summary.csv'}
        succeeds('--results-path', folder, '--plot')
        assert contents(folder) == after
    finally:
        COLUMNS.remove('my_bound')


@pytest.mark.pictures
def test_evaluate_keeps_rows_whose_weights_are_gone_and_may_change_gamma(tmp_path):
    """The table says with which gamma, and a curve is of that of the training alone."""
    folder = tmp_path / 'run'
    train_small(folder, '--snapshot-every', '3')
    table = folder / 'CONV-3-4' / 'evaluation.csv'
    succeeds('--results-path', folder, '--evaluate')
    (folder / 'CONV-3-4' / 'snapshots' / '0-3.pt').unlink()
    stdout = succeeds('--results-path', folder, '--evaluate', '--gamma', '2')
    measured = read_metrics(table)
    assert measured['epoch'].tolist() == [0, 3, 6] and measured['gamma'].tolist() == [2, 1, 2]
    assert measured['delta'].tolist() == [0.001] * 3
    logged = read_metrics(folder / 'CONV-3-4' / 'metrics.csv')
    assert (
        measured['our_bound'][1] == logged['our_bound'][3]
        and measured['our_bound'][2] < logged['our_bound'][6]
    )
    assert f'{table}: rows with another delta or gamma' in stdout and 'differs' not in stdout
    ((_, shown),) = read_runs(folder, folder_settings(folder)[1])
    assert np.array_equal(shown['our_bound'], logged['our_bound'])
    assert 'give one value of gamma' in refused(
        '--results-path', folder, '--evaluate', '--gamma', '1', '2'
    )


@pytest.mark.parametrize('knob, value', [('label_noise', '0.1'), ('gamma', '2.0')])
def test_evaluate_refuses_what_a_resume_refuses(tmp_path, knob, value):
    """An edited settings file; the flag --gamma is the way to another gamma, which is then written down."""
    folder = tmp_path / 'run'
    train_small(folder, '--epochs', '1', '--snapshot-every', '1')
    path = folder / 'global_settings.py'
    path.write_text(re.sub(rf'^{knob} = \S+', f'{knob} = {value}', path.read_text(), flags=re.M))
    before = contents(folder)
    for option in ('--resume', '--evaluate'):
        assert f'was trained with {knob} = ' in refused('--results-path', folder, option)
    (folder / 'CONV-3-4' / 'model.pt').rename(tmp_path / 'model.pt')  # snapshots say it too
    assert f'was trained with {knob} = ' in refused('--results-path', folder, '--evaluate')
    (tmp_path / 'model.pt').rename(folder / 'CONV-3-4' / 'model.pt')
    assert contents(folder) == before


def test_folders_whose_names_no_command_could_take_and_links_in_a_circle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option in ('--results-dir=-x', '--results-path=-x/1', '--results-path=./-x'):
        assert 'must have no dash in front' in refused(*SMALL, option)
    (tmp_path / 'a').symlink_to('b')
    (tmp_path / 'b').symlink_to('a')
    status, _, stderr = run('--results-path', 'a', '--plot', cwd=tmp_path)
    assert (
        status == 1 and "'a/global_settings.py'; mend its links, which lead in a circle\n" in stderr
    )
    assert {path.name for path in tmp_path.iterdir()} == {'a', 'b'}


def test_weights_with_nan_are_refused_by_evaluate(tmp_path):
    train_small(tmp_path / 'run', '--epochs', '1')
    path = tmp_path / 'run' / 'CONV-3-4' / 'model.pt'
    checkpoint = load_checkpoint(path, 'cpu')
    next(iter(checkpoint['network'].values())).fill_(float('nan'))
    save_checkpoint(path, checkpoint)
    assert 'model.pt: its weights contain NaN or infinity' in refused(
        '--results-path', tmp_path / 'run', '--evaluate'
    )


def test_an_early_stop_is_said_and_shown(tmp_path):
    folder = tmp_path / 'run'
    stdout = train_small(
        folder, '--lr', '1e-9', '--early-stop-epoch', '3', '--early-stop-accuracy', '0.5'
    )
    reason = 'stopped at epoch 3: accuracy below 0.5'
    assert f'CONV-3-4: {reason}\n' in stdout and 'epoch 4/6' not in stdout
    assert re.search(
        rf'CONV-3-4 +finished .*{reason}', succeeds('--results-path', folder, '--status')
    )


def test_a_shipped_folder_is_for_reading(tmp_path):
    shutil.copytree(ROOT / 'results' / 'digits', tmp_path / 'digits')
    line = refused('--results-path', tmp_path / 'digits', '--resume')
    assert (
        'are for reading' in line
        and f'--settings {tmp_path}/digits/global_settings.py repeats them' in line
    )


def test_a_folder_with_a_settings_file_alone_is_launched_by_it(tmp_path):
    (tmp_path / 'global_settings.py').write_text(
        Path(SMALL[1]).read_text().replace('epochs = 6', 'epochs = 1')
    )
    succeeds('--results-path', tmp_path)
    assert (
        rows(tmp_path) == 2
        and 'python train.py --settings' in (tmp_path / 'global_settings.py').read_text()
    )


@pytest.mark.pictures
def test_only_the_last_task_of_a_sweep_draws(tmp_path):
    """A sweep of many networks would spend its time on pictures if each of its tasks drew them all."""
    train_small(tmp_path / 'run', '--width', '4', '5', '--epochs', '1', '--prepare')
    assert 'drew' not in resume(tmp_path / 'run', '--run', '2')
    assert 'drew' in resume(tmp_path / 'run', '--run', '1')


def test_a_bound_that_went_keeps_what_evaluate_measured_of_it(tmp_path, monkeypatch):
    folder, table = tmp_path / 'run', tmp_path / 'run' / 'CONV-3-4' / 'evaluation.csv'
    train_small(folder)
    COLUMNS.insert(COLUMNS.index('our_bound'), 'my_bound')
    monkeypatch.setitem(BOUNDS, 'my_bound', lambda *_: 2.5)
    succeeds('--results-path', folder, '--evaluate')
    COLUMNS.remove('my_bound')
    monkeypatch.delitem(BOUNDS, 'my_bound')
    succeeds('--results-path', folder, '--evaluate')
    assert read_metrics(table)['my_bound'].tolist() == [2.5]


def test_evaluate_says_where_weights_are_of_no_row(tmp_path):
    folder = tmp_path / 'run'
    process = start(*SMALL, '--epochs', '300', '--results-path', folder)
    wait_for(lambda: rows(folder) > 3, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    path = folder / 'CONV-3-4' / 'model.pt'
    checkpoint = load_checkpoint(path, 'cpu')
    save_checkpoint(path, checkpoint | {'place': None, 'state': checkpoint['state'] | {'step': 5}})
    stdout = succeeds('--results-path', folder, '--evaluate')
    assert f'{path}: its weights lie between two rows of the table' in stdout
    assert not (folder / 'CONV-3-4' / 'evaluation.csv').exists()


def test_evaluate_without_weights(tmp_path):
    train_small(tmp_path / 'run', '--prepare')
    assert 'CONV-3-4: has no weights yet' in succeeds(
        '--results-path', tmp_path / 'run', '--evaluate'
    )


# ----------------------------------------------------------------------------------------------------------------------
# Networks side by side
# ----------------------------------------------------------------------------------------------------------------------

SWEEP = ('--width', '4', '5', '--seed', '0', '1')
NETWORKS = [f'CONV-3-{width}-seed{seed}' for width in (4, 5) for seed in (0, 1)]


@pytest.fixture(scope='module')
def one_by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sweep') / 'run'
    train_small(folder, *SWEEP, '--epochs', '25', '--threads', '1')
    return folder


@pytest.mark.pictures
@pytest.mark.parametrize('how', ['SIGKILL', 'SIGTERM', 'Ctrl-C'])
def test_jobs_end_with_their_parent_and_go_on(tmp_path, one_by_one, how):
    folder = tmp_path / 'run'
    flags = ('--epochs', '25', '--jobs', '2', '--results-path', folder)
    process = start(*SMALL, *SWEEP, *flags, start_new_session=True)
    wait_for(lambda: min(rows(folder, name) for name in NETWORKS[:2]) > 3, process, 120)
    if how == 'Ctrl-C':  # the terminal sends it to all processes of the group
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.Signals[how])
    _, stderr = process.communicate(timeout=60)
    number = signal.SIGINT if how == 'Ctrl-C' else signal.Signals[how]
    assert process.returncode == (-9 if how == 'SIGKILL' else 128 + number)
    go_on = f'go on with: python train.py --results-path {folder} --resume\n'
    assert stderr == ('' if how == 'SIGKILL' else f'train.py: stopped by {number.name}; {go_on}')
    for name in NETWORKS[:2]:
        with locked(folder / name / '.lock', seconds=10) as ended:
            assert ended
    begun = [name for name in NETWORKS if rows(folder, name) > 0]
    stopped = [load_checkpoint(folder / name / 'model.pt', 'cpu')['state'] for name in begun]
    assert any(rows(folder, name) < 26 for name in NETWORKS)
    for state, name in zip(
        stopped, begun
    ):  # a child whose parent is killed may end between a row and its checkpoint
        assert rows(folder, name) - len(state['lines']) in ((0, 1) if how == 'SIGKILL' else (0,))
    if how == 'SIGKILL':
        status, stdout, stderr = run('--results-path', folder, '--resume')
        assert (status, stderr) == (0, '') and 'finished already' in resume(folder, '--jobs', '1')
    else:
        resume(folder, '--jobs', '1')
    assert all(same(folder, one_by_one, name) for name in NETWORKS)
    assert (folder / 'summary.csv').read_bytes().count(b'\n') == 1 + 4 and (
        folder / 'sweep.png'
    ).exists()


def test_jobs_that_say_nothing_end_with_their_parent_too(tmp_path):
    folder, flags = (
        tmp_path / 'run',
        ('--width', '4', '5', '--epochs', '3000', '--eval-every', '3000', '--jobs', '2'),
    )
    process = start(*SMALL, *flags, '--results-path', folder)
    wait_for(lambda: len(list(folder.glob('*/model.pt'))) == 2, process)
    process.kill()
    process.communicate()
    for name in ('CONV-3-4', 'CONV-3-5'):
        with locked(folder / name / '.lock', seconds=10) as ended:
            assert ended


def test_a_job_that_is_killed_is_named(tmp_path):
    """As by the kernel for want of memory; the line that goes on with it is that of the other network, which is whole."""
    folder = tmp_path / 'run'
    process = start(
        *SMALL, '--width', '4', '5', '--epochs', '40', '--jobs', '2', '--results-path', folder
    )
    wait_for(lambda: rows(folder, 'CONV-3-5') > 2 and rows(folder, 'CONV-3-4') > 2, process)
    children = Path(f'/proc/{process.pid}/task')
    pids = [
        int(pid) for task in children.iterdir() for pid in (task / 'children').read_text().split()
    ]
    second = [pid for pid in pids if b'--run=2' in Path(f'/proc/{pid}/cmdline').read_bytes()]
    os.kill(second[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and stderr.count('\n') == 1
    assert 'CONV-3-5: its process was ended by SIGKILL' in stderr
    assert f'--results-path {folder} --resume --run 2' in stderr
    assert rows(folder) == 41 and rows(folder, 'CONV-3-5') < 41


def test_the_command_that_goes_on_can_be_given_where_it_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert resuming(Path('results/1')) == 'python train.py --results-path results/1 --resume'
    monkeypatch.chdir(tmp_path)
    assert (
        resuming(Path('a b'))
        == f"python {shlex.quote(str(ROOT / 'train.py'))} --results-path 'a b' --resume"
    )


def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    folder = tmp_path / 'run'
    status, stdout, _ = run(
        *SMALL, '--lr', '0.01', '1e9', '0.02', '--jobs', '2', '--results-path', folder
    )
    assert status == 1 and 'CONV-3-4-lr1000000000.0: the loss became NaN or infinite' in stdout
    assert [rows(folder, f'CONV-3-4-lr{lr}') for lr in (0.01, 1e9, 0.02)] == [7, 1, 7]
    assert '\nthreads = 1 ' in (folder / 'global_settings.py').read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Odd environments: a clear line or nothing, never a traceback
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'flags', [(), ('--plot',), ('--status',), ('--resume',), ('--seed', '0', '1', '--jobs', '2')]
)
def test_paths_that_the_locale_cannot_print(tmp_path, uninterrupted, flags):
    folder, arguments = tmp_path / 'größe-π', flags
    if len(flags) == 1:
        shutil.copytree(uninterrupted, folder)
    else:
        arguments = (*SMALL, '--epochs', '1', *flags)
    environment = os.environ | {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    status, _, stderr = run(*arguments, '--results-path', folder, env=environment)
    assert (status, stderr) == (0, '')
    assert (folder / 'figure.png').exists() and len(list(folder.glob('CONV-*/model.pt'))) == max(
        1, len(flags) - 3
    )


@pytest.mark.parametrize('close', ['>&-', '>&- 2>&-', '| true'])
def test_an_output_that_is_closed(tmp_path, close):
    """Nobody listens; what is trained is there all the same, or can be gone on with."""
    command = [
        sys.executable,
        str(ROOT / 'train.py'),
        *SMALL,
        '--results-path',
        str(tmp_path / 'run'),
    ]
    done = subprocess.run(
        ['sh', '-c', f'"$@" {close}', 'sh', *command], stderr=subprocess.PIPE, text=True
    )
    assert (
        'Traceback' not in done.stderr
        and 'Exception' not in done.stderr
        and done.stderr.count('\n') <= 1
    )
    assert rows(tmp_path / 'run') == 7 or close == '| true'
    resume(tmp_path / 'run')
    assert rows(tmp_path / 'run') == 7


@pytest.mark.parametrize('name', ['-run', 'a\nb'])
def test_names_of_folders_that_would_mislead(name):
    assert '--results-path' in refused(*SMALL, f'--results-path={name}')


@pytest.mark.parametrize('program', ['train.py', 'compress.py', 'coded.py'])
def test_an_interrupt_while_torch_is_imported(tmp_path, program):
    """No traceback: the program has not begun."""
    command = [
        sys.executable,
        ROOT / program,
        *((*SMALL, '--results-path') if program == 'train.py' else ()),
        tmp_path / 'run',
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: b'torch' in Path(f'/proc/{process.pid}/maps').read_bytes(), process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and stderr == '' and not (tmp_path / 'run').exists()
