"""models of avdiff."""
