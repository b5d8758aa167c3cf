"""train of avdiff."""
