"""Reversible networks on real data; each prints and plots memory against depth.

python -m examples.reversible.rev_vit
"""
