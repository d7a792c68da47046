"""Export of results to the formats of leaderboards, the hub and serving engines."""
