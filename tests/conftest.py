"""What the tests share: the program as a user starts it, its settings, and the digits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['OMP_NUM_THREADS'] = '1'  # the networks of the tests are too small to share

import torch  # noqa: E402

from conf import load_settings  # noqa: E402
from utils import load_dataset  # noqa: E402

torch.set_num_threads(1)
DIGITS = ('--settings', str(ROOT / 'conf' / 'digits.py'))
SMALL = ('--settings', str(ROOT / 'tests' / 'small.py'))
TIMINGS = ('train_seconds', 'eval_seconds')


def start(*arguments, **options):
    """train.py in a process of its own, its output caught."""
    command = [sys.executable, str(ROOT / 'train.py'), *map(str, arguments)]
    caught = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    return subprocess.Popen(command, text=True, **(caught | options))


def run(*arguments, timeout=300, **options):
    """As `start`, to its end: (exit status, stdout, stderr)."""
    process = start(*arguments, **options)
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout, stderr


def numbers(path):
    """The text of each number of a metrics.csv, without timings: two runs are equal where these are."""
    lines = [line.split(',') for line in Path(path).read_text().splitlines()]
    kept = [index for index, column in enumerate(lines[0]) if column not in TIMINGS]
    return [[line[index] for index in kept] for line in lines]


def same(folder, other, name='CONV-3-4'):
    """Whether a network has the same metrics in two results folders, timings aside."""
    return numbers(folder / name / 'metrics.csv') == numbers(other / name / 'metrics.csv')


def rows(folder, name='CONV-3-4'):
    """The rows of a network's metrics.csv so far; -1 where there is none yet."""
    path = folder / name / 'metrics.csv'
    return path.read_text().count('\n') - 1 if path.exists() else -1


def settings_of(**flags):
    """The settings of a single network: the defaults and these."""
    return load_settings(flags=flags)[1][0]


@pytest.fixture(scope='session')
def digits():
    return load_dataset('digits', 'nowhere')


@pytest.fixture(scope='session')
def mnist():
    if not Path(os.environ.get('DATA_DIR', ''), 'MNIST').is_dir() or 'DATA_DIR' not in os.environ:
        pytest.skip('DATA_DIR does not hold MNIST')
    return load_dataset('MNIST', os.environ['DATA_DIR'])
