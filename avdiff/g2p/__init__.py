"""avdiff/g2p"""
