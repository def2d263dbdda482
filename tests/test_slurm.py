"""train.sh, on a real Slurm of one node that a fixture starts and stops, and without Slurm."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, contents, rows, same, train_small

from records import read_metrics

SLURM = ('sbatch', 'scontrol', 'squeue', 'slurmctld', 'slurmd', 'munged')
MISSING = [
    program
    for program in SLURM
    if not shutil.which(program, path=f'{os.environ["PATH"]}:/usr/sbin')
]
needs_slurm = pytest.mark.skipif(
    bool(MISSING) or os.getuid() != 0, reason='takes root and the packages slurm-wlm and munge'
)


def shell(command, *arguments, cwd=None, **environment):
    """A command's output, where it succeeds."""
    done = subprocess.run(
        [command, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(('127.0.0.1', 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    """One node, configured as a cluster's is, under a folder of its own; SLURM_CONF of the environment points at it."""
    folder = tmp_path_factory.mktemp('slurm')
    folder.chmod(0o755)
    for name in ('state', 'spool'):
        (folder / name).mkdir()
    (folder / 'munge.key').write_bytes(os.urandom(1024))
    (folder / 'munge.key').chmod(0o400)
    host = socket.gethostname().partition('.')[0]
    controller, daemon = free_ports(2)
    (folder / 'slurm.conf').write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SchedulerParameters=sched_interval=1,sched_min_interval=0
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
""")
    path = os.environ['PATH']
    os.environ |= {'SLURM_CONF': str(folder / 'slurm.conf'), 'PATH': f'{path}:/usr/sbin'}
    munge = ['munged', '--foreground', '--force', '--num-threads=2']
    munge += [
        f'--{name}={folder}/munge.{name.partition("-")[0]}'
        for name in ('socket', 'key-file', 'pid-file', 'log-file', 'seed-file')
    ]
    daemons = []
    try:
        for command in (munge, ['slurmctld', '-D'], ['slurmd', '-D']):
            with open(folder / f'{command[0]}.log', 'w') as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=folder))
            time.sleep(1)
        deadline = time.monotonic() + 60
        while (
            'idle'
            not in subprocess.run(
                ['sinfo', '-h', '-o', '%T'], capture_output=True, text=True
            ).stdout
        ):
            logs = ''.join(path.read_text() for path in folder.glob('*.log'))
            assert time.monotonic() < deadline, logs
            time.sleep(0.5)
        yield folder
    finally:
        subprocess.run(['scancel', '--user', 'root'], capture_output=True)
        time.sleep(1)
        for each in reversed(daemons):
            each.terminate()
            try:
                each.wait(20)
            except subprocess.TimeoutExpired:
                each.kill()
        del os.environ['SLURM_CONF']
        os.environ['PATH'] = path


def submit(*arguments, script=ROOT / 'train.sh', command='sh', cwd=None, **environment):
    """Submits a sweep with train.sh; returns (job id, results folder, what train.sh printed)."""
    output = shell(
        command, script, *SMALL, *arguments, cwd=cwd, VIRTUAL_ENV=sys.prefix, **environment
    )
    job, folder = re.search(
        r'^job (\d+): a task for each of \d+ networks?, in (.*)$', output, re.M
    ).groups()
    return job, Path(folder), output


def state(job, task=1):
    """The fields of `scontrol show job` of a task of an array job; of a plain job where task is None."""
    fields = re.findall(
        r'(\w+)=(\S+)', shell('scontrol', 'show', 'job', '-o', f'{job}_{task}' if task else job)
    )
    return dict(fields)


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, shell('scontrol', 'show', 'job')
        time.sleep(0.2)


def ended(job, task=1):
    return state(job, task)['JobState'] in (
        'COMPLETED',
        'FAILED',
        'TIMEOUT',
        'CANCELLED',
        'NODE_FAIL',
    )


def wait_for_array(job, tasks=1):
    wait_until(lambda: all(ended(job, task) for task in range(1, tasks + 1)))
    return [state(job, task)['JobState'] for task in range(1, tasks + 1)]


def whole(tmp_path, *arguments):
    """The same sweep, uninterrupted and without Slurm."""
    train_small(tmp_path / 'whole', *arguments)
    return tmp_path / 'whole'


def start_again(job, *changes):
    """Starts a requeued task, for which Slurm would wait two minutes; by then it has forgotten that it ended that task."""
    wait_until(lambda: state(job)['JobState'] == 'PENDING')
    time.sleep(5)
    shell('scontrol', 'update', f'JobId={job}_1', 'StartTime=now', *changes)


@needs_slurm
@pytest.mark.pictures
def test_an_array_of_four_leaves_one_figure(slurm, tmp_path):
    arguments = ('--depth', '2', '3', '--width', '4', '5', '--results-dir', tmp_path)
    job, folder, output = submit(*arguments)
    assert folder == tmp_path / '1'
    for hint in (
        'each of 4 networks',
        f'squeue --job {job}',
        f'{folder}/slurm-1.log',
        f'--results-path {folder} --plot',
    ):
        assert hint in output
    assert wait_for_array(job, 4) == ['COMPLETED'] * 4
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        'CONV-2-4',
        'CONV-2-5',
        'CONV-3-4',
        'CONV-3-5',
    }
    other = whole(tmp_path, *arguments[:-2])
    for name in ('CONV-2-4', 'CONV-2-5', 'CONV-3-4', 'CONV-3-5'):
        assert same(folder, other, name)
    assert (folder / 'figure.png').read_bytes() == (other / 'figure.png').read_bytes()
    assert all(
        f'CONV-{name}' in (folder / f'slurm-{task}.log').read_text()
        for task, name in ((1, '2-4'), (4, '3-5'))
    )


@needs_slurm
@pytest.mark.parametrize(
    'flags', ['--epochs 100', '--epochs 40 --prune-rounds 2 --prune-fraction 0.5 --rewind-epoch 1']
)
def test_a_requeued_task_goes_on(slurm, tmp_path, flags):
    flags = flags.split()
    job, folder, _ = submit(
        *flags, '--width', '4', '5', '--results-dir', tmp_path, SBATCH_ARRAY_INX='1%1'
    )
    for count in (5, 50):
        wait_until(lambda count=count: rows(folder) >= count)
        shell('scontrol', 'requeue', f'{job}_1')
        start_again(job)
    assert wait_for_array(job, 2) == ['COMPLETED'] * 2
    assert [state(job, task)['Restarts'] for task in (1, 2)] == ['2', '0']
    assert 'stopped by SIGTERM' in (folder / 'slurm-1.log').read_text()
    other = whole(tmp_path, *flags)
    assert same(folder, other)


@needs_slurm
def test_a_task_whose_time_is_up_goes_on(slurm, tmp_path):
    """A limit of one minute, of which the signal leaves a few seconds: Slurm may send it up to a minute early."""
    limits = {'SBATCH_TIMELIMIT': '1', 'SBATCH_SIGNAL': 'B:USR1@45'}
    job, folder, _ = submit('--epochs', '500', '--results-dir', tmp_path, **limits)
    wait_until(lambda: state(job)['Restarts'] != '0')
    assert 0 < rows(folder) < 501
    start_again(job, 'TimeLimit=10')
    assert wait_for_array(job) == ['COMPLETED']
    assert 'stopped by SIGTERM' in (folder / 'slurm-1.log').read_text()
    other = whole(tmp_path, '--epochs', '500')
    assert same(folder, other)


@needs_slurm
def test_a_failing_task_is_not_requeued(slurm, tmp_path):
    job, folder, _ = submit('--lr', '0.01', '1e9', '--results-dir', tmp_path)
    assert wait_for_array(job, 2) == ['COMPLETED', 'FAILED']
    failed = state(job, 2)
    assert (failed['ExitCode'], failed['Restarts']) == ('1:0', '0')
    assert 'became NaN' in (folder / 'slurm-2.log').read_text()
    assert len(read_metrics(folder / 'CONV-3-4-lr0.01' / 'metrics.csv')['epoch']) == 7


@needs_slurm
def test_a_cancelled_task_stays_cancelled_and_a_new_job_goes_on(slurm, tmp_path):
    job, folder, output = submit('--epochs', '60', '--results-dir', tmp_path)
    assert 'each of 1 network,' in output
    wait_until(lambda: rows(folder) >= 5)
    shell('scancel', job)
    assert wait_for_array(job) == ['CANCELLED']
    time.sleep(3)
    assert (
        state(job)['JobState'] == 'CANCELLED'
        and 'stopped by SIGTERM' in (folder / 'slurm-1.log').read_text()
    )
    output = shell(
        'sh', ROOT / 'train.sh', '--results-path', folder, '--resume', VIRTUAL_ENV=sys.prefix
    )
    assert wait_for_array(re.search(r'^job (\d+)', output)[1]) == ['COMPLETED']
    assert rows(folder) == 61


def train_sh(*arguments, **environment):
    """train.sh to its end, whatever it is."""
    command = ['sh', str(ROOT / 'train.sh'), *map(str, arguments)]
    return subprocess.run(
        command,
        env=os.environ | {'VIRTUAL_ENV': sys.prefix} | environment,
        capture_output=True,
        text=True,
    )


@needs_slurm
@pytest.mark.parametrize(
    'status, arguments, environment, message',
    [
        (2, ('--widht', '4'), {}, 'did you mean --width?'),
        (
            2,
            ('--run', '2', '--width', '4', '5'),
            {},
            '--run: a job has a task for each network; leave it out',
        ),
        (1, (), {'SBATCH_PARTITION': 'gone'}, 'nvalid partition'),
    ],
)
def test_what_is_refused_submits_nothing_and_leaves_no_folder(
    slurm, tmp_path, status, arguments, environment, message
):
    before = shell('squeue', '-h', '-a', '-t', 'all', '-o', '%A')
    done = train_sh(*SMALL, *arguments, '--results-path', tmp_path / 'run', **environment)
    assert (
        done.returncode == status
        and done.stdout == ''
        and message in done.stderr
        and '--prepare' not in done.stderr
    )
    assert (
        shell('squeue', '-h', '-a', '-t', 'all', '-o', '%A') == before
        and not (tmp_path / 'run').exists()
    )


@needs_slurm
def test_a_folder_of_before_outlives_a_refused_partition(slurm, tmp_path):
    train_small(tmp_path / 'run', '--prepare')
    before = contents(tmp_path / 'run')
    assert (
        train_sh('--results-path', tmp_path / 'run', '--resume', SBATCH_PARTITION='gone').returncode
        == 1
    )
    assert contents(tmp_path / 'run') == before


@needs_slurm
@pytest.mark.parametrize(
    'limit, lead, warns',
    [
        ('3', '120', True),
        ('1:00:00', '3500', True),
        ('1:00:00', '3400', False),
        ('1-0', '3400', False),
    ],
)
def test_a_limit_too_short_for_its_lead_is_warned_about(slurm, tmp_path, limit, lead, warns):
    limits = {'SBATCH_TIMELIMIT': limit, 'SBATCH_SIGNAL': f'B:USR1@{lead}'}
    done = train_sh(*SMALL, '--results-path', tmp_path / 'run', **limits)
    shell('scancel', re.search(r'^job (\d+)', done.stdout)[1])
    assert done.returncode == 0 and done.stderr.count('\n') == warns
    assert not warns or f'a task that ends {lead} s before it may train nothing' in done.stderr


@needs_slurm
def test_what_trains_nothing_is_done_here(slurm, uninterrupted):
    before = shell('squeue', '-h', '-a', '-t', 'all', '-o', '%A')
    for option, word in (('--status', 'finished'), ('--plot', 'figure.png')):
        done = train_sh('--results-path', uninterrupted, option)
        assert (done.returncode, done.stderr) == (0, '') and word in done.stdout
    assert shell('squeue', '-h', '-a', '-t', 'all', '-o', '%A') == before


@needs_slurm
@pytest.mark.parametrize('arguments', [(), ('--width', '4', '5')])
def test_sbatch_does_the_same(slurm, tmp_path, arguments):
    """`sbatch train.sh`, from another folder, and with a space in the path of the repository."""
    repo = tmp_path / 'my repo'
    ignore = shutil.ignore_patterns('.git', 'results', '__pycache__', 'data')
    shutil.copytree(ROOT, repo, ignore=ignore)
    shutil.copytree(
        ROOT / 'data', repo / 'data', ignore=lambda folder, names: set(names) - {'digits.npz'}
    )
    (tmp_path / 'elsewhere').mkdir()
    where = {'cwd': tmp_path / 'elsewhere', 'VIRTUAL_ENV': sys.prefix}
    output = shell(
        'sbatch', '--parsable', '--output=out', repo / 'train.sh', *SMALL, *arguments, **where
    )
    wait_until(lambda: ended(output.strip(), None))
    job = re.search(r'^job (\d+)', (tmp_path / 'elsewhere' / 'out').read_text(), re.M)[1]
    count = max(1, len(arguments) - 1)
    assert wait_for_array(job, count) == ['COMPLETED'] * count
    assert rows(repo / 'results' / '1') == 7 and (repo / 'results' / '1' / 'figure.png').exists()


def test_without_slurm_it_trains_here(tmp_path):
    """On a PATH without sbatch, from another folder."""
    programs = tmp_path / 'bin'
    programs.mkdir()
    for name in ('sh', 'dirname', 'basename', 'git', 'cat'):
        (programs / name).symlink_to(shutil.which(name))
    environment = {'PATH': str(programs), 'VIRTUAL_ENV': sys.prefix}
    output = shell(
        'sh',
        ROOT / 'train.sh',
        *SMALL,
        '--width',
        '4',
        '5',
        '--results-path',
        'out',
        cwd=tmp_path,
        **environment,
    )
    assert (
        'CONV-3-5 epoch 6/6' in output
        and rows(tmp_path / 'out') == rows(tmp_path / 'out', 'CONV-3-5') == 7
    )


@pytest.mark.skipif(
    not shutil.which('shellcheck') or not shutil.which('dash'),
    reason='shellcheck or dash is not installed',
)
def test_scripts_are_posix_and_clean():
    shell('dash', '-n', ROOT / 'train.sh')
    shell('shellcheck', ROOT / 'train.sh', ROOT / '.ci' / 'run')
