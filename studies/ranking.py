"""Which bound predicts? How often each bound ranks networks as their generalization gaps do.

    python -m studies.ranking results/7                    prints the table of a finished sweep
    python -m studies.ranking results/7 --out results/7    writes ranking.csv, .png and .pdf too

Two networks whose settings differ in exactly one knob, seeds aside, are a pair. A measure errs on
it if it is larger for the network with the smaller gap. The sign errors are weighted and averaged
over environments, after Dziugaite et al. 2020, "In search of robust measures of generalization"
(NeurIPS). Without weights they are Kendall's tau along a knob; its mean over knobs is psi, as in
Jiang et al. 2020, "Fantastic generalization measures and where to find them" (ICLR).
docs/ranking.md has the definitions. The networks come from the sweep's summary.csv and settings.
"""

import collections
import math
import sys
from pathlib import Path

import numpy as np

from conf import BadInput, load_launch, run_program
from datasets import DATASETS
from evaluation import at_target, is_finished
from figures import varied
from records import write_table
from studies.report import new_figure, print_table, read_csv, save, study_parser

LEAST_NETWORKS, LEAST_KNOBS = 20, 2
LEAST_SIZE = 2  # of an environment: (sum w)^2 / sum w^2 over its pairs
RANDOM_MEASURES = 300

# Columns of summary.csv that do not measure the network whose gap is ranked, or are parts of
# FORMULAS.
NO_MEASURES = """
    name epoch round density lr train_loss test_loss train_error test_error generalization_gap
    train_margin_error prod_ratio norm_ratio certified_error certified_margin
    pac_bayes_rounded_error pac_bayes_gibbs_error test_set_bound margin_10 sharpness masked_density
    train_size test_size train_seconds eval_seconds
""".split()


def _inverse(values):
    """1 / v; infinity where v is not positive."""
    with np.errstate(divide='ignore'):
        return 1 / abs(np.maximum(values, 0))


# Ranked like the columns: functions of a table {column: (N,)}. Larger predicts a larger gap.
FORMULAS = {
    'rho * prod_ratio': lambda t: t['rho'] * t['prod_ratio'],  # the product of the operator norms
    'path_norm / margin_10': lambda t: t['path_norm'] * _inverse(t['margin_10']),
    'path_norm_2 / (margin_10 √m)': lambda t: (
        t['path_norm_2'] * _inverse(t['margin_10']) / np.sqrt(t['train_size'])
    ),
    'distance / √m': lambda t: t['distance'] / np.sqrt(t['train_size']),
    '1 / margin_10': lambda t: _inverse(t['margin_10']),
    '1 / sharpness': lambda t: _inverse(t['sharpness']),
    'distance / (sharpness √m)': lambda t: (
        t['distance'] * _inverse(t['sharpness']) / np.sqrt(t['train_size'])
    ),
    'constant': lambda t: np.zeros(len(t['train_size'])),
    '1 / m': lambda t: 1 / t['train_size'],
    'epochs': lambda t: t['epoch'],
    '- train_loss': lambda t: -t['train_loss'],
}
CONTROLS = 'constant', '1 / m', 'epochs', '- train_loss'


# ------------------------------------------------------------------------------------------------
# The networks of a sweep, their gaps and their measures
# ------------------------------------------------------------------------------------------------


def read_rows(folder):
    """[(settings, row)] of summary.csv, a row per network and round; text is nan."""
    runs = {settings.name: settings for settings in load_launch(folder)[1]}
    path = Path(folder, 'summary.csv')
    if not path.exists():
        command = f'python train.py --results-path {folder} --plot'
        raise BadInput(f'{path}: no such file; write it with {command}')
    rows = []
    for cells in read_csv(path):
        if cells['name'] in runs:
            row = {column: _number(cell) for column, cell in cells.items()}
            rows.append((runs[cells['name']], row))
    return rows


def _number(cell):
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def reached(settings, row):
    """Whether a network was trained to target_loss; with target_loss = 0 all were."""
    return not settings.target_loss or at_target(settings, row['train_loss'])


def gap(settings, row):
    """err_P - err_S for the distribution P of the training set, wrong labels included.

    A share p of the labels is wrong, uniformly over the other C - 1 classes and independently of
    the image: a classifier with error e on clean labels has error p + e (1 - p C / (C - 1)) on P.
    With `clean_samples` the training set comes from no such distribution, and p is taken as 0.
    """
    p = 0.0 if settings.clean_samples else settings.label_noise
    classes = DATASETS[settings.dataset_name][2]
    test_error = p + row['test_error'] * (1 - p * classes / (classes - 1))
    return test_error - row['train_error']


def measures_of(networks):
    """{name: (N,)} of every bound, measure, formula and control that the networks have.

    A bound on err_P - err_S^gamma is converted to one on err_P - err_S, and so is a certificate,
    which bounds err_P.
    """
    rows = [row for _, row in networks]
    table = collections.defaultdict(lambda: np.full(len(rows), math.nan))
    for column in rows[0]:
        table[column] = np.array([row.get(column, math.nan) for row in rows])
    measures = {}
    for column in rows[0]:
        knob = column.removesuffix('_setting')
        if column in NO_MEASURES or hasattr(networks[0][0], knob):
            continue
        measures[column] = table[column]
        if column.endswith('_bound'):
            measures[column] = table[column] + table['train_margin_error'] - table['train_error']
        elif column == 'pac_bayes_error':
            measures[column] = table[column] - table['train_error']
    for name, formula in FORMULAS.items():
        measures[name] = formula(table)
    return {name: values for name, values in measures.items() if not np.isnan(values).all()}


# ------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------


def sign_errors(values, gaps, i, j):
    """(1 - sgn(v_i - v_j) sgn(g_i - g_j)) / 2 of each pair: 0 is right, 1 wrong, 1/2 a tie.

    Two infinities tie; the error is nan if a value is nan.
    """
    first, second = values[i], values[j]
    order = (first > second).astype(float) - (first < second)
    order[np.isnan(first) | np.isnan(second)] = math.nan
    return (1 - order * np.sign(gaps[i] - gaps[j])) / 2


def pair_weights(differences, n):
    """How surely n test images tell the gaps of a pair apart, 0 to 1/2 (Dziugaite et al.)."""
    phi = 2 * np.exp(-2 * n * (np.abs(differences) / 2) ** 2)
    return np.maximum(0, np.maximum(0, 1 - phi) ** 2 - 0.5)


def weighted_mean(errors, weights):
    """The weighted mean of sign errors; nan if too few of those that are not nan have weight."""
    known = ~np.isnan(errors)
    errors, weights = errors[known], weights[known]
    total = weights.sum()
    if total == 0 or total**2 < LEAST_SIZE * (weights @ weights) * (1 - 1e-9):
        return math.nan
    return weights @ errors / total


def of_known(function, values):
    """A statistic of the values that are not nan; nan if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return function(known) if known else math.nan


class Pairs:
    """The pairs of networks whose settings differ in one knob, and their environments.

    An environment is one knob, two values of it, and one value of one other knob; its pairs are
    pooled over the remaining knobs and over seeds.

    Args:
        knobs: {knob: its N values}, without seeds.
        gaps: (N,) generalization gaps.
        n: number of test images.
    """

    def __init__(self, knobs, gaps, n):
        self.knobs, self.gaps = list(knobs), gaps
        texts = {knob: [repr(value) for value in values] for knob, values in knobs.items()}
        self.everyone = np.triu_indices(len(gaps), 1)
        pairs, names, self.environments = [], [], {}
        for i, j in zip(*self.everyone):
            differ = [knob for knob, values in texts.items() if values[i] != values[j]]
            if len(differ) != 1:
                continue
            knob = differ[0]
            two = frozenset((texts[knob][i], texts[knob][j]))
            # The pair belongs to an environment for each knob in which its networks agree.
            for other, values in texts.items():
                if other != knob:
                    key = knob, two, other, values[i]
                    self.environments.setdefault(key, []).append(len(pairs))
            pairs.append((i, j))
            names.append(knob)
        self.i, self.j = np.array(pairs, dtype=int).reshape(-1, 2).T
        self.knob = np.array(names, dtype=str)
        self.weights = pair_weights(gaps[self.i] - gaps[self.j], n)

    def rank(self, values):
        """The statistics of a measure with these values (N,): {column of ranking.csv: number}."""
        errors = sign_errors(values, self.gaps, self.i, self.j)
        shares = {knob: [] for knob in self.knobs}
        for (knob, *_), members in self.environments.items():
            share = weighted_mean(errors[members], self.weights[members])
            shares[knob].append(share)
        row, along, tau = {}, {}, {}
        for knob in self.knobs:
            along[f'error_{knob}'] = of_known(np.mean, shares[knob])
            tau[f'tau_{knob}'] = 1 - 2 * of_known(np.mean, errors[self.knob == knob])
        every = [share for group in shares.values() for share in group]
        row['pairs'] = np.isfinite(errors).sum()
        row['environments'] = np.isfinite(every).sum()
        row['mean'] = of_known(np.mean, along.values())
        row['p90'] = of_known(lambda known: np.quantile(known, 0.9), every)
        row['max'] = of_known(max, every)
        row['worst'] = of_known(max, along.values())
        row |= along | tau
        row['psi'] = of_known(np.mean, tau.values())
        everywhere = sign_errors(values, self.gaps, *self.everyone)
        row['tau'] = 1 - 2 * of_known(np.mean, everywhere)
        return row

    def chance(self):
        """{statistic: its 2.5 % and 97.5 % quantiles over random measures} of mean, psi and tau."""
        draws = np.random.default_rng(0).standard_normal((RANDOM_MEASURES, len(self.gaps)))
        rows = [self.rank(values) for values in draws]
        band = {}
        for name in ('mean', 'psi', 'tau'):
            band[name] = np.quantile([row[name] for row in rows], (0.025, 0.975))
        return band


def rank_networks(folder):
    """(rows, pairs) of a sweep: a row of ranking.csv per measure, the least mean first; its Pairs.

    Networks that did not reach `target_loss` are left out and named. A knob along which no two
    networks can be compared is named.

    Raises:
        BadInput: the sweep has too few finished networks or knobs.
    """
    last = {settings.name: (settings, row) for settings, row in read_rows(folder)}
    networks = []
    for settings, row in last.values():
        if not is_finished(settings, [row]):
            continue
        if reached(settings, row):
            networks.append((settings, row))
        else:
            print(f'{settings.name} did not reach target_loss and is left out')
    knobs = varied(networks)
    if len(networks) < LEAST_NETWORKS or len(knobs) < LEAST_KNOBS:
        needed = f'a ranking needs {LEAST_NETWORKS} that vary in {LEAST_KNOBS} knobs'
        found = f'{len(networks)} finished networks that vary in {len(knobs)} knobs'
        raise BadInput(f'{folder}: has {found}; {needed}')
    gaps = np.array([gap(*network) for network in networks])
    values = {knob: [getattr(settings, knob) for settings, _ in networks] for knob in knobs}
    pairs = Pairs(values, gaps, min(row['test_size'] for _, row in networks))
    for knob in knobs:
        if knob not in pairs.knob:
            print(f'no two networks differ in {knob} alone: nothing is ranked along it')
    rows = []
    for name, measure in measures_of(networks).items():
        rows.append({'measure': name, 'networks': len(gaps)} | pairs.rank(measure))
    rows.sort(key=lambda row: (math.isnan(row['mean']), row['mean']))
    return rows, pairs


# ------------------------------------------------------------------------------------------------
# Table and picture
# ------------------------------------------------------------------------------------------------


def show(rows, pairs, band):
    """Prints each measure's statistics beside those of 95 % of random measures."""
    sure = (pairs.weights > 0).sum()
    print(f'{len(pairs.gaps)} networks, {len(pairs.i):,} pairs that differ in one knob,')
    print(f"{sure:,} of them by more than the test set's noise\n")
    columns = ['mean', 'psi', 'tau', *(f'error_{knob}' for knob in pairs.knobs)]
    cells = []
    for row in rows:
        numbers = [f'{row[column]:.3f}' for column in columns]
        cells.append((row['measure'], *numbers))
    ranges = [f'{low:.3f} to {high:.3f}' for low, high in band.values()]
    cells.append(('95 % of random measures', *ranges, *([''] * len(pairs.knobs))))
    print_table(('measure', *columns), cells)
    by_mean = [row['measure'] for row in rows if row['mean'] < band['mean'][0]]
    by_psi = [row['measure'] for row in rows if row['psi'] > band['psi'][1]]
    print(
        f'\nBetter than the range of random measures by the mean: {", ".join(by_mean) or "none"};'
    )
    print(f'by psi: {", ".join(by_psi) or "none"}.')
    # The knobs are the independent evidence, however many pairs there are.
    count = len(pairs.knobs)
    print(f'By chance a measure is right along all {count} knobs with probability 1/{2**count}.')


def picture(rows, knobs, band):
    """The sign errors of each measure, over all knobs (left) and along each knob (right)."""
    y, width = range(len(rows)), 0.62 * len(knobs)
    height = 0.27 * len(rows) + 1.5

    def column(name):
        return [row[name] for row in rows]

    figure = new_figure(5.5 + width, height)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, width))
    left.axvspan(*band, color='0.9', zorder=0, label='95 % of random measures')
    left.axvline(0.5, color='0.6', linewidth=0.8, zorder=1)
    left.hlines(y, 0, column('p90'), color='#88BBDD', linewidth=4, label='90 % of environments')
    left.plot(column('mean'), y, 'o', color='black', markersize=4, label='mean over knobs')
    left.plot(column('worst'), y, 'x', color='#BB0022', markersize=5, label='worst knob')
    name_measures(left, column('measure'))
    left.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel='weighted sign error')
    left.set_title(f'{rows[0]["networks"]} networks, {rows[0]["pairs"]} pairs', fontsize='medium')
    below = {'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.35 / height * 2)}
    left.legend(**below, fontsize='small', frameon=False, ncols=2)
    map_errors(right, np.array([column(f'error_{knob}') for knob in knobs]).T)
    slanted = {'rotation': 40, 'ha': 'left', 'rotation_mode': 'anchor'}
    right.set_xticks(range(len(knobs)), labels=knobs, **slanted, fontsize='small')
    return figure


def name_measures(panel, names):
    """Writes the measures at the left, one per row: bounds in bold, controls in grey."""
    panel.set_yticks(range(len(names)), labels=names, fontsize='small')
    for tick, name in zip(panel.get_yticklabels(), names):
        if name in CONTROLS:
            tick.set_color('0.5')
        if name.endswith('_bound'):
            tick.set_weight('bold')


def map_errors(panel, errors):
    """Sign errors (measures, columns) as numbers and colours, blue if right; nan is white."""
    panel.imshow(errors, cmap='RdBu_r', vmin=0, vmax=1, aspect='auto')
    style = {'ha': 'center', 'va': 'center', 'fontsize': 'x-small'}
    for (row, column), error in np.ndenumerate(errors):
        if not math.isnan(error):
            color = 'white' if abs(error - 0.5) > 0.35 else 'black'
            panel.text(column, row, f'{error:.2f}', color=color, **style)
    panel.xaxis.tick_top()
    panel.tick_params(left=False, top=False)


def main(arguments=None):
    parser = study_parser('ranking', __doc__, 'ranking.csv, ranking.png and ranking.pdf')
    parser.add_argument('folder', type=Path, help='results folder of a finished sweep')
    options = parser.parse_args(arguments)
    rows, pairs = rank_networks(options.folder)
    band = pairs.chance()
    show(rows, pairs, band)
    if options.out:
        figure = picture(rows, pairs.knobs, band['mean'])
        save(figure, options.out / 'ranking.png')
        write_table(options.out / 'ranking.csv', list(rows[0]), rows)
        # Without its date a picture of equal numbers is an equal file.
        figure.savefig(options.out / 'ranking.pdf', metadata={'CreationDate': None})


if __name__ == '__main__':
    sys.exit(run_program(main))
