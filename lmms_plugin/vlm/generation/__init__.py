"""Generation token by token, with recording of hidden states and probabilities."""
