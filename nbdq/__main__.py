"""``python -m nbdq``."""

from nbdq.cli import main

main()
