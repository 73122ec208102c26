<<<<<<< HEAD
"""Passes that edit the rule: how a backward is computed (knob B)."""
=======
"""Passes that edit the backward function of an operator (knob B)."""
>>>>>>> 614c8db (guided-relu and straight-through: the backward rule of ReLU and of rounding)
