"""The inflated-cluster cache: one LRU of decompressed clusters, under one byte budget, for all disks of a process.

A cluster that two readers want at once is inflated once. Clusters expected next are inflated ahead by a pool.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial

from nbdq.pool import WorkerPool

Load = Callable[[], bytes]

#: Clusters that may be waiting to be inflated ahead; more would only delay those that a reader waits for.
_AHEAD_MAX = 16


class ClusterCache:
    """Thread-safe. Keys say which cluster of which image; values are immutable bytes."""

    def __init__(self, *, budget: int, workers: int = 2) -> None:
        """``budget`` bounds the cached bytes; ``workers`` threads inflate ahead, started when first needed."""
        self.hits = self.misses = 0
        """Clusters that were there when they were wanted, and those that had to be inflated for it."""
        self._budget = budget
        self._workers = workers
        self._pool: WorkerPool | None = None
        self._cost = 0
        self._clusters: OrderedDict[Hashable, bytes] = OrderedDict()
        self._loading: set[Hashable] = set()  # by a thread that is running now, so waiting for it cannot block for ever
        self._ahead: set[Hashable] = set()
        self._lock = threading.Lock()
        self._loaded = threading.Condition(self._lock)

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
            self.misses += 1
        return self._load(key, load)

    def get_ahead(self, key: Hashable, load: Load) -> None:
        """Have a cluster inflated that will probably be wanted soon. A hint: returns at once, errors are dropped."""
        with self._lock:
            if len(self._ahead) >= _AHEAD_MAX or key in self._ahead or key in self._clusters:
                return
            if self._pool is None:
                self._pool = WorkerPool(self._workers)
            self._ahead.add(key)
        self._pool.submit(partial(self._load_ahead, key, load))

    @property
    def cached_bytes(self) -> int:
        """Bytes of the clusters that are kept."""
        return self._cost

    def forget(self, key: Hashable) -> None:
        """Another cluster has this key from now on. Nobody may be loading the old one."""
        with self._lock:
            cluster = self._clusters.pop(key, None)
            if cluster is not None:
                self._cost -= len(cluster)

    def _touch(self, key: Hashable) -> bytes | None:
        cluster = self._clusters.get(key)
        if cluster is not None:
            self.hits += 1
            self._clusters.move_to_end(key)
        return cluster

    def _load_ahead(self, key: Hashable, load: Load) -> None:
        with self._lock:
            self._ahead.discard(key)
            if key in self._clusters or key in self._loading:
                return
            self._loading.add(key)
        with suppress(Exception):  # whoever reads the cluster for real gets the error
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
        """End the threads, and forget every cluster."""
        if self._pool is not None:
            self._pool.close()
        self._clusters.clear()
