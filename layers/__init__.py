"""What a block is made of, in plain PyTorch or TransformerEngine."""
