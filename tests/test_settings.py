"""Settings files and the command line: what they mean, and one clear line for each mistake."""

import math

import pytest
from conftest import DIGITS, ROOT, run, settings_of
from conftest import refused as refused_line

import evaluation
import sparsify
from conf import (
    KNOBS,
    NOT_SWEPT,
    comments,
    load_launch,
    load_settings,
    parse_command_line,
    settings_text,
)
from models import NETWORKS


def refused(tmp_path, *arguments):
    """The one line with which train.py refuses; it leaves no results folder."""
    line = refused_line(*arguments, '--results-dir', tmp_path / 'results')
    assert ': error: ' in line and not (tmp_path / 'results').exists()
    return line


def test_the_papers_table():
    sweep, runs = load_settings()
    assert [run.name for run in runs] == ['CONV-3-200']
    table = {'batch_size': 32, 'lr': 0.01, 'milestones': [60, 120, 160], 'lr_decay': 0.1}
    table |= {'momentum': 0.9, 'weight_decay': 3e-3, 'epochs': 500, 'loss': 'MSE', 'bias': False}
    table |= {'dataset_name': 'MNIST', 'kernel_size': 2}
    assert {name: sweep[name] for name in table} == table
    epochs = (1, 60, 61, 120, 121, 160, 161, 500)
    rates = [evaluation.learning_rate(runs[0], epoch) for epoch in epochs]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


def test_every_knob_has_a_comment_and_is_tried_with_wrong_values():
    assert list(comments()) == list(KNOBS) and all(comments().values())
    tried = set(WRONG_VALUES) | {'data_dir', 'results_dir'}
    assert tried == set(KNOBS), 'a new knob: add wrong values of it to WRONG_VALUES'


@pytest.mark.parametrize(
    'name, factor, first',
    [
        ('depth_cifar10', 0.1, (61, 121, 161)),
        ('depth_cifar10_small', 0.2, (13, 21, 41)),
        ('released', 0.2, (60, 100, 300)),
    ],
)
def test_the_rates_of_the_papers_recipes(name, factor, first):
    """`first` are the first epochs at a lower rate, counted from 1."""
    settings = load_settings(ROOT / 'conf' / f'{name}.py')[1][0]
    for epoch in range(1, settings.epochs + 1):
        expected = settings.lr * factor ** sum(epoch >= one for one in first)
        assert evaluation.learning_rate(settings, epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    'path', list((ROOT / 'conf').glob('[a-z]*.py')), ids=lambda path: path.stem
)
def test_every_shipped_settings_file_is_sound(path):
    _, runs = load_settings(path)
    assert len({run.name for run in runs}) == len(runs) > 0
    for settings in runs:
        sparsify.check(settings)
        assert settings.network in NETWORKS


def test_sweep_is_a_product_with_a_folder_each():
    flags = {'depth': [3, 4], 'width': [8, 16], 'seed': [0, 1], 'weight_decay': [0.003, 0]}
    _, runs = load_settings(flags=flags | {'lr': [0.1]})
    assert len(runs) == 16 == len({run.name for run in runs})
    assert runs[0].name == 'CONV-3-8-weight_decay0.003-seed0'
    assert runs[-1].name == 'CONV-4-16-weight_decay0.0-seed1'
    last = vars(runs[-1])
    expected = {'depth': 4, 'width': 16, 'seed': 1, 'weight_decay': 0.0, 'lr': 0.1}
    assert {name: last[name] for name in expected} == expected


def test_the_settings_that_a_launch_writes_repeat_it(tmp_path):
    flags = {'depth': [2, 3], 'milestones': [], 'lr': 1, 'density': [0.5, 1.0], 'seed': [0, 1]}
    sweep, runs = load_settings(ROOT / 'conf' / 'digits.py', flags)
    path = tmp_path / 'global_settings.py'
    path.write_text(settings_text(sweep, ['date: today']))
    assert load_settings(path) == load_launch(tmp_path) == (sweep, runs)
    assert path.read_text().startswith('# date: today\n')
    assert '# L, the number of hidden convolutions' in path.read_text()


def test_a_folders_settings_are_read_and_not_run(tmp_path):
    """A knob that is missing has its neutral value, a retired one is ignored, code is refused."""
    path = tmp_path / 'global_settings.py'
    path.write_text('width = 8\ncheckpoint_every = 5\n')
    (settings,) = load_launch(tmp_path)[1]
    neutral = {name: value for name, (value, _) in KNOBS.items()}
    assert vars(settings) == neutral | {'width': 8, 'name': 'CONV-3-8'}
    for code in ('import os', 'width = open("x", "w")', 'width = ', 'print(1)'):
        path.write_text(code)
        for option in ('--resume', '--plot', '--status'):
            assert 'damaged' in refused_line('--results-path', tmp_path, option)
    assert not (ROOT / 'x').exists()


def test_help_lists_every_knob_with_its_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for name, comment in comments().items():
        assert f'--{name.replace("_", "-")}' in text and ' '.join(comment.split()) in text


WRONG_VALUES = {
    'depth': '0 -1 10000 2.5 three None nan True',
    'width': '0 1e3 -8',
    'kernel_size': '0 2.0',
    'stride': f'0 {10**40}',
    'padding': '-1',
    'batch_size': '0 32.0',
    'epochs': '-1 inf',
    'lr': '0 -0.1 nan inf 1e999 1e39 fast',
    'lr_decay': '0 nan 1.5',
    'momentum': '1 -0.1 nan',
    'weight_decay': '-1 inf',
    'milestones': '[60,60] [120,60] 0 1.5 x',
    'target_loss': '-0.1 inf low',
    'early_stop_epoch': '-1 never',
    'early_stop_accuracy': '2',
    'seed': '-1 0.5 18446744073709551616',
    'delta': '0 1 nan 5e-324',
    'gamma': '0 -1 inf',
    'eval_every': '0',
    'normalize': 'yes 1 0',
    'bias': 'no 1',
    'dataset_name': 'mnist ImageNet 3',
    'network': 'RESNET 3',
    'loss': 'mse hinge',
    'precision': 'fp16 32',
    'train_samples': '-1 0.5',
    'label_noise': '-0.1 1.1 nan',
    'clean_samples': '-1',
    'data_seed': '-1',
    'augment': 'flip True',
    'normalization': 'layer',
    'density': '0 1.5 nan',
    'initial_mask': 'magnitude',
    'prune_rounds': '-1 1.0',
    'prune_score': 'snip',
    'prune_fraction': '0 1',
    'prune_layers': 'fc',
    'prune_allocation': 'uniform',
    'rewind_epoch': '-2',
    'rescale_neurons': '1',
    'regrow': 'rigl',
    'regrow_every': '0',
    'regrow_fraction': '0 1',
    'regrow_until': '-0.1 1.1',
    'channel_sparsity': '-0.1 1',
    'threads': '-1 1025 1.5',
    'jobs': '0 1025',
    'certify_every': '-1',
    'measures_every': '-1 0.5',
    'layers_every': '0.5',
    'snapshot_every': '-1',
    'device': 'gpu cuda:99 meta 3 cpu:1 hpu mkldnn',
}


@pytest.mark.parametrize('name', WRONG_VALUES)
def test_wrong_values_are_named(tmp_path, name):
    flag = f'--{name.replace("_", "-")}'
    for value in WRONG_VALUES[name].split():
        assert name in refused(tmp_path, *DIGITS, flag, value), value
        if name not in NOT_SWEPT:
            assert name in refused(tmp_path, *DIGITS, flag, value, '1'), value


COMMANDS = {
    '--widht 8': 'unknown argument --widht (did you mean --width?)',
    '--depth': '--depth',
    '--seed 0 1 0': 'seed = [0, 1, 0]: a value is listed twice',
    '--settings gone.py': 'gone.py: cannot be read',
    '--run 2': '--run 2: the sweep has the networks 1 to 1',
    '--run 0': '--run 0',
    '--run x': '--run',
    '--depth 3 8': 'an image of 8x8 allows at most 7 convolutions',
    '--stride 2 --depth 4': 'allows at most 3 convolutions',
    '--density 0.5': 'density = 0.5: needs an initial_mask',
    '--density 0.5 --initial-mask erk --regrow random --prune-rounds 2': 'prune_rounds = 2: not',
    '--prune-rounds 1 --rewind-epoch 150': 'rewind_epoch = 150',
    '--network CONVBN --normalization batch --batch-size 359': 'batch_size = 359',
    '--network CONVBN --normalization batch --batch-size 1': 'batch_size = 1:',
    '--train-samples 1438': 'train_samples',
    '--width 1000000': 'width = 1000000: training takes at least',
    'some': 'unknown argument some',
    '--precision tf32 --device cpu': 'tf32',
    '--prepare --run 1': 'leave --run out',
    '--dataset-name digit': "dataset_name = 'digit': must be one of",
    '--network CONV CONVRES --normalization batch --density 0.5 --initial-mask erk '
    '--regrow random --channel-sparsity 0.5': 'channel_sparsity = 0.5',
}


@pytest.mark.parametrize('command', COMMANDS)
def test_wrong_command_lines(tmp_path, command):
    assert COMMANDS[command] in refused(tmp_path, *DIGITS, *command.split())


@pytest.mark.parametrize('option', ['--resume', '--plot', '--status'])
def test_options_that_read_a_folder_need_one(tmp_path, option):
    assert '--results-path DIR' in refused_line(option)
    assert 'gone: no such folder' in refused_line(option, '--results-path', 'gone')
    line = refused_line(option, '--results-path', tmp_path, *DIGITS)
    assert "the folder's own settings; leave --settings out" in line


FILES = {
    'from math import inf as lr': 'lr = inf: must lie in (0, 1e9]',
    'import math as width': 'width',
    'raise ValueError("no")': 'line 1: ValueError: no',
    'widht = 3': 'unknown setting widht (did you mean width?)',
    'helper = 3': 'unknown setting helper; a name of your own starts with _',
    'import numpy\nwidth = numpy.ones((2, 2), int)': 'width',
    'width = max': 'width',
    'import numpy\nwidth = numpy.array([8.0])': 'width = 8.0: must be an integer',
    r'results_dir = "\ud800"': 'results_dir',
    'width = 3\nwidth == = 3': 'line 2: SyntaxError',
    'width = 3\n\nwidth = 1 / 0': 'line 3: ZeroDivisionError',
    'width = "8"': "width = '8': must be an integer",
    'lr = float("nan")': 'lr = nan: must lie in',
    'depth = []': 'depth = []: an empty sweep',
    'depth = [3, 4, 3]': 'listed twice',
    'depth = [[3, 4]]': 'depth',
    'data_dir = ["a", "b"]': 'data_dir',
    'width = 3\0': 'settings.py',
}


@pytest.mark.parametrize('content', FILES)
def test_wrong_settings_files(tmp_path, content):
    path = tmp_path / 'settings.py'
    path.write_text(content)
    line = refused(tmp_path, '--settings', path)
    assert FILES[content] in line


def test_settings_files_may_compute(tmp_path):
    path = tmp_path / 'settings.py'
    path.write_text('import math\n_b = 2\nlr = math.sqrt(_b)\nwidth = [_b**k for k in (0, 1)]')
    _, runs = load_settings(path)
    assert [run.width for run in runs] == [1, 2] and runs[0].lr == math.sqrt(2)
    path.write_text('import numpy\nlr = numpy.logspace(-3, -1, 3)\ndepth = range(1, 3)\n')
    sweep, runs = load_settings(path)
    assert sweep['lr'] == [0.001, 0.01, 0.1] and sweep['depth'] == [1, 2]
    assert {type(run.lr) for run in runs} == {float} and {type(run.depth) for run in runs} == {int}
    path.write_text('from conf.digits import *\nepochs = 3\n')
    sweep, _ = load_settings(path)
    assert (sweep['dataset_name'], sweep['width'], sweep['epochs']) == ('digits', 32, 3)


def test_lists_may_be_given_as_in_the_file():
    words = '--milestones [60,120] --width [8,16] --depth 2 3 --normalize True'.split()
    expected = {'milestones': [60, 120], 'width': [8, 16], 'depth': [2, 3], 'normalize': True}
    assert parse_command_line(words)[1] == expected
    assert parse_command_line(['--milestones'])[1] == {'milestones': []}
    assert settings_of(weight_decay=0).weight_decay == 0.0


def test_data_dir_of_the_environment_must_exist(tmp_path, monkeypatch):
    monkeypatch.setenv('DATA_DIR', str(tmp_path / 'gone'))
    assert 'DATA_DIR' in refused(tmp_path)
    assert not (tmp_path / 'gone').exists()


@pytest.mark.process
def test_refusal_in_a_process_of_its_own(tmp_path):
    words = ('--depth', '3', '--widht', '8', '--results-dir', tmp_path / 'results')
    status, stdout, stderr = run(*words)
    assert (status, stdout, stderr.count('\n')) == (2, '', 1) and 'did you mean --width?' in stderr
    assert not (tmp_path / 'results').exists()
