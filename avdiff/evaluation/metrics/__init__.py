"""Metrics of one clip or of a set: speech, attributes, events, signals, and their table."""
