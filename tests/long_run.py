"""Whether a long run stays as small and as fast as it began: python tests/long_run.py [--epochs 2000] [--width 8]

Trains on the digits and compares the memory after 50 epochs with that at the end, and the seconds per epoch at both ends.
Exits with 1 where memory grew by more than 5 % or time by more than 10 %.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import DIGITS, start

from records import read_metrics


def resident(pid):
    """Resident memory of a process in MiB."""
    status = dict(
        line.split(':', 1) for line in Path(f'/proc/{pid}/status').read_text().splitlines()
    )
    return int(status['VmRSS'].split()[0]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=2000)
    parser.add_argument('--width', type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'run', f'CONV-3-{options.width}', 'metrics.csv')
        flags = (
            '--epochs',
            options.epochs,
            '--width',
            options.width,
            '--results-path',
            Path(folder, 'run'),
        )
        process = start(
            *DIGITS, *flags, stdout=subprocess.DEVNULL
        )  # a pipe that nobody reads would fill up and stop it
        memory, begin = {}, time.monotonic()
        for lines, reached in ((52, 50), (options.epochs - 8, options.epochs - 10)):
            while not (path.exists() and path.read_text().count('\n') >= lines):
                if process.poll() is not None:
                    sys.exit(process.communicate()[1])
                time.sleep(0.02)
            memory[reached] = resident(process.pid)
        _, stderr = process.communicate()
        table = read_metrics(path)
    seconds = table['train_seconds'] + table['eval_seconds']
    first, last = (statistics.median(part) for part in (seconds[10:210], seconds[-200:]))
    (_, early), (_, late) = memory.items()
    print(
        f'{options.epochs} epochs in {time.monotonic() - begin:.0f} s, exit status {process.returncode} {stderr}'
    )
    print(
        f'memory {early:.0f} MiB after 50 epochs, {late:.0f} MiB 10 epochs before the end: {100 * (late / early - 1):+.1f} %'
    )
    print(
        f'median epoch {first:.4f} s among the first 200, {last:.4f} s among the last: {100 * (last / first - 1):+.1f} %'
    )
    sys.exit(late > 1.05 * early or last > 1.1 * first or process.returncode != 0)


if __name__ == '__main__':
    main()
