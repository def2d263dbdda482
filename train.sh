#!/bin/sh
# Trains the sweep that conf/global_settings.py describes: on Slurm as one array job with a task per network, on a machine
# without Slurm here, one network after the other. Arguments are those of train.py:
#
#     sh train.sh --width 200 600 --seed 0 1 2
#
# The lines below are yours to edit; sbatch's environment variables (SBATCH_PARTITION, SBATCH_TIMELIMIT, ...) win over
# them. A line that begins with ## is an example and off.
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
# A task checkpoints and is queued again this many seconds before its time is up:
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u

# What Slurm runs, for one network of the sweep.
task() {
    repo=$1 python=$2 folder=$3
    pid='' interrupted='' time_is_up=''
    # Slurm itself requeues a task that it preempts, or that was requeued by hand, and ends one that was cancelled.
    trap 'interrupted=yes; [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null' TERM
    trap 'interrupted=yes; time_is_up=yes; [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null' USR1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    "$python" "$repo/train.py" --results-path "$folder" --run "$SLURM_ARRAY_TASK_ID" --resume &
    pid=$!
    [ -z "$interrupted" ] || kill -TERM "$pid" # a signal that came before there was a process to tell
    while :; do
        interrupted=''
        wait "$pid"
        status=$?
        [ -n "$interrupted" ] || break # else it was the signal that ended the wait
    done
    # 143: stopped by our SIGTERM, with a checkpoint. Anything else ended by itself, and stays ended.
    if [ -n "$time_is_up" ] && [ "$status" -eq 143 ]; then
        # The job id alone would requeue the whole array where this is its first task. Then Slurm ends this script: an exit
        # status of its own could reach Slurm after the restart and be taken for that of the new run.
        trap - TERM
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" && sleep 60
    fi
    exit "$status"
}

if [ "${1:-}" = --task ]; then
    shift
    task "$@"
fi

# Under `sbatch train.sh` this is a copy in Slurm's spool folder, and Slurm knows where it was copied from.
script=$0
if [ ! -f "$(dirname "$script")/train.py" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
    arguments=" $*"
    [ $# -eq 0 ] || script=${script%"$arguments"}
fi
repo=$(CDPATH="" cd -- "$(dirname "$script")" && pwd) || exit
script=$repo/$(basename "$script")

python=$(command -v python3 || command -v python)
for environment in "$repo/venv" "$repo/.venv" "${VIRTUAL_ENV:-}"; do # the last one found wins
    if [ -n "$environment" ] && [ -x "$environment/bin/python" ]; then
        python=$environment/bin/python
    fi
done

if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    echo "train.sh: error: $python has no torch; install it: $python -m pip install -r $repo/requirements.txt" >&2
    exit 1
fi

case " $* " in # commands that do not train run here
*' --help '* | *' -h '*) exec "$python" "$repo/train.py" --help ;;
*' --plot'* | *' --status '* | *' --evaluate '* | *' --prepare '*) exec "$python" "$repo/train.py" "$@" ;;
esac
if ! command -v sbatch >/dev/null; then
    exec "$python" "$repo/train.py" "$@"
fi
case " $* " in
*' --run '* | *' --run='*)
    echo "train.sh: error: --run: a job has a task for each network; leave it out, or train one here with train.py" >&2
    exit 2
    ;;
esac
if ! gpus=$(sinfo --noheader --format=%G); then
    echo "train.sh: error: Slurm does not answer; to train on this machine: $python $repo/train.py $*" >&2
    exit 1
fi

# Everything is checked, and data that is missing is downloaded, before there is a job.
prepared=$("$python" "$repo/train.py" --prepare "$@") || exit
prepared=$(printf "%s\n" "$prepared" | tail -n 1) # a settings file may have printed something before
count=${prepared%% *}
networks="$count networks"
[ "$count" -ne 1 ] || networks='1 network'
folder=$(CDPATH="" cd -- "${prepared#* }" && pwd) || exit
case " $* " in *' --resume '*) resumed=yes ;; *) resumed='' ;; esac

limit=$(sed -n 's/^#SBATCH --array=[^%]*\(%[0-9]*\).*/\1/p' "$script" | tail -n 1)
case ${SBATCH_ARRAY_INX:-} in *%*) limit=%${SBATCH_ARRAY_INX##*%} ;; esac
set -- --parsable --array="1-$count$limit" --output="$(printf %s "$folder" | sed 's/%/%%/g')/slurm-%a.log"
asked=${SBATCH_GRES:-}${SBATCH_GPUS:-}${SBATCH_GPUS_PER_TASK:-}${SBATCH_GPUS_PER_NODE:-}$(grep '^#SBATCH --g[rp]' "$script")
case $gpus in *gpu*) [ -n "$asked" ] || set -- "$@" --gres=gpu:1 ;; esac
if [ -n "${SLURM_JOB_ID:-}" ]; then # submitted by a job, which may have been sent to a partition by sbatch's own flags
    set -- "$@" --partition="$SLURM_JOB_PARTITION" ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"}
fi
if ! job=$(sbatch "$@" "$script" --task "$repo" "$python" "$folder"); then
    [ -n "$resumed" ] || { rm "$folder/global_settings.py" && rmdir "$folder"; } # nothing was trained in it
    exit 1
fi
job=${job%%;*}

cat <<END
job $job: a task for each of $networks, in $folder
    squeue --job $job                                  what runs and what waits
    tail -f $folder/slurm-1.log                        what the first task says
    $python $repo/train.py --results-path $folder --plot
    scancel $job                                       stop it; the next line goes on
    sh $script --results-path $folder --resume
END

# Slurm may send the signal up to a minute early; what is left of the limit before that must be enough to train in.
signal=${SBATCH_SIGNAL:-$(sed -n 's/^#SBATCH --signal=//p' "$script" | tail -n 1)}
case $signal in *@*) lead=${signal##*@} ;; *) lead=60 ;; esac
seconds=$(squeue --noheader --job "$job" --format=%l | head -n 1 | # days-hours:minutes:seconds, or UNLIMITED
    awk -F '[-:]' '/^[0-9]/ { for (i = 1; i <= NF; i++) time = time * (/-/ && i == 2 ? 24 : 60) + $i; print time }')
if [ -n "$seconds" ] && [ "$seconds" -lt $((lead + 120)) ]; then
    echo "train.sh: warning: of a time limit of $seconds s, a task that ends $lead s before it may train nothing;" \
        "give more time (SBATCH_TIMELIMIT), or a smaller lead (SBATCH_SIGNAL=B:USR1@60)" >&2
fi
