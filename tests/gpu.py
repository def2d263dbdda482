"""What a GPU makes of this program, to be read or pasted: python tests/gpu.py, about ten minutes.

The losses of a training with a CUDA graph beside those without; steps, evaluations, bounds and a certificate of CONV-3-H, the
steps beside a bare loop that is a CUDA graph too; memory; how long the paper's three networks would train; and the kernels
that take longest. Images are random, of MNIST's size and number. Without a GPU it says so and ends with 2. Its functions take
any device and any size.
"""

import math
import sys

import torch
from benchmark import (
    device_name,
    measure,
    new_run,
    peak_memory,
    random_dataset,
    report,
    seconds,
    synchronize,
)
from tqdm import tqdm

import train
from conf import load_settings
from device import choose_device
from evaluation import evaluate
from measures.pac_bayes import certify

# Of a loss, relative, beyond what two plain trainings differ by: atomic sums of a GPU come in any order, and 24 steps add up.
TOLERANCE = {'float32': 1e-4, 'tf32': 1e-3, 'bf16': 1e-2}


def settings_of(**flags):
    return load_settings(flags=flags)[1][0]


def losses(settings, dataset, graph):
    """The loss before each step of a training with evaluations between its epochs."""
    run, values = new_run(settings, dataset), []

    def plain(batch):
        run.optimizer.zero_grad()
        run.batch_loss(batch).backward()
        run.optimizer.step()

    def noted(batch):
        values.append(run.batch_loss(batch).item())
        (run.step if graph else plain)(batch)

    state = {'train_loss': math.inf, 'train_seconds': 0.0}
    for epoch in range(1, settings.epochs + 1):
        state['step'] = 0
        train.train_epoch(
            run.net,
            run.optimizer,
            noted,
            run.batch_loss,
            settings,
            dataset,
            epoch,
            state,
            tqdm(disable=True),
        )
        evaluate(run.net, settings, dataset, run.data, 0, epoch)
    return torch.tensor(values, dtype=torch.float64)


def compare(precision, device, width=32):
    """(graph to plain, plain to plain): the largest relative difference of the losses of 24 steps.

    Every sixth is on an uneven batch and before an evaluation; the rate changes after 12, the masks after every fifth;
    images are cropped.
    """
    flags = {
        'precision': precision,
        'width': width,
        'epochs': 4,
        'milestones': [2],
        'certify_every': 0,
    }
    flags |= {
        'density': 0.5,
        'initial_mask': 'erk',
        'regrow': 'random',
        'regrow_every': 5,
        'augment': 'crop',
    }
    settings, dataset = settings_of(**flags), random_dataset(device, 5 * 32 + 16, 64)
    graph, plain, again = (losses(settings, dataset, graph) for graph in (True, False, False))
    return tuple(((other - plain).abs() / plain).max().item() for other in (graph, again))


def certificate(run, dataset, device):
    """(seconds, value) of the certificate of the network that a training has arrived at."""
    found = {}
    images, labels = dataset.train_images, dataset.train_labels
    took = seconds(
        lambda: found.update(certify(run.net.eval(), images, labels, run.settings.delta)), device
    )
    return took, found['pac_bayes_error']


def longest_kernels(settings, dataset, device, steps=30, count=12):
    """Lines on the kernels of a plain training step: share of its time, calls, name."""
    run, cuda = new_run(settings, dataset), device.type == 'cuda'
    run.net.train()
    step = run.step
    indices = torch.arange(settings.batch_size, device=device)
    for _ in range(3):
        step(indices)
    activities = [torch.profiler.ProfilerActivity.CPU] + [
        torch.profiler.ProfilerActivity.CUDA
    ] * cuda
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step(indices)
        synchronize(device)
    kind, time = ('CUDA', 'self_device_time_total') if cuda else ('CPU', 'self_cpu_time_total')
    kernels = [
        (getattr(event, time), event)
        for event in profiler.key_averages()
        if event.device_type.name == kind
    ]
    total, calls = sum(took for took, _ in kernels), sum(event.count for _, event in kernels)
    lines = [
        f'{settings.name}: {calls / steps:.0f} kernels in {total / steps:.0f} us a plain step; share, calls, name'
    ]
    for took, event in sorted(kernels, key=lambda kernel: -kernel[0])[:count]:
        lines.append(f'  {100 * took / total:5.1f} % {event.count / steps:6.1f}  {event.key[:100]}')
    return lines


def survey(device, widths, samples, test_samples, certified, repeats=5):
    """Prints everything, as it comes, of CONV-3-H for these widths; those up to `certified` are certified."""
    versions = f'torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}'
    print(f'{versions}, {device_name(device)}')
    print(
        '\n24 losses with a CUDA graph, the largest relative difference from plain steps (and of two plain trainings):'
    )
    for precision in ('float32', 'tf32', 'bf16') if device.type == 'cuda' else ('float32', 'bf16'):
        graph, plain = compare(precision, device)
        verdict = 'equal' if graph <= plain + TOLERANCE[precision] else 'DIFFERENT'
        print(f'  {precision:10} {graph:.1e} ({plain:.1e}) {verdict}', flush=True)

    dataset, passes, lines = random_dataset(device, samples, test_samples), 0.0, []
    for settings in load_settings(flags={'width': widths})[1]:
        table = measure(settings, dataset, device, repeats)
        print('\n' + '\n'.join(report(table)), flush=True)
        if settings.width <= certified:
            took, value = certificate(table.run, dataset, device)
            passes = took / table.image / samples
            print(
                f'  certificate {took:10.1f} s, that of {passes:.1f} evaluations of the training set; it says {value:.3f}'
            )
            print(
                f'  memory      {peak_memory(device)[0]:10.0f} MiB at the peak, the certificate included',
                flush=True,
            )
        hours = settings.epochs * table.epoch / 3600
        certificates = settings.epochs // 10 * passes * samples * table.image / 3600
        lines.append(
            f'  {settings.name:12} {hours:6.2f} h, and {certificates:.2f} h of certificates'
        )
        del table  # and with it the memory of its graph
    print(
        f'\n{settings.epochs} epochs, with every bound at each and a certificate at every tenth:',
        *lines,
        '',
        sep='\n',
    )
    shown = max(width for width in widths if width <= certified)
    print(*longest_kernels(settings_of(width=shown), dataset, device), sep='\n')


def main():
    if not torch.cuda.is_available():
        print(
            'tests/gpu.py: torch finds no GPU on this machine; tests/benchmark.py measures a CPU',
            file=sys.stderr,
        )
        return 2
    survey(
        choose_device('auto'),
        [32, 200, 600, 1000],
        samples=60000,
        test_samples=10000,
        certified=200,
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
