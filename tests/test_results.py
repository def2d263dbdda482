"""The shipped results: complete, redrawn from the shipped files alone, and quoted in the README as they are."""

import math
import shutil

import pytest
from conftest import ROOT, run

from conf import load_settings
from records import read_metrics

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


@pytest.mark.parametrize('name', ['digits', 'mnist-width', 'mnist-depth'])
def test_figure_is_redrawn_from_the_shipped_files(tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(ROOT / 'results' / name, folder, ignore=shutil.ignore_patterns('*.png', '*.pt', '.*'))
    for settings in load_settings(folder / 'global_settings.py')[1]:
        epochs = read_metrics(folder / settings.name / 'metrics.csv')['epoch']
        assert list(epochs) == list(range(0, settings.epochs + 1, settings.eval_every))
    status, stdout, stderr = run('--results-path', folder, '--plot')
    assert (status, stderr) == (0, '') and 'figure.png' in stdout and (folder / 'figure.png').stat().st_size > 10000


@pytest.mark.parametrize('name', ['mnist-width', 'mnist-depth'])
def test_readme_quotes_the_shipped_levels(name):
    """Each table of levels has a row per curve and a column per network of the sweep."""
    networks = [settings.name for settings in load_settings(ROOT / 'results' / name / 'global_settings.py')[1]]
    tables = (ROOT / 'README.md').read_text().split('| curve |')[1:]
    (table,) = (table for table in tables if all(network in table.partition('\n')[0] for network in networks))
    header, _, *lines = table.partition('\n\n')[0].splitlines()
    header = ['curve', *(cell.strip() for cell in header.split('|')[:-1])]
    rows = [dict(zip(header, (cell.strip() for cell in line.split('|')[1:-1]))) for line in lines]
    assert {row['curve'] for row in rows} == set(COLUMN_OF)
    for row in rows:
        for network in networks:
            value = read_metrics(ROOT / 'results' / name / network / 'metrics.csv')[COLUMN_OF[row['curve']]][-1]
            assert row[network] == f'2^{math.log2(abs(value)):.1f}', (network, row['curve'])
