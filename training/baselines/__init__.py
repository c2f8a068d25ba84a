"""Classical recommenders that every quality claim is held against.

interface.py   what they have in common: fitted on who has what, they score every item for what someone has
popularity.py  what most people have
neighbours.py  item-based and user-based collaborative filtering
content.py     what is told alike
factors.py     matrix factorisation: ALS and BPR
ease.py, autoencoder.py   EASE: event by event on a live replay; for many users at once
hybrid.py      a weighted sum of others
config.py      what can be set about them, and how each is built
"""
