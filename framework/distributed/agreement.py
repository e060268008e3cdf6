"""What must be the same in every process of a run, compared before the run begins."""

import collections
import hashlib
import json
from collections.abc import Mapping

from meshway.framework.distributed import processes
from meshway.framework.distributed.barrier import named
from meshway.framework.distributed.deadlines import Deadlines
from meshway.framework.errors import UserError


def agree(facts: Mapping[str, str]) -> None:
    """Compares `facts` (name -> text) with those of the other processes.

    Raises:
      UserError: one differs, the same message in every process; it names the odd ones out.
      EnvironmentFailure: a process did not get so far within `Deadlines.agreement`.
    """
    brought = processes.barrier("the comparison of recipes", Deadlines.of().agreement, json.dumps(shortened(facts)))
    if found := differences({process: json.loads(text) for process, text in brought.items()}):
        raise UserError(f"the processes of this run do not agree: {found}. Start all with the same command and files")


def shortened(facts: Mapping[str, str]) -> dict[str, str]:
    """Returns `facts` with long texts replaced by their hashes."""
    return {
        name: text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:12]
        for name, text in facts.items()
    }


def differences(facts: Mapping[int, Mapping[str, str]]) -> str:
    """Returns which facts differ between processes, and in whom; "" where none does."""
    found = []
    for name in sorted({name for each in facts.values() for name in each}):
        groups = collections.defaultdict(list)
        for process, each in sorted(facts.items()):
            groups[each.get(name, "none")].append(process)
        if len(groups) == 1:
            continue
        usual = max(groups, key=lambda value: len(groups[value]))  # of equals the one of process 0
        others = [f"{named(who, len(facts))}: {value!r}" for value, who in groups.items() if value != usual]
        found.append(f"{name}: {'; '.join(others)}; {named(groups[usual], len(facts))}: {usual!r}")
    return ". ".join(found)
