"""avdiff/evaluation/report"""
