"""Measures the speed of training, evaluation and bounds: python tests/benchmark.py [--widths 16 32] [--depth 3] ...

Against a bare loop in the same process: the same network without weight normalization, logging or data handling, in the
best memory format and with the same allocator settings, on one fixed batch; on CUDA both sides replay a CUDA graph. Medians
of several repeats, in which the two sides alternate. Images are random, of MNIST's size and number; speed does not depend on
what is on them. tests/gpu.py measures with these functions too.
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


def random_dataset(device, samples=60000, test_samples=10000, shape=(1, 28, 28), classes=10):
    """A dataset as `load_dataset` gives it: a random pattern for each class, under as much noise, so that it can be learned."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(classes, *shape, generator=generator)
    dataset = SimpleNamespace(name='random', input_shape=shape, num_classes=classes)
    for part, count in (('train', samples), ('test', test_samples)):
        labels = torch.randint(classes, (count,), generator=generator)
        images = (patterns[labels] + torch.rand(count, *shape, generator=generator)) / 2
        setattr(
            dataset,
            f'{part}_images',
            images.contiguous(memory_format=torch.channels_last).to(device),
        )
        setattr(dataset, f'{part}_labels', labels.to(device))
    return dataset


def new_run(settings, dataset):
    """A training as the program makes it, before its first step, as a namespace."""
    net = initial_network(settings, dataset).train()
    optimizer = train.make_optimizer(net, settings)
    step, batch_loss = train.make_step(net, optimizer, settings, dataset)
    data = measure_data(net, dataset.train_images, skip_uncovered=True)
    steps = math.ceil(len(dataset.train_labels) / settings.batch_size)
    parts = {'net': net, 'optimizer': optimizer, 'step': step, 'batch_loss': batch_loss}
    return SimpleNamespace(**parts, data=data, settings=settings, steps=steps)


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


def seconds(call, device, count=1):
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / count


def alternate(calls, device, repeats, budget=0.4, warm_up=6):
    """The median seconds of each call, measured in turn: A B A B ..., each long enough to be timed."""
    counts = []
    for call in calls:
        for _ in range(warm_up):  # six let a CUDA graph be captured
            call()
        counts.append(max(1, int(budget / seconds(call, device))))
    times = [
        [seconds(call, device, count) for call, count in zip(calls, counts)] for _ in range(repeats)
    ]
    return [statistics.median(column) for column in zip(*times)]


def bare_step(settings, dataset, device):
    """(net, step): the network with its initial effective weights as plain parameters, and its step on one fixed batch."""
    torch.manual_seed(0)
    net = get_network(settings, dataset.input_shape, dataset.num_classes)
    for module in net:
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, 'weight')
    net.to(device, memory_format=torch.channels_last)
    rates = {
        'lr': torch.tensor(1e-4, device=device),
        'momentum': settings.momentum,
        'weight_decay': settings.weight_decay,
    }
    optimizer = torch.optim.SGD(net.parameters(), **rates, fused=True)
    images = dataset.train_images[: settings.batch_size].clone()
    targets = torch.eye(dataset.num_classes, device=device)[
        dataset.train_labels[: settings.batch_size]
    ]
    loss = LOSSES[settings.loss]

    def step(indices):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == 'bf16'):
            outputs = net(images)
        loss(outputs.float(), targets).backward()
        optimizer.step()

    return net, graphed(step, settings.batch_size, device) if device.type == 'cuda' else step


def peak_memory(device):
    """MiB, and what they are the peak of."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**20, 'of the device, for this network'
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 'of this process so far'


def measure(settings, dataset, device, repeats):
    """Seconds of a step, of an evaluated image and of the bounds, beside those of the bare loop, as a namespace.

    Its `run` is the training that was measured, after many steps, and its flops are those of an image, forward.
    """
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = new_run(settings, dataset)
    bare, step = bare_step(settings, dataset, device)
    batches = torch.randperm(len(dataset.train_images)).to(device).split(settings.batch_size)
    batches = itertools.cycle(batch for batch in batches if len(batch) == settings.batch_size)
    run.net.train()
    run.optimizer.param_groups[0]['lr'].fill_(settings.lr)
    fixed, own = next(batches), run.step
    step_s, bare_s = alternate([lambda: own(next(batches)), lambda: step(fixed)], device, repeats)

    run.net.eval()
    with torch.no_grad():
        chunk = images_per_pass(run.net, dataset.train_images)
        many = slice(
            0, chunk * (100 if device.type == 'cpu' else 10)
        )  # its end, which comes once, must not count
        images, labels = dataset.train_images[many], dataset.train_labels[many]
        loss, fixed_images = LOSSES[settings.loss], images[:chunk].clone()
        evaluated = [
            lambda: losses_and_margins(run.net, images, labels, loss),
            lambda: [bare(fixed_images) for _ in range(0, len(images), chunk)],
        ]
        eval_s, bare_eval_s = (
            value / len(images) for value in alternate(evaluated, device, repeats, 0.1, 1)
        )
    margins = torch.rand(len(dataset.train_images), dtype=torch.float64, device=device)
    (bounds_s,) = alternate(
        [lambda: evaluate_bounds(run.net, run.data, margins)], device, min(repeats, 3), 0, 1
    )

    layers = trace_layers(run.net, dataset.input_shape)
    flops = [
        2 * layer.weight.numel() * math.prod(axis.shape[1] for axis in layer.taps)
        for layer in layers
    ]
    pixels = len(dataset.train_images) + len(dataset.test_images)
    return SimpleNamespace(
        run=run, bare=bare, flops=flops, step=step_s, bare_step=bare_s, image=eval_s, bare_image=bare_eval_s, bounds=bounds_s,
        chunk=chunk, memory=peak_memory(device), epoch=run.steps * step_s + pixels * eval_s + bounds_s,
    )  # fmt: skip


def convolution_rate(table, dataset, device, repeats):
    """FLOP/s of the second convolution (of the only one, if so) forward, over those of a 2048 x 2048 matrix product."""
    index = min(1, table.run.settings.depth - 1)
    batch = dataset.train_images[: table.run.settings.batch_size]
    matrix = torch.rand(2048, 2048, device=device)
    with torch.no_grad():
        convolution, features = table.bare[2 * index], table.bare[: 2 * index](batch)
        conv_s, matrix_s = alternate(
            [lambda: convolution(features), lambda: matrix @ matrix], device, repeats
        )
    matrix_rate = 2 * 2048**3 / matrix_s
    return len(batch) * table.flops[index] / conv_s / matrix_rate, matrix_rate


def report(table):
    """The lines of a network."""
    batch, forward = table.run.settings.batch_size, sum(table.flops)
    training = 3 * forward - table.flops[0]  # no gradient of the images
    return [
        table.run.settings.name,
        f'  training    {batch / table.step:10.0f} samples/s {batch * training / table.step / 1e9:9.1f} GFLOP/s'
        f'   {table.step / table.bare_step:5.2f} times the bare step of {table.bare_step * 1e3:.3f} ms',
        f'  evaluation  {1 / table.image:10.0f} samples/s {forward / table.image / 1e9:9.1f} GFLOP/s'
        f'   {table.image / table.bare_image:5.2f} times the bare evaluation, batches of {table.chunk}',
        f'  bounds      {table.bounds:10.3f} s an epoch, {100 * table.bounds / table.epoch:.1f} % of it',
        f'  epoch       {table.epoch:10.1f} s with errors on all images and every bound',
        f'  memory      {table.memory[0]:10.0f} MiB at the peak {table.memory[1]}',
    ]


def start_up():
    """Seconds from the command to the first training step of the quick start, in a process of its own."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
def first_step(batch):
    raise SystemExit
train.make_step = lambda *arguments: (first_step, None)
train.main({['--settings', str(ROOT / 'conf' / 'digits.py'), '--results-path']!r} + [sys.argv[1]])
raise AssertionError('no step was taken')
"""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, '-c', code, f'{folder}/run'], stdout=subprocess.DEVNULL, check=True
        )
        return time.perf_counter() - start


def device_name(device):
    return (
        torch.cuda.get_device_name(device)
        if device.type == 'cuda'
        else f'{torch.get_num_threads()} threads'
    )


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
    print(
        f'start-up to the first step, evaluation of epoch 0 included: {statistics.median(start_up() for _ in range(3)):.1f} s'
    )
    dataset = random_dataset(device)
    flags = {'depth': options.depth, 'width': options.widths, 'precision': options.precision}
    for settings in load_settings(flags=flags)[1]:
        table = measure(settings, dataset, device, options.repeats)
        share, rate = convolution_rate(table, dataset, device, options.repeats)
        lines = report(table)
        lines.insert(
            3,
            f'  convolution {share:10.2f} of the rate of a 2048 x 2048 matrix product, {rate / 1e9:.0f} GFLOP/s',
        )
        print('\n'.join(lines), flush=True)


if __name__ == '__main__':
    main()
