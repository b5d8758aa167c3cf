"""`python -m avdiff` is the same as the console script."""

from avdiff.cli.main import main

main()
