"""Media files: reading, writing, timestamps, pictures. Nothing else in avdiff knows PyAV.

May import the clock. Start with `read` and `write`.
"""
