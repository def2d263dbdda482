"""Settings: a file of plain assignments plus the command line -> one checked settings object per network of the sweep."""

import argparse
import ast
import difflib
import itertools
import os
import runpy
import traceback
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
GLOBAL_SETTINGS = ROOT / 'conf' / 'global_settings.py'


class BadInput(ValueError):
    """A mistake in what the user gave; its text is one line that names the thing and the mend."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM. No Exception, so that no handler on its way takes it for a failure of its own."""


# What a knob must be, in words; a function from a value to the value as it is used, or None where it is refused; and, of a
# knob that came after the first runs, the value with which the runs before it were trained.
Rule = namedtuple('Rule', 'text check before', defaults=(None,))


def _integer(low, high=2**31 - 1):
    limits = {2**31 - 1: 'below 2**31', 2**63 - 1: 'below 2**63'}
    text = f'an integer of at least {low} and {limits.get(high, f"at most {high}")}'
    return Rule(text, lambda value: value if type(value) is int and low <= value <= high else None)


def _number(text, test):
    def check(value):
        is_number = type(value) in (int, float) and abs(value) <= 1e300  # False for NaN and inf too
        return float(value) if is_number and test(value) else None

    return Rule(text, check)


def _choice(*values):
    text = 'one of ' + ', '.join(values)
    return Rule(text, lambda value: value if type(value) is str and value in values else None)


def _milestones(value):
    value = list(value) if type(value) in (list, tuple) else None
    if value is None or any(type(epoch) is not int or epoch < 1 for epoch in value):
        return None
    return value if value == sorted(set(value)) else None


_BOOLEAN = Rule('True or False', lambda value: value if type(value) is bool else None)
_TEXT = Rule(
    'a printable text',
    lambda value: value if type(value) is str and value.isprintable() and value else None,
)


def _later(before, rule):
    """The rule of a knob that came later: a run that has no such knob was trained as with the value `before`."""
    return rule._replace(before=before)


RULES = {
    'dataset_name': _choice('MNIST', 'FashionMNIST', 'SVHN', 'CIFAR10', 'CIFAR100', 'digits'),
    'data_dir': _TEXT,
    'normalize': _BOOLEAN,
    'train_samples': _later(0, _integer(0)),
    'label_noise': _later(0.0, _number('a number from 0 to 1', lambda value: 0 <= value <= 1)),
    'clean_samples': _later(0, _integer(0)),
    'data_seed': _later(0, _integer(0, 2**63 - 1)),
    'augment': _later('none', _choice('none', 'crop')),
    'network': _TEXT,
    'depth': _integer(1, 1000),
    'width': _integer(1, 10**6),
    'kernel_size': _integer(1),
    'stride': _integer(1),
    'padding': _integer(0),
    'normalization': _later('weight', _choice('weight', 'batch', 'none')),
    'bias': _BOOLEAN,
    'loss': _choice('MSE', 'CE', 'L1'),
    'epochs': _integer(0),
    'batch_size': _integer(1),
    'lr': _number('a number above 0 and at most 1e9', lambda value: 0 < value <= 1e9),
    'milestones': Rule('a list of increasing epochs, as [60, 120, 160]', _milestones),
    'lr_decay': _number('a number above 0 and at most 1', lambda value: 0 < value <= 1),
    'momentum': _number('a number from 0 to below 1', lambda value: 0 <= value < 1),
    'weight_decay': _number('a number from 0 to 1000', lambda value: 0 <= value <= 1000),
    'target_loss': _later(0.0, _number('a number from 0 to 1e9', lambda value: 0 <= value <= 1e9)),
    'early_stop_epoch': _integer(0),
    'early_stop_accuracy': _number('a number from 0 to 1', lambda value: 0 <= value <= 1),
    'seed': _integer(0, 2**63 - 1),
    'density': _later(1.0, _number('a number above 0 and at most 1', lambda value: 0 < value <= 1)),
    'initial_mask': _later('none', _choice('none', 'random', 'erk', 'snip', 'synflow')),
    'prune_rounds': _later(0, _integer(0)),
    'prune_score': _later('magnitude', _choice('magnitude', 'path', 'random')),
    'prune_fraction': _later(0.2, _number('a number between 0 and 1', lambda value: 0 < value < 1)),
    'prune_layers': _later('all', _choice('all', 'conv')),
    'prune_allocation': _later('global', _choice('global', 'layer')),
    'rewind_epoch': _later(0, _integer(-1)),
    'rescale_neurons': _later(False, _BOOLEAN),
    'regrow': _later('none', _choice('none', 'random', 'gradient')),
    'regrow_every': _later(100, _integer(1)),
    'regrow_fraction': _later(
        0.3, _number('a number between 0 and 1', lambda value: 0 < value < 1)
    ),
    'regrow_until': _later(0.75, _number('a number from 0 to 1', lambda value: 0 <= value <= 1)),
    'channel_sparsity': _later(
        0.0, _number('a number from 0 to below 1', lambda value: 0 <= value < 1)
    ),
    'device': _TEXT,
    'precision': _choice('auto', 'float32', 'tf32', 'bf16'),
    'threads': _later(0, _integer(0, 1024)),
    'jobs': _later(1, _integer(1, 1024)),
    'delta': _number('a number between 0 and 1', lambda value: 1e-300 < value < 1),
    'gamma': _number('a number from 1e-9 to 1e9', lambda value: 1e-9 <= value <= 1e9),
    'eval_every': _integer(1),
    'certify_every': _later(10, _integer(0)),
    'measures_every': _later(0, _integer(0)),
    'layers_every': _later(0, _integer(0)),
    'snapshot_every': _later(0, _integer(0)),
    'checkpoint_every': _integer(1),
    'results_dir': _TEXT,
}

BEFORE = {name: rule.before for name, rule in RULES.items() if rule.before is not None}

LATER = '_later(value, rule) in conf/__init__.py'
FOLDERS = ('data_dir', 'results_dir')
NOT_SWEPT = (
    *FOLDERS,
    'milestones',
    'device',
    'threads',
    'jobs',
)  # a list in one of these is not a sweep


def _plain(value):
    """Python's numbers and lists for those of numpy."""
    return value.tolist() if hasattr(value, 'tolist') else value


def _check(name, value):
    """The knob's checked value, or the list of its checked values where it is swept. Raises BadInput."""
    text, check, _ = RULES[name]
    value = list(value) if isinstance(value, range) else _plain(value)
    if name in NOT_SWEPT or not isinstance(value, (list, tuple)):
        if (checked := check(value)) is None:
            raise BadInput(f'{name} = {value!r}: must be {text}')
        return checked
    if not value:
        raise BadInput(f'{name} = []: an empty sweep; give at least one value, each {text}')
    values = []
    for entry in map(_plain, value):
        if (checked := check(entry)) is None:
            raise BadInput(f'{name} = {list(value)!r}: {entry!r} must be {text}')
        if checked in values:
            raise BadInput(f'{name} = {list(value)!r}: {entry!r} is listed twice')
        values.append(checked)
    return values


def closest(name, names):
    """' (did you mean X?)' where one of `names` is close to `name`, else ''."""
    close = difflib.get_close_matches(name, names, 1)
    return f' (did you mean {close[0]}?)' if close else ''


def read_settings(path):
    """The knobs that a settings file has at its end, as {knob: checked value}. Raises BadInput."""
    if not os.path.isfile(path):
        raise BadInput(f'{path}: no such settings file')
    try:
        values = runpy.run_path(str(path))
    except Interrupted:
        raise
    except BaseException as error:  # a settings file may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)] or [
            getattr(error, 'lineno', None)
        ]
        where = f'{path}, line {lines[-1]}' if lines[-1] else path
        raise BadInput(f'{where}: {type(error).__name__}: {error}') from None
    nodes = ast.walk(ast.parse(Path(path).read_bytes()))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    settings = {}
    for name, value in values.items():
        try:
            if name in RULES:
                settings[name] = _check(name, value)
            elif not (name.startswith('_') or isinstance(value, ModuleType) or name in imported):
                raise BadInput(
                    f'unknown setting {name}{closest(name, RULES)}; a name of your own starts with _'
                )
        except BadInput as error:
            raise BadInput(f'{path}: {error}') from None
    return settings


def load_settings(path=GLOBAL_SETTINGS, flags=None, before=None):
    """One settings object per network of the sweep, in the order of the product.

    Args:
        path: settings file; what it does not set is taken from conf/global_settings.py.
        flags: {knob: value} of the command line, which win.
        before: {knob: value} in place of conf/global_settings.py: BEFORE for the file of a launch, which had every knob of
            its day.
    Returns:
        (sweep, runs): `sweep` is {knob: value}, lists where swept; `runs` is a list of namespaces with every knob as a
        scalar and `name`, the run's folder: CONV-3-200, followed by the values of what else the sweep varies.
    Raises:
        BadInput: unknown or misspelled settings, wrong types and ranges.
    """
    sweep = read_settings(GLOBAL_SETTINGS) if before is None else before
    if Path(path).resolve() != GLOBAL_SETTINGS:
        given = read_settings(path)
        if before is not None and not given:
            raise BadInput(f'{path}: is empty; put back the settings of this launch')
        sweep = sweep | given
    if missing := [name for name in RULES if name not in sweep]:
        mend = (
            'put its line back'
            if before is None
            else f'if it is a new knob, give its rule the value of older runs: {LATER}'
        )
        raise BadInput(
            f'{GLOBAL_SETTINGS if before is None else path}: the setting {missing[0]} is missing; {mend}'
        )
    sweep = {
        name: sweep[name] for name in RULES
    }  # the order of runs and of the knobs in their names, whatever the file's
    sweep |= {name: _check(name, value) for name, value in (flags or {}).items()}

    swept = {
        name: value if name not in NOT_SWEPT and isinstance(value, list) else [value]
        for name, value in sweep.items()
    }
    varied = [
        name for name in swept if len(swept[name]) > 1 and name not in ('network', 'depth', 'width')
    ]
    runs = []
    for values in itertools.product(*swept.values()):
        run = SimpleNamespace(**dict(zip(swept, values)))
        run.name = f'{run.network}-{run.depth}-{run.width}'
        run.name += ''.join(f'-{name}{getattr(run, name)}'.replace('/', '_') for name in varied)
        runs.append(run)
    return sweep, runs


def comments():
    """{knob: the comment on its line in conf/global_settings.py}; nothing where that file cannot be parsed."""
    try:
        source = GLOBAL_SETTINGS.read_text('utf-8')
        body = ast.parse(source).body
    except (OSError, ValueError, SyntaxError):
        return {}
    lines = source.splitlines()
    found = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            line = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            found[node.targets[0].id] = line.partition('#')[2].strip()
    return found


def settings_text(sweep, header):
    """A settings file that repeats this launch: `header` (lines) as comments, then a line per knob with its comment."""
    about = comments()
    lines = [f'# {line}' for line in header] + ['']
    lines += [f'{name} = {sweep[name]!r}  # {about.get(name, "")}'.rstrip(' #') for name in RULES]
    return '\n'.join(lines) + '\n'


class Parser(argparse.ArgumentParser):
    """A command line of whole options, whose mistakes are BadInput."""

    def __init__(self, prog, about, **options):
        super().__init__(prog, description=about, allow_abbrev=False, **options)

    def error(self, message):
        raise BadInput(f'{message}; see python {self.prog} --help')


def _literal(text):
    try:
        return ast.literal_eval({'true': 'True', 'false': 'False'}.get(text, text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def parse_command_line(argv=None):
    """The command line as (options, flags): a namespace of what is not a knob, and {knob: value}. Raises BadInput."""
    parser = Parser(
        'train.py',
        'Train the networks of a settings file and log, at every epoch, each generalization bound.',
        epilog='Several values of a knob are a sweep: --depth 3 4 --width 200 600 trains four networks. '
        f'Not of {", ".join(NOT_SWEPT)}. Defaults: conf/global_settings.py.',
    )
    add = parser.add_argument
    add('--settings', metavar='FILE', help='settings file (default: conf/global_settings.py)')
    add('--results-path', metavar='DIR', help='results folder to make, to resume or to plot')
    add('--resume', action='store_true', help='go on from the checkpoints in --results-path')
    add(
        '--run',
        metavar='K',
        type=int,
        help='train only the K-th network of the sweep, counted from 1',
    )
    either = parser.add_mutually_exclusive_group()
    prepare = 'check everything, make the results folder, print the number of networks and the folder, train nothing'
    either.add_argument('--prepare', action='store_true', help=prepare)
    plot = 'draw the figures of --results-path from what is logged so far'
    either.add_argument('--plot', action='store_true', help=plot)
    again = 'measure the snapshots and checkpoints of --results-path anew, with the bounds of today, into evaluation.csv'
    either.add_argument('--evaluate', action='store_true', help=again)
    either.add_argument(
        '--status', action='store_true', help='show which networks of --results-path are finished'
    )
    words = 'the settings of conf/global_settings.py, each with its comment there'
    knobs, about = (
        parser.add_argument_group('knobs', words, argument_default=argparse.SUPPRESS),
        comments(),
    )
    for name in RULES:
        flags = dict.fromkeys([f'--{name.replace("_", "-")}', f'--{name}'])
        kind = (
            os.path.abspath if name in FOLDERS else _literal
        )  # a folder is relative to where the command is given
        several = None if name in FOLDERS else '*' if name == 'milestones' else '+'
        help_text = about.get(name, '').replace('%', '%%')
        knobs.add_argument(*flags, dest=name, type=kind, nargs=several, metavar='X', help=help_text)

    options, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise BadInput(
            f'unknown argument {unknown[0]}{closest(unknown[0], known)}; see python train.py --help'
        )
    flags = {name: vars(options).pop(name) for name in RULES if name in options}
    for name, values in flags.items():  # one value of the command line is no sweep
        if (
            name not in FOLDERS
            and len(values) == 1
            and (name != 'milestones' or isinstance(values[0], list))
        ):
            flags[name] = values[0]
    return options, flags
