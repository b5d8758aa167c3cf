"""data of avdiff."""
