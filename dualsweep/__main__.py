"""`python -m dualsweep`."""

from dualsweep.cli import main

main()
