"""Zero a whole disk over one connection, in requests of 1 GiB, one at a time; print how long that took.

    python zero_loop.py URI

Needs libnbd's binding. Prints {"seconds": …}.
"""

import json
import sys
import time

import nbd

STEP = 1 << 30


def main(uri: str) -> None:
    client = nbd.NBD()
    client.connect_uri(uri)
    size = client.get_size()
    started = time.perf_counter()
    for offset in range(0, size, STEP):
        client.zero(min(STEP, size - offset), offset)
    client.flush()
    print(json.dumps({"seconds": time.perf_counter() - started}))
    client.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
