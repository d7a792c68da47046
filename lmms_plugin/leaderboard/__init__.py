"""The leaderboard: submissions, their verification and the board."""
