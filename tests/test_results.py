"""The shipped results: complete, redrawn from the shipped files alone, and quoted in the pages as they are."""

import ast
import csv
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run, succeeds

from datasets import DATASETS
from measures.norms import measure_network
from measures.paths import path_norm
from measures.representations import effective_depth
from measures.tails import kl_inverse
from records import folder_settings, load_network, read_layers, read_metrics
from studies import certificate_parts
from studies.compress import load

RESULTS = ROOT / 'results'
FOLDERS = [
    'digits',
    'mnist-200',
    'mnist-width',
    'mnist-depth',
    'released',
    'depth',
    'depth-cifar10',
    'certificate',
]
FOLDERS += ['sparse-certificate', 'tickets-digits', 'tickets']
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


def tables(page, first):
    """The tables of a page whose first column is called `first`, each as a list of {column: cell}."""
    found = []
    for text in (ROOT / 'docs' / page).read_text().split(f'\n| {first} |')[1:]:
        header, _, *lines = f'| {first} |{text}'.partition('\n\n')[0].splitlines()
        cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in (header, *lines)]
        found.append([dict(zip(cells[0], row)) for row in cells[1:]])
    return found


def power(value):
    return f'2^{math.log2(value):.1f}'


def metrics(name, network):
    return read_metrics(RESULTS / name / network / 'metrics.csv')


@pytest.mark.parametrize('name', FOLDERS)
def test_figure_is_redrawn_from_the_shipped_files(tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(RESULTS / name, folder, ignore=shutil.ignore_patterns('*.png', '*.pt', '.*'))
    for settings in folder_settings(folder)[1]:
        table = read_metrics(folder / settings.name / 'metrics.csv')
        epochs = table['epoch'][table['round'] == 0]
        assert list(epochs) == list(range(0, settings.epochs + 1, settings.eval_every))
        assert (table['round'][-1], table['epoch'][-1]) == (settings.prune_rounds, settings.epochs)
    assert 'figure.png' in succeeds('--results-path', folder, '--plot')
    assert (folder / 'figure.png').stat().st_size > 10000


@pytest.mark.parametrize('name', ['mnist-width', 'mnist-depth'])
def test_the_page_of_figure_1_quotes_the_shipped_levels(name):
    """Each table of levels has a row per curve and a column per network of the sweep; that by width has two more."""
    networks = {
        settings.name: (name, settings.name) for settings in folder_settings(RESULTS / name)[1]
    }
    if name == 'mnist-width':
        networks |= {'CONV-3-200': ('mnist-200', 'CONV-3-200')}
        networks |= {'CONV-3-32, released recipe': ('released', 'CONV-3-32-biasFalse')}
    (table,) = (
        table
        for table in tables('figure1.md', 'curve')
        if all(network in table[0] for network in networks)
    )
    assert {row['curve'] for row in table} == set(COLUMN_OF)
    for row in table:
        for column, network in networks.items():
            value = metrics(*network)[COLUMN_OF[row['curve']]][-1]
            assert row[column] == power(abs(value)), (column, row['curve'])


def test_the_page_of_figure_1_quotes_the_shipped_certificates():
    for sweep, table in zip(
        ('mnist-width', 'mnist-depth'), tables('figure1.md', 'certificate'), strict=True
    ):
        for row, name in zip(table, ('A', 'B', 'C', 'test-set bound'), strict=True):
            column, form = QUOTED[name]
            for network in (settings.name for settings in folder_settings(RESULTS / sweep)[1]):
                assert row[network] == written(metrics(sweep, network)[column][-1], form)


def test_the_page_of_depth_quotes_the_shipped_depths():
    table = tables('depth.md', 'wrong labels')[-1]  # the words begin a row of another table too
    assert [row.pop('wrong labels') for row in table] == ['0 %', '10 %', '30 %', '50 %'] and len(
        table[0]
    ) == 3
    for noise, row in zip((0.0, 0.1, 0.3, 0.5), table):
        for network, cell in row.items():
            name = f'{network}-label_noise{noise}'
            layers = read_layers(RESULTS / 'depth' / name / 'layers.csv')
            errors = layers['train_ncc_error'][layers['epoch'] == layers['epoch'].max()][1:-1]
            depths = [f'{effective_depth(errors, eps):g}' for eps in (0.05, 0.01)]
            assert (
                cell == f'{", ".join(depths)} ({1 - metrics("depth", name)["train_error"][-1]:.4f})'
            ), name


def test_the_page_of_depth_quotes_the_networks_of_cifar10():
    table = next(
        table for table in tables('depth.md', 'network') if table[0]['network'] == 'CONVBN-3-32'
    )
    depths = {}
    for row in table:
        layers, last = (
            read(RESULTS / 'depth-cifar10' / row['network'] / name)
            for read, name in ((read_layers, 'layers.csv'), (read_metrics, 'metrics.csv'))
        )
        final = layers['epoch'] == layers['epoch'].max()
        errors, probes = (
            layers[column][final][1:-1] for column in ('train_ncc_error', 'test_probe_error')
        )
        assert [row[f'{part} error'] for part in ('train', 'test')] == [
            f'{last[f"{part}_error"][-1]:.4f}' for part in ('train', 'test')
        ]
        assert row['NCC error of the layers on the training set'] == ', '.join(
            f'{error:.2f}' for error in errors
        )
        depths[len(errors)] = (
            effective_depth(errors, 0.3),
            effective_depth(errors, 0.25),
            f'{probes[min(4, len(probes) - 1)]:.2f}',
        )
    assert {depths[L][0] for L in (5, 8, 12)} == {4} and {depths[L][1:] for L in (8, 12)} == {
        (5, '0.23')
    }


# column of a table: column of a results file, and how it is written; certificates are rounded up
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


def written(value, form):
    return f'{math.ceil(1000 * value) / 1000:.3f}' if form == 'up' else format(value, form)


def check_rows(table, rows):
    """Every cell of a page's table that has a column of QUOTED is the shipped one, row by row."""
    assert len(table) == len(rows) > 0
    for cells, row in zip(table, rows):
        known = {name: cell for name, cell in cells.items() if name in QUOTED}
        assert len(known) >= 4
        assert known == {
            name: written(row[column], form)
            for name, (column, form) in QUOTED.items()
            if name in known
        }


def ends_of_rounds(name, network):
    log = metrics(name, network)
    ends = [np.flatnonzero(log['round'] == number)[-1] for number in np.unique(log['round'])]
    return [{column: values[end] for column, values in log.items()} for end in ends]


def test_the_page_of_certificates_quotes_the_shipped_ones():
    (table,) = tables('certificate.md', 'results/certificate')
    check_rows(
        table, [ends_of_rounds('certificate', row['results/certificate'])[-1] for row in table]
    )
    for network, table in zip(
        ('CONV-3-16', 'CONV-3-32'),
        tables('certificate.md', 'left of the convolutions'),
        strict=True,
    ):
        check_rows(table, ends_of_rounds('sparse-certificate', network))
        layers = read_layers(RESULTS / 'sparse-certificate' / network / 'layers.csv')
        dead = layers['dead_channels'][
            (layers['epoch'] == 10) & np.isin(layers['layer'], (1, 2, 3))
        ].reshape(-1, 3)
        living = (int(network.rpartition('-')[2]) - dead).tolist()
        assert [row['channels left'] for row in table] == [
            ', '.join(f'{count:.0f}' for count in row) for row in living
        ]
        assert [row['left of the convolutions'] for row in table] == [
            f'{100 * 0.5**number:.3g} %' for number in range(7)
        ]
    (table,) = tables('certificate.md', 'what A is made of')
    networks = [
        (sweep, settings)
        for sweep in ('mnist-width', 'sparse-certificate')
        for settings in folder_settings(RESULTS / sweep)[1]
    ]
    for row, (sweep, settings) in zip(table, networks, strict=True):
        assert row['A'] == written(
            ends_of_rounds(sweep, settings.name)[-1]['pac_bayes_error'], 'up'
        )


def test_the_parts_of_a_certificate_make_it_up(tmp_path, mnist, capsys, monkeypatch):
    """studies.certificate_parts, for the first row of the page's table."""
    shutil.copytree(RESULTS / 'mnist-width', tmp_path / '1')
    text = (tmp_path / '1' / 'global_settings.py').read_text()
    (tmp_path / '1' / 'global_settings.py').write_text(
        text.replace('width = [8, 16, 32]', 'width = 8')
    )
    monkeypatch.setattr(certificate_parts, 'CHANGES', {})
    certificate_parts.main([str(tmp_path / '1')])
    (line,) = capsys.readouterr().out.splitlines()
    name, *cells = (cell.strip() for cell in line.split('|')[1:-1])
    A, error, hidden, classifier, _, _, gamma, *_ = (
        float(cell.replace('2^', '')) for cell in cells[:8]
    )
    bound = kl_inverse(error, hidden + classifier) / (math.erfc(-gamma / math.sqrt(2)) / 2)
    assert name == 'CONV-3-8' and A == pytest.approx(bound, abs=3e-4)
    row = list(tables('certificate.md', 'what A is made of')[0][0].values())
    quoted = [float(cell) for cell in row[1:5]]
    assert row[0] == 'CONV-3-8, dense' and quoted == pytest.approx(
        [A, error, hidden, classifier], rel=0.01
    )


def test_the_readme_quotes_the_shipped_certificates():
    text = words('README.md')
    for network, form in (
        ('CONV-3-16', '{} to {} (test errors {} and {})'),
        ('CONV-3-32', '{} to {} ({} and {})'),
    ):
        first, *_, last = ends_of_rounds('sparse-certificate', network)
        proven = [written(row['pac_bayes_error'], 'up') for row in (first, last)]
        errors = [f'{row["test_error"]:.4f}' for row in (first, last)]
        assert 'from ' + form.format(*proven, *errors) in text
    error = metrics('digits', 'CONV-3-32')['test_error'][-1]
    assert f'It ends with a test error of {100 * error:.1f} %' in text


def test_the_page_of_sparse_networks_quotes_the_shipped_rounds():
    (table,) = tables('sparse.md', 'weights left')
    rows = {
        f'{100 * row["density"]:.1f} %': row
        for row in ends_of_rounds('tickets-digits', 'CONV-3-16')
    }
    check_rows(table, [rows[row['weights left']] for row in table])
    path = tables('certificate.md', 'left of the convolutions')[0]  # the same run, as the page says
    shown = zip(
        ('magnitude', 'random', 'path'),
        [*tables('sparse.md', 'left of the convolutions'), path],
        strict=True,
    )
    for score, table in shown:
        check_rows(table, ends_of_rounds('tickets', f'CONV-3-16-prune_score{score}'))
        assert [row['left of the convolutions'] for row in table] == [
            f'{100 * 0.5**number:.3g} %' for number in range(7)
        ]


def compressed(name, network):
    return list(csv.DictReader((RESULTS / name / network / 'compress.csv').open()))


@pytest.mark.parametrize(
    'name, network', [('compress-digits', 'CONV-2-16'), ('compress-mnist', 'CONV-3-16')]
)
def test_the_page_of_narrower_networks_quotes_the_shipped_ones(name, network):
    (table,) = (
        table for table in tables('compress.md', 'lam') if table[0]['lam'] == f'{network}, balanced'
    )
    rows = compressed(name, network)
    assert [row['lam'] for row in table[1:]] == [f'{float(row["lam"]):g}' for row in rows[1:]]
    assert [row['channels'].replace(', ', '|') for row in table] == [
        row['channels'] for row in rows
    ]
    check_rows(
        table,
        [
            {column: float(cell) for column, cell in row.items() if cell and '|' not in cell}
            for row in rows
        ],
    )
    for row in rows:
        net = load(RESULTS / name / network / f'lam-{row["lam"]}.pt')
        assert sum(weight.numel() for weight in net.parameters()) == int(row['weights'])


@pytest.mark.parametrize(
    'number, folder, network, layer',
    [(0, 'compress-layer', 'CONV-2-16', '5'), (1, 'compress-cifar10', 'CONVBN-5-32', '17')],
)
def test_the_page_of_narrower_networks_quotes_the_shipped_layers(number, folder, network, layer):
    table = [table for table in tables('compress.md', 'lam') if 'residual' in table[0]][number]
    rows = compressed(folder, network)
    assert {row['layer'] for row in rows} == {layer}
    for cells, row in zip(table, rows, strict=True):
        assert cells.pop('lam') == ('the source' if row['lam'] == '0' else row['lam'])
        channels, last = cells.pop('channels', None), cells.pop('channels of the last layer', None)
        assert (
            row['channels'].replace('|', ', ') == channels or row['channels'].split('|')[-1] == last
        )
        residual = f'{float(row["residual"]):.3g}' if row['residual'] else ''
        assert cells == {'weights': row['weights'], 'residual': residual} | {
            column: f'{float(row[column.replace(" ", "_")]):.4f}'
            for column in ('train loss', 'train error', 'test loss', 'test error')
        }


def test_the_page_of_bounds_quotes_the_shipped_levels_of_quantization():
    """docs/quantize.csv, which docs/quantize.py writes beside its picture."""
    rows = {}
    for change, level, *cells in csv.reader((ROOT / 'docs' / 'quantize.csv').open()):
        rows[change, level] = [float(cell) for cell in cells if level != 'level']
    (table,) = tables('bounds.md', 'change')
    change = ''
    for row in table:
        kind, level, *cells = row.values()
        change = kind or change
        found = [f'{value:.3g}' for value in rows[change, level.split()[0]]]
        assert cells == found, (change, level)
    assert len(table) == 12 and len(rows) == 35
    norm = metrics('mnist-width', 'CONV-3-16')['path_norm'][-1]
    assert f'its path-norm (dotted) is {norm:.1f}.' in words('docs/bounds.md')


def words(page):
    return ' '.join((ROOT / page).read_text().split())


def percent(value):
    return f'{100 * value:.0f} %'


def test_the_words_of_figure_1_are_those_of_the_files():
    def last(sweep, column):
        return [
            metrics(sweep, settings.name)[column][-1]
            for settings in folder_settings(RESULTS / sweep)[1]
        ]

    text = words('docs/figure1.md')
    assert {percent(share) for share in last('mnist-width', 'train_margin_error')} == {'95 %'}
    assert '95 % of the training samples of each network' in text
    assert (
        '`generalization_gap`) is {:.4f}, {:.4f} and {:.4f}'.format(
            *last('mnist-width', 'generalization_gap')
        )
        in text
    )
    assert '({:.2f}, {:.2f}, {:.2f} and {:.2f})'.format(*last('mnist-depth', 'rho')) in text
    bounds = [last('mnist-depth', column) for column in ('our_bound', 'golowich_bound')]
    factors = ((deepest / first) ** (1 / 3) for first, *_, deepest in bounds)
    growth = (f'{factor:.1f} = {power(factor)}' for factor in factors)
    assert "multiplies ours by {} and Golowich et al.'s by {}, on average".format(*growth) in text
    assert f'that ends below 1, at {bounds[0][0]:.2f}' in text
    shares = [f'{100 * share:.0f}' for share in last('mnist-depth', 'train_margin_error')]
    assert (
        f'a margin error of {shares[0]} % (column `train_margin_error`; {shares[1]}, {shares[2]} and {shares[3]} %'
        in text
    )
    assert (
        'The gaps are {:+.4f}, {:+.4f}, {:+.4f} and {:+.4f}'.format(
            *last('mnist-depth', 'generalization_gap')
        )
        in text
    )
    for folder in ('mnist-width', 'mnist-depth', 'mnist-200'):
        for settings in folder_settings(RESULTS / folder)[1]:
            assert (metrics(folder, settings.name)['certified_error'] == 1).all()


def test_the_words_of_the_released_recipe_are_those_of_the_files():
    text, (without, biases) = (
        words('docs/figure1.md'),
        (metrics('released', f'CONV-3-32-bias{bias}') for bias in (False, True)),
    )
    table = metrics('mnist-width', 'CONV-3-32')
    errors = [
        log[column][-1]
        for log in (without, biases, table)
        for column in ('test_error', 'train_error')
    ]
    assert (
        '{:.4f} (test) and {:.4f} (training), {} and {};'.format(
            *errors[:2], *map(power, errors[:2])
        )
        in text
    )
    assert 'with biases, as released, {:.4f} and {:.4f}.'.format(*errors[2:4]) in text
    assert "The table's recipe leaves {:.4f} and {:.4f}.".format(*errors[4:]) in text
    assert f'`rho` is {without["rho"][-1]:.2f} against {table["rho"][-1]:.2f}' in text
    golowich = [power(log['golowich_bound'][-1]) for log in (without, table)]
    assert "Golowich et al.'s ({} against {})".format(*golowich) in text
    ours = without['our_bound'][[-3, -1]]
    assert 0 < math.log2(ours[0] / ours[1]) < 0.1 and f'leaves ours at {power(ours[1])}' in text
    wide = metrics('mnist-200', 'CONV-3-200')
    assert f'ours is {power(wide["our_bound"][-1])} for CONV-3-200' in text
    assert f'{power(wide["our_bound"][-1])} for CONV-3-200, and' in words('README.md')
    assert (
        f'trained for {wide["epoch"][-1]:.0f} of' in text
        and f'seed 0, {wide["epoch"][-1]:.0f} epochs in bfloat16' in text
    )


def test_the_levels_as_the_released_code_plots_them(mnist):
    pages = words('docs/figure1.md') + words('docs/released_code.md')
    for network, sentences in (
        ('mnist-width/CONV-3-32', ('the levels are then {} for ours and {} for Golowich',)),
        (
            'released/CONV-3-32-biasFalse',
            ('gives {} and {} instead', "ours is {} and Golowich et al.'s {}, where the paper"),
        ),
        (
            'released/CONV-3-32-biasTrue',
            ("ours is {} and Golowich et al.'s {} with the biases left out",),
        ),
    ):
        levels = released_code(network)[-1].replace(',', '').split()
        assert all(sentence.format(levels[3], levels[7]) in pages for sentence in sentences), levels


def test_the_words_of_the_bounds_are_those_of_the_files():
    table = metrics('mnist-width', 'CONV-3-16')
    norm, path, corrected = (
        table[column][table['epoch'] == 2].item()
        for column in ('path_norm', 'path_bound', 'corrected_bound')
    )
    quoted = f'r = {norm:.1f}, `path_bound` is {path:.1f} and `corrected_bound` {corrected:.1f}'
    text = words('docs/bounds.md')
    assert quoted in text
    norm, path, corrected = (
        table[column][-1] for column in ('our_bound', 'path_bound', 'corrected_bound')
    )
    assert (
        f'{path:.1f} for CONV-3-16 on MNIST after 100 epochs, where `corrected_bound` is {corrected:.1f}'
        in text
    )
    assert f"Figure 1's own curve, is {norm:.2f}" in text


def test_the_counterexample_of_the_page_of_bounds(mnist):
    """Kahane's lower bounds on the complexity, with a sign per sample and output and with one per sample, rounded down."""
    for depth in (1, 2):
        crop = mnist.train_images[:, 0, : 28 - depth, : 28 - depth].double()
        lower = math.sqrt(crop.square().sum().item() / 2) / len(crop)
        assert 0.085 <= math.sqrt(10) * lower < 0.086 and 0.027 <= lower < 0.028
    text = words('docs/bounds.md')
    assert (
        '=0.085$; the right side is 0.024 for CONV-1, 0.054 for CONV-2' in text
        and 'complexity of at least 0.027' in text
    )


def test_the_examples_of_the_pages_print_what_they_say(capsys):
    page = (ROOT / 'docs' / 'bounds.md').read_text()
    ((code, output),) = re.findall(r'```python\n(.*?)```\n\n```\n(.*?)```', page, flags=re.S)
    exec(code, {})
    assert capsys.readouterr().out == output
    page = (ROOT / 'docs' / 'certificate.md').read_text()
    printed = ast.literal_eval(re.search(r"^\{'pac_bayes_error.*\}$", page, flags=re.M)[0])
    last = ends_of_rounds('sparse-certificate', 'CONV-3-16')[-1]
    assert printed == pytest.approx({column: last[column] for column in printed}, rel=1e-6)


def released_code(network):
    """The lines of tests/released_code.py."""
    script = [sys.executable, ROOT / 'tests' / 'released_code.py', RESULTS / network]
    return subprocess.run(
        script, capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.splitlines()


def test_the_page_of_the_released_code_quotes_its_factors(mnist):
    factors = [
        float(line[60:].split()[0])
        for line in released_code('mnist-width/CONV-3-8')
        if ' times ' in line
    ]
    page = words('docs/released_code.md')
    quoted = [
        '2.75',
        '2.99',
        '1.20',
        '1.20',
        '1.10',
        '1.06',
        '0.60',
        '0.205',
        '1.82',
        '3.39',
        '6.83',
        '1.36',
        '6.87',
    ]
    for factor, number in zip(factors, quoted, strict=True):
        assert re.search(rf'(?<![\d.]){number}(?!\d)', page) and factor == pytest.approx(
            float(number), abs=0.0052
        )


def fall(rows, column, number):
    """By what share of the first row a column is lower in another."""
    return 1 - rows[number][column] / rows[0][column]


def test_the_words_of_sparse_networks_are_those_of_the_files():
    """ "A third", "a twentieth" and "a tenth" of docs/sparse.md."""
    digits, mnist = (
        ends_of_rounds('tickets-digits', 'CONV-3-16'),
        ends_of_rounds('tickets', 'CONV-3-16-prune_scorepath'),
    )
    assert max(row['test_error'] for row in digits[:7]) < digits[0]['test_error'] + 2.5 / 360
    assert fall(digits, 'path_bound', 6) == pytest.approx(1 / 3, abs=0.02)
    assert fall(digits, 'our_bound', 6) == pytest.approx(1 / 20, abs=0.01)
    assert fall(mnist, 'pac_bayes_error', -1) == pytest.approx(1 / 2, abs=0.05)
    for column in ('pac_bayes_rounded_error', 'pac_bayes_gibbs_error'):
        assert fall(mnist, column, -1) == pytest.approx(1 / 20, abs=0.01)
    assert fall(mnist, 'path_bound', -1) == pytest.approx(1 / 10, abs=0.02)
    for column in ('our_bound', 'corrected_bound'):
        assert np.argmin([row[column] for row in mnist]) == 3 and 0 < fall(mnist, column, 3) < 0.015


def test_the_words_of_narrower_networks_are_those_of_the_files():
    def falls(name, network, number, *columns):
        rows = compressed(name, network)
        return [
            percent(1 - float(rows[number][column]) / float(rows[0][column])) for column in columns
        ]

    text, norms = words('docs/compress.md'), ('our_bound', 'corrected_bound', 'path_bound')
    low, *_, high = falls('compress-digits', 'CONV-2-16', 3, *norms)
    assert f"the paper's, the corrected and the path bound fall by {low} to {high}" in text
    others = falls('compress-digits', 'CONV-2-16', 3, 'graf_bound', 'ledent_bound', 'sedghi_bound')
    assert (
        "sum over channels, gain {} and {}, and Sedghi's, which has the number of weights in it, {}.".format(
            *others
        )
        in text
    )
    mnist = falls('compress-mnist', 'CONV-3-16', 2, *norms)
    assert 'ours by {}, the corrected bound by {} and the path bound by {},'.format(*mnist) in text


def test_the_words_of_depth_are_those_of_the_files():
    """On test digits, with half of the training labels wrong: the first layer of each network and the last one."""
    for deep in (4, 8, 12):
        layers = read_layers(RESULTS / 'depth' / f'MLP-{deep}-100-label_noise0.5' / 'layers.csv')
        accuracy = 1 - layers['test_ncc_error'][layers['epoch'] == layers['epoch'].max()]
        assert accuracy[1] > 0.79 and accuracy[deep] < 0.51
    finding = 'more than 79 % of the test digits in the first layer of every network, and for fewer than 51 % in the last'
    assert finding in words('docs/depth.md')


WEIGHTS = sorted(path.parent.relative_to(RESULTS) for path in RESULTS.glob('*/*/weights.pt'))


@pytest.mark.parametrize('path', WEIGHTS, ids=str)
def test_shipped_weights_are_those_of_the_last_row(path):
    net, settings = load_network(RESULTS / path)
    last = ends_of_rounds(*path.parts)[-1]
    if not settings.bias:
        assert measure_network(net, DATASETS[settings.dataset_name][1]).rho == pytest.approx(
            last['rho'], rel=1e-6
        )
    assert path_norm(net, DATASETS[settings.dataset_name][1]) == pytest.approx(
        last['path_norm'], rel=1e-6
    )


def test_a_clone_measures_the_shipped_weights_anew(tmp_path, mnist):
    shutil.copytree(
        RESULTS / 'mnist-width',
        tmp_path / '1',
        ignore=shutil.ignore_patterns('CONV-3-16', 'CONV-3-32', '*.png'),
    )
    status, stdout, _ = run('--results-path', tmp_path / '1', '--evaluate', timeout=600)
    assert status == 0 and 'evaluation.csv: 1 row\n' in stdout
    found = read_metrics(tmp_path / '1' / 'CONV-3-8' / 'evaluation.csv')
    last = ends_of_rounds('mnist-width', 'CONV-3-8')[-1]
    for column in (
        'test_error',
        'our_bound',
        'corrected_bound',
        'path_bound',
        'pac_bayes_error',
        'pac_bayes_gibbs_error',
    ):
        assert found[column][0] == pytest.approx(last[column], rel=1e-3), column
