"""Visual question answering with confidence: datasets, scores and YAML."""
