"""Blocks that know neither audio nor video: attention, RoPE, modulation, feed-forward, MoE,
Engram.
"""
