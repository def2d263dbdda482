"""varied and last_rows until figures.py has them."""

from conf import KNOBS, NOT_SWEPT
from records import rows_of

__all__ = ['last_rows', 'varied']


def last_rows(table):
    ends = {row['round']: row for row in rows_of(table)}.values()
    return [row for row in ends if row['epoch'] > 0 or row['round'] == 0]


def varied(runs):
    knobs = [knob for knob in KNOBS if knob not in (*NOT_SWEPT, 'seed', 'data_seed')]
    return [knob for knob in knobs if len({getattr(settings, knob) for settings, _ in runs}) > 1]
