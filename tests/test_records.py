"""A results folder: what is refused, what survives damage, full disks and other processes."""

import os
import pickle
import shutil
import subprocess
import warnings

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    contents,
    main,
    refused,
    resume,
    rows,
    same,
    start,
    succeeds,
    train_small,
    wait_for,
)

import records
from conf import BadInput
from evaluation import COLUMNS
from records import (
    load_checkpoint,
    load_network,
    lock,
    read_metrics,
    read_table,
    save_checkpoint,
    write_file,
    write_table,
)
from utils import BOUNDS


@pytest.fixture
def folder(tmp_path, uninterrupted):
    """A copy of the small run, to damage."""
    shutil.copytree(uninterrupted, tmp_path / 'run')
    return tmp_path / 'run'


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = [{'epoch': 0, 'a': 1 / 3, 'c': 5}, {'epoch': 1, 'a': float('nan'), 'b': 1e-300}]
    write_table(tmp_path / 't.csv', ['epoch', 'a', 'b'], table)
    assert (tmp_path / 't.csv').read_text() == (
        'epoch,a,b,c\n0,0.3333333333333333,,5\n1,,1e-300,\n'
    )
    read = read_table(tmp_path / 't.csv', ['epoch', 'd'], ['epoch'])
    assert list(read) == ['epoch', 'd', 'a', 'b', 'c']
    assert read['epoch'].tolist() == [0, 1] and read['a'][0] == 1 / 3 and read['b'][1] == 1e-300
    assert np.isnan([read['a'][1], read['b'][0], *read['d']]).all()


@pytest.mark.parametrize('change', ['\r', '\r\n', 'byte-order mark', 'blank line', 'commas'])
def test_tables_that_a_spreadsheet_has_saved_are_read(folder, change):
    path = folder / 'CONV-3-4' / 'metrics.csv'
    before, text = read_metrics(path), path.read_text()
    columns = text.partition('\n')[0].count(',')
    texts = {'byte-order mark': '\ufeff' + text, 'blank line': text + '\n'}
    texts['commas'] = text + ',' * columns + '\n'
    path.write_bytes(texts.get(change, text.replace('\n', change)).encode())
    for column, values in read_metrics(path).items():
        assert np.array_equal(values, before[column], equal_nan=True)


@pytest.mark.parametrize(
    'content, message',
    [
        ('a,b\nx,y\n', 'has no column epoch'),
        ('epoch,train_error,test_error,generalization_gap\n1,x,0,0\n', 'line 2: could not convert'),
        ('epoch,train_error,test_error,generalization_gap\n1,0\n', 'line 2: '),
        (
            'epoch,train_error,test_error,generalization_gap\n1,,0,0\n',
            'line 2: .*must not be empty',
        ),
        (b'\xff\xfe', 'not a csv file'),
    ],
)
def test_a_damaged_table_is_named_with_its_line(folder, content, message):
    path = folder / 'CONV-3-4' / 'metrics.csv'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=f'metrics.csv.*{message}'):
        read_metrics(path)
    refused('--results-path', folder, '--status')
    resume(folder)  # writes it again, from the checkpoint
    assert rows(folder) == 7


def test_a_bound_that_came_or_went_is_an_added_or_an_empty_column(folder, monkeypatch):
    monkeypatch.setitem(BOUNDS, 'my_bound', lambda network, data, delta, gamma: 2.5)
    monkeypatch.delitem(BOUNDS, 'our_bound')
    monkeypatch.setattr('train.COLUMNS', [c for c in COLUMNS if c != 'our_bound'] + ['my_bound'])
    resume(folder, '--epochs', '7')
    table = read_metrics(folder / 'CONV-3-4' / 'metrics.csv')
    assert np.isnan(table['our_bound']).tolist() == [False] * 7 + [True]
    assert np.isnan(table['my_bound']).tolist() == [True] * 7 + [False]


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------


class Evil:
    """An object whose unpickling would run a command."""

    def __reduce__(self):
        return os.system, ('touch evil',)


def flip_a_bit(content, checkpoint):
    """The file with one bit of its largest weight flipped, which torch itself loads silently."""
    weights = max(checkpoint['network'].values(), key=torch.numel).numpy().tobytes()
    position = content.index(weights) + len(weights) // 2
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGE = {
    'half': lambda path, content, old: path.write_bytes(content[: len(content) // 2]),
    'empty': lambda path, content, old: path.write_bytes(b''),
    'text': lambda path, content, old: path.write_bytes(b'no checkpoint'),
    'bit': lambda path, content, old: path.write_bytes(flip_a_bit(content, old)),
    'pickle': lambda path, content, old: path.write_bytes(pickle.dumps(Evil())),
    'code': lambda path, content, old: torch.save({'network': {}, 'format': Evil()}, path),
    'list': lambda path, content, old: torch.save([1, 2], path),
    'nan': lambda path, content, old: save_checkpoint(
        path, old | {'network': {key: w / 0 * 0 for key, w in old['network'].items()}}
    ),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_checkpoint_is_refused(folder, monkeypatch, kind):
    monkeypatch.chdir(folder)
    path = folder / 'CONV-3-4' / 'model.pt'
    DAMAGE[kind](path, path.read_bytes(), load_checkpoint(path))
    before = contents(folder)
    line = refused('--results-path', folder, '--resume', '--epochs', '8')
    advice = f'move {folder}/CONV-3-4 away to train this network again'
    assert f'model.pt: damaged, or not a checkpoint; {advice}' in line
    with pytest.raises(BadInput, match='damaged'):
        load_network(folder / 'CONV-3-4')
    assert contents(folder) == before


@pytest.mark.parametrize(
    'change, message',
    [
        ({'data': 'x'}, 'was trained on other data'),
        ({'format': 1}, 'the checkpoint of an older program.*commit 050935c'),
    ],
)
def test_a_foreign_checkpoint_is_refused(folder, change, message):
    path = folder / 'CONV-3-4' / 'model.pt'
    torch.save(load_checkpoint(path) | change, path)
    before = contents(folder)
    with pytest.raises(AssertionError, match=message):
        succeeds('--results-path', folder, '--resume')
    assert contents(folder) == before


@pytest.mark.parametrize('knob, value', [('lr', 0.02), ('label_noise', 0.1), ('gamma', 2.0)])
def test_an_edited_settings_file_is_refused(folder, knob, value):
    path = folder / 'global_settings.py'
    lines = path.read_text().splitlines()
    edited = [f'{knob} = {value}' if line.startswith(f'{knob} = ') else line for line in lines]
    path.write_text('\n'.join(edited))
    assert f'was trained with {knob} = ' in refused('--results-path', folder, '--resume')


@pytest.mark.parametrize('flags', [(), ('--epochs', '8')])
def test_a_refused_resume_changes_nothing(tmp_path, flags):
    """Neither the settings nor the network before the one whose checkpoint is wrong."""
    train_small(tmp_path / 'run', '--width', '4', '5', '--epochs', '1')
    path = tmp_path / 'run' / 'CONV-3-5' / 'model.pt'
    path.write_bytes(path.read_bytes()[:1000])
    before = contents(tmp_path / 'run')
    assert 'CONV-3-5/model.pt: damaged' in refused(
        '--results-path', tmp_path / 'run', '--resume', *flags
    )
    assert contents(tmp_path / 'run') == before


def test_results_without_a_checkpoint_are_not_resumed(tmp_path):
    shutil.copytree(ROOT / 'results' / 'digits', tmp_path / 'digits')
    before = contents(tmp_path / 'digits')
    line = refused('--results-path', tmp_path / 'digits', '--resume')
    assert f'--settings {tmp_path}/digits/global_settings.py' in line
    assert contents(tmp_path / 'digits') == before


# ------------------------------------------------------------------------------------------------
# load_network
# ------------------------------------------------------------------------------------------------


def test_load_network(tmp_path, uninterrupted, digits):
    net, settings = load_network(uninterrupted / 'CONV-3-4')
    errors = []
    for part in ('train', 'test'):
        with torch.no_grad():
            outputs = net(getattr(digits, f'{part}_images'))
        wrong = outputs.argmax(1) != getattr(digits, f'{part}_labels')
        errors.append(wrong.double().mean().item())
    table = read_metrics(uninterrupted / 'CONV-3-4' / 'metrics.csv')
    assert errors == pytest.approx([table['train_error'][-1], table['test_error'][-1]], abs=1e-12)
    assert settings.name == 'CONV-3-4' and not net.training

    masks = ('--density', '0.3', '--initial-mask', 'random')
    train_small(tmp_path / 'sparse', *masks, '--epochs', '1', '--width', '4', '5')
    net, _ = load_network(tmp_path / 'sparse' / 'CONV-3-5')
    nonzero = sum(int(net[index].weight.count_nonzero()) for index in (0, 2, 4, 7))
    assert nonzero == round(0.3 * (20 + 100 + 100 + 1250))


@pytest.mark.parametrize(
    'path, message',
    [
        ('', 'not a results folder'),
        ('gone/CONV-3-4', 'no such folder'),
        ('CONV-3-5', 'no such run; .* has CONV-3-4'),
    ],
)
def test_load_network_of_something_else(folder, path, message):
    (folder / 'CONV-3-5').mkdir()
    with pytest.raises(BadInput, match=message):
        load_network(folder / path)


def test_load_network_without_weights(folder):
    (folder / 'CONV-3-4' / 'model.pt').unlink()
    with pytest.raises(BadInput, match='has no weights'):
        load_network(folder / 'CONV-3-4')


def test_load_network_of_another_runs_checkpoint(tmp_path):
    train_small(tmp_path / 'run', '--epochs', '1', '--seed', '0', '1')
    paths = [tmp_path / 'run' / f'CONV-3-4-seed{seed}' for seed in (0, 1)]
    shutil.copy(paths[0] / 'model.pt', paths[1] / 'model.pt')
    with pytest.raises(BadInput, match='was trained with seed = 0, not 1'):
        load_network(paths[1])


def test_every_shipped_network_loads():
    paths = [path.parent for path in ROOT.glob('results/**/weights.pt')]
    assert len(paths) == 17
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter('error')  # a training that is not finished
            net, _ = load_network(path)
        assert not net.training


# ------------------------------------------------------------------------------------------------
# Other processes, disks and folders that fail
# ------------------------------------------------------------------------------------------------


def test_files_are_replaced_atomically_and_links_are_not_written_through(tmp_path):
    path, other = tmp_path / 'f', tmp_path / 'other'
    write_file(path, b'1')
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # the user's own mode
    other.write_bytes(b'kept')
    (tmp_path / f'f.{os.getpid()}.tmp').symlink_to(other)
    with pytest.raises(OSError):
        write_file(path, b'2')
    assert other.read_bytes() == b'kept' and path.read_bytes() == b'1'
    (tmp_path / '.lock').symlink_to(other)
    with pytest.raises(OSError), lock(tmp_path):
        pass
    assert other.read_bytes() == b'kept'


def test_the_lock_removes_stale_files(tmp_path):
    (tmp_path / 'model.pt.1.tmp').write_bytes(b'')
    with lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ['.lock']


def test_to_ask_for_the_status_deletes_nothing_of_a_process_that_writes(tmp_path, monkeypatch):
    (tmp_path / 'model.pt.1.tmp').write_bytes(b'')
    monkeypatch.setattr(records.fcntl, 'flock', no_locks)
    assert not records.is_locked(tmp_path)
    assert (tmp_path / 'model.pt.1.tmp').exists()


def no_locks(*arguments):
    raise OSError(95, 'Operation not supported')


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records.fcntl, 'flock', no_locks)
    with lock(tmp_path):
        assert 'no file locks here; start no second process on it' in capsys.readouterr().err


def test_a_network_that_another_process_trains_is_refused(folder, monkeypatch):
    with lock(folder / 'CONV-3-4'), monkeypatch.context() as patch:
        patch.setattr(records.time, 'monotonic', iter(range(0, 999, 9)).__next__)
        line = refused('--results-path', folder, '--resume', '--epochs', '9')
        assert 'another process is working on this network' in line
    assert 'finished already' in resume(folder)


@pytest.mark.process
def test_full_disk(tmp_path, uninterrupted):
    """A small tmpfs fills up; the last checkpoint stays, and a resume works once there is room."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=512k', 'none', disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a tmpfs takes root')
    try:
        run_folder, filler = disk / 'run', disk / 'filler'
        process = start(*SMALL, '--results-path', run_folder)
        wait_for(lambda: rows(run_folder) >= 2, process)
        with pytest.raises(OSError), open(filler, 'wb', buffering=0) as file:
            while True:
                file.write(bytes(1024))
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1 and stderr.count('\n') == 1
        assert 'No space left on device' in stderr and f"'{run_folder}/" in stderr
        load_checkpoint(run_folder / 'CONV-3-4' / 'model.pt')
        assert not list(run_folder.rglob('*.tmp'))
        filler.unlink()
        subprocess.run(['mount', '-o', 'remount,size=10m', disk], check=True)
        resume(run_folder)
        assert same(run_folder, uninterrupted)
    finally:
        subprocess.run(['umount', '-l', disk], check=True)


@pytest.mark.process
def test_a_folder_that_is_moved_away_under_a_run(tmp_path):
    process = start(*SMALL, '--epochs', '500', '--results-path', tmp_path / 'run')
    wait_for(lambda: rows(tmp_path / 'run') >= 3, process)
    (tmp_path / 'run').rename(tmp_path / 'elsewhere')
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr.count('\n') == 1
    assert 'No such file or directory' in stderr
    state = load_checkpoint(tmp_path / 'elsewhere' / 'CONV-3-4' / 'model.pt')['state']
    assert len(state['rows']) >= 3


@pytest.mark.parametrize('option', ['--results-path', '--results-dir'])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, option):
    (tmp_path / 'file').write_text('')
    status, _, stderr = main(*SMALL, option, tmp_path / 'file' / 'run')
    assert status == 1 and stderr.count('\n') == 1 and 'file' in stderr
