"""avdiff/corpus/face"""
