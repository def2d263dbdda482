"""Which bound predicts? How often each bound ranks the networks of a sweep as their generalization gap does.

Two networks whose settings differ in one knob alone, seeds aside, are a pair; a measure errs on it where it
is larger for the network of the smaller gap. The sign errors are weighted, and averaged over environments,
after Dziugaite et al. 2020, "In search of robust measures of generalization" (NeurIPS); without weights they
are Kendall's tau along a knob, as in Jiang et al. 2020, "Fantastic generalization measures and where to find
them" (ICLR). `draw` reads the summary.csv of a sweep, and the launch's settings.
"""

import csv
import io
import math
from pathlib import Path

import numpy as np

from conf import KNOBS as RULES
from datasets import DATASETS
from evaluation import at_target, is_finished
from records import folder_settings, write_file
from summary import csv_file, varied

LEAST_NETWORKS, LEAST_KNOBS = 20, 2
LEAST_SIZE = 2  # of an environment's pairs, (sum w)^2 / sum w^2
RANDOM_MEASURES = 300

# Columns of summary.csv that are no measure of the network whose gap is ranked, or a part of FORMULAS.
NO_MEASURES = (
    'name, epoch, round, density, lr, train_loss, test_loss, train_error, test_error, generalization_gap, '
    'train_margin_error, prod_ratio, norm_ratio, certified_error, certified_margin, pac_bayes_rounded_error, '
    'pac_bayes_gibbs_error, test_set_bound, margin_10, sharpness, masked_density, train_size, test_size, '
    'train_seconds, eval_seconds'
).split(', ')


def _inverse(values):
    return np.where(
        values > 0, 1 / np.where(values > 0, values, 1), np.where(np.isnan(values), np.nan, np.inf)
    )


# Ranked beside the columns: functions of a table {column: (N,)}; larger is for a larger gap.
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
}
CONTROLS = {
    'constant': lambda t: np.zeros(len(t['train_size'])),
    '1 / m': lambda t: 1 / t['train_size'],
    'epochs': lambda t: t['epoch'],
    '- train_loss': lambda t: -t['train_loss'],
}


# ------------------------------------------------------------------------------------------------------------
# The networks of a sweep, their gaps and their measures
# ------------------------------------------------------------------------------------------------------------


def read_rows(folder):
    """(settings, row) of each row of summary.csv, one a network and round; nan where a cell is empty or no number."""
    runs = {settings.name: settings for settings in folder_settings(folder)[1]}
    with open(Path(folder, 'summary.csv'), newline='') as file:
        for row in csv.DictReader(file):
            if row['name'] in runs:
                yield (
                    runs[row['name']],
                    {column: _number(cell) for column, cell in row.items() if column != 'name'},
                )


def read_networks(folder):
    """(settings, row) of each finished network: its last row in summary.csv."""
    last = {settings.name: (settings, row) for settings, row in read_rows(folder)}
    return [(settings, row) for settings, row in last.values() if is_finished(settings, [row])]


def _number(cell):
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def reached(settings, row):
    """Whether a network was trained to target_loss; all were where it is 0."""
    return not settings.target_loss or at_target(settings, row['train_loss'])


def gap(settings, row):
    """err_P - err_S of the distribution that the training set is drawn from, which has the wrong labels too.

    A share p of the labels is wrong, uniformly over the other C - 1 classes and whatever the image, so that a
    classifier of error e on clean labels has the error p + e (1 - p C / (C - 1)) on P. With `clean_samples`
    the training set is drawn from no such distribution, and clean labels stand for it.
    """
    p = 0.0 if settings.clean_samples else settings.label_noise
    classes = DATASETS[settings.dataset_name][2]
    return p + row['test_error'] * (1 - p * classes / (classes - 1)) - row['train_error']


def measures_of(networks):
    """{name: (N,)} of every bound, measure, formula and control that the networks have.

    A bound on err_P - err_S^gamma enters with what it says of err_P - err_S, and so does a certificate, a
    bound on err_P.
    """
    columns = dict.fromkeys(column for _, row in networks for column in row)
    table = {
        column: np.array([row.get(column, math.nan) for _, row in networks]) for column in columns
    }
    knobs = {knob + suffix for knob in RULES for suffix in ('', '_setting')}
    measures = {}
    for column in columns:
        if column not in NO_MEASURES and column not in knobs:
            measures[column] = table[column]
            if column.endswith('_bound'):
                measures[column] = (
                    table[column] + table['train_margin_error'] - table['train_error']
                )
            elif column == 'pac_bayes_error':
                measures[column] = table[column] - table['train_error']
    for name, formula in (FORMULAS | CONTROLS).items():
        try:
            measures[name] = formula(table)
        except KeyError:  # of a column that this sweep lacks
            continue
    return {name: values for name, values in measures.items() if not np.isnan(values).all()}


# ------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------


def sign(values, i, j):
    """sgn(v_i - v_j) of each pair: inf and inf tie, nan where one is nan."""
    first, second = values[i], values[j]
    signs = (first > second).astype(float) - (first < second)
    return np.where(np.isnan(first) | np.isnan(second), np.nan, signs)


def sign_errors(values, gaps, i, j):
    """(1 - sgn(v_i - v_j) sgn(g_i - g_j)) / 2 of each pair: 0 is right, 1 wrong, 1/2 a tie; or nan."""
    return (1 - sign(values, i, j) * sign(gaps, i, j)) / 2


def pair_weights(differences, n):
    """How sure n test images make it that the gaps of a pair differ, from 0 to 1/2 (Dziugaite et al. 2020)."""
    phi = 2 * np.exp(-2 * n * (np.abs(differences) / 2) ** 2)
    return np.maximum(0, np.maximum(0, 1 - phi) ** 2 - 0.5)


class Pairs:
    """The pairs of networks whose settings differ in one knob, and the environments they are averaged over.

    An environment is one knob, two values of it, and one value of one other knob, pooled over the rest and
    over seeds.

    Args:
        knobs: {knob: its N values}, seeds left out.
        gaps: (N,) generalization gaps.
        n: number of test images.
    """

    def __init__(self, knobs, gaps, n):
        self.knobs, self.gaps = list(knobs), gaps
        codes = np.array(
            [
                np.unique([repr(value) for value in values], return_inverse=True)[1]
                for values in knobs.values()
            ]
        )
        self.everyone = np.triu_indices(len(gaps), 1)
        differ = codes[:, self.everyone[0]] != codes[:, self.everyone[1]]
        self.single = differ.sum(0) == 1
        self.i, self.j = (side[self.single] for side in self.everyone)
        self.knob = differ[:, self.single].argmax(0)
        self.weights = pair_weights(gaps[self.i] - gaps[self.j], n)
        a, b = np.sort([codes[self.knob, self.i], codes[self.knob, self.j]], axis=0)
        keys = [
            (knob, low, high, other, value)
            for knob, low, high, values in zip(self.knob, a, b, codes[:, self.i].T)
            for other, value in enumerate(values)
            if other != knob
        ]
        self.environments = {key: place for place, key in enumerate(sorted(set(keys)))}
        self.member = np.array([self.environments[key] for key in keys], dtype=int).reshape(
            len(self.i), len(knobs) - 1
        )

    def by_environment(self, errors):
        """The weighted mean (E,) of sign errors (P,) in each environment; nan where few pairs have weight."""
        w = np.where(np.isnan(errors), 0, self.weights)

        def total(values):
            of_pairs = np.repeat(values, self.member.shape[1])
            return np.bincount(self.member.ravel(), of_pairs, minlength=len(self.environments))

        weight, square, wrong = total(w), total(w**2), total(w * np.nan_to_num(errors))
        enough = weight**2 >= LEAST_SIZE * square * (1 - 1e-9)
        return np.divide(
            wrong, weight, out=np.full(len(weight), np.nan), where=enough & (weight > 0)
        )

    def rank(self, values):
        """The statistics of a measure with these values (N,), as {column of ranking.csv: number}."""
        errors = sign_errors(values, self.gaps, self.i, self.j)
        shares = self.by_environment(errors)
        of_knob = np.array([knob for knob, *_ in self.environments], dtype=int)
        mean_of = {knob: mean(shares[of_knob == place]) for place, knob in enumerate(self.knobs)}
        tau = {
            knob: 1 - 2 * mean(errors[self.knob == place]) for place, knob in enumerate(self.knobs)
        }
        some = shares[~np.isnan(shares)]
        row = {
            'pairs': int((~np.isnan(errors)).sum()),
            'environments': len(some),
            'mean': mean([*mean_of.values()]),
        }
        row |= {
            'p90': np.quantile(some, 0.9) if len(some) else math.nan,
            'max': max(some, default=math.nan),
        }
        row |= {
            'worst': max((error for error in mean_of.values() if error == error), default=math.nan)
        }
        row |= {f'error_{knob}': error for knob, error in mean_of.items()}
        row |= {f'tau_{knob}': value for knob, value in tau.items()} | {
            'psi': mean([*tau.values()])
        }
        return row | {'tau': 1 - 2 * mean(sign_errors(values, self.gaps, *self.everyone))}

    def chance(self):
        """The 2.5 % and 97.5 % quantiles of `mean` over random measures on the same pairs."""
        draws = np.random.default_rng(0).standard_normal((RANDOM_MEASURES, len(self.gaps)))
        return np.quantile([self.rank(values)['mean'] for values in draws], (0.025, 0.975))


def mean(values):
    """The mean of what is not nan; nan of nothing."""
    values = np.array(values)
    values = values[~np.isnan(values)]
    return values.mean() if len(values) else math.nan


# ------------------------------------------------------------------------------------------------------------
# Table and picture
# ------------------------------------------------------------------------------------------------------------


def draw(folder):
    """Writes ranking.csv, ranking.png and ranking.pdf of a sweep of 2 knobs or more over 20 networks or more.

    Networks that did not reach `target_loss` are left out and named; knobs in which no two networks alone
    differ are named.

    Returns:
        The paths written; none where the folder holds no such sweep.
    Raises:
        ImportError: matplotlib is not installed.
    """
    if not Path(folder, 'summary.csv').exists():
        return []
    everyone = read_networks(folder)
    networks = [network for network in everyone if reached(*network)]
    knobs = varied(networks)
    if len(networks) < LEAST_NETWORKS or len(knobs) < LEAST_KNOBS:
        return []
    if missed := [settings.name for settings, row in everyone if not reached(settings, row)]:
        print(
            f'{folder}: {len(missed)} networks did not reach target_loss and are left out: {", ".join(missed)}'
        )
    gaps = np.array([gap(*network) for network in networks])
    values = {knob: [getattr(settings, knob) for settings, _ in networks] for knob in knobs}
    pairs = Pairs(values, gaps, min(row['test_size'] for _, row in networks))
    for place, knob in enumerate(knobs):
        if not (pairs.knob == place).any():
            print(
                f'{folder}: no two networks differ in {knob} alone, so that nothing is ranked along it'
            )
    table = {
        name: {'networks': len(gaps)} | pairs.rank(measure)
        for name, measure in measures_of(networks).items()
    }
    table = dict(
        sorted(table.items(), key=lambda entry: (math.isnan(entry[1]['mean']), entry[1]['mean']))
    )
    files = {
        Path(folder, 'ranking.csv'): csv_file(
            [{'measure': name} | row for name, row in table.items()]
        )
    }
    image = picture(table, knobs, pairs.chance())
    for suffix, options in (('png', {'dpi': 130}), ('pdf', {'metadata': {'CreationDate': None}})):
        buffer = io.BytesIO()
        image.savefig(buffer, format=suffix, **options)
        files[Path(folder, f'ranking.{suffix}')] = buffer.getbuffer()
    for path, content in files.items():
        write_file(path, content)
    return list(files)


def picture(table, knobs, chance):
    """The sign errors of each measure: over all knobs, beside chance; and along each knob, blue where right."""
    import matplotlib.figure

    rows, names = list(table.values()), list(table)
    places = np.arange(len(rows))
    size = (5.5 + 0.62 * len(knobs), 0.27 * len(rows) + 1.5)
    figure = matplotlib.figure.Figure(figsize=size, layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 0.62 * len(knobs)))
    left.axvspan(*chance, color='0.9', zorder=0, label='95 % of random measures')
    left.axvline(0.5, color='0.6', linewidth=0.8, zorder=1)
    left.hlines(
        places,
        0,
        [row['p90'] for row in rows],
        color='#88BBDD',
        linewidth=4,
        label='90 % of environments',
    )
    left.plot(
        [row['mean'] for row in rows],
        places,
        'o',
        color='black',
        markersize=4,
        label='mean over knobs',
    )
    left.plot(
        [row['worst'] for row in rows],
        places,
        'x',
        color='#BB0022',
        markersize=5,
        label='worst knob',
    )
    name_measures(left, names)
    left.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel='weighted sign error')
    left.set_title(f'{rows[0]["networks"]} networks, {rows[0]["pairs"]} pairs', fontsize='medium')
    left.legend(
        loc='upper center',
        bbox_to_anchor=(0.5, -0.35 / size[1] * 2),
        fontsize='small',
        frameon=False,
        ncols=2,
    )
    map_errors(right, np.array([[row[f'error_{knob}'] for knob in knobs] for row in rows]))
    right.set_xticks(
        range(len(knobs)),
        labels=knobs,
        rotation=40,
        ha='left',
        rotation_mode='anchor',
        fontsize='small',
    )
    return figure


def name_measures(panel, names):
    """Writes the measures at the left, a row each: bounds in bold, controls grey."""
    panel.set_yticks(range(len(names)), labels=names, fontsize='small')
    for tick, name in zip(panel.get_yticklabels(), names):
        tick.set(
            color='0.5' if name in CONTROLS else 'black',
            weight='bold' if name.endswith('_bound') else 'normal',
        )


def map_errors(panel, errors):
    """Sign errors (measures, columns) as colours, blue where right, and as numbers; what is nan stays white."""
    panel.imshow(errors, cmap='RdBu_r', vmin=0, vmax=1, aspect='auto')
    for (place, column), error in np.ndenumerate(errors):
        if error == error:
            color = 'white' if abs(error - 0.5) > 0.35 else 'black'
            panel.text(
                column,
                place,
                f'{error:.2f}',
                ha='center',
                va='center',
                fontsize='x-small',
                color=color,
            )
    panel.xaxis.tick_top()
    panel.tick_params(left=False, top=False)
