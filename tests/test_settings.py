"""Settings files and the command line: what they mean, and one clear line for each mistake."""

import math

import pytest
from conftest import DIGITS, ROOT, run, succeeds
from conftest import refused as refused_line

import evaluation
import sparsify
from conf import (
    BEFORE,
    GLOBAL_SETTINGS,
    RULES,
    BadInput,
    comments,
    load_settings,
    parse_command_line,
    settings_text,
)
from models import NETWORKS
from records import folder_settings


def refused(tmp_path, *arguments):
    """The one line with which train.py refuses; it leaves no results folder behind."""
    line = refused_line(*arguments)
    assert line.startswith('train.py: error: ') and not list(tmp_path.glob('results*'))
    return line


def test_the_papers_table():
    sweep, runs = load_settings()
    assert [run.name for run in runs] == ['CONV-3-200']
    expected = {
        'dataset_name': 'MNIST',
        'batch_size': 32,
        'lr': 0.01,
        'milestones': [60, 120, 160],
        'lr_decay': 0.1,
    }
    expected |= {
        'momentum': 0.9,
        'weight_decay': 3e-3,
        'epochs': 500,
        'loss': 'MSE',
        'kernel_size': 2,
        'bias': False,
    }
    assert {name: sweep[name] for name in expected} == expected
    rates = [
        evaluation.learning_rate(runs[0], epoch) for epoch in (1, 60, 61, 120, 121, 160, 161, 500)
    ]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


def test_every_knob_has_a_comment_and_is_tried_with_wrong_values():
    assert set(comments()) == set(RULES) and all(comments().values())
    assert set(WRONG_VALUES) == set(RULES) - {'data_dir', 'results_dir'}


def test_what_older_folders_stand_for():
    """A knob that came later keeps what was, whatever the defaults are by now; the newest folders name every knob."""
    assert set(BEFORE) < set(RULES)
    for name, value in BEFORE.items():
        assert load_settings(flags={name: value})[0][name] == value


@pytest.mark.parametrize(
    'name, factor, first',
    [
        ('depth_cifar10', 0.1, (61, 121, 161)),
        ('depth_cifar10_small', 0.2, (13, 21, 41)),
        ('released', 0.2, (60, 100, 300)),
    ],
)
def test_the_rates_of_the_papers_recipes(name, factor, first):
    """The first epochs at a lower rate, counted from 1; the paper's released code steps its scheduler before an epoch."""
    settings = load_settings(ROOT / 'conf' / f'{name}.py')[1][0]
    for epoch in range(1, settings.epochs + 1):
        expected = settings.lr * factor ** sum(epoch >= one for one in first)
        assert evaluation.learning_rate(settings, epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('path', sorted((ROOT / 'conf').glob('*.py')), ids=lambda path: path.stem)
def test_every_shipped_settings_file_is_sound(path):
    if path.stem != '__init__':
        sweep, runs = load_settings(path)
        assert len({run.name for run in runs}) == len(runs) > 0
        for run in runs:
            sparsify.check(run)
            assert run.network in NETWORKS


def test_a_folder_has_the_runs_of_its_launch(tmp_path):
    """In the same order, by the same names, of knobs that older folders lack and of others."""
    sweep, runs = load_settings(
        flags={'seed': [0, 1], 'density': [0.5, 1.0], 'label_noise': [0.0, 0.1], 'lr': [0.1, 0.2]}
    )
    (tmp_path / 'global_settings.py').write_text(settings_text(sweep, []))
    assert folder_settings(tmp_path)[1] == runs


def test_sweep_is_a_product_with_a_folder_each():
    flags = {
        'depth': [3, 4],
        'width': [8, 16],
        'seed': [0, 1],
        'weight_decay': [0.003, 0],
        'lr': [0.1],
    }
    _, runs = load_settings(flags=flags)
    assert len(runs) == 16 == len({run.name for run in runs})
    assert (
        runs[0].name == 'CONV-3-8-weight_decay0.003-seed0'
        and runs[-1].name == 'CONV-4-16-weight_decay0.0-seed1'
    )
    assert (runs[-1].depth, runs[-1].width, runs[-1].seed, runs[-1].weight_decay, runs[-1].lr) == (
        4,
        16,
        1,
        0,
        0.1,
    )


def test_resolved_settings_repeat_the_launch(tmp_path):
    sweep, runs = load_settings(
        ROOT / 'conf' / 'digits.py', {'depth': [2, 3], 'milestones': [], 'lr': 1}
    )
    path = tmp_path / 'global_settings.py'
    path.write_text(settings_text(sweep, ['date: today']))
    assert load_settings(path) == (sweep, runs)
    assert (
        path.read_text().startswith('# date: today\n')
        and '# L, the number of hidden convolutions' in path.read_text()
    )


def test_help_lists_every_knob_with_its_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for name, comment in comments().items():
        assert f'--{name.replace("_", "-")}' in text and ' '.join(comment.split()) in text


WRONG_VALUES = {
    'depth': ['0', '-1', '10000', '2.5', 'three', 'None', 'nan', 'True'],
    'width': ['0', '1e3', '-8'],
    'kernel_size': ['0', '2.0'],
    'stride': ['0', str(10**40)],
    'padding': ['-1'],
    'batch_size': ['0', '32.0'],
    'epochs': ['-1', 'inf'],
    'lr': ['0', '-0.1', 'nan', 'inf', '1e999', '1e39', 'fast'],
    'lr_decay': ['0', 'nan', '1.5'],
    'momentum': ['1', '-0.1', 'nan'],
    'weight_decay': ['-1', 'inf'],
    'milestones': ['60 60', '120 60', '0', '1.5', 'x'],
    'target_loss': ['-0.1', 'inf', 'low'],
    'early_stop_epoch': ['-1', 'never'],
    'early_stop_accuracy': ['2'],
    'seed': ['-1', '0.5', '18446744073709551616'],
    'delta': ['0', '1', 'nan', '5e-324'],
    'gamma': ['0', '-1', 'inf'],
    'eval_every': ['0'],
    'checkpoint_every': ['0'],
    'normalize': ['yes', '1', '0'],
    'bias': ['no', '1'],
    'dataset_name': ['mnist', 'ImageNet', '3'],
    'network': ['RESNET', '3'],
    'loss': ['mse', 'hinge'],
    'precision': ['fp16', '32'],
    'train_samples': ['-1', '0.5'],
    'label_noise': ['-0.1', '1.1', 'nan'],
    'clean_samples': ['-1'],
    'data_seed': ['-1'],
    'augment': ['flip', 'True'],
    'normalization': ['none at all', 'layer'],
    'density': ['0', '1.5', 'nan'],
    'initial_mask': ['magnitude'],
    'prune_rounds': ['-1', '1.0'],
    'prune_score': ['snip'],
    'prune_fraction': ['0', '1'],
    'prune_layers': ['fc'],
    'prune_allocation': ['uniform'],
    'rewind_epoch': ['-2'],
    'rescale_neurons': ['1'],
    'regrow': ['rigl'],
    'regrow_every': ['0'],
    'regrow_fraction': ['0', '1'],
    'regrow_until': ['-0.1', '1.1'],
    'channel_sparsity': ['-0.1', '1'],
    'threads': ['-1', '1025', '1.5'],
    'jobs': ['0', '1025'],
    'certify_every': ['-1'],
    'measures_every': ['-1', '0.5'],
    'layers_every': ['0.5'],
    'snapshot_every': ['-1'],
    'device': ['gpu', 'cuda:99', 'meta', '3', 'cpu:1', 'hpu', 'mkldnn'],
}


@pytest.mark.parametrize('name', WRONG_VALUES)
def test_wrong_values_are_named(tmp_path, name):
    for value in WRONG_VALUES[name]:
        line = refused(
            tmp_path, *DIGITS, '--results-dir', tmp_path / 'results', f'--{name}', *value.split()
        )
        assert name in line, value
        if name != 'milestones':
            line = refused(
                tmp_path, *DIGITS, '--results-dir', tmp_path / 'results', f'--{name}', value, '1'
            )
            assert name in line, value


COMMANDS = {
    'misspelled flag': (['--widht', '8'], 'unknown argument --widht (did you mean --width?)'),
    'flag without value': (['--depth'], '--depth'),
    'listed twice': (['--seed', '0', '1', '0'], '0 is listed twice'),
    'settings of nothing': (['--settings', ''], ': no such settings file'),
    'no such file': (['--settings', 'gone.py'], 'gone.py: no such settings file'),
    'resume without folder': (['--resume'], '--results-path DIR'),
    'plot without folder': (['--plot'], '--results-path DIR'),
    'resume of nothing': (['--resume', '--results-path', 'gone'], 'gone: not a results folder'),
    'plot of nothing': (['--plot', '--results-path', 'gone'], 'gone: not a results folder'),
    'a network beyond the sweep': (
        [*DIGITS, '--run', '2'],
        '--run 2: the sweep has the networks 1 to 1',
    ),
    'network zero': ([*DIGITS, '--run', '0'], '--run 0'),
    'no number': ([*DIGITS, '--run', 'x'], '--run'),
    'too deep': ([*DIGITS, '--depth', '3', '8'], 'an image of 8x8 allows at most 7 convolutions'),
    'too deep with stride': (
        [*DIGITS, '--stride', '2', '--depth', '4'],
        'allows at most 3 convolutions',
    ),
    'sparse without a mask': (
        [*DIGITS, '--density', '0.5'],
        'density = 0.5: needs an initial_mask',
    ),
    'rounds with regrowth': (
        [
            *DIGITS,
            '--density',
            '0.5',
            '--initial-mask',
            'erk',
            '--regrow',
            'random',
            '--prune-rounds',
            '2',
        ],
        "prune_rounds = 2: not with regrow = 'random'",
    ),
    'rewinding past the end': (
        [*DIGITS, '--prune-rounds', '1', '--rewind-epoch', '150'],
        'rewind_epoch = 150',
    ),
    'a batch of one': (
        [*DIGITS, '--network', 'CONVBN', '--normalization', 'batch', '--batch-size', '359'],
        'batch_size = 359',
    ),
    'batches of one': (
        [*DIGITS, '--network', 'CONVBN', '--normalization', 'batch', '--batch-size', '1'],
        'batch_size = 1:',
    ),
    'more samples than there are': ([*DIGITS, '--train-samples', '1438'], 'train_samples'),
    'more threads than cores': ([*DIGITS, '--threads', '1000'], 'threads = 1000: this machine has'),
    'a width beyond memory': (
        [*DIGITS, '--width', '1000000'],
        'width = 1000000: training takes at least',
    ),
    'status without folder': (['--status'], '--results-path DIR'),
    'evaluate and plot': (['--plot', '--evaluate'], 'not allowed with argument --plot'),
    'a plot of some': (['--plot', 'some'], 'unknown argument some'),
    'tf32 on a CPU': ([*DIGITS, '--precision', 'tf32', '--device', 'cpu'], 'tf32'),
}


@pytest.mark.parametrize('case', COMMANDS)
def test_wrong_command_lines(tmp_path, case):
    arguments, message = COMMANDS[case]
    assert message in refused(tmp_path, *arguments, '--results-dir', tmp_path / 'results')


FILES = {
    'imported and wrong': ('from math import inf as lr', 'lr = inf: must be a number above 0'),
    'a module': ('import math as width', 'width'),
    'an exception of its own': (
        'class Own(BaseException):\n    pass\nraise Own("no")',
        'line 3: Own: no',
    ),
    'misspelled': ('widht = 3', 'unknown setting widht (did you mean width?)'),
    'unknown': ('helper = 3', 'unknown setting helper; a name of your own starts with _'),
    'interrupt': ('raise KeyboardInterrupt', 'line 1: KeyboardInterrupt'),
    'two lines': ('raise ValueError("a\\nb")', 'ValueError: a b'),
    'matrix': ('import numpy\nwidth = numpy.ones((2, 2), int)', 'width'),
    'function': ('width = max', 'width'),
    'array of floats': ('import numpy\nwidth = numpy.array([8.0])', 'width'),
    'surrogate': (r'results_dir = "\ud800"', 'results_dir'),
    'syntax': ('width = 3\nwidth == = 3', 'line 2: SyntaxError'),
    'exception': ('width = 3\n\nwidth = 1 / 0', 'line 3: ZeroDivisionError'),
    'exit': ('exit(3)', 'line 1: SystemExit'),
    'type': ('width = "8"', "width = '8': must be an integer of at least 1"),
    'nan': ('lr = float("nan")', 'lr = nan: must be a number above 0'),
    'empty sweep': ('depth = []', 'depth = []: an empty sweep'),
    'twice': ('depth = [3, 4, 3]', '3 is listed twice'),
    'nested': ('depth = [[3, 4]]', 'depth'),
    'swept folder': ('data_dir = ["a", "b"]', 'data_dir'),
    'binary': ('width = 3\0', 'settings.py'),
    'huge': ('lr = 10**400', 'lr'),
}


@pytest.mark.parametrize('case', FILES)
def test_wrong_settings_files(tmp_path, case):
    content, message = FILES[case]
    path = tmp_path / 'settings.py'
    path.write_text(content)
    line = refused(tmp_path, '--settings', path, '--results-dir', tmp_path / 'results')
    assert message in line and str(path) in line


def test_settings_files_may_compute(tmp_path):
    path = tmp_path / 'settings.py'
    path.write_text(
        'import math\n_base = 2\nlr = math.sqrt(_base)\nwidth = [_base**k for k in range(3)]\n'
    )
    _, runs = load_settings(path)
    assert [run.width for run in runs] == [1, 2, 4] and runs[0].lr == math.sqrt(2)
    path.write_text(
        'import numpy\nfrom math import e\nlr = numpy.logspace(-3, -1, 3)\ndepth = range(1, 3)\nwidth = numpy.int64(8)\n'
    )
    sweep, runs = load_settings(path)
    assert sweep['lr'] == [0.001, 0.01, 0.1] and sweep['depth'] == [1, 2] and sweep['width'] == 8
    assert len(runs) == 6 and all(
        type(run.lr) is float and type(run.depth) is type(run.width) is int for run in runs
    )


def test_imported_knobs_count(tmp_path):
    path = tmp_path / 'settings.py'
    path.write_text("dataset_name = 'digits'\nwidth = 4\nfrom conf.digits import width\n")
    assert load_settings(path)[0]['width'] == 32
    path.write_text('from conf.digits import *\nepochs = 3\n')
    sweep, _ = load_settings(path)
    assert (sweep['dataset_name'], sweep['width'], sweep['epochs']) == ('digits', 32, 3)


def test_a_settings_file_that_changes_torch(tmp_path):
    path = tmp_path / 'settings.py'
    path.write_text(
        'import torch\nfrom tests.small import *\nepochs = 1\n'
        'torch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n'
    )
    assert 'epoch 1/1' in succeeds('--settings', path, '--results-path', tmp_path / 'run')


def test_an_emptied_settings_file_of_a_launch_is_damage(tmp_path):
    (tmp_path / 'run' / 'CONV-3-200').mkdir(parents=True)
    (tmp_path / 'run' / 'global_settings.py').write_text('')
    for option in ('--resume', '--plot', '--evaluate', '--status'):
        assert 'global_settings.py: is empty' in refused_line(
            '--results-path', tmp_path / 'run', option
        )


def test_lists_may_be_given_as_in_the_file(tmp_path):
    _, flags = parse_command_line(
        ['--milestones', '[60, 120]', '--width', '[8,16]', '--depth', '2', '3']
    )
    assert flags == {'milestones': [60, 120], 'width': [8, 16], 'depth': [2, 3]}
    assert parse_command_line(['--normalize', 'true', '--bias', 'false'])[1] == {
        'normalize': True,
        'bias': False,
    }


@pytest.mark.parametrize('content', ['width == 3', 'width = 200'])
def test_a_damaged_global_settings_file_is_named(tmp_path, monkeypatch, content):
    path = tmp_path / 'global_settings.py'
    path.write_text(content)
    monkeypatch.setattr('conf.GLOBAL_SETTINGS', path)
    assert str(path) in refused(tmp_path, *DIGITS, '--results-dir', tmp_path / 'results')


def test_data_dir_of_the_environment_must_exist(tmp_path, monkeypatch):
    monkeypatch.setenv('DATA_DIR', str(tmp_path / 'gone'))
    assert 'DATA_DIR' in refused(tmp_path, '--results-dir', tmp_path / 'results')
    assert not (tmp_path / 'gone').exists()


def test_a_line_missing_in_the_global_settings(tmp_path, monkeypatch):
    path = tmp_path / 'global_settings.py'
    path.write_text(GLOBAL_SETTINGS.read_text().replace('\nwidth = 200', '\n'))
    monkeypatch.setattr('conf.GLOBAL_SETTINGS', path)
    with pytest.raises(BadInput, match='the setting width is missing'):
        load_settings(path)


def test_refusal_in_a_process_of_its_own(tmp_path):
    status, stdout, stderr = run(
        '--depth', '3', '--widht', '8', '--results-dir', tmp_path / 'results'
    )
    assert (status, stdout, stderr.count('\n')) == (2, '', 1) and 'did you mean --width?' in stderr
    assert not (tmp_path / 'results').exists()


def test_values_are_checked_as_what_they_will_be_used_as():
    assert (
        load_settings(flags={'lr': 1})[1][0].lr == 1.0
        and type(load_settings(flags={'lr': 1})[0]['lr']) is float
    )
    assert math.isclose(load_settings(flags={'weight_decay': 0})[1][0].weight_decay, 0)
