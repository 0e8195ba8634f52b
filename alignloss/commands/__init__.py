"""The command `alignloss`: a file for each of its commands, and the reports and measurements that they share.

Imports everything else and optional packages; nothing imports it.
"""
