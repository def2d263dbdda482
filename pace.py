"""How long a training takes, as it is shown: the time of the whole run, its bar, a beat of long evaluations."""

import contextlib
import copy
import statistics
import sys
import threading
import time

import torch
from tqdm import tqdm

from evaluation import due, schedule
from measures.trace import images_per_pass


def say_pace(run):
    """Says, on a CPU, what an epoch, an evaluation and what is left of a run of more than a minute will take.

    From a few batches of each, on a copy of the network.
    """
    places, images = list(run.places()), run.dataset.train_images
    if images.device.type != 'cpu' or not places:
        return
    net = copy.deepcopy(run.net).train()
    indices = torch.arange(min(run.settings.batch_size, len(images)))
    part = images_per_pass(net, images)
    step = _seconds(lambda: run.loss(net, indices).backward()) * run.steps
    forward = _seconds(torch.no_grad()(lambda: net(images[:part])))
    evaluation = forward * (len(images) + len(run.dataset.test_images)) / part
    evaluations = sum(
        due(epoch, run.settings.eval_every, run.settings.epochs) for _, epoch in places
    )
    epochs = sum(epoch > 0 for _, epoch in places)
    left = epochs * step + evaluations * evaluation
    if left > 60:
        words = f'an epoch takes about {in_words(step)}, an evaluation {in_words(evaluation)}'
        words += ' and more with certificates' * bool(run.settings.certify_every)
        quicker = '; a GPU is quicker, and so is --settings conf/mnist_quick.py' * (left > 86400)
        print(
            f'{run.settings.name}: {words}; {epochs} epochs: about {in_words(left)} on this CPU{quicker}',
            flush=True,
        )


def _seconds(compute, repeats=5):
    """The median time of a computation, the first one, which sets things up, left out."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        compute()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def in_words(seconds):
    """A duration in the unit that suits it: 45 s, 12 min, 82 h."""
    for unit, size in (('s', 1), ('min', 60)):
        if seconds < 120 * size:
            return f'{seconds / size:.{1 if seconds < 2 else 0}f} {unit}'
    return f'{seconds / 3600:.0f} h'


def progress_bar(run):
    """One line that fills up, on a terminal; it counts steps and shows epochs."""
    left, whole = (
        sum(epoch > 0 for _, epoch in places) for places in (run.places(), schedule(run.settings))
    )
    return tqdm(
        desc=run.settings.name,
        total=whole * run.steps,
        initial=(whole - left) * run.steps + run.state['step'] * (run.state['epoch'] > 0),
        unit_scale=1 / run.steps,
        bar_format='{desc} {percentage:3.0f}%|{bar:10}| epoch {n:.2f}/{total:.0f} [{elapsed}<{remaining}]{postfix}',
        dynamic_ncols=True,
        disable=not sys.stdout.isatty(),
    )


@contextlib.contextmanager
def heartbeat(beat, seconds):
    """Calls `beat(seconds so far)` every so many seconds, from a thread of its own, while the block computes."""
    over, start = threading.Event(), time.monotonic()

    def run():
        while not over.wait(seconds):
            beat(time.monotonic() - start)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
