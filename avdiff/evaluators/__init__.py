"""avdiff/evaluators"""
