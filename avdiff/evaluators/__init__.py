"""The evaluator networks as measurements use them: loaded once, asked in batches.

May import models and phonetics, never a model that generates.
"""
