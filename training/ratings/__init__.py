"""How a user would rate an item: pointwise, from explicit feedback."""
