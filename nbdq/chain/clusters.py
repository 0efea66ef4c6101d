"""The inflated-cluster cache: one LRU of decompressed clusters, under one byte budget, for all disks of a process.

A cluster that two readers want at once is inflated once. Clusters expected next are inflated ahead by a small pool.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

Load = Callable[[], bytes]

#: Clusters that may be waiting to be inflated ahead; more would only delay those that a reader waits for.
_AHEAD_MAX = 16


class ClusterCache:
    """Thread-safe. Keys say which cluster of which image; values are immutable bytes."""

    def __init__(self, *, budget: int, workers: int = 2) -> None:
        """``budget`` bounds the cached bytes; ``workers`` threads inflate ahead, started when first needed."""
        self._budget = budget
        self._cost = 0
        self._clusters: OrderedDict[Hashable, bytes] = OrderedDict()
        self._loading: set[Hashable] = set()
        self._lock = threading.Lock()
        self._loaded = threading.Condition(self._lock)
        self._ahead = ThreadPoolExecutor(workers, thread_name_prefix="nbdq-inflate")
        self._ahead_count = 0

    def peek(self, key: Hashable) -> bytes | None:
        """The cluster if it is cached now. Never waits for an inflation."""
        with self._lock:
            return self._touch(key)

    def get(self, key: Hashable, load: Load) -> bytes:
        """The cluster, from the cache, from another thread that is loading it, or by calling ``load``.

        Raises:
            OSError: whatever ``load`` raised; failures are not cached.
        """
        with self._lock:
            while True:
                cluster = self._touch(key)
                if cluster is not None:
                    return cluster
                if key not in self._loading:
                    break
                self._loaded.wait()
            self._loading.add(key)
        return self._load(key, load)

    def get_ahead(self, key: Hashable, load: Load) -> None:
        """Start inflating a cluster that will probably be wanted soon. A hint: returns at once, errors are dropped."""
        with self._lock:
            if key in self._clusters or key in self._loading or self._ahead_count >= _AHEAD_MAX:
                return
            self._loading.add(key)
            self._ahead_count += 1
        self._ahead.submit(self._load_ahead, key, load)

    def _touch(self, key: Hashable) -> bytes | None:
        cluster = self._clusters.get(key)
        if cluster is not None:
            self._clusters.move_to_end(key)
        return cluster

    def _load_ahead(self, key: Hashable, load: Load) -> None:
        with self._lock:
            self._ahead_count -= 1  # it waits no longer
        with suppress(OSError):  # whoever reads the cluster for real gets the error
            self._load(key, load)

    def _load(self, key: Hashable, load: Load) -> bytes:
        """Load a cluster that this thread has entered in ``_loading``."""
        cluster = None
        try:
            cluster = load()
            return cluster
        finally:
            with self._lock:
                self._loading.discard(key)
                if cluster is not None:
                    self._clusters[key] = cluster
                    self._cost += len(cluster)
                    while self._cost > self._budget:
                        self._cost -= len(self._clusters.popitem(last=False)[1])
                self._loaded.notify_all()

    def close(self) -> None:
        """Stop the pool and forget everything. A cluster that was to be loaded ahead may be left out."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._clusters.clear()
