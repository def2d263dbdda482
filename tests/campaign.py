"""A longer campaign than the tests: kills the digits run at random moments, resumes it until it is done, and compares.

    python tests/campaign.py [--runs 30] [--signal KILL] [--seed 0] [--epochs 30] [--width 8] [flags of train.py]
    python tests/campaign.py --epochs 6 --prune-rounds 2 --layers-every 2
    python tests/campaign.py --density 0.2 --initial-mask erk --regrow gradient --regrow-every 20

Every finished metrics.csv and layers.csv must equal the uninterrupted one, timings aside. With --signal TERM, a process must
also end within 2 seconds of the signal. Prints a line per run, and exits with 1 where one failed.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import DIGITS, run, same, start


def campaign(folder, runs, number, chance, flags):
    """Runs `runs` interrupted runs and returns how many of them failed."""
    begin = time.monotonic()
    status, _, stderr = run(*DIGITS, *flags, '--results-path', folder / 'whole')
    seconds = time.monotonic() - begin
    assert (status, stderr) == (0, ''), stderr
    name = next(path.name for path in (folder / 'whole').iterdir() if path.is_dir())
    failures = 0
    for index in range(runs):
        path, interruptions, slowest, complaint = folder / str(index), 0, 0.0, ''
        while not complaint:
            started = (path / 'global_settings.py').exists()
            process = start(
                *(('--resume',) if started else (*DIGITS, *flags)), '--results-path', path
            )
            try:
                _, stderr = process.communicate(timeout=chance.uniform(0.2, seconds * 1.1))
                if process.returncode:
                    complaint = f'exit status {process.returncode}: {stderr}'
                break
            except subprocess.TimeoutExpired:
                sent = time.monotonic()
                process.send_signal(number)
                _, stderr = process.communicate()
                slowest, interruptions = max(slowest, time.monotonic() - sent), interruptions + 1
            if 'Traceback' in stderr and 'KeyboardInterrupt' not in stderr:
                complaint = stderr
            if path.exists() and not (path / 'global_settings.py').exists():
                path.rmdir()  # ended between making the folder and writing its first file
        if not complaint and not same(path, folder / 'whole', name):
            complaint = 'tables differ'
        if not complaint and number != signal.SIGKILL and slowest > 2:
            complaint = f'took {slowest:.1f} s to end'
        failures += bool(complaint)
        print(
            f'run {index}: {interruptions} interruptions, slowest end {slowest:.2f} s, {complaint or "equal"}',
            flush=True,
        )
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--runs', type=int, default=30)
    parser.add_argument('--signal', choices=['KILL', 'TERM', 'INT'], default='KILL')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--width', type=int, default=8)
    options, flags = parser.parse_known_args()
    flags += ['--epochs', options.epochs, '--width', options.width]
    with tempfile.TemporaryDirectory() as folder:
        number = signal.Signals[f'SIG{options.signal}']
        failures = campaign(Path(folder), options.runs, number, random.Random(options.seed), flags)
    print(f'{options.runs - failures} of {options.runs} equal')
    sys.exit(failures > 0)


if __name__ == '__main__':
    main()
