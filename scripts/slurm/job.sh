#!/bin/bash
# One job, from its start to its end, its requeue or its failure. submit.py writes these settings above this text:
#
#   root      the repository                            folder    of the submission; logs and states in $folder/slurm
#   out       the folder of the run or the pipeline     command   recipe or script with its arguments
#   runtime   local, docker, apptainer or pyxis         image     for a container
#   mounts    for pyxis: paths, as a:a,b:b              nodes     and per_node: processes on each
#
# Exit codes of the command: 0 done; 75 stopped with a checkpoint; any other is a failure. No `set -e`: the script
# handles them itself.
# shellcheck disable=SC2154 # the settings
set -u

id=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
logs=$folder/slurm
processes=$((nodes * per_node))
scratch=$(mktemp -d "${TMPDIR:-/tmp}/job-$SLURM_JOB_ID.XXXXXX") || exit 3

# The states of this job, line by line; `make slurm-status` shows the last.
say() { echo "$(date +%FT%T) $*" | tee -a "$logs/$id.state"; }

# The progress so far: the step of the newest checkpoint of each run, and what merge and evaluate wrote.
progress() {
    find "$out" -maxdepth 2 -name run.json -exec grep -H '^  "step":' {} +
    find "$out" -maxdepth 3 \( -name merge.json -o -name 'evaluation-*.json' \)
}

# What this start has written to the log, without empty lines and boxes.
output=$(readlink "/proc/$$/fd/1") # the log; not in $logs where sbatch got an --output
begun=$(stat -c %s "$output")
log() { tail -c "+$((begun + 1))" "$output" | sed 's/│//g; s/^ *//; s/ *$//' | grep '[[:alnum:]]'; }

# Why the command failed: its last error, or else the last line that it wrote.
reason() {
    local lines
    lines=$(log | grep -Ev '^(srun|slurmstepd): |^Rank .*, on .* failed with exit code' | tail -n 40)
    { grep -E 'Error|failed with exit code' <<<"$lines" || echo "$lines"; } | tail -n 1
}

# Of several nodes: the rank that failed first, in a line that processes.py wrote on its node. It was killed, or has not
# only missed another one, which is exit code 3. Fails where there is no such rank: then a node or the network is gone.
cause() {
    local lines pattern missing='another rank (did|ended)|waited at '
    lines=$(log | grep -oE '^Rank [0-9]+ of [0-9]+, on [^ ]+, (failed with exit code|was ended by SIG).*')
    for pattern in 'was ended by SIG(KILL|SEGV|BUS|ABRT|FPE|ILL)' 'failed with exit code ([^3]|3[0-9])'; do
        grep -m 1 -E "$pattern" <<<"$lines" && return
    done
    grep -Ev "$missing" <<<"$lines" | grep -m 1 -E 'failed with exit code 3: ' && return
    # What rank 0 wrote is anywhere in the log, but also in the record of the run.
    grep -qsE "^  \"error\": .*($missing)" "$out/run.json" && return 1
    grep -m 1 -E '^Rank 0 .*failed with exit code 3' <<<"$lines"
}

# --- how the command is started -------------------------------------------------------------------------------------

# The code that Unsloth writes is separate for each job: two jobs that write the same can deadlock. What torch and Triton
# compile stays on the node for the next job, in a folder that is nobody else's.
export UNSLOTH_COMPILE_LOCATION=$scratch/unsloth
kept=/tmp/compiled-$(id -u)
mkdir -m 700 "$kept" 2>/dev/null
if [ -L "$kept" ] || [ ! -O "$kept" ]; then kept=$scratch/compiled; fi
export COMPILED_CODE=${COMPILED_CODE:-$kept}
export PYTHONUNBUFFERED=1 PYTHONPATH=$root/recipes
# Slurm sets these in every step, for GPUs of all makers; Unsloth would take them for those of an AMD GPU.
unset ROCR_VISIBLE_DEVICES GPU_DEVICE_ORDINAL ZE_AFFINITY_MASK
no_amd=(env -u ROCR_VISIBLE_DEVICES -u GPU_DEVICE_ORDINAL -u ZE_AFFINITY_MASK) # for what srun starts
export SLURM_EXPORT_ENV=ALL # this environment for srun, which would take --export=NONE from sbatch
[ "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # nor does it take this from sbatch

# One task on each node, which starts the ranks there; srun writes what they print into this job's log.
srun=(srun --nodes="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1)
launch=()
python=python
case $runtime in
local)
    ((nodes > 1)) && launch=("${srun[@]}" "${no_amd[@]}")
    python=$root/.venv/bin/python
    ;;
docker | apptainer)
    ((nodes > 1)) && launch=("${srun[@]}" "${no_amd[@]}")
    launch+=("$root/scripts/run" exec)
    export RUNTIME=$runtime IMAGE=$image
    # Docker is no part of the job and sees every GPU of the node, so it needs the numbers of the job's own. In a job
    # without GPUs, apptainer must not see any either.
    if [ "$runtime" = docker ] || [ -z "${SLURM_JOB_GPUS:-}" ]; then export CUDA_VISIBLE_DEVICES=${SLURM_JOB_GPUS:-}; fi
    export DOCKER_ARGS="--env UNSLOTH_COMPILE_LOCATION=/tmp/unsloth" # separate, as above; apptainer has the flag, too
    # A container survives when its client is killed, and holds its GPUs, unless it is removed by name.
    [ "$runtime" = docker ] && DOCKER_ARGS+=" --name job-$SLURM_JOB_ID"
    ;;
pyxis)
    export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface} # among the mounts
    mkdir -p "$HF_HOME"
    launch=("${srun[@]}" --no-container-mount-home --container-image="$image" --container-mounts="$mounts"
        --container-workdir="$root" --container-env="$(compgen -e | grep -E '^(HF|WANDB|UNSLOTH|MODELSCOPE)_|^PYTHONPATH$' | paste -sd,)" "${no_amd[@]}")
    ;;
esac
if ((processes > 1)); then
    launch+=("$python" "$root/scripts/launch/processes.py")
    if ((nodes > 1)); then
        first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        address=$(scontrol show node --oneliner "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
        port=$((20000 + SLURM_JOB_ID % 12000)) # below those that Linux gives out by itself
        # shellcheck disable=SC2016 # that of the inner bash
        while timeout 5 bash -c ': >"/dev/tcp/$0/$1"' "$address" "$port" 2>/dev/null; do ((port++)); done # it is in use
        launch+=(--master-addr="$address" --master-port="$port")
    fi
    launch+=("$per_node")
    cpus=$((${SLURM_CPUS_ON_NODE:-1} / per_node)) # of a rank; libraries take all of the node's for each
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > 1 ? cpus : 1))}
else
    launch+=("$python")
fi
launch+=("${command[@]}")

# Every node has to see what this one writes, or each would train and resume by itself; and what is compiled on it lies
# in a folder that is nobody else's, as above. Another exit code than 0 is 64 where one does not.
ask_nodes() {
    local mark=$logs/$id.seen needed=$root/scripts/run own='' now
    [ "$runtime" = local ] && needed=$python
    [[ $COMPILED_CODE == "/tmp/compiled-$(id -u)" ]] && own=$COMPILED_CODE
    now=$(date +%s.%N)
    echo "$now" >"$mark"
    # shellcheck disable=SC2016 # the nodes expand it
    "${srun[@]}" bash -c '
        for ((second = 0; second < $6; second++)); do
            ls "$1" "${2%/*}" >/dev/null 2>&1 # a network disk may remember for a minute that a file is not there
            [ "$(cat "$2" 2>/dev/null)" = "$3" ] && [ -e "$4" ] && seen=yes && break
            sleep 1
        done
        if [ ! "${seen-}" ]; then
            [ -e "$4" ] && missing=$1 || missing=$4
            echo "node $SLURMD_NODENAME does not see $missing of the first node: put it on a disk that all nodes share"
            exit 64
        fi
        [ "$5" ] || exit 0
        mkdir -m 700 "$5" 2>/dev/null
        [ ! -L "$5" ] && [ -O "$5" ] && exit 0
        echo "node $SLURMD_NODENAME: $5 belongs to somebody else; name another folder by COMPILED_CODE"
        exit 64' bash "$out" "$mark" "$now" "$needed" "$own" "${SEEN_SECONDS:-90}"
}

# --- from start to end ----------------------------------------------------------------------------------------------

clean_up() {
    [ "$runtime" = docker ] && docker rm --force "job-$SLURM_JOB_ID" >/dev/null 2>&1
    rm -rf "$scratch" "$out/STOP"
}
trap clean_up EXIT

# A file STOP stops the run: unlike a signal it gets through srun and containers.
# Slurm sends USR1 before the time is up (submit.py requests it) or to preempt; TERM when it ends the job itself, by
# scancel or preemption, and then Slurm decides whether to requeue it.
received=
# shellcheck disable=SC2317,SC2329 # the traps call it
stop() {
    received=$1
    interrupted=yes
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

rm -f "$out/STOP" # of an earlier job; it would stop this one at once
say "running on $SLURM_JOB_NODELIST${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}"
mkdir -p "$out"
{
    if ((nodes > 1)); then ask_nodes || exit; fi
    exec "${launch[@]}"
} &
process=$!
interrupted=yes
while [ $interrupted ]; do # a signal ends `wait` early
    interrupted=
    # Repeated, since a run that has just started ignores a STOP that is older than itself.
    while [ "$received" ] && kill -0 $process 2>/dev/null; do
        mkdir -p "$out" && touch "$out/STOP"
        sleep 1
    done
    wait $process
    code=$?
done

status=$(sed -n 's/^  "status": "\(.*\)",*$/\1/p' "$out/run.json" 2>/dev/null)
# On several nodes 0 can mean done or stopped; and bash's `wait` gave -1 once, when a signal came with the end.
if ((code < 0 || code == 0 && nodes > 1)); then
    [ "$status" = "done" ] && code=0 || code=75
fi
# Slurm preempts a job with a grace period by TERM for its steps, which passes this script by.
preempted() { scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; }
signalled() { preempted || grep -qs '^  "reason": "SIG' "$out"/run.json "$out"/*/run.json; }
lost=
if ((code == 0)) && [ "$status" ] && [ "$status" != "done" ]; then # something ended the process without a word
    say "failed: the command ended with 0, and run.json says $status"
    exit 1
elif ((code == 0)); then
    say "done"
    exit 0
elif [ "$received" = TERM ]; then
    ((code == 75)) && how="stopped with a checkpoint" || how="ended before it could save"
    failure=$(log | grep -o 'Node failure on .*') && how="ended by a ${failure,}"
    say "$how, as Slurm ended the job"
    exit "$code"
elif ((code == 75)) && [ ! "$received" ] && ! signalled; then
    say "stopped with a checkpoint, but not by Slurm; submitted again it resumes"
    exit 75
elif ((code == 64 && nodes > 1)); then
    say "failed: $(reason)"
    exit 3
elif ((code != 75 && nodes > 1)) && found=$(cause); then
    if [[ $found =~ (.*),\ failed\ with\ exit\ code\ ([0-9]+)(: )?(.*) ]]; then
        code=${BASH_REMATCH[2]}
        found="${BASH_REMATCH[1]}: ${BASH_REMATCH[4]:-$(reason)}" # rank 0 has written its reason into the log
    else
        code=$((128 + $(kill -l "${found##*SIG}")))
        log | grep -q oom_kill && found+=", for memory; more is SBATCH=--mem="
    fi
    say "failed with exit code $code: $found"
    exit "$code"
elif ((code > 128)) && signalled; then
    lost= # it was before its first step, and had nothing to save
elif ((code != 75 && nodes > 1)); then
    lost="lost a node ($(log | grep -E '^srun: error: |waited at ' | tail -n 1))"
elif ((code != 75)); then
    say "failed with exit code $code: $(reason)"
    exit "$code"
fi

# Requeue it, unless nothing was saved since the last time: the run would never end. Others may preempt it at any time.
now=$(progress | sort)
if [ -e "$logs/$id.progress" ] && ! preempted && [ "$now" = "$(cat "$logs/$id.progress")" ]; then
    say "failed: no checkpoint between two restarts; give it more TIME or a lower --save-steps"
    exit 1
fi
echo "$now" >"$logs/$id.progress"
trap '' USR1 TERM # requeueing ends this script by TERM, which must not stop the next run
say "requeued, to resume from its checkpoint${lost:+, since it $lost}"
clean_up
if ! answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) && [[ $answer != *pending* ]]; then # pending: Slurm was first
    say "failed: Slurm would not requeue it ($answer); submitted again it resumes"
fi
exit 75 # Slurm ignores it: the job is in the queue
