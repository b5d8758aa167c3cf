"""train/evaluators"""
