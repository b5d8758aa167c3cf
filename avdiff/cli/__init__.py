"""avdiff/cli"""
