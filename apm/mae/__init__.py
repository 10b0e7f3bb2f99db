"""Masked autoencoders (He et al. 2022), heads on them, and TTT-MAE (Gandelsman et al. 2022).

`model` is the network on one page, `training` how it and its heads learn, `published` reads the weights of others, and
`test_time` adapts it to one image by itself.
"""
