"""avdiff/corpus/speech"""
