"""How much host memory there is, on the machine and within a container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil

# For cgroups v2 and v1: mount point, limit files, usage file, fields of `memory.stat` that the kernel can reclaim.
_VERSIONS = (
    (
        "sys/fs/cgroup",
        ("memory.max", "memory.high"),
        "memory.current",
        ("active_file", "inactive_file"),
    ),
    (
        "sys/fs/cgroup/memory",
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)


def available_bytes(system: Path = Path("/")) -> int:
    """What this process can take before it swaps or is killed: of the machine, and of each control group it is in."""
    left = [psutil.virtual_memory().available]
    if (uncommitted := _uncommitted(system / "proc")) is not None:
        left.append(uncommitted)
    for mount, limits, used, dropped in _VERSIONS:
        for group in _groups(system / mount, system / "proc/self/cgroup"):
            try:
                in_use = int((group / used).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # it counts no memory, as the root of them all
                continue
            in_use -= sum(int(stat.get(name, 0)) for name in dropped)
            left += [limit - in_use for name in limits if (limit := _limit(group / name)) is not None]
    return max(0, min(left))


def total_bytes(system: Path = Path("/")) -> int:
    """What this process could take if nobody else took any."""
    least = psutil.virtual_memory().total
    for mount, limits, _, _ in _VERSIONS:
        for group in _groups(system / mount, system / "proc/self/cgroup"):
            least = min([least, *(limit for name in limits if (limit := _limit(group / name)) is not None)])
    return least


def _uncommitted(proc: Path) -> int | None:
    """Bytes left below the commit limit if the kernel does not overcommit (mode 2); None in other modes.

    A process that touches more shared memory than that gets SIGBUS.
    """
    mode = proc / "sys/vm/overcommit_memory"
    if not mode.is_file() or mode.read_text().strip() != "2":
        return None
    kib = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    return (int(kib["CommitLimit"].split()[0]) - int(kib["Committed_AS"].split()[0])) * 1024


def _groups(mount: Path, membership: Path) -> list[Path]:
    """Those of this process that can be seen: often a container's own at the mount, and nothing else."""
    groups = {mount}
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory") or "memory" in controllers.split(","):
            group = mount / path.strip("/")
            groups |= {group, *group.parents}
    return sorted(group for group in groups if group.is_relative_to(mount) and group.is_dir())


def _limit(file: Path) -> int | None:
    """None where there is none."""
    text = file.read_text().strip() if file.is_file() else "max"
    return None if text == "max" else int(text)
