"""The shipped results: complete, redrawn from the shipped files alone, and quoted in the pages as they are."""

import math
import shutil

import numpy as np
import pytest
from conftest import ROOT, run

from measures.representations import effective_depth
from records import folder_settings, read_layers, read_metrics

RESULTS = ROOT / 'results'
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


def metrics(name, network):
    return read_metrics(RESULTS / name / network / 'metrics.csv')


@pytest.mark.parametrize('name', ['digits', 'mnist-width', 'mnist-depth', 'depth', 'certificate', 'tickets-digits'])
def test_figure_is_redrawn_from_the_shipped_files(tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(RESULTS / name, folder, ignore=shutil.ignore_patterns('*.png', '*.pt', '.*'))
    for settings in folder_settings(folder)[1]:
        table = read_metrics(folder / settings.name / 'metrics.csv')
        epochs = table['epoch'][table['round'] == 0]
        assert list(epochs) == list(range(0, settings.epochs + 1, settings.eval_every))
        assert (table['round'][-1], table['epoch'][-1]) == (settings.prune_rounds, settings.epochs)
    status, stdout, stderr = run('--results-path', folder, '--plot')
    assert (status, stderr) == (0, '') and 'figure.png' in stdout and (folder / 'figure.png').stat().st_size > 10000


@pytest.mark.parametrize('name', ['mnist-width', 'mnist-depth'])
def test_the_page_of_figure_1_quotes_the_shipped_levels(name):
    """Each table of levels has a row per curve and a column per network of the sweep."""
    networks = [settings.name for settings in folder_settings(RESULTS / name)[1]]
    (table,) = (table for table in tables('figure1.md', 'curve') if all(network in table[0] for network in networks))
    assert {row['curve'] for row in table} == set(COLUMN_OF)
    for row in table:
        for network in networks:
            value = metrics(name, network)[COLUMN_OF[row['curve']]][-1]
            assert row[network] == f'2^{math.log2(abs(value)):.1f}', (network, row['curve'])


def test_the_page_of_depth_quotes_the_shipped_depths():
    table = tables('depth.md', 'wrong labels')[-1]  # the words begin a row of another table too
    assert [row.pop('wrong labels') for row in table] == ['0 %', '10 %', '30 %', '50 %'] and len(table[0]) == 3
    for noise, row in zip((0.0, 0.1, 0.3, 0.5), table):
        for network, cell in row.items():
            name = f'{network}-label_noise{noise}'
            layers = read_layers(RESULTS / 'depth' / name / 'layers.csv')
            errors = layers['train_ncc_error'][layers['epoch'] == layers['epoch'].max()][1:-1]
            depths = [f'{effective_depth(errors, eps):g}' for eps in (0.05, 0.01)]
            assert cell == f'{", ".join(depths)} ({1 - metrics("depth", name)["train_error"][-1]:.4f})', name


CERTIFIED = {'test error': 'test_error', 'A': 'pac_bayes_error', 'B': 'pac_bayes_rounded_error', 'C': 'pac_bayes_gibbs_error'}
CERTIFIED |= {'test-set bound': 'test_set_bound'}


def test_the_page_of_certificates_quotes_the_shipped_ones():
    (table,) = tables('certificate.md', 'results/certificate')
    assert len(table) == 3
    for row in table:
        last = {column: values[-1] for column, values in metrics('certificate', row['results/certificate']).items()}
        for name, column in CERTIFIED.items():
            assert row[name] == f'{last[column]:.{4 if name == "test error" else 3}f}', (row, name)


def test_the_page_of_sparse_networks_quotes_the_shipped_rounds():
    (table,) = tables('sparse.md', 'weights left')
    log = metrics('tickets-digits', 'CONV-3-16')
    ends = np.flatnonzero(log['epoch'] == 100)
    assert len(table) == len(ends) == 14
    for row, end in zip(table, ends):
        assert (row['weights left'], row['test error']) == (
            f'{100 * log["density"][end]:.1f} %',
            f'{log["test_error"][end]:.4f}',
        )
        for name, column in (('rho', 'rho'), ('our', 'our_bound'), ('corrected', 'corrected_bound'), ('path', 'path_bound')):
            assert row[name] == f'{log[column][end]:.3g}', row
