"""What the tests share: the program as a user starts it, its settings, the datasets."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['OMP_NUM_THREADS'] = '1'  # the networks of the tests are too small to share

import torch  # noqa: E402

torch.set_num_threads(1)

import train  # noqa: E402
from conf import load_settings, run_program  # noqa: E402
from datasets import load_dataset  # noqa: E402

DIGITS = ('--settings', str(ROOT / 'conf' / 'digits.py'))
SMALL = ('--settings', str(ROOT / 'tests' / 'small.py'))
TIMINGS = ('train_seconds', 'eval_seconds')


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes longer than training a small network: only --plot and marked tests draw."""
    if not request.node.get_closest_marker('pictures'):
        monkeypatch.setattr(train, 'draw_figures', lambda folder: None)


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


def main(*arguments, program=train.main):
    """As `run`, in this process, which is quicker; or another program's main."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    arguments = [str(argument) for argument in arguments]
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            status = run_program(lambda: program(arguments))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status or 0, stdout.getvalue(), stderr.getvalue()


def succeeds(*arguments, program=train.main):
    """What the program prints, if it has nothing to complain about."""
    status, stdout, stderr = main(*arguments, program=program)
    assert (status, stderr) == (0, ''), stderr
    return stdout


def refused(*arguments, status=2, program=train.main):
    """The one line with which the program refuses."""
    found, _, stderr = main(*arguments, program=program)
    assert found == status and ': ' in stderr and stderr.count('\n') == 1, stderr
    return stderr


def train_small(folder, *arguments):
    return succeeds(*SMALL, '--results-path', folder, *arguments)


def resume(folder, *arguments):
    return succeeds('--results-path', folder, '--resume', *arguments)


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.002)


def numbers(path, without=TIMINGS):
    """The text of each cell of a table, header first: two runs are equal where these are."""
    table = [line.split(',') for line in Path(path).read_text().splitlines()]
    kept = [index for index, column in enumerate(table[0]) if column not in without]
    return [[line[index] for index in kept] for line in table]


def same(folder, other, name='CONV-3-4'):
    """Whether a network has the same tables in two results folders, timings aside."""
    tables = []
    for results in (folder, other):
        tables.append({path.name: numbers(path) for path in (results / name).glob('*.csv')})
    return tables[0] == tables[1]


def rows(folder, name='CONV-3-4'):
    """The rows of a network's metrics.csv so far; -1 if there is none yet."""
    path = folder / name / 'metrics.csv'
    return path.read_text().count('\n') - 1 if path.exists() else -1


def contents(folder):
    """{path: bytes} of every file of a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def settings_of(**flags):
    """The settings of a single network: the defaults and these."""
    return load_settings(flags=flags)[1][0]


@pytest.fixture(scope='session')
def uninterrupted(tmp_path_factory):
    """The small run to its end, without an interruption."""
    folder = tmp_path_factory.mktemp('uninterrupted') / 'run'
    train_small(folder)
    return folder


@pytest.fixture(scope='session')
def digits():
    return load_dataset('digits', 'nowhere')


@pytest.fixture(scope='session')
def mnist():
    if not Path(os.environ.get('DATA_DIR', ''), 'MNIST').is_dir() or 'DATA_DIR' not in os.environ:
        pytest.skip('DATA_DIR does not hold MNIST')
    return load_dataset('MNIST', os.environ['DATA_DIR'])
