"""Which bound predicts: the statistics, what is ranked, the table and the picture, and the measures of a network."""

import csv
import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, settings_of, train_small
from torch import nn

from conf import BadInput, load_settings, settings_text
from evaluation import COLUMNS, initial_network
from measures.landscape import MEASURES, measure_landscape
from measures.norms import classification_margins
from models import get_network
from records import load_weights, read_metrics
from studies import equal_fit, ranking

N = 10_000  # test images


# ------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------


def made_up(seed=0):
    """A table of 40 networks with ties, infinities and missing cells: (knobs, gaps, measures)."""
    rng = np.random.default_rng(seed)
    places = list(
        itertools.product((1, 2, 3), (8, 64), ('erk', 'random'), (0, 1, 2, 3))
    )  # the last one is the seed
    places = [places[index] for index in sorted(rng.permutation(len(places))[:40])]
    knobs = {
        knob: [place[k] for place in places]
        for k, knob in enumerate(('depth', 'width', 'initial_mask'))
    }
    gaps = rng.integers(0, 12, 40) / 100
    coarse = rng.integers(0, 5, 40).astype(float)
    holes = rng.standard_normal(40)
    holes[rng.permutation(40)[:8]] = np.nan
    infinite = gaps + 0.05 * rng.standard_normal(40)
    infinite[rng.permutation(40)[:12]] = np.inf
    return (
        knobs,
        gaps,
        {'coarse': coarse, 'holes': holes, 'infinite': infinite, 'gap': gaps, 'against': -gaps},
    )


def brute_force(knobs, gaps, values, n):
    """The statistics by loops over networks, as their definitions read."""

    def compare(a, b):
        return 0 if a == b else 1 if a > b else -1

    def average(values):
        values = [value for value in values if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan

    places, taus, environments, pairs = (
        list(zip(*knobs.values())),
        {k: [] for k in range(len(knobs))},
        {},
        0,
    )
    everyone = []
    for i, j in itertools.combinations(range(len(gaps)), 2):
        if math.isnan(values[i]) or math.isnan(values[j]):
            continue
        error = (1 - compare(values[i], values[j]) * compare(gaps[i], gaps[j])) / 2
        everyone.append(error)
        differ = [k for k in range(len(knobs)) if places[i][k] != places[j][k]]
        if len(differ) != 1:
            continue
        (k,) = differ
        pairs += 1
        taus[k].append(1 - 2 * error)
        phi = 2 * math.exp(-2 * n * (abs(gaps[i] - gaps[j]) / 2) ** 2)
        weight = max(0, max(0, 1 - phi) ** 2 - 0.5)
        for other in set(range(len(knobs))) - {k}:
            key = k, frozenset((places[i][k], places[j][k])), other, places[i][other]
            environments.setdefault(key, []).append((weight, error))
    shares = {}
    for key, entries in environments.items():
        weight, square = sum(w for w, _ in entries), sum(w * w for w, _ in entries)
        if weight and weight**2 / square >= 2 - 1e-6:
            shares[key] = sum(w * error for w, error in entries) / weight
    of_knob = [
        average([share for key, share in shares.items() if key[0] == k]) for k in range(len(knobs))
    ]
    row = {
        'pairs': pairs,
        'environments': len(shares),
        'mean': average(of_knob),
        'max': max(shares.values()),
    }
    row |= {'p90': np.quantile(list(shares.values()), 0.9), 'worst': np.nanmax(of_knob)}
    row |= {f'error_{knob}': error for knob, error in zip(knobs, of_knob)}
    row |= {f'tau_{knob}': average(taus[k]) for k, knob in enumerate(knobs)}
    row |= {
        'psi': average([average(tau) for tau in taus.values()]),
        'tau': 1 - 2 * average(everyone),
    }
    return row


@pytest.mark.parametrize('n', [1000, N])
@pytest.mark.parametrize('name', ['coarse', 'holes', 'infinite', 'gap', 'against'])
def test_statistics_are_those_of_loops_over_networks(name, n):
    knobs, gaps, measures = made_up()
    found, expected = (
        ranking.Pairs(knobs, gaps, n).rank(measures[name]),
        brute_force(knobs, gaps, measures[name], n),
    )
    assert set(found) == set(expected)
    assert found == pytest.approx(expected, nan_ok=True)


def test_tau_along_a_knob_is_granulated_kendall():
    """Where every group has each value once: the mean over groups of (concordant - discordant) / pairs."""
    rng = np.random.default_rng(2)
    places = list(itertools.product((1, 2, 3), (8, 16, 32)))
    gaps, values = rng.permutation(9) / 9, rng.permutation(9)
    knobs = {'depth': [depth for depth, _ in places], 'width': [width for _, width in places]}
    row = ranking.Pairs(knobs, gaps, N).rank(values.astype(float))
    signs = np.sign(np.subtract.outer(gaps, gaps) * np.subtract.outer(values, values)).reshape(
        3, 3, 3, 3
    )
    along_depth = [
        signs[a, width, b, width] for width in range(3) for a in range(3) for b in range(a)
    ]
    along_width = [
        signs[depth, a, depth, b] for depth in range(3) for a in range(3) for b in range(a)
    ]
    assert row['tau_depth'] == pytest.approx(np.mean(along_depth))
    assert row['tau_width'] == pytest.approx(np.mean(along_width))
    assert row['psi'] == pytest.approx((np.mean(along_depth) + np.mean(along_width)) / 2)


def test_weights_are_positive_where_test_images_tell_two_gaps_apart():
    threshold = math.sqrt(2 / N * math.log(2 / (1 - math.sqrt(0.5))))
    assert threshold == pytest.approx(0.0196, abs=5e-5)
    below, above, certain = ranking.pair_weights(
        np.array([0.999 * threshold, -1.001 * threshold, 1.0]), N
    )
    assert below == 0 < above < 0.01 and certain == 0.5


def test_a_random_measure_stays_in_the_band_and_the_gap_does_not():
    knobs, gaps, measures = made_up()
    pairs = ranking.Pairs(knobs, gaps, N)
    low, high = pairs.chance()
    draws = np.random.default_rng(7).standard_normal((200, len(gaps)))
    inside = [low <= pairs.rank(values)['mean'] <= high for values in draws]
    assert 0.9 <= np.mean(inside) <= 0.99 and 0 < low < 0.5 < high < 1
    assert pairs.rank(gaps)['mean'] == 0 and pairs.rank(-gaps)['mean'] == 1
    assert pairs.rank(np.zeros(len(gaps)))['mean'] == 0.5


# ------------------------------------------------------------------------------------------------------------
# Table and picture of a folder
# ------------------------------------------------------------------------------------------------------------


def sweep_folder(folder, change=lambda settings, row: None, **flags):
    """A folder as a finished sweep leaves it, its rows made up: the gap is larger with noise, and with fewer samples."""
    flags = {
        'depth': [1, 2],
        'width': [8, 16],
        'train_samples': [250, 1000],
        'seed': [0, 1, 2],
        'epochs': 10,
    } | flags
    sweep, runs = load_settings(flags=flags)
    folder.mkdir()
    (folder / 'global_settings.py').write_text(settings_text(sweep, ['made up']))
    rng, rows = np.random.default_rng(0), []
    for settings in runs:
        error = round(
            0.05 + 25 / settings.train_samples + 0.02 * settings.depth + 0.005 * rng.random(), 4
        )
        row = {'name': settings.name, 'width': settings.width} | dict.fromkeys(COLUMNS, '')
        row |= {
            'epoch': 10,
            'round': 0,
            'train_loss': 0.005,
            'test_error': error,
            'train_error': 0.0,
        }
        row |= {'train_margin_error': 0.0, 'train_size': settings.train_samples, 'test_size': N}
        row |= {
            'our_bound': rng.random(),
            'path_norm': rng.random(),
            'rho': 1.0,
            'margin_10': rng.random() - 0.5,
        }
        row |= {'sharpness': 1 / error, 'distance': 3.0}
        change(settings, row)
        rows.append(row)
    with open(folder / 'summary.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def read_ranking(folder):
    with open(folder / 'ranking.csv', newline='') as file:
        return {row.pop('measure'): row for row in csv.DictReader(file)}


def test_a_users_own_bound_and_measure_are_ranked(tmp_path):
    def change(settings, row):
        share = sum(map(ord, settings.name)) % 7 / 7  # as if drawn
        row['train_margin_error'] = share
        row |= {'my_bound': row['test_error'] + 100 - share, 'my_measure': -row['test_error']}

    folder = sweep_folder(tmp_path / 'sweep', change)
    paths = ranking.draw(folder)
    assert [path.name for path in paths] == ['ranking.csv', 'ranking.png', 'ranking.pdf']
    assert paths[1].read_bytes().startswith(b'\x89PNG') and paths[2].read_bytes().startswith(
        b'%PDF'
    )
    table = read_ranking(folder)
    assert next(iter(table)) in ('my_bound', '1 / sharpness') and list(table)[-1] == 'my_measure'
    assert float(table['my_bound']['mean']) == 0 and float(table['my_measure']['mean']) == 1
    assert (
        float(table['1 / m']['error_train_samples']) == 0
        and float(table['1 / m']['error_depth']) == 0.5
    )
    assert float(table['distance / √m']['error_train_samples']) == 0
    assert {
        'our_bound',
        'path_norm',
        'rho',
        '1 / margin_10',
        'epochs',
        '- train_loss',
        'constant',
    } <= set(table)
    assert not {
        'name',
        'width',
        'epoch',
        'test_error',
        'test_set_bound',
        'margin_10',
        'path_norm_2',
    } & set(table)
    assert {row['networks'] for row in table.values()} == {'24'}


def test_a_ranking_is_redrawn_from_the_files_alone(tmp_path):
    folder = sweep_folder(tmp_path / 'sweep')
    ranking.draw(folder)
    before = (folder / 'ranking.csv').read_bytes()
    (folder / 'ranking.csv').unlink()
    ranking.draw(folder)
    assert (folder / 'ranking.csv').read_bytes() == before


def test_the_shipped_ranking_is_redrawn_and_the_page_quotes_it(tmp_path):
    folder = tmp_path / 'ranking'
    shutil.copytree(ROOT / 'results' / 'ranking', folder)
    shipped = read_ranking(folder)
    for path in folder.glob('ranking.*'):
        path.unlink()
    assert len(ranking.draw(folder)) == 3
    drawn = read_ranking(folder)
    assert set(drawn) == set(shipped)
    for name, row in shipped.items():
        before, now = (
            {column: float(cell or 'nan') for column, cell in cells.items()}
            for cells in (row, drawn[name])
        )
        assert now == pytest.approx(before, nan_ok=True)
    page = ' '.join((ROOT / 'docs' / 'ranking.md').read_text().split())
    for name, column, words in (
        ('graf_params_bound', 'mean', '{} for `graf_params_bound`, the best'),
        ('our_bound', 'mean', '{} for `our_bound`, '),
        ('corrected_bound', 'mean', '{} for `corrected_bound` and'),
        ('path_bound', 'mean', '{} for `path_bound`; random'),
        ('our_bound', 'error_train_samples', 'weighted sign error is {} for `our_bound`'),
        ('path_bound', 'error_train_samples', '{} for `path_bound`, '),
        ('corrected_bound', 'error_train_samples', '{} for `corrected_bound`, '),
        ('bartlett_bound', 'error_train_samples', '{} for `bartlett_bound`'),
        ('ledent_bound', 'error_train_samples', '{} for `ledent_bound`'),
        ('graf_params_bound', 'error_train_samples', '({} for `graf_params_bound`'),
        ('sedghi_bound', 'error_train_samples', '{} for `sedghi_bound`)'),
        ('path_bound', 'error_density', '(errors of {} and'),
        ('our_bound', 'error_density', '`our_bound` has {}, the l2'),
        ('input_gradient', 'mean', '`input_gradient` has a mean over knobs of {}'),
        ('distance / (sharpness √m)', 'mean', '`distance / (sharpness √m)` of {}'),
        ('distance / √m', 'mean', '`distance / √m` of {}'),
        ('epochs', 'mean', 'to the target, a control, has {}'),
    ):
        assert words.format(f'{float(shipped[name][column]):.2f}') in page, words


def test_the_page_quotes_the_sparse_networks_at_equal_fit(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(equal_fit, 'PICTURE', tmp_path / 'equal_fit.png')
    equal_fit.main([ROOT / 'results' / 'equal-fit' / name for name in ('masks', 'tickets')])
    printed = capsys.readouterr().out
    page = ' '.join((ROOT / 'docs' / 'ranking.md').read_text().split())
    cells = [
        [cell.strip() for cell in line.split('|')[1:-1]]
        for line in printed.splitlines()
        if line.startswith('|')
    ]
    gaps = {}
    for row in cells[2:11]:
        gaps.setdefault(row[0], []).append(row[2].split()[0])
        assert row[0] == 'tickets' or row[3] == '12 of 12'  # "in all 72 comparisons"
    assert list(gaps) == ['random', 'erk', 'tickets']
    for mask, row in gaps.items():
        assert f'| {mask} | {" | ".join(row)} |' in page
    errors = {row[0]: row[1:] for row in cells[13:]}
    for words, bound in (
        ('is {} along the density of random masks, {} of ERK masks, and {} where', 'our_bound'),
        ('`corrected_bound` has {}, {} and {}.', 'corrected_bound'),
        ('wrong almost everywhere ({}, {} and {})', 'path_bound'),
    ):
        assert words.format(*errors[bound]) in page
    assert errors['epochs'] == ['0.00'] * 3 and 'tickets: 72 pairs, 0 with weight' in printed
    assert (tmp_path / 'equal_fit.png').stat().st_size > 10000


def test_networks_above_the_target_are_left_out_and_named(tmp_path, capsys):
    def change(settings, row):
        if settings.seed == 2 and settings.depth == 1:
            row['train_loss'] = 0.011
        else:
            row['epoch'] = 7  # before the last one of the schedule

    folder = sweep_folder(tmp_path / 'sweep', change, target_loss=0.01, seed=[0, 1, 2, 3, 4, 5])
    ranking.draw(folder)
    table = read_ranking(folder)
    said = capsys.readouterr().out
    assert table['our_bound']['networks'] == '44' and '4 networks did not reach target_loss' in said
    assert 'CONV-1-8-train_samples250-seed2' in said


def test_a_knob_without_pairs_is_named_and_its_cells_are_empty(tmp_path, capsys):
    """label_noise and batch_size never differ alone."""
    folder = sweep_folder(tmp_path / 'sweep', label_noise=[0.0, 0.2], batch_size=[16, 32])
    kept = [line for line in (folder / 'summary.csv').read_text().splitlines()
            if not any(word in line for word in ('label_noise0.0-batch_size16', 'label_noise0.2-batch_size32'))]  # fmt: skip
    (folder / 'summary.csv').write_text('\n'.join(kept) + '\n')
    ranking.draw(folder)
    said, row = capsys.readouterr().out, read_ranking(folder)['our_bound']
    assert 'differ in label_noise alone' in said and 'differ in batch_size alone' in said
    assert (
        row['error_label_noise'] == row['tau_batch_size'] == ''
        and row['error_depth']
        and row['mean']
    )


@pytest.mark.parametrize('flags', [{'seed': 0}, {'depth': 1, 'width': 8, 'seed': list(range(12))}])
def test_too_few_networks_or_knobs_are_not_ranked(tmp_path, flags):
    folder = sweep_folder(tmp_path / 'sweep', **flags)
    assert ranking.draw(folder) == [] and ranking.draw(tmp_path) == []
    assert not list(folder.glob('ranking.*'))


@pytest.mark.parametrize('p', [0.0, 0.2, 0.9])
def test_the_gap_is_that_of_the_noisy_distribution(p):
    """Of all pairs (clean prediction is right or one of 9 wrong ones, label is right or one of 9 wrong ones)."""
    e, settings = 0.3, settings_of(label_noise=p)
    prediction, label = ([1 - share] + [share / 9] * 9 for share in (e, p))
    error = sum(prediction[a] * label[b] for a in range(10) for b in range(10) if a != b)
    assert ranking.gap(settings, {'test_error': e, 'train_error': 0.1}) == pytest.approx(
        error - 0.1
    )


# ------------------------------------------------------------------------------------------------------------
# Measures of a network
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(digits):
    """(network, the same before training, images, labels): weight-normalized, masked, moved by noise; labels that it gets."""
    settings = settings_of(
        dataset_name='digits', width=8, depth=2, density=0.5, initial_mask='random'
    )
    initial = initial_network(settings, digits)
    net = get_network(settings, digits.input_shape, 10)
    net.load_state_dict(initial.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        images = digits.train_images[:300]
        return net.eval(), initial, images, net(images).argmax(1)


def test_measures_are_their_formulas(trained):
    net, initial, images, labels = trained
    row = measure_landscape(net, initial, images, labels)
    assert list(row) == list(MEASURES) and set(row) <= set(COLUMNS)
    weights, starts = ([layer.weight.detach().double().numpy() for layer in side if hasattr(layer, 'weight')]
                       for side in (net, initial))  # fmt: skip
    moved = [np.sqrt(((weight - start) ** 2).sum()) for weight, start in zip(weights, starts)]
    total = sum(weight.size for weight in weights)
    assert (
        row['living_weights']
        == sum((weight != 0).sum() for weight in weights)
        == pytest.approx(total / 2, abs=1)
    )
    assert row['weight_norm'] == pytest.approx(
        np.sqrt(sum((weight**2).sum() for weight in weights))
    )
    assert row['distance'] == pytest.approx(np.sqrt(sum(step**2 for step in moved)))
    assert row['distance_product'] == pytest.approx(np.prod(moved))
    margins = classification_margins(net(images), labels).detach().numpy()
    assert row['margin_10'] == pytest.approx(np.quantile(margins, 0.1), rel=1e-5)
    assert 0 < row['path_norm_4'] < row['path_norm_2'] and row['path_distance'] > 0
    assert measure_landscape(initial, initial, images, labels)['distance'] == 0


def test_a_sharpness_that_no_noise_reaches_is_nan(trained):
    """A network that errs on nearly all of its labels cannot err by a tenth more: no end of the search is a measure."""
    net, initial, images, labels = trained
    assert math.isnan(MEASURES['sharpness'](net, initial, images, (labels + 1) % 10))


def test_sharpness_is_where_noise_costs_a_tenth(trained):
    """The noise at the measured sigma costs at most 0.1 of the training error, one step above it more."""
    net, initial, images, labels = trained
    before = [parameter.clone() for parameter in net.parameters()]
    sigma = MEASURES['sharpness'](net, initial, images, labels)
    assert all(map(torch.equal, before, net.parameters())) and 2**-12 < sigma < 2**4
    weights = [layer.weight.detach() for layer in net if hasattr(layer, 'weight')]
    generator = torch.Generator().manual_seed(0)
    draws = [
        [torch.randn(weight.shape, generator=generator) * (weight != 0) for weight in weights]
        for _ in range(5)
    ]

    def error(sigma):
        wrong = []
        for draw in draws:
            h = images
            for index, (weight, noise) in enumerate(zip(weights, draw)):
                w = weight + sigma * noise
                h = torch.relu(nn.functional.conv2d(h, w)) if index < 2 else h.flatten(1) @ w.T
            wrong.append((classification_margins(h, labels) <= 0).double().mean().item())
        return np.mean(wrong)

    step = 2.0 ** (16 / 2**10)
    assert error(0) == 0 < error(sigma) <= 0.1 < error(sigma * step)


def test_input_gradient_of_a_linear_classifier(digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    images, labels = digits.train_images[:200], digits.train_labels[:200]
    outputs, weight = net(images).detach().double(), net[1].weight.detach().double()
    ratios = []
    for output, label in zip(outputs, labels):
        other = max((c for c in range(10) if c != label), key=lambda c: output[c])
        slope = (weight[label] - weight[other]).norm().item()
        ratios.append(slope / max(output[label].item() - output[other].item(), 1e-6))
    found = MEASURES['input_gradient'](net, None, images, labels)
    assert found == pytest.approx(sorted(ratios)[99], rel=1e-4)


def test_what_is_not_covered_is_empty_and_what_does_not_fit_is_refused(digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid())
    row = measure_landscape(net, net, digits.train_images[:50], digits.train_labels[:50])
    assert (
        math.isnan(row['path_norm_2']) and math.isnan(row['path_distance']) and row['distance'] == 0
    )
    with pytest.raises(BadInput, match='labels'):
        measure_landscape(net, net, digits.train_images[:50], digits.train_labels[:40])


@pytest.mark.parametrize('mask', ['none', 'erk', 'snip'])
def test_the_initial_network_is_that_of_the_run(tmp_path, digits, mask):
    """Bit for bit, and drawing it anew leaves torch's random numbers where they were."""
    density = {'none': 1.0}.get(mask, 0.4)
    flags = {'density': density, 'initial_mask': mask, 'epochs': 1, 'snapshot_every': 1, 'seed': 3}
    train_small(
        tmp_path / 'run', *(word for knob, value in flags.items() for word in (f'--{knob}', value))
    )
    settings = settings_of(dataset_name='digits', width=4, **flags)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    found = initial_network(settings, digits)
    assert torch.equal(torch.rand(3), expected)
    net = get_network(settings, digits.input_shape, 10)
    assert load_weights(net, tmp_path / 'run' / 'CONV-3-4' / 'snapshots' / '0-0.pt') == (0, 0)
    assert all(map(torch.equal, found.state_dict().values(), net.state_dict().values()))


def test_measures_are_logged_where_they_are_due(tmp_path):
    train_small(tmp_path / 'run', '--epochs', 3, '--measures-every', 2)
    table = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')
    for column in set(MEASURES) - {'sharpness'}:  # which noise may not reach in so short a training
        assert np.isnan(table[column]).tolist() == [True, True, False, False]
    assert table['distance'][3] > table['distance'][2] > 0
