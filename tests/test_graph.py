"""The path of a GPU without one: the streams and graphs that torch.cuda would give are played on the CPU."""

import subprocess
import sys
from types import SimpleNamespace

import gpu
import pytest
import torch
from benchmark import random_dataset
from conftest import ROOT, SMALL, settings_of
from torch import nn
from torch.cuda._utils import _get_device_index
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import device as machine
import evaluation
import launch
import train
from conf import BadInput
from measures.trace import images_per_pass
from models import get_network
from records import load_checkpoint, read_metrics

CPU, CUDA = torch.device('cpu'), SimpleNamespace(type='cuda')
REFUSED = 'operation not permitted when stream is capturing'


def tensors_of(values):
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Writes down every operation with the tensors that it reads and writes; `undo` puts back what they wrote on.

    As in a CUDA graph an operation that is played again reads and writes the memory of its recording, a number of Python's is
    that of the recording, and nothing may ask for a value.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.failed = [], {}, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.failed = True
            raise RuntimeError(f'{REFUSED}\nCUDA kernel errors might be reported later')
        read = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for tensor in tensors_of((args, kwargs))
        }
        for address in read.keys() - self.before.keys():
            self.before[address] = read[address], read[address].clone()
        result = function(*args, **(kwargs or {}))
        made = [
            None if tensor.untyped_storage().data_ptr() in read else tensor.detach()
            for tensor in tensors_of(result)
        ]
        self.operations.append((function, args, kwargs or {}, made))
        return result

    def undo(self):
        for storage, before in self.before.values():
            storage.copy_(before)

    @torch.no_grad()
    def play(self):
        for function, args, kwargs, made in self.operations:
            for there, tensor in zip(made, tensors_of(function(*args, **kwargs))):
                if there is not None:
                    there.copy_(tensor)


class Stream:
    """A stream that remembers whom it waited for; work on it is done at once."""

    def __init__(self):
        self.waits = []

    def wait_stream(self, other):
        self.waits.append(other)


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda's streams and graphs on the CPU, under torch's own context manager of a capture.

    Holds the streams, the graphs, the number of replays, and where a capture shall fail: nowhere, at its begin or at its end.
    """
    state = SimpleNamespace(default=Stream(), streams=[], graphs=[], replays=0, fails=None)
    state.current = state.default

    class CUDAGraph:
        def __init__(self):
            state.graphs.append(self)

        def capture_begin(self, *pool, **options):
            if state.fails == 'begin':
                raise RuntimeError(REFUSED)
            assert state.current is state.streams[-1]
            self.recorder = Recorder()
            self.recorder.__enter__()

        def capture_end(self):
            self.recorder.__exit__(None, None, None)
            self.recorder.undo()
            if self.recorder.failed:
                raise RuntimeError('operation failed due to a previous error during capture')
            if state.fails == 'end':
                raise RuntimeError(REFUSED)

        def replay(self):
            assert state.current is state.default
            state.replays += 1
            self.recorder.play()

    def new_stream():
        state.streams.append(Stream())
        return state.streams[-1]

    def set_stream(stream):
        state.current = stream

    class OnStream:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before, state.current = state.current, self.stream

        def __exit__(self, *error):
            state.current = self.before

    for name, value in {
        'Stream': new_stream, 'CUDAGraph': CUDAGraph, 'stream': OnStream, 'set_stream': set_stream,
        'current_stream': lambda: state.current, 'synchronize': lambda: None, 'empty_cache': lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, '_host_emptyCache', lambda: None, raising=False)
    monkeypatch.setattr(machine.captures, 'failed', False)
    return state


@pytest.fixture
def precision_kept():
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    yield
    for switch, value in zip(switches, before):
        switch.fp32_precision = value


@pytest.mark.parametrize('precision', ['float32', 'bf16'])
def test_a_graph_gives_the_losses_of_plain_steps(cuda, precision):
    assert gpu.compare(precision, CPU, width=4) == (0.0, 0.0)
    plain = 3 + 4  # to warm up, and the uneven batches of four epochs
    assert (len(cuda.graphs), cuda.replays) == (
        1,
        24 - plain,
    )  # one capture for two rates, all masks and evaluations
    (side,) = cuda.streams
    assert side.waits == plain * [cuda.default] and cuda.default.waits == plain * [side]


def metrics_and_weights(settings, folder, monkeypatch, step_of=None):
    """What the program leaves after training a small network; `step_of` makes its step from that of the program."""
    plain_step_of = train.step_of
    folder.mkdir()
    with monkeypatch.context() as patch:
        if step_of:
            patch.setattr(train, 'step_of', lambda run: step_of(plain_step_of(run), run))
        train.train(settings, random_dataset(CPU, 5 * 32 + 16, 64, (1, 8, 8)), folder, CPU)
    table = read_metrics(folder / 'metrics.csv')
    columns = [
        table[name].tolist()
        for name in ('epoch', 'round', 'lr', 'density', 'train_loss', 'test_loss')
    ]
    return columns, load_checkpoint(folder / 'model.pt', CPU)['network']


def assert_same(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(weight, other[1][name]) for name, weight in one[1].items())


def small(**flags):
    return settings_of(
        **{'width': 4, 'epochs': 4, 'milestones': [1, 3], 'certify_every': 0, 'threads': 1} | flags
    )


@pytest.mark.parametrize(
    'flags',
    [
        {},
        {'network': 'CONVBN', 'normalization': 'batch', 'depth': 2},
        {'prune_rounds': 2, 'prune_fraction': 0.5, 'rewind_epoch': 1},
        {'density': 0.3, 'initial_mask': 'random', 'regrow': 'gradient', 'regrow_every': 5},
        {'augment': 'crop'},
    ],
    ids=['dense', 'batch norm', 'pruning rounds', 'RigL', 'crops'],
)
def test_the_program_trains_the_same_with_a_graph(cuda, tmp_path, monkeypatch, flags):
    settings, streams = small(**flags), set()

    def step_of(step, _):
        def noted(indices):
            streams.add(cuda.current)
            step(indices)

        return machine.graphed(noted, settings.batch_size, CPU)

    plain = metrics_and_weights(settings, tmp_path / 'plain', monkeypatch)
    assert_same(metrics_and_weights(settings, tmp_path / 'graph', monkeypatch, step_of), plain)
    assert len(cuda.graphs) == 1 and cuda.replays > 10 and streams == set(cuda.streams)


@pytest.mark.parametrize('fails', ['begin', 'end', 'step'])
def test_training_goes_on_where_no_graph_can_be_captured(
    cuda, tmp_path, monkeypatch, capsys, fails
):
    plain = metrics_and_weights(small(), tmp_path / 'plain', monkeypatch)
    capsys.readouterr()
    cuda.fails = fails

    def step_of(step, run):
        def asks_for_a_value(indices):
            step(indices)
            run.loss_sum.item()

        return machine.graphed(asks_for_a_value if fails == 'step' else step, 32, CPU)

    for folder in ('one', 'two'):
        assert_same(metrics_and_weights(small(), tmp_path / folder, monkeypatch, step_of), plain)
        assert cuda.current is cuda.default
    assert (len(cuda.graphs), cuda.replays) == (
        1,
        0,
    )  # not tried again, in the next training neither
    lines = [line for line in capsys.readouterr().out.splitlines() if 'epoch' not in line]
    assert lines == [
        f'training goes on without a CUDA graph, which could not be captured: {REFUSED}'
    ]


def test_a_learning_rate_in_a_tensor_changes_no_digit(tmp_path, monkeypatch):
    rates, learning_rate = [], evaluation.learning_rate

    def noted(settings, epoch):
        rates.append(learning_rate(settings, epoch))
        return rates[-1]

    def step_of(_, run):
        optimizer = run.optimizer
        assert (
            optimizer.param_groups[0]['lr'].dtype == torch.float32
        )  # which is what its CUDA kernel reads
        sgd = torch.optim.SGD(
            optimizer.param_groups[0]['params'], lr=1.0, momentum=0.9, weight_decay=3e-3, fused=True
        )
        sgd.state = optimizer.state

        def step(indices):
            sgd.param_groups[0]['lr'] = rates[-1]
            sgd.zero_grad()
            value = run.loss(run.net, indices)
            value.backward()
            sgd.step()
            run.loss_sum.add_(value.detach())

        return step

    settings = small(milestones=[1, 2, 4], epochs=6, lr=0.03, lr_decay=0.3)
    tensor = metrics_and_weights(settings, tmp_path / 'tensor', monkeypatch)
    monkeypatch.setattr(train, 'learning_rate', noted)
    number = metrics_and_weights(settings, tmp_path / 'number', monkeypatch, step_of)
    assert_same(tensor, number)
    assert len(set(rates)) == 4 and all(type(rate) is float for rate in rates)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, as far as its devices are asked for, whose tensors are the CPU's; which was made current."""
    ones, current = torch.ones, []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(
        torch.cuda, 'set_device', lambda device: current.append(_get_device_index(device))
    )
    monkeypatch.setattr(torch, 'ones', lambda *size, device=None: ones(*size))
    machine.choose_device.cache_clear()
    yield current
    machine.choose_device.cache_clear()


@pytest.mark.parametrize('name, index', [('auto', 0), ('cuda', 0), ('cuda:1', 1)])
def test_a_gpu_is_chosen(gpus, name, index):
    device = machine.choose_device(name)
    assert (device.type, device.index or 0, gpus) == ('cuda', index, [index])


def test_a_gpu_that_is_not_there(gpus):
    with pytest.raises(BadInput, match='cuda:2.*not on this machine'):
        machine.choose_device('cuda:2')


def test_a_gpu_that_torch_cannot_use_is_one_line(gpus, tmp_path, monkeypatch, capsys):
    def too_old(*size, device=None):
        raise torch.AcceleratorError(
            'CUDA error: no kernel image is available for execution on the device\nCompile ...'
        )

    monkeypatch.setattr(torch, 'ones', too_old)
    status = launch.main(train.train, [*SMALL, '--results-path', str(tmp_path / 'run')])
    stderr = capsys.readouterr().err
    assert status == 2 and stderr.count('\n') == 1 and not (tmp_path / 'run').exists()
    assert (
        f'torch {torch.__version__} cannot use this GPU' in stderr
        and 'no kernel image' in stderr
        and 'cpu' in stderr
    )
    assert 'Compile' not in stderr


@pytest.mark.parametrize(
    'name, device, products, bf16',
    [('auto', CUDA, 'tf32', False), ('tf32', CUDA, 'tf32', False), ('bf16', CUDA, 'tf32', True),
     ('float32', CUDA, 'ieee', False), ('auto', CPU, 'ieee', False), ('bf16', CPU, 'ieee', True)],
)  # fmt: skip
def test_precision_of_float32_products(precision_kept, name, device, products, bf16):
    assert machine.choose_precision(name, device) is bf16
    assert (
        torch.backends.cuda.matmul.fp32_precision
        == torch.backends.cudnn.conv.fp32_precision
        == products
    )


def test_tf32_on_a_cpu_is_refused():
    with pytest.raises(BadInput, match='a CPU has no TF32'):
        machine.choose_precision('tf32', CPU)


def test_old_switches_of_tf32_are_left_alone():
    """Torch raises where they are read after the new ones were set."""
    files = [
        path
        for path in ROOT.rglob('*.py')
        if path.name != 'test_graph.py' and not path.is_relative_to(ROOT / 'results')
    ]
    assert len(files) > 20
    assert not [
        path
        for path in files
        if 'allow_tf32' in (text := path.read_text()) or 'matmul_precision' in text
    ]


def test_bf16_is_for_training_alone():
    net, kinds = get_network(small(precision='bf16'), (1, 8, 8), 10), set()
    for module in net:
        module.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    run = gpu.new_run(small(precision='bf16'), random_dataset(CPU, 32, 16, (1, 8, 8)), CPU)
    loss = run.loss(net, labels)
    assert kinds == {torch.bfloat16} and loss.dtype == torch.float32
    kinds.clear()
    with torch.no_grad():
        evaluation.losses_and_margins(net, images, labels, nn.functional.mse_loss)
    assert kinds == {torch.float32}


@pytest.mark.parametrize('width, batch', [(32, 1000), (200, 1000), (600, 613), (1000, 368)])
def test_batches_of_evaluations_are_bounded_by_memory(width, batch):
    """At most 1 GiB in the largest activation, the first convolution's 27 x 27 maps; `meta` is a device without memory."""
    with torch.device('meta'):
        net, images = (
            get_network(settings_of(width=width), (1, 28, 28), 10),
            torch.empty(60000, 1, 28, 28),
        )
    assert images_per_pass(net, images) == batch
    assert batch == 1000 or 2**30 - 4 * 27 * 27 * width < 4 * batch * 27 * 27 * width <= 2**30
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError(
            'CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB.'
        ),
        torch.AcceleratorError(
            'CUDA error: out of memory\nCUDA kernel errors might be reported later'
        ),
        RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 90 bytes."
        ),
        MemoryError('Unable to allocate 20.0 GiB'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_one_line_that_helps(tmp_path, capsys, error):
    def fails(settings, dataset, folder, device):
        raise error

    assert (
        launch.main(fails, [*SMALL, '--device', 'cpu', '--results-path', str(tmp_path / 'run')])
        == 1
    )
    stderr = capsys.readouterr().err
    assert (
        stderr.count('\n') == 1
        and 'not enough memory' in stderr
        and 'smaller width or batch_size' in stderr
    )
    assert '--resume' in stderr and 'might be reported' not in stderr


@pytest.mark.parametrize(
    'flags, knob',
    [({'width': 1000, 'batch_size': 8}, 'width = 1000'), ({'batch_size': 999}, 'batch_size = 999')],
)
def test_a_network_larger_than_the_gpu_is_refused(monkeypatch, flags, knob):
    settings = settings_of(**flags)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (2**24, 2**26))
    with torch.device('meta'):
        net, image = get_network(settings, (1, 28, 28), 10), torch.empty(1, 1, 28, 28)
    with pytest.raises(BadInput, match=f'{knob}: .* this machine has 0.1;'):
        machine.check_memory(settings, net, image, settings.batch_size, CUDA)


def test_the_survey_of_a_gpu_runs_at_a_tiny_size(monkeypatch, capsys):
    monkeypatch.setattr(gpu, 'compare', lambda precision, device: (2e-4, 1e-4))
    monkeypatch.setattr(gpu, 'certify', lambda *arguments: {'pac_bayes_error': 0.25})
    gpu.survey(CPU, [3, 4], samples=96, test_samples=32, certified=3, repeats=1)
    out = capsys.readouterr().out
    assert '2.0e-04 (1.0e-04) equal' in out and 'DIFFERENT' not in out and 'it says 0.250' in out
    assert (
        all(f'CONV-3-{width} ' in out for width in (3, 4)) and 'aten::convolution_backward' in out
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_the_survey_says_where_there_is_no_gpu():
    done = subprocess.run(
        [sys.executable, ROOT / 'tests' / 'gpu.py'], capture_output=True, text=True
    )
    assert (
        (done.returncode, done.stdout) == (2, '')
        and done.stderr.count('\n') == 1
        and 'no GPU' in done.stderr
    )
