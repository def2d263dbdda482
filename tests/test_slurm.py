"""train.sh, on a real Slurm of one node that a fixture starts and stops, and without Slurm."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, contents, rows, same, train_small

from records import read_metrics

PATH = os.environ['PATH'] + ':/usr/sbin'
PROGRAMS = 'sbatch', 'scontrol', 'squeue', 'slurmctld', 'slurmd', 'munged'
HAS_SLURM = os.getuid() == 0 and all(shutil.which(name, path=PATH) for name in PROGRAMS)
needs_slurm = pytest.mark.skipif(
    not HAS_SLURM, reason='takes root and the packages slurm-wlm and munge'
)
pytestmark = pytest.mark.process
ENDED = 'COMPLETED', 'FAILED', 'TIMEOUT', 'CANCELLED', 'NODE_FAIL'

# {folder}, {host}, {controller} and {daemon} (ports) are filled in.
SLURM_CONF = """
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
"""


def execute(*command, cwd=None, **environment):
    """A command to its end, with the tests' Python."""
    environment = {'VIRTUAL_ENV': sys.prefix} | environment
    options = {'cwd': cwd, 'env': os.environ | environment, 'capture_output': True, 'text': True}
    return subprocess.run([str(word) for word in command], **options)


def output_of(*command, **options):
    """The output of a command that succeeds."""
    done = execute(*command, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_sh(*arguments, **options):
    return execute('sh', ROOT / 'train.sh', *arguments, **options)


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, execute('scontrol', 'show', 'job').stdout
        time.sleep(0.2)


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    """One node, configured as a cluster's is, in a folder of its own that SLURM_CONF points at."""
    folder = tmp_path_factory.mktemp('slurm')
    folder.chmod(0o755)
    for name in ('state', 'spool'):
        (folder / name).mkdir()
    (folder / 'munge.key').write_bytes(os.urandom(1024))
    (folder / 'munge.key').chmod(0o400)
    host = socket.gethostname().partition('.')[0]
    with socket.create_server(('127.0.0.1', 0)) as one, socket.create_server(('', 0)) as two:
        ports = {'controller': one.getsockname()[1], 'daemon': two.getsockname()[1]}
    text = SLURM_CONF.format(folder=folder, host=host, **ports)
    (folder / 'slurm.conf').write_text(text)
    munge = ['munged', '--foreground', '--force', '--num-threads=2']
    for name in ('socket', 'key-file', 'pid-file', 'log-file', 'seed-file'):
        munge.append(f'--{name}={folder}/munge.{name.partition("-")[0]}')
    daemons = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SLURM_CONF', str(folder / 'slurm.conf'))
        patch.setenv('PATH', PATH)
        try:
            for command in (munge, ['slurmctld', '-D'], ['slurmd', '-D']):
                with open(folder / f'{command[0]}.log', 'w') as log:
                    streams = {'stdout': log, 'stderr': log}
                    daemons.append(subprocess.Popen(command, cwd=folder, **streams))
                time.sleep(1)
            wait_until(lambda: 'idle' in execute('sinfo', '-h', '-o', '%T').stdout, 60)
            yield
        finally:
            execute('scancel', '--user', 'root')
            time.sleep(1)
            for process in reversed(daemons):
                process.terminate()
            for process in daemons:
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


def job_in(output):
    """The id of the job that train.sh says it submitted."""
    return re.search(r'^job (\d+): \d+ task', output, re.M)[1]


def submit(*arguments, **options):
    """Submits a sweep with train.sh; returns (job id, what train.sh printed)."""
    output = output_of('sh', ROOT / 'train.sh', *SMALL, *arguments, **options)
    return job_in(output), output


def all_jobs():
    return output_of('squeue', '-h', '-a', '-t', 'all', '-o', '%A')


def state(job, task=1):
    """The fields of `scontrol show job` of an array job's task, of a plain job if task is None."""
    name = f'{job}_{task}' if task else job
    return dict(re.findall(r'(\w+)=(\S+)', output_of('scontrol', 'show', 'job', '-o', name)))


def states_at_end(job, tasks=1):
    """The states of an array job's tasks, once all have ended."""
    numbers = range(1, tasks + 1)
    wait_until(lambda: all(state(job, task)['JobState'] in ENDED for task in numbers))
    return [state(job, task)['JobState'] for task in numbers]


def restart(job, *changes):
    """Starts a requeued task at once, for which Slurm would wait two minutes."""
    wait_until(lambda: state(job)['JobState'] == 'PENDING')
    time.sleep(5)  # until then Slurm may still take its end for that of the restarted task
    output_of('scontrol', 'update', f'JobId={job}_1', 'StartTime=now', *changes)


def log(folder, task=1):
    return (folder / f'slurm-{task}.log').read_text()


@needs_slurm
@pytest.mark.long
@pytest.mark.pictures
def test_the_last_task_of_an_array_draws(slurm, tmp_path):
    sweep = '--depth', '2', '3', '--width', '4', '5'
    job, output = submit(*sweep, '--results-dir', tmp_path)
    folder, names = tmp_path / '1', ['CONV-2-4', 'CONV-2-5', 'CONV-3-4', 'CONV-3-5']
    for hint in ('4 task', f'squeue --job {job}', 'slurm-1.log', f'{folder} --plot'):
        assert hint in output
    assert states_at_end(job, 4) == ['COMPLETED'] * 4
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == names
    train_small(tmp_path / 'whole', *sweep)
    assert all(same(folder, tmp_path / 'whole', name) for name in names)
    picture = (tmp_path / 'whole' / 'figure.png').read_bytes()
    assert (folder / 'figure.png').read_bytes() == picture
    logs = [log(folder, task) for task in range(1, 5)]
    assert all(name in text for name, text in zip(names, logs))
    assert sum('drew' in text for text in logs) == 1


@needs_slurm
@pytest.mark.long
def test_a_requeued_task_continues(slurm, tmp_path):
    flags = '--epochs 30 --prune-rounds 2 --prune-fraction 0.5 --rewind-epoch 1'.split()
    folder = tmp_path / 'run'
    sweep = *flags, '--width', '4', '5', '--results-path', folder
    job, _ = submit(*sweep, SBATCH_ARRAY_INX='1%1')
    for count in (5, 40):
        wait_until(lambda count=count: rows(folder) >= count)
        output_of('scontrol', 'requeue', f'{job}_1')
        restart(job)
    assert states_at_end(job, 2) == ['COMPLETED'] * 2
    assert [state(job, task)['Restarts'] for task in (1, 2)] == ['2', '0']
    assert log(folder).count('stopped by SIGTERM; continue with: ') == 2
    train_small(tmp_path / 'whole', *flags)
    assert same(folder, tmp_path / 'whole')


@needs_slurm
@pytest.mark.long
def test_a_task_whose_time_is_up_is_requeued(slurm, tmp_path):
    """Of a limit of one minute a few seconds are left: Slurm may signal up to a minute early."""
    folder, limits = tmp_path / 'run', {'SBATCH_TIMELIMIT': '1', 'SBATCH_SIGNAL': 'B:USR1@45'}
    job, _ = submit('--epochs', '400', '--results-path', folder, **limits)
    wait_until(lambda: state(job)['Restarts'] != '0')
    assert 0 < rows(folder) < 401
    restart(job, 'TimeLimit=10')
    assert states_at_end(job) == ['COMPLETED']
    assert 'stopped by SIGTERM' in log(folder)
    epochs = read_metrics(folder / 'CONV-3-4' / 'metrics.csv')['epoch']
    assert epochs.tolist() == list(range(401))


@needs_slurm
@pytest.mark.long
def test_a_failing_task_is_not_requeued(slurm, tmp_path):
    folder = tmp_path / 'run'
    job, _ = submit('--lr', '0.01', '1e9', '--results-path', folder)
    assert states_at_end(job, 2) == ['COMPLETED', 'FAILED']
    failed = state(job, 2)
    assert (failed['ExitCode'], failed['Restarts']) == ('1:0', '0')
    assert 'became NaN' in log(folder, 2)
    assert len(read_metrics(folder / 'CONV-3-4-lr0.01' / 'metrics.csv')['epoch']) == 7


@needs_slurm
@pytest.mark.long
def test_a_cancelled_task_stays_cancelled_and_a_new_job_continues_it(slurm, tmp_path):
    folder = tmp_path / 'run'
    job, output = submit('--epochs', '60', '--results-path', folder)
    wait_until(lambda: rows(folder) >= 5)
    output_of('scancel', job)
    assert states_at_end(job) == ['CANCELLED']
    time.sleep(3)
    assert state(job)['JobState'] == 'CANCELLED' and 'stopped by SIGTERM' in log(folder)
    command = re.search(r'^ +(sh .* --resume)$', output, re.M)[1]
    job = job_in(output_of(*command.split()))
    assert states_at_end(job) == ['COMPLETED'] and rows(folder) == 61


@needs_slurm
@pytest.mark.long
@pytest.mark.parametrize(
    'status, arguments, partition, message',
    [
        (2, '--widht 4', 'debug', 'did you mean --width?'),
        (2, '--run 2 --width 4 5', 'debug', '--run: a job has a task for each network; leave it'),
        (1, '', 'gone', 'nvalid partition'),
    ],
)
def test_a_refusal_submits_nothing_and_leaves_no_folder(
    slurm, tmp_path, status, arguments, partition, message
):
    before, folder = all_jobs(), tmp_path / 'run'
    flags = *SMALL, *arguments.split(), '--results-path', folder
    done = train_sh(*flags, SBATCH_PARTITION=partition)
    assert (done.returncode, done.stdout) == (status, '') and message in done.stderr
    assert '--prepare' not in done.stderr
    assert all_jobs() == before and not folder.exists()


@needs_slurm
@pytest.mark.long
def test_a_resumed_folder_survives_a_refusal(slurm, tmp_path):
    train_small(tmp_path / 'run', '--prepare')
    before = contents(tmp_path / 'run')
    done = train_sh('--results-path', tmp_path / 'run', '--resume', SBATCH_PARTITION='gone')
    assert done.returncode == 1 and contents(tmp_path / 'run') == before


@needs_slurm
@pytest.mark.long
@pytest.mark.parametrize(
    'limit, lead, warns',
    [('1:00:00', '3500', True), ('1:00:00', '3400', False), ('1-0', '3500', False)],
)
def test_a_limit_too_short_for_its_lead_is_warned_about(slurm, tmp_path, limit, lead, warns):
    limits = {'SBATCH_TIMELIMIT': limit, 'SBATCH_SIGNAL': f'B:USR1@{lead}'}
    done = train_sh(*SMALL, '--results-path', tmp_path / 'run', **limits)
    output_of('scancel', job_in(done.stdout))
    assert done.returncode == 0
    warning = 'of a time limit of 3600 s, a task that ends 3500 s before it may train nothing'
    assert (done.stderr.count('\n'), warning in done.stderr) == (int(warns), warns)


@needs_slurm
@pytest.mark.long
def test_what_trains_nothing_is_done_here(slurm, uninterrupted):
    before = all_jobs()
    for option, word in (('--status', 'finished'), ('--plot', 'figure.png')):
        done = train_sh('--results-path', uninterrupted, option)
        assert (done.returncode, done.stderr) == (0, '') and word in done.stdout
    assert all_jobs() == before


@needs_slurm
@pytest.mark.long
@pytest.mark.parametrize('widths', [[], ['--width', '4', '5']])
def test_sbatch_does_the_same(slurm, tmp_path, widths):
    """`sbatch train.sh`, from another folder, and with a space in the path of the repository."""
    repo, elsewhere = tmp_path / 'my repo', tmp_path / 'elsewhere'
    without = shutil.ignore_patterns('.git', 'results', '__pycache__', 'MNIST', '*.gz')
    shutil.copytree(ROOT, repo, ignore=without)
    elsewhere.mkdir()
    command = 'sbatch', '--parsable', '--output=out', repo / 'train.sh', *SMALL, *widths
    first = output_of(*command, cwd=elsewhere).strip()
    wait_until(lambda: state(first, None)['JobState'] in ENDED)
    job, count = job_in((elsewhere / 'out').read_text()), max(1, len(widths) - 1)
    assert states_at_end(job, count) == ['COMPLETED'] * count
    folder = repo / 'results' / '1'
    assert rows(folder) == 7 and (folder / 'figure.png').exists()


@pytest.mark.long
def test_without_slurm_it_trains_here(tmp_path):
    """On a PATH without sbatch, from another folder."""
    programs = tmp_path / 'bin'
    programs.mkdir()
    for name in ('sh', 'dirname', 'basename', 'git'):
        (programs / name).symlink_to(shutil.which(name))
    flags = *SMALL, '--width', '4', '5', '--results-path', 'out'
    done = train_sh(*flags, cwd=tmp_path, PATH=str(programs))
    assert done.returncode == 0 and 'CONV-3-5 epoch 6/6' in done.stdout, done.stderr
    assert [rows(tmp_path / 'out', name) for name in ('CONV-3-4', 'CONV-3-5')] == [7, 7]


@pytest.mark.skipif(
    not (shutil.which('shellcheck') and shutil.which('dash')),
    reason='shellcheck or dash is not installed',
)
def test_scripts_are_posix_and_clean():
    output_of('dash', '-n', ROOT / 'train.sh')
    output_of('shellcheck', ROOT / 'train.sh', ROOT / '.ci' / 'run')
