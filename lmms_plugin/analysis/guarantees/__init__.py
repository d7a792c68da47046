"""Guarantees that were chosen on one run, judged on others and under shift."""
