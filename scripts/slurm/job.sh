#!/bin/bash
# One job, from its start to its end, its requeue or its failure. submit.py writes the settings named below in front of
# this text, and Slurm runs the two together:
#
#   root      the repository                            folder    what was submitted; logs and states in $folder/slurm
#   out       the folder of the run or the pipeline     command   recipe or script with its arguments
#   runtime   local, docker, apptainer or pyxis         image     for a container
#   mounts    for pyxis: places, as a:a,b:b             nodes     and per_node: processes on each
#
# Exit codes of the command: 0 done; 75 stopped with a checkpoint; any other has failed. No `set -e`: they are the point.
# shellcheck disable=SC2154 # the settings
set -u

id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
logs=$folder/slurm
processes=$((nodes * per_node))
scratch=$(mktemp -d "${TMPDIR:-/tmp}/job-$SLURM_JOB_ID.XXXXXX") || exit 3

# What becomes of this job, line by line; `make slurm-status` shows the last.
say() { echo "$(date +%FT%T) $*" | tee -a "$logs/$id.state"; }

# What is finished so far: the checkpoints of a run, or of all in a pipeline, and what else that leaves.
progress() {
    find "$out" -maxdepth 2 -name run.json -exec grep -H '^  "step":' {} +
    find "$out" -maxdepth 3 \( -name merge.json -o -name 'evaluation-*.json' \)
}

# Why the command failed: its last error, or else the last line that it wrote.
reason() {
    local lines
    lines=$(tail -qn 40 "$logs/$id.log" "$out/slurm/$id"-rank*.log 2>/dev/null | sed 's/│//g; s/^ *//; s/ *$//' | grep '[[:alnum:]]')
    { grep -E 'Error|failed with exit code' <<<"$lines" || echo "$lines"; } | tail -n 1
}

# --- how the command is started -------------------------------------------------------------------------------------

# Caches of compiled code are each job's own: two jobs that write the same one can wait for each other for ever.
export UNSLOTH_COMPILE_LOCATION=$scratch/unsloth TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
export TRITON_CACHE_DIR=$scratch/triton
export PYTHONUNBUFFERED=1 PYTHONPATH=$root/recipes
# Slurm sets these, again in every step, for GPUs of all makers, and Unsloth takes them for signs of an AMD one.
no_amd='unset ROCR_VISIBLE_DEVICES GPU_DEVICE_ORDINAL ZE_AFFINITY_MASK'
$no_amd
export SLURM_EXPORT_ENV=ALL # this environment for srun, which would take --export=NONE from sbatch
[ "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # nor does it take this from sbatch

srun=(srun --nodes="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --open-mode=append)
launch=()
python=python
case $runtime in
local)
    ((nodes > 1)) && launch=("${srun[@]}")
    python=$root/.venv/bin/python
    ;;
docker | apptainer)
    ((nodes > 1)) && launch=("${srun[@]}")
    launch+=(python3 "$root/scripts/launch.py")
    export RUNTIME=$runtime IMAGE=$image
    # Docker is no part of the job and would give out every GPU of the node, so it is told the numbers of the job's own.
    # For apptainer CUDA_VISIBLE_DEVICES holds, as long as there is any.
    if [ "$runtime" = docker ] || [ -z "${SLURM_JOB_GPUS:-}" ]; then export GPUS=${SLURM_JOB_GPUS:-}; fi
    export DOCKER_ARGS="--env UNSLOTH_COMPILE_LOCATION=/tmp/unsloth" # each job's own, as above; apptainer has the flag, too
    # A container outlives a client that is killed, and holds its GPUs, unless it is removed by name.
    [ "$runtime" = docker ] && DOCKER_ARGS+=" --name job-$SLURM_JOB_ID"
    ;;
pyxis)
    export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface} # among the mounts
    mkdir -p "$HF_HOME"
    launch=("${srun[@]}" --no-container-mount-home --container-image="$image" --container-mounts="$mounts"
        --container-workdir="$root" --container-env="$(compgen -e | grep -E '^(HF|WANDB|UNSLOTH|MODELSCOPE)_|^PYTHONPATH$' | paste -sd,)")
    ;;
esac
if ((processes > 1)); then
    address=localhost # also in a container with a network of its own
    if ((nodes > 1)); then
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        address=$(scontrol show node --oneliner "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
    fi
    # Every process writes a log of its own, into the folder that the last word of the command names: a container has it
    # under its true name, not that of a link. And one that stopped as it was told is no failure to torchrun.
    mkdir -p "$out/slurm"
    # shellcheck disable=SC2016 # each process expands it
    rank=$no_amd'; "${@:2}" >>"${@: -1}/slurm/$1-rank$RANK.log" 2>&1; code=$?; [ $code = 75 ] || exit $code'
    launch+=("$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$per_node"
        --rdzv-backend=c10d --rdzv-id="$id" --rdzv-endpoint="$address:$((20000 + SLURM_JOB_ID % 20000))"
        --no-python bash -c "$rank" bash "$id")
fi
launch+=("$python" "${command[@]}")

# --- from start to end ----------------------------------------------------------------------------------------------

clean_up() {
    [ "$runtime" = docker ] && docker rm --force "job-$SLURM_JOB_ID" >/dev/null 2>&1
    rm -rf "$scratch" "$out/STOP"
}
trap clean_up EXIT

# A file tells the run to stop: it gets through srun, torchrun and containers alike, which a signal does not.
# Slurm sends USR1 before the time is up (submit.py asks for it) or to preempt; TERM when it takes the job away itself,
# by scancel or preemption, and then it alone decides whether the job comes again.
told=
# shellcheck disable=SC2317,SC2329 # the traps call it
stop() {
    told=$1
    interrupted=yes
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

rm -f "$out/STOP" # of a job before this one: it would stop this one at once, again and again
say "running on $SLURM_JOB_NODELIST${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}"
"${launch[@]}" &
process=$!
interrupted=yes
while [ $interrupted ]; do # a signal ends `wait` before its time
    interrupted=
    # Again and again, as a run that has just started takes an order older than itself for a left-over.
    while [ "$told" ] && kill -0 $process 2>/dev/null; do
        mkdir -p "$out" && touch "$out/STOP"
        sleep 1
    done
    wait $process
    code=$?
done

status=$(sed -n 's/^  "status": "\(.*\)",*$/\1/p' "$out/run.json" 2>/dev/null)
# Of several processes 0 may mean either; and bash's `wait` gave -1 once, when a signal came together with the end.
if ((code < 0 || code == 0 && processes > 1)); then
    [ "$status" = "done" ] && code=0 || code=75
fi
if ((code == 0)); then
    say "done"
    exit 0
elif [ "$told" = TERM ]; then
    ((code == 75)) && how="stopped with a checkpoint" || how="ended before it could save"
    say "$how, as Slurm took the job away"
    exit "$code"
elif ((code != 75)); then
    say "failed with exit code $code: $(reason)"
    exit "$code"
elif [ ! "$told" ] && ! grep -qs '^  "reason": "SIG' "$out"/run.json "$out"/*/run.json; then # a signal past this script: preemption
    say "stopped with a checkpoint, but not by Slurm; submitted again it goes on"
    exit 75
fi

# Again from here, but not for ever: a run that gets no further in the time it has never will.
now=$(progress | sort)
if [ -e "$logs/$id.progress" ] && [ "$now" = "$(cat "$logs/$id.progress")" ]; then
    say "failed: no checkpoint between two restarts; give it more TIME or a lower --save-steps"
    exit 1
fi
echo "$now" >"$logs/$id.progress"
trap '' USR1 TERM # requeueing ends this script by TERM, which would be taken for another order to stop
say "requeued, to go on from its checkpoint"
clean_up
scontrol requeue "$SLURM_JOB_ID" || say "failed: Slurm would not requeue it; submitted again it goes on"
exit 75 # which Slurm no longer looks at: the job is in the queue
