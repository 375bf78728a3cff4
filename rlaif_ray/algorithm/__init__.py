"""The mathematics of RLAIF: pure functions of tensors and floats, with torch as the only import.

Nothing here knows about configuration, ranks or actors. Letters in shapes:
B samples, T completion tokens (right-padded), N flat tokens, V vocabulary.
A mask is True on real tokens. What lies outside it, NaN and inf too, changes neither values nor gradients.
"""
