"""What the tests share: the program as a user starts it, its settings, and the digits."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['OMP_NUM_THREADS'] = '1'  # the networks of the tests are too small to share

import torch  # noqa: E402

torch.set_num_threads(1)

import launch  # noqa: E402
import sparsify  # noqa: E402
import train  # noqa: E402
from conf import load_settings  # noqa: E402
from datasets import load_dataset  # noqa: E402

DIGITS = ('--settings', str(ROOT / 'conf' / 'digits.py'))
SMALL = ('--settings', str(ROOT / 'tests' / 'small.py'))
TIMINGS = ('train_seconds', 'eval_seconds')
DRAW = launch.draw
LONGEST = [
    f'test_{name}.py'
    for name in 'slurm launch train results records recipes pac_bayes compress'.split()
]


def pytest_collection_modifyitems(items):
    """The files that take longest come first: where files run side by side, none of them is left for the end."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """To draw the figures of a small network takes longer than to train it: only --plot and tests marked `pictures` do."""
    if not request.node.get_closest_marker('pictures'):
        monkeypatch.setattr(launch, 'draw', lambda folder: None)


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


def out_of_time(*_):
    pytest.fail('not done in 300 seconds')


@contextlib.contextmanager
def signals_as_before():
    """Puts the handlers of signals back that a command of the program has changed in this process; it has 300 seconds."""
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    }
    hook = sys.unraisablehook
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(300)
    try:
        yield
    finally:
        signal.alarm(0)
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)


def main(*arguments):
    """As `run`, in this process, which is quicker."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        with signals_as_before(), pytest.MonkeyPatch.context() as patch:
            if '--plot' in arguments:
                patch.setattr(launch, 'draw', DRAW)
            status = launch.main(train.train, [str(argument) for argument in arguments])
    return status or 0, stdout.getvalue(), stderr.getvalue()


def succeeds(*arguments):
    """What train.py prints, where it has nothing to complain about."""
    status, stdout, stderr = main(*arguments)
    assert (status, stderr) == (0, ''), stderr
    return stdout


def refused(*arguments, status=2):
    """The one line with which train.py refuses."""
    found, _, stderr = main(*arguments)
    assert found == status and stderr.startswith('train.py: ') and stderr.count('\n') == 1, stderr
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


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, so that what is on the disk by then is all that is left."""


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(name, count, *arguments) runs train.py in this process up to the count-th moment of this name.

    Moments are before and after each step, each method of a run, each change of masks, each file moved into place. Returns the
    names of those that went by; with None it runs to its end.
    """
    state = SimpleNamespace(names=[], last=None)

    def watched(name, function):
        def call(*arguments, **options):
            pass_by(name)
            result = function(*arguments, **options)
            pass_by(name)
            return result

        return call

    def pass_by(name):
        state.names.append(name)
        if (name, state.names.count(name)) == state.last:
            raise Killed

    def kill(name, count, *arguments):
        state.names, state.last = [], (name, count)
        with contextlib.suppress(Killed):
            succeeds(*arguments)
        return state.names

    for name in ('prune', 'evaluate', 'log', 'advance', 'save'):
        monkeypatch.setattr(train.Run, name, watched(name, getattr(train.Run, name)))
    for owner, name in (
        (os, 'replace'),
        (sparsify, 'regrow'),
        (sparsify, 'prune'),
        (sparsify, 'rewind'),
    ):
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    monkeypatch.setattr(torch.optim.SGD, 'step', watched('step', torch.optim.SGD.step))
    return kill


def numbers(path, without=TIMINGS):
    """The text of each cell of a table, header first: two runs are equal where these are."""
    table = [line.split(',') for line in Path(path).read_text().splitlines()]
    kept = [index for index, column in enumerate(table[0]) if column not in without]
    return [[line[index] for index in kept] for line in table]


def same(folder, other, name='CONV-3-4'):
    """Whether a network has the same tables in two results folders, timings aside."""
    tables, others = (
        {path.name: numbers(path) for path in (results / name).glob('*.csv')}
        for results in (folder, other)
    )
    return tables == others


def rows(folder, name='CONV-3-4'):
    """The rows of a network's metrics.csv so far; -1 where there is none yet."""
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
