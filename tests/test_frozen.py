"""What the program computes stays what tests/freeze.py has written down."""

import json
import math

import freeze
import pytest
from conftest import train_small


def close(cell, expected):
    if '' in (cell, expected):
        return cell == expected
    return math.isclose(float(cell), float(expected), rel_tol=1e-4, abs_tol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize('kind', freeze.KINDS)
def test_the_tables_of_a_kind_of_run_are_as_before(tmp_path, kind):
    """Cell by cell on the machine that wrote them; on others the rows before training, to 1e-4."""
    frozen = json.loads((freeze.FROZEN / f'{kind}.json').read_text())
    same_machine = frozen.pop('machine') == freeze.machine()
    train_small(tmp_path / 'run', *freeze.KINDS[kind].split())
    tables = freeze.read_tables(tmp_path / 'run')
    if same_machine:
        assert tables == frozen
        return
    assert tables.keys() == frozen.keys()
    for name, rows in tables.items():
        for row, expected in zip(rows, frozen[name]):
            if (row['round'], row['epoch']) == ('0', '0'):
                assert row.keys() == expected.keys()
                assert all(close(row[column], expected[column]) for column in row)


@pytest.mark.parametrize('what', ['recipes', 'networks'])
def test_recipes_and_shipped_networks_are_as_before(what):
    assert getattr(freeze, what)() == json.loads((freeze.FROZEN / f'{what}.json').read_text())
