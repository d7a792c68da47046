"""From jobs to answers: which are read, batched and answered when, and by which process."""
