"""README's recipes for a bound, a network, a dataset and a knob, each on a copy of the program.

A run from before is still resumed, plotted and evaluated.
"""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL, numbers

from records import read_metrics

pytestmark = pytest.mark.process


@pytest.fixture
def program(tmp_path):
    """(folder, run): a copy of the program with a run of three epochs; a function that runs it."""
    folder = tmp_path / 'program'
    ignored = shutil.ignore_patterns(
        'results', '.git', '.venv', 'venv', '__pycache__', 'docs', 'MNIST', '.pytest_cache'
    )
    shutil.copytree(ROOT, folder, ignore=ignored)

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, ''), done.stderr
        return done.stdout

    run('train.py', *SMALL, '--epochs', '3', '--results-path', 'results/1')
    return folder, run


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


def continues(folder, run):
    """Evaluates, plots and resumes the run from before, whose rows stay as they were."""
    table = folder / 'results/1/CONV-3-4/metrics.csv'
    before = numbers(table)
    run('-m', 'studies.evaluate', 'results/1')
    run('train.py', '--results-path', 'results/1', '--plot')
    assert numbers(table) == before
    run('train.py', '--results-path', 'results/1', '--resume', '--epochs', '4')
    metrics = read_metrics(table)
    assert metrics['epoch'].tolist() == [0, 1, 2, 3, 4]
    return metrics


def test_a_bound(program):
    folder, run = program
    bound = (
        'def my_bound(network, data, delta, gamma):\n    """Mine: my bound."""\n    return 42.0\n'
    )
    edit(
        folder / 'utils.py', 'BOUNDS = {\n', f"{bound}\n\nBOUNDS = {{\n    'my_bound': my_bound,\n"
    )
    logged = continues(folder, run)['my_bound']
    assert np.isnan(logged[:4]).all() and logged[4] == 42
    assert read_metrics(folder / 'results/1/CONV-3-4/evaluation.csv')['my_bound'].tolist() == [42]


def test_a_network(program):
    folder, run = program
    (folder / 'models' / 'wide.py').write_text("""
from torch import nn

def wide(settings, input_shape, num_classes):
    size = input_shape[0] * input_shape[1] * input_shape[2]
    first = nn.Linear(size, settings.width, bias=False)
    last = nn.Linear(settings.width, num_classes, bias=False)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)
""")
    path = folder / 'models' / '__init__.py'
    edit(path, 'from models.mlp import', 'from models.wide import wide\nfrom models.mlp import')
    edit(path, 'NETWORKS = {', "NETWORKS = {'WIDE': wide, ")
    continues(folder, run)
    flags = '--network WIDE --epochs 1 --results-path results/2'.split()
    run('train.py', *SMALL, *flags)
    assert read_metrics(folder / 'results/2/WIDE-3-4/metrics.csv')['our_bound'][-1] > 0


def test_a_dataset(program):
    folder, run = program
    reader = """def _two(data_dir):
    images = np.random.default_rng(0).integers(0, 9, (90, 1, 6, 6), dtype=np.uint8)
    for part in (slice(0, 60), slice(60, 90)):
        yield images[part], images[part].sum((1, 2, 3)) % 2


DATASETS = {
    'two': (_two, (1, 6, 6), 2, 8),
"""
    edit(folder / 'datasets.py', 'DATASETS = {\n', reader)
    continues(folder, run)
    flags = '--dataset-name two --epochs 1 --results-path results/2'.split()
    run('train.py', *SMALL, *flags)
    assert read_metrics(folder / 'results/2/CONV-3-4/metrics.csv')['epoch'].tolist() == [0, 1]


def test_a_knob(program):
    """Its neutral value in KNOBS is the value of the runs from before."""
    folder, run = program
    path = folder / 'conf' / 'global_settings.py'
    edit(path, '\nseed = 0  #', '\ndropout = 0.5  # of my own\nseed = 0  #')
    edit(
        folder / 'conf' / '__init__.py',
        "    'seed': ",
        "    'dropout': (0.0, '[0, 1)'),\n    'seed': ",
    )
    continues(folder, run)
    assert 'dropout = 0.0  # of my own' in (folder / 'results/1/global_settings.py').read_text()
    run('train.py', *SMALL, '--epochs', '1', '--results-path', 'results/2')
    assert 'dropout = 0.5' in (folder / 'results/2/global_settings.py').read_text()
