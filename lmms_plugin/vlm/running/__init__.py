"""Execution of jobs: reading, batching, scheduling and sharding."""
