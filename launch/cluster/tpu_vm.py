"""Cloud TPU VMs: a script that asks for slices, and runs the job on every host of them over ssh."""

import dataclasses
import shlex
from typing import ClassVar

from meshway.framework.errors import UserError
from meshway.launch.cluster.job import Chips, Job, Renderer, quoted, tpu_chips, variable
from meshway.launch.flags import flag

_HEAD = """\
#!/usr/bin/env bash
%(job)s
#
#   bash THIS create   asks for the slices and waits until they are there
#   bash THIS run      starts the job on every host; it stays when this shell goes
#   bash THIS logs     follows the log of process 0
#   bash THIS stop     tells every process to save and stop
#   bash THIS delete   gives the slices back
set -euo pipefail

NAME=%(name)s
NODES=(%(nodes)s)
WHERE=(%(where)s)
"""

_TAIL = """\

on_hosts() {  # on_hosts NODE WORKER COMMAND
    gcloud compute tpus tpu-vm ssh "$1" "${WHERE[@]}" --worker="$2" --command="$3"
}

on_all_hosts() {  # the same command on every host of every slice
    local node failed=0 started=()
    for node in "${NODES[@]}"; do
        on_hosts "$node" all "$1" &
        started+=("$!")
    done
    for node in "${started[@]}"; do wait "$node" || failed=1; done
    return "$failed"
}

run() {
    local index variables started=() failed=0%(coordinator)s
    for index in "${!NODES[@]}"; do
        variables=""%(variables)s
        on_hosts "${NODES[$index]}" all "$(detached "$variables")" &
        started+=("$!")
    done
    for index in "${started[@]}"; do wait "$index" || failed=1; done
    return "$failed"
}

detached() {  # detached VARIABLES: a command that writes the job's script on a host and starts it for good
    local script="$1$ON_EACH_HOST"
    printf 'printf %%%%s %%q > "$HOME/%%s.sh"; ' "$script" "$NAME"
    printf 'nohup bash "$HOME/%%s.sh" > "$HOME/%%s.log" 2>&1 < /dev/null &' "$NAME" "$NAME"
}

logs() { on_hosts "${NODES[0]}" 0 "tail -n 100 -F \\"\\$HOME/$NAME.log\\""; }

stop() { on_all_hosts "pkill -TERM -f '[m]eshway launch worker'"; }

case "${1:-}" in
    create | run | logs | stop | delete) "$1" ;;
    *) sed -n 's/^#   //p' "$0" >&2; exit 2 ;;
esac
"""

_QUEUED = """\

create() {
    local state
    gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" \\
        %(asked)s
    while true; do
        state=$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state.state)')
        echo "$NAME: $state" >&2
        case "$state" in
            ACTIVE) return 0 ;;
            FAILED | SUSPENDING | SUSPENDED) return 1 ;;
        esac
        sleep 30
    done
}

delete() { gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force; }
"""

_DIRECT = """\

create() {
    local node
    for node in "${NODES[@]}"; do
        gcloud compute tpus tpu-vm create "$node" "${WHERE[@]}" \\
            %(asked)s
    done
}

delete() {
    local node
    for node in "${NODES[@]}"; do gcloud compute tpus tpu-vm delete "$node" "${WHERE[@]}"; done
}
"""

_GIVEN = """\

create() { echo "${NODES[*]}: given by --node_ids, not created here" >&2; }

delete() { echo "${NODES[*]}: given by --node_ids, not deleted here" >&2; }
"""

# libtpu joins slices by these. Cloud TPU sets them by itself for slices of one queued resource, to the same values.
_COORDINATOR = """
    local coordinator
    coordinator=$(gcloud compute tpus tpu-vm describe "${NODES[0]}" "${WHERE[@]}" \\
        --format='value(networkEndpoints[0].ipAddress)')"""
_VARIABLES = """
        variables+="export MEGASCALE_COORDINATOR_ADDRESS=$coordinator"$'\\n'
        variables+="export MEGASCALE_NUM_SLICES=${#NODES[@]} MEGASCALE_SLICE_ID=$index"$'\\n'"""


@dataclasses.dataclass(frozen=True)
class TpuVm(Renderer):
    """Cloud TPU VMs, one slice or several.

    Raises:
      UserError: what does not go together.
    """

    suffix: ClassVar[str] = ".sh"

    zone: str = flag("the zone, as us-east5-a", "ZONE")
    accelerator: str | None = flag("the type of a slice, as v5p-128", "TYPE", None)
    runtime_version: str | None = flag("the software of the VMs, as v2-alpha-tpuv5", "VERSION", None)
    num_slices: int = flag("slices, joined over the data-centre network (default: 1)", "N", 1)
    node_ids: str | None = flag("slices that are there already, by name, instead of new ones", "NAME,NAME", None)
    project: str | None = flag("the Google Cloud project", "PROJECT", None)
    direct: bool = flag("create the slices at once, or fail, instead of by a queued resource", default=False)
    spot: bool = flag("use spot capacity", default=False)
    reserved: bool = flag("use reserved capacity", default=False)

    def __post_init__(self) -> None:
        if self.spot and self.reserved:
            raise UserError("--spot and --reserved exclude each other")
        if self.node_ids is None:
            missing = [f"--{key}" for key in ("accelerator", "runtime_version") if getattr(self, key) is None]
            if missing:
                raise UserError(f"meshway launch tpu_vm needs {' and '.join(missing)} to create slices, or --node_ids")
            return
        for key in ("accelerator", "runtime_version", "direct", "spot", "reserved"):
            if getattr(self, key):
                raise UserError(f"--{key} is for slices to create, and --node_ids names slices that are there")
        if self.num_slices not in (1, len(self.node_ids.split(","))):
            raise UserError(f"--num_slices={self.num_slices}, but --node_ids names {len(self.node_ids.split(','))}")

    @property
    def chips(self) -> Chips | None:
        """The chips of the slices to create, where their type tells."""
        chips = tpu_chips(self.accelerator or "")
        words = f"--accelerator={self.accelerator}" + (f" x {self.num_slices}" if self.num_slices > 1 else "")
        return Chips(self.num_slices * chips, self.num_slices, words) if chips else None

    def nodes(self, job: Job) -> list[str]:
        """Returns the names of the slices."""
        if self.node_ids is not None:
            return self.node_ids.split(",")
        # As a queued resource names its slices itself.
        return [job.name] if self.num_slices == 1 else [f"{job.name}-{index}" for index in range(self.num_slices)]

    def render(self, job: Job) -> str:
        """Returns the shell script."""
        nodes = self.nodes(job)
        several = len(nodes) > 1
        where = [f"--zone={self.zone}"] + ([f"--project={self.project}"] if self.project else [])
        head = _HEAD % {"job": job.comment(), "name": job.name, "nodes": shlex.join(nodes), "where": shlex.join(where)}
        tail = _TAIL % {
            "coordinator": _COORDINATOR if several else "",
            "variables": _VARIABLES if several else "",
        }
        return f"{head}{variable('ON_EACH_HOST', job.script(exports=True))}{self._creation(nodes)}{tail}"

    def _creation(self, nodes: list[str]) -> str:
        """Returns the functions `create` and `delete`."""
        if self.node_ids is not None:
            return _GIVEN
        capacity = [f"--{key}" for key in ("spot", "reserved") if getattr(self, key)]
        asked = [f"--accelerator-type={self.accelerator}", *capacity]
        if self.direct:
            return _DIRECT % {"asked": shlex.join([*asked, f"--version={self.runtime_version}"])}
        name = ["--node-id=" + nodes[0]] if len(nodes) == 1 else [f"--node-count={len(nodes)}"]
        prefix = ["--node-prefix=" + nodes[0].removesuffix("-0")] if len(nodes) > 1 else []
        return _QUEUED % {"asked": shlex.join([*asked, f"--runtime-version={self.runtime_version}", *name, *prefix])}

    def submit(self, path: str) -> str:
        """Returns the command that submits the file."""
        create = "" if self.node_ids is not None else f"bash {quoted(path)} create && "
        return f"{create}bash {quoted(path)} run"
