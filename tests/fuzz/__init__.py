"""Fuzzing of the protocol: its parsers by coverage (``parser``), a live server by a state machine (``protocol``)."""
