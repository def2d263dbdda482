"""Checks that a long run stays small and fast: python tests/long_run.py [--epochs 2000] [--width 8]

Trains on the digits and compares memory after 50 epochs with memory near the end, and the seconds
of an epoch at both ends. Exits with 1 if memory grew by more than 5 % or time by more than 10 %.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from conftest import DIGITS, rows, start

from records import read_metrics


def memory_after(epoch, process, folder, name):
    """Resident memory in MiB of the training process once this epoch is logged."""
    while rows(folder, name) < epoch + 1:
        if process.poll() is not None:
            sys.exit(process.communicate()[1])
        time.sleep(0.02)
    status = Path(f'/proc/{process.pid}/status').read_text()
    return int(status.partition('VmRSS:')[2].split()[0]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=2000)
    parser.add_argument('--width', type=int, default=8)
    options = parser.parse_args()
    epochs, name = options.epochs, f'CONV-3-{options.width}'
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, 'run')
        flags = '--epochs', epochs, '--width', options.width, '--results-path', folder
        # A pipe that nobody reads would fill up and stop the process.
        process = start(*DIGITS, *flags, stdout=subprocess.DEVNULL)
        early = memory_after(50, process, folder, name)
        late = memory_after(epochs - 10, process, folder, name)
        _, stderr = process.communicate()
        table = read_metrics(folder / name / 'metrics.csv')
    seconds = table['train_seconds'] + table['eval_seconds']
    first, last = np.median(seconds[10:210]), np.median(seconds[-200:])
    print(f'{epochs} epochs in {seconds.sum():.0f} s, exit status {process.returncode} {stderr}')
    growth = f'{100 * (late / early - 1):+.1f} %'
    print(f'memory {early:.0f} MiB after 50 epochs, {late:.0f} MiB near the end: {growth}')
    growth = f'{100 * (last / first - 1):+.1f} %'
    print(f'median epoch {first:.4f} s in the first 200, {last:.4f} s in the last: {growth}')
    grown = late > 1.05 * early or last > 1.1 * first
    return int(grown or process.returncode != 0)


if __name__ == '__main__':
    sys.exit(main())
