"""Tensor code that rewritten graphs call: plain ATen, so that every backend can fuse it."""
