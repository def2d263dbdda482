"""Kills runs at random moments, resumes them to their end, and compares their tables.

    python tests/campaign.py [--runs 13] [--kills 2] [--seed 0]

The runs are of the kinds of tests/freeze.py, one after the other. Each is ended by KILL, TERM or
INT, drawn at random, until --kills of them came while it trained; a few come as it starts. Every
cell must equal that of tests/frozen, or, on another kind of machine, of an uninterrupted run.
Prints a line per run, and exits with 1 if one differs.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import freeze
from conftest import SMALL, start

SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def expected_tables(kind, folder):
    """{file name: rows} of an uninterrupted run."""
    frozen = json.loads((freeze.FROZEN / f'{kind}.json').read_text())
    if frozen.pop('machine') == freeze.machine():
        return frozen
    return freeze.train_kind(kind, folder)


def tables(folder):
    """{file name: rows} so far."""
    return {path.name: freeze.read_rows(path) for path in folder.glob('*/*.csv')}


def count_rows(folder):
    return len(tables(folder).get('metrics.csv', []))


def has_begun(folder, since):
    """Whether a process that was started at this time has written a table or weights."""
    files = [*folder.glob('*/metrics.csv'), *folder.glob('*/model.pt')]
    return any(path.stat().st_mtime > since for path in files)


def start_or_resume(kind, folder):
    arguments = ['--resume']
    if not (folder / 'global_settings.py').exists():
        shutil.rmtree(folder, ignore_errors=True)  # killed as it made the folder
        arguments = [*SMALL, *freeze.KINDS[kind].split()]
    return start(*arguments, '--results-path', folder, stdout=subprocess.DEVNULL)


def train_until(process, folder, since, rows):
    """Waits until the process trains and the run has this many rows, or until it ends."""
    while process.poll() is None:
        if has_begun(folder, since) and count_rows(folder) >= rows:
            return
        time.sleep(0.01)


def check_run(kind, folder, kills, chance):
    """Trains a run with kills. Returns the signals, in parentheses those before it trained, and a
    complaint, '' if there is none.
    """
    expected, run = expected_tables(kind, folder / 'whole'), folder / 'run'
    total, sent = len(expected['metrics.csv']), []
    while True:
        since, process = time.time(), start_or_resume(kind, run)
        if kills == 0:
            process.wait(timeout=600)
        elif chance.random() < 0.2:
            time.sleep(chance.uniform(0, 3))
        else:
            done = count_rows(run)
            train_until(process, run, since, chance.randint(done, max(done, total - 1)))
            time.sleep(chance.uniform(0, 0.5))
        trained, number = has_begun(run, since), None
        if process.poll() is None:
            number = chance.choice(SIGNALS)
            process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        status = process.returncode
        if status == 0:
            break
        if number is None or (trained and status not in (-number, 128 + number)):
            return ' '.join(sent), f'exit status {status}, signal {number}: {stderr}'
        sent.append(number.name if trained else f'({number.name})')
        kills -= trained
    return ' '.join(sent), '' if tables(run) == expected else 'tables differ'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--runs', type=int, default=len(freeze.KINDS))
    parser.add_argument('--kills', type=int, default=2)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    chance, kinds, failures = random.Random(options.seed), list(freeze.KINDS), 0
    for index in range(options.runs):
        kind = kinds[index % len(kinds)]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            sent, complaint = check_run(kind, Path(folder), options.kills, chance)
        failures += complaint != ''
        print(f'run {index}, {kind}: {sent}: {complaint or "equal"}', flush=True)
    print(f'{options.runs - failures} of {options.runs} equal')
    return failures > 0


if __name__ == '__main__':
    sys.exit(main())
