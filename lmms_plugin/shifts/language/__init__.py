"""Language shifts: other wordings of an expression, and expressions that match nothing."""
