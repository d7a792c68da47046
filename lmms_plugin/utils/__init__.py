"""Small shared functions that do not depend on models, tasks or metrics."""
