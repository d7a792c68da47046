"""Structure: components, blocks, roles and experts of a model, found without knowing its architecture."""
