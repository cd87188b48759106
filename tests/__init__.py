"""Tests of promoter, on real guests."""
