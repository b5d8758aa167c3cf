"""`python -m avdiff` is the same as the console script."""

from avdiff.cli import main

main()
