"""Small shared pieces that know nothing of models, tasks or metrics."""
