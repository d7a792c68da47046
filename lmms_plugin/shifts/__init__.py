"""Shifts of images and of language: one function each, independent of tasks and models."""
