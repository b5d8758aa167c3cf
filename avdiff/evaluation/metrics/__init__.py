"""avdiff/evaluation/metrics"""
