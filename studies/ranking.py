"""Which bound predicts? How often each bound ranks networks as their generalization gaps do.

    python -m studies.ranking results/zoo                  ranks every bound, yours too, in seconds
    python -m studies.ranking results/zoo --weights        and your measures of networks
    python -m studies.ranking results/7 --out results/7    a finished sweep; writes ranking.csv too

Two networks whose settings differ in exactly one knob, seeds aside, are a pair. A measure errs on
it if it is larger for the network with the smaller gap. The sign errors are weighted and averaged
over environments, after Dziugaite et al. 2020, "In search of robust measures of generalization"
(NeurIPS). Without weights they are Kendall's tau along a knob; its mean over knobs is psi, as in
Jiang et al. 2020, "Fantastic generalization measures and where to find them" (ICLR). Knobs are the
independent evidence: a sign-flip test over them says whether psi is larger than by chance.
docs/ranking.md has the definitions.
"""

import collections
import functools
import itertools
import math
import sys
from pathlib import Path

import numpy as np

from conf import KNOBS, BadInput, load_launch, run_program
from datasets import DATASETS
from evaluation import at_target, is_finished
from figures import varied
from measures.landscape import MEASURES
from records import write_table
from studies import zoo
from studies.report import new_figure, print_table, read_csv, save, study_parser
from utils import BOUNDS, bounds_of

LEAST_NETWORKS, LEAST_KNOBS = 20, 2
LEAST_SIZE = 2  # of an environment: (sum w)^2 / sum w^2 over its pairs
RANDOM_MEASURES = 300
LEVEL = 0.05  # of the test over knobs, after Holm's correction

# Columns of summary.csv that do not measure the network whose gap is ranked, or are parts of
# FORMULAS.
NO_MEASURES = """
    name base reached epoch round density lr train_loss test_loss train_error test_error
    generalization_gap
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


def read_sweep(folder):
    """([(settings, row)], {knob: values}, groups) of the finished networks of a sweep.

    Networks that did not reach `target_loss` are left out and named.
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
    values = {knob: [getattr(settings, knob) for settings, _ in networks] for knob in knobs}
    return networks, values, [0] * len(networks)


def read_zoo(folder, weights=False):
    """As `read_sweep`, for a zoo, whose groups are its base points; today's BOUNDS are evaluated.

    Args:
        weights: evaluate MEASURES without a column too, on the networks whose weights are there.
    """
    points, networks = zoo.design(), []
    rows = {}
    for cells in read_csv(Path(folder, 'networks.csv')):
        rows[cells['name']] = {column: _number(cell) for column, cell in cells.items()}
    for row, tables in zip(rows.values(), zoo.read_tables(folder), strict=True):
        row |= bounds_of(*tables, KNOBS['delta'][0], KNOBS['gamma'][0])
    if weights:
        new = MEASURES.keys() - next(iter(rows.values())).keys()
        for name, net, initial, dataset in zoo.read_networks(folder):
            for measure in new:
                sample = dataset.train_images, dataset.train_labels
                rows[name][measure] = float(MEASURES[measure](net, initial, *sample))
    for name, row in rows.items():
        if row['reached']:
            networks.append((zoo.zoo_settings(name, points[name]), row))
    missing = len(points) - len(networks)
    if missing:
        print(f'{missing} of {len(points)} networks did not reach the loss and are left out')
    values = {knob: [points[settings.name][knob] for settings, _ in networks] for knob in zoo.KNOBS}
    return networks, values, [row['base'] for _, row in networks]


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
    columns = dict.fromkeys(column for row in rows for column in row)
    table = collections.defaultdict(lambda: np.full(len(rows), math.nan))
    for column in columns:
        table[column] = np.array([row.get(column, math.nan) for row in rows])
    measures = {}
    for column in columns:
        knob = column.removesuffix('_setting')
        if column in NO_MEASURES or hasattr(networks[0][0], knob):
            continue
        measures[column] = table[column]
        if column.endswith('_bound') or column in BOUNDS:
            measures[column] = table[column] + table['train_margin_error'] - table['train_error']
        elif column == 'pac_bayes_error':
            measures[column] = table[column] - table['train_error']
    for name, formula in FORMULAS.items():
        measures[name] = formula(table)
    known = {name: values for name, values in measures.items() if not np.isnan(values).all()}
    for name in measures.keys() & BOUNDS.keys() - known.keys():
        print(f'{name}: nan for all networks, and not ranked')
    return known


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


def sign_flip_p(taus):
    """The probability that the mean of taus is as large as it is if each has a random sign.

    Exact, over all 2^K signs of the K knobs (Fisher's randomization test, one-sided).
    """
    taus = np.array([tau for tau in taus if not math.isnan(tau)])
    return (all_signs(len(taus)) @ taus >= taus.sum() - 1e-9).mean()


@functools.lru_cache
def all_signs(count):
    """The 2^count choices of `count` signs, (2^count, count)."""
    return np.array(list(itertools.product((-1, 1), repeat=count)))


def holm(p):
    """Holm's adjustment of p-values (N,): those at most alpha have a familywise error of alpha."""
    order = np.argsort(p)
    factors = len(p) - np.arange(len(p))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.sort(p) * factors))
    return adjusted


def interval(errors, level=0.95):
    """The exact binomial interval of a mean of sign errors (Clopper and Pearson 1934).

    A tie counts as right in the lower end and as wrong in the upper one.
    """
    from scipy.stats import beta

    n, wrong = len(errors), (errors == 1).sum()
    not_right = (errors > 0).sum()
    low = beta.ppf((1 - level) / 2, wrong, n - wrong + 1) if wrong else 0.0
    high = beta.ppf((1 + level) / 2, not_right + 1, n - not_right) if not_right < n else 1.0
    return low, high


class Pairs:
    """The pairs of networks whose settings differ in one knob, and their environments.

    An environment is one knob, two values of it, and one value of one other knob; its pairs are
    pooled over the remaining knobs and over seeds.

    Args:
        knobs: {knob: its N values}, without seeds.
        gaps: (N,) generalization gaps.
        n: number of test images.
        groups: N labels; both networks of a pair have the same one.
    """

    def __init__(self, knobs, gaps, n, groups=None):
        self.knobs, self.gaps = knobs, gaps
        texts = {knob: [repr(value) for value in values] for knob, values in knobs.items()}
        self.everyone = np.triu_indices(len(gaps), 1)
        pairs, names, self.environments = [], [], {}
        for i, j in zip(*self.everyone):
            if groups and groups[i] != groups[j]:
                continue
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
        row, along, tau, ends = {}, {}, {}, {}
        for knob in self.knobs:
            along[f'error_{knob}'] = of_known(np.mean, shares[knob])
            own = errors[self.knob == knob]
            own = own[~np.isnan(own)]
            tau[f'tau_{knob}'] = 1 - 2 * own.mean() if len(own) else math.nan
            low, high = interval(own) if len(own) else (math.nan, math.nan)
            ends |= {f'tau_low_{knob}': 1 - 2 * high, f'tau_high_{knob}': 1 - 2 * low}
        every = [share for group in shares.values() for share in group]
        row['pairs'] = np.isfinite(errors).sum()
        row['environments'] = np.isfinite(every).sum()
        row['mean'] = of_known(np.mean, along.values())
        row['p90'] = of_known(lambda known: np.quantile(known, 0.9), every)
        row['max'] = of_known(max, every)
        row['worst'] = of_known(max, along.values())
        row |= along | tau | ends
        row['psi'] = of_known(np.mean, tau.values())
        row['p'] = sign_flip_p(tau.values())
        everywhere = sign_errors(values, self.gaps, *self.everyone)
        row['tau'] = 1 - 2 * of_known(np.mean, everywhere)
        return row

    def differences(self, knob):
        """Of each pair along a knob: the gap at the larger value less that at the smaller one."""
        values, own = self.knobs[knob], self.knob == knob
        i, j = self.i[own], self.j[own]
        swap = np.array([values[first] > values[second] for first, second in zip(i, j)], bool)
        return (self.gaps[j] - self.gaps[i]) * np.where(swap, -1, 1)

    def chance(self):
        """{statistic: its 2.5 % and 97.5 % quantiles over random measures} of mean, psi and tau."""
        draws = np.random.default_rng(0).standard_normal((RANDOM_MEASURES, len(self.gaps)))
        rows = [self.rank(values) for values in draws]
        band = {}
        for name in ('mean', 'psi', 'tau'):
            band[name] = np.quantile([row[name] for row in rows], (0.025, 0.975))
        return band


def rank_networks(folder, weights=False):
    """(rows, pairs) of a sweep or a zoo: a row of ranking.csv per measure, the largest psi first.

    A knob along which no two networks can be compared is named.

    Raises:
        BadInput: it has too few finished networks or knobs.
    """
    if Path(folder, 'networks.csv').exists():
        networks, knobs, groups = read_zoo(folder, weights)
    else:
        networks, knobs, groups = read_sweep(folder)
    if len(networks) < LEAST_NETWORKS or len(knobs) < LEAST_KNOBS:
        needed = f'a ranking needs {LEAST_NETWORKS} that vary in {LEAST_KNOBS} knobs'
        found = f'{len(networks)} finished networks that vary in {len(knobs)} knobs'
        raise BadInput(f'{folder}: has {found}; {needed}')
    gaps = np.array([gap(*network) for network in networks])
    pairs = Pairs(knobs, gaps, min(row['test_size'] for _, row in networks), groups)
    for knob in knobs:
        if knob not in pairs.knob:
            print(f'no two networks differ in {knob} alone: nothing is ranked along it')
    rows = []
    for name, measure in measures_of(networks).items():
        missing = np.isnan(measure).sum()
        if missing:
            print(f'{name}: nan for {missing} of {len(gaps)} networks, whose pairs are left out')
        rows.append({'measure': name, 'networks': len(gaps) - missing} | pairs.rank(measure))
    for row, p in zip(rows, holm(np.array([row['p'] for row in rows]))):
        row['p_holm'] = p
    rows.sort(key=lambda row: -row['psi'])
    return rows, pairs


# ------------------------------------------------------------------------------------------------
# Table and picture
# ------------------------------------------------------------------------------------------------


def show(rows, pairs, band):
    """Prints each measure's statistics beside those of 95 % of random measures."""
    sure = (pairs.weights > 0).sum()
    print(f'{len(pairs.gaps)} networks, {len(pairs.i):,} pairs that differ in one knob,')
    print(f"{sure:,} of them by more than the test set's noise\n")
    cells = []
    for row in rows:
        errors = {knob: (1 - row[f'tau_{knob}']) / 2 for knob in pairs.knobs}
        knob = max(errors, key=lambda knob: -math.inf if math.isnan(errors[knob]) else errors[knob])
        numbers = [f'{row[column]:.3f}' for column in ('psi', 'mean')]
        p = [f'{row[column]:.2g}' for column in ('p', 'p_holm')]
        cells.append((row['measure'], numbers[0], *p, numbers[1], f'{errors[knob]:.2f} {knob}'))
    ranges = ['{:.3f} to {:.3f}'.format(*band[name]) for name in ('psi', 'mean')]
    cells.append(('95 % of random measures', ranges[0], '', '', ranges[1], ''))
    print_table(('measure', 'psi', 'p', 'p (Holm)', 'weighted mean', 'worst knob'), cells)
    print('\nThe gap at the larger value of a knob, less that at the smaller one:\n')
    cells = []
    for knob in pairs.knobs:
        differences = pairs.differences(knob)
        larger = f'{(differences > 0).sum()} of {len(differences)}'
        cells.append((knob, larger, f'{of_known(np.median, differences):+.4f}'))
    print_table(('knob', 'larger', 'median difference'), cells)
    sound = [row['measure'] for row in rows if row['p_holm'] <= LEVEL]
    count = len(pairs.knobs)
    print(
        f'\nPredicts along the {count} knobs, p (Holm, of {len(rows)} measures) <= {LEVEL}:',
        end=' ',
    )
    print(f'{", ".join(sound) or "none"}.')
    print(f'By chance a measure is right along all {count} knobs with probability 1/{2**count}.')


def picture(rows, knobs, band):
    """The sign errors of each measure along each knob: as dots (left), as colours (right).

    Args:
        band: psi of 95 % of random measures, an array (2,).
    """
    y, width = range(len(rows)), 0.3 * len(knobs)
    height = 0.2 * len(rows) + 1.8

    def column(name):
        return [row[name] for row in rows]

    figure = new_figure(5.4 + width, height)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, width))
    low, high = (1 - band) / 2
    left.axvspan(low, high, color='0.85', zorder=0, label='95 % of random measures')
    left.axvline(0.5, color='0.6', linewidth=0.8, zorder=1)
    errors = (1 - np.array([column(f'tau_{knob}') for knob in knobs]).T) / 2
    for number, along in enumerate(errors):
        label = 'one knob' if number == 0 else None
        left.plot(along, [number] * len(knobs), 'o', color='#0072B2', alpha=0.35, ms=4, label=label)
    means = (1 - np.array(column('psi'))) / 2
    left.plot(means, y, 'D', color='black', markersize=4, label='mean over knobs')
    sound = [number for number in y if rows[number]['p_holm'] <= LEVEL]
    left.plot([1.06] * len(sound), sound, '*', color='#D55E00', label=f'p (Holm) ≤ {LEVEL}')
    name_measures(left, column('measure'))
    left.set(xlim=(-0.03, 1.1), ylim=(len(rows) - 0.5, -0.5), xlabel='sign error')
    left.set_title(f'{rows[0]["networks"]} networks, {rows[0]["pairs"]} pairs', fontsize='medium')
    below = {'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.6 / height)}
    left.legend(**below, fontsize='small', frameon=False, ncols=2)
    map_errors(right, errors)
    right.set_xlabel('blue: right, red: wrong')
    slanted = {'rotation': 45, 'ha': 'left', 'rotation_mode': 'anchor'}
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
    """Sign errors (measures, columns) as colours, blue if right, and few columns as numbers too."""
    panel.imshow(errors, cmap='RdBu_r', vmin=0, vmax=1, aspect='auto')
    style = {'ha': 'center', 'va': 'center', 'fontsize': 'x-small'}
    for (row, column), error in np.ndenumerate(errors):
        if errors.shape[1] <= 6 and not math.isnan(error):
            color = 'white' if abs(error - 0.5) > 0.35 else 'black'
            panel.text(column, row, f'{error:.2f}', color=color, **style)
    panel.xaxis.tick_top()
    panel.tick_params(left=False, top=False)


def main(arguments=None):
    parser = study_parser('ranking', __doc__, 'ranking.csv, ranking.png and ranking.pdf')
    parser.add_argument('folder', type=Path, help='results/zoo, or a folder of a finished sweep')
    text = 'of a zoo: also rank the entries of MEASURES that networks.csv does not have'
    parser.add_argument('--weights', action='store_true', help=text)
    options = parser.parse_args(arguments)
    rows, pairs = rank_networks(options.folder, options.weights)
    band = pairs.chance()
    show(rows, pairs, band)
    if options.out:
        figure = picture(rows, list(pairs.knobs), band['psi'])
        save(figure, options.out / 'ranking.png')
        write_table(options.out / 'ranking.csv', list(rows[0]), rows)
        # Without its date a picture of equal numbers is an equal file.
        figure.savefig(options.out / 'ranking.pdf', metadata={'CreationDate': None})


if __name__ == '__main__':
    sys.exit(run_program(main))
