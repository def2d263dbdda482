"""A network as a message: the code and its inverse, what it proves, the search, the commands."""

import csv
import itertools
import math
import re
import shutil
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, succeeds
from torch import nn

from conf import BadInput
from evaluation import rounded_up
from measures.tails import exact_binomial_inverse
from records import lock, read_metrics, rows_of
from studies.coded import __main__ as command
from studies.coded import certify_by_disagreement, coded_network, decode, encode, prove
from studies.coded import check as second
from studies.coded import search as searching
from studies.coded.message import (
    DIRECT,
    EXACT,
    FREQUENCIES,
    GAINS,
    LEVELS,
    UNITS,
    Code,
    _cosines,
    _write_tensor,
    _Writer,
    count_errors,
    scores,
    share,
)
from studies.coded.search import (
    _errors,
    _limits_of_class,
    _limits_of_unit,
    initial_code,
    nats,
    search,
    simplified,
)

SHIPPED = sorted((ROOT / 'results' / 'coded').glob('*/coded.bin'))
PAGE = (ROOT / 'docs' / 'coded.md').read_text()
WORDS = ' '.join(PAGE.split())


def random_code(seed, channels=1, classes=3, heavy=True):
    """A code of random shapes; with heavy tails, every level of an urn occurs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        size = 2.0 ** (6 * torch.rand(shape, generator=generator)) if heavy else 1.5
        integers = (torch.randn(shape, generator=generator) * size).round().long()
        return integers.clamp(1 - LEVELS[-1], LEVELS[-1] - 1)

    def pick(choices):
        return int(torch.randint(choices, (), generator=generator))

    kernels, geometry = [], []
    for _ in range(pick(4)):
        width, size = 1 + pick(4), 1 + pick(3)
        kernels.append(draw(width, channels, size, size))
        geometry.append((1 + pick(2), pick(3)))
        channels = width
    q, units = 1 + pick(3), pick(4)
    shapes = (units, channels, q, q), (classes, units), (classes, channels, q, q)
    return Code(kernels, geometry, pick(GAINS), *(draw(*shape) for shape in shapes))


def without_kernels(direct, hidden=None, head=None, gain=0):
    """A code of a classifier alone; without hidden units if none are given."""
    if hidden is None:
        hidden, head = direct.new_zeros(0, *direct.shape[1:]), direct.new_zeros(len(direct), 0)
    return Code([], [], gain, hidden, head, direct)


def same(one, other):
    tensors = zip([*one.kernels, *one[-3:]], [*other.kernels, *other[-3:]], strict=True)
    equal = all(torch.equal(*pair) for pair in tensors)
    return equal and (one.geometry, one.gain) == (other.geometry, other.gain)


def images_and_labels(m=60, classes=3, size=9, channels=1):
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(classes, (m,), generator=generator)
    return torch.rand(m, channels, size, size, generator=generator), labels


# --------------------------------------------------------------------------------------------------
# The message
# --------------------------------------------------------------------------------------------------


def test_encode_and_decode_are_inverse():
    for seed in range(300):
        shape = 1 + seed % 3, 2 + seed % 4
        code = random_code(seed, *shape)
        assert same(decode(encode(code), *shape), code)


def test_the_example_of_the_page():
    writer = _Writer()
    for counts, symbol in (([1] * 4, 2), ([64, 64, 32, 16, 8, 4, 2, 1, 1], 0), ([1, 1], 1)):
        writer(counts, symbol)
    assert writer.message() == bytes.fromhex('8b') and 'the message is the byte 8b.' in PAGE


def test_no_message_is_the_beginning_of_another_and_kraft_holds():
    """Over all strings of one and two bytes."""
    found = []
    for length in (1, 2):
        for string in itertools.product(range(256), repeat=length):
            try:
                decode(bytes(string), 1, 1)
            except BadInput:
                continue
            found.append(bytes(string))
    short = {message for message in found if len(message) == 1}
    assert found and not any(message[:1] in short for message in found if len(message) == 2)
    assert sum(256.0 ** -len(message) for message in found) <= 1


def test_every_string_is_refused_or_is_the_message_of_its_code():
    code = random_code(5)
    message = encode(code)
    strings = [message[:length] for length in range(len(message))]
    for string in [*strings, message + b'\0', message + b'\xff']:
        with pytest.raises(BadInput):
            decode(string, 1, 3)
    for i in range(len(message)):
        damaged = message[:i] + bytes([message[i] ^ 1]) + message[i + 1 :]
        try:
            other = decode(damaged, 1, 3)
        except BadInput:
            continue
        assert encode(other) == damaged and not same(other, code)


def test_a_message_is_as_long_as_its_symbols_cost():
    for seed in range(20):
        code = random_code(seed)
        empty = without_kernels(code.direct[:, :1] * 0)
        header = 8 * math.log(2) * len(encode(empty)) - nats(empty.direct)
        cost = sum(map(nats, [*code.kernels, *code[-3:]])) + len(code.kernels) * 12 * math.log(2)
        # Up to whole bytes, and geometries that occur again.
        assert abs(8 * math.log(2) * len(encode(code)) - header - cost) < 14


def ones(*shape):
    return torch.ones(*shape, dtype=torch.int64)


TOO_LARGE = {
    'width': without_kernels(ones(2, 65, 1, 1))._replace(
        kernels=[ones(65, 1, 1, 1)], geometry=[(1, 0)]
    ),
    'padding': without_kernels(ones(2, 1, 1, 1))._replace(
        kernels=[ones(1, 1, 1, 1)], geometry=[(1, 4)]
    ),
    'stride': without_kernels(ones(2, 1, 1, 1))._replace(
        kernels=[ones(1, 1, 1, 1)], geometry=[(0, 0)]
    ),
    'integer': without_kernels(ones(2, 1, 1, 1) * LEVELS[-1]),
    'gain': without_kernels(ones(2, 1, 1, 1), gain=GAINS),
    'units': without_kernels(ones(2, 1, 1, 1), ones(UNITS, 1, 1, 1), ones(2, UNITS)),
    'integers': without_kernels(0 * ones(9, 64, 8, 8)),
}


@pytest.mark.parametrize('code', TOO_LARGE.values(), ids=TOO_LARGE)
def test_too_large_a_network_has_no_message(code):
    with pytest.raises(BadInput):
        encode(code)


def test_a_short_file_cannot_ask_for_much_work():
    """A few bytes can declare 1.6 million zeros: refused before they are read."""
    writer, geometries = _Writer(), [1] * 128
    writer([1] * 8, 7)
    for layer in range(2):
        writer(geometries, 7 * 16)
        geometries[7 * 16] += 128
        writer([1] * 64, 63)
        if layer == 0:
            _write_tensor(writer, torch.zeros(64, 1, 8, 8))
    message = writer.message()
    assert len(message) < 16
    for program in (decode, second.decode):
        with pytest.raises(ValueError, match='more than 32768 integers'):
            program(message, 1, 10)


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------


def test_the_module_has_the_same_scores_exactly():
    images, _ = images_and_labels(m=10, size=28)
    for seed in range(20):
        code = random_code(seed, heavy=False)
        with torch.no_grad():
            outputs = coded_network(code, (1, 28, 28))((255 * images).round().double())
        assert torch.equal(outputs, scores(code, images).double())


def test_permuting_hidden_channels_changes_neither_scores_nor_nats():
    images, _ = images_and_labels()
    direct, hidden = torch.arange(-24, 24).view(3, 4, 2, 2), torch.arange(32).view(2, 4, 2, 2) - 20
    code = without_kernels(direct, hidden, torch.arange(-3, 3).view(3, 2), gain=1)
    code = code._replace(kernels=[torch.arange(-8, 8).view(4, 1, 2, 2)], geometry=[(1, 0)])
    order, turned = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 0])
    other = code._replace(kernels=[code.kernels[0][order]], direct=direct[:, order])
    other = other._replace(hidden=hidden[:, order][turned], head=code.head[:, turned])
    assert torch.equal(scores(code, images), scores(other, images))
    assert list(map(nats, code[-3:])) == list(map(nats, other[-3:]))
    assert len(encode(code)) == len(encode(other))


def test_equal_channels_are_merged_and_common_factors_divided_out():
    images, _ = images_and_labels(size=28)
    for seed in range(20):
        code = random_code(seed, heavy=False)
        if not code.kernels:
            continue
        kernels, channels = list(code.kernels), code.direct.shape[1]
        kernels[0] = 2 * kernels[0]
        # Channels 0 and 1 of the last layer become equal, and so do they of the layers before.
        kernels = [kernel[[0, 0, *range(1, len(kernel))]] for kernel in kernels]
        for layer in range(1, len(kernels)):
            kernels[layer] = kernels[layer][:, [0, 0, *range(1, kernels[layer].shape[1])]]
        twice = [0, 0, *range(1, channels)]
        larger = code._replace(
            kernels=kernels, hidden=code.hidden[:, twice], direct=code.direct[:, twice]
        )
        smaller = simplified(larger)
        assert all(len(k) < len(other) for k, other in zip(smaller.kernels, larger.kernels))
        assert len(encode(smaller)) <= len(encode(larger))
        found, expected = scores(smaller, images).double(), scores(larger, images).double()
        assert torch.equal(found * expected.abs().max(), expected * found.abs().max())
        assert expected.abs().max() > found.abs().max() or not expected.any()


def test_scores_are_those_of_the_formula():
    """An image of 2x2 pixels without kernels, by hand: one feature, the sum times 16 * 16 * 4."""
    image, one = torch.tensor([[[[0, 1], [1, 1]]]]) / 255, ones(1, 1, 1, 1)
    head = torch.tensor([[5, 7], [-1, 0]])
    code = without_kernels(torch.cat([one, -2 * one]), torch.cat([2 * one, -one]), head)
    feature = 3 * 16 * 16 * 4
    first, last = DIRECT * feature + 5 * 2 * feature, -DIRECT * 2 * feature - 2 * feature
    assert scores(code, image).tolist() == [[first, last]]


def test_the_cosines_are_far_from_where_rounding_changes():
    """So they are the same integers on every machine."""
    for n in range(1, 65):
        for u, i in itertools.product(range(FREQUENCIES), range(n)):
            value = 16 * math.cos(math.pi * (i + 0.5) * u / n)
            assert abs(value - math.floor(value) - 0.5) > 1e-7
    assert _cosines(4, 2).tolist() == [[16, 16, 16, 16], [15, 6, -6, -15]]


def test_ties_are_errors():
    images, labels = images_and_labels()
    code = without_kernels(0 * ones(3, 1, 1, 1))
    assert count_errors(code, images, labels) == len(labels)


def test_scores_that_float64_could_not_hold_are_refused():
    kernels, most = [torch.full((1, 1, 8, 8), 127)] * 3, torch.full((3, 1, 1, 1), 127)
    direct = without_kernels(most)._replace(kernels=kernels, geometry=[(1, 3)] * 3)
    units = without_kernels(0 * most, most, most.view(3, 1).expand(3, 3))
    units = units._replace(kernels=kernels[:2], geometry=[(1, 3)] * 2)
    for code in (direct, units):
        with pytest.raises(BadInput, match='2\\^53'):
            scores(code, images_and_labels()[0])
    assert EXACT == 2**53


# --------------------------------------------------------------------------------------------------
# The theorem, and the second program
# --------------------------------------------------------------------------------------------------


def test_a_message_proves_what_its_length_and_its_errors_say():
    images, labels = images_and_labels(m=3000)
    generator = torch.Generator().manual_seed(0)
    code = without_kernels(torch.randint(-1, 2, (3, 1, 2, 2), generator=generator), gain=1)
    predicted = scores(code, images).argmax(1)
    labels = torch.where(torch.arange(3000) % 9 > 0, predicted, labels)
    message = encode(code)
    proof = prove(message, images, labels, 3)
    assert same(proof.code, code) and proof.errors == count_errors(code, images, labels)
    eta = Fraction(1, 1000 * 256 ** (len(message) + 16))
    assert share(len(message), 0.001) == share(len(message), '0.001') == eta
    assert proof.bound == exact_binomial_inverse(proof.errors, 3000, eta)
    right = (predicted == labels).nonzero()[0]
    wrong = labels.index_copy(0, right, (labels[right] + 1) % 3)
    assert prove(message, images, wrong, 3).bound > proof.bound
    assert prove(message, images, labels.to(torch.uint8), 3, 0.01).bound < proof.bound


def test_bad_arguments_are_refused_in_one_line():
    images, labels = images_and_labels()
    message = encode(random_code(3, heavy=False))
    for arguments in (
        (images * 2, labels, 3),
        (images.sub(1), labels, 3),
        (images[:, 0], labels, 3),
        (images[:, :, :1, :1], labels, 3),
        (images, labels[1:], 3),
        (images, labels.float(), 3),
        (images, labels + 1, 3),
        (images, labels, 3, 0),
        (images * math.nan, labels, 3),
    ):
        with pytest.raises(BadInput) as refusal:
            prove(message, *arguments)
        assert '\n' not in str(refusal.value)


def of_both_programs(message, images, labels, classes):
    """(errors, bound in millionths) by each program; None where it refuses the message."""
    found = []
    try:
        proof = prove(message, images, labels, classes)
        found.append((proof.errors, proof.bound * 10**6))
    except BadInput:
        found.append(None)
    try:
        network = second.decode(message, images.shape[1], classes)
        pixels = (255 * images).round().byte().numpy()
        errors = second.count_errors(network, pixels, labels.numpy())
        found.append((errors, second.prove(errors, len(labels), len(message))))
    except ValueError:
        found.append(None)
    return found


@pytest.mark.long
def test_the_second_program_agrees_on_random_messages():
    """300 of them, each also with a byte changed, on images of 9x9 pixels."""
    rng, refusals = np.random.default_rng(0), 0
    for seed in range(300):
        shape = 1 + seed % 3, 2 + seed % 4
        images, labels = images_and_labels(20, shape[1], channels=shape[0])
        message = encode(random_code(seed, *shape, heavy=seed % 2 == 0))
        i = rng.integers(len(message))
        damaged = message[:i] + bytes([rng.integers(256)]) + message[i + 1 :]
        for string in (message, damaged):
            one, other = of_both_programs(string, images, labels, shape[1])
            assert one == other
            refusals += one is None
    assert 100 < refusals < 500


@pytest.mark.long
@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_messages_prove_what_the_page_says_by_both_programs(path, mnist):
    """Decoded and counted here, in integers; no weights of a trained network are read."""
    line = command.coded_line(path.read_bytes(), mnist, 'MNIST', 0.001)
    name = str(path.relative_to(ROOT))
    assert f'{name}: {line.partition("; ")[0]}\n' in PAGE and line.endswith('(as published)')
    row = table('messages.csv')[SHIPPED.index(path)]
    one, other = of_both_programs(path.read_bytes(), mnist.train_images, mnist.train_labels, 10)
    assert one == other == (round(float(row['train_error']) * 60000), float(row['bound']) * 10**6)


@pytest.mark.process
def test_the_second_program_needs_no_torch(mnist):
    program = ROOT / 'studies' / 'coded' / 'check.py'
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv.pop(0); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command_line = [sys.executable, '-c', code, str(program), str(SHIPPED[0])]
    found = subprocess.run(command_line, capture_output=True, text=True, check=True).stdout
    assert found.startswith('287 bytes, 1099 errors of 60000, proven error 0.0694; MNIST edc0d109')


# --------------------------------------------------------------------------------------------------
# Disagreement
# --------------------------------------------------------------------------------------------------


def test_disagreement_counts_differences_and_ties_of_either_network():
    images, labels = images_and_labels(m=400)
    direct = torch.tensor([1, -1, 0]).view(3, 1, 1, 1)  # class 0 on every image that is not black
    message = encode(without_kernels(direct))
    shift = nn.Sequential(nn.Flatten(), nn.Linear(81, 3))
    with torch.no_grad():
        shift[1].weight.zero_()
        shift[1].bias.copy_(torch.tensor([1.0, 0, 0]))
    held_out = images[:100].clone()
    held_out[:5] = 0  # the coded network ties
    found = certify_by_disagreement(shift, message, images, labels, held_out)
    half = Fraction(1, 2000)
    proof = prove(message, images, labels, 3, half)
    assert found.differ == 5 and found.proof.bound == proof.bound
    assert found.share == exact_binomial_inverse(5, 100, half)
    assert found.bound == min(1, proof.bound + found.share)
    with torch.no_grad():
        shift[1].bias.fill_(1.0)  # f ties everywhere
    assert certify_by_disagreement(shift, message, images, labels, held_out).differ == 100
    assert certify_by_disagreement(shift, message, images, labels, held_out).bound == 1
    with pytest.raises(BadInput, match='outputs of shape'):
        certify_by_disagreement(nn.Conv2d(1, 3, 1), message, images, labels, held_out)


class Pixels(nn.Module):
    def forward(self, images):
        return (255 * images).round().double()


def test_no_bound_is_below_the_error_on_random_labels(digits):
    """20 draws of labels, of true error 0.9: for the coded network itself and for one fitted."""
    images, held_out = digits.train_images, digits.test_images
    features = torch.cat([images.flatten(1), torch.ones(len(images), 1)], 1)
    message = encode(without_kernels(torch.eye(10, 1, dtype=torch.int64).view(10, 1, 1, 1)))
    coded = nn.Sequential(Pixels(), coded_network(decode(message, 1, 10), (1, 8, 8)))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, digits.train_labels.shape, generator=generator)
        targets = nn.functional.one_hot(labels).float()
        solution = torch.linalg.lstsq(features, targets, driver='gelsd').solution
        fitted = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        fitted[1].weight, fitted[1].bias = map(nn.Parameter, (solution[:64].T, solution[64]))
        itself = certify_by_disagreement(coded, message, images, labels, held_out, delta=0.5)
        assert 0.9 <= itself.bound < 1 and itself.differ == 0
        assert certify_by_disagreement(fitted, message, images, labels, held_out).bound >= 0.9


def table(name):
    with open(ROOT / 'results' / 'coded' / name, newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_the_command_bounds_a_network_by_its_disagreement(mnist):
    folder = ROOT / 'results' / 'sparse-certificate' / 'CONV-3-16'
    line = succeeds(folder, '--message', SHIPPED[0], program=command.main)
    assert 'error at most 0.1161: ' in line and '(they differ on 398 of 10000 test images)' in line
    (row,) = [
        row for row in table('disagreement.csv') if row['name'] == 'sparse-certificate/CONV-3-16'
    ]
    assert (row['differ'], row['bound']) == ('398', '0.1161')


# --------------------------------------------------------------------------------------------------
# The search
# --------------------------------------------------------------------------------------------------


def small_net():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 2, bias=False), nn.ReLU(), nn.Conv2d(3, 4, 2, bias=False), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 10, bias=False))


@pytest.mark.long
def test_the_search_repeats_continues_and_tells_what_the_message_proves(digits, monkeypatch):
    monkeypatch.setattr(searching, 'EPOCHS', 20)
    data = digits.train_images, digits.train_labels
    code = initial_code(small_net(), (1, 8, 8), 10)
    *_, (done, bound, best) = found = list(search(code, *data, sweeps=6))
    bounds = [bound for _, bound, _ in found]
    assert done == 1 and len(found) == 7 and bounds == sorted(bounds, reverse=True)
    *_, (_, again, repeated) = search(code, *data, sweeps=6)
    assert again == bound and same(best, repeated)
    proof = prove(encode(best), *data, 10)
    assert proof.errors < 400 and bound - 0.01 < proof.bound <= bound + 1e-6
    *_, (_, further, _) = search(best, *data, sweeps=2)
    assert further <= bound


def test_a_search_that_holds_the_kernels_does_not_merge_them():
    images, labels = images_and_labels()
    kernel = torch.ones(2, 1, 2, 2, dtype=torch.int64)
    code = searching.unfitted([kernel], [(1, 0)], 1, 3)
    for hold, width in ((True, 2), (False, 1)):
        *_, (_, _, best) = search(code, images, labels, sweeps=1, hold=hold)
        assert len(best.kernels[0]) == width


def test_limits_are_where_a_sample_turns_from_right_to_wrong():
    """Of a class's score and of a hidden unit before its ReLU, against counting at many values."""
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(4, 200)).astype(np.float32), rng.integers(4, size=200)
    weights = np.array([1, -2, 0, 1], np.float32) / DIRECT
    of_class = _limits_of_class(2, scores, labels)
    of_unit = _limits_of_unit(weights, scores, labels)
    for value in np.linspace(-9.01, 9, 61, dtype=np.float32):
        moved = scores.copy()
        moved[2] = value
        driven = scores + weights[:, None] * max(value, 0)
        for (low, high), outputs in ((of_class, moved), (of_unit, driven)):
            assert np.array_equal((low < value) & (value < high), _errors(outputs, labels)[1] > 0)


def test_networks_that_have_no_message_are_refused():
    flat = nn.Flatten(), nn.Linear(64, 5, bias=False), nn.ReLU(), nn.Linear(5, 10, bias=False)
    dead = small_net()
    nn.init.zeros_(dead[2].weight)
    biased = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for net, word in ((nn.Sequential(*flat), 'square'), (biased, 'bias'), (dead, 'zero')):
        with pytest.raises(BadInput, match=word):
            initial_code(net, (1, 8, 8), 10)


def test_random_labels_are_not_certified(digits):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, digits.train_labels.shape, generator=generator)
    code = initial_code(small_net(), (1, 8, 8), 10)
    *_, (_, _, best) = search(code, digits.train_images, labels, sweeps=10)
    bound = prove(encode(best), digits.train_images, labels, 10).bound
    assert bound >= 0.9 - 3 * math.sqrt(0.09 / len(labels))


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(uninterrupted, tmp_path):
    """The folder of a small trained network on the digits."""
    shutil.copytree(uninterrupted, tmp_path / 'run')
    return tmp_path / 'run' / 'CONV-3-4'


def test_the_command_writes_a_message_continues_and_checks_it(folder):
    first = succeeds(folder, '--sweeps', 2, program=command.main)
    path = folder / 'coded.bin'
    message = path.read_bytes()
    assert first.startswith(f'{path}: {len(message)} bytes, ') and first.count('\n') == 1
    assert ' errors of 1437, ' in first and '; digits, sha256 ' in first
    assert succeeds('--check', path, program=command.main) == first
    shutil.copy(path, folder.parent.parent / 'coded.bin')
    moved = '--check', folder.parent.parent / 'coded.bin'
    assert 'give --dataset-name' in refused(*moved, program=command.main)
    named = succeeds(*moved, '--dataset-name', 'digits', program=command.main)
    assert named.partition(': ')[2] == first.partition(': ')[2]
    second_line = succeeds(folder, '--sweeps', 1, program=command.main)
    proven = [float(line.split('proven error ')[1].split()[0]) for line in (first, second_line)]
    assert proven[1] <= proven[0]


@pytest.mark.parametrize('change', ['train_samples = 100', 'label_noise = 0.1', 'normalize = True'])
def test_a_check_refuses_parts_noise_and_standardization(folder, change):
    settings = folder.parent / 'global_settings.py'
    name = change.split()[0]
    lines = [
        change if line.startswith(name) else line for line in settings.read_text().splitlines()
    ]
    settings.write_text('\n'.join(lines))
    (folder / 'coded.bin').write_bytes(encode(without_kernels(0 * ones(10, 1, 1, 1))))
    assert name in refused('--check', folder / 'coded.bin', program=command.main)


def test_a_second_search_of_a_network_is_refused(folder):
    """So that the worse of two messages never replaces the better one."""
    with lock(folder):
        assert 'another process' in refused(folder, '--sweeps', 1, program=command.main)
    assert not (folder / 'coded.bin').exists()


@pytest.mark.parametrize(
    'arguments',
    [
        [],
        ['nowhere'],
        ['--check', 'nowhere', '--dataset-name', 'digits'],
        ['--check', ROOT / 'train.py', '--dataset-name', 'digits'],
        ['nowhere', '--seconds', 0],
        ['nowhere', '--seconds', 1, '--sweeps', 1],
        ['nowhere', '--check', 'nowhere'],
        ['nowhere', '--dataset-name', 'digits'],
        ['--check', 'nowhere', '--sweeps', 3],
        ['nowhere', '--message', 'nowhere', '--sweeps', 3],
    ],
)
def test_the_command_refuses_in_one_line(arguments):
    assert ': error: ' in refused(*arguments, program=command.main)


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


@pytest.mark.pages
def test_the_page_quotes_the_message_about_cifar10():
    """As far as it can be told without the images: length, and errors of the trained network."""
    folder = ROOT / 'results' / 'coded-cifar10' / 'CONV-3-16'
    message = (folder / 'coded.bin').read_bytes()
    code = decode(message, 3, 10)
    assert [len(kernel) for kernel in code.kernels] == [2, 2, 3] and code.direct.shape[0] == 10
    assert f'CONV-3-16/coded.bin: {len(message)} bytes, 29125 errors' in PAGE
    bound = exact_binomial_inverse(29125, 50000, share(len(message), 0.001))
    assert f'proven error {rounded_up(bound):.4f}' in PAGE
    rows = rows_of(read_metrics(folder / 'metrics.csv'))
    (dense,) = [row for row in rows if (row['round'], row['epoch']) == (0, 10)]
    errors = f'{dense["test_error"]:.4f} before and of {rows[-1]["test_error"]:.4f} after pruning'
    assert f'test error of {errors}' in WORDS


@pytest.mark.pages
def test_the_page_quotes_the_controls():
    rows = table('controls.csv')
    assert len(rows) == 5
    for row in rows:
        errors = f'{float(row["train_error"]):.4f}|{float(row["test_error"]):.4f}'
        bound = rounded_up(float(row['bound']))
        assert f'|{row["bytes"]}|{errors}|{bound:.4f}|' in PAGE, row['name']


@pytest.mark.pages
def test_the_page_tells_where_the_bytes_of_a_message_go():
    message, rows = SHIPPED[0].read_bytes(), []
    code = decode(message, 1, 10)
    assert [len(kernel) for kernel in code.kernels] == [1, 1, 6]
    assert f'`--seconds 600` it came to {table("searches.csv")[1]["bound"]}.' in WORDS
    for name, tensors in zip(('kernels', *'abw'), (code.kernels, *([part] for part in code[-3:]))):
        integers, nonzero = (
            sum(map(count, tensors)) for count in (torch.numel, torch.count_nonzero)
        )
        size = sum(map(nats, tensors)) / math.log(256)
        rows.append(size)
        assert f'\n|{name}|{integers}|{nonzero}|{size:.1f}|\n' in PAGE
    (shapes,) = re.findall(r'^\|depth.*\|([\d.]+)\|$', PAGE, flags=re.M)
    assert 0 < len(message) - sum(rows) - float(shapes) < 1
