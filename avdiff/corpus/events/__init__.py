"""avdiff/corpus/events"""
