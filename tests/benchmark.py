"""Measures the speed of training, evaluation and bounds: python tests/benchmark.py [--widths 16 32]

The bare loop beside it runs in the same process: the same network without weight normalization,
logging or data handling, in the same memory format and with the same allocator settings, on one
fixed batch; on CUDA both sides replay a CUDA graph. Times are medians of several repeats, in which
the two sides alternate. Images are random, of MNIST's size and number; speed does not depend on
what they show. tests/gpu.py measures with these functions too.
"""

import argparse
import itertools
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

import train  # noqa: E402
from conf import load_settings  # noqa: E402
from device import choose_device, graphed, keep_freed_memory  # noqa: E402
from evaluation import LOSSES, initial_network, losses_and_margins  # noqa: E402
from measures.norms import measure_data  # noqa: E402
from measures.trace import images_per_pass, trace_layers  # noqa: E402
from models import get_network  # noqa: E402
from utils import evaluate_bounds  # noqa: E402

# Runs the quick start up to its first training step, in the folder that it is given.
FIRST_STEP = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
def first_step(batch):
    raise SystemExit
train.make_step = lambda *arguments: (first_step, None)
train.main([{f'--settings={ROOT}/conf/digits.py'!r}, '--results-path=' + sys.argv[1]])
raise AssertionError('no step was taken')
"""


def random_dataset(device, samples=60000, test_samples=10000, shape=(1, 28, 28), classes=10):
    """A dataset as `load_dataset` returns it, of a random pattern per class under noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(classes, *shape, generator=generator)

    def draw(count):
        labels = torch.randint(classes, (count,), generator=generator)
        images = (patterns[labels] + torch.rand(count, *shape, generator=generator)) / 2
        return images.contiguous(memory_format=torch.channels_last).to(device), labels.to(device)

    dataset = SimpleNamespace(name='random', input_shape=shape, num_classes=classes)
    dataset.train_images, dataset.train_labels = draw(samples)
    dataset.test_images, dataset.test_labels = draw(test_samples)
    return dataset


def new_run(settings, dataset):
    """A namespace of what `train.train` makes before its first step."""
    run = SimpleNamespace(settings=settings)
    run.net = initial_network(settings, dataset).train()
    run.optimizer = train.make_optimizer(run.net, settings)
    run.step, run.batch_loss = train.make_step(run.net, run.optimizer, settings, dataset)
    run.data = measure_data(run.net, dataset.train_images, skip_uncovered=True)
    return run


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


def seconds(call, device, count=1):
    """Mean seconds of a call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / count


def alternate(calls, device, repeats, budget=0.4, warm_up=6):
    """Median seconds of each call. They are timed in turn (A B A B ...), each for `budget` seconds.

    Six calls of warm-up let a CUDA graph be captured.
    """
    counts = []
    for call in calls:
        for _ in range(warm_up):
            call()
        counts.append(max(1, int(budget / seconds(call, device))))
    times = [[] for _ in calls]
    for _ in range(repeats):
        for call, count, measured in zip(calls, counts, times):
            measured.append(seconds(call, device, count))
    return [statistics.median(measured) for measured in times]


def bare_step(settings, dataset, device):
    """(net, step): the network with its effective weights as plain parameters, and its step."""
    torch.manual_seed(0)
    net = get_network(settings, dataset.input_shape, dataset.num_classes)
    for module in net:
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, 'weight')
    net.to(device, memory_format=torch.channels_last)
    # A small learning rate, so that many steps on one batch stay finite.
    lr = torch.tensor(1e-4, device=device)
    options = {'momentum': settings.momentum, 'weight_decay': settings.weight_decay}
    optimizer = torch.optim.SGD(net.parameters(), lr, **options, fused=True)
    batch = settings.batch_size
    images = dataset.train_images[:batch].clone()
    targets = torch.eye(dataset.num_classes, device=device)[dataset.train_labels[:batch]]
    loss = LOSSES[settings.loss]

    def step(indices):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == 'bf16'):
            outputs = net(images)
        loss(outputs.float(), targets).backward()
        optimizer.step()

    if device.type == 'cuda':
        step = graphed(step, batch, device)
    return net, step


def peak_memory(device):
    """(MiB, what they are the peak of)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20, 'of the device, for this network'
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 'of this process so far'


def measure(settings, dataset, device, repeats):
    """Times of one network, as a namespace.

    Returns:
        run: the training that was measured, after many steps.
        step, bare_step: seconds of a training step and of the bare loop's.
        image, bare_image: seconds per evaluated image and of the bare network.
        bounds, epoch: seconds of all bounds and of an epoch with evaluation and bounds.
        flops: those of each layer for an image, forward.
        chunk: images per batch of an evaluation.
        memory: as `peak_memory` returns it.
    """
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    table = SimpleNamespace(run=new_run(settings, dataset))
    net = table.run.net
    bare, step = bare_step(settings, dataset, device)
    batches = torch.randperm(len(dataset.train_images)).to(device).split(settings.batch_size)
    whole = itertools.cycle(batch for batch in batches if len(batch) == settings.batch_size)
    fixed = next(whole)
    calls = [lambda: table.run.step(next(whole)), lambda: step(fixed)]
    table.step, table.bare_step = alternate(calls, device, repeats)

    # Many batches, so that what an evaluation does once, at its end, does not count.
    net.eval()
    table.chunk = chunk = images_per_pass(net, dataset.train_images)
    count = min(len(dataset.train_images), chunk * (100 if device.type == 'cpu' else 10))
    images, labels = dataset.train_images[:count], dataset.train_labels[:count]
    loss, fixed_images = LOSSES[settings.loss], images[:chunk].clone()

    def evaluate_bare():
        for _ in range(0, count, chunk):
            bare(fixed_images)

    calls = [lambda: losses_and_margins(net, images, labels, loss), evaluate_bare]
    with torch.no_grad():
        times = alternate(calls, device, repeats, 0.1, 1)
    table.image, table.bare_image = [value / count for value in times]
    margins = torch.rand(len(dataset.train_images), dtype=torch.float64, device=device)
    calls = [lambda: evaluate_bounds(net, table.run.data, margins)]
    table.bounds = alternate(calls, device, min(repeats, 3), 0, 1)[0]

    table.flops = []
    for layer in trace_layers(net, dataset.input_shape):
        positions = math.prod(axis.shape[1] for axis in layer.taps)
        table.flops.append(2 * layer.weight.numel() * positions)
    table.memory = peak_memory(device)
    evaluated = len(dataset.train_images) + len(dataset.test_images)
    table.epoch = len(batches) * table.step + evaluated * table.image + table.bounds
    return table


def report(table):
    """The lines of a network."""
    batch = table.run.settings.batch_size
    forward = sum(table.flops)
    training = 3 * forward - table.flops[0]  # no gradient of the images

    def line(what, rate, flops, ratio, text):
        speed = f'{rate:10.0f} samples/s {rate * flops / 1e9:9.1f} GFLOP/s'
        return f'  {what:11} {speed}   {ratio:5.2f} times the bare {text}'

    step_text = f'step of {table.bare_step * 1e3:.3f} ms'
    step_ratio, image_ratio = table.step / table.bare_step, table.image / table.bare_image
    text = f'evaluation, batches of {table.chunk}'
    share = 100 * table.bounds / table.epoch
    peak, of_what = table.memory
    return [
        table.run.settings.name,
        line('training', batch / table.step, training, step_ratio, step_text),
        line('evaluation', 1 / table.image, forward, image_ratio, text),
        f'  bounds      {table.bounds:10.3f} s an epoch, {share:.1f} % of it',
        f'  epoch       {table.epoch:10.1f} s with errors on all images and every bound',
        f'  memory      {peak:10.0f} MiB at the peak {of_what}',
    ]


def start_up():
    """Seconds from the command to the first training step of the quick start."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-c', FIRST_STEP, f'{folder}/run']
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - start


def device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{torch.get_num_threads()} threads'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--widths', type=int, nargs='+', default=[16, 32, 64, 200])
    parser.add_argument('--depth', type=int, default=3)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--precision', default='auto')
    options = parser.parse_args()
    keep_freed_memory()
    device = choose_device(options.device)
    what = f'precision {options.precision}, medians of {options.repeats}'
    print(f'torch {torch.__version__}, {device}, {device_name(device)}, {what}')
    started = statistics.median(start_up() for _ in range(3))
    print(f'start-up to the first step, evaluation of epoch 0 included: {started:.1f} s')
    dataset = random_dataset(device)
    flags = {'depth': options.depth, 'width': options.widths, 'precision': options.precision}
    for settings in load_settings(flags=flags)[1]:
        table = measure(settings, dataset, device, options.repeats)
        print('\n'.join(report(table)), flush=True)


if __name__ == '__main__':
    main()
