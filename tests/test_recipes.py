"""README's recipes for a bound, a network, a dataset and a knob, each done on a copy of the program by its user.

A run from before it resumes, is plotted and measured anew.
"""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL, numbers

from records import read_metrics


@pytest.fixture
def program(tmp_path):
    """A copy of the program in which a small network was trained for three epochs; runs its train.py."""
    folder = tmp_path / 'program'
    ignored = shutil.ignore_patterns(
        'results', '.git', '.venv', 'venv', '__pycache__', 'docs', 'MNIST', '.pytest_cache'
    )
    shutil.copytree(ROOT, folder, ignore=ignored)

    def run(*arguments):
        command = [sys.executable, 'train.py', *map(str, arguments)]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ
        )
        assert (done.returncode, done.stderr) == (0, ''), done.stderr
        return done.stdout

    run(*SMALL, '--epochs', '3', '--results-path', 'results/1')
    return folder, run


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


def goes_on(folder, run, path='results/1/CONV-3-4'):
    """Measures, plots and resumes the run from before; what was logged stays as it was."""
    table = folder / path / 'metrics.csv'
    before = numbers(table)
    run('--results-path', 'results/1', '--evaluate')
    run('--results-path', 'results/1', '--plot')
    assert numbers(table) == before
    run('--results-path', 'results/1', '--resume', '--epochs', '4')
    metrics = read_metrics(table)
    assert metrics['epoch'].tolist() == [0, 1, 2, 3, 4]
    return metrics


def test_a_bound(program):
    folder, run = program
    edit(
        folder / 'utils.py',
        'BOUNDS = {\n',
        'def my_bound(network, data, delta, gamma):\n    """Mine: a bound of my own."""\n    return 42.0\n\n\nBOUNDS = {\n'
        "    'my_bound': my_bound,\n",
    )
    metrics = goes_on(folder, run)
    evaluated = read_metrics(folder / 'results/1/CONV-3-4/evaluation.csv')
    assert metrics['my_bound'][-1] == evaluated['my_bound'][0] == 42
    edit(folder / 'utils.py', 'return 42.0', 'return 7.0')
    stdout = run('--results-path', 'results/1', '--resume', '--epochs', '5')
    warning = (
        'CONV-3-4: my_bound: not the function that rows so far are of; --evaluate measures anew'
    )
    assert warning in stdout and warning in run(
        '--results-path', 'results/1', '--resume', '--epochs', '6'
    )
    edit(folder / 'utils.py', 'return 7.0', 'return 42.0')
    assert 'not the function' not in run('--results-path', 'results/1', '--resume', '--epochs', '7')
    cells = read_metrics(folder / 'results/1/CONV-3-4/metrics.csv')['my_bound']
    assert cells[[0, 4, 5, 6, 7]].tolist() == [42, 42, 7, 7, 42] and np.isnan(cells[1:4]).all()
    edit(
        folder / 'utils.py',
        'return 3 * np.sqrt((np.log(2 / delta)',
        'return 9 * np.sqrt((np.log(2 / delta)',
    )  # in a helper
    stdout = run('--results-path', 'results/1', '--resume', '--epochs', '8')
    changed = re.search('CONV-3-4: (.*): not the function', stdout)[1].split(', ')
    assert set(changed) == {'our_bound', 'golowich_bound', 'corrected_bound', 'path_bound'}


def test_a_network(program):
    folder, run = program
    (folder / 'models' / 'wide.py').write_text(
        'from torch import nn\n\n\ndef wide(settings, input_shape, num_classes):\n'
        '    """A hidden layer on all pixels."""\n    size = input_shape[0] * input_shape[1] * input_shape[2]\n'
        '    first = nn.Linear(size, settings.width, bias=False)\n'
        '    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(settings.width, num_classes, bias=False))\n'
    )
    text = (folder / 'models' / '__init__.py').read_text()
    text = text.replace(
        'from models.mlp import', 'from models.wide import wide\nfrom models.mlp import', 1
    )
    (folder / 'models' / '__init__.py').write_text(
        text.replace('NETWORKS = {', "NETWORKS = {'WIDE': wide, ", 1)
    )
    goes_on(folder, run)
    run(*SMALL, '--network', 'WIDE', '--epochs', '1', '--results-path', 'results/2')
    assert read_metrics(folder / 'results/2/WIDE-3-4/metrics.csv')['our_bound'][-1] > 0


def test_a_dataset(program):
    folder, run = program
    edit(
        folder / 'datasets.py',
        'DATASETS = {\n',
        'def _two_splits(data_dir):\n'
        '    images = np.random.default_rng(0).integers(0, 9, (90, 1, 6, 6), dtype=np.uint8)\n'
        '    for part in (slice(0, 60), slice(60, 90)):\n'
        "        yield images[part], images[part].sum((1, 2, 3)) % 2\n\n\n"
        "DATASETS = {\n    'two': (_two_splits, (1, 6, 6), 2, 8),\n",
    )
    edit(folder / 'conf' / '__init__.py', "'CIFAR100', 'digits')", "'CIFAR100', 'digits', 'two')")
    goes_on(folder, run)
    run(*SMALL, '--dataset-name', 'two', '--epochs', '1', '--results-path', 'results/2')
    assert read_metrics(folder / 'results/2/CONV-3-4/metrics.csv')['epoch'].tolist() == [0, 1]


def test_a_knob(program):
    folder, run = program
    edit(
        folder / 'conf' / 'global_settings.py',
        '\nseed = 0  #',
        '\ndropout = 0.5  # of my own\nseed = 0  #',
    )
    rule = "_later(0.0, _number('a number', lambda value: 0 <= value < 1))"
    edit(folder / 'conf' / '__init__.py', "    'seed': ", f"    'dropout': {rule},\n    'seed': ")
    goes_on(folder, run)
    assert 'dropout = 0.0  # of my own' in (folder / 'results/1/global_settings.py').read_text()
    run(*SMALL, '--epochs', '1', '--results-path', 'results/2')
    assert 'dropout = 0.5' in (folder / 'results/2/global_settings.py').read_text()


def test_a_knob_without_its_value_of_older_runs(program):
    """The run is not taken for one of today's default, and the line says what is missing and where."""
    folder, run = program
    edit(
        folder / 'conf' / 'global_settings.py',
        '\nseed = 0  #',
        '\ndropout = 0.5  # of my own\nseed = 0  #',
    )
    rule = "_number('a number', lambda value: 0 <= value < 1)"
    edit(folder / 'conf' / '__init__.py', "    'seed': ", f"    'dropout': {rule},\n    'seed': ")
    with pytest.raises(
        AssertionError, match='the setting dropout is missing.*_later.*conf/__init__.py'
    ):
        run('--results-path', 'results/1', '--resume', '--epochs', '4')
