"""What turns an item's text, picture or sound into a vector."""
