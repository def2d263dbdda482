"""What the tables of a results folder say together: what was measured last, groups of runs, summary.csv."""

import csv
import io
import itertools
import math
from pathlib import Path

import numpy as np

from conf import KNOBS as RULES
from conf import NOT_SWEPT
from records import read_metrics, rows_of

SEEDS = ('seed', 'data_seed')
TIMINGS = ('train_seconds', 'eval_seconds')


def read_runs(folder, networks):
    """(settings, table) of each network that has metrics; where evaluation.csv has a cell too, that stands.

    Rows of evaluation.csv with another delta or gamma than the training's are left out: a curve is of one. Prints a line for
    each network of which rows are left out, or of which the two tables differ.
    """
    runs = []
    for settings in networks:
        logged, measured = (
            Path(folder, settings.name, name) for name in ('metrics.csv', 'evaluation.csv')
        )
        if not logged.exists():
            continue
        table, differing = read_metrics(logged), []
        if measured.exists():
            rows = read_metrics(measured)
            same = np.ones(len(rows['epoch']), dtype=bool)
            for knob in ('delta', 'gamma'):
                same &= rows.get(knob, getattr(settings, knob)) == getattr(
                    settings, knob
                )  # older tables do not say
            if not same.all():
                print(
                    f'{measured}: rows with another delta or gamma than that of the training are not shown'
                )
            table, differing = overlaid(
                table, {column: cells[same] for column, cells in rows.items()}
            )
        if differing:
            print(
                f'{measured}: differs from metrics.csv, and is what is shown, in {", ".join(differing)}'
            )
        if len(table['epoch']):
            runs.append((settings, table | {'absolute_gap': np.abs(table['generalization_gap'])}))
    return runs


def overlaid(logged, measured):
    """(table, columns): `logged` with the cells of `measured` over it, and the columns in which these differ.

    That is by more than a millionth, since another number of threads changes the last digits of float32.
    """
    rows = {(row['round'], row['epoch']): row for row in rows_of(logged)}
    differing = set()
    for row in rows_of(measured):
        before = rows.setdefault((row['round'], row['epoch']), {})
        now = {column: cell for column, cell in row.items() if not math.isnan(cell)}
        for column in now.keys() - set(TIMINGS):
            logged_cell = before.get(column, math.nan)
            if not (
                math.isnan(logged_cell) or math.isclose(logged_cell, now[column], rel_tol=1e-6)
            ):
                differing.add(column)
        before |= now
    columns = dict.fromkeys([*logged, *measured])
    table = {
        column: np.array([rows[at].get(column, math.nan) for at in sorted(rows)])
        for column in columns
    }
    return table, [column for column in columns if column in differing]


def last_rows(table):
    """The last row of each round; a round that has pruned and not trained yet has none."""
    ends = {row['round']: row for row in rows_of(table)}.values()
    return [row for row in ends if row['epoch'] > 0 or row['round'] == 0]


def varied(runs):
    """The knobs in which the networks differ, seeds aside."""
    knobs = [knob for knob in RULES if knob not in (*NOT_SWEPT, *SEEDS)]
    return [knob for knob in knobs if len({getattr(settings, knob) for settings, _ in runs}) > 1]


def grouped(runs, knobs):
    """{'depth 3, width 8': the runs with these values} of the knobs."""
    groups = {}
    for settings, table in runs:
        words = ', '.join(f'{knob} {getattr(settings, knob)}' for knob in knobs)
        groups.setdefault(words, []).append((settings, table))
    return groups


def spread(rows, axis):
    """Tables of the mean, least and largest cell of rows of the same value in `axis`, empty ones aside."""
    at = {}
    for row in sorted(rows, key=lambda row: row[axis]):
        at.setdefault(row[axis], []).append(row)
    columns = dict.fromkeys(column for row in rows for column in row)

    def table(function):
        def cell(members, column):
            values = [row[column] for row in members if not math.isnan(row.get(column, math.nan))]
            return function(values) if values else math.nan

        return {
            column: np.array([cell(members, column) for members in at.values()])
            for column in columns
        }

    return table(np.mean), table(min), table(max)


def csv_file(rows):
    """Rows {column: cell} as the bytes of a csv file, whose columns are all that they have; nan is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(itertools.chain(*rows)), lineterminator='\n')
    writer.writeheader()
    writer.writerows({column: cell for column, cell in row.items() if cell == cell} for row in rows)
    return text.getvalue().encode()


def summary(runs):
    """summary.csv: the last row of each network and round, after the knobs in which the networks differ."""
    rows, knobs = [], [*varied(runs), *SEEDS]
    for settings, table in runs:
        about = {knob + '_setting' * (knob in table): getattr(settings, knob) for knob in knobs}
        logged = {column: cells for column, cells in table.items() if column != 'absolute_gap'}
        rows += [{'name': settings.name} | about | row for row in last_rows(logged)]
    return csv_file(rows)
