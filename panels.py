"""What pictures are made of: curves and their colours, panels as wide as a page, log axes, legends."""

import colorsys
import itertools
import math
import textwrap

import numpy as np

from utils import BOUNDS

# Column: colour, line style, width, label, in the order of every legend: the paper's Figure 1 from top to bottom,
# with what came after it. A bound is named by the words of its docstring before the first colon.
CURVES = {
    'ledent_bound': ('#009E73', '-', 1.5, None),
    'graf_bound': ('#D55E00', '-', 1.5, None),
    'golowich_bound': ('#E69F00', '-', 1.5, None),
    'sedghi_bound': ('#CC79A7', '-', 1.5, None),
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

# What a picture has besides curves, each explained in its legend; the artists' labels begin with '_'.
LEFT_END, DEVIATION = 'value at the left end', '± standard deviation'
ZERO, INFINITE = '0 (below the axis)', 'infinite (above the axis)'
MARKS = {
    'pruning': {'color': '0.6', 'linewidth': 0.8},
    LEFT_END: {'color': '0.4', 'linewidth': 0.6},
    'range over seeds': {'color': '0.8', 'linewidth': 6},
    DEVIATION: {'color': '0.4', 'linewidth': 0, 'marker': '|', 'markersize': 9},
    ZERO: {'color': '0.4', 'linewidth': 0, 'marker': 'v', 'markersize': 5},
    INFINITE: {'color': '0.4', 'linewidth': 0, 'marker': '^', 'markersize': 5},
}
PAGE = 850 / 96  # inches: a page shows 850 pixels, 96 an inch, so that 9 points are 9 points there
MOST = 24  # panels of a picture
LOOK = {
    'font.size': 9,
    'axes.titlesize': 9,
    'axes.grid': True,
    'grid.alpha': 0.3,
    'legend.frameon': False,
}
LOOK |= {'pdf.fonttype': 42}  # TrueType: text stays text


def own_bounds():
    """The bounds that a user added to BOUNDS."""
    return [column for column in BOUNDS if column.endswith('_bound') and column not in CURVES]


def curves(columns):
    """{column: how matplotlib is to draw it}; a user's own bounds have colours of their own."""
    table, styles = dict(CURVES), {}
    for index, column in enumerate(own_bounds()):
        hue = (0.21 + 0.618034 * index) % 1  # steps of the golden ratio: no two are close
        table[column] = (colorsys.hsv_to_rgb(hue, 0.95, 0.75), (0, (7, 1.5, 1, 1.5)), 1.5, None)
    for column in columns:
        color, linestyle, width, label = table[column]
        if label is None:
            words, colon, _ = (BOUNDS[column].__doc__ or '').partition('\n')[0].partition(':')
            label = words.strip() if colon else column
        styles[column] = {
            'color': color,
            'linestyle': linestyle,
            'linewidth': width,
            'label': label,
        }
    return styles


def new_figure(height):
    import matplotlib.figure  # the object interface alone: no display and no global state

    return matplotlib.figure.Figure(figsize=(PAGE, height), layout='constrained')


def rows_and_columns(count):
    """A row of up to three panels, two by two, or rows of three."""
    columns = 2 if count == 4 else min(3, count)
    return -(-count // columns), columns


def grid(figure, titles, ylabels):
    """At most MOST panels, for the first titles: for each title one below the other for each ylabel.

    Those of the same ylabel share their y axis. Returns them as an array (ylabels, titles).
    """
    kinds, shown = len(ylabels), titles[: MOST // len(ylabels)]
    rows, columns = rows_and_columns(len(shown))
    panels = figure.subplots(rows * kinds, columns, squeeze=False)
    panels = panels.reshape(rows, kinds, columns).swapaxes(0, 1).reshape(kinds, -1)
    for panel in panels[:, len(shown) :].ravel():
        panel.remove()
    panels = panels[:, : len(shown)]
    for row, ylabel in zip(panels, ylabels):
        for number, panel in enumerate(row):
            panel.sharey(row[0])
            panel.tick_params(labelleft=number % columns == 0)
            panel.set_ylabel(ylabel if number % columns == 0 else '')
    for panel, title in zip(panels[0], shown):
        panel.set_title('\n'.join(textwrap.wrap(title, 100 // columns)))
    if len(shown) < len(titles):
        figure.suptitle(f'the first {len(shown)} of {len(titles)}')
    return panels


def plot(panel, x, table, styles, low=None, high=None):
    """Draws columns of a table against x, joining cells that are not empty; marks where one is 0 or infinite.

    Returns the lines. With `low` and `high`, tables too, what lies between them is shaded. Points have markers where they
    are few, or alone between such marks.
    """
    lines = []
    for column, style in styles.items():
        values = table.get(column, np.full(len(x), np.nan))
        for value, name, edge, step in ((0, ZERO, 0.02, 0.04), (np.inf, INFINITE, 0.98, -0.04)):
            if len(at := x[values == value]):
                row = edge + step * sum(
                    line.get_label() == f'_{name}' for line in panel.get_lines()
                )
                look = MARKS[name] | {'color': style['color'], 'markersize': 4, 'label': f'_{name}'}
                panel.plot(at, np.full(len(at), row), transform=panel.get_xaxis_transform(), **look)
        logged = ~np.isnan(values)
        shown = np.where((values > 0) & np.isfinite(values), values, np.nan)[logged]
        if np.isnan(shown).all():
            continue
        marker = {'marker': 'o', 'markersize': 3.5}
        if low is None and len(shown) == len(x):  # else there are few points
            gaps = np.isnan([np.nan, *shown, np.nan])
            alone = np.flatnonzero(
                ~gaps[1:-1] & gaps[:-2] & gaps[2:]
            ).tolist()  # a line would not show these
            marker = {'marker': 'o', 'markersize': 5, 'markevery': alone} if alone else {}
        lines += panel.plot(x[logged], shown, **marker, **style)
        if low is not None and (low[column] < high[column]).any():
            look = {
                'color': style['color'],
                'alpha': 0.15,
                'linewidth': 0,
                'label': '_range over seeds',
            }
            panel.fill_between(x[logged], low[column][logged], high[column][logged], **look)
    return lines


def labelled(panels):
    """The curves of all panels, without the helping lines."""
    return [
        line
        for panel in panels
        for line in panel.get_lines()
        if not line.get_label().startswith('_')
    ]


def heights(panels):
    """The values of all curves and ranges that have a place on a log axis; 1 alone where there are none."""
    ranges = [
        area
        for panel in panels
        for area in panel.collections
        if area.get_label() == '_range over seeds'
    ]
    edges = [path.vertices[:, 1] for area in ranges for path in area.get_paths()]
    values = np.concatenate([[], *(line.get_ydata() for line in labelled(panels)), *edges])
    values = values[np.isfinite(values) & (values > 0)]
    return values if len(values) else np.ones(1)


def log_axis(panels, base, low, high, ticks):
    """Makes the y axis of these panels a log axis with these ticks, {place: text}."""
    for panel in panels:
        panel.set_ylim(low, high)
        panel.set_yscale('log', base=base)
        panel.set_yticks([], minor=True)
        panel.set_yticks(list(ticks), labels=list(ticks.values()))


def power_ticks(panels):
    """A log axis about the curves of all panels; its ticks are 2 to 9 powers of 2, 2^0 if it is there."""
    values = np.log2(heights(panels))
    low, high = values.min(), values.max()
    if high - low <= 2:
        low, high = math.floor(low), math.ceil(high)
    margin = max(0.04 * (high - low), 0.1)
    low, high = max(low - margin, -1022), min(high + margin, 1023)
    step = next(
        step for step in itertools.chain((1, 2), itertools.count(5, 5)) if high - low <= 8 * step
    )
    powers = range(step * math.ceil(low / step), math.floor(high) + 1, step)
    log_axis(panels, 2, 2.0**low, 2.0**high, {2.0**power: f'$2^{{{power}}}$' for power in powers})
    for panel in panels:
        panel.tick_params(axis='y', labelsize=13)  # an exponent has 0.7 times this size


def error_ticks(panels):
    """A log axis from the least error up to 1, with decimal ticks."""
    values = heights(panels)
    low, high = values.min() / 1.3, max(1.0, values.max()) * 1.1
    digits = (1, 2, 5) if high / low < 2000 else (1,)
    ticks = [
        digit * 10.0**power for power in range(math.floor(math.log10(low)), 1) for digit in digits
    ]
    log_axis(panels, 10, low, high, {tick: f'{tick:g}' for tick in ticks if low <= tick <= high})


def finish(figure, panels, ticks):
    """Makes the y axes of an array of panels, by a function for each row, and the legend."""
    import matplotlib.lines

    for row, make in zip(panels, ticks):
        make(row)
    panels = panels.ravel()
    order = [style['label'] for style in curves([*CURVES, *own_bounds()]).values()]
    handles = {line.get_label(): line for line in labelled(panels)}
    handles = sorted(handles.values(), key=lambda line: order.index(line.get_label()))
    artists = [[*panel.lines, *panel.collections, *panel.containers] for panel in panels]
    seen = {artist.get_label() for artist in itertools.chain(*artists)}
    marks = {name: look for name, look in MARKS.items() if f'_{name}' in seen}
    handles += [matplotlib.lines.Line2D([], [], label=name, **look) for name, look in marks.items()]
    figure.set_figheight(figure.get_figheight() + legend(figure, handles))
    return figure


def legend(figure, handles):
    """A legend below the panels, column by column, in up to four columns. Returns its height in inches."""
    labels = [handle.get_label() for handle in handles]

    def width(columns):
        return sum(0.55 + 0.07 * max(map(len, part)) for part in np.array_split(labels, columns))

    columns = max(n for n in (1, 2, 3, 4) if n == 1 or (n <= len(handles) and width(n) < PAGE))
    look = {'columnspacing': 1.2, 'handlelength': 2.4}
    figure.legend(handles=handles, loc='outside lower center', ncols=columns, **look)
    return 0.2 * -(-len(handles) // columns)


def epoch_axis(panel, table, settings):
    """Makes x the epochs trained, over all rounds, with a line at each pruning. Returns the rows' places."""
    rounds = table['round']
    at = np.maximum(table['epoch'] - np.where(rounds > 0, max(settings.rewind_epoch, 0), 0), 0)
    for number in range(1, int(rounds.max()) + 1):
        pruned = at[rounds < number].max()
        panel.axvline(pruned, label='_pruning', zorder=0, **MARKS['pruning'])
        at[rounds == number] += pruned
    panel.set_xlabel('epoch')
    panel.xaxis.get_major_locator().set_params(integer=True)
    return at


def place_ticks(panel, ticks, room):
    """Ticks of the x axis at these places, {place: text}, logarithmic where they span a factor of 4 or more.

    A text that would touch the one before it is left out; `room` is how many letters the axis has.
    """
    places = np.array(sorted(ticks), dtype=float)
    if places[0] > 0 and places[-1] >= 4 * places[0]:
        panel.set_xscale('log', base=2)
        at = np.log2(places)
    else:
        at = places
    labels, end, span = [], -math.inf, (at[-1] - at[0]) or 1.0
    edges = np.array([at[0] - 0.05 * span, at[-1] + 0.05 * span])
    panel.set_xlim(2**edges if panel.get_xscale() == 'log' else edges)
    for place, text in zip(room * (at - at[0]) / span, map(ticks.get, sorted(ticks))):
        fits = place - len(text) / 2 > end
        labels.append(text if fits else '')
        end = place + len(text) / 2 + 1 if fits else end
    panel.set_xticks([], minor=True)
    panel.set_xticks(places, labels=labels)
