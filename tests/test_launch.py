"""The command line around the trainings: folders, resumes, sweeps, jobs, --status and --plot."""

import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

import train
from conf import load_settings
from records import is_locked, lock, new_results_folder, read_metrics, rows_of, write_table


@pytest.mark.process
@pytest.mark.pictures
def test_a_sweep_leaves_its_networks_and_figures(tmp_path):
    folder = tmp_path / '1'
    flags = ('--depth', '2', '3', '--width', '8', '16', '--epochs', '5')
    assert f'drew {folder}/figure.png' in run(*SMALL, *flags, '--results-dir', tmp_path)[1]
    names = [f'CONV-{depth}-{width}' for depth in (2, 3) for width in (8, 16)]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(names)
    assert all(rows(folder, name) == 6 for name in names)
    pictures = [f'{name}.{kind}' for name in ('figure', 'sweep') for kind in ('png', 'pdf')]
    assert all((folder / name).exists() for name in pictures)
    assert (folder / 'summary.csv').read_text().count('\n') == 1 + 4

    (folder / 'figure.png').unlink()
    shutil.rmtree(folder / names[3])
    succeeds('--results-path', folder, '--plot')
    assert (folder / 'figure.png').exists()
    again = tmp_path / 'again'
    succeeds('--settings', folder / 'global_settings.py', '--results-path', again)
    assert all(rows(again, name) == 6 for name in names) and same(folder, again, names[0])


def test_one_network_of_a_sweep(tmp_path):
    stdout = train_small(tmp_path / 'run', '--width', '4', '5', '--run', '2')
    assert 'CONV-3-5' in stdout and not (tmp_path / 'run' / 'CONV-3-4').exists()
    resume(tmp_path / 'run')
    assert rows(tmp_path / 'run') == rows(tmp_path / 'run', 'CONV-3-5') == 7


def test_prepare_makes_the_folder_and_trains_nothing(tmp_path):
    stdout = train_small(tmp_path / 'run', '--width', '4', '5', '--prepare')
    assert stdout == f'2 {tmp_path / "run"}\n'
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['global_settings.py']


def test_a_launch_takes_a_new_or_an_empty_folder(tmp_path, uninterrupted):
    train_small(tmp_path, '--epochs', '1')
    assert rows(tmp_path) == 2
    before = contents(uninterrupted)
    assert 'exists; add --resume' in refused(*SMALL, '--results-path', uninterrupted)
    assert contents(uninterrupted) == before


def test_simultaneous_launches_get_a_folder_each(tmp_path):
    (tmp_path / '7').mkdir()
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_results_folder(tmp_path).name, range(32)))
    assert sorted(map(int, folders)) == list(range(8, 40))


@pytest.mark.process
def test_it_works_from_any_folder_and_data_dir_of_the_environment_wins(tmp_path):
    make_idx(tmp_path / 'there')
    (tmp_path / 'here').mkdir()
    environment = os.environ | {'DATA_DIR': str(tmp_path / 'there')}
    flags = '--dataset-name MNIST --epochs 1 --data-dir gone --results-dir mine'.split()
    status, stdout, stderr = run(*SMALL, *flags, cwd=tmp_path / 'here', env=environment)
    assert (status, stderr) == (0, '') and 'MNIST, 70 training and 20 test images' in stdout
    assert rows(tmp_path / 'here' / 'mine' / '1') == 2


@pytest.mark.process
def test_no_study_and_no_matplotlib_is_loaded_to_train():
    code = 'import sys, train; print([name for name in sys.modules if "matplotlib" in name'
    code += ' or name.startswith("studies")])'
    command = [sys.executable, '-c', code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).stdout == b'[]\n'


@pytest.mark.process
@pytest.mark.pictures
def test_a_picture_that_fails_changes_no_exit_status(tmp_path):
    (tmp_path / 'modules').mkdir()
    (tmp_path / 'modules' / 'matplotlib.py').write_text('raise ModuleNotFoundError(name="x")')
    environment = os.environ | {'PYTHONPATH': str(tmp_path / 'modules')}
    flags = ('--epochs', '1', '--results-path', tmp_path / 'run')
    status, _, stderr = run(*SMALL, *flags, env=environment)
    assert status == 0 and stderr.count('\n') == 1 and 'no figure: ' in stderr
    assert rows(tmp_path / 'run') == 2


@pytest.mark.parametrize('close', ['>&-', '| true'])
@pytest.mark.process
def test_an_output_that_is_closed(tmp_path, close):
    command = [sys.executable, ROOT / 'train.py', *SMALL, '--results-path', tmp_path / 'run']
    shell = ['sh', '-c', f'"$@" {close}', 'sh', *map(str, command)]
    stderr = subprocess.run(shell, stderr=subprocess.PIPE, text=True).stderr
    assert 'Traceback' not in stderr
    resume(tmp_path / 'run')
    assert rows(tmp_path / 'run') == 7


# ------------------------------------------------------------------------------------------------
# Resumes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--width 8', 'keeps the setting width; only epochs'),
        ('--lr 0.1', 'keeps the setting lr'),
        ('--dataset-name MNIST', 'keeps the setting dataset_name'),
        ('--epochs 7 8', 'keeps the networks of'),
        ('--epochs 2', 'epochs = 2: a run cannot become shorter'),
        ('--epochs 8 --run 1', 'cannot change with --run'),
    ],
)
def test_a_resume_that_would_change_what_was_done_is_refused(uninterrupted, flags, message):
    before = contents(uninterrupted)
    assert message in refused('--results-path', uninterrupted, '--resume', *flags.split())
    assert contents(uninterrupted) == before


def test_a_sweep_over_epochs_keeps_them(tmp_path):
    train_small(tmp_path / 'run', '--epochs', '1', '2')
    flags = ('--results-path', tmp_path / 'run', '--resume', '--epochs', '4')
    assert 'keeps the sweep over epochs; leave the flag out' in refused(*flags)


@pytest.mark.parametrize(
    'kind', ['--prune-rounds 1', '--density 0.5 --initial-mask random --regrow random']
)
def test_rounds_and_regrowth_keep_their_epochs(tmp_path, kind):
    train_small(tmp_path / 'run', '--epochs', '1', *kind.split())
    before = contents(tmp_path / 'run')
    flags = ('--results-path', tmp_path / 'run', '--resume', '--epochs', '2')
    assert 'cannot change with rounds or regrowth' in refused(*flags)
    assert contents(tmp_path / 'run') == before


def test_a_resume_keeps_where_a_launch_came_from(tmp_path):
    train_small(tmp_path / 'run', '--epochs', '1')
    path = tmp_path / 'run' / 'global_settings.py'
    path.write_text(path.read_text().replace('torch ', 'torch of last year ', 1))
    first = path.read_text().partition('\n\n')[0]
    for epochs in (2, 3):
        resume(tmp_path / 'run', '--epochs', epochs)
    header = path.read_text().partition('\n\n')[0]
    assert header.startswith(first + '\n# resumed with epochs = 2\n# date: 20')
    assert '\n# resumed with epochs = 3\n# date: 20' in header
    for word in ('device', 'commit', 'versions'):
        assert header.count(f'# {word}: ') == 3
    assert load_settings(path)[0]['epochs'] == 3


# ------------------------------------------------------------------------------------------------
# What reads a folder
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('option', ['--plot', '--status'])
def test_reading_something_else_is_refused(uninterrupted, option):
    line = refused('--results-path', uninterrupted / 'CONV-3-4', option)
    assert (
        f'not a results folder, it has no global_settings.py; did you mean {uninterrupted}?' in line
    )
    line = refused('--results-path', uninterrupted, option, '--epochs', '9')
    assert f'{option} takes no setting; leave --epochs out' in line


def test_status(tmp_path):
    """Four networks: finished, one that a process holds, an unfinished one, one never begun."""
    folder = tmp_path / 'run'
    train_small(folder, '--width', '4', '5', '6', '--epochs', '3')
    errors = []
    for width, kept in ((4, 4), (5, 2), (6, 3)):
        path = folder / f'CONV-3-{width}' / 'metrics.csv'
        table = read_metrics(path)
        write_table(path, table, rows_of(table)[:kept])
        errors.append(f'{table["test_error"][kept - 1]:.4f}')
    path = folder / 'global_settings.py'
    path.write_text(path.read_text().replace('[4, 5, 6]', '[4, 5, 6, 7]'))
    with lock(folder / 'CONV-3-5'):
        before = contents(folder)
        header, *lines = succeeds('--results-path', folder, '--status').splitlines()
        assert contents(folder) == before
    assert header.split() == 'network state round epoch test error last written'.split()
    expected = [('4', 'finished', '3/3'), ('5', 'running', '1/3'), ('6', 'unfinished', '2/3')]
    for line, (width, state, epoch), error in zip(lines, expected, errors):
        pattern = rf'CONV-3-{width} +{state} +0 +{epoch} +{error}  20\d\d-\d\d-\d\d \d\d:\d\d'
        assert re.fullmatch(pattern, line), line
    assert lines[3].split() == ['CONV-3-7', 'unfinished'] and len(lines) == 4


def test_only_the_last_task_of_a_sweep_draws(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train, 'draw_figures', drawn.append)
    train_small(tmp_path / 'run', '--width', '4', '5', '--epochs', '1', '--prepare')
    resume(tmp_path / 'run', '--run', '2')
    assert not drawn
    resume(tmp_path / 'run', '--run', '1')
    assert drawn == [tmp_path / 'run']


# ------------------------------------------------------------------------------------------------
# Networks side by side
# ------------------------------------------------------------------------------------------------

SWEEP = ('--width', '4', '5', '--seed', '0', '1', '--epochs', '25')
NETWORKS = [f'CONV-3-{width}-seed{seed}' for width in (4, 5) for seed in (0, 1)]


@pytest.fixture(scope='module')
def one_by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sweep') / 'run'
    train_small(folder, *SWEEP, '--threads', '1')
    return folder


def unlocked(folder):
    return all(not is_locked(folder / name) for name in NETWORKS if (folder / name).is_dir())


@pytest.mark.process
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_jobs_stop_with_their_parent_and_continue(tmp_path, one_by_one, number):
    folder = tmp_path / 'run'
    flags = ('--jobs', '2', '--results-path', folder)
    process = start(*SMALL, *SWEEP, *flags, start_new_session=True)
    wait_for(lambda: min(rows(folder, name) for name in NETWORKS[:2]) > 3, process, 120)
    if number == signal.SIGINT:  # a terminal sends it to all processes of the group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    for _ in range(1000):
        if unlocked(folder):
            break
        signal.sigtimedwait([], 0.02)
    assert unlocked(folder)
    assert any(rows(folder, name) < 26 for name in NETWORKS)
    status, _, stderr = run('--results-path', folder, '--resume')
    assert (status, stderr) == (0, '')
    assert all(same(folder, one_by_one, name) for name in NETWORKS)


@pytest.mark.process
def test_a_job_that_is_killed_is_named_and_the_others_are_trained(tmp_path):
    """As by the kernel when memory runs out."""
    folder = tmp_path / 'run'
    flags = ('--width', '4', '5', '--epochs', '40', '--jobs', '2', '--results-path', folder)
    process = start(*SMALL, *flags)
    wait_for(lambda: rows(folder, 'CONV-3-5') > 2, process)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    for pid in children:
        if b'--run=2' in Path(f'/proc/{pid}/cmdline').read_bytes():
            os.kill(int(pid), signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and stderr.count('\n') == 1
    assert 'CONV-3-5: its process was killed by SIGKILL; continue with: python' in stderr
    assert rows(folder) == 41 and rows(folder, 'CONV-3-5') < 41


@pytest.mark.process
def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    folder = tmp_path / 'run'
    flags = ('--lr', '0.01', '1e9', '0.02', '--jobs', '2', '--results-path', folder)
    status, _, stderr = run(*SMALL, *flags)
    assert status == 1 and 'CONV-3-4-lr1000000000.0: the loss became NaN or infinite' in stderr
    assert [rows(folder, f'CONV-3-4-lr{lr}') for lr in (0.01, 1e9, 0.02)] == [7, 1, 7]
    assert '\nthreads = 1 ' in (folder / 'global_settings.py').read_text()


def test_the_command_that_continues_is_quoted(tmp_path, monkeypatch):
    folder = tmp_path / 'a b'
    monkeypatch.setattr(sys, 'argv', ['my path/train.py'])
    train_small(folder, '--epochs', '1')
    command = f"python 'my path/train.py' --results-path '{folder}' --resume"
    assert train.resume_hint == f'; continue with: {command}'
