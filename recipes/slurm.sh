#!/usr/bin/env bash
# Hardware: any number of nodes with 8 GPUs each, under Slurm.
#
#   sbatch --nodes 4 recipes/slurm.sh recipes/qwen-redi-1.5b-redi-4nodes.yaml
#   sbatch --nodes 4 recipes/slurm.sh RECIPE --learning_rate 2e-6       any field of the recipe
#
# One torchrun a node; the first node is where they meet. Slurm sends SIGTERM two minutes before the time limit:
# the ranks save and end with 0 (torchrun itself with 1, so Slurm may call the job failed), and the same sbatch command
# continues. A step and a save must fit into the 30 seconds that torchrun waits: docs/training.md.
#SBATCH --job-name=redi
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

recipe=$1
shift
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --cpus-per-task "$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 python -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc_per_node "${GPUS_PER_NODE:-8}" \
  --rdzv_backend c10d --rdzv_endpoint "$head_node:${PORT:-29500}" --rdzv_id "$SLURM_JOB_ID" \
  -m redi train --config "$recipe" "$@"
