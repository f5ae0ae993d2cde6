"""Slurm's own notations: lists of hosts, tasks per node, and a port that all tasks of a step work out alike."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sparcomm.errors import ConfigError

PORTS = range(15000, 32000)  # below what Linux hands out to outgoing connections


def batch_script(given: Mapping[str, str]) -> bool:
    """Whether this process is the batch script of a job, or its child, and none of srun's tasks."""
    return given.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in given


def first_host(given: Mapping[str, str]) -> str | None:
    """The host of task 0: the first of the step's nodes. None if no variable says."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if name in given:
            # Up to the first comma or the end of the first bracket: tux[01-03,7]-ib,other -> tux[01-03,7]-ib
            match = re.match(r"((?:[^\[\],]|\[[^\[\]]*\])+)", given[name])
            if match is None:
                raise ConfigError(f"{name}={given[name]!r}: must be a list of hosts such as node[01-04,7]")
            return re.sub(r"\[([^\],\-]*)[^\]]*\]", r"\1", match[1])
    return given.get("SLURM_LAUNCH_NODE_IPADDR")


def local_tasks(given: Mapping[str, str]) -> int | None:
    """Tasks on this node, from ``2(x3),1`` and SLURM_NODEID; None where they do not say."""
    counts: list[int] = []
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in given:
            for part in given[name].split(","):
                match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part.strip())
                if match is None:
                    raise ConfigError(f"{name}={given[name]!r}: must look like 2(x3),1")
                counts += [int(match[1])] * int(match[2] or 1)
            break
    if not counts:
        return None
    node = given.get("SLURM_NODEID", "0" if len(counts) == 1 else "")
    if not node.isdecimal():
        return None
    if int(node) >= len(counts):
        raise ConfigError(f"SLURM_NODEID={node}, but tasks are listed for {len(counts)} nodes only")
    return counts[int(node)]


def port_for(given: Mapping[str, str]) -> int:
    """The first port that Slurm has reserved for the step, or one that follows from the numbers of job and step."""
    reserved = re.match("[0-9]{1,5}", given.get("SLURM_STEP_RESV_PORTS", ""))
    if reserved:
        return int(reserved[0])
    job, step = (re.sub("[^0-9]", "", given.get(name, "")) or "0" for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return PORTS[(int(job) * 31 + int(step)) % len(PORTS)]  # neighbours in time get different ones
