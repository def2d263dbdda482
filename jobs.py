"""Networks of a sweep trained side by side, each in a process of its own."""

import collections
import concurrent.futures
import ctypes
import os
import queue
import shlex
import signal
import subprocess
import sys

import torch
from tqdm import tqdm

from conf import ROOT, Interrupted
from records import seen_from_here

CHILD = 'SPARSE_NETWORKS_CHILD'  # in the environment of a process of --jobs, whose parent draws


def resuming(folder):
    """The command, given here, that goes on with the trainings of a folder."""
    program, folder = (
        shlex.quote(str(path)) for path in (seen_from_here(ROOT / 'train.py'), folder)
    )
    return f'python {program} --results-path {folder} --resume'


def train_side_by_side(numbers, runs, folder, jobs, device):
    """Trains networks of a folder in processes of their own, `jobs` at a time, on a GPU each unless `device` names one.

    The processes end with this one, however it ends. Returns 1 where one of them failed, else 0.
    """
    slots, children, libc = queue.SimpleQueue(), [], ctypes.CDLL(None)
    bars = [
        tqdm(bar_format='{desc}', position=slot, disable=not sys.stdout.isatty())
        for slot in range(jobs)
    ]
    for slot in range(jobs):
        slots.put(slot)
    gpus = os.environ.get(
        'CUDA_VISIBLE_DEVICES', ','.join(map(str, range(torch.cuda.device_count())))
    ).split(',')

    def end_with_parent():
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    def train_one(number):
        slot = slots.get()
        command = [
            sys.executable,
            str(ROOT / 'train.py'),
            f'--results-path={folder}',
            f'--run={number}',
            '--resume',
        ]
        environment = os.environ | {CHILD: '1'}
        environment |= {} if ':' in device else {'CUDA_VISIBLE_DEVICES': gpus[slot % len(gpus)]}
        caught = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
        before = end_with_parent if hasattr(libc, 'prctl') else None
        try:
            with subprocess.Popen(command, env=environment, preexec_fn=before, **caught) as process:
                children.append(process)
                last = collections.deque(maxlen=3)
                for line in process.stdout:
                    last.append(line)
                    if bars[slot].disable:
                        print(line, end='', flush=True)
                    else:
                        bars[slot].set_description_str(
                            line.rstrip()[: (bars[slot].ncols or 80) - 1]
                        )
            if process.returncode and not bars[slot].disable:
                bars[slot].write(''.join(last), end='')  # the bar is another network's soon
            if process.returncode < 0:
                name = signal.Signals(-process.returncode).name
                killed = (
                    f'its process was ended by {name}'
                    + ', as by the kernel for want of memory' * (name == 'SIGKILL')
                )
                again = f'go on with: {resuming(folder)} --run {number}'
                tqdm.write(
                    f'train.py: error: {runs[number - 1].name}: {killed}; {again}', sys.stderr
                )
            return process.returncode
        finally:
            slots.put(slot)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        trainings = [pool.submit(train_one, number) for number in numbers]
        try:
            concurrent.futures.wait(trainings)
        except Interrupted:
            for training in trainings:
                training.cancel()
            while concurrent.futures.wait(trainings, timeout=0.5).not_done:
                for process in children:
                    process.terminate()  # each writes its checkpoint; one that has ended is left alone
            raise
        finally:
            for bar in bars:
                bar.close()
    return int(any(training.result() for training in trainings))
