"""The proof of crash consistency for operations on disks that are being served: snapshots, commits, streams, and so on.

As :mod:`tests.crash`, but what is recorded is a whole directory: every layer, overlays that come and go, the state
file, and the names of all of them. ``python -m tests.crash.live`` explores as many states as one likes. The pieces:

* ``tree``: files *and* names of a directory, recorded, and what may be there after a power cut;
* ``images``: makes chains;
* ``server``: everything of ``nbdq serve`` but its sockets, on one thread: state file, jobs, volumes, restart;
* ``stage``: guests that work before, during and after what administrators order;
* ``scenarios``: chains and orders; ``mutants``: operations with one barrier removed;
* ``verdict``, ``explore``: how a state is judged, and which states are looked at;
* ``faults``: every system call of an operation fails once.
"""
