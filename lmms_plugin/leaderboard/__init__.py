"""Submissions, their verification and the board."""
