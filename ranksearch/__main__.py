"""`python -m ranksearch`."""

from ranksearch.cli import main

main()
