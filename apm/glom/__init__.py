"""GLOM (Hinton 2021, "How to represent part-whole hierarchies in a neural network", arXiv 2102.12627).

`model` is the network on one page, `islands` the parse tree that is read from it, `training` how it learns from images.
"""
