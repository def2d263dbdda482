"""When a run is measured, and how a row is put into words."""

import itertools
import math
import signal
import time
import warnings
import weakref
from types import SimpleNamespace

import pace
import pytest
import torch
from conftest import ROOT, SMALL, main, resume, settings_of, signals_as_before, train_small

import device as machine
import evaluation
from evaluation import report, rounded_up, schedule, stopped_early
from records import load_network, read_metrics


@pytest.mark.parametrize(
    'epochs, rounds, rewind', [*itertools.product((0, 1, 4), (0, 1, 3), (-1, 0, 2))]
)
def test_the_schedule_goes_from_epoch_to_epoch(epochs, rounds, rewind):
    """Against the rule step by step: on to the next epoch, behind the last one a pruning, behind it back to the rewinding."""
    settings = SimpleNamespace(epochs=epochs, prune_rounds=rounds, rewind_epoch=rewind)
    if rounds and max(rewind, 0) >= epochs > 0:
        return
    place, expected = (0, 0), []
    while place[0] <= rounds:
        expected.append(place)
        round_, epoch = place
        if round_ > 0 and epoch == 0:
            place = (round_, max(rewind, 0) + 1) if epochs else (round_ + 1, 0)
        else:
            place = (round_, epoch + 1) if epoch < epochs else (round_ + 1, 0)
    assert schedule(settings) == expected == sorted(expected)


def test_a_stop_wants_three_hopeless_rows_of_one_round():
    settings = SimpleNamespace(
        early_stop_epoch=3, early_stop_accuracy=0.5, target_loss=0.0, prune_rounds=0
    )
    rows = [
        {'round': 0, 'epoch': epoch, 'train_error': 0.6, 'train_loss': 1.0} for epoch in range(5)
    ]
    assert stopped_early(settings, rows[:3]) is None  # the untrained network does not count
    assert stopped_early(settings, rows[1:4]) == 'stopped at epoch 3: accuracy below 0.5'
    assert stopped_early(settings, [*rows[1:3], rows[3] | {'train_error': 0.4}]) is None
    assert stopped_early(settings, [rows[1], rows[2], rows[3] | {'round': 1}]) is None
    assert stopped_early(SimpleNamespace(**vars(settings) | {'early_stop_epoch': 0}), rows) is None


@pytest.mark.parametrize('value', [0.12345, 0.99949, 1 / 3, 0.12341, 1.0, math.inf])
def test_bounds_are_rounded_up(value):
    assert value <= rounded_up(value) <= value + 1e-4 or value == math.inf == rounded_up(value)
    row = {
        'test_error': 0.1,
        'train_error': 0.1,
        'generalization_gap': 0.0,
        'our_bound': 2.0**value,
        'pac_bayes_error': value,
    }
    if value < 1:
        words = report(row).split()
        assert float(words[words.index('A') + 1]) >= value
        assert float(words[words.index('ours') + 1].removeprefix('2^')) >= value


def test_a_line_of_the_log_fits_a_page(tmp_path):
    stdout = train_small(tmp_path / 'run', '--epochs', '1', '--label-noise', '0.1', '0.2')
    lines = [line for line in stdout.splitlines() if ' epoch ' in line]
    assert len(lines) == 4 and all(len(line) <= 120 and 'corrected 2^' in line for line in lines)


def test_a_long_evaluation_says_that_it_goes_on(tmp_path, monkeypatch, capsys):
    """Without a terminal a line every so often, here every hundredth of a second instead of every 30 seconds."""
    import train

    def often(beat, seconds):
        assert seconds == 30
        return pace.heartbeat(beat, 0.01)

    monkeypatch.setattr(train, 'heartbeat', often)
    stdout = train_small(tmp_path / 'run', '--epochs', '1', '--width', '32')
    assert 'CONV-3-32 epoch 0/1: evaluating for 0 s\n' in stdout


def test_a_long_run_says_first_how_long_it_will_take(tmp_path, monkeypatch):
    """Before the network is measured for the first time; the weights do not notice."""
    monkeypatch.setattr('pace._seconds', lambda compute: (compute(), 100.0)[1])
    status, stdout, _ = main(*SMALL, '--epochs', '1', '--results-path', tmp_path / 'run')
    pace, first = stdout.index('an epoch takes about 75 min'), stdout.index('epoch 0/1')
    assert status == 0 and pace < first and ' on this CPU' in stdout


def test_errors_are_those_of_ieee_float32(monkeypatch):
    """Whatever products training takes: a certificate is about the network whose error it is put beside."""
    from datasets import load_dataset
    from measures.norms import measure_data
    from models import get_network

    seen, losses_and_margins = set(), evaluation.losses_and_margins

    def noted(*arguments):
        seen.add(torch.backends.cuda.matmul.fp32_precision)
        return losses_and_margins(*arguments)

    monkeypatch.setattr(evaluation, 'losses_and_margins', noted)
    settings, dataset = (
        settings_of(dataset_name='digits', width=4),
        load_dataset('digits', 'nowhere'),
    )
    net = get_network(settings, (1, 8, 8), 10)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = 'tf32'
    try:
        evaluation.training_loss(net, settings, dataset)
        assert seen == {'ieee'}
        evaluation.evaluate(net, settings, dataset, measure_data(net, dataset.train_images), 0, 0)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert seen == {'ieee'}


def test_an_unfinished_network_is_loaded_with_a_warning(tmp_path, kill_at):
    kill_at('log', 4, *SMALL, '--results-path', tmp_path / 'run')  # behind the row of epoch 1
    with pytest.warns(
        UserWarning,
        match='its training is not finished; the last row is that of epoch 1 of round 0',
    ):
        load_network(tmp_path / 'run' / 'CONV-3-4')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_network(ROOT / 'results' / 'sparse-certificate' / 'CONV-3-16')


def test_a_certificate_that_was_stopped_does_not_start_over(tmp_path, monkeypatch):
    """A is kept in the checkpoint; a resume computes B and C, and the row is that of a run that was not stopped."""
    calls = []

    def trained(*arguments):
        calls.append('A')
        return 0.25

    def rounded(*arguments):
        calls.append('B and C')
        if calls.count('B and C') == 1:
            machine.on_signal(signal.SIGTERM, None)
        return 0.2, 0.125

    monkeypatch.setattr('measures.pac_bayes._trained', trained)
    monkeypatch.setattr('measures.pac_bayes._rounded', rounded)
    flags = ('--epochs', '2', '--certify-every', '1', '--results-path', tmp_path / 'run')
    assert main(*SMALL, *flags)[0] == 143
    resume(tmp_path / 'run')
    assert calls == ['A', 'B and C', 'B and C', 'A', 'B and C']
    table = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')
    assert table['pac_bayes_error'][1:].tolist() == [0.25] * 2
    assert table['pac_bayes_gibbs_error'][1:].tolist() == [0.125] * 2


def test_a_signal_within_a_callback_of_python_is_not_lost(capsys):
    """What is raised in one is ignored, as while a weak reference is cleared; no traceback is shown either."""

    def program():
        thing = set()
        weak = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
        del thing
        time.sleep(20)
        return weak

    with signals_as_before():
        assert machine.guarded('train.py', program, str) == 143
    assert capsys.readouterr().err == 'train.py: stopped by SIGTERM\n'
