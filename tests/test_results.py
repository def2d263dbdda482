"""The shipped results: complete, drawn again from the shipped files, and quoted as they are."""

import ast
import csv
import itertools
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, succeeds
from torch import nn

from conf import load_launch
from datasets import DATASETS
from evaluation import due, rounded_up
from measures.norms import measure_network
from measures.pac_bayes import COLUMNS
from measures.paths import path_norm
from measures.representations import effective_depth
from measures.tails import kl_inverse
from records import load_network, read_layers, read_metrics
from studies import certificate_parts, evaluate
from studies.compress import load

pytestmark = pytest.mark.pages

RESULTS = ROOT / 'results'
FOLDERS = """digits mnist-200 mnist-200-decays mnist-width mnist-depth released depth depth-cifar10
    certificate sparse-certificate tickets-digits tickets""".split()
COLUMN_OF = {
    'Ledent et al. 2021': 'ledent_bound',
    'Graf et al. 2022': 'graf_bound',
    'Golowich et al. 2018': 'golowich_bound',
    'Long and Sedghi 2020': 'sedghi_bound',
    'ours': 'our_bound',
    'corrected bound': 'corrected_bound',
    'train error': 'train_error',
    'test error': 'test_error',
    'absolute gap': 'generalization_gap',
}
# column of a page: column of a results file, and its format; certificates are rounded up
QUOTED = {
    'test error': ('test_error', '.4f'),
    'train error': ('train_error', '.4f'),
    'A': ('pac_bayes_error', 'up'),
    'B': ('pac_bayes_rounded_error', 'up'),
    'C': ('pac_bayes_gibbs_error', 'up'),
    'test-set bound': ('test_set_bound', 'up'),
    'weights': ('weights', '.0f'),
    'rho': ('rho', '.3g'),
    'path norm': ('path_norm', '.4g'),
    'our': ('our_bound', '.3g'),
    'corrected': ('corrected_bound', '.3g'),
    'path': ('path_bound', '.3g'),
    'sedghi': ('sedghi_bound', '.3g'),
    'graf': ('graf_bound', '.3g'),
    'ledent': ('ledent_bound', '.3g'),
}


# ------------------------------------------------------------------------------------------------
# Reading pages and results
# ------------------------------------------------------------------------------------------------


def words(page):
    return ' '.join((ROOT / page).read_text().split())


def quotes(page, *sentences):
    text = words(page)
    for sentence in sentences:
        assert sentence in text, (page, sentence)


def tables(page, first):
    """The tables of a page whose first column is `first`, each a list of {column: cell}."""
    found = []
    for text in (ROOT / page).read_text().split(f'\n| {first} |')[1:]:
        header, _, *lines = f'| {first} |{text}'.partition('\n\n')[0].splitlines()
        cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in (header, *lines)]
        found.append([dict(zip(cells[0], row)) for row in cells[1:]])
    return found


def table_with(page, first, text):
    """The table whose first row has this text in some cell."""
    (table,) = (table for table in tables(page, first) if text in table[0].values())
    return table


def rows_of_csv(*path):
    with ROOT.joinpath(*path).open() as file:
        return list(csv.DictReader(file))


def networks(sweep):
    return [settings.name for settings in load_launch(RESULTS / sweep)[1]]


def metrics(sweep, network):
    return read_metrics(RESULTS / sweep / network / 'metrics.csv')


def last_cells(sweep, column):
    return [metrics(sweep, network)[column][-1] for network in networks(sweep)]


def last_layers(sweep, network):
    layers = read_layers(RESULTS / sweep / network / 'layers.csv')
    return {name: cells[layers['epoch'] == layers['epoch'].max()] for name, cells in layers.items()}


def ends_of_rounds(sweep, network):
    log = metrics(sweep, network)
    ends = [np.flatnonzero(log['round'] == number)[-1] for number in np.unique(log['round'])]
    return [{column: values[end] for column, values in log.items()} for end in ends]


def power(value):
    return f'2^{math.log2(value):.1f}'


def percent(value):
    return f'{100 * value:.0f} %'


def written(value, form):
    return f'{math.ceil(1000 * value) / 1000:.3f}' if form == 'up' else format(value, form)


def check_rows(table, rows):
    """Each cell of a page's table that has a column of QUOTED is the shipped one."""
    assert len(table) == len(rows) > 0
    for cells, row in zip(table, rows):
        known = {name: cell for name, cell in cells.items() if name in QUOTED}
        assert len(known) >= 4
        for name, cell in known.items():
            column, form = QUOTED[name]
            assert cell == written(row[column], form), (name, row)


# ------------------------------------------------------------------------------------------------
# The shipped files
# ------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize('name', FOLDERS)
def test_figure_is_redrawn_from_the_shipped_files(tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(RESULTS / name, folder, ignore=shutil.ignore_patterns('*.png', '*.pt', '.*'))
    for settings in load_launch(folder)[1]:
        table = read_metrics(folder / settings.name / 'metrics.csv')
        epochs = table['epoch'][table['round'] == 0]
        last = settings.epochs
        every = [epoch for epoch in range(last + 1) if due(epoch, settings.eval_every, last)]
        assert list(epochs) == every
        assert (table['round'][-1], table['epoch'][-1]) == (settings.prune_rounds, settings.epochs)
    assert 'figure.png' in succeeds('--results-path', folder, '--plot')
    assert (folder / 'figure.png').stat().st_size > 10000


WEIGHTS = sorted(path.parent.relative_to(RESULTS) for path in RESULTS.glob('*/*/weights.pt'))


@pytest.mark.parametrize('path', WEIGHTS, ids=str)
def test_shipped_weights_are_those_of_the_last_row(path):
    net, settings = load_network(RESULTS / path)
    shape, last = DATASETS[settings.dataset_name][1], ends_of_rounds(*path.parts)[-1]
    if not math.isnan(last['rho']):
        assert measure_network(net, shape).rho == pytest.approx(last['rho'], rel=1e-6)
    assert path_norm(net, shape) == pytest.approx(last['path_norm'], rel=1e-6)


@pytest.mark.long
def test_a_clone_evaluates_the_shipped_weights(tmp_path, mnist):
    others = shutil.ignore_patterns('CONV-3-16', 'CONV-3-32', '*.png')
    shutil.copytree(RESULTS / 'mnist-width', tmp_path / '1', ignore=others)
    succeeds(tmp_path / '1', program=evaluate.main)
    found = read_metrics(tmp_path / '1' / 'CONV-3-8' / 'evaluation.csv')
    last = ends_of_rounds('mnist-width', 'CONV-3-8')[-1]
    for column in """test_error our_bound corrected_bound path_bound pac_bayes_error
            pac_bayes_gibbs_error""".split():
        assert found[column][0] == pytest.approx(last[column], rel=1e-3), column


# ------------------------------------------------------------------------------------------------
# README.md
# ------------------------------------------------------------------------------------------------


def test_the_readme_quotes_the_quick_start():
    log = metrics('digits', 'CONV-3-32')
    test, train, gap = (
        log[name][-1] for name in ('test_error', 'train_error', 'generalization_gap')
    )
    logs = [math.log2(log[name][-1]) for name in ('our_bound', 'corrected_bound')]
    ours, corrected = (f'2^{math.ceil(10 * exponent) / 10}' for exponent in logs)  # rounded up
    line = f'epoch 150/150 test {test:.4f} train {train:.4f} gap {gap:+.4f} ours {ours}'
    quotes('README.md', f'CONV-3-32 {line} corrected {corrected}', f'A bound of {ours} is vacuous')


def test_the_readme_quotes_the_shipped_certificates():
    first, *_, last = ends_of_rounds('sparse-certificate', 'CONV-3-16')
    proven = [written(row['pac_bayes_error'], 'up') for row in (first, last)]
    quotes('README.md', 'from {} to {}.'.format(*proven))


def test_the_readme_quotes_the_reproduction():
    wide, released = metrics('mnist-200', 'CONV-3-200'), metrics('released', 'CONV-3-32-biasFalse')
    theorem, formula, error = (list(row.values())[2:] for row in tables('README.md', 'curve')[0])
    assert theorem == [power(log['our_bound'][-1]) for log in (wide, released)]
    assert error == [power(log['test_error'][-1]) for log in (wide, released)]
    assert formula[0] == power(wide['our_bound'][-1] * released_factor())
    quotes('docs/figure1.md', f'[Evaluated as released](released_code.md), ours is {formula[1]}.')
    levels = f'{theorem[0]} for CONV-3-200 by the theorem, {formula[0]} by the released formula'
    quotes('docs/figure1.md', f'ours is {levels}')


def released_factor(depth=3):
    """The released code's logarithm and its m = 50,000, which do not depend on the weights."""
    here = (depth + 1) * math.log(2) + depth * math.log(4) + math.log(10)
    there = (depth + 1) * math.log(8) + math.log(10)
    return 1.2 * (1 + math.sqrt(2 * there)) / (1 + math.sqrt(2 * here))


# ------------------------------------------------------------------------------------------------
# figure1.md and released_code.md
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['mnist-width', 'mnist-depth'])
def test_figure1_quotes_the_shipped_levels(name):
    """Each table has a row per curve and a column per network; that by width has two more."""
    shown = {network: (name, network) for network in networks(name)}
    if name == 'mnist-width':
        shown['CONV-3-200'] = 'mnist-200', 'CONV-3-200'
        shown['CONV-3-32, released recipe'] = 'released', 'CONV-3-32-biasFalse'
    (table,) = (
        table for table in tables('docs/figure1.md', 'curve') if shown.keys() <= table[0].keys()
    )
    assert {row['curve'] for row in table} == set(COLUMN_OF)
    for row, (column, network) in itertools.product(table, shown.items()):
        value = metrics(*network)[COLUMN_OF[row['curve']]][-1]
        assert row[column] == power(abs(value)), (column, row['curve'])


def test_figure1_quotes_the_rows_around_the_decays():
    (table,) = tables('docs/figure1.md', 'network')
    logs = {'CONV-3-32': metrics('mnist-width', 'CONV-3-32')}
    logs['CONV-3-200'] = metrics('mnist-200-decays', 'CONV-3-200')
    rows = []
    for cells in table:
        log = logs[cells['network']]
        (number,) = np.flatnonzero(log['epoch'] == int(cells['epoch']))
        rows.append({column: values[number] for column, values in log.items()})
        assert float(cells['learning rate']) == pytest.approx(rows[-1]['lr'])
    check_rows(table, rows)


def test_figure1_quotes_the_shipped_certificates():
    (table,) = tables('docs/figure1.md', 'certificate')
    differences = {row['name']: row for row in rows_of_csv('results', 'coded', 'disagreement.csv')}
    for row, name in zip(table, ('A', 'B', 'C', 'E', 'test-set bound'), strict=True):
        for network in [*row][1:]:
            sweep = 'mnist-width' if network in networks('mnist-width') else 'mnist-depth'
            if name == 'E':
                bound = float(differences[f'{sweep}/{network}']['bound'])
                assert row[network] == f'{bound:.4f}'
            else:
                column, form = QUOTED[name]
                assert row[network] == written(metrics(sweep, network)[column][-1], form)


def test_the_words_of_figure1():
    def last(column, form='', sweep='mnist-depth'):
        return [format(value, form) for value in last_cells(sweep, column)]

    bounds = [last_cells('mnist-depth', column) for column in ('our_bound', 'golowich_bound')]
    factors = ((deepest / first) ** (1 / 3) for first, *_, deepest in bounds)
    growth = [f'{factor:.1f} = {power(factor)}' for factor in factors]
    assert {f'{float(share):.2f}' for share in last('train_margin_error', sweep='mnist-width')} == {
        '0.95'
    }
    quotes(
        'docs/figure1.md',
        '= 1 is 0.95 at widths 8 to 32 and above 0.9 elsewhere',
        'falls from {0} to {3}'.format(*last('rho', '.2f')),
        "multiplies it by {} and Golowich et al.'s by {}.".format(*growth),
        f'below 1 only for CONV-2-16, at {bounds[0][0]:.2f}',
        'a margin error of {} ({}, {} and {} for the'.format(*last('train_margin_error', '.2f')),
    )
    assert (np.array(last_cells('mnist-width', 'generalization_gap')) < 0).all()
    assert (np.array(last_cells('released', 'train_margin_error')) > 0.9).all()
    for sweep in ('mnist-width', 'mnist-depth', 'mnist-200'):
        assert (np.array(last_cells(sweep, 'train_margin_error')) > 0.9).all()
        for network in networks(sweep):
            assert (metrics(sweep, network)['certified_error'] == 1).all()


def test_the_words_of_the_released_recipe():
    without, biases = (metrics('released', f'CONV-3-32-bias{bias}') for bias in (False, True))
    table = metrics('mnist-width', 'CONV-3-32')
    errors = [
        [log[f'{part}_error'][-1] for part in ('test', 'train')] for log in (without, biases, table)
    ]
    bounds = [name for name in COLUMN_OF.values() if name.endswith('_bound')]
    epochs = metrics('mnist-200', 'CONV-3-200')['epoch'][-1]
    quotes(
        'docs/figure1.md',
        '{:.4f} (test) and {:.4f} (training), with them'.format(*errors[0]),
        'with them {:.4f} and {:.4f};'.format(*errors[1]),
        "the table's recipe leaves {:.4f} and {:.4f}.".format(*errors[2]),
        f'is {without["rho"][-1]:.2f} instead of {table["rho"][-1]:.2f}',
        f'reaches {power(errors[0][0])}, but then ours is {power(without["our_bound"][-1])}',
        f'trained for {epochs:.0f} of',
        f'{epochs:.0f} epochs in bfloat16',
    )
    larger = {name for name in bounds if without[name][-1] > table[name][-1]}
    assert larger == set(bounds) - {'sedghi_bound'}
    assert min(bounds, key=lambda name: without[name][-1]) == 'sedghi_bound'
    # Over the last ten epochs, as powers of two.
    change = {name: math.log2(without[name][-1] / without[name][-3]) for name in bounds}
    assert -0.1 < change['our_bound'] < -0.03 and -0.1 < change['golowich_bound'] < -0.03
    assert abs(change['ledent_bound']) < 0.003 and abs(change['graf_bound']) < 0.003
    assert 0.003 < change['sedghi_bound'] < 0.1


def test_the_words_of_the_estimate():
    """The table of bounds.md: estimates rounded up, lower bounds down."""
    rows = {int(row['depth']): row for row in rows_of_csv('results', 'falsify', 'falsify.csv')
            if row['bound'] == 'our_bound'}  # fmt: skip
    for cells in tables('docs/bounds.md', 'network')[0]:
        row = rows[int(cells['network'].removeprefix('CONV-'))]
        for name, column, direction in (
            ('estimate', 'complexity', 'up'),
            ('proven lower bound', 'proven', 'down'),
            ('one sign per sample, proven', 'one_sign', 'down'),
        ):
            assert cells[name].partition(',')[0] == rounded(float(row[column]), direction)
        above = float(row['one_sign']) > float(row['complexity'])
        assert above != cells['one sign per sample, proven'].endswith(', not above')
    one = {
        depth for depth, row in rows.items() if float(row['one_sign']) > float(row['complexity'])
    }
    sentence = f'it is false for CONV-1 to CONV-{max(one)} (for deeper networks'
    quotes('docs/bounds.md', f'CONV-1 to CONV-{max(rows)}. With one sign per sample', sentence)
    assert one == set(range(1, max(one) + 1))
    # As the released code evaluates it: its logarithm, and m = 50,000.
    released = {depth: float(row['complexity']) * released_factor(depth)
                for depth, row in rows.items()}  # fmt: skip
    assert all(released[depth] < float(row['proven']) for depth, row in rows.items())
    one = {depth for depth, row in rows.items() if float(row['one_sign']) > released[depth]}
    quotes('docs/released_code.md', f'and with one sign per sample for CONV-1 to CONV-{max(one)}')


def rounded(value, direction, digits=3):
    """Three digits, up or down."""
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    steps = math.ceil(value / step) if direction == 'up' else math.floor(value / step)
    return f'{steps * step:.{digits}g}'


def released_code(network):
    """The lines of tests/released_code.py."""
    script = [sys.executable, ROOT / 'tests' / 'released_code.py', RESULTS / network]
    result = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT)
    return result.stdout.splitlines()


@pytest.mark.long
@pytest.mark.process
def test_the_levels_as_the_released_code_plots_them(mnist):
    def levels(network):
        return re.findall(r'2\^[\d.]+', released_code(network)[-1])

    rows = tables('docs/released_code.md', 'curve')[0][:3]
    printed = [levels(f'released/CONV-3-32-bias{bias}') for bias in (True, False)]
    assert [row["CONV-3-32, paper's table"] for row in rows] == levels('mnist-width/CONV-3-32')
    assert [row['CONV-3-32, released recipe'] for row in rows] == printed[1]
    wide = metrics('mnist-200', 'CONV-3-200')
    golowich = power(wide['golowich_bound'][-1] * 2.988 * 1.2)
    ours = power(wide['our_bound'][-1] * released_factor())
    assert [row["CONV-3-200, paper's table"] for row in rows] == [ours, golowich, '']
    sentence = "with biases ours is {} and Golowich et al.'s {} too".format(*printed[0])
    quotes('docs/released_code.md', sentence)


@pytest.mark.long
@pytest.mark.process
def test_the_page_of_the_released_code_quotes_its_factors(mnist):
    lines = [line for line in released_code('mnist-width/CONV-3-8') if ' times ' in line]
    factors = [float(line[60:].split()[0]) for line in lines]
    page = words('docs/released_code.md')
    quoted = '2.75 2.99 1.20 1.20 1.10 1.06 0.60 0.205 1.82 3.39 6.83 1.36 6.87'.split()
    for factor, number in zip(factors, quoted, strict=True):
        assert re.search(rf'(?<![\d.]){number}(?!\d)', page)
        assert factor == pytest.approx(float(number), abs=0.0052)


# ------------------------------------------------------------------------------------------------
# bounds.md and certificate.md
# ------------------------------------------------------------------------------------------------


def test_the_words_of_the_bounds():
    log = metrics('mnist-width', 'CONV-3-16')
    names = 'path_bound', 'corrected_bound', 'our_bound'
    path, corrected, ours = (log[name][-1] for name in names)
    quotes(
        'docs/bounds.md',
        f'{path:.1f} for CONV-3-16 on MNIST after 100 epochs, where `corrected_bound` is'
        f' {corrected:.1f}',
        f"Figure 1's own curve, is {ours:.2f}",
    )


def test_the_example_by_hand_of_the_bounds():
    net = nn.Sequential(nn.Conv2d(1, 1, (1, 2), bias=False), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(2, 1, bias=False))
    for layer, weights in ((net[0], [1.0, -2.0]), (net[3], [3.0, -1.0])):
        layer.weight.data = torch.tensor(weights).view_as(layer.weight)
    table = measure_network(net, (1, 1, 3))
    assert (table.deg[0], table.p[0], table.path_norm) == (2, 2, 12)
    assert (table.F[0] ** 2, table.T[0] ** 2) == pytest.approx((5, 10))
    net[0].weight.data = torch.tensor([1.0, -1.0]).view_as(net[0].weight)
    assert path_norm(net, (1, 1, 3)) == 8
    quotes('docs/bounds.md', r'$3\cdot1+3\cdot2+1\cdot1+1\cdot2=12$', 'from 12 to 8')


def test_the_page_of_bounds_quotes_the_levels_of_quantization():
    """Shares of images that provably keep their class, the last column, are rounded down."""
    found = rows_of_csv('docs', 'quantize.csv')
    rows = {(row['change'], row['level']): row for row in found}
    (table,) = tables('docs/bounds.md', 'change')
    change = ''
    for cells in table:
        change = cells['change'] or change
        row = rows[change, cells['level'].split()[0]]
        values = {name: float(value) for name, value in [*row.items()][2:]}
        values['stays'] = math.floor(1000 * values['stays'] + 1e-9) / 1000
        shown = [values[name] for name in ('metric', 'worst', 'stays')]
        assert [*cells.values()][2:] == [f'{value:.3g}' for value in shown], (change, row['level'])
    ratios = [float(row['metric']) / float(row['worst']) for row in found]
    pairs = [float(row['pair']) / float(row['metric']) for row in found]
    assert 290 < min(ratios) and max(ratios) < 1320 and 0.2 < min(pairs) and max(pairs) < 0.26
    assert len(table) == 5 and len(rows) == 34
    # "which change no class", and "which does not raise the test error"
    assert float(rows['fixed point, to nearest', '8']['changed']) == 0
    assert float(rows['magnitude pruning', '80']['error']) < 0.048
    norm = metrics('mnist-width', 'CONV-3-16')['path_norm'][-1]
    quotes('docs/bounds.md', f'its path-norm (dotted) is {norm:.1f}.')


def test_the_page_of_certificates_quotes_the_shipped_ones():
    (table,) = tables('docs/certificate.md', 'kept')
    ends = ends_of_rounds('sparse-certificate', 'CONV-3-16')
    check_rows(table, ends)
    assert [row['kept'] for row in table] == HALVES
    fall = percent(1 - ends[-1]['path_bound'] / ends[0]['path_bound'])
    quotes('docs/certificate.md', f'`path_bound` falls by up to {fall},')
    wide, falls = ends_of_rounds('sparse-certificate', 'CONV-3-32'), []
    for letter, column in zip('ABC', COLUMNS):
        first, last = (written(wide[i][column], 'up') for i in (0, -1))
        falls.append(f'{letter} {"falls " * (letter == "A")}from {first} to {last}')
    quotes('docs/certificate.md', ', '.join(falls))
    (narrow,) = ends_of_rounds('certificate', 'CONV-3-8')
    proven = written(narrow['pac_bayes_error'], 'up')
    quotes('docs/certificate.md', f'({proven} at a test error of {narrow["test_error"]:.4f})')
    (table,) = tables('docs/certificate.md', 'what A is made of')
    shown = [
        (sweep, network)
        for sweep in ('mnist-width', 'sparse-certificate')
        for network in networks(sweep)
    ]
    parts = rows_of_csv('results', 'certificate', 'parts.csv')
    for row, network, part in zip(table, shown, parts, strict=True):
        assert row['A'] == written(ends_of_rounds(*network)[-1]['pac_bayes_error'], 'up')
        assert part['name'] == '/'.join(network) and row['A'] == written(float(part['A']), 'up')
        columns = 'loss', 'hidden', 'classifier', 'gamma'
        assert list(row.values())[2:] == [part[column] for column in columns]


def test_the_page_of_certificates_quotes_what_each_part_buys():
    rows = rows_of_csv('results', 'certificate', 'changes.csv')
    whole, zero, *_, many = [written(float(row['A']), 'up') for row in rows]
    assert (rows[1]['change'][-5:], rows[-1]['change'][:9]) == ('τ = 0', 'n0 = 4000')
    quotes('docs/certificate.md', f'A of the dense CONV-3-8 is {zero} instead of {whole}')
    quotes('docs/certificate.md', f'larger $n_0$ (4000: {many})')


def test_the_page_of_certificates_quotes_the_disagreement():
    rows = {row['name']: row for row in rows_of_csv('results', 'coded', 'disagreement.csv')}
    (table,) = tables('docs/certificate.md', 'shipped network')
    for cells in table:
        row = rows[cells['shipped network']]
        assert cells['differs on'] == row['differ']
        for name, column in (('Pr(f ≠ g)', 'share'), ('E', 'bound')):
            assert cells[name] == f'{float(row[column]):.4f}'
        quotes('docs/certificate.md', f'(D = {float(row["coded"]):.4f} at δ/2)')
        if cells['A']:
            last = ends_of_rounds(*row['name'].split('/'))[-1]
            assert cells['A'] == written(last['pac_bayes_error'], 'up')
    pruned, dense = (
        float(rows[f'{name}/CONV-3-16']['bound']) for name in ('sparse-certificate', 'mnist-width')
    )
    assert dense < pruned
    quotes('docs/certificate.md', f'is {pruned:.4f} for the last row and {dense:.4f} for a dense')
    wide = metrics('mnist-width', 'CONV-3-32')['test_set_bound'][-1]
    quotes('docs/certificate.md', f'of mnist-width by {written(wide, "up")} (the test-set bound)')
    (coded, *_) = rows_of_csv('results', 'coded', 'messages.csv')
    proven = f'{math.ceil(1e4 * float(coded["bound"])) / 1e4:.4f}'
    quotes('README.md', f'[network of {coded["bytes"]} bytes](docs/coded.md) has {proven}')


HALVES = [f'{100 * 0.5**number:.3g} %' for number in range(7)]


@pytest.mark.long
def test_the_parts_of_a_certificate_make_it_up(tmp_path, mnist, capsys, monkeypatch):
    """studies/certificate_parts.py, for the first row of the page's table."""
    shutil.copytree(RESULTS / 'mnist-width', tmp_path / '1')
    path = tmp_path / '1' / 'global_settings.py'
    path.write_text(path.read_text().replace('width = [8, 16, 32]', 'width = 8'))
    monkeypatch.setattr(certificate_parts, 'CHANGES', {})
    certificate_parts.main([str(tmp_path / '1')])
    (line,) = capsys.readouterr().out.splitlines()
    name, *cells = (cell.strip() for cell in line.split('|')[1:-1])
    A, error, hidden, classifier, _, _, gamma, *_ = (
        float(cell.replace('2^', '')) for cell in cells[:8]
    )
    bound = kl_inverse(error, hidden + classifier) / (math.erfc(-gamma / math.sqrt(2)) / 2)
    assert name == 'CONV-3-8' and A == pytest.approx(bound, abs=3e-4)
    row = list(tables('docs/certificate.md', 'what A is made of')[0][0].values())
    quoted = [float(cell) for cell in row[1:5]]
    assert row[0] == 'CONV-3-8, dense'
    assert quoted == pytest.approx([A, error, hidden, classifier], rel=0.01)


def test_the_examples_of_the_pages_print_what_they_say(capsys):
    page = (ROOT / 'docs' / 'bounds.md').read_text()
    ((code, output),) = re.findall(r'```python\n(.*?)```\n\n```\n(.*?)```', page, flags=re.S)
    exec(code, {})
    assert capsys.readouterr().out == output
    page = (ROOT / 'docs' / 'certificate.md').read_text()
    printed = ast.literal_eval(re.search(r"^\{'pac_bayes_error.*\}$", page, flags=re.M)[0])
    last = ends_of_rounds('sparse-certificate', 'CONV-3-16')[-1]
    assert printed == {column: rounded_up(last[column]) for column in COLUMNS}


# ------------------------------------------------------------------------------------------------
# sparse.md, compress.md and depth.md
# ------------------------------------------------------------------------------------------------


def test_the_page_of_sparse_networks_quotes_the_shipped_rounds():
    (table,) = tables('docs/sparse.md', 'weights kept')
    ends = ends_of_rounds('tickets-digits', 'CONV-3-16')
    rows = {f'{100 * row["density"]:.1f} %': row for row in ends}
    check_rows(table, [rows[row['weights kept']] for row in table])
    (magnitude,) = tables('docs/sparse.md', 'kept')
    path = tables('docs/certificate.md', 'kept')[0]  # the same run
    for score, table in (('magnitude', magnitude), ('path', path)):
        check_rows(table, ends_of_rounds('tickets', f'CONV-3-16-prune_score{score}'))
        assert [next(iter(row.values())) for row in table] == HALVES
    rows = ends_of_rounds('tickets', 'CONV-3-16-prune_scorerandom')
    *_, third, fourth, _, _, last = (row['test_error'] for row in rows)
    quotes('docs/sparse.md', f'to {third:.4f} at 25 % and to {fourth:.3f} at 12.5 %')
    assert last == 1


def test_the_words_of_sparse_networks():
    """ "A third", "a twentieth" and "9 %" of sparse.md."""

    def fall(rows, column, number):
        return 1 - rows[number][column] / rows[0][column]

    digits = ends_of_rounds('tickets-digits', 'CONV-3-16')
    mnist = ends_of_rounds('tickets', 'CONV-3-16-prune_scorepath')
    assert max(row['test_error'] for row in digits[:7]) < digits[0]['test_error'] + 2.5 / 360
    assert fall(digits, 'path_bound', 6) == pytest.approx(1 / 3, abs=0.02)
    assert fall(digits, 'our_bound', 6) == pytest.approx(1 / 20, abs=0.01)
    assert fall(mnist, 'pac_bayes_error', -1) == pytest.approx(1 / 2, abs=0.05)
    for column in ('pac_bayes_rounded_error', 'pac_bayes_gibbs_error'):
        assert fall(mnist, column, -1) == pytest.approx(1 / 20, abs=0.01)
    path = percent(fall(mnist, 'path_bound', -1))
    quotes('docs/sparse.md', f'`path_bound` by {path}')
    magnitude = ends_of_rounds('tickets', 'CONV-3-16-prune_scoremagnitude')
    for column in ('our_bound', 'corrected_bound'):
        for rows in (mnist, magnitude):
            assert np.argmin([row[column] for row in rows]) == 3
            assert 0 < fall(rows, column, 3) < 0.015
        assert abs(fall(mnist, column, -1)) < 0.01


def compressed(name, network):
    return rows_of_csv('results', name, network, 'compress.csv')


@pytest.mark.parametrize(
    'name, network', [('compress-digits', 'CONV-2-16'), ('compress-mnist', 'CONV-3-16')]
)
def test_the_page_of_narrower_networks_quotes_the_shipped_ones(name, network):
    table, rows = table_with('docs/compress.md', 'lam', f'{network}, balanced'), []
    for row in compressed(name, network):
        rows.append({key: float(cell) for key, cell in row.items() if cell and '|' not in cell})
        rows[-1]['channels'] = row['channels'].replace('|', ', ')
        net = load(RESULTS / name / network / f'lam-{row["lam"]}.pt')
        assert sum(weight.numel() for weight in net.parameters()) == int(row['weights'])
    assert [row['lam'] for row in table[1:]] == [f'{row["lam"]:g}' for row in rows[1:]]
    assert [row['channels'] for row in table] == [row['channels'] for row in rows]
    check_rows(table, rows)


def test_the_page_of_narrower_networks_quotes_the_shipped_layers():
    (table,) = (table for table in tables('docs/compress.md', 'lam') if 'residual' in table[0])
    rows = compressed('compress-layer', 'CONV-2-16')
    assert {row['layer'] for row in rows} == {'5'}
    for cells, row in zip(table, rows, strict=True):
        assert cells['lam'] == ('the source' if row['lam'] == '0' else row['lam'])
        assert cells['channels of the last layer'] == row['channels'].split('|')[-1]
        assert cells['weights'] == row['weights']
        assert cells['residual'] == (f'{float(row["residual"]):.3g}' if row['residual'] else '')
        for name in ('train error', 'test error'):
            assert cells[name] == f'{float(row[name.replace(" ", "_")]):.4f}'
        assert cells['our'] == f'{float(row["our_bound"]):.3g}'
    source, *_, last, _ = compressed('compress-cifar10', 'CONVBN-5-32')
    left, channels = (row['channels'].split('|')[-1] for row in (last, source))
    errors = ' instead of '.join(f'{float(row["test_error"]):.4f}' for row in (last, source))
    quotes('docs/compress.md', f'The classifier `{last["layer"]}` of the CONVBN-5-32')
    sentence = f'needs {left} of its {channels} channels: at lam = {last["lam"]} its test error is'
    quotes('docs/compress.md', f'{sentence} {errors}')


def test_the_page_of_narrower_networks_quotes_the_counts_of_neurons():
    rows = {row['problem']: row for row in rows_of_csv('results', 'width_theorem.csv')}
    sentence = 'at N = 40, {least} to {most} neurons where the bounds are {bound} and {rq}.'
    most = [rows[problem]['notebook_most'] for problem in ('r = 2', 'r = 5')]
    quotes('docs/compress.md', sentence.format(**rows['N = 40']))
    quotes('docs/compress.md', 'hence {} at r = 2 and {} at r = 5'.format(*most))


def test_the_words_of_narrower_networks():
    def falls(name, network, number, columns):
        rows = compressed(name, network)
        ends = [[float(rows[end][f'{column}_bound']) for end in (0, number)] for column in columns]
        return [percent(1 - after / before) for before, after in ends]

    norms = ['our', 'corrected', 'path']
    low, *_, high = falls('compress-digits', 'CONV-2-16', 3, norms)
    others = falls('compress-digits', 'CONV-2-16', 3, ['graf', 'ledent', 'sedghi'])
    mnist = falls('compress-mnist', 'CONV-3-16', 2, norms)
    quotes(
        'docs/compress.md',
        f'our, the corrected and the path bound fall by {low} to {high}',
        "sum over channels, fall by {} and {}, and Sedghi's, which counts weights, by {}.".format(
            *others
        ),
        'our bound falls by {}, the corrected bound by {} and the path bound by {},'.format(*mnist),
    )


def test_the_page_of_depth_quotes_the_shipped_depths():
    table = tables('docs/depth.md', 'wrong labels')[-1]
    assert [row.pop('wrong labels') for row in table] == ['0 %', '10 %', '30 %', '50 %']
    assert len(table[0]) == 3
    for noise, row in zip((0.0, 0.1, 0.3, 0.5), table):
        for network, cell in row.items():
            name = f'{network}-label_noise{noise}'
            layers, log = last_layers('depth', name), metrics('depth', name)
            errors = layers['train_ncc_error'][1:-1]
            depths = [f'{effective_depth(errors, eps):g}' for eps in (0.05, 0.01)]
            assert cell == f'{", ".join(depths)} ({1 - log["train_error"][-1]:.4f})', name
            # On test digits the first layer is better than the last where many labels are wrong.
            test = layers['test_ncc_error'][1:-1]
            assert (test[0] < test[-1]) == (noise >= 0.3), name
            if noise == 0.5:
                assert test[0] < 0.21 and test[-1] > 0.49
    quotes(
        'docs/depth.md',
        'the order reverses with 30 % and 50 % of the labels wrong, and not with 10 % or none',
        'more than 79 % of the test digits in the first layer of every network, and for fewer than'
        ' 51 % in the last',
    )


def test_the_page_of_depth_quotes_the_networks_of_cifar10():
    probes = {}
    for row in table_with('docs/depth.md', 'network', 'CONVBN-3-32'):
        layers = last_layers('depth-cifar10', row['network'])
        log = metrics('depth-cifar10', row['network'])
        errors = layers['train_ncc_error'][1:-1]
        for part in ('train', 'test'):
            assert row[f'{part} error'] == f'{log[f"{part}_error"][-1]:.4f}'
        depths = [f'{effective_depth(errors, eps):g}' for eps in (0.3, 0.25)]
        assert row['effective depth at eps = 0.3, 0.25'] == ', '.join(depths)
        probes[len(errors)] = layers['test_probe_error'][1:-1]
    assert [f'{probes[L][4]:.2f}' for L in (8, 12)] == ['0.23', '0.23']
