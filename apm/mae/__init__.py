"""Masked autoencoders (He et al. 2022), and heads on them (Gandelsman et al. 2022).

`model` is the network on one page, `training` how it and its heads learn, `published` reads the weights of others.
"""
