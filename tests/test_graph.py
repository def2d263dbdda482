"""The machine that trains: devices, precision, the CUDA graph of a step, memory."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, numbers, settings_of, train_small
from torch import nn

import device as machine
import train
from conf import BadInput, run_program
from evaluation import losses_and_margins
from measures.trace import images_per_pass
from models import get_network
from records import load_data, load_network, read_metrics

CPU, CUDA = torch.device('cpu'), SimpleNamespace(type='cuda')
REFUSED = 'operation not permitted when stream is capturing'

# ------------------------------------------------------------------------------------------------
# The graph of a step
# ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('precision, tolerance', [('float32', 1e-4), ('bf16', 1e-2)])
def test_a_captured_step_and_a_plain_step_agree(tmp_path, monkeypatch, precision, tolerance):
    flags = '--device', 'cuda', '--precision', precision, '--milestones', '2', '4'
    train_small(tmp_path / 'graph', *flags)
    monkeypatch.setattr(train, 'graphed', lambda step, *_: step)
    train_small(tmp_path / 'plain', *flags)
    tables = [read_metrics(tmp_path / name / 'CONV-3-4/metrics.csv') for name in ('graph', 'plain')]
    for column in ('train_loss', 'test_loss', 'lr'):
        graph, plain = (table[column].tolist() for table in tables)
        assert graph == pytest.approx(plain, rel=tolerance)


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda's streams and graphs without a GPU: a replay writes down that it happened."""
    state = SimpleNamespace(capturing=False, fails=False, done=[])

    class Graph:
        def replay(self):
            state.done.append('replay')

    @contextlib.contextmanager
    def graph(captured, stream):
        state.capturing = True
        yield
        state.capturing = False
        if state.fails:
            raise RuntimeError(REFUSED)

    for name, value in (('Stream', Stream), ('current_stream', Stream), ('CUDAGraph', Graph)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, 'graph', graph)
    monkeypatch.setattr(torch.cuda, 'stream', contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, 'set_stream', lambda stream: None)
    return state


@pytest.mark.parametrize('fails', [False, True])
def test_each_batch_is_one_step_with_a_graph_or_without(cuda, capsys, fails):
    """Three plain steps come first, and a smaller batch is a plain one; a failure is said once."""
    cuda.fails, read = fails, []

    def step(indices):
        read.append(indices)
        if not cuda.capturing:
            cuda.done.append(indices.tolist())

    graphed = machine.graphed(step, 2, CPU)
    for batch in ([0, 1], [2, 3], [4, 5], [6, 7], [8], [9, 10]):
        graphed(torch.tensor(batch))
    last = [[6, 7], [8], [9, 10]] if fails else ['replay', [8], 'replay']
    assert cuda.done == [[0, 1], [2, 3], [4, 5], *last]
    captured = [indices for indices in read if indices.tolist() in ([9, 10], [0, 0])]
    assert len(captured) == 1 + fails  # a replay reads the tensor that was captured
    assert (
        capsys.readouterr().out.count(f'no CUDA graph, which could not be captured ({REFUSED})')
        == fails
    )


# ------------------------------------------------------------------------------------------------
# Devices
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, as far as its devices are asked for; which of them are chosen."""
    ones, chosen = torch.ones, []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr(torch, 'ones', lambda *size, device=None: ones(*size))
    machine.choose_device.cache_clear()
    yield chosen
    machine.choose_device.cache_clear()


@pytest.mark.parametrize('name, index', [('auto', 0), ('cuda', 0), ('cuda:1', 1)])
def test_a_gpu_is_chosen(gpus, name, index):
    device = machine.choose_device(name)
    assert (device.type, device.index) == ('cuda', index) and gpus == [device]


def test_a_gpu_that_is_not_there_or_cannot_be_used(gpus, monkeypatch):
    with pytest.raises(BadInput, match='cuda:2.*not on this machine'):
        machine.choose_device('cuda:2')

    def too_old(*size, device=None):
        raise torch.AcceleratorError('CUDA error: no kernel image is available\nCompile ...')

    monkeypatch.setattr(torch, 'ones', too_old)
    with pytest.raises(BadInput) as caught:
        machine.choose_device('cuda')
    message = f'torch {torch.__version__} cannot use this GPU (CUDA error: no kernel image'
    assert message in str(caught.value) and 'Compile' not in str(caught.value)


# ------------------------------------------------------------------------------------------------
# Precision
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, device, products',
    [
        ('auto', CUDA, 'tf32'),
        ('tf32', CUDA, 'tf32'),
        ('bf16', CUDA, 'tf32'),
        ('float32', CUDA, 'ieee'),
        ('auto', CPU, 'ieee'),
        ('bf16', CPU, 'ieee'),
    ],
)
def test_precision_of_float32_products(monkeypatch, name, device, products):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    try:
        machine.choose_precision(name, device)
        assert [switch.fp32_precision for switch in switches] == [products, products]
    finally:
        for switch, value in zip(switches, before):
            switch.fp32_precision = value


def test_tf32_on_a_cpu_is_refused():
    with pytest.raises(BadInput, match='a CPU has no TF32'):
        machine.choose_precision('tf32', CPU)


def test_old_switches_of_tf32_are_left_alone():
    """Torch raises where they are read after the new ones were set."""
    texts = {path: path.read_text() for folder in ('.', 'measures', 'studies', 'models')
             for path in (ROOT / folder).glob('*.py')}  # fmt: skip
    assert len(texts) > 20
    old = 'allow_tf32', 'matmul_precision'
    assert not [path for path, text in texts.items() if any(name in text for name in old)]


@pytest.mark.long
def test_bf16_is_for_training_alone(tmp_path):
    flags = '--epochs', '1', '--depth', '1', '--width', '4'
    for precision in ('float32', 'bf16'):
        train_small(tmp_path / precision, '--precision', precision, *flags)
    tables = [
        tmp_path / precision / 'CONV-1-4' / 'metrics.csv' for precision in ('float32', 'bf16')
    ]
    assert numbers(tables[0])[1] == numbers(tables[1])[1]  # before training
    assert numbers(tables[0])[-1] != numbers(tables[1])[-1]
    net, settings = load_network(tmp_path / 'bf16' / 'CONV-1-4')
    dataset = load_data(settings)
    with torch.no_grad():
        loss, _ = losses_and_margins(
            net, dataset.test_images, dataset.test_labels, nn.functional.mse_loss
        )
    assert read_metrics(tables[1])['test_loss'][-1] == pytest.approx(loss, rel=1e-6)


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


def on_meta(**flags):
    """A network of these settings and an image, on `meta`, a device without memory."""
    with torch.device('meta'):
        net = get_network(settings_of(**flags), (1, 28, 28), 10)
        return net, torch.empty(1, 1, 28, 28)


@pytest.mark.parametrize('width, batch', [(32, 1000), (200, 1000), (600, 613), (1000, 368)])
def test_batches_of_evaluations_are_bounded_by_memory(width, batch):
    """At most 1 GiB in the largest activation, the first convolution's 27 x 27 maps."""
    net, image = on_meta(width=width)
    size = 4 * 27 * 27 * width
    assert images_per_pass(net, image.expand(60000, -1, -1, -1)) == batch
    assert batch == 1000 or 2**30 - size < batch * size <= 2**30
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    'flags, knob',
    [({'width': 1000, 'batch_size': 8}, 'width = 1000'), ({'batch_size': 999}, 'batch_size = 999')],
)
def test_a_network_larger_than_the_gpu_is_refused(monkeypatch, flags, knob):
    settings = settings_of(**flags)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (2**24, 2**26))
    with pytest.raises(BadInput, match=f'{knob}: .* this machine has 0.1;'):
        machine.check_memory(settings, *on_meta(**flags), settings.batch_size, CUDA)


@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.'),
        torch.AcceleratorError('CUDA error: out of memory\nCUDA kernel errors might be reported'),
        RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError('Unable to allocate 20.0 GiB'),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_one_line_that_helps(capsys, error):
    def fails():
        raise error

    assert run_program(fails) == 1
    stderr = capsys.readouterr().err
    assert stderr.count('\n') == 1 and 'smaller width or batch_size' in stderr
