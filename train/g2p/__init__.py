"""train/g2p"""
