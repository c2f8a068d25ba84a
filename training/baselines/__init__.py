"""Classical recommenders that every quality claim is held against."""
