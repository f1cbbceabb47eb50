#!/bin/sh
# One of N parts of a shard folder, as a task of a Slurm array, of GNU parallel or of xargs:
#
#   sbatch --array=1-64 shard.sh media/ shards/
#   parallel -j 8 shard.sh media/ shards/ {} 64 ::: $(seq 64)
#   seq 64 | xargs -P 8 -I{} shard.sh media/ shards/ {} 64
#
# Every task sees the same list of inputs and takes its part of it. A task that was killed is run
# again, and goes on; one that has finished finds that it has. The folder can be read when all
# parts are there.
set -eu
inputs=$1
shards=$2
part=${3:-$SLURM_ARRAY_TASK_ID}/${4:-$SLURM_ARRAY_TASK_COUNT}

# Without pipefail in sh: a stage that fails ends its stream without a footer, which the next
# stage takes for damage, and shard leaves the part unfinished.
gemtool tokenize -q --part "$part" "$inputs" |
  gemtool pack -q --length "${LENGTH:-8192}" |
  gemtool shard --part "$part" -o "$shards"
