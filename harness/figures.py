"""Every picture, from the files of a results folder alone: `draw`."""

import colorsys
import contextlib
import csv
import errno
import io
import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np

from conf import NOT_SWEPT, RULES, BadInput
from evaluation import finished
from harness.records import folder_settings, locked, read_layers, read_metrics, rows_of, write_file
from measures.representations import effective_depth
from utils import BOUNDS

# Column: colour, line style, width, label. A bound is named by the words of its docstring before the first colon.
CURVES = {
    'our_bound': ('#0072B2', '-', 2.2, None),
    'golowich_bound': ('#E69F00', '-', 1.5, None),
    'ledent_bound': ('#009E73', '-', 1.5, None),
    'graf_bound': ('#D55E00', '-', 1.5, None),
    'sedghi_bound': ('#CC79A7', '-', 1.5, None),
    'corrected_bound': ('#332288', '-', 1.5, None),
    'path_bound': ('#999933', '-', 1.5, None),
    'graf_params_bound': ('#A6611A', '--', 1.5, None),
    'bartlett_bound': ('#CCBB44', '--', 1.5, None),
    'neyshabur_bound': ('#AA4499', '--', 1.5, None),
    'certified_error': ('#6A5ACD', '--', 1.5, None),
    'pac_bayes_error': ('#BB0022', '-', 2.2, 'PAC-Bayes certificate'),
    'pac_bayes_rounded_error': ('#DD5566', '-', 0.9, 'PAC-Bayes, rounded weights'),
    'pac_bayes_gibbs_error': ('#EE99AA', '-', 0.9, 'PAC-Bayes, noisy classifier'),
    'test_set_bound': ('#117733', '-.', 0.9, 'Certified by the test set'),
    'train_error': ('#000000', '-', 1.5, 'Train error'),
    'test_error': ('#33BBEE', '--', 1.5, 'Test error'),
    'absolute_gap': ('#888888', ':', 1.2, 'Generalization gap (absolute)'),
}
RARE = ('graf_params_bound', 'bartlett_bound', 'neyshabur_bound')  # drawn only where every bound is asked for
LARGE = *RARE, 'golowich_bound', 'ledent_bound', 'graf_bound', 'sedghi_bound'  # ... so against density
LARGE += 'certified_error', 'absolute_gap'
SEEDS = ('seed', 'data_seed')
LOOK = {'axes.grid': True, 'grid.alpha': 0.3, 'legend.frameon': False, 'pdf.fonttype': 42}  # TrueType: text stays text
GROUPS = (('-', 'o'), ('--', 's'), (':', '^'))  # line style and marker of the networks that share a panel


def draw(folder, every=False):
    """Draws what the files of a results folder allow, each picture as PNG and PDF, and writes summary.csv beside a sweep.

    Args:
        every: draw all bounds, not only those that a picture has by default.
    Returns:
        The paths written; none where nothing is logged yet.
    Raises:
        ImportError: matplotlib is not installed.
        BadInput: a damaged table, or a folder that cannot be written.
    """
    import matplotlib  # in functions, since training works without it

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # the lock may be another user's, and the pictures can be replaced all the same
            stack.enter_context(locked(Path(folder, '.figure.lock')))  # whoever draws last has read last
        stack.enter_context(matplotlib.rc_context(LOOK))
        networks = folder_settings(folder)[1]
        runs = read_runs(folder, networks)
        pictures = {
            'figure': epochs_picture(runs, () if every else RARE),
            'sweep': sweep_picture(runs, () if every else RARE),
            'density': density_picture(runs, () if every else LARGE),
            'layers': layers_picture(runs, folder),
            'compress': compress_picture(networks, folder, () if every else RARE),
        }
        files = {}
        for name, picture in pictures.items():
            for suffix, options in (('png', {'dpi': 130}), ('pdf', {'metadata': {'CreationDate': None}})) if picture else ():
                buffer = io.BytesIO()
                picture.savefig(buffer, format=suffix, **options)
                files[Path(folder, f'{name}.{suffix}')] = buffer.getbuffer()
        if pictures['sweep'] or pictures['density']:
            files[Path(folder, 'summary.csv')] = summary(runs)
        try:
            for path, content in files.items():
                write_file(path, content)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise BadInput(f'{path}: cannot be written ({error.strerror}); copy {folder} elsewhere and plot it there') from None
    return list(files)


def read_runs(folder, networks):
    """(settings, table) of each network that has metrics; the cells that metrics.csv lacks are those of evaluation.csv."""
    runs = []
    for settings in networks:
        paths = [Path(folder, settings.name, name) for name in ('evaluation.csv', 'metrics.csv')]
        if paths[1].exists() and len((table := merged([read_metrics(path) for path in paths if path.exists()]))['epoch']):
            runs.append((settings, table | {'absolute_gap': np.abs(table['generalization_gap'])}))
    return runs


def merged(tables):
    """One table with a row per round and epoch; where several tables have a cell, the last one's stands."""
    keys = [list(zip(table['round'], table['epoch'])) for table in tables]
    places = {key: place for place, key in enumerate(sorted(set().union(*keys)))}
    filled = {column: np.full(len(places), np.nan) for table in tables for column in table}
    for table, rows in zip(tables, keys):
        at = [places[key] for key in rows]
        for column, values in table.items():
            filled[column][at] = np.where(np.isnan(values), filled[column][at], values)
    return filled


def last_rows(table):
    """The last row of each round; a round that has pruned and not trained yet has none."""
    ends = {row['round']: row for row in rows_of(table)}.values()
    return [row for row in ends if row['epoch'] > 0 or row['round'] == 0]


def spread(rows, axis):
    """Tables of the mean, least and largest cells of the rows that share a value in the column `axis`, empty ones aside."""
    places = sorted({row[axis] for row in rows})
    columns = {column for row in rows for column in row}

    def table(function):
        def cell(column, place):
            values = [row[column] for row in rows if row[axis] == place and not np.isnan(row.get(column, np.nan))]
            return function(values) if values else np.nan

        return {column: np.array([cell(column, place) for place in places]) for column in columns}

    return table(np.mean), table(min), table(max)


def sample_size(errors):
    """The least n of which all errors are shares k / n: with many errors nearly always the sample's size, else a divisor."""
    return math.lcm(*(Fraction(error).limit_denominator(10**5).denominator for error in errors if not np.isnan(error)))


def varied(runs):
    """The knobs in which the networks differ, seeds aside."""
    values = {knob: {getattr(settings, knob) for settings, _ in runs} for knob in RULES if knob not in (*NOT_SWEPT, *SEEDS)}
    return [knob for knob in values if len(values[knob]) > 1]


def grouped(runs, knobs):
    """{'depth 3, width 8': the runs with these values} of the knobs."""
    groups = {}
    for settings, table in runs:
        groups.setdefault(', '.join(f'{knob} {getattr(settings, knob)}' for knob in knobs), []).append((settings, table))
    return groups


def summary(runs):
    """summary.csv: the last row of each network and round, after the knobs in which the networks differ."""
    rows, knobs = [], [*varied(runs), *SEEDS]
    for settings, table in runs:
        about = {knob + '_setting' * (knob in table): getattr(settings, knob) for knob in knobs}
        rows += [{'name': settings.name} | about | row for row in last_rows(table)]
    columns = [column for column in dict.fromkeys(column for row in rows for column in row) if column != 'absolute_gap']
    cells = [['' if (cell := row.get(column, np.nan)) != cell else cell for column in columns] for row in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([columns, *cells])
    return text.getvalue().encode()


def new_figure(rows, columns):
    import matplotlib.figure  # the object interface alone: no display and no global state

    return matplotlib.figure.Figure(figsize=(4.2 * columns + 2.6, 3.6 * rows), layout='constrained')


def grid(count, below=0):
    """A figure, so many panels that share their y axis, a row up to three and a square beyond, and panels in a row below."""
    columns = count if count <= 3 else math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    figure = new_figure(rows + bool(below), max(columns, below))
    parts = figure.subfigures(2, 1, height_ratios=(rows, 1)) if below else [figure]
    panels = parts[0].subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count], *(part.subplots(1, below) for part in parts[1:])


def curves(left_out):
    """{column: line style, as matplotlib takes it} of what is drawn: a user's own bounds, those of CURVES, and errors."""
    words = {column: (bound.__doc__ or '').partition('\n')[0].partition(':') for column, bound in BOUNDS.items()}
    labels = {column: label.strip() if colon else column for column, (label, colon, _) in words.items()}
    own = [column for column in BOUNDS if column.endswith('_bound') and column not in CURVES]
    hues = [(0.21 + 0.618034 * index) % 1 for index in range(len(own))]  # steps of the golden ratio: no two are close
    own = {column: (colorsys.hsv_to_rgb(hue, 0.95, 0.75), (0, (7, 1.5, 1, 1.5)), 1.5, None) for column, hue in zip(own, hues)}
    return {
        column: {'color': color, 'linestyle': linestyle, 'linewidth': width, 'label': label or labels[column]}
        for column, (color, linestyle, width, label) in (own | CURVES).items()
        if column not in left_out and (label or column in labels)
    }


def plot(panel, x, table, styles, low=None, high=None, **shared):
    """Draws columns of a table against x and returns the lines, which join cells that are not empty, and break at 0 and inf."""
    lines = []
    for column, style in styles.items():
        values = table.get(column, np.full(len(x), np.nan))
        logged = ~np.isnan(values)
        shown = np.where((values > 0) & np.isfinite(values), values, np.nan)[logged]  # 0 and inf have no place on a log axis
        if not np.isnan(shown).all():
            marker = '.' if logged.sum() < max(3, len(x)) else None
            lines += panel.plot(x[logged], shown, **({'marker': marker, 'markersize': 4} | style | shared))
            if low is not None and (low[column] < high[column]).any():
                edges = low[column][logged], high[column][logged]
                panel.fill_between(x[logged], *edges, color=style['color'], alpha=0.15, linewidth=0)
    return lines


def labelled(panels):
    """The curves of all panels, without the helping lines."""
    return [line for panel in panels for line in panel.get_lines() if not line.get_label().startswith('_')]


def power_ticks(panels, axis='y', text='$2^{{{}}}$'.format):
    """Makes an axis log2 about the curves of all panels, with at most 12 ticks, one at 2^0 however long it is."""
    values = np.concatenate([[], *(getattr(line, f'get_{axis}data')() for line in labelled(panels))])
    values = values[np.isfinite(values) & (values > 0)]
    low, high = np.log2([values.min(), values.max()]) if len(values) else (0, 0)
    margin = 0.04 * (high - low) if high - low > 2 else 0.5
    low, high = max(low - margin, -1022), min(high + margin, 1023)
    step = next(step for step in itertools.chain((1, 2), itertools.count(5, 5)) if high - low <= 11 * step)
    powers = range(step * math.ceil(low / step), math.floor(high) + 1, step)
    for panel in panels:
        getattr(panel, f'set_{axis}lim')(2.0**low, 2.0**high)
        getattr(panel, f'set_{axis}scale')('log', base=2)
        getattr(panel, f'set_{axis}ticks')([], minor=True)
        getattr(panel, f'set_{axis}ticks')([2.0**power for power in powers], labels=[text(power) for power in powers])


def finish(figure, panels, keys=()):
    """Ticks of an array of panels, each row sharing its y axis, and their legend: curves, sorted as they end, and keys."""
    for row in np.atleast_2d(panels):
        power_ticks(row)
    handles = {line.get_label(): line for line in reversed(labelled(panels.ravel()))}.values()
    handles = sorted(handles, key=lambda line: -np.nan_to_num(line.get_ydata()[-1]))
    figure.legend(handles=[*handles, *keys], loc='outside right center')
    figure.supylabel('value', fontsize='medium')
    return figure


def epoch_axis(panel, table, settings):
    """Makes x the epochs trained, running on over rounds, with a thin line at each pruning. Returns the places of the rows."""
    rewound, rounds = max(settings.rewind_epoch, 0), table['round']
    each = settings.epochs - rewound
    for number in range(int(rounds.max())):
        panel.axvline(settings.epochs + number * each, color='0.6', linewidth=0.6, zorder=0)
    panel.set_xlabel('epoch')
    panel.xaxis.get_major_locator().set_params(integer=True)
    later = settings.epochs + (rounds - 1) * each + np.maximum(table['epoch'] - rewound, 0)
    return np.where(rounds == 0, table['epoch'], later)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures: each a figure of matplotlib, or None where the folder has nothing for it
# ----------------------------------------------------------------------------------------------------------------------


def epochs_picture(runs, left_out):
    """A panel per network after the paper's Figure 1: bounds and errors against epochs."""
    if not runs:
        return None
    figure, panels = grid(len(runs))
    for panel, (settings, table) in zip(panels, runs):
        panel.set_title(settings.name)
        plot(panel, epoch_axis(panel, table, settings), table, curves(left_out))
    return finish(figure, panels)


def sweep_picture(runs, left_out):
    """Finished networks, a panel per swept knob and value of what else varies: last rows, mean and range over seeds."""
    runs = [run for run in runs if finished(run[0], rows_of(run[1])[-3:])]
    knobs = [] if any(table['round'].any() for _, table in runs) else varied(runs)
    swept = [knob for knob in knobs if type(getattr(runs[0][0], knob)) in (int, float)] or knobs[:1]
    drawn = [(knob, *group) for knob in swept for group in grouped(runs, [other for other in knobs if other != knob]).items()]
    if not drawn:
        return None
    figure, panels = grid(len(drawn))
    for panel, (knob, words, members) in zip(panels, drawn):
        at = places(members, knob)
        rows = [last_rows(table)[-1] | {'place': at[getattr(settings, knob)]} for settings, table in members]
        mean, *limits = spread(rows, 'place')
        plot(panel, mean['place'], mean, curves(left_out), *limits, marker='o', markersize=3.5)
        if knob in ('width', 'train_samples', 'density', 'lr') and min(at.values()) > 0:
            panel.set_xscale('log', base=2)
        panel.set_xticks([], minor=True)
        panel.set_xticks(list(at.values()), labels=[str(value) for value in at])
        panel.set(xlabel=knob, title=words)
        if knob == 'density':
            panel.invert_xaxis()
    return finish(figure, panels)


def places(runs, knob):
    """{value: its place on the axis} of a knob: a number's own, 0 training samples stand for all of them, text is counted."""
    values = dict.fromkeys(getattr(settings, knob) for settings, _ in runs)
    if not all(type(value) in (int, float) for value in values):
        return {value: place for place, value in enumerate(values)}
    shares = ('train_error', 'train_margin_error')
    everything = [table[share] for settings, table in runs if settings.train_samples == 0 for share in shares]
    return {v: sample_size(np.concatenate(everything)) if (knob, v) == ('train_samples', 0) else v for v in values}


def density_picture(runs, left_out):
    """The last row of each pruning round against the share that is left of what is pruned, mean and range over seeds."""
    runs = [(settings, table) for settings, table in runs if table['round'].any()]
    groups = {words: [row for run in group for row in rows_left(*run)] for words, group in grouped(runs, varied(runs)).items()}
    label, percent = 'share of weights left in the layers that are pruned', lambda power: f'{100 * 2.0**power:.3g} %'
    return narrowing_picture(groups, 'left', left_out, label, percent) if groups else None


def rows_left(settings, table):
    """Last rows of finished rounds, with the share `left` of what is pruned; `density` counts a dense classifier too."""
    kept = settings.density * (1 - settings.prune_fraction) ** table['round']
    left = {'left': kept if settings.prune_layers == 'conv' else table['density']}
    rows = last_rows(table | left | {'deviation': deviation(settings, table)})
    return [row for row in rows if row['epoch'] == settings.epochs]


def deviation(settings, row):
    """Standard deviation sqrt(e (1 - e) / n) of a test error e; test_set_bound b tells n, as kl(e|b) = log(1 / delta) / n."""
    e, b = (np.clip(row.get(column, np.nan), 1e-9, 1 - 1e-9) for column in ('test_error', 'test_set_bound'))
    kl = e * np.log(e / b) + (1 - e) * np.log((1 - e) / (1 - b))
    return np.sqrt(e * (1 - e) * kl / -np.log(settings.delta))


def compress_picture(networks, folder, left_out):
    """What compress.py left of each network against its number of weights."""
    groups = {}
    for settings in networks:
        if (path := Path(folder, settings.name, 'compress.csv')).exists():
            try:
                table = np.genfromtxt(path, delimiter=',', names=True, ndmin=1)  # cells of text are nan
                rows = [dict(zip(table.dtype.names, row)) for row in table]
                rows = [row | {'deviation': deviation(settings, row)} for row in rows]
                groups[settings.name] = [row for row in rows if row['weights'] > 0 and row['test_error'] >= 0]
            except (LookupError, TypeError, ValueError):
                raise BadInput(f'{path}: not a table of compress.py; move it away and compress again') from None
    return narrowing_picture(groups, 'weights', left_out, 'number of weights') if groups else None


def narrowing_picture(groups, axis, left_out, label, text='$2^{{{}}}$'.format):
    """Errors and certificates, beside them bounds, against what is left of networks, {words: rows}; thin lines: whole ones."""
    import matplotlib.lines

    bounds = [column for column in BOUNDS if column.endswith('_bound')]
    alone, styles, keys = len(groups) > len(GROUPS), curves(left_out), []
    figure = new_figure(height := len(groups) if alone else 1, 2)
    panels = figure.subplots(height, 2, sharex=True, sharey='col', squeeze=False)
    for index, (words, rows) in enumerate(groups.items()):
        pair, (linestyle, marker) = (panels[index], GROUPS[0]) if alone else (panels[0], GROUPS[index])
        look = {'linestyle': linestyle, 'marker': marker, 'markersize': 4}
        keys.append(matplotlib.lines.Line2D([], [], color='black', label=words, **look))
        mean, low, high = spread(rows, axis)
        for panel, kind in zip(pair, ('errors and certificates', 'bounds')):
            shown = {column: style for column, style in styles.items() if (column in bounds) == (panel is pair[1])}
            for line in plot(panel, mean[axis], mean, shown, low, high, **look):
                panel.axhline(line.get_ydata()[-1], color=line.get_color(), linewidth=0.6, alpha=0.6, zorder=0)
            panel.set(xlabel=label, title=f'{words}: {kind}' if alone else kind)
        bars = {'yerr': mean['deviation'], 'ecolor': styles['test_error']['color']}
        pair[0].errorbar(mean[axis], mean['test_error'], fmt='none', elinewidth=0.8, capsize=2, **bars)
    power_ticks(panels.ravel(), 'x', text)
    panels[0, 0].invert_xaxis()
    return finish(figure, panels.T, keys if 1 < len(groups) and not alone else ())


def layers_picture(runs, folder):
    """Nearest-class-center accuracy of each layer against epochs, and at the last evaluation, with CDNV, against depth."""
    import matplotlib

    learned = [(*run, read_layers(path)) for run in runs if (path := Path(folder, run[0].name, 'layers.csv')).exists()]
    learned = [entry for entry in learned if not np.isnan(entry[2]['train_ncc_error']).all()]
    if not learned:
        return None
    layer_color, network_color = (matplotlib.colormaps[name] for name in ('viridis_r', 'plasma'))
    figure, panels, (accuracy, variability) = grid(len(learned), below=2)
    deepest = max(layers['layer'].max() for _, _, layers in learned)
    for index, (panel, (settings, table, layers)) in enumerate(zip(panels, learned)):
        errors, place = layers['train_ncc_error'], epoch_axis(panel, layers, settings)
        for number in np.unique(layers['layer'][~np.isnan(errors)]):
            at, label = layers['layer'] == number, f'layer {number:.0f}' if number else 'input'
            panel.plot(place[at], 1 - errors[at], color=layer_color(number / deepest) if number else '0.6', label=label)
        panel.plot(epoch_axis(panel, table, settings), 1 - table['train_error'], 'k--', linewidth=1, label='training accuracy')

        last = (layers['round'] == layers['round'][-1]) & (layers['epoch'] == layers['epoch'][-1]) & ~np.isnan(errors)
        now = (table['round'] == layers['round'][-1]) & (table['epoch'] == layers['epoch'][-1])
        depths = [effective_depth(errors[last & (layers['layer'] > 0)], eps) for eps in (0.01, 0.05)]
        words = 'training accuracy {:.4f}; effective depth {:g} (ε = 0.01), {:g} (ε = 0.05)'
        words = words.format([*(1 - table['train_error'][now]), math.nan][0], *depths)
        panel.set_title(settings.name, pad=18)
        panel.text(0.5, 1.03, words, transform=panel.transAxes, horizontalalignment='center', fontsize='small')
        for sample, linestyle in (('train', '-'), ('test', '--')):
            style = {'color': network_color(0.9 * index / len(learned)), 'linestyle': linestyle, 'marker': '.'}
            accuracy.plot(layers['layer'][last], 1 - layers[f'{sample}_ncc_error'][last], label=settings.name, **style)
            variability.plot(layers['layer'][last], layers[f'{sample}_cdnv'][last], label=settings.name, **style)
    power_ticks([variability])
    for panel, name in ((accuracy, 'nearest-class-center accuracy'), (variability, 'CDNV')):
        panel.set(xlabel='layer', ylabel=name, title='training (solid) and test set (dashed)')
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(accuracy.get_ylabel())
    longest = max((labelled([panel]) for panel in panels), key=len)
    for panel, handles in ((panels[0], longest[::-1]), (accuracy, labelled([accuracy])[::2])):
        panel.get_figure().legend(handles=handles, loc='outside right center')
    return figure
