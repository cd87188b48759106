"""Measured figures: a module for each family of tables, and harness.py, which all have in common.

Everything is compared within one run on real guests that write all the while. What is compared
takes turns, so that a machine whose speed drifts is as unfair to one as to another.
"""
