"""nbdq serves QCOW2 backing chains over NBD."""

__version__ = "0.1.0.dev0"
