#!/usr/bin/env bash
# moa under torchrun, with one process for each GPU. On one node, or the same command on each of several:
#   scripts/torchrun.sh fit --config RUN.yaml --config configs/trainer/fsdp.yaml
#   NNODES=2 MASTER_ADDR=node0 scripts/torchrun.sh fit --config RUN.yaml --config configs/trainer/multinode.yaml
#
# MAX_RESTARTS=3 with --ckpt_path=last: when a process or a node dies, all start again from the newest whole checkpoint
# as soon as every node is there; a node that was lost joins by the same command. The first node keeps the meeting
# point: if it is lost, start all of them again. SIGTERM lets each process save before it ends (GRACE seconds); torchrun
# itself then ends with a code of its own, not with 75.
#
# LOGS=folder keeps what each process prints in a file of its own there; the first of each node prints here as well.
#
# NCCL, where it needs help (the same on all nodes):
#   NCCL_SOCKET_IFNAME=eth0     the interface between the nodes, where it picks one that does not reach them
#   NCCL_IB_HCA=mlx5            the InfiniBand adapters by prefix; NCCL_IB_DISABLE=1 goes by sockets
#   NCCL_DEBUG=INFO             which of them it chose; WARN is set below, so that an error says what failed
# torch 2.13 ends a process whose collective fails or exceeds the strategy's timeout (TORCH_NCCL_ASYNC_ERROR_HANDLING
# is 3 by default): leave that, and TORCH_NCCL_BLOCKING_WAIT unset. InfiniBand needs `ulimit -l unlimited`.
# The run folder is shared between the nodes; HF_HOME may be, or each node downloads by itself.
set -euo pipefail

processes=${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)} # on each node
nodes=${NNODES:-1}
if ((processes == 0)); then
    echo "no GPU here; on the CPU give the number of processes: PROCESSES=2 $0 …  --trainer.accelerator=cpu" >&2
    exit 2
fi
# torch 2.13 has one store for all rounds and takes each to have its own: after a restart processes look for each other
# where the former ones were, and the agents that are left do not tell a new one the rendezvous address.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if ((nodes == 1)); then
    meeting=(--standalone)
else
    address=${MASTER_ADDR:?with several nodes, MASTER_ADDR is the name or address of the first, on all of them}
    meeting=(--rdzv-backend=c10d --rdzv-endpoint="$address:${MASTER_PORT:-29400}" --rdzv-id="${RUN_ID:-moa}")
fi
logs=()
if [[ -n ${LOGS:-} ]]; then
    export MOA_ALL_RANKS=1
    logs=(--log-dir="$LOGS" --redirects=3 --tee=0:3)
fi

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
exec torchrun --nnodes="$nodes" --nproc-per-node="$processes" "${meeting[@]}" "${logs[@]}" \
    --max-restarts="${MAX_RESTARTS:-0}" --shutdown-timeout="${GRACE:-300}" \
    --no-python moa "$@" --trainer.devices="$processes" --trainer.num_nodes="$nodes"
