"""avdiff/models/codecs"""
