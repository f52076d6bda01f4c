"""All volumes of a store: opened as those of one stripe, and their figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_hcache.storage.contract import Stats
from sglang_hcache.storage.directory import Contents
from sglang_hcache.storage.files import device_of
from sglang_hcache.storage.quota import Quota
from sglang_hcache.storage.volume import Volume, belong_together


def open_volumes(
    directories: Sequence[Path], contents: Contents, quota_bytes: int | None, retry_s: float
) -> list[Volume]:
    volumes = []
    for path, sharers in zip(map(Path, directories), _sharers(directories), strict=True):
        quota = Quota(path, quota_bytes, contents.layout.record_bytes, sharers)
        volumes.append(Volume(path, contents, retry_s=retry_s, quota=quota))
    belong_together(volumes)
    return volumes


def figures(volumes: Sequence[Volume]) -> Stats:
    """Of all together, and of each."""
    quotas = [volume.quota for volume in volumes if volume.quota is not None]
    idle = [quota.evicted_idle_s for quota in quotas if quota.evicted_idle_s is not None]
    found: Stats = {
        "pages_file": sum(volume.pages for volume in volumes),
        "pages_damaged": sum(volume.damage.pages for volume in volumes),
        "pages_unreadable": sum(volume.reads_failed for volume in volumes),
        "files_damaged": sum(volume.damage.files for volume in volumes),
        "index_rebuilt": sum(volume.damage.index_rebuilt for volume in volumes),
        "pages_evicted": sum(quota.evicted for quota in quotas),
        "volumes": [
            {
                "path": str(volume.path),
                "state": volume.state,
                "pages": volume.pages,
                "bytes": volume.bytes_on_disk,
                "quota_bytes": volume.quota.limit if volume.quota else 0,
                "pages_evicted": volume.quota.evicted if volume.quota else 0,
            }
            for volume in volumes
        ],
    }
    return found | ({"evicted_idle_s": min(idle)} if idle else {})


def _sharers(directories: Sequence[Path]) -> list[int]:
    """For each, how many of them are on its file system; 1 where that cannot be told."""
    devices: list[int | Path] = []
    for directory in directories:
        try:
            devices.append(device_of(Path(directory).absolute()))
        except OSError:
            devices.append(directory)
    return [devices.count(device) for device in devices]
