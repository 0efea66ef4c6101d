"""The inflated-cluster cache: one LRU of decompressed clusters, under one byte budget, for all disks of a process.

A cluster that two readers want at once is inflated once. Clusters expected next are inflated ahead by a small pool.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

Load = Callable[[], bytes]

#: Clusters that may wait to be inflated ahead; more would only delay those that a reader waits for.
_AHEAD_MAX = 8


class ClusterCache:
    """Thread-safe. Keys say which cluster of which image; values are immutable bytes."""

    def __init__(self, *, budget: int, workers: int = 2) -> None:
        """``budget`` bounds the cached bytes; ``workers`` threads inflate ahead, started when first needed."""
        self._budget = budget
        self._cost = 0
        self._clusters: OrderedDict[Hashable, bytes] = OrderedDict()
        self._loading: dict[Hashable, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._ahead = ThreadPoolExecutor(workers, thread_name_prefix="nbdq-inflate")

    def peek(self, key: Hashable) -> bytes | None:
        """The cluster if it is cached now. Never waits for an inflation."""
        with self._lock:
            cluster = self._clusters.get(key)
            if cluster is not None:
                self._clusters.move_to_end(key)
            return cluster

    def get(self, key: Hashable, load: Load) -> bytes:
        """The cluster, from the cache, from another thread that is loading it, or by calling ``load``.

        Raises:
            OSError: whatever ``load`` raised, in every thread that waited for it; failures are not cached.
        """
        with self._lock:
            cluster = self._clusters.get(key)
            if cluster is not None:
                self._clusters.move_to_end(key)
                return cluster
            pending = self._loading.get(key)
            if pending is None:
                mine: Future[bytes] = Future()
                self._loading[key] = mine
        if pending is not None:
            return pending.result()
        return self._load(key, load, mine)

    def get_ahead(self, key: Hashable, load: Load) -> None:
        """Start inflating a cluster that will probably be wanted soon. A hint: returns at once, errors are dropped."""
        with self._lock:
            if key in self._clusters or key in self._loading or len(self._loading) >= _AHEAD_MAX:
                return
            mine: Future[bytes] = Future()
            self._loading[key] = mine
        self._ahead.submit(self._load_quietly, key, load, mine)

    def _load_quietly(self, key: Hashable, load: Load, mine: Future[bytes]) -> None:
        with suppress(OSError):  # whoever reads the cluster for real gets the error
            self._load(key, load, mine)

    def _load(self, key: Hashable, load: Load, mine: Future[bytes]) -> bytes:
        try:
            cluster = load()
        except BaseException as error:
            with self._lock:
                del self._loading[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._loading[key]
            self._clusters[key] = cluster
            self._cost += len(cluster)
            while self._cost > self._budget:
                self._cost -= len(self._clusters.popitem(last=False)[1])
        mine.set_result(cluster)
        return cluster

    def close(self) -> None:
        """Stop the pool and forget everything."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._clusters.clear()
