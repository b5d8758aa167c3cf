"""avdiff/phonetics"""
