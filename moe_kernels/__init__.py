"""The experts' matrix products: plain torch, and Triton."""
