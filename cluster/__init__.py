"""The floor: what every process of recloop agrees on, with nothing of the layers above."""
