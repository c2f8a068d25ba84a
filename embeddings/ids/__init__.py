"""Ids that nobody listed beforehand get rows in embedding tables of fixed size.

config.py    the settings, and how a capacity splits into buckets
table.py     the id table: assign, look up, save, load, verify
kernels.py   its compiled loops: find, count, expire, choose a victim, admit
distinct.py  the distinct values of an array and how often each occurs
exchange.py  workers that own a range of buckets each answer one another
"""
