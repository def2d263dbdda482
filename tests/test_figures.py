"""The pictures: what is drawn is what the files hold."""

import itertools
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, train_small

import figures
from conf import BadInput, load_settings, settings_text
from figures import MARKS, load_launch
from records import read_metrics, write_table
from utils import BOUNDS

pytest.importorskip('matplotlib')
OURS = 'Ours (Galanti et al. 2023)'
FIGURE_1 = [
    'Ledent et al. 2021',
    'Graf et al. 2022',
    'Golowich et al. 2018',
    'Long and Sedghi 2020',
    OURS,
    'train error',
    'test error',
    '|generalization gap|',
]


def results(folder, **knobs):
    """A results folder of these settings without any run in it, and its networks."""
    folder.mkdir()
    (folder / 'global_settings.py').write_text(settings_text(load_settings(flags=knobs)[0], []))
    return folder, load_launch(folder)[1]


def write(folder, settings, rows, name='metrics'):
    """A table of these rows, {column: value}; a cell that a row lacks is empty."""
    path = folder / settings.name / f'{name}.csv'
    path.parent.mkdir(exist_ok=True)
    write_table(path, [], rows)
    return path


def row(epoch, train_error=0.5, test_error=0.75, **cells):
    gap = {'generalization_gap': test_error - train_error}
    return {'epoch': epoch, 'train_error': train_error, 'test_error': test_error} | gap | cells


def runs_of(folder):
    return figures.read_runs(folder, load_launch(folder)[1])


def shipped(name):
    return runs_of(ROOT / 'results' / name)


def first_panel(folder, rows, picture=figures.figure_picture):
    """The first panel of a picture of one network with these rows."""
    folder, (settings,) = results(folder / '1')
    write(folder, settings, rows)
    return picture(runs_of(folder)).axes[0]


def names(paths):
    """The pictures among these paths."""
    return {path.stem for path in paths if path.suffix in ('.png', '.pdf')}


def curves(panel):
    """{label: (x, y)} of the curves of a panel, without auxiliary lines."""
    lines = figures.labelled([panel])
    return {line.get_label(): tuple(map(list, line.get_data())) for line in lines}


def marks(panel, name):
    """[(x, y)] of the auxiliary lines of this name."""
    lines = [line for line in panel.lines if line.get_label() == MARKS[name]['label']]
    return [tuple(map(list, line.get_data())) for line in lines]


def texts(labels):
    return [label.get_text() for label in labels]


def titles(figure):
    return [panel.get_title() for panel in figure.axes]


def legend(figure):
    return texts(figure.legends[0].get_texts())


def extent(panel):
    """The lowest and highest value of the first shaded area."""
    box = panel.collections[0].get_paths()[0].get_extents()
    return box.ymin, box.ymax


def powers(panel):
    """The powers of 2 at the ticks of the y axis, read from their labels."""
    found = [int(text[4:-2]) for text in texts(panel.get_yticklabels())]
    assert [2.0**power for power in found] == list(panel.get_yticks())
    return found


WIDTHS = {'figure', 'certified', 'bounds', 'sweep', 'layers', 'layers_epochs'}


@pytest.mark.long
@pytest.mark.parametrize(
    'name, pictures', [('digits', {'figure', 'bounds'}), ('mnist-width', WIDTHS)]
)
def test_shipped_results_are_drawn(tmp_path, name, pictures):
    import matplotlib

    ignored = shutil.ignore_patterns('*.png', '*.pdf', '*.pt', 'summary.csv')
    folder = shutil.copytree(ROOT / 'results' / name, tmp_path / name, ignore=ignored)
    paths = figures.draw(folder)
    stems = {folder / f'{stem}.{suffix}' for stem in pictures for suffix in ('png', 'pdf')}
    assert set(paths) - {folder / 'summary.csv'} == stems
    assert (folder / 'summary.csv').exists() == ('sweep' in pictures)
    first = [path.read_bytes() for path in paths]
    png, pdf, *_ = first
    assert int.from_bytes(png[16:20], 'big') == 1700  # twice the pixels of a page
    assert b'/FontFile2' in pdf
    assert b'/Type3' not in pdf
    # The same bytes again, also where a user's matplotlibrc asks for LaTeX and large letters.
    with matplotlib.rc_context({'text.usetex': True, 'font.size': 30}):
        assert [path.read_bytes() for path in figures.draw(folder)] == first


def test_figure_1_has_the_eight_curves_of_the_paper(monkeypatch):
    runs = shipped('mnist-depth')
    figure = figures.figure_picture(runs)
    assert legend(figure) == FIGURE_1
    assert titles(figure) == [settings.name for settings, _ in runs]
    panel, (settings, _) = figure.axes[0], runs[0]
    table = read_metrics(ROOT / 'results' / 'mnist-depth' / settings.name / 'metrics.csv')
    found, gap = curves(panel), np.abs(table['generalization_gap'])
    assert found[OURS] == (list(table['epoch']), list(table['our_bound']))
    np.testing.assert_array_equal(found['|generalization gap|'][1], np.where(gap > 0, gap, np.nan))
    assert panel.get_yscale() == 'log'
    assert powers(panel) == [-10, 0, 10, 20, 30]
    assert not marks(panel, 'level')  # the paper shows other networks

    monkeypatch.setitem(BOUNDS, 'user_bound', lambda *_: 1.0)
    runs = [(settings, table | {'user_bound': table['our_bound']}) for settings, table in runs]
    assert legend(figures.figure_picture(runs)) == [*FIGURE_1[:5], 'user_bound', *FIGURE_1[5:]]


def test_networks_of_the_paper_have_its_levels():
    figure = figures.figure_picture(shipped('mnist-200'))
    levels = marks(figure.axes[0], 'level')
    assert [list(np.log2(y)) for _, y in levels[1:5]] == [[17.5, 19], [16, 16], [4, 6], [0.7, 0.7]]
    assert all(x == [1.015, 1.015] for x, _ in levels)  # at the right edge of the panel
    assert legend(figure) == [*FIGURE_1, "level in the paper's Figure 1"]


def test_what_certifies_and_every_bound_have_pictures_of_their_own():
    runs = shipped('mnist-depth')
    figure = figures.certified_picture(runs)
    proven = 'norm-based certificate, A (trained network), B (rounded), C (random classifier)'
    assert legend(figure) == [*proven.split(', '), 'test-set bound', 'train error', 'test error']
    panel = figure.axes[0]
    low, high = panel.get_ylim()
    assert panel.get_ylabel() == 'error'
    assert low < 0.05 < 1 < high < 2
    ticks = zip(panel.get_yticks(), texts(panel.get_yticklabels()))
    shown = [text for tick, text in ticks if low <= tick <= high]
    assert shown == ['0.05', '0.1', '0.2', '0.5', '1']
    assert figures.certified_picture(shipped('digits')) is None  # the norm-based one is 1

    figure = figures.bounds_picture(runs)
    rest = 'Corrected bound, Gonon et al. 2024, Bartlett et al. 2017, Neyshabur et al. 2018'
    assert legend(figure) == [*FIGURE_1[:5], *rest.split(', '), 'Graf et al. 2022 (parameters)']
    assert figure.axes[0].get_ylabel() == 'excess over the margin error'


def test_texts_are_of_nine_points_on_a_page():
    import matplotlib
    from matplotlib.text import Text

    runs = shipped('mnist-width')
    with matplotlib.rc_context(figures.RC):
        for picture in (figures.figure_picture, figures.certified_picture, figures.sweep_picture):
            figure = picture(runs)
            assert figure.get_figwidth() * 96 == pytest.approx(850)
            for text in figure.findobj(Text):
                size = text.get_size() * (0.7 if '^' in text.get_text() else 1)  # an exponent's
                assert size >= 9 or not text.get_text()


def test_a_curve_joins_its_cells_and_marks_what_no_log_axis_has(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    cells = [
        {},
        {'our_bound': 8.0, 'pac_bayes_error': 0.5},
        {'our_bound': math.inf},
        {'our_bound': 0.0, 'train_error': 0},
        {'our_bound': 2.0, 'pac_bayes_error': 0.25},
    ]
    write(folder, settings, [row(epoch) | cell for epoch, cell in enumerate(cells)])
    runs = runs_of(folder)
    (panel,) = figures.certified_picture(runs).axes
    assert curves(panel)['A (trained network)'] == ([1, 4], [0.5, 0.25])
    figure = figures.figure_picture(runs)
    (panel,) = figure.axes
    x, y = curves(panel)[OURS]
    assert x == [1, 2, 3, 4]
    np.testing.assert_array_equal(y, [8, np.nan, np.nan, 2])
    (ours, ours_row), (train, train_row) = marks(panel, 'zero')
    assert ours == train == [3]
    assert 0 < ours_row[0] < train_row[0] < 0.2  # of the panel's height: both are seen
    assert marks(panel, 'infinite') == [([2], [0.98])]
    extra = "level in the paper's Figure 1", '0 (below the axis)', 'infinite (above the axis)'
    assert legend(figure) == [*FIGURE_1[4:], *extra]
    assert len(marks(panel, 'level')) == 4  # of the curves that are there


@pytest.mark.parametrize('count, errors, marker', [(50, 0.5, 'o'), (51, 0.5, 'None'), (51, 0, 'o')])
def test_points_are_shown_if_they_are_few_or_have_gaps(tmp_path, count, errors, marker):
    rows = [row(epoch, errors if epoch % 2 else 0.5) for epoch in range(count)]
    lines = {line.get_label(): line for line in first_panel(tmp_path, rows).lines}
    assert lines['train error'].get_marker() == marker


def test_what_was_measured_last_is_drawn(tmp_path, capsys):
    folder, (settings,) = results(tmp_path / '1')
    logged = [row(0, rho=1.0), row(1, rho=2.0, our_bound=4.0, eval_seconds=9), row(2)]
    write(folder, settings, logged)
    again = [
        row(1, 0.25, rho=2 + 1e-9, our_bound=9.0, my_bound=3.0),
        row(2, rho=5.0, my_bound=6.0),
        row(3, 0.125),
        row(0, rho=7.0, gamma=99),
    ]
    about = {'round': 0, 'eval_seconds': 1, 'gamma': settings.gamma}
    write(folder, settings, [about | cells for cells in again], 'evaluation')
    ((_, table),) = runs_of(folder)
    expected = {
        'epoch': [0, 1, 2, 3],
        'rho': [1, 2 + 1e-9, 5, np.nan],
        'our_bound': [np.nan, 9, np.nan, np.nan],
        'my_bound': [np.nan, 3, 6, np.nan],
        'train_error': [0.5, 0.25, 0.5, 0.125],
    }
    for column, values in expected.items():
        np.testing.assert_array_equal(table[column], values)
    omitted, line = capsys.readouterr().out.splitlines()
    path = f'{settings.name}/evaluation.csv'
    assert f'{path}: 1 rows with another delta or gamma' in omitted
    assert f'{path}: differs from metrics.csv' in line
    assert line.endswith('in train_error, generalization_gap, our_bound')
    write(folder, settings, [row(1, round=0, our_bound=4.0)], 'evaluation')
    runs_of(folder)
    assert not capsys.readouterr().out


def test_bounds_of_a_user_have_names_and_colors(monkeypatch):
    from matplotlib.colors import to_hex

    def named(*_):
        """Mine et al. 2030: a bound of a user.

        More about it: much.
        """

    for index in range(20):
        monkeypatch.setitem(BOUNDS, f'user{index}_bound', named if index % 2 else lambda *_: 1.0)
    monkeypatch.setitem(BOUNDS, 'user_number', named)  # neither an error nor a bound
    columns = [*figures.CURVES, *figures.own_bounds()]
    styles = {column: figures.style(column) for column in columns}
    assert len({to_hex(look['color']) for look in styles.values()}) == len(columns) >= 38
    assert styles['user0_bound']['label'] == 'user0_bound'
    assert styles['user1_bound']['label'] == 'Mine et al. 2030'
    monkeypatch.delitem(BOUNDS, 'sedghi_bound')  # of an older results folder
    assert figures.style('sedghi_bound')['label'] == 'sedghi_bound'


def test_bounds_of_figure_1_can_be_told_apart_without_red_and_green():
    """As seen with deuteranopia, by the matrix of Machado et al. 2009 on linear RGB."""
    from matplotlib.colors import to_rgb

    deuteranopia = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    seen = []
    for column in figures.PAPER_BOUNDS:
        linear = np.array(to_rgb(figures.style(column)['color'])) ** 2.2
        seen.append((deuteranopia @ linear).clip(0, 1) ** (1 / 2.2))
    pairs = itertools.combinations(seen, 2)
    assert min(np.linalg.norm(one - other) for one, other in pairs) > 0.3


SPANS = [(0.4, 0.5, 1), (-3, 4, 1), (-7, 7, 2), (-9, 25, 5), (-9, 60, 10), (-700, 700, 200)]


@pytest.mark.parametrize('low, high, step', SPANS)
def test_a_tick_at_one_whatever_the_span(tmp_path, low, high, step):
    rows = [row(0, our_bound=2.0**high), row(1, our_bound=2.0**low)]
    panel = first_panel(tmp_path, rows, figures.bounds_picture)
    assert 0 in powers(panel)
    assert 2 <= len(powers(panel)) <= 10
    assert set(np.diff(powers(panel))) == {step}
    bottom, top = panel.get_ylim()
    assert bottom <= 2.0**low < 2.0**high <= top
    assert all(epoch == round(epoch) for epoch in panel.get_xticks())


SHAPES = [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (30, (8, 3))]


@pytest.mark.parametrize('count, shape', SHAPES)
def test_panels_in_a_row_or_a_square(count, shape):
    name = 'CONV-3-200-label_noise0.25-prune_scoremagnitude-seed1'
    figure, ((panel, *_),) = figures.grid('Curves', [name] * count, ['y'], 3)
    assert panel.get_gridspec().get_geometry() == shape
    assert len(figure.axes) == min(count, 24)
    assert figure.get_suptitle() == 'Curves' + '; the first 24 of 30' * (count == 30)
    lines = panel.get_title().split('\n')  # a long name has several
    assert ''.join(lines) == name
    assert max(map(len, lines)) <= 100 / shape[1]


def pruned(folder, settings, rewound=0, factor=1.0, **counted):
    """Metrics of five epochs and two pruning rounds of 50 %, and a third that has just begun."""
    rows = [row(epoch, our_bound=64.0, corrected_bound=8.0) for epoch in range(6)]
    for number in (1, 2):
        cells = {'density': 0.5**number, 'corrected_bound': factor * 2.0**number, 'test_size': 360}
        for epoch in (0, *range(rewound + 1, 6)):
            rows.append(row(epoch, 0.25, 0.375, round=number, **cells, **counted))
    rows = [{'round': 0, 'density': 1.0} | cells for cells in rows]
    write(folder, settings, [*rows, row(0, 1.0, 1.0, round=3, density=0.125)])


@pytest.mark.parametrize('rewind_epoch, rewound', [(0, 0), (2, 2), (-1, 0)])
def test_epochs_continue_over_rounds(tmp_path, rewind_epoch, rewound):
    knobs = {'epochs': 5, 'prune_rounds': 3, 'rewind_epoch': rewind_epoch}
    folder, (settings,) = results(tmp_path / '1', **knobs)
    pruned(folder, settings, rewound)
    (panel,) = figures.figure_picture(runs_of(folder)).axes
    ends = [5, 10 - rewound, 15 - 2 * rewound]
    rounds = [range(6), range(5, ends[1] + 1), range(ends[1], ends[2] + 1), ends[2:]]
    assert curves(panel)['train error'][0] == list(itertools.chain(*rounds))
    assert [x[0] for x, _ in marks(panel, 'pruning')] == ends


def test_against_density(tmp_path):
    scores = ['magnitude', 'path']
    knobs = {'epochs': 5, 'prune_rounds': 3, 'prune_score': scores, 'seed': [0, 1]}
    folder, networks = results(tmp_path / '1', **knobs)
    for settings in networks:
        factor = 1.0 + settings.seed + 4 * scores.index(settings.prune_score)
        pruned(folder, settings, factor=factor)
    runs = runs_of(folder)
    runs[0][1]['epoch'][-2] = 4  # a seed in the middle of round 2
    figure = figures.density_picture(runs)
    errors, magnitude, path_errors, path = figure.axes
    assert titles(figure) == ['prune_score magnitude', '', 'prune_score path', '']
    assert errors.get_ylabel() == 'error'
    assert magnitude.get_ylabel() == 'bound / bound of round 0'
    # Of 8 in round 0: factors 1 and 2, the first without a second round; 5 and 6.
    assert curves(magnitude)['Corrected bound'] == ([25, 50, 100], [1, 0.375, 1])
    assert curves(path)['Corrected bound'] == ([25, 50, 100], [2.75, 1.375, 1])
    assert extent(path) == (1, 3)
    assert curves(path_errors)['train error'] == ([25, 50, 100], [0.25, 0.25, 0.5])
    assert errors.get_xscale() == 'log'
    assert errors.xaxis_inverted()
    assert magnitude.get_yscale() == 'linear'
    assert texts(errors.get_xticklabels()) == ['25', '50', '100']  # percent
    assert [y for _, y in marks(errors, 'left')] == [[0.5, 0.5], [0.75, 0.75]]
    deviation = math.sqrt(0.375 * 0.625 / 360)
    bar = errors.collections[-1].get_segments()[0]
    np.testing.assert_allclose(bar[:, 1], [0.375 - deviation, 0.375 + deviation])
    assert legend(figure)[-3:] == [
        'value at the left end',
        'range over networks',
        '± standard deviation',
    ]

    assert figures.sweep_picture(runs) is None
    rows = figures.summary(runs_of(folder))
    assert [row['density'] for row in rows] == [1, 0.5, 0.25] * 4


def test_the_share_left_of_the_convolutions_is_counted(tmp_path):
    knobs = {'epochs': 5, 'prune_rounds': 2, 'prune_layers': 'conv', 'prune_fraction': 0.75}
    folder, (settings,) = results(tmp_path / '1', **knobs)
    for counted, share in (({}, [6.25, 25, 100]), ({'masked_density': 0.375}, [37.5, 100])):
        pruned(folder, settings, **counted)  # tables were once without a count
        panel = figures.density_picture(runs_of(folder)).axes[0]
        assert curves(panel)['train error'][0] == share


def test_sweep_with_seeds(tmp_path):
    knobs = {'width': [4, 8, 16], 'depth': [2, 3], 'seed': [0, 1, 2]}
    folder, networks = results(tmp_path / '1', epochs=1, **knobs)
    for settings in networks:
        bound = settings.width * 10.0**settings.depth * (1, 2, 6)[settings.seed]
        write(folder, settings, [row(0, our_bound=1.0), row(1, our_bound=bound)])
    write(folder, networks[-1], [row(0, our_bound=1.0)])  # this one is not finished
    runs = runs_of(folder)
    figure = figures.sweep_picture(runs)
    pairs = zip(figure.axes[::2], figure.axes[1::2])
    found = {(below.get_xlabel(), above.get_title()): below for above, below in pairs}
    depths = [('depth', f'width {width}') for width in (4, 8, 16)]
    assert list(found) == [*depths, ('width', 'depth 2'), ('width', 'depth 3')]
    panel = found['width', 'depth 2']
    assert curves(panel)[OURS] == ([4, 8, 16], [1200, 2400, 4800])
    assert panel.get_xscale() == 'log'
    assert texts(panel.get_xticklabels()) == ['4', '8', '16']
    assert extent(panel) == (400, 9600)
    assert curves(found['width', 'depth 3'])[OURS][1] == [12000, 24000, 24000]  # two seeds at 16
    assert curves(found['depth', 'width 8'])[OURS] == ([2, 3], [2400, 24000])

    rows = figures.summary(runs)
    assert [row['name'] for row in rows] == [settings.name for settings in networks]
    assert list(rows[0])[:5] == ['name', 'depth', 'width', 'seed', 'data_seed']
    assert [rows[1][column] for column in ('seed', 'epoch', 'our_bound')] == [1, 1, 800]


SWEEPS = [
    ({'loss': ['MSE', 'CE']}, [0, 1], ['MSE', 'CE']),
    ({'bias': [True, False]}, [0, 1], ['True', 'False']),
    ({'train_samples': [0, 100, 200]}, [100, 200, 1437], ['100', '200', '1437']),
    ({'density': [1.0, 0.5], 'initial_mask': 'random'}, [0.5, 1], ['0.5', '1']),
    ({'width': [100, 101, 200]}, [100, 101, 200], ['100', '', '200']),  # two would touch
]


@pytest.mark.parametrize('knobs, x, ticks', SWEEPS)
def test_sweep_of_one_knob(tmp_path, knobs, x, ticks):
    folder, networks = results(tmp_path / '1', epochs=1, **knobs)
    for settings in networks:
        write(folder, settings, [row(1, train_size=settings.train_samples or 1437)])
    (panel,) = figures.sweep_picture(runs_of(folder)).axes
    assert curves(panel)['train error'][0] == x
    assert texts(panel.get_xticklabels()) == ticks
    assert panel.xaxis_inverted() == ('density' in knobs)
    assert panel.get_ylim()[1] > 1


def test_sweep_of_a_number_and_a_text(tmp_path):
    knobs = {'lr': [0.1, 0.01], 'dataset_name': ['digits', 'MNIST']}
    folder, networks = results(tmp_path / '1', epochs=1, **knobs)
    for settings in networks:
        write(folder, settings, [row(1, our_bound=1 / settings.lr, lr=1e-5)])
    runs = runs_of(folder)
    figure = figures.sweep_picture(runs)
    assert titles(figure) == ['dataset_name digits', '', 'dataset_name MNIST', '']
    assert curves(figure.axes[1])[OURS] == ([0.01, 0.1], [100, 10])
    assert list(figures.summary(runs)[0])[:3] == ['name', 'dataset_name', 'lr_setting']


def test_seeds_are_no_sweep(tmp_path):
    folder, networks = results(tmp_path / '1', seed=[0, 1])
    assert figures.draw(folder) == []
    path = write(folder, networks[0], [row(0)])
    path.write_text(path.read_text().partition('\n')[0] + '\n')  # nothing is logged yet
    assert figures.draw(folder) == []
    for settings in networks:
        write(folder, settings, [row(1)])
    assert names(figures.draw(folder)) == {'figure'}


@pytest.mark.long
@pytest.mark.pictures
def test_a_run_counts_what_the_pictures_need(tmp_path):
    flags = '--epochs 1 --prune-rounds 1 --prune-fraction 0.5 --prune-layers conv'
    train_small(tmp_path / 'run', *flags.split())
    table = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')
    assert table['masked_density'].tolist() == [1, 1, 0.5, 0.5]
    assert (table['density'] > 0.9).all()
    assert set(table['train_size']) == {1437}
    assert set(table['test_size']) == {360}
    assert names((tmp_path / 'run').iterdir()) == {'figure', 'bounds', 'density'}


def learned(folder, settings, probes=False):
    """Metrics and layers of two evaluations, at epochs 0 and 4."""
    write(folder, settings, [row(epoch, 0.5 ** (epoch + 1)) for epoch in range(5)])
    rows = []
    for epoch in (0, 4):
        for layer, error in enumerate([0.5, 0.04, 0.009, 0.02][: settings.depth + 1]):
            cells = {'epoch': epoch, 'round': 0, 'layer': layer}
            cells['train_ncc_error'] = error + 0.4 * (epoch == 0)
            cells |= {'test_ncc_error': 2 * error, 'train_cdnv': 4 * error, 'test_cdnv': 8 * error}
            if probes and epoch == 4:
                cells |= {'train_probe_error': layer / 8, 'test_probe_error': layer / 4}
            rows.append(cells)
        rows.append({'epoch': epoch, 'round': 0, 'layer': layer + 1})  # the classifier
    write(folder, settings, rows, 'layers')


def test_layers_by_epoch(tmp_path):
    folder, networks = results(tmp_path / '1', depth=[2, 3], network='MLP', label_noise=0.1)
    for settings in networks:
        learned(folder, settings)
    first, second = figures.layers_epochs_picture(runs_of(folder), folder).axes
    words = ['training accuracy 0.9688', 'effective depth 2 (ε = 0.01), 1 (ε = 0.05)']
    assert first.get_title().split('\n') == [networks[0].name, *words]
    found = curves(second)
    assert set(found) == {'input', 'layer 1', 'layer 2', 'layer 3', 'training accuracy'}
    assert found['layer 2'] == ([0, 4], pytest.approx([1 - 0.409, 1 - 0.009]))
    accuracies = [0.5, 0.75, 0.875, 0.9375, 0.96875]
    assert found['training accuracy'] == ([0, 1, 2, 3, 4], accuracies)


def test_layers_at_the_end(tmp_path):
    knobs = {'depth': [2, 3], 'label_noise': [0.0, 0.1], 'network': 'MLP'}
    folder, networks = results(tmp_path / '1', **knobs)
    for settings in networks:
        learned(folder, settings, probes=True)
    figure = figures.layers_picture(runs_of(folder), folder)
    accuracy, variability, probes, *_ = figure.axes
    assert titles(figure) == ['depth 2', '', '', 'depth 3', '', '']
    assert legend(figure) == ['label_noise 0.0', 'label_noise 0.1']
    train, test = (line.get_data() for line in accuracy.lines[:2])
    assert list(train[0]) == [0, 1, 2]
    assert list(train[1]) == pytest.approx([0.5, 0.96, 0.991])
    assert list(test[1]) == pytest.approx([0.0, 0.92, 0.982])
    assert list(figure.axes[4].lines[0].get_ydata()) == pytest.approx([2, 0.16, 0.036, 0.08])
    assert variability.get_yscale() == 'log'
    assert probes.get_ylabel() == 'linear-probe accuracy'
    assert list(probes.lines[1].get_ydata()) == [1, 0.75, 0.5]

    for settings in networks:
        write(folder, settings, [{'epoch': 1, 'round': 0, 'layer': 1, 'density': 0.5}], 'layers')
    assert figures.layers_picture(runs_of(folder), folder) is None  # nothing of class centers


def test_compressed_networks(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    steps = [(6848, 0.125, 8.0), (4172, 0.125, 4.0), (756, 0.25, 2.0)]
    rows = []
    for weights, error, bound in steps:
        cells = {'lam': 0.1, 'channels': '16|13', 'weights': weights, 'pac_bayes_error': ''}
        rows.append(cells | {'test_error': error, 'our_bound': bound})
    path = write(folder, settings, rows, 'compress')
    assert names(figures.draw(folder)) == {'compress'}
    errors, bounds = figures.compress_picture([settings], folder).axes
    assert curves(errors) == {'test error': ([756, 4172, 6848], [0.25, 0.125, 0.125])}
    assert curves(bounds) == {OURS: ([756, 4172, 6848], [0.25, 0.5, 1])}  # of the first row's
    assert bounds.get_ylim()[1] == 1.11
    assert texts(errors.get_xticklabels()) == ['756', '4,172', '6,848']
    for damage in ('weights,lam\n1,2\n', 'weights,test_error\n1,0.5\n1,2,3,4\n'):
        path.write_text(damage)
        with pytest.raises(BadInput, match=r'compress\.csv: not a table of studies\.compress'):
            figures.draw(folder)


@pytest.mark.process
def test_training_does_not_load_matplotlib():
    code = "import figures, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0
