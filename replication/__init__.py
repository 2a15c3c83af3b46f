"""Replication: the protocol, the three modes, the first and the second appliance.

Imports `dedup`, never `fusefs`. PROTOCOL.md beside this file is the specification.
"""
