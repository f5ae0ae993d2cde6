#!/usr/bin/env bash
# Starts a Slurm of one node on this machine, runs a command in it, and stops it again: to try launch/slurm.sbatch
# without a cluster. Root only; needs Debian's packages: apt-get install slurm-wlm munge
#
#   launch/slurm-here.sh sbatch --wait --ntasks-per-node 2 launch/slurm.sbatch --config configs/digits-spardl.yaml
#
# munged, slurmctld and slurmd run on keys, sockets, ports and files of their own, so a Slurm that is installed here is
# not touched. SLURM_HERE: an empty folder for all that, kept afterwards (else a temporary one, removed). Ends with the
# command's exit code.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

[[ $# -ge 1 ]] || fail "no command given; usage: launch/slurm-here.sh COMMAND [argument ...]"
[[ $(id -u) == 0 ]] || fail "only root can start slurmd"
PATH=$PATH:/usr/sbin:/sbin
for program in munged slurmctld slurmd srun; do
    command -v "$program" >/dev/null || fail "$program is missing: apt-get install slurm-wlm munge"
done

here=${SLURM_HERE:-$(mktemp -d)}
mkdir -p "$here"
here=$(cd "$here" && pwd)
# munged refuses folders that others can write to; a user's /tmp is sticky, which it accepts.
chmod 755 "$here"
mkdir -p "$here/state" "$here/spool"
head -c 1024 /dev/urandom >"$here/munge.key"
chmod 600 "$here/munge.key"

host=$(hostname -s)
cores=$(nproc)
base=$((20000 + $$ % 10000))
cat >"$here/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$here/munge.socket
CredType=cred/munge
SlurmctldPort=$base
SlurmdPort=$((base + 1))
StateSaveLocation=$here/state
SlurmdSpoolDir=$here/spool
SlurmctldPidFile=$here/slurmctld.pid
SlurmdPidFile=$here/slurmd.pid
SlurmctldLogFile=$here/slurmctld.log
SlurmdLogFile=$here/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
# Ranks wait for each other more than they compute, so the node offers more CPUs than it has.
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$((cores < 4 ? 4 : cores)) State=UNKNOWN
PartitionName=here Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$here/slurm.conf

# shellcheck disable=SC2317 # the trap below calls it
stop() {
    local file
    scancel --user root 2>/dev/null || true
    # A slurmstepd whose slurmd is gone stays forever; each has a socket in the spool folder while it runs.
    for _ in $(seq 50); do
        compgen -G "$here/spool/*.*" >/dev/null || break
        sleep 0.1
    done
    for file in slurmd slurmctld munged; do
        [[ -s $here/$file.pid ]] && kill "$(<"$here/$file.pid")" 2>/dev/null
    done
    # They write their last words, and remove these files.
    for _ in $(seq 100); do
        compgen -G "$here/*.pid" >/dev/null || break
        sleep 0.1
    done
    [[ -n ${SLURM_HERE:-} ]] || rm -rf "$here"
    return 0
}
trap stop EXIT

munged --force --key-file "$here/munge.key" --socket "$here/munge.socket" --pid-file "$here/munged.pid" \
    --log-file "$here/munged.log" --seed-file "$here/munge.seed"
slurmctld
slurmd
for _ in $(seq 150); do
    [[ $(sinfo --noheader --format %T 2>/dev/null) == idle ]] && break
    sleep 0.1
done
if [[ $(sinfo --noheader --format %T) != idle ]]; then
    tail -n 20 "$here"/*.log >&2
    fail "the node did not come up within 15 s; above are the ends of its logs"
fi
status=0
"$@" || status=$?
exit "$status"
