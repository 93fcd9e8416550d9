"""Measurements that anyone can run again: each appends JSON lines to results/, which report and figures read."""
