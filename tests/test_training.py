"""What a user relies on when a network is trained, through the program as a user starts it."""

import ctypes
import fcntl
import os
import pickle
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, numbers, rows, run, same, settings_of, start

import train
from conf import load_settings
from records import COLUMNS, load_checkpoint, read_metrics, save_checkpoint


def launch(folder, *arguments, **options):
    status, stdout, stderr = run(*SMALL, '--results-path', folder, *arguments, **options)
    assert (status, stderr) == (0, ''), stderr
    return stdout


def resume(folder, *arguments):
    status, stdout, stderr = run('--results-path', folder, '--resume', *arguments)
    assert (status, stderr) == (0, ''), stderr
    return stdout


@pytest.fixture(scope='session')
def uninterrupted(tmp_path_factory):
    """The small run to its end, without an interruption."""
    folder = tmp_path_factory.mktemp('uninterrupted') / 'run'
    launch(folder)
    return folder


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.002)


def test_quick_start(tmp_path):
    status, stdout, stderr = run('--settings', 'conf/digits.py', '--results-dir', tmp_path / 'results', cwd=ROOT)
    assert (status, stderr) == (0, '')
    folder = tmp_path / 'results' / '1'
    left = {str(path.relative_to(folder)) for path in folder.rglob('*') if not path.name.startswith('.')}
    files = {'CONV-3-32/metrics.csv', 'CONV-3-32/model.pt', 'figure.png', 'global_settings.py'}
    assert left == files | {'CONV-3-32'}
    table = read_metrics(folder / 'CONV-3-32' / 'metrics.csv')
    assert list(table) == COLUMNS
    assert table['epoch'].tolist() == list(range(151))
    assert table['test_error'][-1] < 0.10 < 0.8 < table['test_error'][0]
    assert table['train_seconds'].sum() < 60
    assert (table['generalization_gap'] == table['test_error'] - table['train_error']).all()
    assert stdout.count('\n') == 1 + 151 + 1  # a plain line per epoch where the output is no terminal
    assert re.search(r'CONV-3-32 epoch 150/150 .* test 0\.0\d+ .*our 2\^\d', stdout)
    assert (folder / 'figure.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    header = (folder / 'global_settings.py').read_text()
    for word in ('# date: 20', 'Python 3.', f'torch {torch.__version__}', 'device: cpu', '# commit: '):
        assert word in header
    loaded = load_checkpoint(folder / 'CONV-3-32' / 'model.pt', 'cpu')
    assert loaded['state']['epoch'] == 151


def test_metrics_are_those_of_the_network_that_is_left(uninterrupted, digits):
    """The last row, computed anew from the checkpoint without the training program."""
    from models import get_network
    from measures.norms import classification_margins, margin_error, measure_data
    from utils import evaluate_bounds

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
    launch(tmp_path / 'run', '--epochs', '2', '--milestones', '1')
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
    assert read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')['train_loss'][-1] == pytest.approx(loss, rel=1e-4)


def test_sweep_leaves_four_runs_and_one_figure(tmp_path):
    image = pytest.importorskip('matplotlib.image')
    arguments = ('--settings', 'conf/digits.py', '--depth', '2', '3', '--width', '8', '16', '--epochs', '5')
    status, stdout, stderr = run(*arguments, '--results-dir', tmp_path, cwd=ROOT)
    assert (status, stderr) == (0, '')
    names = [f'CONV-{depth}-{width}' for depth in (2, 3) for width in (8, 16)]
    assert {path.name for path in (tmp_path / '1').iterdir() if path.is_dir()} == set(names)
    assert all(rows(tmp_path / '1', name) == 6 for name in names)
    height, width, _ = image.imread(tmp_path / '1' / 'figure.png').shape
    assert (height, width) == (2 * 468, 2 * 546 + 338)  # pixels of four panels in two rows and of the legend

    (tmp_path / '1' / 'figure.png').unlink()
    shutil.rmtree(tmp_path / '1' / names[3])
    status, stdout, stderr = run('--results-path', tmp_path / '1', '--plot')
    assert (status, stderr) == (0, '') and (tmp_path / '1' / 'figure.png').exists()

    status, stdout, stderr = run('--settings', tmp_path / '1' / 'global_settings.py', '--results-path', tmp_path / 'again')
    assert status == 0 and all(rows(tmp_path / 'again', name) == 6 for name in names)
    assert same(tmp_path / '1', tmp_path / 'again', names[0])


def test_one_network_of_a_sweep(tmp_path):
    stdout = launch(tmp_path / 'run', '--width', '4', '5', '--run', '2')
    assert 'CONV-3-5' in stdout and not (tmp_path / 'run' / 'CONV-3-4').exists()
    resume(tmp_path / 'run')
    assert rows(tmp_path / 'run') == rows(tmp_path / 'run', 'CONV-3-5') == 7


def test_prepare_makes_the_folder_and_trains_nothing(tmp_path):
    stdout = launch(tmp_path / 'run', '--width', '4', '5', '--prepare')
    assert stdout == f'2 {tmp_path / "run"}\n'
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['global_settings.py']


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
    assert stderr == f'train.py: stopped by {number.name}; go on with: python train.py --results-path {folder} --resume\n'
    assert rows(folder) < 7
    assert re.search(r'CONV-3-4: goes on in epoch [3-6] after \d+ of its \d+ steps\n', resume(folder))
    assert same(folder, uninterrupted)
    assert 'finished already' in resume(folder)
    assert same(folder, uninterrupted)


@pytest.mark.parametrize('seed', range(3))
def test_resume_after_kills(tmp_path, seed):
    """SIGKILL at random moments, again and again and ever later, until a resume gets to the end."""
    chance, folder = random.Random(seed), tmp_path / 'run'
    launch(tmp_path / 'whole', '--epochs', '40')
    for kills in range(20):
        resumed = (folder / 'global_settings.py').exists()
        process = start(*(('--resume',) if resumed else (*SMALL, '--epochs', 40)), '--results-path', folder)
        try:
            _, stderr = process.communicate(timeout=chance.uniform(1, 3 + kills))
            assert (process.returncode, stderr) == (0, '')
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    assert kills >= 1
    assert same(folder, tmp_path / 'whole')


def test_resume_to_more_epochs(tmp_path, uninterrupted):
    launch(tmp_path / 'run', '--epochs', '3')
    resume(tmp_path / 'run', '--epochs', '6')
    assert same(tmp_path / 'run', uninterrupted)
    assert load_settings(tmp_path / 'run' / 'global_settings.py')[0]['epochs'] == 6


def test_launches_at_once_get_a_folder_each(tmp_path, uninterrupted):
    processes = [start(*SMALL, '--results-dir', tmp_path) for _ in range(8)]
    for process in processes:
        assert process.communicate(timeout=120)[1] == '' and process.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == list('12345678')
    assert all(same(tmp_path / number, uninterrupted) for number in '12345678')


def test_two_resumes_of_one_run_do_not_both_write(tmp_path, uninterrupted):
    folder = tmp_path / 'run'
    first = start(*SMALL, '--epochs', '400', '--results-path', folder)
    wait_for(lambda: rows(folder) == 2, first)
    status, _, stderr = run('--results-path', folder, '--resume')
    assert status == 2 and stderr.count('\n') == 1 and 'another process is training this network' in stderr
    first.kill()
    first.communicate()
    process = start('--results-path', folder, '--resume')  # the killed process left no lock behind
    before = rows(folder)
    wait_for(lambda: rows(folder) > before + 1, process)
    process.terminate()
    process.communicate()


def damaged(folder):
    """Each way in which a checkpoint can be wrong: (what is done to it, what the refusal says)."""
    path = folder / 'CONV-3-4' / 'model.pt'
    content, checkpoint = path.read_bytes(), load_checkpoint(path, 'cpu')

    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {folder / "evil"}',)

    def wide():
        other = dict(checkpoint, network={name: weight.repeat(2, *[1] * (weight.dim() - 1)) for name, weight in
                                          checkpoint['network'].items() if weight.dim()})  # fmt: skip
        save_checkpoint(path, other)

    yield lambda: path.write_bytes(content[: len(content) // 2]), 'damaged'
    yield lambda: path.write_bytes(b''), 'damaged'
    yield lambda: path.write_bytes(b'no checkpoint'), 'damaged'
    yield lambda: path.write_bytes(pickle.dumps(Evil())), 'damaged'
    yield lambda: torch.save({'format': Evil()}, path), 'damaged'
    yield lambda: torch.save([1, 2], path), 'format None'
    yield lambda: torch.save(checkpoint | {'format': 99}, path), 'format 99'
    yield lambda: torch.save({'format': 1}, path), 'not a checkpoint of CONV-3-4'
    yield lambda: save_checkpoint(path, checkpoint | {'state': {}}), 'not a checkpoint of CONV-3-4'
    yield lambda: save_checkpoint(path, checkpoint | {'momentum': {0: {'momentum_buffer': torch.ones(3)}}}), 'not a checkpoint'
    yield lambda: save_checkpoint(path, checkpoint | {'settings': checkpoint['settings'] | {'lr': 1.0}}), 'lr = 1.0, not 0.01'
    state = checkpoint['state']
    for wrong in ({'epoch': '3'}, {'epoch': -2}, {'step': 10**9}, {'step': None}, {'lines': []}, {'lines': ['1,2']},
                  {'lines': [3]}, {'train_seconds': 'x'}, {'recent_errors': [None]}):  # fmt: skip
        yield lambda wrong=wrong: save_checkpoint(path, checkpoint | {'state': state | wrong}), 'not a checkpoint'
    yield lambda: save_checkpoint(path, checkpoint | {'momentum': {}}), 'not a checkpoint'
    nan = {name: weight * float('nan') for name, weight in checkpoint['network'].items()}
    yield lambda: save_checkpoint(path, checkpoint | {'network': nan}), 'not a checkpoint'
    yield lambda: save_checkpoint(path, checkpoint | {'state': state | {'columns': COLUMNS[1:]}}), 'other columns'
    yield wide, 'not a checkpoint of CONV-3-4'
    yield path.unlink, 'is missing'


def test_wrong_checkpoints_are_refused(tmp_path, uninterrupted, capsys):
    folder = tmp_path / 'run'
    shutil.copytree(uninterrupted, folder)
    logged = numbers(folder / 'CONV-3-4' / 'metrics.csv')
    for damage, message in damaged(folder):
        damage()
        assert train.main(['--results-path', str(folder), '--resume', '--epochs', '8']) == 2
        _, stderr = capsys.readouterr()
        assert message in stderr and 'model.pt' in stderr and stderr.count('\n') == 1
        assert numbers(folder / 'CONV-3-4' / 'metrics.csv') == logged and not (folder / 'evil').exists()


@pytest.mark.parametrize('flag', [('--width', '8'), ('--lr', '0.1'), ('--dataset-name', 'MNIST')])
def test_resume_with_other_settings_is_refused(uninterrupted, flag):
    status, _, stderr = run('--results-path', uninterrupted, '--resume', *flag)
    assert status == 2 and stderr.count('\n') == 1 and flag[0][2:].replace('-', '_') in stderr


@pytest.mark.parametrize(
    'flags, message',
    [(('--epochs', '7', '8'), 'keeps the runs of the sweep'), (('--epochs', '2'), 'can only be made longer than 6'),
     (('--epochs', '8', '--run', '1'), 'cannot change with --run')],
)  # fmt: skip
def test_resume_that_would_change_what_was_done_is_refused(tmp_path, uninterrupted, capsys, flags, message):
    folder = tmp_path / 'run'
    shutil.copytree(uninterrupted, folder)
    assert train.main(['--results-path', str(folder), '--resume', *flags]) == 2
    _, stderr = capsys.readouterr()
    assert message in stderr and stderr.count('\n') == 1
    assert (folder / 'global_settings.py').read_text() == (uninterrupted / 'global_settings.py').read_text()


@pytest.mark.parametrize(
    'path, arguments, message',
    [('CONV-3-4', ['--plot'], 'has no global_settings.py; name '), ('', ['--plot', '--run', '1'], 'leave --run out')],
)
def test_plot_of_something_else_is_refused(uninterrupted, capsys, path, arguments, message):
    assert train.main(['--results-path', str(uninterrupted / path), *arguments]) == 2
    _, stderr = capsys.readouterr()
    assert message in stderr and stderr.count('\n') == 1


@pytest.mark.parametrize('damage', [b'\xff\xfe', b'epoch,lr\n1,2\n', b'a,b\nx,y\n'])
def test_plot_of_a_damaged_table_names_it(tmp_path, uninterrupted, capsys, damage):
    folder = tmp_path / 'run'
    shutil.copytree(uninterrupted, folder)
    (folder / 'CONV-3-4' / 'metrics.csv').write_bytes(damage)
    assert train.main(['--results-path', str(folder), '--plot']) == 2
    _, stderr = capsys.readouterr()
    assert 'metrics.csv' in stderr and stderr.count('\n') == 1


def test_launch_into_an_empty_folder(tmp_path):
    launch(tmp_path, '--epochs', '1')
    assert rows(tmp_path) == 2


def test_a_figure_that_fails_loses_nothing(tmp_path):
    stdout = launch(tmp_path / 'run', '--epochs', '1', env=os.environ | {'MPLBACKEND': 'bogus'})
    assert 'no figure was drawn' in stdout and rows(tmp_path / 'run') == 2


def test_resume_with_an_edited_settings_file_is_refused(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted, tmp_path / 'run')
    path = tmp_path / 'run' / 'global_settings.py'
    path.write_text(path.read_text().replace('\nlr = 0.01', '\nlr = 0.02'))
    status, _, stderr = run('--results-path', tmp_path / 'run', '--resume')
    assert status == 2 and stderr.count('\n') == 1 and 'was trained with lr = 0.01, not 0.02' in stderr


def test_launch_into_an_existing_folder_is_refused(uninterrupted):
    status, _, stderr = run(*SMALL, '--results-path', uninterrupted)
    assert status == 2 and stderr.count('\n') == 1 and 'add --resume' in stderr


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    folder = tmp_path / 'run'
    status, stdout, stderr = run(*SMALL, '--lr', '1e9', '0.01', '--results-path', folder)
    assert status == 1 and stderr.count('\n') == 1 and 'the loss became NaN or infinite' in stderr and 'lr' in stderr
    kept = load_checkpoint(folder / 'CONV-3-4-lr1000000000.0' / 'model.pt', 'cpu')
    assert all(weight.isfinite().all() for weight in kept['network'].values())
    assert len(kept['state']['lines']) == rows(folder, 'CONV-3-4-lr1000000000.0') == 1
    assert rows(folder, 'CONV-3-4-lr0.01') == 7  # the rest of the sweep is trained all the same


def test_torn_last_line_of_metrics(tmp_path, uninterrupted):
    folder = tmp_path / 'run'
    launch(folder, '--epochs', '3')
    path = folder / 'CONV-3-4' / 'metrics.csv'
    path.write_text(path.read_text() + '4,0.01,0.0')
    assert len(read_metrics(path)['epoch']) == 4
    assert run('--results-path', folder, '--plot')[0] == 0
    resume(folder, '--epochs', '6')
    assert same(folder, uninterrupted)


def test_periods(tmp_path, uninterrupted):
    folder = tmp_path / 'run'
    launch(folder, '--epochs', '5', '--eval-every', '2', '--checkpoint-every', '3')
    table, every = (read_metrics(path / 'CONV-3-4' / 'metrics.csv') for path in (folder, uninterrupted))
    assert table['epoch'].tolist() == [0, 2, 4, 5]
    assert table['our_bound'].tolist() == every['our_bound'][[0, 2, 4, 5]].tolist()


def test_early_stopping(tmp_path):
    flags = ('--early-stop-epoch', '4', '--early-stop-accuracy', '0.5', '--checkpoint-every', '100')
    launch(tmp_path / 'run', '--lr', '1e-9', *flags)
    assert read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')['epoch'].tolist() == [0, 1, 2, 3, 4]
    assert load_checkpoint(tmp_path / 'run' / 'CONV-3-4' / 'model.pt', 'cpu')['state']['epoch'] == 5
    assert 'finished already' in resume(tmp_path / 'run')
    assert rows(tmp_path / 'run') == 5


@pytest.mark.parametrize('flags', [('--loss', 'CE'), ('--loss', 'L1'), ('--normalize', 'True'), ('--precision', 'bf16')])
def test_other_settings_learn_too(tmp_path, flags):
    launch(tmp_path / 'run', '--epochs', '20', '--width', '8', '--lr', '0.05', *flags)
    table = read_metrics(tmp_path / 'run' / 'CONV-3-8' / 'metrics.csv')
    assert table['train_loss'][-1] < 0.95 * table['train_loss'][0]
    assert 'L1' in flags or table['train_error'][-1] < 0.5  # the mean absolute error is content with zeros for a long time


def test_full_disk(tmp_path, uninterrupted):
    """A small tmpfs fills up in the middle of a run; the last checkpoint stays, and resuming works once there is room."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k', 'none', disk], capture_output=True).returncode:
        pytest.skip('mounting a tmpfs takes root')
    try:
        folder = disk / 'run'
        process = start(*SMALL, '--results-path', folder)
        wait_for(lambda: rows(folder) >= 2, process)
        filler = disk / 'filler'
        with pytest.raises(OSError), open(filler, 'wb', buffering=0) as file:
            while True:
                file.write(bytes(1024))
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1 and stderr.count('\n') == 1 and 'No space left on device' in stderr
        assert load_checkpoint(folder / 'CONV-3-4' / 'model.pt', 'cpu')['state']['epoch'] >= 1
        assert not list(folder.rglob('*.tmp'))
        filler.unlink()
        subprocess.run(['mount', '-o', 'remount,size=10m', disk], check=True)
        resume(folder)
        assert same(folder, uninterrupted)
    finally:
        subprocess.run(['umount', '-l', disk], check=True)


def test_deleted_results_folder(tmp_path):
    process = start(*SMALL, '--epochs', '500', '--results-path', tmp_path / 'run')
    wait_for(lambda: rows(tmp_path / 'run') >= 2, process)
    (tmp_path / 'run').rename(tmp_path / 'elsewhere')
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr.count('\n') == 1 and 'No such file or directory' in stderr
    assert load_checkpoint(tmp_path / 'elsewhere' / 'CONV-3-4' / 'model.pt', 'cpu')['state']['epoch'] >= 2


def obey_permissions():
    """Takes from a process of root, on its start, the capability to write what is read-only."""
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)


def test_folder_that_becomes_read_only(tmp_path, uninterrupted):
    folder = tmp_path / 'run'
    process = start(*SMALL, '--results-path', folder, preexec_fn=obey_permissions)
    wait_for(lambda: rows(folder) >= 2, process)
    (folder / 'CONV-3-4').chmod(0o555)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr.count('\n') == 1 and 'Permission denied' in stderr and '--resume' in stderr
    assert load_checkpoint(folder / 'CONV-3-4' / 'model.pt', 'cpu')['state']['epoch'] >= 1
    status, _, stderr = run('--results-path', folder, '--resume', preexec_fn=obey_permissions)
    assert status == 1 and stderr.count('\n') == 1 and 'Permission denied' in stderr
    (folder / 'CONV-3-4').chmod(0o755)
    resume(folder)
    assert same(folder, uninterrupted)


@pytest.mark.parametrize('place', ['--results-path', '--results-dir'])
def test_launch_into_a_read_only_folder(tmp_path, place):
    tmp_path.chmod(0o555)
    status, _, stderr = run(*SMALL, place, tmp_path / 'new', preexec_fn=obey_permissions)
    assert status == 2 and stderr.count('\n') == 1 and str(tmp_path / 'new') in stderr and 'Permission denied' in stderr


def test_results_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    status, _, stderr = run(*SMALL, '--results-dir', tmp_path / 'file')
    assert status == 2 and stderr.count('\n') == 1 and str(tmp_path / 'file') in stderr


def test_progress_bar_on_a_terminal(tmp_path):
    """In a pseudo-terminal: one bar with errors and bounds beside it, and no plain lines."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('4H', 50, 250, 0, 0))
    command = [sys.executable, str(ROOT / 'train.py'), *SMALL, '--results-path', str(tmp_path / 'run')]
    process = subprocess.Popen(command, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b''
    while True:
        try:
            if not (chunk := os.read(master, 65536)):
                break
        except OSError:
            break
        seen += chunk
    assert process.wait(60) == 0
    text = seen.decode()
    assert 'epoch 6.00/6' in text and 'test 0.' in text and 'our 2^' in text
    assert text.count('\n') == 3


def test_data_dir_of_the_environment_wins(tmp_path):
    from test_datasets import make_idx

    make_idx(tmp_path / 'there')
    environment = os.environ | {'DATA_DIR': str(tmp_path / 'there')}
    flags = ('--width', '2', '--epochs', '1', '--data-dir', tmp_path / 'nowhere', '--results-path', tmp_path / 'run')
    status, stdout, stderr = run(*flags, env=environment)
    assert (status, stderr) == (0, '') and 'MNIST, 70 training and 20 test images' in stdout


def test_works_from_any_folder(tmp_path):
    (tmp_path / 'here').mkdir()
    status, stdout, stderr = run(*SMALL, '--epochs', '1', '--results-dir', 'mine', cwd=tmp_path / 'here')
    assert (status, stderr) == (0, '') and rows(tmp_path / 'here' / 'mine' / '1') == 2


def test_paper_run_learns_mnist(tmp_path, mnist):
    """Width 4 and one epoch: enough to see the real files go through the program."""
    environment = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'}
    flags = ('--width', '4', '--epochs', '1', '--results-path', tmp_path / 'run')
    status, stdout, stderr = run(*flags, env=environment, cwd=ROOT, timeout=600)
    assert (status, stderr) == (0, '') and 'MNIST, 60000 training and 10000 test images' in stdout
    assert read_metrics(Path(tmp_path, 'run', 'CONV-3-4', 'metrics.csv'))['test_error'][-1] < 0.12
