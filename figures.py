"""Every picture, from the files of a results folder alone: `draw`."""

import contextlib
import errno
import io
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from conf import BadInput, load_launch
from evaluation import is_finished, last_epoch
from measures.representations import effective_depth
from panels import (
    CURVES,
    DEVIATION,
    LEFT_END,
    LOOK,
    MARKS,
    MOST,
    curves,
    epoch_axis,
    error_ticks,
    finish,
    grid,
    labelled,
    legend,
    new_figure,
    own_bounds,
    place_ticks,
    plot,
    power_ticks,
    rows_and_columns,
)
from records import read_layers, rows_of, write_file
from summary import grouped, last_rows, read_runs, spread, summary, varied
from utils import BOUNDS

ERRORS = ('train_error', 'test_error')
PAPER = (
    'ledent_bound',
    'graf_bound',
    'golowich_bound',
    'sedghi_bound',
    'our_bound',
)  # in its Figure 1
CERTIFICATES = (
    'certified_error',
    'pac_bayes_error',
    'pac_bayes_rounded_error',
    'pac_bayes_gibbs_error',
)
CERTIFIED = (*CERTIFICATES, 'test_set_bound', *ERRORS)
EXCESS, ERROR = (
    'excess over the margin error',
    'error',
)  # what is on an axis of bounds, and of errors


def draw(folder):
    """Draws what the files of a results folder allow, as PNG and PDF, and writes summary.csv beside a sweep.

    Returns:
        The paths written; none where nothing is logged yet.
    Raises:
        ImportError: matplotlib is not installed.
        BadInput: a damaged table, or a folder that cannot be written.
    """
    import matplotlib  # in functions, since training works without it

    with contextlib.ExitStack() as stack:
        stack.enter_context(matplotlib.rc_context(LOOK))
        networks = load_launch(folder)[1]
        runs = read_runs(folder, networks)
        pictures = {
            'figure': figure_picture(runs),
            'certified': certified_picture(runs),
            'bounds': bounds_picture(runs),
            'sweep': sweep_picture(runs),
            'density': density_picture(runs),
            'layers': layers_picture(runs, folder),
            'compress': compress_picture(networks, folder),
        }
        files = {}
        for name, picture in pictures.items():
            if not picture:
                continue
            picture.draw_without_rendering()
            picture.set_layout_engine('none')  # laid out once for both formats
            for suffix, options in (
                ('png', {'dpi': 192}),
                ('pdf', {'metadata': {'CreationDate': None}}),
            ):
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
            mend = f'copy {folder} elsewhere and plot it there'
            raise BadInput(f'{path}: cannot be written ({error.strerror}); {mend}') from None
    return list(files)


# ------------------------------------------------------------------------------------------------------------
# Pictures: each a figure of matplotlib, or None where the folder has nothing for it
# ------------------------------------------------------------------------------------------------------------


def epochs_picture(runs, columns, ylabel, ticks):
    """A panel per network: columns against epochs. None where no cell has a place."""
    if not runs:
        return None
    rows, _ = rows_and_columns(min(MOST, len(runs)))
    figure = new_figure(3.7 if rows == 1 else 2.7 * rows)
    panels = grid(figure, [settings.name for settings, _ in runs], [ylabel])
    for panel, (settings, table) in zip(panels[0], runs):
        plot(panel, epoch_axis(panel, table, settings), table, curves(columns))
    return finish(figure, panels, [ticks]) if labelled(panels[0]) else None


def figure_picture(runs):
    """The paper's Figure 1: its five bounds and a user's own, the errors and their gap."""
    columns = [*PAPER, *own_bounds(), *ERRORS, 'absolute_gap']
    return epochs_picture(runs, columns, f'bounds: {EXCESS}\nother curves: error, gap', power_ticks)


def certified_picture(runs):
    """What certifies: errors, and what is proven about them. None where every certificate is 1."""
    cells = [table[column] for _, table in runs for column in CERTIFICATES if column in table]
    if not any((values < 1).any() for values in cells):
        return None
    return epochs_picture(runs, CERTIFIED, ERROR, error_ticks)


def bounds_picture(runs):
    """Every bound."""
    columns = [
        name for name in [*CURVES, *own_bounds()] if name in BOUNDS and name.endswith('_bound')
    ]
    return epochs_picture(runs, columns, EXCESS, power_ticks)


def against(groups, bounds):
    """Errors and certificates, below them bounds, against what networks differ in: means, ranges over seeds.

    Args:
        groups: a list of namespaces, a pair of panels each: title, xlabel, ticks {place: text}, rows with a `place`,
            and `narrows`: whether x runs from right to left, with thin lines for the values at its left end.
        bounds: the columns of bounds.
    """
    if not groups:
        return None
    rows = [row for group in groups for row in group.rows]
    kinds = (
        [ERROR, EXCESS]
        if any(row.get(column, 0) > 0 for row in rows for column in bounds)
        else [ERROR]
    )
    down, across = rows_and_columns(min(MOST // len(kinds), len(groups)))
    figure = new_figure(2.4 * down * len(kinds))
    panels = grid(figure, [group.title for group in groups], kinds)
    for pair, group in zip(panels.T, groups):
        mean, *limits = spread([row | {'deviation': deviation(row)} for row in group.rows], 'place')
        for panel, columns in zip(pair, (CERTIFIED, bounds)):
            place_ticks(panel, group.ticks, 96 // across)
            lines = plot(panel, mean['place'], mean, curves(columns), *limits)
            for line in lines if group.narrows else ():
                look = MARKS[LEFT_END] | {'color': line.get_color(), 'label': f'_{LEFT_END}'}
                panel.axhline(line.get_ydata()[-1], zorder=0, **look)
            if group.narrows:
                panel.invert_xaxis()
        pair[-1].set_xlabel(group.xlabel)
        known = ~np.isnan(mean['deviation'])
        if known.any():
            look = {
                'fmt': 'none',
                'capsize': 2,
                'ecolor': CURVES['test_error'][0],
                'label': f'_{DEVIATION}',
            }
            pair[0].errorbar(
                *(mean[name][known] for name in ('place', 'test_error', 'deviation')), **look
            )
    return finish(figure, panels, (error_ticks, power_ticks))


def deviation(row):
    """The standard deviation of a test error; nan in tables without the number of test images."""
    error = row.get('test_error', math.nan)
    return math.sqrt(error * (1 - error) / row.get('test_size', math.nan))


def sweep_picture(runs):
    """Finished networks, a panel per swept knob and value of what else varies: their last rows."""
    runs = [run for run in runs if is_finished(run[0], rows_of(run[1])[-3:])]
    knobs = [] if any(table['round'].any() for _, table in runs) else varied(runs)
    swept = [knob for knob in knobs if type(getattr(runs[0][0], knob)) in (int, float)] or knobs[:1]
    groups = []
    for knob in swept:
        for words, members in grouped(runs, [other for other in knobs if other != knob]).items():
            at = places(members, knob)
            ends = [(getattr(settings, knob), last_rows(table)[-1]) for settings, table in members]
            rows = [row | {'place': at[value]} for value, row in ends]
            about = {'title': words, 'xlabel': knob, 'narrows': knob == 'density'}
            ticks = {place: str(value) for value, place in at.items()}
            groups.append(SimpleNamespace(rows=rows, ticks=ticks, **about))
    return against(groups, [*PAPER, 'corrected_bound', 'path_bound', *own_bounds()])


def places(runs, knob):
    """{value: its place on the axis}: a number is its own, 0 training samples are all, text is counted."""
    at = {getattr(settings, knob): getattr(settings, knob) for settings, _ in runs}
    if knob == 'train_samples' and 0 in at:
        at[0] = next(
            table['train_size'][-1] for settings, table in runs if settings.train_samples == 0
        )
    numbers = all(
        isinstance(place, (int, float)) and not math.isnan(place) for place in at.values()
    )
    return at if numbers else {value: number for number, value in enumerate(at)}


def density_picture(runs):
    """The last row of each finished pruning round against the share that is left of what is pruned."""
    runs, groups = [(settings, table) for settings, table in runs if table['round'].any()], []
    about = {'xlabel': 'weights left in the pruned layers (%)', 'narrows': True}
    for words, members in grouped(runs, varied(runs)).items():
        rows = []
        for settings, table in members:
            ends = last_rows(table | {'place': left(settings, table)})
            rows += [
                row
                for row in ends
                if row['epoch'] == last_epoch(settings, row['epoch'], row['train_loss'])
            ]
        ticks = {row['place']: f'{100 * row["place"]:.3g}' for row in rows}
        groups += [SimpleNamespace(title=words, rows=rows, ticks=ticks, **about)] * bool(rows)
    return against(groups, ['our_bound', 'corrected_bound', 'path_bound', *own_bounds()])


def left(settings, table):
    """The share of living weights in the pruned layers; in tables without the count, what was asked for."""
    asked_for = settings.density * (1 - settings.prune_fraction) ** table['round']
    counted = table['masked_density'] if settings.prune_layers == 'conv' else table['density']
    return np.where(np.isnan(counted), asked_for, counted)


def compress_picture(networks, folder):
    """What compress.py left of each network against its number of weights."""
    groups, about = [], {'xlabel': 'number of weights', 'narrows': True}
    for settings in networks:
        if not (path := Path(folder, settings.name, 'compress.csv')).exists():
            continue
        try:
            table = np.genfromtxt(path, delimiter=',', names=True, ndmin=1)  # cells of text are nan
            rows = [dict(zip(table.dtype.names, row)) for row in table]
            rows = [row for row in rows if row['weights'] > 0 and row['test_error'] >= 0]
            rows = [row | {'place': row['weights']} for row in rows]
        except (LookupError, TypeError, ValueError):
            raise BadInput(
                f'{path}: not a table of compress.py; move it away and compress again'
            ) from None
        ticks = {row['place']: f'{row["place"]:,.0f}' for row in rows}
        groups += [SimpleNamespace(title=settings.name, rows=rows, ticks=ticks, **about)] * bool(
            rows
        )
    return against(groups, [*PAPER, 'corrected_bound', 'path_bound', *own_bounds()])


def layers_picture(runs, folder):
    """Nearest-class-center accuracy of each layer against epochs; at the end, with CDNV and linear probes, against depth."""
    import matplotlib

    paths = [Path(folder, settings.name, 'layers.csv') for settings, _ in runs]
    learned = [(*run, read_layers(path)) for run, path in zip(runs, paths) if path.exists()]
    learned = [entry for entry in learned if not np.isnan(entry[2]['train_ncc_error']).all()][:MOST]
    if not learned:
        return None
    layer_color, network_color = (matplotlib.colormaps[name] for name in ('viridis_r', 'plasma'))
    heights = 2.7 * rows_and_columns(len(learned))[0] + 0.6, 3.4
    figure = new_figure(sum(heights))
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    (panels,) = grid(
        above, [settings.name for settings, _, _ in learned], ['nearest-class-center accuracy']
    )
    measured = any(not np.isnan(layers['train_probe_error']).all() for _, _, layers in learned)
    accuracy, variability, *probes = below.subplots(1, 2 + measured)
    deepest = max(layers['layer'].max() for _, _, layers in learned)
    for index, (panel, (settings, table, layers)) in enumerate(zip(panels, learned)):
        errors, place = layers['train_ncc_error'], epoch_axis(panel, layers, settings)
        for number in np.unique(layers['layer'][~np.isnan(errors)]):
            at, depth = layers['layer'] == number, number / deepest
            style = {'color': layer_color(depth), 'label': f'layer {number:.0f}'}
            style |= {'color': '0.6', 'label': 'input'} if number == 0 else {}
            style['linewidth'] = (
                2.8 - 1.6 * depth
            )  # of curves that coincide, the lower one is the wider
            panel.plot(place[at], 1 - errors[at], **style)
        x = epoch_axis(panel, table, settings)
        panel.plot(x, 1 - table['train_error'], 'k--', linewidth=1, label='training accuracy')

        end = layers['round'][-1], layers['epoch'][-1]
        last = (layers['round'] == end[0]) & (layers['epoch'] == end[1]) & ~np.isnan(errors)
        now = (table['round'] == end[0]) & (table['epoch'] == end[1])
        words = ''.join(
            f'\ntraining accuracy {1 - error:.4f}' for error in table['train_error'][now]
        )
        depths = [
            effective_depth(errors[last & (layers['layer'] > 0)], eps) for eps in (0.01, 0.05)
        ]
        words += '\neffective depth {:g} (ε = 0.01), {:g} (ε = 0.05)'.format(*depths).replace(
            'inf', '∞'
        )
        panel.set_title(panel.get_title() + words)
        share = index / len(learned)
        for sample, linestyle in (('train', '-'), ('test', '--')):
            style = {'color': network_color(0.9 * share), 'linewidth': 2.8 - 2 * share}
            style |= {'linestyle': linestyle, 'marker': '.', 'label': settings.name}
            accuracy.plot(layers['layer'][last], 1 - layers[f'{sample}_ncc_error'][last], **style)
            variability.plot(layers['layer'][last], layers[f'{sample}_cdnv'][last], **style)
            for panel in probes:
                panel.plot(
                    layers['layer'][last], 1 - layers[f'{sample}_probe_error'][last], **style
                )
    power_ticks([variability])
    names = 'nearest-class-center accuracy', 'CDNV', 'linear-probe accuracy'
    for panel, name in zip((accuracy, variability, *probes), names):
        title = 'training set (solid){}and test set (dashed)'.format('\n' if probes else ' ')
        panel.set(xlabel='layer', ylabel=name, title=title)
        panel.xaxis.get_major_locator().set_params(integer=True)
    longest = max((labelled([panel]) for panel in panels), key=len)
    legend(above, longest[::-1])
    legend(below, labelled([accuracy])[::2])
    return figure
