"""evaluation of avdiff."""
