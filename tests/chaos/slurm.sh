#!/usr/bin/env bash
# A real Slurm on the two hosts of two_hosts.sh: munged, slurmctld on nodea, a slurmd on each. Needs root, slurm-wlm, munge.
#   slurm.sh up FOLDER     FOLDER is that of two_hosts.sh; afterwards FOLDER/slurm/on nodea sbatch ...
# two_hosts.sh down ends all of it but munged, which has no network: slurm.sh down FOLDER ends that.
set -euo pipefail
action=$1 folder=$(realpath -m "$2")
slurm=$folder/slurm

down() {
    [[ ! -f "$slurm/munge/pid" ]] || kill "$(<"$slurm/munge/pid")" 2>/dev/null || true
}

up() {
    mkdir -p "$slurm"/{munge,state,spool.nodea,spool.nodeb}
    chmod 755 "$slurm"
    chmod 700 "$slurm/munge"
    cat >"$slurm/slurm.conf" <<END
ClusterName=chaos
SlurmctldHost=nodea(10.77.0.1)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$slurm/munge.sock
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile=$slurm/slurmctld.pid
SlurmctldLogFile=$slurm/slurmctld.log
SlurmdPidFile=$slurm/%n.pid
SlurmdLogFile=$slurm/%n.log
SlurmdSpoolDir=$slurm/spool.%n
StateSaveLocation=$slurm/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
KillWait=15
GresTypes=gpu
NodeName=nodea NodeAddr=10.77.0.1 CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=nodeb NodeAddr=10.77.0.2 CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=nodea,nodeb Default=YES MaxTime=INFINITE State=UP GraceTime=5
END
    printf 'Name=gpu File=/dev/%s\n' null zero >"$slurm/gres.conf" # there are none: only their number is asked for
    printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n' >"$slurm/cgroup.conf"
    printf '#!/bin/sh\nSLURM_CONF="%s" exec "%s" "$@"\n' "$slurm/slurm.conf" "$folder/on" >"$slurm/on"
    chmod +x "$slurm/on"
    dd if=/dev/urandom of="$slurm/munge/key" bs=1024 count=1 2>/dev/null
    chmod 400 "$slurm/munge/key"
    setsid munged --foreground --force --socket="$slurm/munge.sock" --key-file="$slurm/munge/key" \
        --pid-file="$slurm/munge/pid" --log-file="$slurm/munge/log" --seed-file="$slurm/munge/seed" \
        >"$slurm/munge/out" 2>&1 </dev/null &
    for attempt in {1..50}; do
        [[ -S "$slurm/munge.sock" ]] && break
        sleep 0.1
    done
    setsid "$slurm/on" nodea slurmctld -D >"$slurm/slurmctld.out" 2>&1 </dev/null &
    for node in nodea nodeb; do
        setsid "$slurm/on" $node slurmd -D -N $node >"$slurm/slurmd.$node.out" 2>&1 </dev/null &
    done
    for attempt in {1..150}; do
        [[ "$("$slurm/on" nodea sinfo -h -t idle -o %D 2>/dev/null)" == 2 ]] && return
        sleep 0.2
    done
    echo "slurm.sh: the nodes are not idle, see $slurm/*.log" >&2
    exit 1
}

"$action"
