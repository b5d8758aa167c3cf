"""Lip-sync: offset and agreement of lips and sound, and how good the measurement is.

Start with `measure`.
"""
