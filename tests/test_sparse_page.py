"""The tables of docs/sparse.md whose runs are small: complete, and as the scripts print them from the shipped files."""

import pytest
from conftest import ROOT

from records import folder_settings, read_layers, read_metrics
from studies import channels, lottery_theory, samples, topology

RESULTS = ROOT / 'results'
SAMPLES = [RESULTS / 'samples' / count for count in ('500', '1000', '2000', '4000')]
SCRIPTS = {
    'channels': (channels, lambda: channels.main(RESULTS / 'channels'), [8]),
    'samples': (samples, lambda: samples.main(SAMPLES), [4]),
    'topology': (topology, topology.show, [7, 11]),
    'lottery theory': (lottery_theory, lottery_theory.main, [8]),
}


def tables(text):
    """{header: rows} of the tables of a text, as tuples of cells."""
    found, header = {}, None
    for line in text.splitlines():
        if line.startswith('|'):
            row = tuple(cell.strip() for cell in line.split('|')[1:-1])
            header = header or row
            found.setdefault(header, []).append(row)
        else:
            header = None
    return {header: rows[2:] for header, rows in found.items()}


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_page_quotes_the_shipped_files(name, tmp_path, monkeypatch, capsys):
    module, show, counts = SCRIPTS[name]
    monkeypatch.setattr(module, 'PICTURE', tmp_path / 'picture.png')
    show()
    printed, page = (
        tables(capsys.readouterr().out),
        tables((ROOT / 'docs' / 'sparse.md').read_text()),
    )
    assert [len(page[header]) for header in printed] == counts
    for header, rows in printed.items():
        assert set(page[header]) <= set(rows)
    assert name == 'topology' or (tmp_path / 'picture.png').stat().st_size > 10000


@pytest.mark.parametrize('folder', [RESULTS / 'channels', *SAMPLES], ids=lambda folder: folder.name)
def test_shipped_sweeps_are_complete(folder):
    for settings in folder_settings(folder)[1]:
        table = read_metrics(folder / settings.name / 'metrics.csv')
        assert list(table['epoch']) == [0, settings.epochs] * (settings.prune_rounds + 1)
        if settings.layers_every:
            epochs = range(0, settings.epochs + 1, settings.layers_every)
            assert set(read_layers(folder / settings.name / 'layers.csv')['epoch']) == set(epochs)
