"""Which bound predicts: statistics, what is ranked, table and picture, measures of a network."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, settings_of, succeeds
from scipy.stats import binomtest
from torch import nn

from conf import BadInput, load_settings, settings_text
from evaluation import COLUMNS, initial_network
from measures.landscape import MEASURES, measure_landscape
from measures.norms import classification_margins
from models import get_network
from records import write_table
from studies import ranking
from studies.report import read_csv

N = 10_000  # test images


# --- statistics ---


def made_up():
    """40 networks with ties, infinities and missing cells: (knobs, gaps, measures)."""
    rng = np.random.default_rng(0)
    seeds = range(4)
    points = np.array(list(itertools.product((1, 2, 3), (8, 64), (0, 1), seeds)))
    kept = np.sort(rng.permutation(48)[:40])
    depth, width, mask, _ = points[kept].T
    gaps = rng.integers(0, 12, 40) / 100
    holes = rng.standard_normal(40)
    holes[rng.permutation(40)[:8]] = np.nan
    infinite = gaps + 0.05 * rng.standard_normal(40)
    infinite[rng.permutation(40)[:12]] = np.inf
    measures = {'coarse': rng.integers(0, 5, 40).astype(float), 'gap': gaps, 'against': -gaps}
    knobs = {'depth': depth, 'width': width, 'initial_mask': mask}
    return knobs, gaps, measures | {'holes': holes, 'infinite': infinite}


def average(values):
    return np.nanmean(list(values))


def compare(a, b):
    return int(a > b) - int(a < b)


def brute_force(knobs, gaps, values, n):
    """The statistics by loops over networks, as their definitions read."""
    points = [dict(zip(knobs, cells)) for cells in zip(*knobs.values())]
    taus, environments, everyone = {knob: [] for knob in knobs}, {}, []
    for (i, one), (j, other) in itertools.combinations(enumerate(points), 2):
        if math.isnan(values[i] + values[j]):
            continue
        order = compare(gaps[i], gaps[j])
        tau = order * compare(values[i], values[j])
        everyone.append(tau)
        differ = [knob for knob in knobs if one[knob] != other[knob]]
        if len(differ) != 1:
            continue
        knob = differ[0]
        taus[knob].append(tau)
        difference = gaps[i] - gaps[j]
        phi = 2 * math.exp(-n * difference**2 / 2)
        weight = max(0, max(0, 1 - phi) ** 2 - 0.5)
        for fixed in set(knobs) - {knob}:
            two = frozenset((one[knob], other[knob]))
            key = knob, two, fixed, one[fixed]
            environments.setdefault(key, []).append((weight, weight * (1 - tau) / 2))
    shares = {knob: [] for knob in knobs}
    for (knob, *_), entries in environments.items():
        weights, wrong = np.transpose(entries)
        if weights.sum() ** 2 >= (2 - 1e-6) * (weights**2).sum() > 0:
            shares[knob].append(wrong.sum() / weights.sum())
    every = [share for group in shares.values() for share in group]
    row = {'pairs': sum(map(len, taus.values())), 'environments': len(every)}
    errors = {f'error_{knob}': average(shares[knob]) for knob in knobs}
    along = {f'tau_{knob}': average(taus[knob]) for knob in knobs}
    row |= errors | along
    for knob, values in taus.items():
        high = binomtest(sum(tau < 1 for tau in values), len(values)).proportion_ci().high
        low = binomtest(sum(tau < 0 for tau in values), len(values)).proportion_ci().low
        row |= {f'tau_low_{knob}': 1 - 2 * high, f'tau_high_{knob}': 1 - 2 * low}
    flips = list(itertools.product((-1, 1), repeat=len(knobs)))
    sums = [sum(s * tau for s, tau in zip(signs, along.values())) for signs in flips]
    row['p'] = np.mean([total >= sum(along.values()) - 1e-9 for total in sums])
    row |= {'mean': average(errors.values()), 'worst': max(errors.values()), 'max': max(every)}
    row |= {'p90': np.quantile(every, 0.9), 'tau': average(everyone)}
    return row | {'psi': average(map(average, taus.values()))}


@pytest.mark.parametrize('n', [1000, N])
@pytest.mark.parametrize('name', ['coarse', 'holes', 'infinite', 'gap', 'against'])
def test_statistics_are_those_of_loops_over_networks(name, n):
    knobs, gaps, measures = made_up()
    found = ranking.Pairs(knobs, gaps, n).rank(measures[name])
    expected = brute_force(knobs, gaps, measures[name], n)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, nan_ok=True)


def test_random_measures_stay_in_the_band_and_the_gap_does_not():
    knobs, gaps, _ = made_up()
    pairs = ranking.Pairs(knobs, gaps, N)
    band = pairs.chance()
    rows = [pairs.rank(values) for values in np.random.default_rng(7).standard_normal((200, 40))]
    for name, middle in (('mean', 0.5), ('psi', 0), ('tau', 0)):
        low, high = band[name]
        assert low < middle < high
        assert 0.9 <= np.mean([low <= row[name] <= high for row in rows]) <= 0.99
    tied = pairs.rank(np.zeros(40))
    assert tied['mean'] == 0.5
    assert tied['psi'] == 0
    assert pairs.rank(-gaps)['mean'] == 1
    right = pairs.rank(gaps)
    assert right['mean'] == 0
    assert right['psi'] > band['psi'][1]
    assert right['p'] == 1 / 2**3
    assert pairs.rank(-gaps)['p'] == tied['p'] == 1


def test_pairs_stay_within_their_groups():
    knobs = {'depth': [1, 2, 1, 2], 'width': [8, 8, 8, 16]}
    pairs = ranking.Pairs(knobs, np.arange(4.0), N, groups=[0, 0, 1, 1])
    assert list(zip(pairs.i, pairs.j, pairs.knob)) == [(0, 1, 'depth')]


def test_holm_multiplies_the_least_p_by_their_number():
    found = ranking.holm(np.array([0.04, 0.001, 0.03, 0.9]))
    assert found == pytest.approx([0.09, 0.004, 0.09, 0.9])


# --- table and picture of a folder ---


def sweep_folder(folder, change=lambda settings, row: None, **flags):
    """A finished sweep, made up: the gap is larger with depth, and with fewer samples."""
    sweep = {'depth': [1, 2], 'width': [8, 16], 'train_samples': [250, 1000], 'seed': [0, 1, 2]}
    sweep, runs = load_settings(flags=sweep | {'epochs': 10} | flags)
    folder.mkdir()
    (folder / 'global_settings.py').write_text(settings_text(sweep, ['made up']))
    rng, rows = np.random.default_rng(0), []
    for settings in runs:
        error = 0.05 + 25 / settings.train_samples
        error += 0.02 * settings.depth + 0.005 * rng.random()
        made_up = {
            'epoch': 10,
            'round': 0,
            'train_loss': 0.005,
            'train_error': 0.0,
            'test_error': round(error, 4),
            'train_margin_error': 0.0,
            'train_size': settings.train_samples,
            'test_size': N,
            'rho': 1.0,
            'distance': 3.0,
            'our_bound': rng.random(),
            'path_norm': rng.random(),
            'margin_10': rng.random() - 0.5,
            'sharpness': 1 / error,
        }
        row = {'name': settings.name, 'width': settings.width}
        row |= dict.fromkeys(COLUMNS, math.nan) | made_up
        change(settings, row)
        rows.append(row)
    write_table(folder / 'summary.csv', list(rows[0]), rows)
    return folder


def rank(folder):
    """What the study prints, and {measure: row} of the ranking.csv that it writes."""
    printed = succeeds(folder, '--out', folder, program=ranking.main)
    return printed, {row.pop('measure'): row for row in read_csv(folder / 'ranking.csv')}


def test_a_users_own_bound_and_measure_are_ranked(tmp_path):
    def change(settings, row):
        share = sum(map(ord, settings.name)) % 7 / 7  # as if drawn
        row['train_margin_error'] = share
        row |= {'my_bound': row['test_error'] + 100 - share, 'my_measure': -row['test_error']}

    folder = sweep_folder(tmp_path / 'sweep', change)
    _, table = rank(folder)
    assert (folder / 'ranking.png').read_bytes().startswith(b'\x89PNG')
    assert (folder / 'ranking.pdf').read_bytes().startswith(b'%PDF')
    assert list(table)[-1] == 'my_measure'
    for name, column, error in (
        ('my_bound', 'mean', 0),
        ('my_measure', 'mean', 1),
        ('1 / m', 'error_train_samples', 0),
        ('1 / m', 'error_depth', 0.5),
        ('distance / √m', 'error_train_samples', 0),
    ):
        assert float(table[name][column]) == error
    ranked = {'our_bound', 'path_norm', 'rho', '1 / margin_10', *ranking.CONTROLS}
    assert ranked <= table.keys()
    assert not {'name', 'width', 'test_error', 'margin_10', 'path_norm_2'} & table.keys()
    assert {row['networks'] for row in table.values()} == {'24'}


def test_the_table_is_printed_with_the_band_of_random_measures(tmp_path):
    folder = sweep_folder(tmp_path / 'sweep')
    said = succeeds(folder, program=ranking.main)
    assert '24 networks, 108 pairs that differ in one knob' in said
    assert 'right along all 3 knobs with probability 1/8' in said
    assert re.search(r'p \(Holm, of \d+ measures\) <= 0.05: none\.', said)
    assert re.search(r'^\| constant \| 0.000 \| 1 \| 1 \| 0.500 \| 0.50 ', said, re.M)
    band = r'^\| 95 % of random measures \| -0.\d+ to 0.\d+ \|  \|  \| 0.\d+ to 0.\d+ '
    assert re.search(band, said, re.M)
    assert {path.name for path in folder.iterdir()} == {'global_settings.py', 'summary.csv'}


def numbers(path):
    """{measure: {column: number}} of a ranking.csv."""
    rows = {row.pop('measure'): row for row in read_csv(path)}
    for row in rows.values():
        row |= {column: float(cell or 'nan') for column, cell in row.items()}
    return rows


@pytest.mark.pages
def test_the_shipped_ranking_is_found_again_and_the_page_quotes_it(tmp_path):
    folder = ROOT / 'results' / 'ranking'
    succeeds(folder, '--out', tmp_path, program=ranking.main)
    shipped, found = numbers(folder / 'ranking.csv'), numbers(tmp_path / 'ranking.csv')
    assert found.keys() == shipped.keys()
    for name, row in shipped.items():
        assert found[name] == pytest.approx(row, nan_ok=True)
    page = ' '.join((ROOT / 'docs' / 'ranking.md').read_text().split())
    psi = {name: f'{row["psi"]:.3f}' for name, row in shipped.items()}
    band = ranking.rank_networks(folder)[1].chance()['psi']
    assert 'band of random measures there ({:.3f} to {:.3f})'.format(*band) in page
    bounds = sorted((row['psi'], name) for name, row in shipped.items() if name.endswith('_bound'))
    assert [name for _, name in bounds[-2:]] == ['sedghi_bound', 'graf_params_bound']
    assert bounds[-3][0] < band[1] < bounds[-2][0]
    sentence = '`graf_params_bound` with {} and `sedghi_bound` with {}'
    assert sentence.format(psi['graf_params_bound'], psi['sedghi_bound']) in page
    sentence = '`input_gradient` ({}) and the number of epochs ({})'
    assert sentence.format(psi['input_gradient'], psi['epochs']) in page


def test_networks_above_the_target_are_left_out_and_named(tmp_path):
    def change(settings, row):
        row['epoch'] = 7  # before the last one of the schedule
        if settings.seed == 2 and settings.depth == 1:
            row |= {'train_loss': 0.011, 'epoch': 10}

    folder = sweep_folder(tmp_path / 'sweep', change, target_loss=0.01, seed=[0, 1, 2, 3, 4, 5])
    said, table = rank(folder)
    assert table['our_bound']['networks'] == '44'
    assert said.count('did not reach target_loss') == 4
    assert 'CONV-1-8-train_samples250-seed2 did not reach' in said


def test_a_knob_without_pairs_is_named_and_its_cells_are_empty(tmp_path):
    """label_noise and batch_size never differ alone."""
    folder = sweep_folder(tmp_path / 'sweep', label_noise=[0.0, 0.2], batch_size=[16, 32])
    dropped = 'label_noise0.0-batch_size16', 'label_noise0.2-batch_size32'
    lines = (folder / 'summary.csv').read_text().splitlines(keepends=True)
    kept = [line for line in lines if not any(name in line for name in dropped)]
    (folder / 'summary.csv').write_text(''.join(kept))
    said, table = rank(folder)
    row = table['our_bound']
    assert 'differ in label_noise alone' in said
    assert 'differ in batch_size alone' in said
    assert row['error_label_noise'] == row['tau_batch_size'] == ''
    assert row['error_depth']
    assert row['mean']


@pytest.mark.parametrize('flags', [{'seed': 0}, {'depth': 1, 'width': 8, 'seed': list(range(12))}])
def test_too_few_networks_or_knobs_are_refused(tmp_path, flags):
    folder = sweep_folder(tmp_path / 'sweep', **flags)
    said = refused(folder, '--out', folder, program=ranking.main)
    assert 'a ranking needs 20 that vary in 2 knobs' in said
    assert not list(folder.glob('ranking.*'))
    (folder / 'summary.csv').unlink()
    assert 'write it with python train.py' in refused(folder, program=ranking.main)


@pytest.mark.parametrize('p', [0.0, 0.2, 0.9])
def test_the_gap_is_that_of_the_noisy_distribution(p):
    """Over all pairs of a prediction and a label, each right or one of 9 wrong ones."""
    e, settings = 0.3, settings_of(label_noise=p)
    prediction = [1 - e] + [e / 9] * 9
    label = [1 - p] + [p / 9] * 9
    error = 1 - np.dot(prediction, label)
    found = ranking.gap(settings, {'test_error': e, 'train_error': 0.1})
    assert found == pytest.approx(error - 0.1)


# --- measures of a network ---


@pytest.fixture
def trained(digits):
    """(network, the same before training, images, labels): masked, moved by noise, no errors."""
    flags = {'width': 8, 'depth': 2, 'density': 0.5, 'initial_mask': 'random'}
    settings = settings_of(dataset_name='digits', **flags)
    initial = initial_network(settings, digits)
    net = get_network(settings, digits.input_shape, 10)
    net.load_state_dict(initial.state_dict())
    generator = torch.Generator().manual_seed(1)
    images = digits.train_images[:300]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return net.eval(), initial, images, net(images).argmax(1)


def weights_of(net):
    return [layer.weight.detach() for layer in net if hasattr(layer, 'weight')]


def test_measures_are_their_formulas(trained):
    net, initial, images, labels = trained
    row = measure_landscape(net, initial, images, labels)
    assert list(row) == list(MEASURES)
    assert set(row) <= set(COLUMNS)
    weights = [weight.double().numpy() for weight in weights_of(net)]
    starts = [weight.double().numpy() for weight in weights_of(initial)]
    moved = [np.linalg.norm(weight - start) for weight, start in zip(weights, starts)]
    living = sum(np.count_nonzero(weight) for weight in weights)
    assert row['living_weights'] == living
    assert living == pytest.approx(sum(weight.size for weight in weights) / 2, abs=1)
    norms = [np.linalg.norm(weight) for weight in weights]
    assert row['weight_norm'] == pytest.approx(np.linalg.norm(norms))
    assert row['distance'] == pytest.approx(np.linalg.norm(moved))
    assert row['distance_product'] == pytest.approx(np.prod(moved))
    margins = classification_margins(net(images), labels).detach().numpy()
    assert row['margin_10'] == pytest.approx(np.quantile(margins, 0.1), rel=1e-5)
    assert 0 < row['path_norm_4'] < row['path_norm_2']
    assert row['path_distance'] > 0
    assert measure_landscape(initial, initial, images, labels)['distance'] == 0


def test_sharpness_is_where_noise_costs_a_tenth(trained):
    """Noise of the measured sigma costs at most 0.1 of training error, one step above it more."""
    net, initial, images, labels = trained
    before = [parameter.clone() for parameter in net.parameters()]
    sigma = MEASURES['sharpness'](net, initial, images, labels)
    assert all(map(torch.equal, before, net.parameters()))
    assert 2**-12 < sigma < 2**4
    weights, generator = weights_of(net), torch.Generator().manual_seed(0)
    noise = [torch.randn(w.shape, generator=generator) * (w != 0) for w in 5 * weights]

    def error(sigma):
        wrong = 0
        for draw in range(5):
            drawn = noise[3 * draw : 3 * draw + 3]
            first, second, last = (w + sigma * e for w, e in zip(weights, drawn))
            h = nn.functional.conv2d(images, first).relu()
            h = nn.functional.conv2d(h, second).relu().flatten(1) @ last.T
            wrong += (classification_margins(h, labels) <= 0).double().mean().item() / 5
        return wrong

    # A network that errs on nearly all labels cannot err by a tenth more.
    assert math.isnan(MEASURES['sharpness'](net, initial, images, (labels + 1) % 10))
    assert error(0) == 0
    step = 2 ** (16 / 2**10)
    assert 0 < error(sigma) <= 0.1 < error(step * sigma)


def test_input_gradient_of_a_linear_classifier(digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    images, labels = digits.train_images[:200], digits.train_labels[:200]
    scores, weight = net(images).detach(), net[1].weight.detach()
    own = scores.gather(1, labels[:, None])[:, 0]
    best, other = scores.scatter(1, labels[:, None], -math.inf).max(1)
    slopes = (weight[labels] - weight[other]).norm(dim=1)
    ratios = slopes / (own - best).clamp(min=1e-6)
    found = MEASURES['input_gradient'](net, None, images, labels)
    assert found == pytest.approx(ratios.sort()[0][99].item(), rel=1e-4)


def test_what_is_not_covered_is_empty_and_what_does_not_fit_is_refused(digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid())
    row = measure_landscape(net, net, digits.train_images[:50], digits.train_labels[:50])
    assert math.isnan(row['path_norm_2'])
    assert math.isnan(row['path_distance'])
    assert row['distance'] == 0
    with pytest.raises(BadInput, match='labels'):
        measure_landscape(net, net, digits.train_images[:50], digits.train_labels[:40])
