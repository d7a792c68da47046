"""Shifts of images and of language: one function each, known to neither tasks nor models."""
