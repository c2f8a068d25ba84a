"""Faults under live traffic: what a client was promised is held, whatever ends, stops or breaks.

server.py   the server as a child process, started again whenever it ends, as a supervisor would
faults.py   what is done to its processes, its disk and its files
traffic.py  clients that ask, click, and repeat a click until it is acknowledged
audit.py    what was promised against what is in the log and the registry
"""
