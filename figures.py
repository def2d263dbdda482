"""Every picture of a results folder, and summary.csv, from its files alone: `draw(folder)`.

A run is a pair here: the settings of a network and its table of metrics, {column: array}.
"""

import colorsys
import io
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from conf import KNOBS, NOT_SWEPT, BadInput, load_launch
from evaluation import is_finished, last_epoch
from measures.representations import effective_depth
from records import read_layers, read_metrics, rows_of, write_file, write_table
from utils import BOUNDS

# Column: color, line style, width, label, in the order of every legend: the paper's Figure 1 from
# top to bottom, then what came after it. Without a label a bound is named by the words of its
# docstring before the first colon. Curves of one picture differ in hue and lightness, so that they
# can be told apart without a sense of red and green.
CURVES = {
    'ledent_bound': ('#00805F', '-', 1.5, None),
    'graf_bound': ('#8C2D04', '-', 1.5, None),
    'golowich_bound': ('#F0B400', '-', 1.5, None),
    'sedghi_bound': ('#DD8FBB', '-', 1.5, None),
    'our_bound': ('#0072B2', '-', 2.2, None),
    'corrected_bound': ('#332288', '-', 1.5, None),
    'path_bound': ('#999933', '-', 1.5, None),
    'bartlett_bound': ('#CCBB44', '--', 1.5, None),
    'neyshabur_bound': ('#AA4499', '--', 1.5, None),
    'graf_params_bound': ('#A6611A', '--', 1.5, None),
    'certified_error': ('#6A5ACD', '--', 1.5, 'norm-based certificate'),
    'pac_bayes_error': ('#BB0022', '-', 2.2, 'A (trained network)'),
    'pac_bayes_rounded_error': ('#E0655A', '-', 1.3, 'B (rounded)'),
    'pac_bayes_gibbs_error': ('#F0A5A0', '-', 1.3, 'C (random classifier)'),
    'test_set_bound': ('#117733', '-.', 1.3, 'test-set bound'),
    'train_error': ('#000000', '-', 2.2, 'train error'),
    'test_error': ('#33BBEE', '--', 1.5, 'test error'),
    'absolute_gap': ('#888888', ':', 1.3, '|generalization gap|'),
}
PAPER_BOUNDS = list(CURVES)[:5]
SWEPT_BOUNDS = list(CURVES)[:7]
CERTIFICATES = list(CURVES)[10:14]
ERRORS = ['train_error', 'test_error']
CERTIFIED = [*CERTIFICATES, 'test_set_bound', *ERRORS]

# The levels of the paper's Figure 1 from about epoch 60 on, as powers of 2: (lowest, highest) over
# the widths that it shows.
PAPER_LEVELS = {
    'ledent_bound': (22, 22),
    'graf_bound': (17.5, 19),
    'golowich_bound': (16, 16),
    'sedghi_bound': (4, 6),
    'our_bound': (0.7, 0.7),
    'train_error': (-5.5, -5.5),
    'test_error': (-5.5, -5.5),
    'absolute_gap': (-11, -11),
}
PAPER_NETWORKS = [('MNIST', 'CONV', 3, width) for width in (200, 600, 1000)]

# What a picture has besides curves. In legends the labels stand without their underscores, which
# keep these artists apart from curves.
MARKS = {
    'pruning': {'label': '_pruning', 'color': '0.6', 'linewidth': 0.8},
    'left': {'label': '_value at the left end', 'color': '0.4', 'linewidth': 0.6},
    'range': {'label': '_range over networks', 'color': '0.8', 'linewidth': 6},
    'deviation': {'label': '_± standard deviation', 'color': '0.4', 'linewidth': 3, 'alpha': 0.5},
    'level': {'label': "_level in the paper's Figure 1", 'color': '0.4', 'linewidth': 3},
    'zero': {'label': '_0 (below the axis)', 'color': '0.4', 'linewidth': 0, 'marker': 'v'},
    'infinite': {
        'label': '_infinite (above the axis)',
        'color': '0.4',
        'linewidth': 0,
        'marker': '^',
    },
}

ERROR = 'error'
EXCESS = 'excess over the margin error'  # what a bound limits
WEIGHTS, WEIGHTS_LEFT = 'number of weights', 'weights left in the pruned layers (%)'
PAGE = 850 / 96  # inches: a page shows 850 pixels, 96 an inch, so that 9 points are 9 points there
MOST_PANELS = 24
FEW_POINTS = 50  # a curve of at most this many shows its points
LEAST, LARGEST = 1e-250, 1e250  # what lies beyond is drawn as 0 or infinity
RC = {
    'font.size': 9,
    'axes.titlesize': 9,
    'figure.titlesize': 9,
    'axes.grid': True,
    'grid.alpha': 0.3,
    'legend.frameon': False,
    'pdf.fonttype': 42,  # TrueType: text stays text
}

# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------

SEEDS = 'seed', 'data_seed'
TIMINGS = 'train_seconds', 'eval_seconds'


def read_runs(folder, networks):
    """The runs of networks that have metrics; a cell of evaluation.csv replaces the logged one.

    Args:
        folder: results folder.
        networks: settings of its networks.
    Returns:
        a list of (settings, table).
    """
    runs = []
    for settings in networks:
        path = Path(folder, settings.name, 'metrics.csv')
        if not path.exists():
            continue
        table = read_metrics(path)
        path = path.with_name('evaluation.csv')
        if path.exists():
            table = overlay(table, read_metrics(path), settings, path)
        if len(table['epoch']):
            runs.append((settings, table))
    return runs


def overlay(table, measured, settings, path):
    """A table of metrics with the cells of evaluation.csv, read from `path`, in place of its own.

    Left out are rows with another delta or gamma than the training's, since a curve is of one pair.
    Prints whether there are such rows, and in which columns the tables differ by more than 1e-6,
    relatively: with another number of threads the last digits of float32 do.
    """
    rows, omitted, differing = {}, 0, set()
    for row in rows_of(table):
        rows[row['round'], row['epoch']] = filled(row)
    for row in rows_of(measured):
        # Older files do not say which delta and gamma they are of.
        values = row.get('delta', settings.delta), row.get('gamma', settings.gamma)
        if values != (settings.delta, settings.gamma):
            omitted += 1
            continue
        old, new = rows.setdefault((row['round'], row['epoch']), {}), filled(row)
        for column in old.keys() & new.keys() - set(TIMINGS):
            if not math.isclose(old[column], new[column], rel_tol=1e-6):
                differing.add(column)
        old |= new
    if omitted:
        print(f'{path}: {omitted} rows with another delta or gamma than in training are not shown')
    columns = dict.fromkeys([*table, *measured])
    if differing:
        names = ', '.join(column for column in columns if column in differing)
        print(f'{path}: differs from metrics.csv, and is what is shown, in {names}')
    for column in columns:
        columns[column] = np.array([rows[key].get(column, math.nan) for key in sorted(rows)])
    return columns


def filled(row):
    """The cells of a row that are not empty."""
    return {column: cell for column, cell in row.items() if cell == cell}


def last_rows(table):
    """The last row of each round; a round that was pruned and not trained yet has none."""
    ends = {row['round']: row for row in rows_of(table)}
    return [row for row in ends.values() if row['epoch'] > 0 or row['round'] == 0]


def varied(runs):
    """The knobs in which the networks of runs differ, seeds aside."""
    knobs = [knob for knob in KNOBS if knob not in (*NOT_SWEPT, *SEEDS)]
    return [knob for knob in knobs if len({getattr(run[0], knob) for run in runs}) > 1]


def grouped(runs, knobs):
    """{'depth 3, width 8': the runs with these values} for these knobs."""
    groups = {}
    for run in runs:
        title = ', '.join(f'{knob} {getattr(run[0], knob)}' for knob in knobs)
        groups.setdefault(title, []).append(run)
    return groups


def spread(rows):
    """(mean, least, largest) cells of the rows at each `place`: a table {column: array} for each.

    Empty cells are left out.
    """
    cells = {}
    for row in rows:
        for column, cell in filled(row).items():
            cells.setdefault(column, {}).setdefault(row['place'], []).append(cell)
    tables = {}, {}, {}
    for column, at in cells.items():
        for table, function in zip(tables, (np.mean, min, max)):
            values = [function(at.get(place, [math.nan])) for place in sorted(cells['place'])]
            table[column] = np.array(values)
    return tables


def summary(runs):
    """The rows of summary.csv: name, knobs that differ, seeds, the last row of each round.

    A knob that has the name of a column, as lr, is called lr_setting.
    """
    rows = []
    for settings, table in runs:
        start = {'name': settings.name}
        for knob in [*varied(runs), *SEEDS]:
            column = f'{knob}_setting' if knob in table else knob
            start[column] = getattr(settings, knob)
        rows += [start | row for row in last_rows(table)]
    return rows


# ------------------------------------------------------------------------------------------------
# Pictures: each a figure of matplotlib, or None if the folder has nothing for it
# ------------------------------------------------------------------------------------------------


def draw(folder):
    """Draws what the files of a results folder allow, as PNG and PDF, and writes summary.csv.

    Args:
        folder: results folder of one launch.
    Returns:
        the paths written; none if nothing is logged yet.
    Raises:
        ImportError: matplotlib is not installed.
        BadInput: a damaged table.
        OSError: the folder cannot be written.
    """
    import matplotlib  # in functions, since training works without it

    networks = load_launch(folder)[1]
    runs = read_runs(folder, networks)
    paths = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc may ask for LaTeX
        matplotlib.rcParams.update(RC)
        pictures = {
            'figure': figure_picture(runs),
            'certified': certified_picture(runs),
            'bounds': bounds_picture(runs),
            'sweep': sweep_picture(runs),
            'density': density_picture(runs),
            'layers': layers_picture(runs, folder),
            'layers_epochs': layers_epochs_picture(runs, folder),
            'compress': compress_picture(networks, folder),
        }
        formats = {'png': {'dpi': 192}, 'pdf': {'metadata': {'CreationDate': None}}}
        for name, picture in pictures.items():
            if picture is None:
                continue
            picture.draw_without_rendering()
            picture.set_layout_engine('none')  # laid out once for both formats
            for suffix, options in formats.items():
                buffer = io.BytesIO()
                picture.savefig(buffer, format=suffix, **options)
                paths.append(Path(folder, f'{name}.{suffix}'))
                write_file(paths[-1], buffer.getvalue())
    if pictures['sweep'] or pictures['density']:
        paths.append(Path(folder, 'summary.csv'))
        write_table(paths[-1], ['name'], summary(runs))
    return paths


def figure_picture(runs):
    """The paper's Figure 1: its five bounds and a user's own, the errors and their gap."""
    caption = 'Bounds, errors and the generalization gap by epoch, as in Figure 1 of the paper'
    ylabel = f'bounds: {EXCESS}\nother curves: error, gap'
    columns = [*PAPER_BOUNDS, *own_bounds(), *ERRORS, 'absolute_gap']
    return epochs_picture(caption, runs, columns, ylabel, power_axis, levels=PAPER_LEVELS)


def certified_picture(runs):
    """Errors, and what is proven about them; None if every certificate is 1."""
    caption = 'Errors by epoch, and bounds on the test error that hold with probability 1 - delta'
    for _, table in runs:
        for column in CERTIFICATES:
            if (table.get(column, np.ones(1)) < 1).any():
                return epochs_picture(caption, runs, CERTIFIED, ERROR, error_axis)


def bounds_picture(runs):
    """Every bound of BOUNDS."""
    names = [name for name in CURVES if name in BOUNDS and name.endswith('_bound')]
    columns = [*names, *own_bounds()]
    return epochs_picture('Every bound by epoch', runs, columns, EXCESS, power_axis)


def epochs_picture(caption, runs, columns, ylabel, set_axis, levels=None):
    """A panel per network: columns against epochs; None if there is no cell to draw.

    Args:
        set_axis: makes the y axis.
        levels: {column: (low, high)}, powers of 2, for the right edge of the paper's networks.
    """
    titles = [settings.name for settings, _ in runs]
    figure, panels = grid(caption, titles, [ylabel], 3.7 if len(runs) < 4 else 2.7)
    for panel, (settings, table) in zip(panels[0], runs):
        table = table | {'absolute_gap': np.abs(table['generalization_gap'])}
        plot(panel, epoch_axis(panel, table, settings), table, columns)
        network = settings.dataset_name, settings.network, settings.depth, settings.width
        # The paper's levels are drawn outside of the panel, at its right edge.
        if levels and network in PAPER_NETWORKS:
            for column, limits in levels.items():
                if np.isnan(table[column]).all():
                    continue
                look = MARKS['level'] | {'color': CURVES[column][0], 'marker': '_'}
                look |= {'markersize': 8, 'markeredgewidth': 2.5}
                right = panel.get_yaxis_transform()  # x: 0 is the left edge, 1 the right one
                panel.plot([1.015, 1.015], np.exp2(limits), transform=right, clip_on=False, **look)
    if labelled(panels[0]):
        set_axis(panels[0, 0])
        return finish(figure, panels)


def sweep_picture(runs):
    """The last rows of finished networks against each swept number, or else the first other knob.

    A panel for each value of the knobs that vary besides. None for runs of pruning rounds.
    """
    runs = [run for run in runs if is_finished(run[0], rows_of(run[1])[-3:])]
    if any(table['round'].any() for _, table in runs):
        return None
    knobs = varied(runs)
    numbers = [knob for knob in knobs if type(getattr(runs[0][0], knob)) in (int, float)]
    groups = []
    for knob in numbers or knobs[:1]:
        texts = list(dict.fromkeys(str(getattr(settings, knob)) for settings, _ in runs))
        others = [other for other in knobs if other != knob]
        for title, members in grouped(runs, others).items():
            rows = []
            for settings, table in members:
                row, place = last_rows(table)[-1], getattr(settings, knob)
                if knob not in numbers:
                    place = texts.index(str(place))
                if knob == 'train_samples' and place == 0:  # all of them
                    place = np.nan_to_num(row['train_size'])
                rows.append(row | {'place': place})
            text = '{:g}'.format if knob in numbers else dict(enumerate(texts)).get
            groups.append(SimpleNamespace(title=title, xlabel=knob, rows=rows, text=text))
    caption, bounds = 'Networks at the end of their training', [*SWEPT_BOUNDS, *own_bounds()]
    return against(caption, groups, bounds, EXCESS, power_axis)


def density_picture(runs):
    """The last row of each finished pruning round against the share of weights that are left."""
    caption = 'Networks at the end of each pruning round; bounds relative to round 0'
    bounds = ['our_bound', 'corrected_bound', 'path_bound', *own_bounds()]
    runs = [run for run in runs if run[1]['round'].any()]
    groups = []
    for title, members in grouped(runs, varied(runs)).items():
        rows = []
        for settings, table in members:
            counted = 'masked_density' if settings.prune_layers == 'conv' else 'density'
            for row in relative(last_rows(table), bounds):
                if row['epoch'] < last_epoch(settings, row['epoch'], row['train_loss']):
                    continue
                share = row[counted]
                if math.isnan(share):  # an older table, without the count
                    share = settings.density * (1 - settings.prune_fraction) ** row['round']
                rows.append(row | {'place': 100 * share})
        group = {'title': title, 'xlabel': WEIGHTS_LEFT, 'rows': rows, 'text': '{:.3g}'.format}
        groups.append(SimpleNamespace(**group))
    return against(caption, groups, bounds, 'bound / bound of round 0', ratio_axis)


def compress_picture(networks, folder):
    """Narrower networks, from compress.csv, against their number of weights."""
    caption = 'Networks with fewer channels; bounds relative to the source'
    bounds = [*SWEPT_BOUNDS, *own_bounds()]
    groups = []
    for settings in networks:
        path = Path(folder, settings.name, 'compress.csv')
        if not path.exists():
            continue
        rows = relative(read_compressed(path), bounds)
        group = {'title': settings.name, 'xlabel': WEIGHTS, 'rows': rows, 'text': '{:,.0f}'.format}
        groups.append(SimpleNamespace(**group))
    return against(caption, groups, bounds, 'bound / bound of the source', ratio_axis)


def read_compressed(path):
    """The rows of compress.csv that have weights and a test error. Raises BadInput."""
    try:
        table = np.genfromtxt(path, delimiter=',', names=True, ndmin=1)  # cells of text are nan
        rows = [dict(zip(table.dtype.names, cells)) for cells in table]
        rows = [row for row in rows if row['weights'] > 0 and row['test_error'] >= 0]
        return [row | {'place': row['weights']} for row in rows]
    except (LookupError, TypeError, ValueError):
        raise BadInput(f'{path}: not a table of studies.compress; compress again') from None


def relative(rows, columns):
    """Rows of a network with these columns divided by those of the first row, its source."""
    with np.errstate(all='ignore'):  # 0 / 0 is nan
        return [
            row | {column: row[column] / rows[0][column] for column in columns if column in row}
            for row in rows
        ]


def against(caption, groups, bounds, ylabel, set_axis):
    """Errors and certificates, bounds below them, against what networks differ in.

    Lines are means over seeds, shaded areas ranges. Where networks become smaller the axis runs
    from right to left, and thin lines continue the values at its left end.

    Args:
        groups: a list of namespaces, one for a pair of panels: title, xlabel, rows that each have
            a `place` on the x axis, text: a function from a place to the text of its tick.
        bounds: the columns in the lower panels.
        ylabel, set_axis: of the lower panels.
    """
    groups = [group for group in groups if group.rows]
    if not groups:
        return None
    has_bounds = any(row.get(column, 0) > 0 for g in groups for row in g.rows for column in bounds)
    ylabels = [ERROR, ylabel] if has_bounds else [ERROR]
    figure, panels = grid(caption, [group.title for group in groups], ylabels, 2.4)
    for pair, group in zip(panels.T, groups):
        mean, low, high = spread(group.rows)
        for panel, columns in zip(pair, (CERTIFIED, bounds)):
            lines = plot(panel, mean['place'], mean, columns, low, high)
            place_ticks(panel, mean['place'], group.text, 96 // min(3, len(groups)))
            if group.xlabel in ('density', WEIGHTS_LEFT, WEIGHTS):
                panel.invert_xaxis()
                for line in lines:
                    look = MARKS['left'] | {'color': line.get_color()}
                    panel.axhline(line.get_ydata()[-1], zorder=0, **look)
        pair[-1].set_xlabel(group.xlabel)
        # Bars: the standard deviation of an error on that many test images.
        if 'test_size' in mean:
            error = mean['test_error']
            deviation = np.sqrt(error * (1 - error) / mean['test_size'])
            look = MARKS['deviation'] | {'color': CURVES['test_error'][0]}
            pair[0].vlines(mean['place'], error - deviation, error + deviation, **look)
    for panel, make in zip(panels[:, 0], (error_axis, set_axis)):
        make(panel)
    return finish(figure, panels)


# ------------------------------------------------------------------------------------------------
# Pictures of layers.csv
# ------------------------------------------------------------------------------------------------


def read_learned(runs, folder):
    """(settings, table, table of layers) of the runs whose layers' class centers were measured."""
    learned = []
    for settings, table in runs:
        path = Path(folder, settings.name, 'layers.csv')
        if path.exists():
            layers = read_layers(path)
            measured = ~np.isnan(layers['train_ncc_error'])
            if measured.any():
                layers = {column: cells[measured] for column, cells in layers.items()}
                learned.append((settings, table, layers))
    return learned


def last_evaluation(layers):
    """The last row of each layer."""
    count = len(set(layers['layer']))
    return {column: cells[-count:] for column, cells in layers.items()}


def layers_picture(runs, folder):
    """What each layer has learned at the end, by layer.

    Networks that differ in the first varied knob only, or in their seeds, share a panel.
    """
    import matplotlib

    learned = read_learned(runs, folder)
    if not learned:
        return None
    caption = (
        'Layers at the end, on the training set (solid) and the test set (dashed): accuracy of '
    )
    caption += 'the nearest class center\n(NCC), class-distance normalized variance (CDNV)'
    kinds = {'ncc_error': 'NCC accuracy', 'cdnv': 'CDNV'}  # of columns of layers.csv
    if any(np.isfinite(layers['train_probe_error']).any() for _, _, layers in learned):
        kinds['probe_error'] = 'linear-probe accuracy'
    # A column of panels per value of the other knobs, a color per value of the first.
    first, *others = varied(learned) or ['name']
    groups, names = grouped(learned, others), list(grouped(learned, [first]))
    figure, panels = grid(caption, list(groups), list(kinds.values()), 2.4)
    for column, members in zip(panels.T, groups.values()):
        column[-1].set_xlabel('layer')
        for name, same in grouped(members, [first]).items():
            share = names.index(name) / len(names)
            look = {'color': matplotlib.colormaps['plasma'](0.9 * share), 'marker': '.'}
            look['linewidth'] = 2.4 - 1.4 * share  # of curves that coincide the lower is the wider
            for _, _, layers in same:
                last = last_evaluation(layers)
                for panel, kind in zip(column, kinds):
                    panel.xaxis.get_major_locator().set_params(integer=True)
                    train, test = last[f'train_{kind}'], last[f'test_{kind}']
                    if kind != 'cdnv':
                        train, test = 1 - train, 1 - test
                    panel.plot(last['layer'], train, '-', label=name, **look)
                    panel.plot(last['layer'], test, '--', label='_test', **look)
    power_axis(panels[1, 0])
    return finish(figure, panels)


def layers_epochs_picture(runs, folder):
    """A panel per network: the nearest-class-center accuracy of each layer against epochs."""
    import matplotlib

    learned = read_learned(runs, folder)
    if not learned:
        return None
    caption = (
        'Accuracy of the nearest class center (NCC) of each layer by epoch, on the training set'
    )
    titles = [settings.name for settings, _, _ in learned]
    figure, panels = grid(caption, titles, ['NCC accuracy'], 2.7)
    deepest = max(layers['layer'].max() for _, _, layers in learned)
    for panel, (settings, table, layers) in zip(panels[0], learned):
        x = epoch_axis(panel, table, settings)
        panel.plot(x, 1 - table['train_error'], 'k--', zorder=3, label='training accuracy')
        x = epoch_axis(panel, layers, settings)
        for layer in np.unique(layers['layer']):
            at, depth = layers['layer'] == layer, layer / deepest
            look = {'color': matplotlib.colormaps['viridis_r'](depth)}
            look['label'] = f'layer {layer:.0f}' if layer else 'input'
            look['linewidth'] = 2.8 - 1.6 * depth  # of curves that coincide the lower is the wider
            panel.plot(x[at], 1 - layers['train_ncc_error'][at], **look)
        last = last_evaluation(layers)
        errors = last['train_ncc_error'][last['layer'] > 0]
        depths = [f'{effective_depth(errors, eps):g} (ε = {eps:g})' for eps in (0.01, 0.05)]
        title = f'training accuracy {1 - table["train_error"][-1]:.4f}\neffective depth '
        title += ', '.join(depths).replace('inf', '∞')
        panel.set_title(f'{panel.get_title()}\n{title}')
    return finish(figure, panels)


# ------------------------------------------------------------------------------------------------
# Panels: curves, axes and legends
# ------------------------------------------------------------------------------------------------


def own_bounds():
    """The bounds that a user added to BOUNDS."""
    return [column for column in BOUNDS if column.endswith('_bound') and column not in CURVES]


def style(column):
    """How matplotlib draws a column; a user's own bounds have colors of their own."""
    if column in CURVES:
        color, linestyle, width, label = CURVES[column]
    else:
        hue = 0.21 + 0.618034 * own_bounds().index(column)  # steps of the golden ratio differ
        color, linestyle = colorsys.hsv_to_rgb(hue % 1, 0.95, 0.75), (0, (7, 1.5, 1, 1.5))
        width, label = 1.5, None
    if label is None:
        words = getattr(BOUNDS.get(column), '__doc__', None) or ''
        name, colon, _ = words.partition('\n')[0].partition(':')
        label = name.strip() if colon else column
    return {'color': color, 'linestyle': linestyle, 'linewidth': width, 'label': label}


def grid(caption, titles, ylabels, height):
    """A figure as wide as a page: below each title a panel for each ylabel.

    Args:
        titles: of which only the first are shown if there would be more than MOST_PANELS.
        height: of a panel, in inches.
    Returns:
        (figure, array of panels (ylabels, titles)); panels of a ylabel share their y axis.
    """
    import matplotlib.figure  # the object interface only: no display and no global state

    shown = titles[: MOST_PANELS // len(ylabels)]
    if len(shown) < len(titles):
        caption += f'; the first {len(shown)} of {len(titles)}'
    columns = 2 if len(shown) == 4 else 3
    columns = min(columns, len(shown)) or 1
    rows = -(-len(shown) // columns) * len(ylabels)
    figure = matplotlib.figure.Figure(figsize=(PAGE, height * rows), layout='constrained')
    figure.suptitle(caption)
    # Row by row of titles; within such a row there is a row of panels for each ylabel.
    panels = np.empty((len(ylabels), len(shown)), dtype=object)
    for number, title in enumerate(shown):
        row, column = divmod(number, columns)
        for kind, ylabel in enumerate(ylabels):
            place = (row * len(ylabels) + kind) * columns + column + 1
            panel = figure.add_subplot(rows, columns, place, sharey=panels[kind, 0])
            panel.tick_params(labelleft=column == 0)
            if column == 0:
                panel.set_ylabel(ylabel)
            panels[kind, number] = panel
        panels[0, number].set_title('\n'.join(textwrap.wrap(title, 100 // columns)))
    return figure, panels


def plot(panel, x, table, columns, low=None, high=None):
    """Draws columns of a table against x for a log axis; a line joins cells that are not empty.

    Cells of 0 or infinity are marked at the edge of the panel.

    Args:
        low, high: tables, too; the area between them is shaded.
    Returns:
        the lines.
    """
    lines = []
    for column in columns:
        look, values = style(column), table.get(column, np.full(len(x), np.nan))
        mark(panel, x[values <= LEAST], 'zero', look['color'])
        mark(panel, x[values >= LARGEST], 'infinite', look['color'])
        logged = ~np.isnan(values)
        shown = np.where((values > LEAST) & (values < LARGEST), values, np.nan)[logged]
        gaps = np.isnan(shown)
        if gaps.all():
            continue
        if len(shown) <= FEW_POINTS or gaps.any():  # no line shows a point between two gaps
            look |= {'marker': 'o', 'markersize': 3.5}
        lines += panel.plot(x[logged], shown, **look)
        if low and (low[column] < high[column]).any():
            area = MARKS['range'] | {'color': look['color'], 'alpha': 0.15, 'linewidth': 0}
            panel.fill_between(x[logged], low[column][logged], high[column][logged], **area)
    return lines


def mark(panel, x, name, color):
    """Triangles at the edge of a panel for values that no log axis has, a row for each curve."""
    if len(x) == 0:
        return
    look = MARKS[name] | {'color': color, 'markersize': 4}
    height = 0.02 + 0.04 * sum(line.get_label() == look['label'] for line in panel.lines)
    if name == 'infinite':
        height = 1 - height
    panel.plot(x, np.full(len(x), height), transform=panel.get_xaxis_transform(), **look)


def labelled(panels):
    """The curves of panels, without auxiliary lines."""
    lines = [line for panel in panels for line in panel.lines]
    return [line for line in lines if not line.get_label().startswith('_')]


def power_axis(panel):
    """A log axis with up to 10 powers of 2 as ticks, 2^0 among them if it is there."""
    import matplotlib.ticker

    panel.set_yscale('log', base=2)
    low, high = np.log2(panel.get_ylim())
    # Multiples of a round number, so that 0 is among the powers; the outer ones only if they are
    # needed for a second tick, since a tick widens the axis.
    locator = matplotlib.ticker.MaxNLocator(9, integer=True, steps=[1, 2, 5, 10])
    powers = locator.tick_values(math.floor(low), math.ceil(high))
    inside = powers[(powers >= low) & (powers <= high)]
    if len(inside) > 1:
        powers = inside
    panel.set_yticks(2.0**powers, labels=[f'$2^{{{power:.0f}}}$' for power in powers])
    panel.set_yticks([], minor=True)
    for sharing in panel.get_shared_y_axes().get_siblings(panel):
        sharing.tick_params(axis='y', labelsize=13)  # an exponent has 0.7 times this size


def error_axis(panel):
    """A log axis from the least error to at least 1, with decimal ticks."""
    import matplotlib.ticker

    panel.set_yscale('log')
    low, high = panel.get_ylim()
    panel.set_ylim(low, max(1.1, high))
    digits = (1, 2, 5) if low > 5e-4 else (1,)
    panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=digits))
    panel.yaxis.set_major_formatter('{x:g}')
    panel.set_yticks([], minor=True)


def ratio_axis(panel):
    """A linear axis that has at least 0.9 to 1.1, so that a change of 1 % looks small."""
    low, high = panel.get_ylim()
    panel.set_ylim(min(0.89, low), max(1.11, high))


def epoch_axis(panel, table, settings):
    """Makes x the epochs trained over all rounds, with a line at each pruning.

    Returns:
        the rows' places on the axis.
    """
    rounds = table['round']
    rewound = np.where(rounds > 0, max(settings.rewind_epoch, 0), 0)
    x = np.maximum(table['epoch'] - rewound, 0)
    for number in range(1, int(rounds.max()) + 1):
        end = x[rounds < number].max()
        panel.axvline(end, zorder=0, **MARKS['pruning'])
        x[rounds == number] += end
    panel.set_xlabel('epoch')
    panel.xaxis.get_major_locator().set_params(integer=True)
    return x


def place_ticks(panel, places, text, room):
    """Ticks of the x axis at increasing places, on a log axis if they span a factor of 4 or more.

    A text that would touch the one before it is omitted; `room` is the letters that the axis has.
    """
    at = places  # where they are seen on the axis
    if places[0] > 0 and places[-1] >= 4 * places[0]:
        panel.set_xscale('log', base=2)
        at = np.log2(places)
    texts, last = [text(place) for place in places.tolist()], -math.inf
    for index, letter in enumerate(room * (at - at[0]) / (np.ptp(at) or 1)):
        if letter - last > len(texts[index]):
            last = letter
        else:
            texts[index] = ''
    panel.set_xticks([], minor=True)
    panel.set_xticks(places, labels=texts)


def finish(figure, panels):
    """Adds the legend below the panels, in up to four columns; the figure grows by its height."""
    import matplotlib.lines

    # Each curve once, however many panels it is in; then the marks that are there.
    handles = {line.get_label(): line for line in labelled(panels.flat)}
    present = {artist.get_label() for panel in panels.flat for artist in panel.get_children()}
    for look in MARKS.values():
        if look['label'] in present:
            label = look['label'][1:]
            handles[label] = matplotlib.lines.Line2D([], [], **look | {'label': label})
    columns = int(PAGE / (0.6 + 0.068 * max(map(len, handles))))
    columns = max(1, min(4, columns))
    look = {'columnspacing': 1.2, 'handlelength': 2.4, 'ncols': columns}
    figure.legend(handles=list(handles.values()), loc='outside lower center', **look)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(handles) // columns))
    return figure
