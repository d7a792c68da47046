"""What a report shows, as values: runs read and measured, put together, and in tables."""
