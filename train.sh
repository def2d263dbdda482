#!/bin/sh
# Trains the sweep of conf/global_settings.py: on Slurm as an array job with a task per network, on
# a machine without Slurm here. The arguments are train.py's: sh train.sh --width 200 600
#
# The lines below are yours to edit; sbatch's environment variables (SBATCH_PARTITION,
# SBATCH_TIMELIMIT, ...) win over them. A line that begins with ## is an example and off.
#
#SBATCH --job-name=conv
#SBATCH --cpus-per-task=2
# A task gets one GPU where the cluster has any, unless this line says otherwise:
##SBATCH --gres=gpu:1
##SBATCH --partition=gpu
##SBATCH --account=theory
##SBATCH --time=12:00:00
# At most 4 tasks at once; the rest of this line is filled in at submission:
##SBATCH --array=1%4
# A task writes a checkpoint and is queued again this many seconds before its time is up:
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
fail() { echo "train.sh: error: $2" >&2; exit "$1"; }

# What Slurm runs for one network: --task REPOSITORY PYTHON FOLDER. Slurm requeues a task that it
# preempts, and ends one that was cancelled; both send TERM, and USR1 means that time is up.
if [ "${1:-}" = --task ]; then
    pid='' signal='' time_is_up=''
    trap 'signal=yes; kill -TERM $pid 2>/dev/null' TERM
    trap 'signal=yes time_is_up=yes; kill -TERM $pid 2>/dev/null' USR1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    "$3" "$2/train.py" --results-path "$4" --run "$SLURM_ARRAY_TASK_ID" --resume &
    pid=$!
    [ -z "$signal" ] || kill -TERM "$pid" # the signal came before there was a process
    signal=yes
    while [ -n "$signal" ]; do # a signal ends `wait` before the process ends
        signal=''
        wait "$pid"
        status=$?
    done
    # 143: stopped by our TERM, with a checkpoint. The job id alone would requeue the whole array.
    # Slurm then ends this script; an exit status of its own could be taken for the new run's.
    if [ -n "$time_is_up" ] && [ "$status" -eq 143 ]; then
        trap - TERM
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" && sleep 60
    fi
    exit "$status"
fi

# Under `sbatch train.sh` this is a copy in Slurm's spool folder; Slurm knows the original.
script=$0
if [ ! -f "$(dirname "$script")/train.py" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
    [ $# -eq 0 ] || script=${script%" $*"}
fi
repo=$(CDPATH="" cd -- "$(dirname "$script")" && pwd) || exit
script=$repo/$(basename "$script")

python=$(command -v python3 || command -v python)
for venv in "$repo/venv" "$repo/.venv" "${VIRTUAL_ENV:-none}"; do # the last one found wins
    [ ! -x "$venv/bin/python" ] || python=$venv/bin/python
done
"$python" -c 'import importlib.util as i, sys; sys.exit(i.find_spec("torch") is None)' ||
    fail 1 "$python has no torch; install it: $python -m pip install -r $repo/requirements.txt"

# What trains nothing is done here, and without Slurm everything is.
case " $* " in *' -h '* | *' --help '* | *' --plot '* | *' --status '* | *' --prepare '*)
    exec "$python" "$repo/train.py" "$@" ;;
esac
command -v sbatch >/dev/null || exec "$python" "$repo/train.py" "$@"
case " $* " in *' --run '* | *' --run='*)
    fail 2 '--run: a job has a task for each network; leave it out, or train it with train.py' ;;
esac
gpus=$(sinfo --noheader --format=%G) ||
    fail 1 "Slurm does not answer; to train on this machine: $python $repo/train.py $*"

# Everything is checked, and missing data downloaded, before there is a job. The last line is
# COUNT FOLDER; a settings file may print others before it.
prepared=$("$python" "$repo/train.py" --prepare "$@") || exit
prepared=$(printf '%s\n' "$prepared" | tail -n 1)
count=${prepared%% *}
folder=$(CDPATH="" cd -- "${prepared#* }" && pwd) || exit
case " $* " in *' --resume '*) new='' ;; *) new=yes ;; esac

option() { sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$script" | tail -n 1; }
array=${SBATCH_ARRAY_INX:-$(option array)}
case $array in *%*) at_once=%${array##*%} ;; *) at_once='' ;; esac
log=$(printf %s "$folder" | sed 's/%/%%/g')/slurm-%a.log
set -- --parsable --array="1-$count$at_once" --output="$log"
asked=$(env | grep -E '^SBATCH_(GRES|GPUS)'; grep '^#SBATCH --g[rp]' "$script")
case $gpus in *gpu*) [ -n "$asked" ] || set -- "$@" --gres=gpu:1 ;; esac
if [ -n "${SLURM_JOB_ID:-}" ]; then # a job submits: its flags hold for the new one too
    account=${SLURM_JOB_ACCOUNT:-}
    set -- "$@" --partition="$SLURM_JOB_PARTITION" ${account:+--account="$account"}
fi
if ! job=$(sbatch "$@" "$script" --task "$repo" "$python" "$folder"); then
    [ -z "$new" ] || { rm "$folder/global_settings.py" && rmdir "$folder"; }
    exit 1
fi
job=${job%%;*}
cat <<END
job $job: $count task(s), one per network, in $folder
    squeue --job $job                                  what runs and what waits
    tail -f $folder/slurm-1.log                        what the first task says
    $python $repo/train.py --results-path $folder --plot
    scancel $job                                       stop it; the next line continues it
    sh $script --results-path $folder --resume
END

# Slurm may send the signal up to a minute early; enough time must remain before that to train.
signal=${SBATCH_SIGNAL:-$(option signal)}
case $signal in *@*) lead=${signal##*@} ;; *) lead=60 ;; esac
limit=$(squeue --noheader --job "$job" --format=%l | head -n 1) # days-hours:minutes:seconds
seconds=$(echo "$limit" | awk -F '[-:]' '
    /^[0-9]/ { for (i = 1; i <= NF; i++) s = s * (/-/ && i == 2 ? 24 : 60) + $i; print s }')
[ -z "$seconds" ] || [ "$seconds" -ge $((lead + 120)) ] || echo "train.sh: warning: of a time" \
    "limit of $seconds s, a task that ends $lead s before it may train nothing; give more time" \
    "(SBATCH_TIMELIMIT), or a smaller lead (SBATCH_SIGNAL=B:USR1@60)" >&2
