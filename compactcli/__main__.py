"""`python -m compactcli`."""

from .cli import main

main()
