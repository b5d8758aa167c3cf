"""avdiff/media"""
