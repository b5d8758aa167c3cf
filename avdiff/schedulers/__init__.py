"""schedulers of avdiff."""
