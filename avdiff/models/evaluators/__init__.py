"""avdiff/models/evaluators"""
