"""What is free for arrays."""

from pathlib import Path

import jax


def free_bytes() -> int | None:
    """Bytes free where arrays are kept, None where that cannot be known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        about = device.memory_stats() or {}
        return about["bytes_limit"] - about["bytes_in_use"] if "bytes_limit" in about else None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return None
