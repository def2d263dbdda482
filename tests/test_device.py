"""Devices, precision and memory, as far as they can be tested without a GPU; see tests/gpu.py."""

import subprocess
import sys
from types import SimpleNamespace

import gpu
import pytest
import torch
from benchmark import new_run, random_dataset
from conftest import ROOT, SMALL, refused, settings_of
from torch import nn

import device
import evaluation
import train
from conf import BadInput
from measures.trace import images_per_pass
from models import get_network

CPU, CUDA = torch.device('cpu'), SimpleNamespace(type='cuda')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('precision', gpu.TOLERANCE)
def test_a_captured_step_agrees_with_a_plain_one(precision):
    graph, plain = gpu.compare(precision, device.choose_device('auto'))
    assert graph <= plain + gpu.TOLERANCE[precision]


def test_a_tensor_of_the_learning_rate_changes_no_digit():
    """A CUDA graph reads the learning rate from a tensor; a number gives the same weights."""
    settings = settings_of(width=4, lr=0.03, momentum=0.9)
    run = new_run(settings, random_dataset(CPU, 64, 16, (1, 8, 8)))
    other = new_run(settings, random_dataset(CPU, 64, 16, (1, 8, 8)))
    other.optimizer.param_groups[0]['lr'] = 0.03
    for batch in torch.arange(64).split(32):
        run.step(batch)
        other.step(batch)
    for one, two in zip(run.net.parameters(), other.net.parameters()):
        assert torch.equal(one, two)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, as far as it is asked; yields the indices that were made current."""
    ones, current = torch.ones, []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda chosen: current.append(chosen.index))
    monkeypatch.setattr(torch, 'ones', lambda *size, device=None: ones(*size))
    device.choose_device.cache_clear()
    yield current
    device.choose_device.cache_clear()


@pytest.mark.parametrize('name, index', [('auto', 0), ('cuda', 0), ('cuda:1', 1)])
def test_a_gpu_is_chosen(two_gpus, name, index):
    chosen = device.choose_device(name)
    assert (chosen.type, chosen.index, two_gpus) == ('cuda', index, [index])


def test_a_gpu_that_is_not_there(two_gpus):
    with pytest.raises(BadInput, match='cuda:2.*not on this machine'):
        device.choose_device('cuda:2')


def test_a_gpu_that_torch_cannot_use_is_one_line(two_gpus, tmp_path, monkeypatch):
    def too_old(*size, device=None):
        raise torch.AcceleratorError('CUDA error: no kernel image is available\nCompile ...')

    monkeypatch.setattr(torch, 'ones', too_old)
    line = refused(*SMALL, '--results-path', tmp_path / 'run')
    assert f'torch {torch.__version__} cannot use this GPU' in line and 'use cpu' in line
    assert 'no kernel image' in line and 'Compile' not in line
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'name, where, products',
    [
        ('auto', CUDA, 'tf32'),
        ('tf32', CUDA, 'tf32'),
        ('bf16', CUDA, 'tf32'),
        ('float32', CUDA, 'ieee'),
        ('auto', CPU, 'ieee'),
        ('bf16', CPU, 'ieee'),
    ],
)
def test_precision_of_float32_products(name, where, products):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    try:
        device.choose_precision(name, where)
        assert [switch.fp32_precision for switch in switches] == [products] * 2
    finally:
        for switch, value in zip(switches, before):
            switch.fp32_precision = value


def test_bf16_is_for_training_alone():
    settings, kinds = settings_of(precision='bf16', width=4), set()
    run = new_run(settings, random_dataset(CPU, 32, 16, (1, 8, 8)))
    for module in run.net:
        module.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    loss = run.batch_loss(torch.arange(4))
    assert kinds == {torch.bfloat16} and loss.dtype == torch.float32
    kinds.clear()
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    with torch.no_grad():
        evaluation.losses_and_margins(run.net, images, labels, nn.functional.mse_loss)
    assert kinds == {torch.float32}


@pytest.mark.parametrize('width, batch', [(32, 1000), (200, 1000), (600, 613), (1000, 368)])
def test_batches_of_evaluations_are_bounded_by_memory(width, batch):
    """At most 1 GiB in the largest activation; `meta` is a device without memory."""
    with torch.device('meta'):
        net = get_network(settings_of(width=width), (1, 28, 28), 10)
        images = torch.empty(60000, 1, 28, 28)
    assert images_per_pass(net, images) == batch
    assert batch == 1000 or 2**30 - 4 * 27 * 27 * width < 4 * batch * 27 * 27 * width <= 2**30
    assert not any(module._forward_hooks for module in net.modules())


OUT_OF_MEMORY = [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total'),
    torch.AcceleratorError('CUDA error: out of memory\nCUDA kernel errors might be reported later'),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError('Unable to allocate 20.0 GiB'),
]


@pytest.mark.parametrize('error', OUT_OF_MEMORY, ids=lambda error: str(error)[:20])
def test_out_of_memory_is_one_line_that_helps(tmp_path, monkeypatch, error):
    def fails(settings, dataset, folder):
        raise error

    monkeypatch.setattr(train, 'train', fails)
    line = refused(*SMALL, '--device', 'cpu', '--results-path', tmp_path / 'run', status=1)
    assert 'not enough memory' in line and 'smaller width or batch_size' in line


@pytest.mark.parametrize(
    'flags, knob',
    [({'width': 1000, 'batch_size': 8}, 'width = 1000'), ({'batch_size': 999}, 'batch_size = 999')],
)
def test_a_network_larger_than_the_gpu_is_refused(monkeypatch, flags, knob):
    settings = settings_of(**flags)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda chosen: (2**24, 2**26))
    with torch.device('meta'):
        net, image = get_network(settings, (1, 28, 28), 10), torch.empty(1, 1, 28, 28)
    with pytest.raises(BadInput, match=f'{knob}: .* this machine has 0.1;'):
        device.check_memory(settings, net, image, settings.batch_size, CUDA)


def test_bfloat16_units_are_read_off_the_cpu(monkeypatch):
    lines = 'cpu family : 6\nmodel : 143\nmodel name : X\nstepping : 8\nflags : amx_bf16 x\n'
    monkeypatch.setattr(device, '_cpu_info', lambda: lines)
    assert device.has_bfloat16_units()
    assert device.describe_machine(CPU)['processor'].startswith('X 6-143-8, ')
    monkeypatch.setattr(device, '_cpu_info', lambda: '')
    assert not device.has_bfloat16_units()


@pytest.mark.long
def test_the_survey_of_a_gpu_runs_at_a_tiny_size_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu, 'certify', lambda *arguments: {'pac_bayes_error': 0.25})
    gpu.survey(CPU, [3, 4], samples=96, test_samples=32, certified=3, repeats=1)
    out = capsys.readouterr().out
    assert out.count(' equal') == 2 and 'DIFFERENT' not in out and 'it says 0.250' in out
    assert 'CONV-3-3 ' in out and 'CONV-3-4 ' in out and 'aten::convolution_backward' in out


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_the_survey_says_that_there_is_no_gpu():
    command = [sys.executable, ROOT / 'tests' / 'gpu.py']
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, '') and 'no GPU' in done.stderr
    assert done.stderr.count('\n') == 1
