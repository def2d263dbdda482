"""Studies of trained networks: what they read, compute and print, on small sweeps and by hand."""

import importlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, settings_of, succeeds, train_small
from torch import nn

from conf import load_launch, load_settings, settings_text
from datasets import load_dataset
from measures.paths import path_norm
from measures.trace import plain_copy, weight_layers
from models import get_network
from records import load_checkpoint, read_layers, read_metrics
from studies import (
    channels,
    comparative,
    equal_fit,
    lottery_theory,
    quantize,
    samples,
    topology,
)
from studies.report import read_csv

NAMES = 'channels', 'comparative', 'equal_fit', 'lottery_theory', 'quantize', 'ranking', 'samples'
RESULTS = ROOT / 'results'
SAMPLES = [RESULTS / 'samples' / count for count in ('500', '1000', '2000', '4000')]


def tables_in(text):
    """{header: rows} of the Markdown tables in a text, as tuples of cells."""
    tables, header = {}, None
    for line in text.splitlines():
        cells = tuple(cell.strip() for cell in line.split('|')[1:-1])
        if not line.startswith('|'):
            header = None
        elif header is None:
            header = cells
            tables[header] = []
        elif not cells[0].startswith('---'):
            tables[header].append(cells)
    return tables


# --- the command lines ---


@pytest.mark.parametrize('name', [*NAMES, 'topology'])
def test_help_does_nothing_else(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f'studies.{name}').main(['--help'])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.startswith(f'usage: python -m studies.{name} ')
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_a_mistake_is_one_line():
    words = [sys.executable, '-m', 'studies.quantize', '--images', '0']
    process = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    line = 'studies.quantize: error: --images 0: must be at least 1\n'
    assert (process.returncode, process.stderr) == (2, line)


# --- pages ---


@pytest.mark.pages
@pytest.mark.parametrize(
    'study, folders, page, counts',
    [
        (channels, [RESULTS / 'channels'], 'topology.md', [4]),
        (samples, SAMPLES, 'samples.md', [4]),
        (topology, [], 'topology.md', [7, 6]),
        (lottery_theory, [], 'topology.md', [1]),
    ],
)
def test_the_pages_of_studies_quote_the_shipped_files(study, folders, page, counts):
    printed = tables_in(succeeds(*folders, program=study.main))
    page = tables_in((ROOT / 'docs' / page).read_text())
    assert [len(page[header]) for header in printed] == counts
    for header, rows in printed.items():
        assert set(page[header]) <= set(rows)


@pytest.mark.pages
@pytest.mark.parametrize('folder', [RESULTS / 'channels', *SAMPLES], ids=lambda folder: folder.name)
def test_shipped_sweeps_are_complete(folder):
    for settings in load_launch(folder)[1]:
        table = read_metrics(folder / settings.name / 'metrics.csv')
        assert list(table['epoch']) == [0, settings.epochs] * (settings.prune_rounds + 1)
        if settings.layers_every:
            epochs = range(0, settings.epochs + 1, settings.layers_every)
            assert set(read_layers(folder / settings.name / 'layers.csv')['epoch']) == set(epochs)


@pytest.mark.pages
def test_the_page_of_rankings_quotes_the_sparse_networks_at_equal_fit(tmp_path):
    folders = [RESULTS / 'equal-fit' / name for name in ('masks', 'tickets')]
    printed = succeeds(*folders, '--out', tmp_path, program=equal_fit.main)
    excess, errors = tables_in(printed).values()
    page = ' '.join((ROOT / 'docs' / 'ranking.md').read_text().split())
    for mask in ('random', 'erk', 'tickets'):
        rows = [row for row in excess if row[0] == mask]
        assert f'| {mask} | {" | ".join(row[2].split()[0] for row in rows)} |' in page
        # "in all 72 comparisons"
        assert mask == 'tickets' or [row[3] for row in rows] == ['12 of 12'] * 3
    errors = {name: row for name, *row in errors}
    for sentence, bound in (
        ('is {} along the density of random masks, {} of ERK masks, and {} where', 'our_bound'),
        ('`corrected_bound` has {}, {} and {}.', 'corrected_bound'),
        ('wrong almost everywhere ({}, {} and {})', 'path_bound'),
    ):
        assert sentence.format(*errors[bound]) in page
    assert errors['epochs'] == ['0.00'] * 3
    assert 'tickets: 72 pairs, 0 with weight' in printed
    assert (tmp_path / 'equal_fit.png').stat().st_size > 10000


# --- small sweeps ---


def test_channels_of_a_sweep(tmp_path):
    flags = '--density 0.3 --initial-mask erk --regrow random gradient --regrow-every 3 --width 8'
    more = '--channel-sparsity 0.5 --train-samples 320 --epochs 2 --layers-every 2'
    train_small(tmp_path / 'run', *flags.split(), *more.split())
    printed = succeeds(tmp_path / 'run', '--out', tmp_path, program=channels.main)
    (rows,) = tables_in(printed).values()
    assert [row[:2] for row in rows] == [('SET', '0.5'), ('RigL', '0.5')]
    exported = [row['weights'] for row in read_csv(tmp_path / 'export.csv')]
    for (_, _, error, density, left, weights), count in zip(rows, exported):
        assert 0 < float(error[:5]) <= 1
        assert 0 < float(density[:-2]) < 31
        # Three layers of 2 x 2 kernels turn images of 8 x 8 into maps of 5 x 5.
        a, b, c = map(int, left.split('-'))
        assert 6 <= a + b + c <= 12
        size = 4 * (a + a * b + b * c) + 10 * 25 * c
        assert int(weights) == int(count) == size
    assert (tmp_path / 'channels.png').stat().st_size > 10000


def test_samples_of_several_sweeps(tmp_path):
    flags = '--epochs 1 --prune-rounds 2 --prune-fraction 0.5 --data-seed 0 1'
    for count in ('64', '96'):
        train_small(tmp_path / count, '--train-samples', count, *flags.split())
    printed = succeeds(tmp_path / '96', tmp_path / '64', program=samples.main)
    ((header, rows),) = tables_in(printed).items()
    assert header[:3] == ('density', '64 images', '96 images')
    assert [row[0] for row in rows] == ['1', '0.5', '0.25']
    errors, _ = samples.read([tmp_path / '96'])
    assert errors[96].shape == (2, 3)
    mean = errors[96][:, 1].mean()
    assert rows[1][2] == f'{mean:.3f}'


def test_the_comparative_bound_of_a_sweep(tmp_path):
    """S1 takes 2 layers of 3; S1 and S2 take 3 in the first draw, none suffices in the second."""
    sweep, runs = load_settings(ROOT / 'conf' / 'comparative.py', {'data_seed': [0, 1], 'depth': 3})
    (tmp_path / 'global_settings.py').write_text(settings_text(sweep, []))
    for run in runs:
        errors = [0.02, 0.01, 0.0]
        if run.train_samples == 1200:
            errors = [0.2, 0.1, 0.03 if run.data_seed else 0.01]
        layers = 'epoch,round,layer,train_ncc_error\n'
        for epoch in (0, 200):
            for layer, error in enumerate([0.5, *errors, '']):
                layers += f'{epoch},0,{layer},{error}\n'
        metrics = 'epoch,train_error,test_error,generalization_gap\n0,0.9,0.9,0\n'
        (tmp_path / run.name).mkdir()
        (tmp_path / run.name / 'layers.csv').write_text(layers)
        (tmp_path / run.name / 'metrics.csv').write_text(metrics + '200,0.004,0.08,0.076\n')
    _, *lines, _ = succeeds(tmp_path, program=comparative.main).splitlines()
    assert [line.split(':')[1].strip() for line in lines] == [
        '2 2',
        '3 inf',
        '1',
        '0.000, 95 % limit 0.776',
        '0.110, with the limit 0.886',
        '0.080',
        '0.004 on S1, 0.004 on both',
    ]
    (tmp_path / run.name / 'layers.csv').write_text(layers[: layers.index('200')])
    assert 'finish it with --resume' in refused(tmp_path, program=comparative.main)
    (tmp_path / 'global_settings.py').write_text(settings_text(sweep | {'width': [100, 200]}, []))
    assert 'also varies width' in refused(tmp_path, program=comparative.main)


# --- teacher and student ---


@pytest.mark.long
def test_a_sparse_student_needs_a_quarter_more_samples_than_weights():
    for r in (4, 8):
        tried = [round(ratio * lottery_theory.K * r) for ratio in (0.8, 1.1, 1.4, 1.7)]
        shares = [lottery_theory.recovered(r, samples, 0.5) for samples in tried]
        assert shares[0] < 0.2
        assert shares[-1] > 0.8
        needed = lottery_theory.half(tried, shares)
        assert 1 < needed / (lottery_theory.K * r) < 2


def test_a_students_table_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lottery_theory, 'recovered', lambda r, n, far: n / (5 * r) - 0.8)
    monkeypatch.setattr(lottery_theory, 'steps_per_factor', lambda r, n: r + n)
    file = tmp_path / 'new' / 'table.csv'
    printed = succeeds('--measure', file, '--out', tmp_path, program=lottery_theory.main)
    ((header, rows),) = tables_in(printed).items()
    assert header == ('r', '5', '10', '15', '20', '30', '40', '50')
    assert rows[1] == ('N50 / (K r)', *['1.30'] * 7)
    assert rows[2][:3] == ('steps to fall by e, N = 1,000', '1005', '1010')
    assert rows[9][:2] == ('recovered from 3 norms away, N = 10 K r', '9.20')
    assert (tmp_path / 'lottery_theory.png').stat().st_size > 10000
    assert len(read_csv(file)) == 16


def test_a_student_keeps_the_mask_of_its_teacher():
    generator = torch.Generator().manual_seed(1)
    teacher, student, mask, inputs = lottery_theory.draw_problem(3, 7, 0.5, generator)
    assert (mask.sum(1) == 3).all()
    assert inputs.shape == (20, 7, 50)
    assert teacher.ne(0).equal(mask)
    assert student.ne(0).equal(mask)
    torch.testing.assert_close(teacher.norm(dim=1), torch.ones(20, 5).double())
    ratios = (student - teacher).norm(dim=(1, 2)) / teacher.norm(dim=(1, 2))
    torch.testing.assert_close(ratios, torch.full((20,), 0.5).double())


# --- topology ---


def test_coordinates_of_a_network():
    first, second = nn.Linear(8, 5, bias=False), nn.Linear(5, 4, bias=False)
    with torch.no_grad():
        # K_{5,3} with weights of 2 beside K_{3,2}, whose gap is undefined.
        first.weight.copy_(torch.block_diag(2 * torch.ones(3, 5), torch.ones(2, 3)))
        second.weight.fill_(1.0)
    _, imdb, gap, gap_of_subgraphs = topology.coordinates(nn.Sequential(first, nn.ReLU(), second))
    assert imdb == pytest.approx(2 + (2**0.5 + 3**0.5) / 2)
    assert gap == pytest.approx((60**0.5 - 6**0.5 + 20**0.5) / 2)
    assert gap_of_subgraphs == pytest.approx((60**0.5 + 20**0.5) / 2)


@pytest.mark.parametrize(
    'first, second, correlation',
    [([1, 5, 3], [10, 12, 11], 1), ([1, 1, 2], [3, 3, -1], -1), ([1, 1, 1], [0, 1, 2], math.nan)],
)
def test_correlations_of_ranks(first, second, correlation):
    found = topology.spearman(np.array(first), np.array(second))
    assert found == pytest.approx(correlation, nan_ok=True)


@pytest.mark.long
@pytest.mark.filterwarnings('ignore:Mean of empty slice')  # so small networks have no subgraphs
def test_topology_trains_and_measures_ways_to_a_mask(tmp_path, monkeypatch):
    small = {'dataset_name': 'digits', 'width': 8, 'stride': 1, 'train_samples': 64}
    knobs = topology.KNOBS | small | {'epochs': 1, 'eval_every': 1, 'snapshot_every': 1}
    ways = {name: topology.WAYS[name] for name in ('SNIP', 'magnitude', 'RigL')}
    for name, value in (('KNOBS', knobs), ('WAYS', ways), ('EPOCHS', 1), ('SEEDS', range(2))):
        monkeypatch.setattr(topology, name, value)
    printed = tables_in(succeeds('--train', tmp_path, program=topology.main))
    errors, correlations = printed.items()
    assert len(errors[1]) == 3
    assert len(correlations[1]) == 14
    assert correlations[0] == ('measure', 'all 6', '3 means', 'within a way')
    assert (tmp_path / 'topology.png').stat().st_size > 10000

    # The first weights of a pruned network are those before training, times its mask.
    settings = settings_of(**knobs, **ways['magnitude'])
    dataset = load_dataset('digits', 'nowhere', train_samples=64)
    found = topology.measure_run(settings, dataset, tmp_path / 'magnitude-0')
    trained = get_network(settings, dataset.input_shape, 10)
    trained.load_state_dict(load_checkpoint(tmp_path / 'magnitude-0' / 'model.pt')['network'])
    torch.manual_seed(0)
    net = plain_copy(get_network(settings, dataset.input_shape, 10))
    for layer, other in zip(weight_layers(net).values(), weight_layers(trained).values()):
        layer.weight.data *= other.weight != 0
    expected = path_norm(net, dataset.input_shape)
    assert found['path norm at the start'] == pytest.approx(expected, rel=1e-5)


# --- quantization ---


def conv_with_frozen_statistics():
    """Batch normalization without parameters, which has biases all the same: its means."""
    norm = nn.BatchNorm2d(3, affine=False)
    norm.running_mean.fill_(-3)
    conv, linear = nn.Conv2d(1, 3, 2, bias=False), nn.Linear(147, 10, bias=False)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), linear)


def conv_with_biases():
    pool = nn.MaxPool2d(2, ceil_mode=True)
    conv, linear = nn.Conv2d(1, 3, 2), nn.Linear(48, 10)
    return nn.Sequential(conv, nn.LeakyReLU(0.1), pool, nn.Flatten(), linear)


@pytest.mark.parametrize(
    'make, scale',
    [
        (lambda: get_network(settings_of(depth=2, width=4), (1, 8, 8), 10), 1),
        (conv_with_biases, 3),
        (conv_with_frozen_statistics, 1 / 50),
    ],
)
def test_a_changed_network_moves_by_less_than_the_path_metric(digits, make, scale):
    torch.manual_seed(0)
    rows = list(quantize.measure(make(), scale * digits.test_images, digits.test_labels))
    expected = []
    for name, (_, levels, _) in quantize.CHANGES.items():
        expected += [(name, level) for level in levels]
    assert [(row['change'], row['level']) for row in rows] == expected
    for row in rows:
        assert 0 < row['worst'] < row['metric']
        assert 0 < row['pair'] < row['metric']
        assert row['stays_by_sum'] <= row['stays'] <= 1 - row['changed']
    last = {row['change']: row['stays'] for row in rows}
    assert last['fixed point, to nearest'] > 0.9 > last['magnitude pruning']


def test_quantize_prints_and_writes_a_table_and_a_picture(tmp_path):
    train_small(tmp_path, '--depth', '1', '--width', '2', '--epochs', '1')
    run = tmp_path / 'CONV-1-2', '--images', 20
    printed = succeeds(*run, '--out', tmp_path, program=quantize.main)
    ((header, rows),) = tables_in(printed).items()
    written = read_csv(tmp_path / 'quantize.csv')
    assert len(rows) == len(written) == 34
    assert tuple(written[0]) == header
    assert rows[33][2] == f'{float(written[33]["metric"]):.3g}'
    assert (tmp_path / 'quantize.png').stat().st_size > 10000


def test_levels_of_quantization():
    weights = torch.tensor([-1.0, 0.3, 0.55, 0.0]).double()
    for rounding, third, half in ((torch.round, 1 / 3, 2 / 3), (torch.trunc, 0, 1 / 3)):
        found = quantize.fixed_point(weights, 3, rounding)
        torch.testing.assert_close(found, torch.tensor([-1, third, half, 0]).double())
    assert quantize.fixed_point(0 * weights, 3, torch.round).equal(0 * weights)
    assert quantize.mantissa(weights, 3, torch.trunc).tolist() == [-1, 0.25, 0.5, 0]
    assert quantize.mantissa(weights, 3, torch.round).tolist() == [-1, 0.3125, 0.5, 0]
    assert quantize.pruned(weights, 50).tolist() == [-1, 0, pytest.approx(0.55), 0]
