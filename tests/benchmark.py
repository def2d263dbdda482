"""Measures the speed of training, evaluation and bounds: python tests/benchmark.py [--widths 16 32] [--depth 3] ...

Against a bare loop in the same process: the same network without weight normalization, logging or data handling, in the
best memory format and with the same allocator settings, on one fixed batch. Medians of several repeats, in which the two
sides alternate. Images are random, of MNIST's size and number; speed does not depend on what is on them.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402

import train  # noqa: E402
from conf import load_settings  # noqa: E402
from models import get_network  # noqa: E402
from utils import evaluate_bounds, measure_data, trace_layers  # noqa: E402

SHAPE, CLASSES, TRAIN, TEST = (1, 28, 28), 10, 60000, 10000


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


def seconds(call, device, count):
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / count


def alternate(calls, device, repeats, budget=0.4):
    """The median seconds of each call, measured in turn: A B A B ..., each long enough to be timed."""
    counts = []
    for call in calls:
        for _ in range(6):  # warm up, and let a CUDA graph be captured
            call()
        counts.append(max(1, int(budget / seconds(call, device, 3))))
    times = [[seconds(call, device, count) for call, count in zip(calls, counts)] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)]


def bare_network(settings, device):
    """The network with its initial effective weights as plain parameters."""
    torch.manual_seed(0)
    net = get_network(settings, SHAPE, CLASSES)
    for module in net:
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, 'weight')
    return net.to(device, memory_format=torch.channels_last)


def benchmark(settings, device, repeats):
    bf16 = train.choose_precision(settings.precision, device)
    torch.manual_seed(0)
    net = get_network(settings, SHAPE, CLASSES).to(device, memory_format=torch.channels_last)
    images = torch.rand(TRAIN, *SHAPE, device=device)
    labels = torch.randint(CLASSES, (TRAIN,), device=device)
    targets = torch.eye(CLASSES, device=device)[labels]
    rates = {'lr': 1e-4, 'momentum': 0.9, 'weight_decay': 3e-3}
    batch, chunk = settings.batch_size, train.EVAL_BATCH[device.type]

    optimizer = torch.optim.SGD(net.parameters(), **rates, fused=True)
    plain_step = train.make_step(net, optimizer, F.mse_loss, images, targets, torch.zeros((), device=device), bf16)
    step = train.graphed(plain_step, optimizer, batch, device) if device.type == 'cuda' else plain_step
    batches = itertools.cycle(torch.randperm(TRAIN, device=device).split(batch))

    bare = bare_network(settings, device)
    bare_optimizer = torch.optim.SGD(bare.parameters(), **rates, fused=True)
    fixed, fixed_targets = images[:batch].clone(), targets[:batch].clone()

    def bare_step():
        bare_optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = bare(fixed)
        F.mse_loss(outputs.float(), fixed_targets).backward()
        bare_optimizer.step()

    few = slice(0, 100 * chunk)  # what an evaluation does at its end, once, is in these 100 batches

    fixed_chunk = images[:chunk].clone()

    @torch.no_grad()
    def bare_evaluation():
        for _ in range(100):
            bare(fixed_chunk)

    def evaluation():
        train.evaluate(net, images[few], labels[few], targets[few], F.mse_loss)

    layers = trace_layers(net, SHAPE)
    flops = [2 * math.prod(layer.shape) * math.prod(axis.shape[1] for axis in layer.taps) for layer in layers]
    forward = sum(flops)
    training = 3 * forward - flops[0]  # no gradient of the images

    step_s, bare_s = alternate([lambda: step(next(batches)), bare_step], device, repeats)
    eval_s, bare_eval_s = (value / (100 * chunk) for value in alternate([evaluation, bare_evaluation], device, repeats, 0.1))
    data, margins = measure_data(net, images), torch.rand(TRAIN, device=device)
    (bounds_s,) = alternate([lambda: evaluate_bounds(net, data, margins)], device, min(repeats, 3), 0)

    index = min(1, settings.depth - 1)  # the second convolution, where there is one
    convolution, features = bare[2 * index], bare[: 2 * index](fixed).detach()
    conv_flop = batch * flops[index]
    matrix = torch.rand(2048, 2048, device=device)
    with torch.no_grad():
        conv_s, matrix_s = alternate([lambda: convolution(features), lambda: matrix @ matrix], device, repeats)

    steps = -(-TRAIN // batch)
    epoch = steps * step_s + (TRAIN + TEST) * eval_s + bounds_s
    matrix_rate = 2 * 2048**3 / matrix_s
    if device.type == 'cuda':
        memory, where = torch.cuda.max_memory_allocated() / 2**20, 'of the device'
    else:
        memory, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 'of this process so far'
    for line in (
        f'CONV-{settings.depth}-{settings.width}',
        f'  training    {batch / step_s:10.0f} samples/s {batch * training / step_s / 1e9:9.1f} GFLOP/s'
        f'   {step_s / bare_s:5.2f} times the bare step of {bare_s * 1e3:.3f} ms',
        f'  evaluation  {1 / eval_s:10.0f} samples/s {forward / eval_s / 1e9:9.1f} GFLOP/s'
        f'   {eval_s / bare_eval_s:5.2f} times the bare evaluation',
        f'  convolution {conv_flop / conv_s / matrix_rate:10.2f} of the rate of a 2048 x 2048 matrix product, '
        f'{matrix_rate / 1e9:.0f} GFLOP/s',
        f'  bounds      {bounds_s:10.3f} s an epoch, {100 * bounds_s / epoch:.1f} % of it',
        f'  epoch       {epoch:10.1f} s with errors on {TRAIN} + {TEST} images and every bound',
        f'  memory      {memory:10.0f} MiB at the peak {where}',
    ):
        print(line, flush=True)


def start_up():
    """Seconds from the command to the first training step of the quick start, in a process of its own."""
    code = f"""
import sys, time, types
sys.path.insert(0, {str(ROOT)!r})
import train
def first_step(*arguments):
    raise SystemExit
train.make_step = lambda *arguments: first_step
sys.exit(train.main({['--settings', str(ROOT / 'conf' / 'digits.py'), '--results-path']!r} + [sys.argv[1]]))
"""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, '-c', code, f'{folder}/run'], stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--widths', type=int, nargs='+', default=[16, 32, 64, 200])
    parser.add_argument('--depth', type=int, default=3)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--precision', default='auto')
    options = parser.parse_args()
    train.keep_freed_memory()
    device = train.choose_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} threads'
    print(f'torch {torch.__version__}, {device}, {name}, precision {options.precision}, medians of {options.repeats}')
    print(
        f'start-up to the first step, evaluation of epoch 0 included: {statistics.median(start_up() for _ in range(3)):.1f} s'
    )
    flags = {'depth': options.depth, 'width': options.widths, 'precision': options.precision}
    for settings in load_settings(flags=flags)[1]:
        benchmark(settings, device, options.repeats)


if __name__ == '__main__':
    main()
