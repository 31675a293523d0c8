#!/bin/bash
# A whole task on several nodes of a Slurm cluster, from the root of the repository:
#
#     sbatch docs/slurm.sh --dataset voc --task 15-5 --overlap --step all --method MIB --name MIB --recipe paper
#
# One launcher per node. Five minutes before the time limit the run writes a checkpoint and the job
# puts itself back into the queue; then, and after a lost node, it goes on from its checkpoint.
#SBATCH --job-name=mib
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
export MASTER_ADDR MASTER_PORT
export PROCESSES=${PROCESSES:-4} # per node: one for each GPU
export PYTHON=${PYTHON:-.venv/bin/python}

# shellcheck disable=SC2016  # the variables of each node are meant, not those here
srun bash -c '
    exec "$PYTHON" -m torch.distributed.run \
        --nnodes="$SLURM_NNODES" --node_rank="$SLURM_NODEID" --nproc_per_node="$PROCESSES" \
        --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" \
        run.py --continue_ckpt "$@"' run "$@" &
launchers=$!

requeue() {
    kill -TERM "$launchers" # srun passes it on
    wait "$launchers" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue TERM
wait "$launchers"
