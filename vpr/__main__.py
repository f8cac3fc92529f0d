"""``python -m vpr``: the ``vpr`` command, for ``torchrun -m vpr ...``."""

from vpr.cli import main

main()
