"""The pictures: what is drawn is what the files hold."""

import csv
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, train_small

import figures
import panels
from conf import BadInput, load_settings, settings_text
from records import folder_settings, read_metrics
from summary import read_runs, summary
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
    errors = {
        'train_error': train_error,
        'test_error': test_error,
        'generalization_gap': test_error - train_error,
    }
    return {'epoch': epoch} | errors | cells


def runs_of(folder):
    return read_runs(folder, folder_settings(folder)[1])


def drawn(panel):
    """{label: (x, y)} of the curves of a panel, without its helping lines."""
    return {
        line.get_label(): tuple(map(list, line.get_data())) for line in panels.labelled([panel])
    }


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def marks(panel, name):
    """[(x, row)] of the helping marks of this name."""
    lines = [line for line in panel.get_lines() if line.get_label() == f'_{name}']
    return [tuple(map(list, line.get_data())) for line in lines]


def powers(panel):
    """The powers of 2 at the ticks of the y axis, read from their labels."""
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert [2.0 ** int(label[4:-2]) for label in labels] == list(panel.get_yticks())
    return [int(label[4:-2]) for label in labels]


WIDTHS = ['figure', 'certified', 'bounds', 'sweep', 'layers']


@pytest.mark.parametrize(
    'name, pictures', [('digits', ['figure', 'bounds']), ('mnist-width', WIDTHS)]
)
def test_shipped_results_are_drawn(tmp_path, name, pictures):
    folder = tmp_path / name
    shutil.copytree(
        ROOT / 'results' / name,
        folder,
        ignore=shutil.ignore_patterns('*.png', '*.pdf', '*.csv.*', 'summary.csv'),
    )
    paths = figures.draw(folder)
    names = {f'{picture}.{suffix}' for picture in pictures for suffix in ('png', 'pdf')}
    assert {path.name for path in paths} - {'summary.csv'} == names and all(
        path.parent == folder for path in paths
    )
    assert (folder / 'summary.csv').exists() == ('sweep' in pictures)
    first = {path: path.read_bytes() for path in paths}
    for path, content in first.items():
        if path.suffix == '.pdf':
            assert content[:5] == b'%PDF-' and b'/FontFile2' in content and b'/Type3' not in content
            assert b'CreationDate' not in content
        elif path.suffix == '.png':
            assert (
                content[:8] == b'\x89PNG\r\n\x1a\n'
                and int.from_bytes(content[16:20], 'big') == 1700
            )  # twice a page's
    assert {
        path: path.read_bytes() for path in figures.draw(folder)
    } == first  # the same bytes again


FIGURE_1 = [
    'Ledent et al. 2021',
    'Graf et al. 2022',
    'Golowich et al. 2018',
    'Long and Sedghi 2020',
    'Ours (Galanti et al. 2023)',
    'train error',
    'test error',
    '|generalization gap|',
]


def test_figure_1_has_the_eight_curves_of_the_paper(monkeypatch):
    folder = ROOT / 'results' / 'mnist-depth'
    runs = runs_of(folder)
    figure = figures.figure_picture(runs)
    assert legend(figure) == FIGURE_1
    assert [panel.get_title() for panel in figure.get_axes()] == [
        settings.name for settings, _ in runs
    ]
    for panel, (settings, _) in zip(figure.get_axes(), runs):
        table, curves = read_metrics(folder / settings.name / 'metrics.csv'), drawn(panel)
        for label, column in (
            ('Ours (Galanti et al. 2023)', 'our_bound'),
            ('test error', 'test_error'),
        ):
            assert curves[label] == (list(table['epoch']), list(table[column]))
        gap = np.abs(table['generalization_gap'])
        np.testing.assert_array_equal(
            curves['|generalization gap|'][1], np.where(gap > 0, gap, np.nan)
        )
        assert panel.get_yscale() == 'log'
    assert powers(figure.get_axes()[0]) == [-10, 0, 10, 20, 30]

    monkeypatch.setitem(BOUNDS, 'user_bound', lambda *_: 1.0)
    with_own = [(settings, table | {'user_bound': table['our_bound']}) for settings, table in runs]
    assert legend(figures.figure_picture(with_own)) == [*FIGURE_1, 'user_bound']


def test_what_certifies_and_every_bound_have_pictures_of_their_own():
    runs = runs_of(ROOT / 'results' / 'mnist-depth')
    figure = figures.certified_picture(runs)
    certificates = [
        'norm-based certificate',
        'A (trained network)',
        'B (rounded)',
        'C (random classifier)',
    ]
    assert legend(figure) == [*certificates, 'test-set bound', 'train error', 'test error']
    panel = figure.get_axes()[0]
    assert (
        panel.get_ylabel() == 'error' and panel.get_ylim()[0] < 0.05 and 1 < panel.get_ylim()[1] < 2
    )
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        '0.05',
        '0.1',
        '0.2',
        '0.5',
        '1',
    ]
    assert (
        figures.certified_picture(runs_of(ROOT / 'results' / 'digits')) is None
    )  # the norm-based one is 1

    figure = figures.bounds_picture(runs)
    rest = ['Corrected bound', 'Gonon et al. 2024', 'Bartlett et al. 2017', 'Neyshabur et al. 2018']
    assert legend(figure) == [*FIGURE_1[:5], *rest, 'Graf et al. 2022 (parameters)']
    assert figure.get_axes()[0].get_ylabel() == 'excess over the margin error'


@pytest.mark.parametrize(
    'picture', ['figure_picture', 'certified_picture', 'bounds_picture', 'sweep_picture']
)
def test_texts_are_of_nine_points_on_a_page(picture):
    import matplotlib
    from matplotlib.text import Text

    with matplotlib.rc_context(panels.LOOK):
        figure = getattr(figures, picture)(runs_of(ROOT / 'results' / 'mnist-width'))
        assert figure.get_figwidth() * 96 == pytest.approx(850)
        for text in figure.findobj(Text):
            size = text.get_size() * (0.7 if '^' in text.get_text() else 1)  # an exponent's
            assert size >= 9 or not text.get_text()


def test_a_curve_joins_its_cells_and_marks_what_has_no_place(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    cells = [
        {},
        {'our_bound': 8.0, 'pac_bayes_error': 0.5},
        {'our_bound': math.inf},
        {'our_bound': 0.0},
        {'our_bound': 2.0},
    ]
    cells[4]['pac_bayes_error'] = 0.25
    rows = [row(epoch, **cell) for epoch, cell in enumerate(cells)]
    rows[3]['train_error'] = 0
    write(folder / settings.name / 'metrics.csv', rows)
    runs = runs_of(folder)
    (panel,) = figures.certified_picture(runs).get_axes()
    assert drawn(panel)['A (trained network)'] == ([1, 4], [0.5, 0.25])
    assert [
        line.get_marker() for line in panel.get_lines() if line.get_label().startswith('A ')
    ] == ['o']
    figure = figures.figure_picture(runs)
    (panel,) = figure.get_axes()
    x, y = drawn(panel)['Ours (Galanti et al. 2023)']
    assert x == [1, 2, 3, 4]
    np.testing.assert_array_equal(y, [8, np.nan, np.nan, 2])
    (ours, ours_row), (train, train_row) = marks(panel, panels.ZERO)
    assert (
        ours == train == [3] and 0 < ours_row[0] < train_row[0] < 0.2
    )  # of the panel's height: both are seen
    assert [x for x, _ in marks(panel, panels.INFINITE)] == [[2]]
    assert legend(figure) == [*FIGURE_1[4:], panels.ZERO, panels.INFINITE]


def test_a_point_alone_has_a_marker(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    train_errors = (0.5, 0, 0.25, 0, 0.5, 0.5)
    write(
        folder / settings.name / 'metrics.csv',
        [row(epoch, error) for epoch, error in enumerate(train_errors)],
    )
    (panel,) = figures.figure_picture(runs_of(folder)).get_axes()
    lines = {line.get_label(): line for line in panels.labelled([panel])}
    assert lines['train error'].get_marker() == 'o' and lines['train error'].get_markevery() == [
        0,
        2,
    ]
    assert lines['test error'].get_marker() == 'None'
    write(folder / settings.name / 'metrics.csv', [row(1)])
    (panel,) = figures.figure_picture(runs_of(folder)).get_axes()
    assert {line.get_marker() for line in panels.labelled([panel])} == {'o'}


def test_what_was_measured_last_is_drawn(tmp_path, capsys):
    folder, (settings,) = results(tmp_path / '1')
    write(
        folder / settings.name / 'metrics.csv',
        [row(0, rho=1.0), row(1, rho=2.0, our_bound=4.0), row(2)],
    )
    again = [
        row(1, 0.25, rho=2 + 1e-9, our_bound=9.0, my_bound=3.0),
        row(2, rho=5.0, my_bound=6.0),
        row(3, 0.125),
    ]
    write(
        folder / settings.name / 'evaluation.csv',
        [cells | {'round': 0, 'eval_seconds': 1} for cells in again],
    )
    ((_, table),) = runs_of(folder)
    expected = {
        'epoch': [0, 1, 2, 3],
        'rho': [1, 2 + 1e-9, 5, np.nan],
        'our_bound': [np.nan, 9, np.nan, np.nan],
    }
    expected |= {'my_bound': [np.nan, 3, 6, np.nan], 'train_error': [0.5, 0.25, 0.5, 0.125]}
    for column, values in expected.items():
        np.testing.assert_array_equal(table[column], values)
    line = capsys.readouterr().out
    assert (
        line.count('\n') == 1
        and f'{settings.name}/evaluation.csv: differs from metrics.csv' in line
    )
    assert line.rstrip().endswith('in train_error, generalization_gap, our_bound')
    figures.draw(folder)
    assert 'our_bound' in capsys.readouterr().out
    write(folder / settings.name / 'evaluation.csv', [row(1, round=0, our_bound=4.0)])
    runs_of(folder)
    assert not capsys.readouterr().out


def test_colours_are_never_shared(monkeypatch):
    def named(*_):
        """Mine et al. 2030: a bound of a user.

        More about it: much.
        """

    for index in range(20):
        monkeypatch.setitem(BOUNDS, f'user{index}_bound', named if index % 2 else lambda *_: 1.0)
    monkeypatch.setitem(BOUNDS, 'user_number', named)  # neither an error nor a bound
    names = [name for name in BOUNDS if name.endswith('_bound')]
    styles = panels.curves([*panels.CURVES, *(name for name in names if name not in panels.CURVES)])
    assert set(styles) == set(names) | set(panels.CURVES) and len(styles) >= 38
    from matplotlib.colors import to_hex

    assert len({to_hex(style['color']) for style in styles.values()}) == len(styles)
    assert (
        styles['user0_bound']['label'] == 'user0_bound'
        and styles['user1_bound']['label'] == 'Mine et al. 2030'
    )


SPANS = [(0.4, 0.5, 1), (-3, 4, 1), (-7, 7, 2), (-9, 25, 5), (-9, 60, 10), (-700, 1023, 225)]


@pytest.mark.parametrize('low, high, step', SPANS)
def test_a_tick_at_one_whatever_the_span(tmp_path, low, high, step):
    folder, (settings,) = results(tmp_path / '1')
    write(
        folder / settings.name / 'metrics.csv',
        [row(0, our_bound=2.0**high), row(1, our_bound=2.0**low)],
    )
    (panel,) = figures.bounds_picture(runs_of(folder)).get_axes()
    assert 0 in powers(panel) and 2 <= len(powers(panel)) <= 9
    assert set(np.diff(powers(panel))) == {step}
    assert panel.get_ylim()[0] <= 2.0**low and panel.get_ylim()[1] >= 2.0**high


@pytest.mark.parametrize('epochs', [1, 2, 3])
def test_epochs_are_whole(tmp_path, epochs):
    folder, (settings,) = results(tmp_path / '1', epochs=epochs)
    write(folder / settings.name / 'metrics.csv', [row(epoch) for epoch in range(epochs + 1)])
    (panel,) = figures.figure_picture(runs_of(folder)).get_axes()
    ticks = panel.get_xticks()
    assert all(tick == round(tick) for tick in ticks) and len(ticks) >= 2


@pytest.mark.parametrize(
    'count, shape', [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (30, (8, 3))]
)
def test_panels_in_a_row_or_a_square(count, shape):
    figure = panels.new_figure(3)
    (row,) = panels.grid(figure, [f'network {number}' for number in range(count)], ['y'])
    assert len(row) == len(figure.get_axes()) == min(count, 24)
    assert (row[0].get_gridspec().nrows, row[0].get_gridspec().ncols) == shape
    assert (figure.get_suptitle() == 'the first 24 of 30') == (count == 30)


def test_names_that_are_too_long_for_a_panel_have_several_lines():
    name = 'CONV-3-200-label_noise0.25-prune_scoremagnitude-seed1'
    ((panel, *_),) = panels.grid(panels.new_figure(3), [name] * 3, ['y'])
    lines = panel.get_title().split('\n')
    assert ''.join(lines) == name and max(map(len, lines)) <= 33


def pruned(folder, name, rounds, epochs, rewound=0, factor=1.0, **counted):
    """Metrics of a run of rounds of 50 %, the last of them just begun."""
    rows = [row(epoch, round=0, density=1.0, our_bound=64.0) for epoch in range(epochs + 1)]
    for number in range(1, rounds + 1):
        about = {
            'round': number,
            'density': 0.5**number,
            'corrected_bound': factor * 2.0**number,
            'test_size': 360,
            **counted,
        }
        rows += [row(epoch, 0.25, 0.375, **about) for epoch in (0, *range(rewound + 1, epochs + 1))]
    rows.append(row(0, 1.0, 1.0, round=rounds + 1, density=0.5 ** (rounds + 1)))
    write(folder / name / 'metrics.csv', rows)


@pytest.mark.parametrize('rewind_epoch, rewound', [(0, 0), (2, 2), (-1, 0)])
def test_epochs_run_on_over_rounds(tmp_path, rewind_epoch, rewound):
    folder, (settings,) = results(
        tmp_path / '1', epochs=5, prune_rounds=3, rewind_epoch=rewind_epoch
    )
    pruned(folder, settings.name, 2, 5, rewound)
    (panel,) = figures.figure_picture(runs_of(folder)).get_axes()
    each = 5 - rewound
    first, second, third = range(6), range(5, 6 + each), range(5 + each, 6 + 2 * each)
    assert drawn(panel)['train error'][0] == [*first, *second, *third, 5 + 2 * each]
    assert [x[0] for x, _ in marks(panel, 'pruning')] == [5, 5 + each, 5 + 2 * each]
    (panel,) = figures.bounds_picture(runs_of(folder)).get_axes()
    assert drawn(panel)['Corrected bound'][0] == [*second, *third]


def test_against_density(tmp_path):
    folder, runs = results(
        tmp_path / '1', epochs=5, prune_rounds=3, prune_score=['magnitude', 'path'], seed=[0, 1]
    )
    for settings in runs:
        pruned(
            folder,
            settings.name,
            2,
            5,
            factor=1.0 + settings.seed + 4 * (settings.prune_score == 'path'),
        )
    path = folder / runs[0].name / 'metrics.csv'
    path.write_text(
        path.read_text() + '1' + path.read_text().splitlines()[-1][1:] + '\n'
    )  # in the middle of a round
    read = runs_of(folder)
    figure = figures.density_picture(read)
    *errors, magnitude, path = figure.get_axes()
    assert [panel.get_title() for panel in errors] == ['prune_score magnitude', 'prune_score path']
    assert [panel.get_ylabel() for panel in (errors[0], magnitude)] == [
        'error',
        'excess over the margin error',
    ]
    assert drawn(magnitude)['Corrected bound'] == ([0.25, 0.5], [6.0, 3.0])
    assert drawn(path)['Corrected bound'] == ([0.25, 0.5], [22.0, 11.0])
    extents = [panel.collections[0].get_paths()[0].get_extents() for panel in (magnitude, path)]
    assert [(extent.ymin, extent.ymax) for extent in extents] == [
        (2.0, 8.0),
        (10.0, 24.0),
    ]  # over the seeds
    assert drawn(errors[0])['train error'] == ([0.25, 0.5, 1.0], [0.25, 0.25, 0.5])
    assert (
        errors[0].get_xscale() == 'log'
        and errors[0].get_xlim()[0] > 1 > 0.25 > errors[0].get_xlim()[1]
    )
    assert [label.get_text() for label in errors[0].get_xticklabels()] == [
        '25',
        '50',
        '100',
    ]  # percent
    assert [row for _, row in marks(errors[0], panels.LEFT_END)] == [
        [0.5, 0.5],
        [0.75, 0.75],
    ]  # the dense network
    segments = errors[0].containers[0][2][0].get_segments()
    deviation = math.sqrt(0.375 * 0.625 / 360)
    np.testing.assert_allclose(segments[0][:, 1], [0.375 - deviation, 0.375 + deviation])
    assert legend(figure)[-3:] == [panels.LEFT_END, 'range over seeds', panels.DEVIATION]
    assert not set(legend(figure)) & {'Graf et al. 2022', '|generalization gap|'}

    assert figures.sweep_picture(read) is None
    assert {'density.png', 'density.pdf', 'summary.csv'} <= {
        path.name for path in figures.draw(folder)
    }
    lines = list(csv.DictReader((folder / 'summary.csv').open()))
    assert len(lines) == 4 * 3 + 1 and [line['density'] for line in lines[:3]] == [
        '1.0',
        '0.5',
        '0.25',
    ]


def test_what_is_left_of_the_convolutions_is_counted(tmp_path):
    folder, (settings,) = results(
        tmp_path / '1', epochs=5, prune_rounds=2, prune_layers='conv', prune_fraction=0.75
    )
    pruned(folder, settings.name, 1, 5)  # as it was before there was a count
    assert drawn(figures.density_picture(runs_of(folder)).get_axes()[0])['train error'][0] == [
        0.25,
        1.0,
    ]
    pruned(folder, settings.name, 1, 5, masked_density=0.375)
    panel = figures.density_picture(runs_of(folder)).get_axes()[0]
    assert drawn(panel)['train error'][0] == [0.375, 1.0]
    assert [label.get_text() for label in panel.get_xticklabels()] == ['37.5', '100']


def test_many_groups_have_panels_of_their_own(tmp_path):
    folder, runs = results(tmp_path / '1', epochs=5, prune_rounds=2, width=[4, 5, 6, 7])
    for settings in runs:
        pruned(folder, settings.name, 1, 5)
    found = figures.density_picture(runs_of(folder)).get_axes()
    titles = ['width 4', 'width 5', '', '', 'width 6', 'width 7', '', '']  # bounds are below errors
    assert [panel.get_title() for panel in found] == titles


def test_sweep_with_seeds(tmp_path):
    folder, runs = results(tmp_path / '1', epochs=1, width=[4, 8, 16], depth=[2, 3], seed=[0, 1, 2])
    for settings in runs:
        value = settings.width * 10.0**settings.depth
        rows = [row(0, our_bound=1.0), row(1, our_bound=value * (1, 2, 6)[settings.seed])]
        write(folder / settings.name / 'metrics.csv', rows)
    write(
        folder / runs[-1].name / 'metrics.csv', [row(0, our_bound=1.0)]
    )  # a network that is not finished
    figure = figures.sweep_picture(runs_of(folder))
    axes = (
        figure.get_axes()
    )  # errors of three groups, their bounds, errors of two groups, their bounds
    groups = list(zip([*axes[:3], *axes[6:8]], [*axes[3:6], *axes[8:]]))
    found = {(below.get_xlabel(), above.get_title()): below for above, below in groups}
    widths, depths = (4, 8, 16), (2, 3)
    assert list(found) == [('depth', f'width {n}') for n in widths] + [
        ('width', f'depth {n}') for n in depths
    ]
    ours = 'Ours (Galanti et al. 2023)'
    panel = found['width', 'depth 2']
    assert drawn(panel)[ours] == ([4, 8, 16], [1200, 2400, 4800]) and panel.get_xscale() == 'log'
    extent = panel.collections[0].get_paths()[0].get_extents()
    assert (extent.ymin, extent.ymax) == (400, 9600)
    assert (
        panel.get_xlim()[0] > 2 and panel.get_ylim()[0] < 400
    )  # an axis of its own, and room for the ranges
    assert drawn(found['width', 'depth 3'])[ours][1] == [
        12000,
        24000,
        24000,
    ]  # of two seeds the last
    assert drawn(found['depth', 'width 8'])[ours] == ([2, 3], [2400, 24000])
    assert found['depth', 'width 8'].get_xscale() == 'linear'
    assert [label.get_text() for label in panel.get_xticklabels()] == ['4', '8', '16']

    lines = list(csv.DictReader(summary(runs_of(folder)).decode().splitlines()))
    assert [line['name'] for line in lines] == [settings.name for settings in runs]
    assert list(lines[0])[:5] == ['name', 'depth', 'width', 'seed', 'data_seed']
    assert (lines[1]['seed'], lines[1]['epoch'], float(lines[1]['our_bound']), lines[1]['rho']) == (
        '1',
        '1.0',
        800.0,
        '',
    )


def test_sweep_of_other_knobs(tmp_path):
    folder, runs = results(
        tmp_path / '1', epochs=1, lr=[0.1, 0.01], dataset_name=['digits', 'MNIST']
    )
    for settings in runs:
        write(folder / settings.name / 'metrics.csv', [row(1, our_bound=1 / settings.lr, lr=1e-5)])
    axes = figures.sweep_picture(runs_of(folder)).get_axes()
    assert [panel.get_title() for panel in axes[:2]] == [
        'dataset_name digits',
        'dataset_name MNIST',
    ]
    assert drawn(axes[2])['Ours (Galanti et al. 2023)'] == ([0.01, 0.1], [100, 10])
    assert summary(runs_of(folder)).startswith(b'name,dataset_name,lr_setting,seed,data_seed,')

    folder, runs = results(tmp_path / '2', epochs=1, loss=['MSE', 'CE'])
    for settings in runs:
        write(folder / settings.name / 'metrics.csv', [row(1)])
    (panel,) = figures.sweep_picture(runs_of(folder)).get_axes()
    assert [label.get_text() for label in panel.get_xticklabels()] == ['MSE', 'CE']

    folder, runs = results(tmp_path / '3', epochs=1, train_samples=[0, 100, 200])
    for settings in runs:
        write(
            folder / settings.name / 'metrics.csv',
            [row(1, train_size=settings.train_samples or 1437)],
        )
    (panel,) = figures.sweep_picture(runs_of(folder)).get_axes()
    assert drawn(panel)['train error'][0] == [100, 200, 1437]
    assert [label.get_text() for label in panel.get_xticklabels()] == ['100', '200', '0']
    for settings in runs:
        write(
            folder / settings.name / 'metrics.csv', [row(1)]
        )  # as it was before there was a count
    (panel,) = figures.sweep_picture(runs_of(folder)).get_axes()
    assert drawn(panel)['train error'][0] == [0, 1, 2]

    folder, runs = results(tmp_path / '4', epochs=1, density=[1.0, 0.5], initial_mask='random')
    for settings in runs:
        write(folder / settings.name / 'metrics.csv', [row(1)])
    (panel,) = figures.sweep_picture(runs_of(folder)).get_axes()
    assert panel.get_xlim()[0] > 1 > 0.5 > panel.get_xlim()[1]


def test_seeds_alone_are_no_sweep(tmp_path):
    folder, runs = results(tmp_path / '1', seed=[0, 1])
    for settings in runs:
        write(folder / settings.name / 'metrics.csv', [row(1)])
    assert figures.sweep_picture(runs_of(folder)) is None
    assert [path.name for path in figures.draw(folder)] == ['figure.png', 'figure.pdf']


@pytest.mark.pictures
def test_a_run_counts_what_the_pictures_need(tmp_path):
    train_small(
        tmp_path / 'run',
        *'--epochs 1 --prune-rounds 1 --prune-fraction 0.5 --prune-layers conv'.split(),
    )
    table = read_metrics(tmp_path / 'run' / 'CONV-3-4' / 'metrics.csv')
    assert table['masked_density'].tolist() == [1, 1, 0.5, 0.5] and (table['density'] > 0.9).all()
    assert set(table['train_size']) == {1437} and set(table['test_size']) == {360}
    pictures = {
        f'{name}.{suffix}' for name in ('figure', 'bounds', 'density') for suffix in ('png', 'pdf')
    }
    assert {path.name for path in (tmp_path / 'run').glob('*.p[nd][gf]')} == pictures


def test_layers(tmp_path):
    folder, runs = results(tmp_path / '1', depth=[2, 3], network='MLP', label_noise=0.1)
    for settings in runs:
        write(
            folder / settings.name / 'metrics.csv',
            [row(epoch, 0.5 ** (epoch + 1)) for epoch in range(5)],
        )
        rows = []
        for epoch in (0, 4):
            errors = [0.5, 0.04, 0.009, 0.02][: settings.depth + 1]
            cells = [
                {
                    'train_ncc_error': e + 0.4 * (epoch == 0),
                    'test_ncc_error': 2 * e,
                    'train_cdnv': 4 * e,
                }
                for e in errors
            ]
            cells = [*cells, {'train_ncc_error': ''}]  # the classifier
            rows += [
                {'epoch': epoch, 'round': 0, 'layer': layer} | cell
                for layer, cell in enumerate(cells)
            ]
        write(folder / settings.name / 'layers.csv', rows)
    figure = figures.layers_picture(runs_of(folder), folder)
    *above, accuracy, variability = figure.get_axes()
    assert [panel.get_title().split('\n')[0] for panel in above] == ['MLP-2-200', 'MLP-3-200']
    assert set(drawn(above[1])) == {'input', 'layer 1', 'layer 2', 'layer 3', 'training accuracy'}
    x, y = drawn(above[1])['layer 2']
    assert x == [0, 4] and y == pytest.approx([1 - 0.409, 1 - 0.009])
    assert drawn(above[0])['training accuracy'] == (
        [0, 1, 2, 3, 4],
        [0.5, 0.75, 0.875, 0.9375, 0.96875],
    )
    words = ['training accuracy 0.9688', 'effective depth 2 (\u03b5 = 0.01), 1 (\u03b5 = 0.05)']
    assert above[0].get_title().split('\n')[1:] == words
    train, test = (line.get_data() for line in accuracy.get_lines()[:2])
    assert list(train[0]) == [0, 1, 2] and list(train[1]) == pytest.approx([0.5, 0.96, 0.991])
    assert list(test[1]) == pytest.approx([0.0, 0.92, 0.982])
    assert list(variability.get_lines()[2].get_ydata()) == pytest.approx([2, 0.16, 0.036, 0.08])
    assert variability.get_yscale() == 'log' and {'layers.png', 'layers.pdf'} <= {
        path.name for path in figures.draw(folder)
    }


def test_linear_probes_have_a_panel(tmp_path):
    folder, (settings,) = results(tmp_path / '1', depth=2)
    write(folder / settings.name / 'metrics.csv', [row(0), row(4)])
    cells = {'train_ncc_error': 0.1, 'test_ncc_error': 0.2, 'train_cdnv': 1.0, 'test_cdnv': 2.0}
    rows = [
        {'epoch': epoch, 'round': 0, 'layer': layer} | cells
        for epoch in (0, 4)
        for layer in range(3)
    ]
    for layer, line in enumerate(rows):
        line |= {
            f'{part}_probe_error': layer / 8 if line['epoch'] == 4 else ''
            for part in ('train', 'test')
        }
    write(folder / settings.name / 'layers.csv', rows)
    _, _, _, probes = figures.layers_picture(runs_of(folder), folder).get_axes()
    assert probes.get_ylabel() == 'linear-probe accuracy'
    for line in probes.get_lines():
        assert (list(line.get_xdata()), list(line.get_ydata())) == (
            [0, 1, 2],
            [1 - 3 / 8, 1 - 4 / 8, 1 - 5 / 8],
        )


def test_layers_that_no_class_center_was_measured_of(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    write(folder / settings.name / 'metrics.csv', [row(1)])
    write(
        folder / settings.name / 'layers.csv',
        [{'epoch': 1, 'round': 0, 'layer': 1, 'density': 0.5}],
    )
    assert figures.layers_picture(runs_of(folder), folder) is None


def test_compressed_networks(tmp_path):
    folder, (settings,) = results(tmp_path / '1')
    steps = [(6848, 0.125, 8.0), (4172, 0.125, 4.0), (756, 0.25, 2.0)]
    rows = [
        {
            'lam': 0.1,
            'channels': '16|13',
            'weights': weights,
            'test_error': error,
            'our_bound': bound,
            'pac_bayes_error': '',
        }
        for weights, error, bound in steps
    ]
    write(folder / settings.name / 'compress.csv', rows)
    assert [path.name for path in figures.draw(folder)] == ['compress.png', 'compress.pdf']
    errors, bounds = figures.compress_picture([settings], folder).get_axes()
    assert drawn(errors) == {'test error': ([756, 4172, 6848], [0.25, 0.125, 0.125])}
    assert drawn(bounds)['Ours (Galanti et al. 2023)'] == ([756, 4172, 6848], [2, 4, 8])
    assert [label.get_text() for label in errors.get_xticklabels()] == ['756', '4,172', '6,848']
    write(
        folder / settings.name / 'compress.csv',
        [rows[1] | {'weights': weights} for weights in (5000, 5001, 9000)],
    )
    labels = figures.compress_picture([settings], folder).get_axes()[0].get_xticklabels()
    assert [label.get_text() for label in labels] == [
        '5,000',
        '',
        '9,000',
    ]  # a text that would touch another is left out
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


@pytest.mark.parametrize(
    'error, raised', [(13, BadInput), (1, BadInput), (30, BadInput), (28, OSError)]
)
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, error, raised):
    folder, (settings,) = results(tmp_path / '1')
    write(folder / settings.name / 'metrics.csv', [row(0), row(1)])

    def refuse(path, content):
        raise OSError(error, 'no')

    monkeypatch.setattr(figures, 'write_file', refuse)
    with pytest.raises(raised) as caught:
        figures.draw(folder)
    if raised is BadInput:
        assert 'figure.png: cannot be written' in str(
            caught.value
        ) and f'copy {folder} elsewhere' in str(caught.value)


def test_training_does_not_need_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import figures; figures.draw('results/digits')"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith('ModuleNotFoundError: import of matplotlib')
