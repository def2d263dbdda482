"""The pictures: what is drawn is what the files hold."""

import csv
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from conf import BadInput, load_settings, settings_text
from harness import figures
from harness.records import folder_settings, read_metrics
from measures.pac_bayes import kl_inverse
from utils import BOUNDS

pytest.importorskip('matplotlib')


def results(folder, **knobs):
    """A results folder of these settings without any run in it, and its runs."""
    folder.mkdir(parents=True)
    (folder / 'global_settings.py').write_text(settings_text(load_settings(flags=knobs)[0], []))
    return folder, folder_settings(folder)[1]


def write(path, rows):
    """A table of these rows, {column: value}; cells that a row has not are empty."""
    path.parent.mkdir(exist_ok=True)
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)


def row(epoch, train_error=0.5, test_error=0.75, **cells):
    errors = {'train_error': train_error, 'test_error': test_error, 'generalization_gap': test_error - train_error}
    return {'epoch': epoch} | errors | cells


def runs_of(folder):
    return figures.read_runs(folder, folder_settings(folder)[1])


def drawn(panel):
    """{label: (x, y)} of the curves of a panel."""
    return {line.get_label(): tuple(map(list, line.get_data())) for line in figures.labelled([panel])}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def powers(panel):
    """The powers of 2 at the ticks of the y axis, read from their labels."""
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert [2.0 ** int(label[4:-2]) for label in labels] == list(panel.get_yticks())
    return [int(label[4:-2]) for label in labels]


@pytest.mark.parametrize(
    'name, pictures', [('digits', ['figure']), ('mnist-width', ['figure', 'sweep']), ('mnist-depth', ['figure', 'sweep'])]
)
def test_shipped_results_are_drawn(tmp_path, name, pictures):
    folder = tmp_path / name
    shutil.copytree(ROOT / 'results' / name, folder, ignore=shutil.ignore_patterns('*.png', '*.pdf', '*.csv.*', 'summary.csv'))
    paths = figures.draw(folder)
    names = {f'{picture}.{suffix}' for picture in pictures for suffix in ('png', 'pdf')}
    assert {path.name for path in paths} >= names and all(path.parent == folder for path in paths)
    assert (folder / 'summary.csv').exists() == ('sweep' in pictures)
    first = {path: path.read_bytes() for path in paths}
    for path, content in first.items():
        if path.suffix == '.pdf':
            assert content[:5] == b'%PDF-' and b'/FontFile2' in content and b'/Type3' not in content
            assert b'CreationDate' not in content
        elif path.suffix == '.png':
            assert content[:8] == b'\x89PNG\r\n\x1a\n' and len(content) > 10000
    assert {path: path.read_bytes() for path in figures.draw(folder)} == first  # the same bytes again


def test_curves_are_the_columns():
    runs = runs_of(ROOT / 'results' / 'mnist-depth')
    figure = figures.epochs_picture(runs, figures.RARE)
    panels = figure.get_axes()
    assert [panel.get_title() for panel in panels] == [settings.name for settings, _ in runs]
    for panel, (settings, _) in zip(panels, runs):
        table, curves = read_metrics(ROOT / 'results' / 'mnist-depth' / settings.name / 'metrics.csv'), drawn(panel)
        for label, column in (('Ours (Galanti et al. 2023)', 'our_bound'), ('Test error', 'test_error')):
            assert curves[label] == (list(table['epoch']), list(table[column]))
        gap = np.abs(table['generalization_gap'])
        np.testing.assert_array_equal(curves['Generalization gap (absolute)'][1], np.where(gap > 0, gap, np.nan))
        assert panel.get_yscale() == 'log'
    assert powers(panels[0]) == [-15, -10, -5, 0, 5, 10, 15, 20, 25, 30]
    assert {'Certified error', 'PAC-Bayes certificate'} <= set(legend(figure))
    without = legend(figures.epochs_picture(runs_of(ROOT / 'results' / 'digits'), ()))
    assert 'Certified error' in without and 'PAC-Bayes certificate' not in without  # which these settings turn off
    ends = [drawn(panels[0])[label][1][-1] for label in legend(figure)]
    assert ends == sorted(ends, reverse=True)


def test_a_curve_joins_its_cells_and_breaks_at_what_has_no_place(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    cells = [{}, {'our_bound': 8.0, 'pac_bayes_error': 0.5}, {'our_bound': math.inf}, {'our_bound': 0.0}, {'our_bound': 2.0}]
    cells[4]['pac_bayes_error'] = 0.25
    write(folder / settings.name / 'metrics.csv', [row(epoch, **cell) for epoch, cell in enumerate(cells)])
    figure = figures.epochs_picture(runs_of(folder), ())
    (panel,) = figure.get_axes()
    assert drawn(panel)['PAC-Bayes certificate'] == ([1, 4], [0.5, 0.25])
    x, y = drawn(panel)['Ours (Galanti et al. 2023)']
    assert x == [1, 2, 3, 4]
    np.testing.assert_array_equal(y, [8, np.nan, np.nan, 2])
    assert sorted(legend(figure)) == sorted(drawn(panel))
    assert len(legend(figure)) == 5  # these two, the errors and the gap


def test_cells_that_metrics_lacks_are_those_of_the_evaluation(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    write(folder / settings.name / 'metrics.csv', [row(0, rho=1.0), row(1, rho=2.0, our_bound=4.0), row(2)])
    again = [row(1, 0.25, rho=9.0, our_bound=9.0, my_bound=3.0), row(2, rho=5.0, my_bound=6.0), row(3, 0.125)]
    write(folder / settings.name / 'evaluation.csv', [cells | {'round': 0} for cells in again])
    ((_, table),) = runs_of(folder)
    expected = {'epoch': [0, 1, 2, 3], 'rho': [1, 2, 5, np.nan], 'our_bound': [np.nan, 4, np.nan, np.nan]}
    expected |= {'my_bound': [np.nan, 3, 6, np.nan], 'train_error': [0.5, 0.5, 0.5, 0.125]}
    for column, values in expected.items():
        np.testing.assert_array_equal(table[column], values)


def test_colours_are_never_shared(monkeypatch):
    def named(*_):
        """Mine et al. 2030: a bound of a user.

        More about it: much.
        """

    for index in range(20):
        monkeypatch.setitem(BOUNDS, f'user{index}_bound', named if index % 2 else lambda *_: 1.0)
    monkeypatch.setitem(BOUNDS, 'user_number', named)  # neither an error nor a bound
    styles = figures.curves(())
    assert set(styles) == {name for name in BOUNDS if name.endswith('_bound')} | set(figures.CURVES) and len(styles) >= 38
    from matplotlib.colors import to_hex

    assert len({to_hex(style['color']) for style in styles.values()}) == len(styles)
    assert styles['user0_bound']['label'] == 'user0_bound' and styles['user1_bound']['label'] == 'Mine et al. 2030'


def test_rare_bounds_are_drawn_where_every_one_is_asked_for(tmp_path, monkeypatch):
    folder, (settings,) = results(tmp_path / '1')
    write(folder / settings.name / 'metrics.csv', [row(0, bartlett_bound=4.0), row(1, bartlett_bound=2.0)])
    left_out = {name: [] for name in ('epochs', 'sweep', 'density', 'compress')}
    for name, seen in left_out.items():
        monkeypatch.setattr(figures, f'{name}_picture', lambda *arguments, seen=seen: seen.append(arguments[-1]))
    figures.draw(folder)
    figures.draw(folder, every=True)
    assert left_out == {name: [figures.RARE, ()] for name in left_out} | {'density': [figures.LARGE, ()]}
    assert 'bartlett_bound' in figures.curves(()) and 'bartlett_bound' not in figures.curves(figures.RARE)


@pytest.mark.parametrize('low, high, step', [(-3, 4, 1), (-8, 8, 2), (-9, 30, 5), (-9, 60, 10), (-700, 1023, 165)])
def test_a_tick_at_one_whatever_the_span(tmp_path, low, high, step):
    folder, (settings,) = results(tmp_path / '1')
    write(folder / settings.name / 'metrics.csv', [row(0, our_bound=2.0**high), row(1, our_bound=2.0**low)])
    (panel,) = figures.epochs_picture(runs_of(folder), ()).get_axes()
    assert 0 in powers(panel) and 2 <= len(powers(panel)) <= 12
    assert set(np.diff(powers(panel))) == {step}
    assert panel.get_ylim()[0] <= 2.0**low and panel.get_ylim()[1] >= 2.0**high


@pytest.mark.parametrize('epochs', [1, 2, 3])
def test_epochs_are_whole(tmp_path, epochs):
    folder, (settings,) = results(tmp_path / '1', epochs=epochs)
    write(folder / settings.name / 'metrics.csv', [row(epoch) for epoch in range(epochs + 1)])
    (panel,) = figures.epochs_picture(runs_of(folder), ()).get_axes()
    ticks = panel.get_xticks()
    assert all(tick == round(tick) for tick in ticks) and len(ticks) >= 2


@pytest.mark.parametrize('count, shape', [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3))])
def test_panels_in_a_row_or_a_square(count, shape):
    figure, panels = figures.grid(count)
    assert len(panels) == len(figure.get_axes()) == count
    assert (panels[0].get_gridspec().nrows, panels[0].get_gridspec().ncols) == shape


def pruned(folder, name, rounds, epochs, rewound=0, factor=1.0):
    """Metrics of a run of rounds of 50 %, the last of them just begun."""
    rows = [row(epoch, round=0, density=1.0, our_bound=64.0) for epoch in range(epochs + 1)]
    known = kl_inverse(0.375, math.log(1000) / 360)  # by 360 test images
    for number in range(1, rounds + 1):
        about = {'round': number, 'density': 0.5**number, 'corrected_bound': factor * 2.0**number, 'test_set_bound': known}
        rows += [row(epoch, 0.25, 0.375, **about) for epoch in (0, *range(rewound + 1, epochs + 1))]
    rows.append(row(0, 1.0, 1.0, round=rounds + 1, density=0.5 ** (rounds + 1)))
    write(folder / name / 'metrics.csv', rows)


@pytest.mark.parametrize('rewind_epoch, rewound', [(0, 0), (2, 2), (-1, 0)])
def test_epochs_run_on_over_rounds(tmp_path, rewind_epoch, rewound):
    folder, (settings,) = results(tmp_path / '1', epochs=5, prune_rounds=3, rewind_epoch=rewind_epoch)
    pruned(folder, settings.name, 2, 5, rewound)
    (panel,) = figures.epochs_picture(runs_of(folder), ()).get_axes()
    each = 5 - rewound
    first, second, third = range(6), range(5, 6 + each), range(5 + each, 6 + 2 * each)
    assert drawn(panel)['Train error'][0] == [*first, *second, *third, 5 + 2 * each]
    assert drawn(panel)['Corrected bound'][0] == [*second, *third]
    lines = [line.get_xdata()[0] for line in panel.get_lines() if line.get_label().startswith('_')]
    assert lines == [5, 5 + each, 5 + 2 * each]


def test_against_density(tmp_path):
    folder, runs = results(tmp_path / '1', epochs=5, prune_rounds=3, prune_score=['magnitude', 'path'], seed=[0, 1])
    for settings in runs:
        pruned(folder, settings.name, 2, 5, factor=1.0 + settings.seed + 4 * (settings.prune_score == 'path'))
    path = folder / runs[0].name / 'metrics.csv'
    path.write_text(path.read_text() + '1' + path.read_text().splitlines()[-1][1:] + '\n')  # in the middle of a round
    read = runs_of(folder)
    figure = figures.density_picture(read, figures.LARGE)
    errors, bounds = figure.get_axes()
    curves = [line.get_data() for line in figures.labelled([bounds]) if line.get_label() == 'Corrected bound']
    assert [(list(x), list(y)) for x, y in curves] == [([0.25, 0.5], [6.0, 3.0]), ([0.25, 0.5], [22.0, 11.0])]
    ranges = [collection.get_paths()[0].get_extents() for collection in bounds.collections]
    assert [(extent.ymin, extent.ymax) for extent in ranges] == [(2.0, 8.0), (10.0, 24.0)]
    assert drawn(errors)['Train error'] == ([0.25, 0.5, 1.0], [0.25, 0.25, 0.5])
    assert errors.get_xscale() == 'log' and errors.get_xlim()[0] > 1 > 0.25 > errors.get_xlim()[1]
    assert [label.get_text() for label in errors.get_xticklabels()] == ['25 %', '50 %', '100 %']
    across = {tuple(line.get_ydata()) for line in errors.get_lines() if line.get_label().startswith('_')}
    assert {(0.5, 0.5), (0.75, 0.75)} <= across  # train and test error of the dense network
    segments = errors.containers[0][2][0].get_segments()
    deviation = math.sqrt(0.375 * 0.625 / 360)
    np.testing.assert_allclose(segments[0][:, 1], [0.375 - deviation, 0.375 + deviation])
    assert legend(figure)[-2:] == ['prune_score magnitude', 'prune_score path']
    assert not set(legend(figure)) & {'Graf et al. 2022', 'Generalization gap (absolute)'}

    assert figures.sweep_picture(read, ()) is None
    assert {'density.png', 'density.pdf', 'summary.csv'} <= {path.name for path in figures.draw(folder)}
    lines = list(csv.DictReader((folder / 'summary.csv').open()))
    assert len(lines) == 4 * 3 + 1 and [line['density'] for line in lines[:3]] == ['1.0', '0.5', '0.25']


def test_against_what_is_left_of_the_convolutions(tmp_path):
    folder, (settings,) = results(tmp_path / '1', epochs=5, prune_rounds=2, prune_layers='conv', prune_fraction=0.75)
    pruned(folder, settings.name, 1, 5)
    errors, _ = figures.density_picture(runs_of(folder), figures.LARGE).get_axes()
    assert drawn(errors)['Train error'][0] == [0.25, 1.0]


def test_many_groups_have_a_row_each(tmp_path):
    folder, runs = results(tmp_path / '1', epochs=5, prune_rounds=2, width=[4, 5, 6, 7])
    for settings in runs:
        pruned(folder, settings.name, 1, 5)
    panels = figures.density_picture(runs_of(folder), ()).get_axes()
    assert [panel.get_title() for panel in panels[::2]] == [f'width {width}: errors and certificates' for width in (4, 5, 6, 7)]


def test_sample_size():
    shares = [0, 37 / 360, 100 / 360, np.nan, 1.0]
    assert figures.sample_size(shares) == 360 and figures.sample_size([0.0429, 0.0315]) == 10000
    assert figures.sample_size([k / 60000 for k in (1234, 59999)]) == 60000


def test_sweep_with_seeds(tmp_path):
    folder, runs = results(tmp_path / '1', epochs=1, width=[4, 8, 16], depth=[2, 3], seed=[0, 1, 2])
    for settings in runs:
        value = settings.width * 10.0**settings.depth
        rows = [row(0, our_bound=1.0), row(1, our_bound=value * (1, 2, 6)[settings.seed])]
        write(folder / settings.name / 'metrics.csv', rows)
    write(folder / runs[-1].name / 'metrics.csv', [row(0, our_bound=1.0)])  # a network that is not finished
    figure = figures.sweep_picture(runs_of(folder), ())
    panels = {(panel.get_xlabel(), panel.get_title()): panel for panel in figure.get_axes()}
    widths, depths = (4, 8, 16), (2, 3)
    assert list(panels) == [('depth', f'width {n}') for n in widths] + [('width', f'depth {n}') for n in depths]
    ours = 'Ours (Galanti et al. 2023)'
    panel = panels['width', 'depth 2']
    assert drawn(panel)[ours] == ([4, 8, 16], [1200, 2400, 4800]) and panel.get_xscale() == 'log'
    extent = panel.collections[0].get_paths()[0].get_extents()
    assert (extent.ymin, extent.ymax) == (400, 9600)
    assert drawn(panels['width', 'depth 3'])[ours][1] == [12000, 24000, 24000]  # of two seeds the last
    assert drawn(panels['depth', 'width 8'])[ours] == ([2, 3], [2400, 24000])
    assert panels['depth', 'width 8'].get_xscale() == 'linear'
    assert [label.get_text() for label in panel.get_xticklabels()] == ['4', '8', '16']

    lines = list(csv.DictReader(figures.summary(runs_of(folder)).decode().splitlines()))
    assert [line['name'] for line in lines] == [settings.name for settings in runs]
    assert list(lines[0])[:5] == ['name', 'depth', 'width', 'seed', 'data_seed']
    assert (lines[1]['seed'], lines[1]['epoch'], float(lines[1]['our_bound']), lines[1]['rho']) == ('1', '1.0', 800.0, '')


def test_sweep_of_other_knobs(tmp_path):
    folder, runs = results(tmp_path / '1', epochs=1, lr=[0.1, 0.01], dataset_name=['digits', 'MNIST'])
    for settings in runs:
        write(folder / settings.name / 'metrics.csv', [row(1, our_bound=1 / settings.lr, lr=1e-5)])
    panels = figures.sweep_picture(runs_of(folder), ()).get_axes()
    assert [panel.get_title() for panel in panels] == ['dataset_name digits', 'dataset_name MNIST']
    assert drawn(panels[0])['Ours (Galanti et al. 2023)'] == ([0.01, 0.1], [100, 10])
    assert figures.summary(runs_of(folder)).startswith(b'name,dataset_name,lr_setting,seed,data_seed,')

    folder, runs = results(tmp_path / '2', epochs=1, loss=['MSE', 'CE'])
    for settings in runs:
        write(folder / settings.name / 'metrics.csv', [row(1)])
    (panel,) = figures.sweep_picture(runs_of(folder), ()).get_axes()
    assert [label.get_text() for label in panel.get_xticklabels()] == ['MSE', 'CE']

    folder, runs = results(tmp_path / '3', epochs=1, train_samples=[0, 100, 200])
    for settings in runs:
        write(folder / settings.name / 'metrics.csv', [row(0, 7 / 1437), row(1, 1 / 5)])
    (panel,) = figures.sweep_picture(runs_of(folder), ()).get_axes()
    assert drawn(panel)['Train error'][0] == [100, 200, 7185]
    assert [label.get_text() for label in panel.get_xticklabels()] == ['0', '100', '200']

    folder, runs = results(tmp_path / '4', epochs=1, density=[1.0, 0.5], initial_mask='random')
    for settings in runs:
        write(folder / settings.name / 'metrics.csv', [row(1)])
    (panel,) = figures.sweep_picture(runs_of(folder), ()).get_axes()
    assert panel.get_xlim()[0] > 1 > 0.5 > panel.get_xlim()[1]


def test_seeds_alone_are_no_sweep(tmp_path):
    folder, runs = results(tmp_path / '1', seed=[0, 1])
    for settings in runs:
        write(folder / settings.name / 'metrics.csv', [row(1)])
    assert figures.sweep_picture(runs_of(folder), ()) is None
    assert [path.name for path in figures.draw(folder)] == ['figure.png', 'figure.pdf']


def test_layers(tmp_path):
    folder, runs = results(tmp_path / '1', depth=[2, 3], network='MLP', label_noise=0.1)
    for settings in runs:
        write(folder / settings.name / 'metrics.csv', [row(epoch, 0.5 ** (epoch + 1)) for epoch in range(5)])
        rows = []
        for epoch in (0, 4):
            errors = [0.5, 0.04, 0.009, 0.02][: settings.depth + 1]
            cells = [{'train_ncc_error': e + 0.4 * (epoch == 0), 'test_ncc_error': 2 * e, 'train_cdnv': 4 * e} for e in errors]
            cells = [*cells, {'train_ncc_error': ''}]  # the classifier
            rows += [{'epoch': epoch, 'round': 0, 'layer': layer} | cell for layer, cell in enumerate(cells)]
        write(folder / settings.name / 'layers.csv', rows)
    figure = figures.layers_picture(runs_of(folder), folder)
    *panels, accuracy, variability = figure.get_axes()
    assert [panel.get_title() for panel in panels] == ['MLP-2-200', 'MLP-3-200']
    assert set(drawn(panels[1])) == {'input', 'layer 1', 'layer 2', 'layer 3', 'training accuracy'}
    x, y = drawn(panels[1])['layer 2']
    assert x == [0, 4] and y == pytest.approx([1 - 0.409, 1 - 0.009])
    assert drawn(panels[0])['training accuracy'] == ([0, 1, 2, 3, 4], [0.5, 0.75, 0.875, 0.9375, 0.96875])
    words = panels[0].texts[0].get_text()
    assert words == 'training accuracy 0.9688; effective depth 2 (\u03b5 = 0.01), 1 (\u03b5 = 0.05)'
    train, test = (line.get_data() for line in accuracy.get_lines()[:2])
    assert list(train[0]) == [0, 1, 2] and list(train[1]) == pytest.approx([0.5, 0.96, 0.991])
    assert list(test[1]) == pytest.approx([0.0, 0.92, 0.982])
    assert list(variability.get_lines()[2].get_ydata()) == pytest.approx([2, 0.16, 0.036, 0.08])
    assert variability.get_yscale() == 'log' and {'layers.png', 'layers.pdf'} <= {path.name for path in figures.draw(folder)}


def test_layers_that_no_class_center_was_measured_of(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    write(folder / settings.name / 'metrics.csv', [row(1)])
    write(folder / settings.name / 'layers.csv', [{'epoch': 1, 'round': 0, 'layer': 1, 'density': 0.5}])
    assert figures.layers_picture(runs_of(folder), folder) is None


def test_compressed_networks(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    steps = [(6848, 0.125, 8.0), (4172, 0.125, 4.0), (756, 0.25, 2.0)]
    rows = [
        {'lam': 0.1, 'channels': '16|13', 'weights': weights, 'test_error': error, 'our_bound': bound, 'pac_bayes_error': ''}
        for weights, error, bound in steps
    ]
    write(folder / settings.name / 'compress.csv', rows)
    assert [path.name for path in figures.draw(folder)] == ['compress.png', 'compress.pdf']
    errors, bounds = figures.compress_picture([settings], folder, ()).get_axes()
    assert drawn(errors) == {'Test error': ([756, 4172, 6848], [0.25, 0.125, 0.125])}
    assert drawn(bounds)['Ours (Galanti et al. 2023)'] == ([756, 4172, 6848], [2, 4, 8])
    write(folder / settings.name / 'compress.csv', [rows[1] | {'weights': weights} for weights in (5000, 5500)])
    assert list(figures.compress_picture([settings], folder, ()).get_axes()[0].get_xticks()) == [4096]  # a short axis too
    for damage in ('weights,lam\n1,2\n', 'weights,test_error\n1,0.5\n1,2,3,4\n'):
        (folder / settings.name / 'compress.csv').write_text(damage)
        with pytest.raises(BadInput, match=r'compress\.csv: not a table of compress\.py'):
            figures.draw(folder)


def test_nothing_logged_draws_nothing(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    assert figures.draw(folder) == []
    write(folder / settings.name / 'metrics.csv', [row(0)])
    path = folder / settings.name / 'metrics.csv'
    path.write_text(path.read_text().partition('\n')[0] + '\n')
    assert figures.draw(folder) == []


def test_a_lock_that_cannot_be_had_stops_no_picture(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    write(folder / settings.name / 'metrics.csv', [row(0), row(1)])
    (folder / '.figure.lock').mkdir()
    assert [path.name for path in figures.draw(folder)] == ['figure.png', 'figure.pdf']


@pytest.mark.parametrize('error, raised', [(13, BadInput), (1, BadInput), (30, BadInput), (28, OSError)])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, error, raised):
    folder, (settings,) = results(tmp_path / '1')
    write(folder / settings.name / 'metrics.csv', [row(0), row(1)])

    def refuse(path, content):
        raise OSError(error, 'no')

    monkeypatch.setattr(figures, 'write_file', refuse)
    with pytest.raises(raised) as caught:
        figures.draw(folder)
    if raised is BadInput:
        assert 'figure.png: cannot be written' in str(caught.value) and f'copy {folder} elsewhere' in str(caught.value)


def test_training_does_not_need_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; from harness import figures; figures.draw('results/digits')"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith('ModuleNotFoundError: import of matplotlib')
