"""Checks and measures this program on a GPU: python tests/gpu.py, about ten minutes.

Prints the losses of a training with a CUDA graph beside those without; the speed of steps,
evaluations, bounds and a certificate of CONV-3-H, beside a bare loop that is a CUDA graph too;
memory; how long the paper's networks would train; and the kernels that take longest. Images are
random, of MNIST's size and number. Without a GPU it says so and exits with 2.
"""

import math
import sys

import torch
from benchmark import device_name, measure, new_run, peak_memory, random_dataset, report, seconds
from tqdm import tqdm

import train
from conf import load_settings
from device import choose_device
from evaluation import evaluate
from measures.pac_bayes import certify

# Allowed relative difference of a loss beyond that of two plain trainings. A GPU adds in any
# order, and differences grow over 24 steps.
TOLERANCE = {'float32': 1e-4, 'tf32': 1e-3, 'bf16': 1e-2}


def plain_step(run, batch):
    """A training step without a CUDA graph."""
    run.optimizer.zero_grad()
    run.batch_loss(batch).backward()
    run.optimizer.step()


def losses(settings, dataset, graph):
    """The loss before each step of a training with evaluations between its epochs."""
    run, values = new_run(settings, dataset), []

    def step(batch):
        values.append(run.batch_loss(batch).item())
        if graph:
            run.step(batch)
        else:
            plain_step(run, batch)

    parts = run.net, run.optimizer, step, run.batch_loss, settings, dataset
    state = {'train_loss': math.inf, 'train_seconds': 0.0}
    for epoch in range(1, settings.epochs + 1):
        state['step'] = 0
        train.train_epoch(*parts, epoch, state, tqdm(disable=True))
        evaluate(run.net, settings, dataset, run.data, 0, epoch)
    return torch.tensor(values, dtype=torch.float64)


def compare(precision, device):
    """(graph to plain, plain to plain): largest relative difference of the losses of 24 steps.

    Every sixth step is on a smaller batch and before an evaluation; the learning rate changes
    after 12 steps, the masks after every fifth; images are cropped.
    """
    flags = {'precision': precision, 'width': 32, 'epochs': 4, 'milestones': [2]}
    flags |= {'density': 0.5, 'initial_mask': 'erk', 'regrow': 'random', 'regrow_every': 5}
    flags |= {'augment': 'crop', 'certify_every': 0}
    settings = load_settings(flags=flags)[1][0]
    dataset = random_dataset(device, 5 * 32 + 16, 64)
    graph, plain, again = [losses(settings, dataset, graph) for graph in (True, False, False)]
    return [((other - plain).abs() / plain).max().item() for other in (graph, again)]


def print_certificate(table, dataset, device):
    """Certifies the network that was measured; returns the seconds that it took."""
    images, labels = dataset.train_images, dataset.train_labels
    net, found = table.run.net.eval(), {}
    took = seconds(lambda: found.update(certify(net, images, labels)), device)
    passes = f'that of {took / table.image / len(images):.1f} evaluations of the training set'
    print(f'  certificate {took:10.1f} s, {passes}; it says {found["pac_bayes_error"]:.3f}')
    peak = f'{peak_memory(device)[0]:10.0f} MiB at the peak'
    print(f'  memory      {peak}, the certificate included', flush=True)
    return took


def print_kernels(settings, dataset, device, steps=30):
    """Prints the twelve kernels of a plain training step that take longest."""
    run = new_run(settings, dataset)
    indices = torch.arange(settings.batch_size, device=device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    kind, time = 'CPU', 'self_cpu_time_total'
    if device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        kind, time = 'CUDA', 'self_device_time_total'
    seconds(lambda: plain_step(run, indices), device, 3)  # sets up kernels and momentum
    with torch.profiler.profile(activities=activities) as profiler:
        seconds(lambda: plain_step(run, indices), device, steps)
    kernels = []
    for event in profiler.key_averages():
        if event.device_type.name == kind:
            kernels.append((getattr(event, time) / steps, event.count / steps, event.key))
    total = sum(took for took, _, _ in kernels)
    calls = sum(count for _, count, _ in kernels)
    text = f'{calls:.0f} kernels in {total:.0f} us a plain step; share, calls, name'
    print(f'{settings.name}: {text}')
    for took, count, name in sorted(kernels, reverse=True)[:12]:
        print(f'  {100 * took / total:5.1f} % {count:6.1f}  {name[:100]}')


def survey(device, widths, samples, test_samples, certified, repeats=5):
    """Prints everything of CONV-3-H for these widths; those up to `certified` are certified."""
    versions = f'torch {torch.__version__}, CUDA {torch.version.cuda}'
    print(f'{versions}, cuDNN {torch.backends.cudnn.version()}, {device_name(device)}')
    print('\n24 losses with a CUDA graph, the largest relative difference from plain steps')
    print('(and of two plain trainings):')
    for precision in TOLERANCE:
        if precision == 'tf32' and device.type != 'cuda':
            continue
        graph, plain = compare(precision, device)
        verdict = 'equal' if graph <= plain + TOLERANCE[precision] else 'DIFFERENT'
        print(f'  {precision:10} {graph:.1e} ({plain:.1e}) {verdict}', flush=True)

    dataset, hours, passes = random_dataset(device, samples, test_samples), [], 0.0
    runs = load_settings(flags={'width': widths})[1]
    for settings in runs:
        table = measure(settings, dataset, device, repeats)
        print('\n' + '\n'.join(report(table)), flush=True)
        # The time of a certificate of a wider network is estimated from the widest certified one.
        if settings.width <= certified:
            shown = settings
            passes = print_certificate(table, dataset, device) / table.image
        training = settings.epochs * table.epoch / 3600
        certificates = settings.epochs // 10 * passes * table.image / 3600
        text = f'{training:6.2f} h, and {certificates:.2f} h of certificates'
        hours.append(f'  {settings.name:12} {text}')
        del table  # and with it the memory of its graph
    print(f'\n{runs[0].epochs} epochs, with all bounds at each and a certificate at every tenth:')
    print(*hours, '', sep='\n')
    print_kernels(shown, dataset, device)


def main():
    if not torch.cuda.is_available():
        text = 'torch finds no GPU on this machine; tests/benchmark.py measures a CPU'
        print(f'tests/gpu.py: {text}', file=sys.stderr)
        return 2
    survey(choose_device('auto'), [32, 200, 600, 1000], 60000, 10000, certified=200)
    return 0


if __name__ == '__main__':
    sys.exit(main())
