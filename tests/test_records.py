"""What a run leaves: checkpoints that are refused, tables with empty cells, older folders, disks that fail."""

import ctypes
import os
import pickle
import random
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import (
    SMALL,
    contents,
    numbers,
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

import evaluation
from conf import BEFORE, BadInput
from evaluation import COLUMNS, report
from launch import get_dataset
from records import (
    csv_line,
    load_checkpoint,
    load_network,
    parse_line,
    read_metrics,
    save_checkpoint,
)

# The columns of metrics.csv before there were empty cells.
OLD_COLUMNS = (
    'epoch, lr, train_loss, test_loss, train_error, test_error, generalization_gap, train_margin_error, rho, prod_ratio, '
    'norm_ratio, our_bound, golowich_bound, ledent_bound, graf_bound, sedghi_bound, corrected_bound, certified_error, '
    'certified_margin, train_seconds, eval_seconds'
).split(', ')


@pytest.fixture
def folder(tmp_path, uninterrupted):
    """A copy of the finished small run."""
    shutil.copytree(uninterrupted, tmp_path / 'run')
    return tmp_path / 'run'


def test_a_certificate_on_the_screen_is_rounded_up():
    row = dict.fromkeys(COLUMNS, np.nan) | {
        'test_error': 0.12341,
        'train_error': 0.1,
        'pac_bayes_error': 0.12341,
    }
    assert 'A 0.1235' in report(row | {'generalization_gap': 0.02341})


@pytest.mark.parametrize('seed', range(2))
def test_resume_after_kills(tmp_path, seed):
    """SIGKILL at random moments, again and again and ever later, until a resume gets to the end."""
    chance, folder = random.Random(seed), tmp_path / 'run'
    train_small(tmp_path / 'whole', '--epochs', '25')
    for kills in range(20):
        resumed = (folder / 'global_settings.py').exists()
        process = start(
            *(('--resume',) if resumed else (*SMALL, '--epochs', 25)), '--results-path', folder
        )
        try:
            _, stderr = process.communicate(timeout=chance.uniform(1, 4 + 2 * kills))
            assert (process.returncode, stderr) == (0, '')
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    assert kills >= 1
    assert same(folder, tmp_path / 'whole')


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
    yield (
        lambda: save_checkpoint(
            path, checkpoint | {'momentum': {0: {'momentum_buffer': torch.ones(3)}}}
        ),
        'not a checkpoint',
    )
    yield (
        lambda: save_checkpoint(
            path, checkpoint | {'settings': checkpoint['settings'] | {'lr': 1.0}}
        ),
        'lr = 1.0, not 0.01',
    )
    yield lambda: save_checkpoint(path, checkpoint | {'data': 'x'}), 'other data'
    state = checkpoint['state']
    for wrong in ({'epoch': '3'}, {'epoch': -2}, {'step': 10**9}, {'step': None}, {'lines': []}, {'lines': ['1,2']},
                  {'lines': [3]}, {'train_seconds': 'x'}, {'columns': COLUMNS[1:]}, {'round': 1}, {'round': None},
                  {'layer_lines': ['1,2']}):  # fmt: skip
        yield (
            lambda wrong=wrong: save_checkpoint(path, checkpoint | {'state': state | wrong}),
            'not a checkpoint',
        )
    yield lambda: save_checkpoint(path, checkpoint | {'momentum': {}}), 'not a checkpoint'
    nan = {name: weight * float('nan') for name, weight in checkpoint['network'].items()}
    yield lambda: save_checkpoint(path, checkpoint | {'network': nan}), 'not a checkpoint'
    yield wide, 'not a checkpoint of CONV-3-4'


def test_wrong_checkpoints_are_refused(folder):
    for damage, message in damaged(folder):
        damage()
        before = contents(folder)
        line = refused('--results-path', folder, '--resume', '--epochs', '8')
        assert message in line and 'model.pt' in line
        assert contents(folder) == before
    assert f'move {folder}/CONV-3-4 away to train' in line  # the mend that is named works
    (folder / 'CONV-3-4' / 'model.pt').unlink()
    before = contents(folder)
    assert 'model.pt: is missing' in refused('--results-path', folder, '--resume')
    assert contents(folder) == before


@pytest.mark.parametrize('flags', [(), ('--epochs', '8')])
def test_a_refused_resume_changes_nothing(tmp_path, flags):
    """Not the settings, and not the network before the one whose checkpoint is wrong."""
    train_small(tmp_path / 'run', '--width', '4', '5', '--epochs', '1')
    path = tmp_path / 'run' / 'CONV-3-5' / 'model.pt'
    path.write_bytes(path.read_bytes()[:1000])
    before = contents(tmp_path / 'run')
    line = refused('--results-path', tmp_path / 'run', '--resume', *flags)
    assert 'CONV-3-5/model.pt: not a checkpoint, or a damaged one' in line
    assert contents(tmp_path / 'run') == before


def test_resume_with_an_edited_settings_file_is_refused(folder):
    path = folder / 'global_settings.py'
    path.write_text(path.read_text().replace('\nlr = 0.01', '\nlr = 0.02'))
    assert 'was trained with lr = 0.01, not 0.02' in refused('--results-path', folder, '--resume')


def test_resume_on_other_data_is_refused(tmp_path, monkeypatch):
    """Two folders that differ in a few images, then in a label alone, and the first one at another place."""
    make_idx(tmp_path / 'first', counts=(70, 20), compressed=False)
    shutil.copytree(tmp_path / 'first', tmp_path / 'moved')
    for place, file, offset in (
        ('images', 'train-images-idx3-ubyte', 16 + 5000),
        ('labels', 't10k-labels-idx1-ubyte', 8 + 3),
    ):
        shutil.copytree(tmp_path / 'first', tmp_path / place)
        path = tmp_path / place / 'MNIST' / 'raw' / file
        content = bytearray(path.read_bytes())
        content[offset] = (content[offset] + 1) % 10
        path.write_bytes(content)
    make_idx(tmp_path / 'fewer', counts=(60, 20))

    def data_dir(name):
        monkeypatch.setenv('DATA_DIR', str(tmp_path / name))
        get_dataset.cache_clear()

    data_dir('first')
    folder = tmp_path / 'run'
    train_small(folder, '--dataset-name', 'MNIST', '--epochs', '1')
    for name in ('images', 'labels', 'fewer'):
        data_dir(name)
        before = contents(folder)
        for flags in ((), ('--epochs', '2')):
            assert 'was trained on other data' in refused(
                '--results-path', folder, '--resume', *flags
            )
        assert contents(folder) == before
    data_dir('moved')
    resume(folder, '--epochs', '2')
    get_dataset.cache_clear()


# ----------------------------------------------------------------------------------------------------------------------
# Folders of before
# ----------------------------------------------------------------------------------------------------------------------


def aged(folder):
    """Takes from a run what came since: knobs, columns, and what checkpoints hold."""

    def old(rows):
        return [
            csv_line({column: float(row[column]) for column in OLD_COLUMNS}, OLD_COLUMNS)
            for row in rows
        ]

    path = folder / 'global_settings.py'
    path.write_text(
        ''.join(
            line
            for line in path.read_text().splitlines(True)
            if line.partition(' ')[0] not in BEFORE
        )
    )
    path = folder / 'CONV-3-4' / 'model.pt'
    new = load_checkpoint(path, 'cpu')
    lines = old(parse_line(line, new['state']['columns']) for line in new['state']['lines'])
    state = {name: new['state'][name] for name in ('epoch', 'step', 'train_seconds')}
    state |= {'columns': OLD_COLUMNS, 'lines': lines, 'recent_errors': [0.5]}
    settings = {name: value for name, value in new['settings'].items() if name not in BEFORE}
    save_checkpoint(
        path,
        {name: new[name] for name in ('network', 'momentum')}
        | {'settings': settings, 'state': state},
    )
    (folder / 'CONV-3-4' / 'metrics.csv').write_text(','.join(OLD_COLUMNS) + '\n' + ''.join(lines))


@pytest.mark.parametrize('epochs', [3, 6])
def test_a_folder_of_before_goes_on(tmp_path, uninterrupted, monkeypatch, epochs):
    folder, path = tmp_path / 'run', tmp_path / 'run' / 'CONV-3-4'
    monkeypatch.setattr(evaluation, 'certify', lambda *arguments: {'pac_bayes_error': 0.5})
    train_small(folder, '--epochs', epochs)
    aged(folder)
    old = numbers(path / 'metrics.csv')
    assert re.search(
        rf'CONV-3-4 +finished +0 +{epochs}/{epochs} ',
        succeeds('--results-path', folder, '--status'),
    )
    assert f'drew {folder}/figure.png' in succeeds('--results-path', folder, '--plot')
    before = contents(folder)
    table = read_metrics(path / 'metrics.csv')
    assert (
        np.isnan(table['path_norm']).all()
        and (table['round'] == 0).all()
        and list(table) == COLUMNS
    )
    net, settings = load_network(path)
    assert (settings.width, settings.prune_rounds, settings.certify_every) == (4, 0, 10)
    assert contents(folder) == before

    assert 'finished already' in resume(folder)
    assert numbers(path / 'metrics.csv', without={*COLUMNS} - {*OLD_COLUMNS[:-2]}) == old
    if epochs == 3:
        resume(folder, '--epochs', '6')
        new = read_metrics(path / 'metrics.csv')
        whole = read_metrics(uninterrupted / 'CONV-3-4' / 'metrics.csv')
        assert (new['round'] == 0).all() and np.isnan(new['path_bound']).tolist() == [False] + [
            True
        ] * 3 + [False] * 3
        assert new['path_bound'][0] == whole['path_bound'][0]
        assert all((new[column] == whole[column]).all() for column in OLD_COLUMNS[:-2])
    succeeds('--results-path', folder, '--evaluate')
    evaluated = read_metrics(path / 'evaluation.csv')
    assert evaluated['epoch'].tolist() == [6] and evaluated['path_bound'][0] > 0


def test_empty_cells(tmp_path, folder):
    """They are written, read as nan, and stay empty in a resume but for row 0; columns that are unknown by now stay too."""
    row = {'epoch': 3, 'round': 0, 'rho': float('inf'), 'our_bound': 0.1}
    line = csv_line(row, COLUMNS)
    assert line.startswith('3,0,,,') and line.count(',') == len(COLUMNS) - 1 and 'nan' not in line
    read = parse_line(line, COLUMNS)
    assert {column: value for column, value in read.items() if value == value} == row

    path = folder / 'CONV-3-4' / 'model.pt'
    checkpoint = load_checkpoint(path, 'cpu')
    state, position = checkpoint['state'], COLUMNS.index('our_bound')
    cells = [[*line.rstrip('\n').split(','), '7.5'] for line in state['lines']]
    state['lines'] = [','.join([*row[:position], '', *row[position + 1 :]]) + '\n' for row in cells]
    state['columns'] = [*COLUMNS, 'bound_of_last_year']
    save_checkpoint(path, checkpoint)
    resume(folder, '--epochs', '7')
    table = read_metrics(folder / 'CONV-3-4' / 'metrics.csv')
    assert np.isnan(table['our_bound']).tolist() == [False] + [True] * 6 + [False]
    assert table['bound_of_last_year'][:7].tolist() == [7.5] * 7 and np.isnan(
        table['bound_of_last_year'][7]
    )


def test_load_network(tmp_path, uninterrupted, digits):
    net, settings = load_network(uninterrupted / 'CONV-3-4')
    with torch.no_grad():
        errors = [
            (net(images).argmax(1) != labels).double().mean().item()
            for images, labels in (
                (digits.train_images, digits.train_labels),
                (digits.test_images, digits.test_labels),
            )
        ]
    table = read_metrics(uninterrupted / 'CONV-3-4' / 'metrics.csv')
    assert errors == pytest.approx([table['train_error'][-1], table['test_error'][-1]], abs=1e-12)
    assert settings.name == 'CONV-3-4' and not net.training

    masks = ('--density', '0.3', '--initial-mask', 'random')
    train_small(tmp_path / 'sparse', *masks, '--epochs', '1', '--width', '4', '5')
    net, _ = load_network(tmp_path / 'sparse' / 'CONV-3-5')
    alive = sum(int(net[k].weight.count_nonzero()) for k in (0, 2, 4, 7))
    assert alive == round(0.3 * (20 + 100 + 100 + 1250))


@pytest.mark.parametrize(
    'path, message',
    [
        ('', 'not a run of a results folder'),
        ('CONV-3-5', 'no such run; .* has CONV-3-4'),
        ('gone/CONV-3-4', 'not a run'),
    ],
)
def test_load_network_of_something_else(folder, path, message):
    with pytest.raises(BadInput, match=message):
        load_network(folder / path)


def test_load_network_without_a_checkpoint(folder):
    (folder / 'CONV-3-4' / 'model.pt').unlink()
    with pytest.raises(BadInput, match='has no checkpoint'):
        load_network(folder / 'CONV-3-4')


@pytest.mark.parametrize(
    'damage', [b'\xff\xfe', b'epoch,lr\n1,2\n', b'a,b\nx,y\n', b'a\n' + bytes(200_000) + b'\n']
)
def test_plot_of_a_damaged_table_names_it(folder, damage):
    (folder / 'CONV-3-4' / 'evaluation.csv').write_bytes(damage)
    assert 'evaluation.csv: not a table of evaluation; move it away, --evaluate' in refused(
        '--results-path', folder, '--plot'
    )
    (folder / 'CONV-3-4' / 'evaluation.csv').unlink()
    (folder / 'CONV-3-4' / 'metrics.csv').write_bytes(damage)
    for option in ('--plot', '--status'):
        assert 'metrics.csv: not a table of metrics' in refused('--results-path', folder, option)
    resume(folder)
    assert rows(folder) == 7


def test_torn_last_line_of_metrics(tmp_path, uninterrupted):
    folder = tmp_path / 'run'
    train_small(folder, '--epochs', '3')
    path = folder / 'CONV-3-4' / 'metrics.csv'
    path.write_text(path.read_text() + '4,0.01,0.0')
    assert len(read_metrics(path)['epoch']) == 4
    succeeds('--results-path', folder, '--plot')
    resume(folder, '--epochs', '6')
    assert same(folder, uninterrupted)


# ----------------------------------------------------------------------------------------------------------------------
# Disks and folders that fail
# ----------------------------------------------------------------------------------------------------------------------


def test_full_disk(tmp_path, uninterrupted):
    """A small tmpfs fills up in the middle of a run; the last checkpoint stays, and resuming works once there is room."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=256k', 'none', disk], capture_output=True
    ).returncode:
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
        assert (
            process.returncode == 1
            and stderr.count('\n') == 1
            and 'No space left on device' in stderr
        )
        assert f"'{folder}/" in stderr and '; make room on that disk; go on with: ' in stderr
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
    wait_for(lambda: rows(tmp_path / 'run') >= 3, process)
    (tmp_path / 'run').rename(tmp_path / 'elsewhere')
    _, stderr = process.communicate(timeout=60)
    assert (
        process.returncode == 1
        and stderr.count('\n') == 1
        and 'No such file or directory' in stderr
    )
    assert (
        load_checkpoint(tmp_path / 'elsewhere' / 'CONV-3-4' / 'model.pt', 'cpu')['state']['epoch']
        >= 2
    )


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
    assert (
        process.returncode == 1
        and stderr.count('\n') == 1
        and 'Permission denied' in stderr
        and '--resume' in stderr
    )
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
    assert (
        status == 2
        and stderr.count('\n') == 1
        and str(tmp_path / 'new') in stderr
        and 'Permission denied' in stderr
    )


def test_reading_a_folder_of_somebody_else(folder):
    """What can be read is shown; a picture that cannot be written is refused with the mend, and nothing is left behind."""
    succeeds('--results-path', folder, '--plot')
    path = folder / 'global_settings.py'
    path.write_text(path.read_text().replace('\nepochs = 6', '\nepochs = 7'))
    for path in folder.rglob('.*lock'):
        path.unlink()
    for path in (folder / 'CONV-3-4', folder):
        path.chmod(0o555)
    before = contents(folder)
    status, stdout, stderr = run('--results-path', folder, '--status', preexec_fn=obey_permissions)
    assert (status, stderr) == (0, '') and re.search('CONV-3-4 +left', stdout)
    status, _, stderr = run('--results-path', folder, '--plot', preexec_fn=obey_permissions)
    assert status == 2 and stderr.count('\n') == 1 and 'copy' in stderr and str(folder) in stderr
    assert contents(folder) == before


def test_results_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    assert str(tmp_path / 'file') in refused(*SMALL, '--results-dir', tmp_path / 'file')
