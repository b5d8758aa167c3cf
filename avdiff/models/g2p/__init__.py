"""avdiff/models/g2p"""
