"""pipelines of avdiff."""
