"""Two works measured alternately in one process, and the memory that one adds."""

import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Memory:
    """The most resident memory that the block added, in bytes, looked at every millisecond."""

    def __enter__(self) -> "Memory":
        self.peak, self._start, self._on = 0, self._resident(), True
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()

    def _resident(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def _look(self) -> None:
        while self._on:
            self.peak = max(self.peak, self._resident() - self._start)
            time.sleep(0.001)


def paired(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median over rounds of (time of one) / (time of other), run alternately; and the quartiles of that ratio."""
    one(), other()
    ratios, base = [], []
    for i in range(rounds):
        first, second = (one, other) if i % 2 else (other, one)
        a, b = seconds(first), seconds(second)
        ratios.append(a / b if i % 2 else b / a)
        base.append(b if i % 2 else a)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": middle, "quartiles": [low, high], "seconds_of_plain": statistics.median(base)}
