"""The machine that trains: device, precision, CUDA graph, memory."""

import ctypes
import functools
import os
import re
from pathlib import Path

import torch
from tqdm import tqdm

from conf import BadInput
from measures.trace import activations


def keep_freed_memory():
    """Lets glibc keep freed memory.

    Otherwise it returns each batch's activations to the kernel, which clears the pages again for
    the next batch; at small widths that takes longer than the computation.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest that it accepts, in bytes


@functools.lru_cache
def choose_device(name):
    """The torch.device of the setting `device`. Raises BadInput if this machine cannot use it."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    match = re.fullmatch(r'cpu|cuda(?::(\d+))?', name)
    if not match or (name != 'cpu' and int(match[1] or 0) >= torch.cuda.device_count()):
        raise BadInput(f'device = {name!r}: not on this machine; use auto, cpu, cuda or cuda:N')
    if name == 'cpu':
        return torch.device('cpu')
    device = torch.device(f'cuda:{match[1] or 0}')  # set_device wants the number
    try:
        torch.cuda.set_device(device)  # graphs are captured on the current device
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        reason = str(error).strip().partition('\n')[0]
        message = f'torch {torch.__version__} cannot use this GPU ({reason}); use cpu'
        raise BadInput(f'device = {name!r}: {message}') from None
    return device


def choose_precision(name, device):
    """Sets how float32 products are computed on CUDA; training in bfloat16 is up to autocast."""
    if name == 'tf32' and device.type != 'cuda':
        raise BadInput("precision = 'tf32': a CPU has no TF32; use auto, float32 or bf16")
    precision = 'tf32' if device.type == 'cuda' and name != 'float32' else 'ieee'
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


def _cpu_info():
    try:
        return Path('/proc/cpuinfo').read_text()
    except OSError:
        return ''


def has_bfloat16_units():
    """Whether this CPU multiplies matrices in bfloat16 faster than in float32 (AMX)."""
    return ' amx_bf16' in _cpu_info()


def describe_machine(device):
    """{what the last digits of a training depend on: its value}, as texts and numbers."""
    if device.type == 'cuda':
        processor = torch.cuda.get_device_name(device)
    else:
        # One name covers several generations, which round differently: the numbers tell them apart.
        fields = dict(re.findall(r'^([a-z ]+?)\s*: (.*)$', _cpu_info(), re.M))
        number = '-'.join(fields.get(name, '?') for name in ('cpu family', 'model', 'stepping'))
        processor = f'{fields.get("model name", "CPU")} {number}'
        processor += f', {torch.backends.cpu.get_cpu_capability()}'
    version = str(torch.__version__)
    return {'processor': processor, 'threads': torch.get_num_threads(), 'torch': version}


def graphed(step, batch_size, device):
    """The training step as a CUDA graph: call it as `step`, with the indices (B,) of a batch.

    The first three steps are plain ones, which set up kernels, workspaces and momentum; so is
    a last, smaller batch. Plain steps run on the stream of the capture, since gradients are
    accumulated on the stream that they came from. What changes from step to step (indices,
    learning rate, masks) lies in tensors that the graph reads, so that it is captured once. If the
    capture fails, every step is a plain one.
    """
    indices = torch.zeros(batch_size, dtype=torch.int64, device=device)
    stream = torch.cuda.Stream()
    graph, failed, plain_steps = None, False, 0

    def capture():
        nonlocal graph, failed
        before, captured = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, stream=stream):
                step(indices)
            graph = captured
        except RuntimeError as error:
            torch.cuda.set_stream(before)
            failed = True
            reason = str(error.__context__ or error).strip().partition('\n')[0]
            tqdm.write(f'no CUDA graph, which could not be captured ({reason}); training is slower')

    def call(batch):
        nonlocal plain_steps
        whole = len(batch) == batch_size
        if whole and plain_steps >= 3 and graph is None and not failed:
            capture()
        if whole and graph is not None:
            indices.copy_(batch)
            graph.replay()
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(batch)
        torch.cuda.current_stream().wait_stream(stream)
        plain_steps += 1

    return call


def check_memory(settings, net, image, batch, device):
    """Raises BadInput if weights and one batch's activations exceed the machine's memory."""
    weights = 12 * sum(weight.numel() for weight in net.parameters())  # values, gradients, momentum
    features = 4 * batch * sum(activations(net.eval(), image))
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if device.type == 'cuda':
        memory = torch.cuda.mem_get_info(device)[1]
    if weights + features > memory:
        large = f'width = {settings.width}'
        if features > weights:
            large = f'batch_size = {settings.batch_size}'
        needed = f'training takes at least {(weights + features) / 2**30:.1f} GiB of memory'
        raise BadInput(f'{large}: {needed}, this machine has {memory / 2**30:.1f}; choose less')
