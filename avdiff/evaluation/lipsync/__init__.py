"""avdiff/evaluation/lipsync"""
