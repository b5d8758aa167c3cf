"""train/codecs"""
