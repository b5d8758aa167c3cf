"""train/joint"""
