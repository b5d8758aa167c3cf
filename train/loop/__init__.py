"""train/loop"""
