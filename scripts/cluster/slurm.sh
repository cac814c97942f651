#!/bin/bash
# A study as a Slurm job: a Ray cluster of its own over the job's nodes, the search, and the end of both.
#   export RANKSEARCH_RUNS=/shared/$USER/runs                                   on a file system that every node sees
#   sbatch --nodes=4 scripts/cluster/slurm.sh SPACE.yaml [options of `ranksearch search`]
#   scancel --signal=TERM --batch JOB                                           stops it as Ctrl-C does; what is finished is kept
# Three minutes before its time is up the search is interrupted and the job queued again; then, as after a preemption or the loss of a
# node, it goes on with the same study.
#SBATCH --job-name=ranksearch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ranksearch-%j.log
set -euo pipefail

space=${1:?usage: sbatch slurm.sh SPACE.yaml [options of ranksearch search]}
shift
runs=${RANKSEARCH_RUNS:?export RANKSEARCH_RUNS: the folder of the studies, on a file system that every node sees}
study=${RANKSEARCH_STUDY:-$(basename "$space" .yaml)}
case " $* " in *" --name"*)
  echo "slurm.sh: name the study by RANKSEARCH_STUDY, not by --name: whether it is there already is asked by that name" >&2
  exit 2 ;;
esac

# Activate what ranksearch is installed in, such as: source /shared/$USER/venv/bin/activate

# Ray: a token for this job alone, passed to the steps in their environment; no dashboard; ports of its own, since nodes may be shared.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
port=$((20000 + SLURM_JOB_ID % 5000 * 2))
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST") # its first line
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
address=$ip:$port
what_a_node_has=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --min-worker-port=0 --max-worker-port=0
  --dashboard-agent-listen-port=0 --disable-usage-stats --block)

# USR1: time is nearly up. TERM: stopped or preempted, after which Slurm itself queues the job again where it is to go on.
driver='' interrupted=''
# shellcheck disable=SC2329  # the traps call it
interrupt() {
  interrupted=$1
  if [ -n "$driver" ]; then kill -INT "$driver" 2>/dev/null || true; fi
}
trap 'interrupt USR1' USR1
trap 'interrupt TERM' TERM
leave() { # with the driver's exit code
  if [ "$interrupted" = USR1 ] && [ "$1" -eq 130 ]; then
    echo "slurm.sh: time is nearly up: queued again, to go on with $study" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$1"
}

set -m # each of what follows in a process group of its own, or the shell would have them ignore SIGINT
srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$ip" --port="$port" --ray-client-server-port=$((port + 1)) --include-dashboard=false \
  "${what_a_node_has[@]}" &
cluster=($!)
trap 'kill -TERM "${cluster[@]}" 2>/dev/null || true' EXIT
alive() { # how many nodes the cluster has; 0 where it does not answer yet
  python -c "import ray; ray.init('$address', logging_level='ERROR', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))" \
    2>/dev/null || echo 0
}
wait_for_nodes() {
  for _ in $(seq 60); do
    if [ "$(alive)" -ge "$1" ]; then return; fi
    if [ -n "$interrupted" ]; then leave 130; fi
    kill -0 "${cluster[-1]}" 2>/dev/null || { echo "slurm.sh: Ray has ended on a node: see above" >&2; exit 1; }
    sleep 2
  done
  echo "slurm.sh: fewer than $1 nodes have joined Ray at $address" >&2
  exit 1
}
wait_for_nodes 1
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    ray start --address="$address" "${what_a_node_has[@]}" &
  cluster+=($!)
  wait_for_nodes "$SLURM_JOB_NUM_NODES"
fi

if [ -f "$runs/$study/study.json" ]; then
  ranksearch resume "$study" --runs "$runs" --address "$address" &
else
  ranksearch search "$space" --name "$study" --runs "$runs" --address "$address" "$@" &
fi
driver=$!

code=0
wait "$driver" || code=$?
if [ -n "$interrupted" ]; then # the first wait ended with the signal
  code=0
  wait "$driver" || code=$?
fi
leave "$code"
