"""Results in the formats of leaderboards, and a leaderboard of submissions that verify."""
