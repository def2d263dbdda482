"""The zoo: its design, what is kept of a network, and the ranking of a bound of the user's own."""

import math
import re

import numpy as np
import pytest
from conftest import ROOT, succeeds
from test_ranking import numbers

import utils
from measures import landscape
from measures.norms import classification_margins, margin_error
from measures.trace import outputs
from studies import ranking, zoo
from studies.report import read_csv

ZOO = ROOT / 'results' / 'zoo'


@pytest.fixture(scope='module')
def pairs():
    return ranking.rank_networks(ZOO)[1]


def test_each_network_differs_from_its_base_in_one_knob():
    points = zoo.design()
    assert len(points) == 520
    for name, point in points.items():
        base = points[f'{zoo.base_of(name):02}-base']
        differ = [knob for knob in zoo.KNOBS if point[knob] != base[knob]]
        assert differ == [name.partition('-')[2]] * (len(differ) > 0)
        assert bool(differ) == (not name.endswith('base'))
    bases = [point for name, point in points.items() if name.endswith('base')]
    for knob, values in zoo.KNOBS.items():
        assert [point[knob] for point in bases].count(values[0]) == 20
    settings = zoo.zoo_settings('07-lr', points['07-momentum'])
    assert settings.lr == pytest.approx(settings.step_size * (1 - settings.momentum))
    assert settings.seed == settings.data_seed == 7


# ------------------------------------------------------------------------------------------------
# A zoo of two networks on the digits
# ------------------------------------------------------------------------------------------------

TWO = '00-base', '00-density'
DIGITS = zoo.FIXED | {'dataset_name': 'digits', 'stride': 1, 'epochs': 1}


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """The folder of a zoo of two networks on the digits."""
    folder = tmp_path_factory.mktemp('zoo')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, 'FIXED', DIGITS)
        for name in TWO:
            zoo.train_network(name, folder)
        before = (folder / TWO[0] / zoo.KEPT).stat().st_mtime_ns
        zoo.train_network(TWO[0], folder)  # continues after an interruption
        assert (folder / TWO[0] / zoo.KEPT).stat().st_mtime_ns == before
        zoo.write_files(folder)
    return folder


def test_the_tables_give_back_the_bounds(small):
    rows = read_csv(small / 'networks.csv')
    assert [row['name'] for row in rows] == list(TWO)
    for row, tables in zip(rows, zoo.read_tables(small), strict=True):
        for bound, value in utils.bounds_of(*tables, 0.001, 1.0).items():
            assert value == pytest.approx(float(row[bound]), rel=1e-6)


def test_the_weights_are_exactly_what_was_measured(small, monkeypatch):
    monkeypatch.setattr(zoo, 'FIXED', DIGITS)
    rows = {row['name']: row for row in read_csv(small / 'networks.csv')}
    for name, net, initial, dataset in zoo.read_networks(small):
        row = rows.pop(name)
        sample = dataset.train_images, dataset.train_labels
        margins = classification_margins(outputs(net, sample[0]), sample[1])
        assert margin_error(margins, 0) == float(row['train_error'])
        for measure in ('distance', 'margin_10', 'path_norm_2'):
            found = landscape.MEASURES[measure](net, initial, *sample)
            assert found == pytest.approx(float(row[measure]), rel=1e-9)
    assert not rows


# ------------------------------------------------------------------------------------------------
# The shipped zoo
# ------------------------------------------------------------------------------------------------


@pytest.mark.pages
def test_the_shipped_tables_give_back_the_shipped_bounds():
    rows = read_csv(ZOO / 'networks.csv')
    assert {row['name'] for row in rows} <= set(zoo.design())
    for row, tables in zip(rows, zoo.read_tables(ZOO), strict=True):
        for bound, value in utils.bounds_of(*tables, 0.001, 1.0).items():
            assert value == pytest.approx(float(row[bound]), rel=1e-6)


@pytest.mark.pages
def test_the_shipped_ranking_is_found_again(tmp_path):
    succeeds(ZOO, '--out', tmp_path, program=ranking.main)
    shipped, found = numbers(ZOO / 'ranking.csv'), numbers(tmp_path / 'ranking.csv')
    assert found.keys() == shipped.keys()
    for name, row in shipped.items():
        assert found[name] == pytest.approx(row, nan_ok=True)


@pytest.mark.pages
def test_the_page_quotes_the_zoo(pairs):
    page = ' '.join((ROOT / 'docs' / 'ranking.md').read_text().split())
    table = numbers(ZOO / 'ranking.csv')
    bounds = {name: row for name, row in table.items() if name.endswith('_bound')}
    assert len(bounds) == 10
    best = max(bounds, key=lambda name: bounds[name]['psi'])
    chance = pairs.chance()
    for sentence in (
        f'The best of ten bounds is `{best}` with {bounds[best]["psi"]:.3f}',
        'lie between {:.3f} and {:.3f}'.format(*chance['psi']),
        '`input_gradient`, with ψ = {psi:.3f} and p = {p_holm:.3f}'.format(
            **table['input_gradient']
        ),
        f'correction for {len(table)} measures',
        '(ψ = {psi:.3f}, corrected p = {p_holm:.3f})'.format(**table['epochs']),
        'random measures lie between {:.2f} and {:.2f}'.format(*chance['mean']),
    ):
        assert sentence in page
    worse = {name for name, row in bounds.items() if row['psi'] < chance['psi'][0]}
    assert worse == {f'{name}_bound' for name in 'our corrected ledent graf path'.split()}
    for name in worse:
        assert f'`{name}` ({bounds[name]["psi"]:.3f})' in page
    better = [name for name, row in bounds.items() if row['mean'] < chance['mean'][0]]
    assert len(better) == 4
    for name in (*better, 'our_bound'):
        words = '(?: has a weighted mean sign error of)?'
        assert re.search(f'`{name}`{words} {table[name]["mean"]:.2f}', page)
    assert sum(row['p_holm'] <= ranking.LEVEL for row in table.values()) == 1

    def error(name, knob, of='tau'):
        return f'{(1 - table[name][f"{of}_{knob}"]) / 2:.2f}'

    wrong = [knob for knob in pairs.knobs if table['input_gradient'][f'tau_{knob}'] < 0]
    assert wrong == ['train_samples']
    assert f'the sample size wrongly ({error("input_gradient", wrong[0])})' in page
    for knob, word in (
        ('depth', 'depth'),
        ('width', 'width'),
        ('batch_size', 'batch size'),
        ('step_size', 'step size'),
    ):
        errors = [error(name, knob) for name in bounds]
        assert f'{word} ({min(errors)} to {max(errors)})' in page
    assert {error(name, 'label_noise') for name in bounds} == {'0.00'}
    samples = sorted(error(name, 'train_samples') for name in bounds)
    assert samples[:2] == ['0.00'] * 2 and f'({samples[2]} to {samples[-1]})' in page
    differences = pairs.differences('density')
    assert f'in {(differences < 0).sum()} of {len(differences)} pairs' in page
    assert f'by {-np.median(differences):.4f} in the median' in page
    ends = error('our_bound', 'density', 'tau_high'), error('our_bound', 'density', 'tau_low')
    assert (
        '(sign error {}, 95 % interval {} to {})'.format(error('our_bound', 'density'), *ends)
        in page
    )
    assert f'`corrected_bound` ({error("corrected_bound", "density")})' in page
    contrary = error('path_bound', 'density'), error('living_weights', 'density')
    assert 'say the contrary ({} and {})'.format(*contrary) in page
    readme = ' '.join((ROOT / 'README.md').read_text().split())
    assert f'p = {table["input_gradient"]["p_holm"]:.3f}' in readme
    assert f'in {(differences < 0).sum()} of {len(differences)} pairs' in readme


@pytest.mark.pages
def test_a_users_own_bound_is_ranked_without_mnist(tmp_path, monkeypatch):
    def my_bound(network, data, delta, gamma):
        return network.rho / np.sqrt(data.m)

    monkeypatch.setitem(utils.BOUNDS, 'my_bound', my_bound)
    monkeypatch.setenv('DATA_DIR', str(tmp_path))  # empty
    said = succeeds(ZOO, program=ranking.main)
    assert '| my_bound | ' in said


@pytest.mark.pages
def test_a_users_own_measure_is_ranked_on_the_shipped_weights(monkeypatch, mnist):
    def my_measure(net, initial, images, labels):
        return sum(parameter.abs().sum().item() for parameter in net.parameters())

    monkeypatch.setitem(landscape.MEASURES, 'my_measure', my_measure)
    said = succeeds(ZOO, '--weights', program=ranking.main)
    assert '| my_measure | ' in said


@pytest.mark.long
def test_the_first_base_point_is_trained_again_to_the_shipped_numbers(tmp_path, mnist):
    """Without its timings, and to the digits that another kind of CPU leaves equal."""
    names = [name for name in zoo.design() if zoo.base_of(name) == 0]
    shipped = {row['name']: row for row in read_csv(ZOO / 'networks.csv')}
    for name in names[:2]:
        zoo.train_network(name, tmp_path)
    zoo.write_files(tmp_path)
    for row in read_csv(tmp_path / 'networks.csv'):
        before = shipped[row['name']]
        assert row['epoch'] == before['epoch']
        for column in ('train_loss', 'test_error', 'rho', 'our_bound', 'path_norm'):
            assert float(row[column]) == pytest.approx(float(before[column]), rel=0.05)


# ------------------------------------------------------------------------------------------------
# False positives and power, on the shipped gaps
# ------------------------------------------------------------------------------------------------


def p_value(pairs, values):
    errors = ranking.sign_errors(values, pairs.gaps, pairs.i, pairs.j)
    return ranking.sign_flip_p([1 - 2 * errors[pairs.knob == knob].mean() for knob in pairs.knobs])


@pytest.mark.pages
def test_measures_without_information_are_seldom_significant(pairs):
    """200 zoos of 30 measures, one half random for each network, the other for each knob."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        p = []
        for number in range(30):
            values = rng.standard_normal(len(pairs.gaps))
            if number % 2:
                # Rises or falls with each knob by the toss of a coin.
                for known in pairs.knobs.values():
                    values += rng.choice((-9, 9)) * (np.array(known) == known[0])
            p.append(p_value(pairs, values))
        found += min(ranking.holm(np.array(p))) <= ranking.LEVEL
    assert found <= 0.05 * 200 + 2 * math.sqrt(200 * 0.05 * 0.95)


@pytest.mark.pages
def test_the_gap_with_noise_is_significant(pairs):
    rng, shares = np.random.default_rng(1), []
    for noise in (0.01, 0.04, 0.16):
        p = []
        for _ in range(200):
            p.append(p_value(pairs, pairs.gaps + noise * rng.standard_normal(len(pairs.gaps))))
        shares.append(np.mean(np.array(p) * 30 <= ranking.LEVEL))
    assert shares[0] > 0.95 > 0.7 > shares[1] > 0.3 > shares[2]
