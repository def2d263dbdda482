"""The zoo: its design, what is kept of a network, and the ranking of a bound of the user's own."""

import pytest
from conftest import ROOT

import utils
from measures import landscape
from measures.norms import classification_margins, margin_error
from measures.trace import outputs
from studies import zoo
from studies.report import read_csv

ZOO = ROOT / 'results' / 'zoo'


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


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """The folder of a zoo of two networks on the digits."""
    folder = tmp_path_factory.mktemp('zoo')
    changed = {'dataset_name': 'digits', 'stride': 1, 'epochs': 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, 'FIXED', zoo.FIXED | changed)
        for name in TWO:
            zoo.train_network(name, folder)
        before = (folder / TWO[0] / zoo.KEPT).stat().st_mtime_ns
        zoo.train_network(TWO[0], folder)  # continues after an interruption
        assert (folder / TWO[0] / zoo.KEPT).stat().st_mtime_ns == before
        zoo.write_files(folder, TWO)
        yield folder


def test_the_tables_give_back_the_bounds(small):
    rows = read_csv(small / 'networks.csv')
    assert [row['name'] for row in rows] == list(TWO)
    for row, tables in zip(rows, zoo.read_tables(small), strict=True):
        for bound, value in utils.bounds_of(*tables, 0.001, 1.0).items():
            assert value == pytest.approx(float(row[bound]), rel=1e-6)


def test_the_weights_are_exactly_what_was_measured(small):
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
