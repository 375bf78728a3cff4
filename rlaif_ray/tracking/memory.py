"""Peak memory of all processes of a run, each shared page counted once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

INTERVAL_S = 1.0
MAX_LOAD = 0.05  # share of time spent reading /proc: reading PSS of large processes takes long


class PeakMemory:
    """Samples in a daemon thread the memory of this process, the watched ones and all their descendants.

    Memory is PSS, the proportional set size: a page shared by n processes counts 1/n in each, so the weights in shared
    memory count once. Where PSS can't be read (other users' processes, other systems) it is RSS.
    """

    def __init__(self) -> None:
        self.peak_gb = 0.0  # 1e9 bytes
        self._watched: list[Callable[[], list[int]]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, pids: Callable[[], list[int]]) -> None:
        """Adds processes that are no descendants of this one, such as Ray's workers; asked anew at every sample."""
        self._watched.append(pids)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def sample(self) -> float:
        """Memory now, in GB of 1e9 bytes; raises the peak if it is higher."""
        now_gb = sum(map(_bytes_of, self._processes())) / 1e9
        self.peak_gb = max(self.peak_gb, now_gb)
        return now_gb

    def _run(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(wait_s):
            began = time.perf_counter()
            self.sample()
            wait_s = max(INTERVAL_S, (time.perf_counter() - began) / MAX_LOAD)

    def _processes(self) -> list[Any]:
        import psutil  # type: ignore[import-untyped, unused-ignore]

        roots = [psutil.Process()]
        for pids in self._watched:
            try:
                roots += [psutil.Process(pid) for pid in pids() if psutil.pid_exists(pid)]
            except Exception:  # the caller's own: memory is worth a gap in the samples, never the run
                continue
        found = {}
        for root in roots:
            try:
                found.update({process.pid: process for process in (root, *root.children(recursive=True))})
            except psutil.Error:
                continue
        return list(found.values())


def _bytes_of(process: Any) -> int:
    import psutil

    try:
        memory = process.memory_full_info()
        return int(getattr(memory, "pss", memory.rss))
    except psutil.AccessDenied:
        pass
    except psutil.Error:  # ended meanwhile
        return 0
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
