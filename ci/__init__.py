"""What is run on a checkout: tests, benchmarks, the demonstration."""
