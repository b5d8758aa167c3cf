"""core of avdiff."""
