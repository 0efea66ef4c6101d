"""The proof of crash consistency: record what a writer does to its files, cut the power everywhere, look at the disk.

``python -m tests.crash`` explores as many states as one likes; ``pytest tests/crash`` explores a few thousand, and
proves that the exploration finds what it is there to find. How the pieces fit:

* ``recorder``: every write, sync, punch and truncation of the files of a disk, with their begin and end in one order;
* ``states``: what may be on the medium after a power cut at one point of that order;
* ``guest``: what the guest may then read, told from stamps in every sector;
* ``verdict``: opens such a state and judges it;
* ``schedule``: threads whose interleaving is chosen by a seed, so that races can be replayed;
* ``workloads``, ``mutants``, ``explore``: what is run, with which barrier removed, and how much of it.
"""
