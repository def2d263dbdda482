"""The schedule of a run, its early ends, what an evaluation measures, and how numbers are shown."""

import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, settings_of, train_small

import evaluation
import records
from evaluation import power_of_2, report, rounded_up, schedule, stopped_early
from models import get_network
from utils import BOUNDS


@pytest.mark.parametrize(
    'epochs, rounds, rewind', list(itertools.product((0, 1, 2, 5), (0, 1, 3), (-1, 0, 1, 4)))
)
def test_the_schedule_goes_from_epoch_to_epoch(epochs, rounds, rewind):
    """Against the rule step by step: train, then prune, then train again from the rewound epoch."""
    settings = SimpleNamespace(epochs=epochs, prune_rounds=rounds, rewind_epoch=rewind)
    if rounds and max(rewind, 0) >= epochs > 0:
        return
    position, expected = (0, 0), []
    while position[0] <= rounds:
        expected.append(position)
        round_, epoch = position
        if round_ > 0 and epoch == 0:
            position = (round_, max(rewind, 0) + 1) if epochs else (round_ + 1, 0)
        else:
            position = (round_, epoch + 1) if epoch < epochs else (round_ + 1, 0)
    assert schedule(settings) == expected == sorted(expected)


def test_a_stop_wants_three_hopeless_rows_of_one_round():
    knobs = {'early_stop_epoch': 3, 'early_stop_accuracy': 0.5, 'target_loss': 0.0}
    settings = SimpleNamespace(**knobs, prune_rounds=0)
    row = {'round': 0, 'train_error': 0.6, 'train_loss': 1.0}
    rows = [row | {'epoch': epoch} for epoch in range(5)]
    assert stopped_early(settings, rows[:3]) is None  # the untrained network does not count
    assert stopped_early(settings, rows[1:4]) == 'stopped at epoch 3: accuracy below 0.5'
    assert stopped_early(settings, [*rows[1:3], rows[3] | {'train_error': 0.4}]) is None
    assert stopped_early(settings, [rows[1], rows[2], rows[3] | {'round': 1}]) is None
    settings.early_stop_epoch = 0
    assert stopped_early(settings, rows) is None


@pytest.mark.parametrize('value', [0.12345, 0.99949, 1 / 3, 0.12341, 1.0])
def test_bounds_are_rounded_up(value):
    assert value <= rounded_up(value) <= value + 1e-4
    assert float(power_of_2(2.0**value).removeprefix('2^')) >= value
    row = {'test_error': 0.1, 'train_error': 0.1, 'generalization_gap': 0.0}
    words = report(row | {'our_bound': 2.0**value, 'pac_bayes_error': value}).split()
    assert float(words[words.index('A') + 1]) >= value
    assert float(words[words.index('ours') + 1].removeprefix('2^')) >= value


def test_a_line_of_the_log_fits_a_page(tmp_path):
    stdout = train_small(tmp_path / 'run', '--epochs', '1', '--label-noise', '0.1', '0.2')
    lines = [line for line in stdout.splitlines() if ' epoch ' in line]
    assert len(lines) == 4 and all(len(line) <= 120 and 'corrected 2^' in line for line in lines)


def test_errors_are_those_of_ieee_float32(digits):
    """Whatever products training takes: a bound is about the network whose error is beside it."""
    seen, switch = set(), torch.backends.cuda.matmul
    settings = settings_of(dataset_name='digits', width=4)
    net = get_network(settings, (1, 8, 8), 10)
    net[0].register_forward_hook(lambda *call: seen.add(switch.fp32_precision))
    before = switch.fp32_precision
    switch.fp32_precision = 'tf32'
    try:
        evaluation.training_loss(net, settings, digits)
        assert seen == {'ieee'} and switch.fp32_precision == 'tf32'
    finally:
        switch.fp32_precision = before


def test_no_error_is_certified_on_images_that_depend_on_the_sample(tmp_path):
    flags = '--epochs 1 --normalize True False --certify-every 0'.split()
    train_small(tmp_path, *flags)
    for value in ('True', 'False'):
        table = records.read_metrics(tmp_path / f'CONV-3-4-normalize{value}' / 'metrics.csv')
        assert (table['certified_error'] == 1).tolist() == [value == 'False'] * 2
        assert (table['corrected_bound'] > 0).all()


@pytest.mark.parametrize('name', ['epoch', 'my bound', 'width', 'lam', 3])
def test_a_bound_whose_name_cannot_be_a_column_is_refused(monkeypatch, name):
    monkeypatch.setitem(BOUNDS, name, lambda network, data, delta, gamma: 1.0)
    with pytest.raises(evaluation.BadInput, match='BOUNDS of utils.py'):
        evaluation.check_bounds()


def test_an_unfinished_network_is_loaded_with_a_warning(tmp_path):
    from records import load_network, read_metrics, rows_of, write_table

    train_small(tmp_path / 'run', '--epochs', '2')
    path = tmp_path / 'run' / 'CONV-3-4'
    table = read_metrics(path / 'metrics.csv')
    write_table(path / 'metrics.csv', table, rows_of(table)[:2])
    with pytest.warns(UserWarning, match='not finished; its last row is of epoch 1'):
        load_network(path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_network(ROOT / 'results' / 'sparse-certificate' / 'CONV-3-16')
    assert math.isfinite(table['our_bound'][-1])
