"""python -m studies.evaluate: saved weights measured with today's bounds."""

import numpy as np
import pytest
from conftest import SMALL, contents, main, refused, rows, start, succeeds, train_small, wait_for

from evaluation import COLUMNS
from records import load_checkpoint, read_metrics, save_checkpoint
from studies import evaluate
from utils import BOUNDS


@pytest.fixture(autouse=True)
def no_pictures_of_an_evaluation(monkeypatch):
    monkeypatch.setattr(evaluate, 'draw_figures', lambda folder: None)


def evaluated(*arguments):
    return succeeds(*arguments, program=evaluate.main)


def test_a_new_bound_gets_its_curve_from_snapshots(tmp_path, monkeypatch):
    """Without training; what was logged before is measured to the same digits."""
    folder = tmp_path / 'run'
    train_small(folder, '--width', '4', '5', '--snapshot-every', '2')
    before = contents(folder)
    monkeypatch.setitem(BOUNDS, 'my_bound', lambda network, data, delta, gamma: 2 * network.rho)
    stdout = evaluated(folder)
    logged = read_metrics(folder / 'CONV-3-4' / 'metrics.csv')
    measured = read_metrics(folder / 'CONV-3-4' / 'evaluation.csv')
    assert measured['epoch'].tolist() == [0, 2, 4, 6]
    assert (measured['my_bound'] == 2 * measured['rho']).all()
    exponent = np.log2(measured['my_bound'][-1])
    assert f'my_bound 2^{np.ceil(10 * exponent) / 10:.1f}' in stdout
    for column in set(COLUMNS) - {'train_seconds', 'eval_seconds'}:
        assert np.array_equal(measured[column], logged[column][::2], equal_nan=True), column
    new = {folder / name / 'evaluation.csv' for name in ('CONV-3-4', 'CONV-3-5')}
    assert set(contents(folder)) - set(before) == new

    monkeypatch.delitem(BOUNDS, 'my_bound')  # a bound that went keeps what was measured of it
    evaluated(folder)
    again = read_metrics(folder / 'CONV-3-4' / 'evaluation.csv')
    assert again['my_bound'].tolist() == measured['my_bound'].tolist()


def test_rows_whose_weights_are_gone_stay_and_gamma_may_change(tmp_path):
    folder = tmp_path / 'run'
    train_small(folder, '--snapshot-every', '3')
    evaluated(folder)
    (folder / 'CONV-3-4' / 'snapshots' / '0-3.pt').unlink()
    evaluated(folder, '--gamma', '2')
    measured = read_metrics(folder / 'CONV-3-4' / 'evaluation.csv')
    logged = read_metrics(folder / 'CONV-3-4' / 'metrics.csv')
    assert measured['epoch'].tolist() == [0, 3, 6] and measured['gamma'].tolist() == [2, 1, 2]
    assert measured['our_bound'][1] == logged['our_bound'][3]
    assert measured['our_bound'][2] < logged['our_bound'][6]


def test_weights_that_do_not_fit_are_refused(tmp_path):
    folder = tmp_path / 'run'
    train_small(folder, '--epochs', '1', '--gamma', '1', '2', '--snapshot-every', '1')
    assert 'leave --gamma out' in refused(folder, '--gamma', '3', program=evaluate.main)
    path = folder / 'global_settings.py'
    path.write_text(path.read_text().replace('\nlabel_noise = 0.0', '\nlabel_noise = 0.1'))
    line = refused(folder, program=evaluate.main)
    assert 'was trained with label_noise = 0.0, not 0.1' in line


def test_weights_between_two_rows_are_not_measured(tmp_path):
    folder = tmp_path / 'run'
    train_small(folder, '--epochs', '2')
    path = folder / 'CONV-3-4' / 'model.pt'
    save_checkpoint(path, load_checkpoint(path) | {'position': None})
    assert f'{path}: these weights lie between two rows' in evaluated(folder)
    assert not (folder / 'CONV-3-4' / 'evaluation.csv').exists()
    path.unlink()
    assert 'CONV-3-4: has no weights to evaluate' in evaluated(folder)


@pytest.mark.process
def test_a_network_in_training_is_left_alone(tmp_path):
    folder = tmp_path / 'run'
    process = start(*SMALL, '--epochs', '999', '--results-path', folder)
    wait_for(lambda: rows(folder) > 1, process)
    status, _, stderr = main(folder, program=evaluate.main)
    process.terminate()
    process.communicate()
    assert status == 2 and 'another process is working on this network' in stderr
