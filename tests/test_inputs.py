"""Networks, images and callers of unusual kinds: the right value, found in another way, or one line
that says what is wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from networks import (
    BENCH_SHAPE,
    Forward,
    Residual,
    conv,
    linear,
    randomized,
    small_chain,
    weights_of,
)
from test_networks import CLASSES, MESSAGE, M, certified
from test_paths import matrix_of
from test_paths import outputs_of as unrolled_outputs
from test_representations import brute_force
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from conf import BadInput
from measures import landscape, masks, norms, paths, trace
from measures.representations import measure_probes, measure_representations
from studies.coded import certify_by_disagreement
from studies.compress import compress, compress_layer
from studies.falsify import falsify
from utils import evaluate_bounds

# ------------------------------------------------------------------------------------------------
# Networks that are not ready to be measured
# ------------------------------------------------------------------------------------------------

IMAGES = torch.rand(M, *BENCH_SHAPE, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(M) % CLASSES
SETS = IMAGES, LABELS, IMAGES, LABELS


def small(*first):
    """A small network with biases, whose first steps are given."""
    torch.manual_seed(0)
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(24, 4), nn.ReLU(), nn.Linear(4, CLASSES))


def calls_on(net, images=IMAGES, labels=LABELS):
    """{name: function without arguments} of the functions that take any network."""
    sets = images, labels, images, labels
    last = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1:]
    found = {
        'path_norm': lambda: paths.path_norm(net, BENCH_SHAPE),
        'path_metric': lambda: paths.path_metric(net, net, BENCH_SHAPE),
        'path_magnitude': lambda: paths.path_magnitude(net, BENCH_SHAPE),
        'rescale_neurons': lambda: paths.rescale_neurons(net, torch.ones),
        'measure_network': lambda: norms.measure_network(net, BENCH_SHAPE),
        'certify': lambda: certified(net, images, labels),
        'drop_dead': lambda: masks.drop_dead(net),
        'density': lambda: masks.density(net),
        'measure_masks': lambda: masks.measure_masks(net),
        'effective_weights': lambda: trace.effective_weights(net),
        'sharpness': lambda: landscape.sharpness(net, net, images, labels),
        'input_gradient': lambda: landscape.input_gradient(net, net, images, labels),
        'compress_layer': lambda: compress_layer(net, images, last, 0.1),
        'outputs': lambda: trace.outputs(net, images),
        'representations': lambda: measure_representations(net, *sets, last),
        'probes': lambda: measure_probes(net, *sets, last),
        'evaluate_bounds': lambda: evaluate_bounds(net, images, labels),
    }
    return found


RUN = {'outputs', 'representations', 'probes', 'evaluate_bounds'}  # they run the network as it is


def are_refused(net, names, *parts, **data):
    """Functions that refuse a network in one line, with all of these parts."""
    for name in names:
        with pytest.raises(BadInput) as caught:
            calls_on(net, **data)[name]()
        message = str(caught.value)
        assert '\n' not in message and all(part in message for part in parts), (name, message)


def test_lazy_modules_are_refused_and_stay_lazy():
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(CLASSES))
    are_refused(net, calls_on(net), '1 (LazyLinear), 3 (LazyLinear) waits for its first image')
    assert all(isinstance(weight, nn.UninitializedParameter) for weight in net.parameters())


def test_a_network_on_the_meta_device_has_a_geometry_and_no_values():
    net = small_chain().to('meta')
    assert trace.not_covered(net, BENCH_SHAPE) is None
    are_refused(net, calls_on(net), '0 (Conv2d), 2 (Conv2d), 5 (Linear) is on the meta device')


def test_complex_weights_are_refused():
    layers = nn.Linear(24, 4, dtype=torch.complex64), nn.Linear(4, CLASSES, dtype=torch.complex64)
    net = nn.Sequential(nn.Flatten(), *layers)
    names = {*calls_on(net)} - RUN - {'input_gradient', 'compress_layer'}
    are_refused(net, names, '1 (Linear), 2 (Linear)', 'complex weights')
    are_refused(net, ['compress_layer'], '2 (Linear) has complex weights')
    are_refused(net, RUN - {'evaluate_bounds'}, 'images: Sequential does not take one of shape')
    takes_complex = Forward(lambda self, x: self.net(x.cfloat()), net=net)
    are_refused(takes_complex, ['outputs'], 'Forward: makes torch.complex64 of shape (1, 3)')


@pytest.mark.parametrize(
    'hook',
    [
        lambda layer: prune.l1_unstructured(layer, 'weight', 0.5),
        nn.utils.spectral_norm,
        pytest.param(nn.utils.weight_norm, marks=[]),
    ],
    ids=['prune', 'spectral_norm', 'weight_norm'],
)
@pytest.mark.filterwarnings('ignore')
def test_weights_that_hooks_compute_are_not_read(hook):
    """The outputs are right; the weight that lies in the module may be an older one."""
    net = small()
    hook(net[1]), hook(net[3])
    net(IMAGES)  # in training mode; its graph is kept in the modules
    names = {*calls_on(net)} - (RUN - {'evaluate_bounds'})
    are_refused(net, names, '1 (Linear), 3 (Linear) has forward hooks of torch.nn.utils')
    with torch.no_grad():
        expected = net.eval()(IMAGES)
    assert torch.equal(trace.outputs(net.train(), IMAGES), expected.double())
    if hook is not nn.utils.spectral_norm and hook is not nn.utils.weight_norm:
        for layer in (net[1], net[3]):
            prune.remove(layer, 'weight')
        kept = sum(weight.count_nonzero().item() for weight in weights_of(net))
        assert landscape.living_weights(net, net, IMAGES, LABELS) == kept == 48 + 6


@pytest.mark.filterwarnings('ignore')  # torch.ao is deprecated
def test_quantized_modules_are_refused():
    net = torch.ao.quantization.quantize_dynamic(small(nn.Conv2d(1, 1, 1)), {nn.Linear})
    counted = {'density', 'measure_masks', 'effective_weights', 'sharpness'}
    for name in counted | {'path_norm', 'measure_network', 'drop_dead'}:
        are_refused(net, [name], '2 (Linear), 4 (Linear)', 'quantized weights')
    are_refused(net, ['input_gradient'], 'have no gradient')


@pytest.mark.parametrize('wrap', [nn.DataParallel, AveragedModel])
def test_wrappers_are_named_and_what_is_in_them_is_measured(wrap):
    net = wrap(small())
    kind, names = wrap.__name__, {'path_norm', 'path_magnitude', 'measure_network', 'drop_dead'}
    are_refused(net, names, f'{kind} is a wrapper: pass the network in it, its .module')
    assert paths.path_norm(net.module, BENCH_SHAPE) == paths.path_norm(small(), BENCH_SHAPE)
    assert torch.equal(trace.outputs(net, IMAGES), trace.outputs(small(), IMAGES))


@pytest.mark.long
def test_the_modules_of_a_compiled_network_run_unseen():
    net = torch.compile(small(), backend='eager')
    are_refused(net, ['probes', 'compress_layer'], 'OptimizedModule is a compiled network')


# ------------------------------------------------------------------------------------------------
# What a network's own code does
# ------------------------------------------------------------------------------------------------


def test_a_first_step_in_place_leaves_the_images_alone():
    net, plain_net = small(nn.ReLU(inplace=True)), small(nn.ReLU())
    images = IMAGES - 0.5
    before = images.clone()
    for name in RUN - {'evaluate_bounds'} | {'compress_layer', 'input_gradient', 'sharpness'}:
        found, expected = (calls_on(each, images)[name]() for each in (net, plain_net))
        assert torch.equal(images, before), name
        assert str(found).replace('inplace=True', '') == str(expected), name
    given = images.flatten(1).double().numpy(), LABELS.numpy()
    rectified = brute_force(*given, *given)
    row = measure_representations(net, images, LABELS, images, LABELS, ['2'])[0]
    assert row['train_cdnv'] == pytest.approx(rectified['train_cdnv'], rel=1e-5)


def in_place_on_itself(self, x):
    x = self.fc(x.flatten(1))
    same = self.same(x)
    same += self.other(x)
    return self.last(same + x)  # both are the sum by now


def in_place_on_a_view(self, x):
    x = self.conv(x)
    flat = x.flatten(1)
    flat += self.other(flat)
    return self.last(flat + x.flatten(1))


@pytest.mark.parametrize('forward', [in_place_on_itself, in_place_on_a_view])
def test_what_is_changed_under_another_name_is_refused(forward):
    layers = {'fc': nn.Linear(24, 24), 'other': nn.Linear(24, 24), 'last': nn.Linear(24, 3)}
    net = Forward(forward, conv=nn.Conv2d(1, 1, 1), same=nn.Identity(), **layers)
    are_refused(net, ['path_norm'], 'iadd works in place on a value that is used elsewhere too')


def test_an_addition_in_place_is_an_addition():
    def forward(self, x):
        x = self.fc(x.flatten(1))
        x += self.other(x)  # which reads it before
        return self.last(x)

    layers = {'fc': nn.Linear(24, 6), 'other': nn.Linear(6, 6), 'last': nn.Linear(6, 3)}
    layers = {name: layer.double() for name, layer in layers.items()}
    net = nn.Sequential(nn.Flatten(), layers['fc'], Residual(layers['other']), layers['last'])
    found = unrolled_outputs(net, torch.ones(BENCH_SHAPE).double())
    total = sum(sum(abs(phi) for phi, _, _ in phis) for _, phis in found)
    assert paths.path_norm(Forward(forward, **layers), BENCH_SHAPE) == pytest.approx(total)


class Remembers(nn.Module):
    """Keeps what it computes, counts its forward passes and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.net, self.hidden, self.count = small(), None, 0
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        torch.rand(3)
        self.hidden = self.net[2](self.net[1](self.net[0](x)))
        return self.net[3](self.hidden)


def test_tracing_leaves_nothing_behind():
    net, state = Remembers(), torch.get_rng_state()
    norm = paths.path_norm(net, BENCH_SHAPE)
    assert norm == paths.path_norm(small(), BENCH_SHAPE)
    assert torch.equal(state, torch.get_rng_state())
    assert (net.hidden, net.count, net.calls.item()) == (None, 0, 0)
    adds = Forward(lambda self, x: self.fc(x.flatten(1) + torch.ones(24)), fc=nn.Linear(24, 3))
    attributes = set(vars(adds))
    are_refused(adds, ['path_norm'], 'constant0: not covered')
    assert set(vars(adds)) == attributes


def test_networks_that_keep_their_activations_are_copied():
    net = Remembers()
    net(IMAGES)
    assert not net.hidden.is_leaf
    copied, expected = (
        trace.plain_copy(net),
        landscape.input_gradient(small(), None, IMAGES, LABELS),
    )
    assert copied.hidden is not net.hidden and torch.equal(copied.hidden, net.hidden)
    assert landscape.input_gradient(net, None, IMAGES, LABELS) == expected
    narrow, _ = compress_layer(net, IMAGES, 'net.3', 1e-5)
    torch.testing.assert_close(narrow(IMAGES), net(IMAGES), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    'result, words',
    [
        (lambda x: {'out': x}, 'makes dict of'),
        (lambda x: (x, x), 'makes tuple of'),
        (lambda x: x.sum(), 'torch.float32 of shape ()'),
        (lambda x: x.expand(2, *x.shape), 'torch.float32 of shape (2, '),
    ],
)
def test_outputs_that_are_no_rows_are_refused(result, words):
    net = Forward(lambda self, x: result(self.net(x)), net=small())
    are_refused(net, ['outputs', 'representations', 'input_gradient'], words)
    expected = measure_probes(small(), *SETS, ['3'])
    assert measure_probes(net, *SETS, ['net.3']) == expected  # a probe reads layers alone


def test_layers_that_give_no_rows_are_refused_by_name():
    """A sequence first, a tuple; attention runs its last layer itself."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=False)
    net = Forward(lambda self, x: self.tr(x[:, 0].transpose(0, 1)).mean(0), tr=layer)
    words = 'layer tr.linear1: makes torch.float32 of shape (6, '
    for measure in (measure_representations, measure_probes):
        with pytest.raises(BadInput) as caught:
            measure(net, *SETS, ['tr.linear1'])
        assert words in str(caught.value)
    recurrent = Forward(lambda self, x: self.lstm(x[:, 0])[0][:, -1], lstm=nn.LSTM(4, 3))
    with pytest.raises(BadInput, match='layer lstm: makes tuple of'):
        measure_probes(recurrent, *SETS, ['lstm'])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_layer_that_is_constant_separates_no_classes(dtype):
    net = small().to(dtype)
    nn.init.zeros_(net[3].weight)  # all that is left is the bias
    images = IMAGES.to(dtype)
    row = measure_representations(net, images, LABELS, images[:7], LABELS[:7], ['3'])[1]
    assert (row['train_ncc_error'], row['test_ncc_error']) == (1, 1)
    assert row['train_cdnv'] == row['test_cdnv'] == math.inf
    assert math.isnan(row['nc1']) and math.isnan(row['nc2'])


def test_indices_of_a_pooling_function_are_refused():
    def forward(self, x):
        return self.fc(F.max_pool2d(x, 2, return_indices=True)[0].flatten(1))

    net = Forward(forward, fc=nn.Linear(6, 3))
    are_refused(net, ['path_norm', 'drop_dead'], 'max_pool2d_with_indices: not covered')


def test_a_weight_may_be_a_buffer():
    net, expected = small(), paths.path_norm(small(), BENCH_SHAPE)
    weight = net[1].weight.detach().clone()
    del net[1].weight
    net[1].register_buffer('weight', weight)
    assert paths.path_norm(net, BENCH_SHAPE) == expected
    assert landscape.living_weights(net, net, IMAGES, LABELS) == 24 * 4 + 4 * 3


# ------------------------------------------------------------------------------------------------
# Layers
# ------------------------------------------------------------------------------------------------


def odd_layers():
    """Depthwise, dilated and transposed convolutions, and poolings that round up."""
    return randomized(
        nn.Conv2d(1, 2, 1),
        nn.Conv2d(2, 4, (3, 2), padding=(2, 0), dilation=(2, 1), groups=2),
        *(nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2, 2, 1, ceil_mode=True)),
        nn.ConvTranspose2d(4, 2, 2, (2, 1), output_padding=(1, 0), groups=2),
        *(nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(30, 3)),
    )


def test_layers_of_odd_geometry():
    net, images = odd_layers(), IMAGES.double()
    found = unrolled_outputs(net, torch.ones(BENCH_SHAPE).double())
    for q in (1, 2):
        total = sum(sum(abs(phi) ** q for phi, _, _ in phis) for _, phis in found)
        assert paths.path_norm(net, BENCH_SHAPE, q) == pytest.approx(total ** (1 / q), rel=1e-9)
    score = paths.path_magnitude(net, BENCH_SHAPE)['1.weight'].sum().item()
    through = sum(sum(abs(phi) for phi, start, _ in phis) for _, phis in found)
    assert 0 < score < through  # some paths begin at a bias behind it
    rescaled = paths.rescale_neurons(net, lambda count: torch.arange(1, count + 1))
    torch.testing.assert_close(rescaled(images), net(images))
    narrow, report = compress_layer(net, images, '8', 1e-6)
    assert '5 (ConvTranspose2d)' in report['why']
    torch.testing.assert_close(narrow(images), net(images), rtol=0, atol=0.01)
    are_refused(net, ['drop_dead'], '1 (Conv2d): only ungrouped', '5 (ConvTranspose2d)')
    net[1].weight.data[2] = 0
    assert [row['dead_channels'] for row in masks.measure_masks(net).values()] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    'layer, images',
    [
        (nn.Conv1d(1, 2, 3), IMAGES.flatten(2)),
        (nn.Conv3d(1, 2, (1, 2, 2)), IMAGES.unflatten(2, (2, 3))),
        (nn.Conv2d(1, 2, 3, padding=1, padding_mode='circular'), IMAGES),
        (nn.Conv2d(1, 2, 3, padding=1, padding_mode='reflect'), IMAGES),
    ],
    ids=lambda value: getattr(value, 'padding_mode', None),
)
def test_layers_without_paths_have_representations(layer, images):
    torch.manual_seed(0)
    width = layer(images[:1]).numel()
    net = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(width, CLASSES))
    name = f'0 ({type(layer).__name__})'
    with pytest.raises(BadInput) as caught:
        paths.path_norm(net, images.shape[1:])
    assert name in str(caught.value)
    if not isinstance(layer, nn.Conv2d):
        are_refused(net, ['density', 'sharpness'], f'{name} holds weights', images=images)
    sets = images, LABELS, images, LABELS
    with torch.no_grad():
        h = layer(images).relu().flatten(1).double().numpy()
    row = measure_representations(net, *sets)[1]
    for column, value in brute_force(h, LABELS.numpy(), h, LABELS.numpy()).items():
        assert row[column] == pytest.approx(value, rel=1e-4)
    narrow, _ = compress_layer(net, images, '3', 1e-5)
    torch.testing.assert_close(narrow(images), net(images), rtol=0, atol=0.01)


def test_norms_of_a_parameter():
    weight = nn.Conv2d(2, 3, 2).weight  # float32, and it requires a gradient
    layer = conv(2, 3, 2)
    layer.weight = nn.Parameter(weight.detach().double())
    matrix, _ = matrix_of(layer, (2, 5, 4))
    exact = torch.linalg.svdvals(matrix)[0].item()
    assert norms.operator_norm(weight, (5, 4)) == pytest.approx(exact, rel=1e-4)
    assert exact <= norms.dft_norm(weight, (5, 4)) * (1 + 1e-6)
    for wrong, words in (
        (nn.Linear(3, 4).weight, r'shape \(4, 3\): must be real numbers \(out, in, height, width'),
        (nn.Conv1d(1, 2, 3).weight, r'shape \(2, 1, 3\)'),
        (weight.cfloat(), 'complex64'),
        (weight[:0], r'shape \(0, 2, 2, 2\)'),
        (weight / 0, 'NaN or infinity'),
    ):
        for norm in (norms.operator_norm, norms.dft_norm):
            with pytest.raises(BadInput, match=words):
                norm(wrong, (5, 4))


# ------------------------------------------------------------------------------------------------
# Images, labels and callers
# ------------------------------------------------------------------------------------------------


def results(net, images, labels):
    """What functions return, as text; networks by what they compute."""
    found = {}
    for name, call in calls_on(net, images, labels).items():
        if name not in ('certify', 'measure_network', 'drop_dead', 'evaluate_bounds'):
            result = call()
            if isinstance(result, tuple) and isinstance(result[0], nn.Module):
                result = result[0]
            if isinstance(result, nn.Module):
                result = trace.outputs(result, images)
            found[name] = str(result)
    return found


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_value_depends_on_the_callers_gradient_mode(context):
    expected = results(small(), IMAGES, LABELS)
    with context():
        assert results(small(), IMAGES, LABELS) == expected
        frozen = small().requires_grad_(False)
        assert results(frozen, IMAGES.clone(), LABELS.clone()) == expected


def test_no_value_depends_on_strides_or_on_gradients_of_the_images():
    expected = results(small(), IMAGES, LABELS)
    turned = IMAGES.transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    last = IMAGES.to(memory_format=torch.channels_last)
    for images in (turned, last, IMAGES.clone().requires_grad_()):
        assert results(small(), images, LABELS) == expected
        assert images.grad is None


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.uint16, torch.uint64])
def test_labels_of_any_integer_type(dtype):
    labels = LABELS.to(dtype)
    assert results(small(), IMAGES, labels) == results(small(), IMAGES, LABELS)
    chain = nn.Sequential(nn.Flatten(), linear(24, CLASSES))
    assert (
        len(set(map(str, (evaluate_bounds(chain, IMAGES, each) for each in (labels, LABELS))))) == 1
    )
    assert certified(chain, IMAGES, labels) == certified(chain, IMAGES, LABELS)
    found = [
        certify_by_disagreement(chain, MESSAGE, IMAGES, each, IMAGES) for each in (labels, LABELS)
    ]
    assert found[0].proof.errors == found[1].proof.errors


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64])
def test_whole_numbers_as_images(dtype):
    """The data are measured; of networks only one that converts them takes them."""
    images, chain = (255 * IMAGES).to(dtype), nn.Sequential(nn.Flatten(), linear(24, CLASSES))
    squares = images.double().square().sum(0)
    data = norms.measure_data(chain, images)
    assert data.E_max == squares.max().item() and data.E_tot == squares.sum().item()
    words = f'images: Sequential does not take one of shape (1, 1, 6, 4) and {dtype}'
    are_refused(
        small(), RUN - {'evaluate_bounds'} | {'compress_layer', 'sharpness'}, words, images=images
    )
    are_refused(chain, ['evaluate_bounds'], words, images=images)
    are_refused(small(), ['input_gradient'], f'images of {dtype}', images=images)
    with pytest.raises(BadInput, match=f'images of {dtype}: must be floating-point'):
        compress(small_chain(), images, 0.1)
    converts = Forward(lambda self, x: self.net(x.float() / 255), net=small())
    found = trace.outputs(converts, images)
    assert torch.equal(found, trace.outputs(small(), images.float() / 255))


def test_an_empty_batch_is_refused():
    net, none = small(), {'images': IMAGES[:0], 'labels': LABELS[:0]}
    names = {'sharpness', 'input_gradient', 'compress_layer', 'representations', 'probes'}
    are_refused(net, names, '(0,', **none)
    with pytest.raises(BadInput, match=r'outputs \(0, 3\)'):
        landscape.measure_landscape(net, net, IMAGES[:0], LABELS[:0])
    with pytest.raises(BadInput, match=r'labels of shape \(0,\)'):
        certify_by_disagreement(net, MESSAGE, IMAGES[:0], LABELS[:0], IMAGES)
    assert trace.outputs(net, IMAGES[:0]).shape == (0, 3)


@pytest.mark.parametrize('shape', [24, IMAGES, '1x6x4'])
def test_a_shape_that_is_none_is_refused(shape):
    for function_ in (paths.path_norm, paths.path_magnitude, paths.measure_paths):
        with pytest.raises(BadInput, match='^input_shape = .*: must be') as caught:
            function_(small(), shape)
        assert '\n' not in str(caught.value)


def test_a_start_of_other_shapes_is_refused():
    other = nn.Sequential(nn.Flatten(), nn.Linear(24, 1), nn.ReLU(), nn.Linear(1, CLASSES))
    for name in ('distance', 'distance_product', 'path_distance'):
        with pytest.raises(BadInput, match='Sequential and Sequential'):
            landscape.MEASURES[name](small(), other, IMAGES, LABELS)


def test_falsify_takes_chains_in_every_style_and_of_one_geometry():
    chain = small_chain()

    def forward(self, x):
        return self.last(F.relu(self.second(torch.relu(self.first(x)))).flatten(1))

    layers = {'first': chain[0], 'second': chain[2], 'last': chain[5]}
    rows = [
        falsify(['path_bound'], {'it': each}, IMAGES, CLASSES)[0]
        for each in (chain, Forward(forward, **layers), nn.Sequential(chain))
    ]
    assert rows[0] == rows[1] == rows[2]
    padded = nn.Sequential(conv(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), linear(48, CLASSES))
    for nets, classes in (({'it': chain, 'other': padded}, CLASSES), ({'other': padded}, 10)):
        with pytest.raises(BadInput, match=f'other: must have {classes} outputs'):
            falsify(['path_bound'], nets, IMAGES, classes)
    (row,), _ = falsify(
        ['our_bound'], {'it': nn.Sequential(nn.Flatten(), linear(24, CLASSES))}, IMAGES, CLASSES
    )
    squares = IMAGES.double().square().sum(0)
    estimate = 1 + math.sqrt(2 * (math.log(2) + math.log(CLASSES)))  # without a hidden layer
    estimate *= math.sqrt(squares.max()) / M
    assert row['complexity'] == pytest.approx(estimate, rel=1e-6)
