"""Peak memory: of the device, by phase (CUDA), or of the whole process (CPU)."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


class MemoryMeter:
    """Peak bytes of each phase. On a CPU only the process's peak can be known, and phases are not split.

    Attributes:
        peaks: phase -> most bytes allocated during it, since the meter was made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}

    def start(self) -> None:
        """A phase begins."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def stop(self, phase: str) -> None:
        """The phase that began with `start` ends."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peaks[phase] = max(self.peaks.get(phase, 0), peak)

    def process_peak(self) -> int:
        """Peak resident bytes of this process so far."""
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def release(self) -> None:
        """Hand cached blocks back after an out-of-memory error."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def allocated_peak(call: Callable[[], object]) -> int:
    """Most bytes that torch had allocated at once in host memory during a call, above what it had before.

    From the profiler's record of every allocation. Unlike the process's peak it does not depend on what the C
    library's heap looks like, and it may fall from call to call.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    now = peak = 0
    results = record.profiler.kineto_results if record.profiler else None
    changes = [e for e in results.events() if e.name() == "[memory]"] if results else []
    for change in sorted(changes, key=lambda e: e.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak
