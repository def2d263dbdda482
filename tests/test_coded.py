"""A network as a message: the code and its inverse, the theorem's numbers, the search, and the command."""

import csv
import itertools
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, signals_as_before
from torch import nn

from conf import BadInput
from evaluation import rounded_up
from measures.pac_bayes import CHOICES, kl_inverse
from records import read_metrics
from studies.coded import __main__ as room
from studies.coded.message import (
    DIRECT,
    EXACT,
    FREQUENCIES,
    GAINS,
    LEVELS,
    UNITS,
    Code,
    _cosines,
    binomial_inverse,
    coded_network,
    count_errors,
    decode,
    encode,
    log_eta,
    prove,
    scores,
)
from studies.coded.search import _errors, _limits_of_class, _limits_of_unit, nats, rounded, search

SHIPPED = sorted((ROOT / 'results' / 'coded').glob('*/coded.bin'))


def random_code(seed, channels=1, classes=3, heavy=True):
    """A code of random shapes; with heavy tails, every level of an urn occurs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        size = 2.0 ** (6 * torch.rand(shape, generator=generator)) if heavy else 1.5
        return (
            (torch.randn(shape, generator=generator) * size)
            .round()
            .long()
            .clamp(1 - LEVELS[-1], LEVELS[-1] - 1)
        )

    def pick(choices):
        return int(torch.randint(choices, (), generator=generator))

    kernels, geometry, before = [], [], channels
    for _ in range(pick(4)):
        width, size = 1 + pick(4), 1 + pick(3)
        kernels.append(draw(width, before, size, size))
        geometry.append((1 + pick(2), pick(3)))
        before = width
    q, units = 1 + pick(3), pick(4)
    shapes = (units, before, q, q), (classes, units), (classes, before, q, q)
    return Code(kernels, geometry, pick(GAINS), *(draw(*shape) for shape in shapes))


def classifier(direct, *hidden_and_head):
    """The end of a code: hidden units, what classes make of them (none if not given), and the direct part."""
    empty = direct.new_zeros(0, *direct.shape[1:]), direct.new_zeros(len(direct), 0)
    return *(hidden_and_head or empty), direct


def same(one, other):
    tensors = zip([*one.kernels, *one[-3:]], [*other.kernels, *other[-3:]], strict=True)
    return (
        all(torch.equal(*pair) for pair in tensors)
        and one.geometry == other.geometry
        and one.gain == other.gain
    )


def images_and_labels(m=60, classes=3, size=9, channels=1):
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(classes, (m,), generator=generator)
    return torch.rand(m, channels, size, size, generator=generator), labels


# ----------------------------------------------------------------------------------------------------------------------
# The message
# ----------------------------------------------------------------------------------------------------------------------


def test_encode_and_decode_are_inverse():
    for seed in range(1000):
        code = random_code(seed, channels=1 + seed % 3, classes=2 + seed % 4)
        assert same(decode(encode(code), 1 + seed % 3, 2 + seed % 4), code)


def test_no_message_is_the_beginning_of_another_and_kraft_holds():
    """Over all strings of one and two bytes: those that are messages."""
    found = []
    for length in (1, 2):
        for string in itertools.product(range(256), repeat=length):
            try:
                decode(bytes(string), 1, 1)
            except BadInput:
                continue
            found.append(bytes(string))
    assert found and not any(
        long[:1] == short for short in found for long in found if len(short) < len(long)
    )
    assert sum(256.0 ** -len(message) for message in found) <= 1


def test_every_string_is_refused_or_is_the_message_of_its_code():
    message = encode(random_code(5))
    strings = [message[:length] for length in range(len(message))] + [
        message + b'\0',
        message + b'\xff',
    ]
    for string in strings:
        with pytest.raises(BadInput):
            decode(string, 1, 3)
    for place in range(len(message)):
        damaged = message[:place] + bytes([message[place] ^ 1]) + message[place + 1 :]
        try:
            code = decode(damaged, 1, 3)
        except BadInput:
            continue
        assert encode(code) == damaged and not same(code, random_code(5))


def test_a_message_is_as_long_as_its_symbols_cost():
    for seed in range(20):
        code = random_code(seed)
        empty = Code([], [], 0, *classifier(code.direct[:, :1] * 0))
        header = 8 * math.log(2) * len(encode(empty)) - nats(empty.direct)
        cost = sum(map(nats, [*code.kernels, *code[-3:]])) + len(code.kernels) * 12 * math.log(2)
        assert (
            abs(8 * math.log(2) * len(encode(code)) - header - cost) < 14
        )  # bytes, and geometries that occur again


def test_too_large_a_network_has_no_message():
    kernel = torch.ones(65, 1, 1, 1, dtype=torch.int64)
    direct = torch.ones(2, 65, 1, 1, dtype=torch.int64)
    units = direct[:1].expand(UNITS, -1, -1, -1), direct.new_ones(2, UNITS)
    for code in (
        Code([kernel], [(1, 0)], 0, *classifier(direct)),
        Code(
            [kernel[:1]], [(1, 4)], 0, *classifier(direct[:, :1])
        ),  # would be read as stride 2 without padding
        Code([kernel[:1]], [(0, 0)], 0, *classifier(direct[:, :1])),
        Code([], [], 0, *classifier(direct[:, :1] * LEVELS[-1])),
        Code([], [], GAINS, *classifier(direct)),
        Code([], [], 0, *classifier(direct, *units)),
    ):
        with pytest.raises(BadInput):
            encode(code)


# ----------------------------------------------------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------------------------------------------------


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
    head = torch.arange(-3, 3).view(3, 2)
    code = Code(
        [torch.arange(-8, 8).view(4, 1, 2, 2)], [(1, 0)], 1, *classifier(direct, hidden, head)
    )
    order, turned = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 0])
    tensors = classifier(direct[:, order], hidden[:, order][turned], head[:, turned])
    other = Code([code.kernels[0][order]], code.geometry, 1, *tensors)
    assert torch.equal(scores(code, images), scores(other, images))
    assert list(map(nats, code[-3:])) == list(map(nats, other[-3:])) and len(encode(code)) == len(
        encode(other)
    )


def test_scores_are_those_of_the_formula():
    """An image of 2x2 pixels without kernels, by hand: one feature, the sum times 16 * 16 * 4."""
    image, one = torch.tensor([[[[0, 1], [1, 1]]]]) / 255, torch.ones(1, 1, 1, 1, dtype=torch.int64)
    tensors = (
        torch.cat([one, -2 * one]),
        torch.cat([2 * one, -one]),
        torch.tensor([[5, 7], [-1, 0]]),
    )
    code = Code([], [], 0, *classifier(tensors[0], tensors[1], tensors[2]))
    feature = 3 * 16 * 16 * 4
    assert scores(code, image).tolist() == [
        [DIRECT * feature + 5 * 2 * feature, -DIRECT * 2 * feature - 2 * feature]
    ]


def test_doubling_a_layer_changes_no_prediction():
    images, labels = images_and_labels()
    code = random_code(8, heavy=False)
    code = code._replace(head=code.head.clamp(-60, 60), direct=code.direct.clamp(-60, 60))
    doubled = code._replace(head=2 * code.head, direct=2 * code.direct)
    assert torch.equal(2 * scores(code, images), scores(doubled, images))
    assert count_errors(code, images, labels) == count_errors(doubled, images, labels)


def test_the_cosines_are_far_from_where_rounding_changes():
    """So that they are the same integers on every machine."""
    for n in range(1, 65):
        for u, i in itertools.product(range(FREQUENCIES), range(n)):
            value = 16 * math.cos(math.pi * (i + 0.5) * u / n)
            assert abs(value - math.floor(value) - 0.5) > 1e-7
    assert _cosines(4, 2).tolist() == [[16, 16, 16, 16], [15, 6, -6, -15]]


def test_ties_are_errors():
    images, labels = images_and_labels()
    code = Code([], [], 0, *classifier(torch.zeros(3, 1, 1, 1, dtype=torch.int64)))
    assert count_errors(code, images, labels) == len(labels)


def test_scores_that_float64_could_not_hold_are_refused():
    kernel = torch.full((1, 1, 8, 8), 127)
    most = torch.full((3, 1, 1, 1), 127)
    code = Code([kernel] * 3, [(1, 3)] * 3, 0, *classifier(most))
    deep = Code(
        [kernel] * 2, [(1, 3)] * 2, 0, *classifier(0 * most, most, most.view(3, 1).expand(3, 3))
    )
    for large in (code, deep):
        with pytest.raises(BadInput, match='2\\^53'):
            scores(large, images_and_labels()[0])
    assert EXACT == 2**53


# ----------------------------------------------------------------------------------------------------------------------
# The theorem
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'errors, m, eta, value',
    [
        (3, 100, 0.05, 0.0757107938),
        (27, 1000, 1e-6, 0.0596574880),
        (0, 50, 0.01, 0.0879891606),
        (5, 5, 0.5, 1.0),
    ],
)
def test_binomial_inverse_of_known_values(errors, m, eta, value):
    """Those of scipy.stats.beta.ppf(1 - eta, errors + 1, m - errors)."""
    assert binomial_inverse(errors, m, math.log(eta)) == pytest.approx(value, abs=1e-9)


def test_binomial_inverse_is_below_chernoff_and_has_the_tail_that_it_says():
    for errors, m, nats_ in ((1600, 60000, 1300.0), (0, 10, 3.0), (9, 10, 0.5)):
        p = binomial_inverse(errors, m, -nats_)
        assert errors / m <= p <= kl_inverse(errors / m, nats_ / m) + 1e-12
        terms = [math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1) + k * math.log(p) + (m - k) * math.log1p(-p)
                 for k in range(errors + 1)]  # fmt: skip
        tail = max(terms) + math.log(math.fsum(math.exp(term - max(terms)) for term in terms))
        assert tail == pytest.approx(-nats_, abs=1e-6)


def test_a_message_proves_what_its_length_and_its_errors_say():
    images, labels = images_and_labels(m=3000)
    code = Code(
        [],
        [],
        1,
        *classifier(torch.randint(-1, 2, (3, 1, 2, 2), generator=torch.Generator().manual_seed(0))),
    )
    labels = scores(code, images).argmax(1).where(torch.arange(3000) % 9 > 0, labels)
    message = encode(code)
    proof = prove(message, images, labels, 3)
    assert same(proof.code, code) and proof.errors == count_errors(code, images, labels)
    assert log_eta(len(message), 0.001) == pytest.approx(
        math.log(0.001 / CHOICES) - 8 * len(message) * math.log(2)
    )
    assert proof.bound == binomial_inverse(proof.errors, 3000, log_eta(len(message), 0.001))
    right = (scores(code, images).argmax(1) == labels).nonzero()[0]
    wrong = labels.index_copy(0, right, (labels[right] + 1) % 3)
    assert (
        prove(message, images, wrong, 3).bound
        > proof.bound
        > prove(message, images, labels, 3, 0.01).bound
    )


def test_bad_arguments_are_refused_in_one_line():
    images, labels = images_and_labels()
    message = encode(random_code(3, heavy=False))
    for arguments, options in (
        ((images * 2, labels), {}),
        ((images.sub(1), labels), {}),
        ((images[:, 0], labels), {}),
        ((images[:, :, :1, :1], labels), {}),
        ((images, labels[1:]), {}),
        ((images, labels.float()), {}),
        ((images, labels + 1), {}),
        ((images, labels), {'delta': 0}),
        ((images.fill_(math.nan), labels), {}),
    ):
        with pytest.raises(BadInput) as refusal:
            prove(message, *arguments, 3, **options)
        assert '\n' not in str(refusal.value)


# ----------------------------------------------------------------------------------------------------------------------
# The search
# ----------------------------------------------------------------------------------------------------------------------


def small_net():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 2, bias=False), nn.ReLU(), nn.Conv2d(3, 4, 2, bias=False), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 10, bias=False))


def test_the_search_repeats_goes_on_and_tells_what_the_message_proves(digits):
    data = digits.train_images, digits.train_labels
    code = rounded(small_net(), (1, 8, 8), 10)
    *_, (share, bound, best) = found = list(search(code, *data, sweeps=20))
    assert (
        share == 1
        and len(found) == 21
        and [b for _, b, _ in found] == sorted((b for _, b, _ in found), reverse=True)
    )
    *_, (_, again, repeated) = search(code, *data, sweeps=20)
    assert again == bound and same(best, repeated)
    proof = prove(encode(best), *data, 10)
    assert proof.errors < 300 and proof.bound < found[0][1] + 1e-9
    assert proof.bound == pytest.approx(
        bound, abs=0.02
    )  # without the bytes' rounding, and by Chernoff's bound
    *_, (_, further, _) = search(best, *data, sweeps=5)
    assert further <= bound + 1e-12  # sums of nats in another order


def test_limits_are_where_a_sample_turns_from_right_to_wrong():
    """Of a class's score and of a hidden unit before its ReLU, against counting at many values."""
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(4, 200)).astype(np.float32), rng.integers(4, size=200)
    weights = np.array([1, -2, 0, 1], np.float32) / DIRECT
    of_class, of_unit = (
        _limits_of_class(2, scores, labels),
        _limits_of_unit(weights, scores, labels),
    )
    for value in np.linspace(-9.01, 9, 61, dtype=np.float32):
        moved = scores.copy()
        moved[2] = value
        driven = scores + weights[:, None] * max(value, 0)
        for (low, high), outputs in ((of_class, moved), (of_unit, driven)):
            assert np.array_equal((low < value) & (value < high), _errors(outputs, labels)[1] > 0)


def test_networks_that_have_no_message_are_refused(digits):
    flat = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 5, bias=False), nn.ReLU(), nn.Linear(5, 10, bias=False)
    )
    biased = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    dead = small_net()
    nn.init.zeros_(dead[2].weight)
    for net, word in ((flat, 'square'), (biased, 'bias'), (dead, 'zero')):
        with pytest.raises(BadInput, match=word):
            rounded(net, (1, 8, 8), 10)


def test_random_labels_are_not_certified(digits):
    labels = torch.randint(
        10, digits.train_labels.shape, generator=torch.Generator().manual_seed(0)
    )
    code = rounded(small_net(), (1, 8, 8), 10)
    *_, (_, _, best) = search(code, digits.train_images, labels, sweeps=10)
    deviation = math.sqrt(0.09 / len(labels))
    assert prove(encode(best), digits.train_images, labels, 10).bound >= 0.9 - 3 * deviation


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(uninterrupted, tmp_path):
    """The folder of a small trained network on the digits."""
    shutil.copytree(uninterrupted, tmp_path / 'run')
    return tmp_path / 'run' / 'CONV-3-4'


def test_the_command_writes_a_message_goes_on_and_checks_it(folder, capsys):
    assert room.main([str(folder), '--sweeps', '2']) == 0
    first = capsys.readouterr().out
    message = (folder / 'coded.bin').read_bytes()
    assert (
        first.startswith(f'{folder / "coded.bin"}: {len(message)} bytes, train error 0.')
        and first.count('\n') == 1
    )
    assert room.main(['--check', str(folder / 'coded.bin'), '--dataset-name', 'digits']) == 0
    assert capsys.readouterr().out == first
    assert room.main([str(folder), '--sweeps', '1']) == 0
    proven = [
        float(line.split('proven error ')[1].split()[0])
        for line in (first, capsys.readouterr().out)
    ]
    assert proven[1] <= proven[0]


@pytest.mark.parametrize(
    'arguments',
    [
        [],
        ['nowhere'],
        ['--check', 'nowhere'],
        ['--check', str(ROOT / 'coded.py')],
        ['nowhere', '--seconds', '0'],
        ['nowhere', '--seconds', '1', '--sweeps', '1'],
        ['nowhere', '--check', 'nowhere'],
        ['nowhere', '--dataset-name', 'digits'],
        ['--check', 'nowhere', '--sweeps', '3'],
    ],
)
def test_the_command_refuses_in_one_line(arguments, capsys):
    data = ['--dataset-name', 'digits'] if arguments[:1] == ['--check'] else []
    assert room.main([*arguments, *data]) == 2
    caught = capsys.readouterr()
    assert (
        not caught.out
        and caught.err.startswith('coded.py: error: ')
        and caught.err.count('\n') == 1
    )


def test_a_command_that_is_stopped_says_what_it_has_kept(folder, monkeypatch, capsys):
    """Nothing where it has found no message yet."""
    monkeypatch.setattr(
        room, 'search', lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(1)
    )
    path, stopped = folder / 'coded.bin', 'coded.py: stopped by SIGINT'
    with signals_as_before():
        for words in ('', f'; {path} has the best message so far'):
            assert room.main([str(folder)]) == 130 and capsys.readouterr().err.endswith(
                f'{stopped}{words}\n'
            )
            path.write_bytes(SHIPPED[0].read_bytes())
            monkeypatch.setattr(room, 'read', lambda *_: None)


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.parent.name)
def test_the_shipped_messages_prove_what_the_page_says(path, mnist):
    """Decoded and counted here, in integers; no weights of a trained network are read."""
    line = room.coded_line(path.read_bytes(), mnist, 0.001)
    assert (
        SHIPPED and f'{path.relative_to(ROOT)}: {line}' in (ROOT / 'docs' / 'coded.md').read_text()
    )


def test_the_page_quotes_the_message_about_cifar10():
    """As far as it can be told without the images: its length, and the errors of the network from which it was made."""
    folder, page = (
        ROOT / 'results' / 'coded-cifar10' / 'CONV-3-16',
        (ROOT / 'docs' / 'coded.md').read_text(),
    )
    message = (folder / 'coded.bin').read_bytes()
    code = decode(message, 3, 10)
    assert [len(kernel) for kernel in code.kernels] == [2, 2, 3] and code.direct.shape[0] == 10
    assert f'CONV-3-16/coded.bin: {len(message)} bytes, train error' in page
    table = read_metrics(folder / 'metrics.csv')
    dense = table['test_error'][(table['round'] == 0) & (table['epoch'] == 10)][0]
    assert (
        f'test error of {dense:.4f} before and of\n{table["test_error"][-1]:.4f} after pruning'
        in page
    )


def test_the_page_quotes_the_controls():
    page = (ROOT / 'docs' / 'coded.md').read_text()
    with open(ROOT / 'results' / 'coded' / 'controls.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for row in rows:
        errors = f'{float(row["train_error"]):.4f} | {float(row["test_error"]):.4f}'
        assert f' | {row["bytes"]} | {errors} | {rounded_up(float(row["bound"])):.4f} |' in page, (
            row['name']
        )
