"""The machine that trains: signals, devices and precisions, CUDA graphs, memory."""

import contextlib
import ctypes
import errno
import functools
import os
import re
import signal
import sys
from types import SimpleNamespace

import torch
from tqdm import tqdm

from conf import BadInput, Interrupted
from measures.trace import activations

stop = SimpleNamespace(deferred=False, signal=None)
captures = SimpleNamespace(
    failed=False
)  # of CUDA graphs: after one that failed, torch's allocator may not begin another


def on_signal(number, frame):
    """Ends the program here, or, within `deferred_stop`, at the next `check_stop`.

    A second SIGINT kills. A second SIGTERM does not: batch systems send it to a script and to its children alike.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop.signal = number
    if not stop.deferred:
        raise Interrupted


def on_unraisable(found):
    """Ends the program a moment later where the end was lost: Python ignores what is raised in a callback of its own."""
    if not issubclass(found.exc_type, Interrupted):
        sys.__unraisablehook__(found)
        return
    signal.signal(signal.SIGALRM, lambda _, frame: on_signal(stop.signal, frame))
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def check_stop():
    if stop.signal:
        raise Interrupted


@contextlib.contextmanager
def deferred_stop():
    """Lets a signal wait while weights, masks or files change: for the next `check_stop`, or for the end of this block."""
    stop.deferred = True
    try:
        yield
    finally:
        stop.deferred = False
    check_stop()


def guarded(name, program, how_to_go_on):
    """The exit status of a program: what `program()` returns, 1 where the machine failed, 2 for bad input, 128 + signal.

    What ends it is said in one line, with what `how_to_go_on()` adds to it unless the input was bad.
    """
    stop.deferred, stop.signal = False, None
    for stream in (
        'stdout',
        'stderr',
    ):  # a stream may be closed, or of a locale that a path does not fit
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, 'w'))
        with contextlib.suppress(AttributeError):
            getattr(sys, stream).reconfigure(errors='backslashreplace')
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    sys.unraisablehook = on_unraisable
    try:
        return program()
    except BadInput as error:
        status, message = 2, f'error: {error}'
    except Interrupted:
        status, message = 128 + stop.signal, f'stopped by {signal.Signals(stop.signal).name}'
    except OSError as error:
        mend = {
            errno.ENOSPC: '; make room on that disk',
            errno.ELOOP: '; mend its links, which lead in a circle',
        }
        status, message = 1, f'error: {error}{mend.get(error.errno, "")}'
    except (MemoryError, RuntimeError) as error:
        if not (
            isinstance(error, MemoryError)
            or re.search("out of memory|can't allocate memory|ALLOC_FAILED", str(error))
        ):
            raise
        reason = re.split(r'[.] |\n', str(error))[0]
        mend = 'end other programs that hold memory, or choose a smaller width or batch_size'
        status, message = 1, f'error: not enough memory ({reason}); {mend}'
    print(
        f'{name}: {" ".join(message.splitlines())}{how_to_go_on() if status != 2 else ""}',
        file=sys.stderr,
    )
    return status


def keep_freed_memory():
    """Lets glibc keep freed memory, where it is the C library.

    It would hand the activations of every batch back to the kernel, which clears their pages anew for the next batch; at
    small widths that takes longer than the computation.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest that it accepts, in bytes


@functools.lru_cache
def choose_device(name):
    """The torch.device of the setting `device`; raises BadInput where this machine does not have it, or torch cannot use it."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    match = re.fullmatch(r'cpu|cuda(?::(\d+))?', name)
    if not match or (name != 'cpu' and int(match[1] or 0) >= torch.cuda.device_count()):
        raise BadInput(f'device = {name!r}: not on this machine; use auto, cpu, cuda or cuda:N')
    device = torch.device(
        name if name == 'cpu' else f'cuda:{match[1] or 0}'
    )  # set_device wants the number
    if device.type == 'cuda':
        try:
            torch.cuda.set_device(device)  # graphs are captured on the current device
            torch.ones(1, device=device).add(1).item()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise BadInput(
                f'device = {name!r}: torch {torch.__version__} cannot use this GPU ({reason}); use cpu'
            ) from None
    return device


def choose_precision(name, device):
    """Sets how float32 products are computed on CUDA, and returns whether training runs in bfloat16."""
    if name == 'tf32' and device.type != 'cuda':
        raise BadInput("precision = 'tf32': a CPU has no TF32; use auto, float32 or bf16")
    fp32 = 'ieee' if device.type != 'cuda' or name == 'float32' else 'tf32'
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = fp32
    return name == 'bf16'


def graphed(step, batch_size, device):
    """The training step as a CUDA graph, called as the step is; plain steps where this machine cannot capture one.

    The first steps are plain ones, to set up kernels, workspaces and momentum; so is that of an uneven last batch. All run on
    the stream of the capture, since gradients are accumulated on the stream that they came from. What changes from step to step
    (indices, learning rate, masks) lies in tensors that the graph reads, so it is captured once.
    """
    indices_of_graph = torch.zeros(batch_size, dtype=torch.int64, device=device)
    state = SimpleNamespace(graph=None, plain_steps=0, stream=torch.cuda.Stream())

    def capture():
        before = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=state.stream):
                step(indices_of_graph)
        except RuntimeError as error:
            torch.cuda.set_stream(before)
            captures.failed = True
            reason = (
                str(error.__context__ or error).strip().partition('\n')[0]
            )  # to end a capture that failed fails too
            tqdm.write(
                f'training goes on without a CUDA graph, which could not be captured: {reason}'
            )
        else:
            state.graph = graph

    def call(indices):
        if (
            state.plain_steps >= 3
            and len(indices) == batch_size
            and state.graph is None
            and not captures.failed
        ):
            capture()
        if state.graph is not None and len(indices) == batch_size:
            indices_of_graph.copy_(indices)
            state.graph.replay()
            return
        state.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(state.stream):
            step(indices)
        torch.cuda.current_stream().wait_stream(state.stream)
        state.plain_steps += 1

    return call


def check_memory(settings, net, image, batch, device):
    """Raises BadInput where weights and one batch's activations alone are more than the machine's memory."""
    weights = 12 * sum(weight.numel() for weight in net.parameters())
    features = 4 * batch * sum(activations(net.eval(), image))
    have = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if device.type == 'cuda':
        have = torch.cuda.mem_get_info(device)[1]
    if weights + features > have:
        knob = (
            f'width = {settings.width}'
            if weights > features
            else f'batch_size = {settings.batch_size}'
        )
        need, have = ((value / 2**30) for value in (weights + features, have))
        raise BadInput(
            f'{knob}: training takes at least {need:.1f} GiB of memory, this machine has {have:.1f}; choose less'
        )
