"""Station 3: how much memory and disk this machine has for a run: what the machine has, or less where it is limited."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Room:
    """How much there is of something that bytes are put into."""

    whose: str
    """For a person."""
    size: int | None
    """Bytes that this process may come to have of it; None where the system does not tell."""
    free: int | None = None
    """Bytes of it that nothing else uses now; None where the system does not tell."""


@dataclass(frozen=True)
class Available:
    """What a run has to make do with."""

    memory: Room
    """Of the machine."""
    disk: Room
    """Of the output's disk."""
    device: Room | None = None
    """Of an accelerator with a memory of its own; None where the work is done in the machine's."""


def find_available(device: torch.device, folder: Path, held: int = 0, kept: int = 0) -> Available:
    """What there is for a run on `device` that writes into `folder`.

    Args:
        device: of the run.
        folder: of the output; it need not be there yet.
        held: bytes of memory (of `device`) that this process holds already, and that are part of what the run needs.
        kept: bytes on the disk that an earlier run left, likewise.
    """
    there = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path.cwd())
    free = shutil.disk_usage(there).free + kept
    disk = Room(f"the disk of {folder}", free, free)
    if device.type != "cuda":
        return Available(_memory(held), disk)
    unused, size = torch.cuda.mem_get_info(device)
    return Available(_memory(0), disk, Room(torch.cuda.get_device_name(device), size, unused + held))


def _memory(held: int) -> Room:
    rooms = [*_machine(), *_control_groups(), *_address_space(held)]
    sizes = [(room.size, room.whose) for room in rooms if room.size is not None]
    if not sizes:
        return Room("this machine", None)
    size, whose = min(sizes)
    frees = [room.free + held for room in rooms if room.free is not None]
    return Room(whose, size, min([size, *frees]) if frees else None)


def _machine() -> Iterator[Room]:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    lines = (line.split() for line in _read(Path("/proc/meminfo")).splitlines())  # of Linux; in KiB
    free = next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), None)
    yield Room("this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), free)


def _control_groups() -> Iterator[Room]:
    """Limits of the control groups that this process is in, from its own to the root: containers are such groups."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            root, limit = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        for folder in (root / inside.lstrip("/"), *(root / inside.lstrip("/")).parents):
            size = _read(folder / limit).strip()
            if size.isdigit():  # else "max"
                yield Room("this container or control group", int(size))
            if folder == root:
                break


def _address_space(held: int) -> Iterator[Room]:
    """What is left of the addresses that this process may have, of which the libraries took their share."""
    if sys.platform == "win32":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _read(Path("/proc/self/statm")).split()
    if limit != resource.RLIM_INFINITY and pages:
        left = max(0, limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE"))
        yield Room("this process, by its limit of address space (ulimit -v)", left + held)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
