"""What promoter does: each operation is a loop of decide, journal, act and look."""
