# cython: language_level=3
VERSION = 1
