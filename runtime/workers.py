"""Threads that decode and multiply tiles of their own, each from a core's cache.

Decoding with one pool of threads and multiplying with torch's costs more than it saves: torch's
threads spin for about a millisecond after each product, on the cores that the decoders want
(measured on two cores, others at work: no faster than one thread). So a worker does both, and
torch uses one thread inside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch


class Workers:
    """As many threads as torch uses in the thread that asks; made when first wanted."""

    def __init__(self) -> None:
        self.pool: ThreadPoolExecutor | None = None
        self.count = 0

    def run(self, work: Callable[[int, int], None], rows: int, most: int) -> None:
        """work(first, last) over all rows, by `most` threads at most; here where one is enough."""
        threads = min(torch.get_num_threads(), rows, most)
        if threads <= 1:
            work(0, rows)
            return
        inference = torch.is_inference_mode_enabled()  # a thread's own, as gradients' mode is

        def part(first: int, last: int) -> None:
            with torch.no_grad(), torch.inference_mode(inference):
                work(first, last)

        pool = self._pool(torch.get_num_threads())
        edges = [rows * place // threads for place in range(threads + 1)]
        for done in [pool.submit(part, *own) for own in pairwise(edges)]:
            done.result()

    def _pool(self, threads: int) -> ThreadPoolExecutor:
        if self.pool is None or self.count != threads:
            if self.pool is not None:
                self.pool.shutdown()
            everyone = threading.Barrier(threads + 1)

            def begin() -> None:
                torch.set_num_threads(1)
                everyone.wait()

            self.pool, self.count = ThreadPoolExecutor(threads, "tiles"), threads
            for _ in range(threads):
                self.pool.submit(begin)
            everyone.wait()
            torch.set_num_threads(threads)  # what threads that come later begin with
        return self.pool
