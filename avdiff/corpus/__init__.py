"""corpus of avdiff."""
